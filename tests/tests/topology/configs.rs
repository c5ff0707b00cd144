//! `slb check` on every file in `tests/configs`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use slb_lab::gateway::binary;

fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join(folder);
    let mut files: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    files
}

fn check(file: &Path) -> Output {
    Command::new(binary().unwrap()).arg("check").arg(file).output().unwrap()
}

#[test]
#[ignore = "needs the binary"]
fn given_wrong_files_when_checked_then_every_mistake_is_reported_with_its_line_and_exit_2() {
    for file in files("wrong") {
        let text = fs::read_to_string(&file).unwrap();
        let output = check(&file);
        let said = String::from_utf8(output.stderr).unwrap();
        let name = file.display();
        assert_eq!(output.status.code(), Some(2), "{name}: {said}");
        assert!(output.stdout.is_empty(), "{name}: mistakes belong on stderr");
        let expected: Vec<_> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# expect "))
            .map(|line| line.split_once(": ").unwrap())
            .collect();
        assert!(!expected.is_empty(), "{name} expects nothing");
        for (line, fragment) in expected {
            let place = format!("{name}:{line}:");
            let found =
                said.lines().any(|said| said.starts_with(&place) && said.contains(fragment));
            assert!(found, "{place} {fragment:?} is not in\n{said}");
        }
    }
}

#[test]
#[ignore = "needs the binary"]
fn given_good_files_when_checked_then_exit_0() {
    for file in files("good") {
        let output = check(&file);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{}: {said}", file.display());
    }
}

#[test]
#[ignore = "needs the binary"]
fn given_no_such_file_when_checked_then_its_name_is_reported_with_exit_2() {
    let output = check(Path::new("/nonexistent/slb.toml"));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("/nonexistent/slb.toml"), "{said}");
}
