//! The targets in `tests/fuzz`, by libFuzzer.
//!
//! Cargo builds them with the dependencies of the release build; `tests/fuzz/rustc` instruments slb's own crates. The
//! stable compiler is enough, and one for C++, in which libFuzzer is written.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    thread,
};

use anyhow::{Context as _, Result, bail};

use super::Options;
use crate::process;

/// Where the targets are.
const FOLDER: &str = "tests/fuzz";
/// Each has a folder of inputs in the repository, and may begin with others as well.
const TARGETS: [(&str, &[&str]); 7] = [
    ("answer", &[]),
    ("api", &[]),
    ("config", &["tests/configs/good", "tests/configs/wrong"]),
    ("decide", &[]),
    ("edit", &[]),
    ("netlink", &[]),
    ("packet", &[]),
];
/// Longest input, in bytes, and bound on the time for one, in seconds.
const LONGEST: &str = "-max_len=8192";
const PATIENCE: &str = "-timeout=10";

/// A target that is built.
struct Target {
    name: &'static str,
    program: PathBuf,
    /// Its inputs in the repository.
    corpus: PathBuf,
    seeds: &'static [&'static str],
    /// What earlier runs have found.
    found: PathBuf,
}

/// Runs every target, and says how much of the code its inputs reach before and afterwards.
///
/// # Errors
///
/// One of them cannot be built, or fails.
pub(super) fn run(options: &Options) -> Result<()> {
    let targets = build(options)?;
    let width = thread::available_parallelism().map_or(1, usize::from);
    println!("target   runs      edges          features       new inputs");
    let waiting = Mutex::new(targets.iter());
    let failed = Mutex::new(Vec::new());
    let next = || waiting.lock().ok()?.next();
    let work = || {
        while let Some(target) = next() {
            if let Err(why) = target.fuzz(options.time)
                && let Ok(mut failed) = failed.lock()
            {
                failed.push(format!("{}: {why:#}", target.name));
            }
        }
    };
    thread::scope(|scope| (0..width).for_each(|_| drop(scope.spawn(work))));
    let failed = failed.into_inner().unwrap_or_default();
    if !failed.is_empty() {
        bail!("{}", failed.join("\n"));
    }
    Ok(())
}

/// Adds to the corpora what earlier runs have found, as far as it reaches more of the code.
///
/// # Errors
///
/// A target cannot be built, or fails.
pub(super) fn keep(options: &Options) -> Result<()> {
    for target in build(options)? {
        target.keep().with_context(|| target.name)?;
    }
    Ok(())
}

/// Builds all targets, and gives those that are asked for.
fn build(options: &Options) -> Result<Vec<Target>> {
    let wrapper = std::env::current_dir()?.join(FOLDER).join("rustc");
    let mut command = process::cargo(["build", "--release", "--package", "slb-fuzz"]);
    process::run(command.env("RUSTC_WORKSPACE_WRAPPER", wrapper))?;
    let target = process::target()?;
    let asked = TARGETS.into_iter().filter(|(name, _)| options.has(name));
    let built = asked.map(|(name, seeds)| {
        let found = target.join("fuzz/found").join(name);
        fs::create_dir_all(&found).with_context(|| found.display().to_string())?;
        let program = target.join("release").join(format!("fuzz-{name}"));
        let corpus = Path::new(FOLDER).join("corpus").join(name);
        Ok(Target { name, program, corpus, seeds, found })
    });
    built.collect()
}

impl Target {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args([LONGEST, PATIENCE, "-print_final_stats=1"]).stdin(Stdio::null());
        command
    }

    /// What it says on stderr.
    fn output(command: &mut Command) -> Result<String> {
        let output = command.output().context("it does not start")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            bail!("{}\n{said}", output.status);
        }
        Ok(said)
    }

    /// Runs it. What it finds is where it begins the next time.
    fn fuzz(&self, seconds: u32) -> Result<()> {
        let failed = self.found.with_file_name(format!("failed-{}-", self.name));
        let mut command = self.command();
        command.arg(format!("-max_total_time={seconds}"));
        command.arg(format!("-artifact_prefix={}", failed.display()));
        command.arg(&self.found).arg(&self.corpus).args(self.seeds);
        let said = Self::output(&mut command)?;
        let count = |name: &str| {
            said.lines().find_map(|line| line.strip_prefix(name)).map_or("?", str::trim)
        };
        let (edges, features) = (growth(&said, "cov: "), growth(&said, "ft: "));
        let runs = count("stat::number_of_executed_units:");
        let new = count("stat::new_units_added:");
        println!("{:8} {runs:9} {edges:14} {features:14} {new}", self.name);
        Ok(())
    }

    fn keep(&self) -> Result<()> {
        let mut command = self.command();
        command.arg("-merge=1").arg(&self.corpus).args(self.seeds).arg(&self.found);
        let said = Self::output(&mut command)?;
        let added = said.lines().rfind(|line| line.starts_with("MERGE-OUTER:"));
        println!("{:8} {}", self.name, added.unwrap_or_default());
        Ok(())
    }
}

/// A number that libFuzzer prints, at the start and at the end: `#12 INITED cov: 34 ft: 56 corp: 7/89b …`.
fn growth(said: &str, name: &str) -> String {
    let number = |line: &str| -> Option<u32> {
        line.split(name).nth(1)?.split_whitespace().next()?.parse().ok()
    };
    let start = said.lines().find(|line| line.contains("INITED")).and_then(number);
    let end = said.lines().rev().find_map(number);
    let text = |number: Option<u32>| number.map_or("?".to_owned(), |number| number.to_string());
    format!("{} → {}", text(start), text(end))
}
