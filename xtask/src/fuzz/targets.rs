//! The targets in `tests/fuzz`, by libFuzzer.
//!
//! They are a workspace of their own, as they are built with instrumentation: of everything but build scripts and
//! macros. No compiler but the ordinary one is needed, but one for C++, as libFuzzer is written in that.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use super::Options;
use crate::process;

/// Where the targets are.
const FOLDER: &str = "tests/fuzz";
/// Each has its inputs in the repository.
const TARGETS: [(&str, &[&str]); 6] = [
    ("packet", &["tests/fuzz/corpus/packet"]),
    ("config", &["tests/configs/good", "tests/configs/wrong"]),
    ("edit", &["tests/fuzz/corpus/edit"]),
    ("api", &["tests/fuzz/corpus/api"]),
    ("answer", &["tests/fuzz/corpus/answer"]),
    ("netlink", &["tests/fuzz/corpus/netlink"]),
];
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Counts edges, and shows libFuzzer what is compared (clang's documentation, "SanitizerCoverage").
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                     -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares";
/// Where `slb-user/build.rs` keeps the eBPF objects, which are the same as those of other builds.
const EBPF_CACHE: &str = "SLB_EBPF_CACHE";
/// Longest input, in bytes, and bound on the time for one, in seconds.
const LONGEST: &str = "8192";
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
    if std::env::var_os(EBPF_CACHE).is_none() {
        build.env(EBPF_CACHE, process::target()?.join("ebpf"));
    }
    process::run(&mut build)?;
    println!("target    coverage  found  runs");
    let mut failed = Vec::new();
    for (name, corpus) in TARGETS.into_iter().filter(|(name, _)| options.has(name)) {
        let program = target.join(TARGET).join("release").join(name);
        if !fuzz(name, corpus, &program, options.time)? {
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("{} failed; the inputs are in {}", failed.join(", "), target.display());
    }
    Ok(())
}

/// Runs one target. What it finds stays in the target directory, and is where it begins the next time.
fn fuzz(name: &str, corpus: &[&str], program: &Path, seconds: u32) -> Result<bool> {
    let found = process::target()?.join("fuzz/found").join(name);
    fs::create_dir_all(&found).with_context(|| found.display().to_string())?;
    let mut command = Command::new(program);
    command.arg(&found).args(corpus).arg(format!("-max_total_time={seconds}"));
    command.arg(format!("-max_len={LONGEST}"));
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
