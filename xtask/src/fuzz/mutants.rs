//! Mistakes, made one at a time in a copy of the repository: the packet fuzz test has to fail with each.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use super::Options;
use crate::process;

/// The list, below the root of the repository.
const LIST: &str = "tests/mutants.toml";
/// The test that has to fail.
const TEST: &str = "fuzz_oracle";
/// More than it takes without a mistake.
const FRAMES: &str = "40000";
/// Bound on one run of the test. All of them stay below five minutes.
const LIMIT: Duration = Duration::from_secs(240);

#[derive(Deserialize)]
struct List {
    mutant: Vec<Mutant>,
}

/// A mistake.
#[derive(Deserialize)]
struct Mutant {
    /// What is wrong with it.
    says: String,
    file: PathBuf,
    /// What stands there once.
    text: String,
    /// What stands there with the mistake.
    instead: String,
}

/// A copy of the last commit, in a worktree of its own; removed in the end.
struct Copy(PathBuf);

impl Copy {
    fn make() -> Result<Self> {
        let folder = process::target()?.join("mutants");
        // One that was killed has left it.
        let copy = Self(folder);
        copy.remove();
        git(&["worktree", "add", "--detach", "--force", &copy.text(), "HEAD"])?;
        Ok(copy)
    }

    fn text(&self) -> String {
        self.0.display().to_string()
    }

    fn remove(&self) {
        let _ = fs::remove_dir_all(&self.0);
        let _ = git(&["worktree", "prune"]);
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        self.remove();
    }
}

fn git(args: &[&str]) -> Result<()> {
    process::output("git", args).map(drop).with_context(|| format!("git {}", args.join(" ")))
}

/// Makes every mistake of the list, and runs the test with each.
///
/// # Errors
///
/// The test fails without a mistake, or does not find one.
pub(super) fn run(options: &Options) -> Result<()> {
    if !process::is_root() {
        bail!("the packet fuzz test takes root");
    }
    let copy = Copy::make()?;
    let list: List = toml::from_str(&fs::read_to_string(copy.0.join(LIST)).context(LIST)?)?;
    let (took, said) = test(&copy.0)?;
    if let Some(said) = said {
        bail!("the test fails without a mistake: {said}");
    }
    println!("{:>5.1} s  no mistake, nothing found", took.as_secs_f64());
    let mut all = took;
    let mut missed = Vec::new();
    for mutant in list.mutant.iter().filter(|mutant| options.has(&mutant.says)) {
        let file = copy.0.join(&mutant.file);
        let right = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        if right.matches(&mutant.text).count() != 1 {
            bail!("{LIST}: {:?} is not once in {}", mutant.text, mutant.file.display());
        }
        fs::write(&file, right.replace(&mutant.text, &mutant.instead))?;
        let (took, said) = test(&copy.0).with_context(|| mutant.says.clone())?;
        fs::write(&file, right)?;
        all += took;
        let found = said.as_deref().unwrap_or("NOT FOUND");
        println!("{:>5.1} s  {}: {found}", took.as_secs_f64(), mutant.says);
        if said.is_none() {
            missed.push(mutant.says.as_str());
        }
    }
    println!("{:>5.1} s of fuzzing", all.as_secs_f64());
    if !missed.is_empty() {
        bail!("not found: {}", missed.join("; "));
    }
    Ok(())
}

/// Builds the test, and runs it: how long that took, and what it says if it fails.
fn test(folder: &Path) -> Result<(Duration, Option<String>)> {
    let mut build = process::cargo(["test", "--package", "slb-tests", "--test", "verdicts"]);
    build.args(["--no-run", "--quiet", "--message-format=json"]).current_dir(folder);
    // What the copy depends on is built already.
    build.env("CARGO_TARGET_DIR", process::target()?).stderr(Stdio::null());
    let output = build.output().context("cargo test --no-run")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let program = said
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| Some(message["executable"].as_str()?.to_owned()))
        .next_back();
    let program = program.context("the copy does not compile")?;

    let scratch = tempfile::NamedTempFile::new()?;
    let mut command = Command::new(program);
    command.args([TEST, "--include-ignored", "--nocapture"]).current_dir(folder.join("tests"));
    command.env("SLB_FUZZ_CASES", FRAMES).env("RUST_BACKTRACE", "0").stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(scratch.reopen()?);
    let began = Instant::now();
    let mut child = command.spawn().context("the test")?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if began.elapsed() > LIMIT {
            child.kill()?;
            child.wait()?;
            bail!("the test is not done within {LIMIT:?}");
        }
        thread::sleep(Duration::from_millis(20));
    };
    let took = began.elapsed();
    if status.success() {
        return Ok((took, None));
    }
    // The line behind that of the panic.
    let said = fs::read_to_string(scratch.path())?;
    let reason = said.lines().skip_while(|line| !line.contains("panicked at")).nth(1);
    Ok((took, Some(reason.unwrap_or("it fails").to_owned())))
}
