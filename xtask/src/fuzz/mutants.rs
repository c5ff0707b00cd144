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
use serde_json::Value;

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

/// A copy of the sources, always in the same place: what the compiler has made of it before counts. Removed in the end.
struct Copy(PathBuf);

impl Copy {
    fn make() -> Result<Self> {
        let copy = Self(process::target()?.join("mutants/sources"));
        // One that was killed has left it.
        let _ = fs::remove_dir_all(copy.path());
        let files = process::output("git", &["ls-files", "-z"]).context("git ls-files")?;
        for file in files.split_terminator('\0').filter(|file| Path::new(file).is_file()) {
            let to = copy.path().join(file);
            if let Some(folder) = to.parent() {
                fs::create_dir_all(folder)?;
            }
            fs::copy(file, &to).with_context(|| file.to_owned())?;
        }
        Ok(copy)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The test, and what builds the object that it loads.
struct Built {
    test: PathBuf,
    /// The build script of `slb-user`, which finds an object that it has built before.
    script: PathBuf,
}

impl Built {
    fn build() -> Result<Self> {
        let args = ["test", "--package", "slb-tests", "--test", "verdicts", "--no-run"];
        let messages = process::build(args)?;
        let text = |value: &Value| value.as_str().map(PathBuf::from);
        let test = messages.iter().rev().find_map(|message| text(&message["executable"]));
        let script = messages.iter().find_map(|message| {
            let is_it = message["target"]["kind"][0] == "custom-build"
                && message["manifest_path"].as_str()?.ends_with("slb-user/Cargo.toml");
            is_it.then(|| text(&message["filenames"][0])).flatten()
        });
        Ok(Self {
            test: test.context("cargo names no test")?,
            script: script.context("cargo names no build script of slb-user")?,
        })
    }

    /// Builds the object from the sources in `root`, and returns its path.
    fn object(&self, root: &Path) -> Result<PathBuf> {
        let cache = process::target()?.join("mutants");
        let out = cache.join("out");
        fs::create_dir_all(&out)?;
        let mut command = Command::new(&self.script);
        command.current_dir(root.join("slb-user")).env("CARGO_MANIFEST_DIR", root.join("slb-user"));
        command.env("OUT_DIR", &out).env("SLB_EBPF_CACHE", &cache).stdin(Stdio::null());
        let host = [("ARCH", "x86_64"), ("ENDIAN", "little")];
        for (name, value) in host {
            command.env(format!("CARGO_CFG_TARGET_{name}"), value);
        }
        command.env("HOST", "x86_64-unknown-linux-gnu").env("TARGET", "x86_64-unknown-linux-gnu");
        let output = command.output().with_context(|| self.script.display().to_string())?;
        if !output.status.success() {
            bail!("it does not compile: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(out.join("slb"))
    }

    /// Runs the test: how long that took, and what it says if it fails.
    fn run(&self, object: &Path) -> Result<(Duration, Option<String>)> {
        let scratch = tempfile::NamedTempFile::new()?;
        let mut command = Command::new(&self.test);
        command.args([TEST, "--include-ignored", "--nocapture"]).current_dir("tests");
        command.env("SLB_OBJECT", object).env("SLB_FUZZ_CASES", FRAMES);
        command.env("RUST_BACKTRACE", "0").stdin(Stdio::null());
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
    let built = Built::build()?;
    let copy = Copy::make()?;
    let list: List = toml::from_str(&fs::read_to_string(LIST).context(LIST)?)?;
    let (took, said) = built.run(&built.object(copy.path())?)?;
    if let Some(said) = said {
        bail!("the test fails without a mistake: {said}");
    }
    println!("{:>5.1} s  no mistake, nothing found", took.as_secs_f64());
    let mut all = took;
    let mut missed = Vec::new();
    for mutant in list.mutant.iter().filter(|mutant| options.has(&mutant.says)) {
        let file = copy.path().join(&mutant.file);
        let right = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        if right.matches(&mutant.text).count() != 1 {
            bail!("{LIST}: {:?} is not once in {}", mutant.text, mutant.file.display());
        }
        fs::write(&file, right.replace(&mutant.text, &mutant.instead))?;
        let object = built.object(copy.path()).with_context(|| mutant.says.clone())?;
        let (took, said) = built.run(&object)?;
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
