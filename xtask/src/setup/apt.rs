//! Packages of Debian and what is like it.

use std::{process::Command, sync::Once, time::Duration};

use crate::process;

/// A mirror that has sent nothing useful by then never will.
const LIMIT: Duration = Duration::from_secs(900);
const INSTALL: [&str; 3] = ["install", "-y", "--no-install-recommends"];

/// Installs packages, or brings them up to date. Refreshes the lists first: old ones name versions
/// that the mirrors have dropped, or that are too old for us.
///
/// # Errors
///
/// Says why not, in a few words.
pub fn install(packages: &[&str]) -> Result<(), String> {
    if process::find("apt-get").is_none() {
        return Err("this is not a Debian-like system, find the package yourself".to_owned());
    }
    if !process::is_root() {
        return Err("installing packages takes root".to_owned());
    }
    refresh();
    run(Command::new("apt-get").args(INSTALL).args(packages))
}

/// Brings the package lists up to date, unless this process has done so.
pub fn refresh() {
    static REFRESH: Once = Once::new();
    REFRESH.call_once(|| {
        if let Err(why) = run(Command::new("apt-get").arg("update")) {
            println!("setup: the package lists stay as they are: {why}");
        }
    });
}

/// What the user would type.
pub fn command(packages: &[&str]) -> String {
    format!("sudo apt-get {} {}", INSTALL.join(" "), packages.join(" "))
}

fn run(command: &mut Command) -> Result<(), String> {
    command.env("DEBIAN_FRONTEND", "noninteractive");
    process::run_within(command, LIMIT).map_err(|error| format!("{error:#}"))
}
