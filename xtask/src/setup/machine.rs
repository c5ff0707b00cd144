//! The first file system of the machine with systemd that tests boot.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail};
use slb_lab::machine::ROOT;

use super::{Options, Tool, apt, report::Report, survey::Cost, tools};
use crate::process;

/// The release that systemd 252 is in.
const SUITE: &str = "bookworm";
/// What the machine has besides the essential packages.
const PACKAGES: &str = "dbus,systemd-sysv";
/// A slow mirror, and a busy machine.
const LIMIT: Duration = Duration::from_secs(900);

/// What makes and boots it.
pub(super) const TOOLS: [Tool; 2] = [
    Tool { program: "systemd-nspawn", package: "systemd-container", needed_by: None },
    Tool { program: "mmdebstrap", package: "mmdebstrap", needed_by: None },
];

/// Of its file system, about.
pub(crate) const COST: Cost = Cost::megabytes(60, 135);
const THING: &str = "machine";

/// Whether it would be made, if it were asked for.
pub(crate) fn is_missing() -> bool {
    process::is_root()
        && apt::is_here()
        && process::target().is_ok_and(|target| !target.join(ROOT).is_dir())
}

/// Makes it, unless it is there.
///
/// # Errors
///
/// Not root, not a Debian-like system, or the packages cannot be had.
pub(crate) fn ensure(options: &Options, report: &mut Report) -> Result<()> {
    if !process::is_root() {
        bail!("booting one takes root");
    }
    tools(&TOOLS, options, &mut Report::default());
    for tool in TOOLS {
        if process::find(tool.program).is_none() {
            bail!("{} is missing: {}", tool.program, apt::advice(&[tool.package]));
        }
    }
    let root = process::target()?.join(ROOT);
    if root.is_dir() {
        report.found(THING, root.display().to_string());
        return Ok(());
    }
    make(&root)?;
    report.installed(THING, root.display().to_string());
    Ok(())
}

/// Under another name first: what is there under its own is complete.
fn make(root: &Path) -> Result<()> {
    let part = root.with_extension("part");
    if part.exists() {
        fs::remove_dir_all(&part).with_context(|| part.display().to_string())?;
    }
    let folder = part.parent().context("a path without a folder")?;
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--mode=root", "--format=directory", "--variant=essential"]);
    for pattern in
        ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"]
    {
        command.arg(format!("--dpkgopt=path-exclude={pattern}"));
    }
    command.arg(format!("--include={PACKAGES}")).arg(SUITE).arg(&part);
    process::run_within(&mut command, LIMIT)?;
    fs::rename(&part, root).with_context(|| root.display().to_string())
}
