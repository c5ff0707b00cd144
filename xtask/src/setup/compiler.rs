//! A toolchain with the sources of `core`.

use std::{path::Path, process::Command, time::Duration};

use super::{Origin, apt, linker, say};
use crate::{process, toolchain};

/// The distribution's compiler, new enough and with its sources.
const PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];
/// Bound on a download of rustup's. Without a network it fails in seconds; this is for a network
/// that swallows packets.
const LIMIT: Duration = Duration::from_secs(600);
const THING: &str = "toolchain";

/// Finds or installs a toolchain, and returns its name.
pub fn ensure(from: Origin, left: &mut Vec<String>) -> Option<&'static str> {
    let found = toolchain::find();
    if let Some(name) = found.filter(|name| is_new_enough(name)) {
        say(THING, &format!("found: {}", describe(name)));
        return Some(name);
    }
    if let Some(name) = found {
        say(THING, &format!("found: {}, too old for any linker", describe(name)));
    }
    if process::find("rustup").is_none() {
        say(THING, "rustup is missing; nothing can be installed without it");
        left.push("see https://rustup.rs, or: sudo apt-get install rustup".to_owned());
        return None;
    }
    let by_rustup = match from {
        Origin::Distribution => {
            say(THING, "none has the sources of core; rustup's is not wanted (--from)");
            false
        }
        // Nothing to download: it only has to be made known to rustup.
        Origin::Auto if is_installed() => false,
        Origin::Auto => {
            say(THING, "none has the sources of core; trying rustup");
            rustup().inspect_err(|why| say(THING, &format!("not from rustup: {why}"))).is_ok()
        }
    };
    if !by_rustup && let Err(why) = distribution() {
        say(THING, &format!("not from the distribution: {why}"));
        left.push(format!("{}    # or:", process::text(&rustup_command())));
        left.push(apt::command(&PACKAGES));
        left.push(process::text(&link()));
        return None;
    }
    let found = toolchain::find().filter(|name| is_new_enough(name));
    match found {
        Some(name) => say(THING, &format!("done: {}", describe(name))),
        None => {
            say(THING, "installed, but without the sources of core, or too old");
            left.push(process::text(&rustup_command()));
        }
    }
    found
}

/// Major version of the LLVM in a toolchain.
pub fn llvm(toolchain: &str) -> Option<u32> {
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

fn distribution() -> Result<(), String> {
    if !is_installed() {
        say(THING, "installing the distribution's");
        apt::install(&PACKAGES)?;
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
