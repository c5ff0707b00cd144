//! `cargo xtask lint`.

use std::{fs, process::Command, time::Duration};

use anyhow::{Result, bail};

use crate::{docs, process, setup, times::Times};

/// Without a network the database of advisories cannot be had; this is for a network that is slow.
const FETCH_LIMIT: Duration = Duration::from_secs(60);
/// The longest subject of a commit, as `git log` shows it beside a short hash.
const SUBJECT: usize = 72;

/// A name, and what it does.
type Check = (&'static str, fn() -> Result<()>);

/// Checks format, code, documentation, spelling, dependencies and the subjects of new commits. All checks run,
/// also when one fails.
///
/// # Errors
///
/// One of the checks fails, or `rustfmt` or `clippy` is missing.
pub(crate) fn run() -> Result<()> {
    for (command, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if !process::cargo([command, "--version"]).output()?.status.success() {
            bail!(
                "the toolchain has no {component}; `rustup component add {component}` or the \
                 distribution's package installs it"
            );
        }
    }
    let mut times = Times::start();
    times.part("set-up", || {
        // The build script of slb-user makes the eBPF object, which clippy does not need but wants.
        setup::ensure(&setup::Options::default())?;
        let mut helpers = setup::Report::default();
        setup::helpers::ensure(setup::helpers::LINT, &mut helpers);
        helpers.finish(true)
    })?;
    let checks: [Check; 10] = [
        ("format", || process::run(&mut process::cargo(["fmt", "--all", "--check"]))),
        ("commits", commits),
        ("spelling", || process::run(Command::new("typos").args(["--format", "brief"]))),
        ("unused dependencies", || process::run(&mut process::cargo(["shear"]))),
        ("licences and bans", || process::run(deny().args(["check", "licenses", "bans"]))),
        ("advisories", advisories),
        ("clippy", clippy),
        ("documentation", documentation),
        ("reference", || docs::run(false)),
        ("named tests", named_tests),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        if let Err(why) = times.part(name, check) {
            println!("{name}: {why:#}");
            failed.push(name);
        }
    }
    times.print();
    if !failed.is_empty() {
        bail!("lint fails: {}", failed.join(", "));
    }
    Ok(())
}

fn clippy() -> Result<()> {
    // Without a package: the workspace's default members.
    for packages in [&["--all-targets"][..], &["--package", "slb-fuzz"]] {
        let mut host = process::cargo(["clippy"]);
        // Nothing is linked here, so libFuzzer need not be compiled.
        host.env("CUSTOM_LIBFUZZER_PATH", "/dev/null");
        process::run(host.args(packages).args(["--", "-D", "warnings"]))?;
    }
    let mut ebpf = process::cargo(["clippy", "--package", "slb-ebpf"]);
    process::run(as_host_code(&mut ebpf).args(["--", "-D", "warnings"]))
}

/// The pages are for those who work on the code, so private items are in them and may be linked.
fn documentation() -> Result<()> {
    let packages: [&[&str]; 2] = [&[], &["--package", "slb-ebpf"]];
    for packages in packages {
        let mut command = process::cargo(["doc", "--no-deps", "--document-private-items"]);
        command.args(packages);
        command.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links");
        if packages.contains(&"--package") {
            as_host_code(&mut command);
        }
        process::run(&mut command)?;
    }
    Ok(())
}

/// The packet path is checked as host code: clippy has no `core` for the BPF target. Without `std` nothing can
/// unwind.
fn as_host_code(command: &mut Command) -> &mut Command {
    command.env("CARGO_PROFILE_DEV_PANIC", "abort")
}

fn deny() -> Command {
    process::cargo(["deny", "--workspace"])
}

fn advisories() -> Result<()> {
    let mut fetch = process::cargo(["deny", "fetch", "db"]);
    if let Err(why) = process::run_within(&mut fetch, FETCH_LIMIT) {
        println!("Advisories are not checked, because their database cannot be had: {why:#}");
        return Ok(());
    }
    process::run(deny().args(["check", "advisories"]))
}

/// Checks that the tests which the promises name are there.
fn named_tests() -> Result<()> {
    let promises = fs::read_to_string("docs/reliability.md")?;
    let named = promises.split('`').skip(1).step_by(2).filter_map(|code| code.split_once("::"));
    let missing: Vec<String> = named
        .filter(|(_, test)| {
            let function = format!("fn {test}()");
            let found = ["grep", "--quiet", "--fixed-strings", &function, "--", "tests/tests"];
            process::output("git", &found).is_none()
        })
        .map(|(module, test)| format!("{module}::{test}"))
        .collect();
    if !missing.is_empty() {
        bail!("docs/reliability.md names tests that are not there:\n{}", missing.join("\n"));
    }
    Ok(())
}

/// Checks the subjects of the commits that the remote repository does not have.
fn commits() -> Result<()> {
    let known = ["main@{upstream}", "origin/main"]
        .into_iter()
        .find(|name| process::output("git", &["rev-parse", "--verify", "--quiet", name]).is_some());
    let Some(known) = known else {
        println!("Subjects of commits are not checked: this clone has no upstream branch");
        return Ok(());
    };
    let range = format!("{known}..HEAD");
    let log = process::output("git", &["log", "--no-merges", "--format=%h %s", &range]);
    let wrong: Vec<_> = log
        .iter()
        .flat_map(|log| log.lines())
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(hash, subject)| fault(subject).map(|why| format!("{hash} {why}: {subject}")))
        .collect();
    if !wrong.is_empty() {
        bail!("subjects are `area: imperative summary`\n{}", wrong.join("\n"));
    }
    Ok(())
}

/// What is wrong with the subject of a commit.
fn fault(subject: &str) -> Option<&'static str> {
    if subject.chars().count() > SUBJECT {
        return Some("is longer than 72 characters");
    }
    let Some((area, summary)) = subject.split_once(": ") else {
        return Some("names no area");
    };
    let is_area = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_./, ".contains(c);
    if area.is_empty() || !area.chars().all(is_area) {
        return Some("has an area that is not in small letters");
    }
    if summary.trim().is_empty() || summary.ends_with('.') {
        return Some("has a summary that is empty or ends with a full stop");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_subjects_when_they_are_checked_then_only_an_area_and_a_short_summary_pass() {
        let longest = format!("xtask: {}", "a".repeat(65));
        for subject in ["conntrack: give flows the normal timeout", "slb-ebpf, docs: x", &longest] {
            assert_eq!(fault(subject), None, "{subject}");
        }
        for subject in [
            "Give flows a timeout",
            "Tests: x",
            ": x",
            "xtask: ",
            "xtask: x.",
            &format!("{longest}a"),
        ] {
            assert!(fault(subject).is_some(), "{subject}");
        }
    }
}
