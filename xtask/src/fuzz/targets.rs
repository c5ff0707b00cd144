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
/// The longest input that is kept, and how many edges it has to be the first to reach: the repository has few and small
/// ones.
const SHORT: &str = "-max_len=1024";
const WORTH: usize = 4;

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

    /// Has libFuzzer look at the corpus and then, the smallest first, at what was found. It writes into a file which
    /// edges each input is the first to reach.
    fn keep(&self) -> Result<()> {
        let scratch = tempfile::tempdir()?;
        let (known, notes) = (scratch.path().join("known"), scratch.path().join("notes"));
        fs::create_dir(&known)?;
        for folder in self.seeds.iter().map(Path::new).chain([&*self.corpus]) {
            for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
                let entry = entry?;
                fs::copy(entry.path(), known.join(entry.file_name()))?;
            }
        }
        let mut command = self.command();
        command.args(["-merge=1", SHORT]).arg(&known).arg(&self.found);
        command.arg(format!("-merge_control_file={}", notes.display()));
        Self::output(&mut command)?;
        let notes = fs::read_to_string(&notes).context("libFuzzer's notes")?;
        let kept = worth_keeping(&notes).into_iter().filter(|file| file.starts_with(&self.found));
        let mut count = 0;
        for file in kept {
            let name = file.file_name().context("a file has a name")?;
            fs::copy(file, self.corpus.join(name)).with_context(|| file.display().to_string())?;
            count += 1;
        }
        println!("{:8} {count} inputs added", self.name);
        Ok(())
    }
}

/// Inputs that are the first to reach some more edges, by libFuzzer's notes on a merge: how many inputs there are, how
/// many of them are known, their names, and for each a line `COV number edge…`.
fn worth_keeping(notes: &str) -> Vec<&Path> {
    let mut lines = notes.lines();
    let count = lines.next().and_then(|line| line.parse().ok()).unwrap_or_default();
    let names: Vec<&str> = lines.by_ref().skip(1).take(count).collect();
    let kept = lines.filter_map(move |line| {
        let mut edges = line.strip_prefix("COV ")?.split(' ');
        let number: usize = edges.next()?.parse().ok()?;
        (edges.count() >= WORTH).then_some(())?;
        names.get(number).copied().map(Path::new)
    });
    kept.collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_notes_on_a_merge_when_read_then_inputs_with_enough_new_edges_are_kept() {
        let notes = "3\n1\nknown/a\nfound/b\nfound/c\nSTARTED 0 1\nFT 0 1 2\nCOV 0 1 2 3 4\n\
                     COV 1 5 6 7\nCOV 2 8 9 10 11 12\n";
        assert_eq!(worth_keeping(notes), [Path::new("known/a"), Path::new("found/c")]);
    }

    #[test]
    fn given_what_libfuzzer_says_when_read_then_growth_is_from_start_to_end() {
        let said = "#2 READ units: 1\n#3\tINITED cov: 34 ft: 56 corp: 7/89b\n#9\tNEW    cov: 35 ft: 60 corp: 8\n\
                    Done 9 runs in 1 second(s)\n";
        assert_eq!(
            (growth(said, "cov: "), growth(said, "ft: ")),
            ("34 → 35".into(), "56 → 60".into())
        );
        assert_eq!(growth("", "cov: "), "? → ?");
    }
}
