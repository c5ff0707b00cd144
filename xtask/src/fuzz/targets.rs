//! The targets in `tests/fuzz`, by libFuzzer.
//!
//! They are a workspace of their own, as they are built with instrumentation: of everything but build scripts and
//! macros. No compiler but the ordinary one is needed, but one for C++, as libFuzzer is written in that.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use super::Options;
use crate::process;

/// Where the targets are; each has a folder in `corpus`.
const FOLDER: &str = "tests/fuzz";
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Counts edges, and shows libFuzzer what is compared (clang's documentation, "SanitizerCoverage").
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                     -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares";
/// Longest input, in bytes, and bound on the time for one, in seconds.
const LONGEST: &str = "4096";
const PATIENCE: &str = "10";

/// Runs every target, and says how much code its inputs reach before and afterwards.
///
/// # Errors
///
/// One of them cannot be built, or fails.
pub(super) fn run(options: &Options) -> Result<()> {
    if process::find("c++").is_none() || !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        println!(
            "fuzz: left out: libFuzzer takes a C++ compiler, and x86-64 (apt-get install g++)"
        );
        return Ok(());
    }
    let target = process::target()?.join("fuzz");
    let mut build = process::cargo(["build", "--release", "--target", TARGET]);
    build.current_dir(FOLDER).env("CARGO_TARGET_DIR", &target);
    // Not RUSTFLAGS: the build of the eBPF object would inherit them.
    build.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", FLAGS);
    process::run(&mut build)?;
    let mut names = Vec::new();
    for entry in fs::read_dir(PathBuf::from(FOLDER).join("corpus")).context(FOLDER)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    println!("target    coverage  found  runs");
    let mut failed = Vec::new();
    for name in names.iter().filter(|name| options.has(name)) {
        let program = target.join(TARGET).join("release").join(name);
        if !fuzz(name, &program, options.time)? {
            failed.push(name.as_str());
        }
    }
    if !failed.is_empty() {
        bail!("{} failed; the inputs are in {}", failed.join(", "), target.display());
    }
    Ok(())
}

/// Runs one target. What it finds stays in the target directory, and is where it begins the next time.
fn fuzz(name: &str, program: &PathBuf, seconds: u32) -> Result<bool> {
    let found = process::target()?.join("fuzz/found").join(name);
    fs::create_dir_all(&found).with_context(|| found.display().to_string())?;
    let mut command = Command::new(program);
    command.arg(&found).arg(PathBuf::from(FOLDER).join("corpus").join(name));
    command.arg(format!("-max_total_time={seconds}")).arg(format!("-max_len={LONGEST}"));
    command.arg(format!("-timeout={PATIENCE}")).arg("-print_final_stats=1");
    command.arg(format!("-artifact_prefix={}/failed-", found.parent().unwrap_or(&found).display()));
    command.stdin(Stdio::null());
    let output = command.output().with_context(|| program.display().to_string())?;
    let said = String::from_utf8_lossy(&output.stderr);
    // `#12 INITED cov: 34 ft: 56 corp: 7/89b …`
    let coverage = |event: &str| {
        let line = said.lines().rfind(|line| line.contains(event))?;
        line.split("cov: ").nth(1)?.split(' ').next()?.parse::<u32>().ok()
    };
    let before = coverage("INITED").unwrap_or_default();
    let after = coverage("cov: ").unwrap_or_default();
    let runs = said.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let growth = after.saturating_sub(before);
    println!("{name:9} {after:>8} +{growth:<5} {}", runs.unwrap_or("0").trim());
    if !output.status.success() {
        eprintln!("{said}");
    }
    Ok(output.status.success())
}
