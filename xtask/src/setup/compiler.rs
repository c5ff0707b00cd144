//! A toolchain with the sources of `core`.

use std::{path::Path, process::Command, time::Duration};

use super::{
    Options, Origin, apt, linker,
    report::{Report, say},
    survey::Cost,
};
use crate::{process, toolchain};

/// The distribution's compiler, new enough and with its sources.
pub(super) const PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];
/// Bound on a download of rustup's. Without a network it fails in seconds; this is for a network
/// that swallows packets.
const LIMIT: Duration = Duration::from_secs(600);
const THING: &str = "toolchain";

/// What rustup's takes, about.
pub(super) const COST: Cost = Cost::megabytes(120, 700);

/// Finds or installs a toolchain, and returns its name.
pub(super) fn ensure(options: &Options, report: &mut Report) -> Option<&'static str> {
    let found = toolchain::find();
    if let Some(name) = found.filter(|name| is_new_enough(name)) {
        report.found(THING, describe(name));
        return Some(name);
    }
    if let Some(name) = found {
        say(THING, &format!("{} is too old for any linker", describe(name)));
    }
    if process::find("rustup").is_none() {
        let advice = ["see https://rustup.rs".to_owned()];
        report.missing(THING, "rustup is missing; nothing can be installed without it", advice);
        return None;
    }
    let by_rustup = match by_rustup(options.from) {
        Some(_) => {
            say(THING, "none has the sources of core; trying rustup");
            rustup().inspect_err(|why| say(THING, &format!("not from rustup: {why}"))).is_ok()
        }
        None => false,
    };
    if !by_rustup && let Err(why) = distribution(options) {
        let mut advice = vec![process::text(&rustup_command())];
        if apt::is_here() {
            advice[0].push_str("    # or:");
            advice.extend([apt::advice(&PACKAGES), process::text(&link())]);
        }
        report.missing(THING, format!("not from the distribution: {why}"), advice);
        return None;
    }
    let found = toolchain::find().filter(|name| is_new_enough(name));
    match found {
        Some(name) => report.installed(THING, describe(name)),
        None => report.missing(
            THING,
            "installed, but without the sources of core, or too old",
            [process::text(&rustup_command())],
        ),
    }
    found
}

/// The toolchain that the build uses, if there is one.
pub(super) fn usable() -> Option<&'static str> {
    toolchain::find().filter(|name| is_new_enough(name))
}

/// Whether the distribution's packages are needed, and are the first thing to try.
pub(super) fn needs_packages(from: Origin) -> bool {
    usable().is_none()
        && from == Origin::Distribution
        && process::find("rustup").is_some()
        && !is_installed()
}

/// The command for rustup, if a toolchain is missing and rustup is asked first.
pub(super) fn by_rustup(from: Origin) -> Option<String> {
    // An installed compiler of the distribution only has to be made known to rustup.
    let asks_rustup = from == Origin::Auto
        && usable().is_none()
        && process::find("rustup").is_some()
        && !is_installed();
    asks_rustup.then(|| process::text(&rustup_command()))
}

/// Major version of the LLVM in a toolchain.
pub(super) fn llvm(toolchain: &str) -> Option<u32> {
    llvm_of(&process::output("rustup", &["run", toolchain, "rustc", "-vV"])?)
}

fn is_new_enough(toolchain: &str) -> bool {
    llvm(toolchain).is_some_and(|llvm| llvm >= linker::OLDEST_LLVM)
}

/// The same, from what `rustc -vV` prints.
fn llvm_of(version: &str) -> Option<u32> {
    let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    llvm.split('.').next()?.parse().ok()
}

fn describe(name: &str) -> String {
    let version = process::output("rustup", &["run", name, "rustc", "-V"]).unwrap_or_default();
    let why = match name {
        toolchain::LINKED => format!("{} lacks them", toolchain::NIGHTLY),
        _ => "the ordinary way".to_owned(),
    };
    format!("{name}, {}, with the sources of core ({why})", version.trim())
}

/// Adds the sources to a nightly that is there, as it is; installs one only where there is none.
fn rustup_command() -> Command {
    let mut command = Command::new("rustup");
    match process::output("rustup", &["run", toolchain::NIGHTLY, "rustc", "-V"]) {
        Some(_) => command.args(["component", "add", "rust-src", "--toolchain"]),
        None => command.args(["toolchain", "install", "--profile=minimal", "--component=rust-src"]),
    };
    command.arg(toolchain::NIGHTLY);
    command
}

fn rustup() -> Result<(), String> {
    let mut command = rustup_command();
    command.env("RUSTUP_MAX_RETRIES", "0");
    process::run_within(&mut command, LIMIT).map_err(|error| format!("{error:#}"))
}

fn distribution(options: &Options) -> Result<(), String> {
    if !is_installed() {
        say(THING, "installing the distribution's");
        apt::install(&PACKAGES, options.allow_upgrades)?;
    }
    process::run(&mut link()).map_err(|error| format!("{error:#}"))
}

/// Whether the distribution's compiler is there, with its sources, and does.
fn is_installed() -> bool {
    Path::new("/usr/lib/rustlib/src/rust/library/core/src/lib.rs").exists()
        && Path::new("/usr/bin/cargo").exists()
        && process::output("/usr/bin/rustc", &["-vV"])
            .and_then(|version| llvm_of(&version))
            .is_some_and(|llvm| llvm >= linker::OLDEST_LLVM)
}

/// Makes the distribution's compiler known to rustup, through which the build calls it.
fn link() -> Command {
    let mut command = Command::new("rustup");
    command.args(["toolchain", "link", toolchain::LINKED, "/usr"]);
    command
}
