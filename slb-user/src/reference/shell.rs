//! Manual pages and shell completions, made from the definition of the command line.
//!
//! They are not in the repository: `cargo xtask docs` writes them below the target directory, for packages to take.

use std::{env, fs, io, path::Path, process::Command};

use clap::CommandFactory as _;
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;

use super::WRITE;
use crate::cli::Cli;

/// Commands for administrators.
const SECTION: &str = "8";
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Fish, Shell::Zsh];

#[test]
fn every_command_has_a_manual_page_and_is_completed() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = match env::var_os(WRITE) {
        // `CARGO_TARGET_DIR` is not set for tests; the executable is in `TARGET/PROFILE/deps`.
        Some(_) => env::current_exe().unwrap().ancestors().nth(3).unwrap().join("docs"),
        None => scratch.path().to_owned(),
    };
    write(&folder).unwrap();

    let completions: Vec<String> = ["slb.bash", "slb.fish", "_slb"]
        .map(|name| fs::read_to_string(folder.join("completions").join(name)).unwrap())
        .into();
    let mut names = Vec::new();
    collect(&built(), &mut names);
    assert!(names.len() > 15, "{names:?}");
    for name in &names {
        let page = fs::read_to_string(folder.join("man").join(format!("{name}.{SECTION}")));
        let page = page.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(page.contains(".SH SYNOPSIS"), "{name}: {page}");
        let last = name.rsplit('-').next().unwrap();
        assert!(completions.iter().all(|text| text.contains(last)), "{name}");
    }
    assert_eq!(fs::read_dir(folder.join("man")).unwrap().count(), names.len());
}

#[test]
fn bash_accepts_its_completions() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path()).unwrap();
    let script = folder.path().join("completions/slb.bash");
    assert!(Command::new("bash").arg("-n").arg(script).status().unwrap().success());
}

/// The command line with the full name of each command.
fn built() -> clap::Command {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    command
}

fn collect(command: &clap::Command, names: &mut Vec<String>) {
    names.push(command.get_display_name().unwrap_or("slb").to_owned());
    command.get_subcommands().for_each(|command| collect(command, names));
}

fn write(folder: &Path) -> io::Result<()> {
    let (man, completions) = (folder.join("man"), folder.join("completions"));
    for folder in [&man, &completions] {
        fs::create_dir_all(folder)?;
    }
    write_pages(&built(), &man)?;
    for shell in SHELLS {
        generate_to(shell, &mut built(), "slb", &completions)?;
    }
    Ok(())
}

/// A page for a command and one for each command below it.
fn write_pages(command: &clap::Command, folder: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or("slb").to_owned();
    let page = Man::new(command.clone())
        .title(name.to_uppercase())
        .section(SECTION)
        .source(concat!("slb ", env!("CARGO_PKG_VERSION")))
        .manual("slb, a server load balancer");
    page.generate_to(folder)?;
    command.get_subcommands().try_for_each(|command| write_pages(command, folder))
}
