//! Packages of Debian and what is like it.

use std::{process::Command, time::Duration};

use crate::process;

/// A mirror that has sent nothing useful by then never will.
const LIMIT: Duration = Duration::from_secs(900);
const INSTALL: [&str; 3] = ["install", "-y", "--no-install-recommends"];

/// Installs packages; refreshes the lists first if they do not know one of them.
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
    let known = |package: &&str| process::output("apt-cache", &["show", package]).is_some();
    if !packages.iter().all(known) {
        run(Command::new("apt-get").arg("update"))?;
    }
    run(Command::new("apt-get").args(INSTALL).args(packages))
}

/// What the user would type.
pub fn command(packages: &[&str]) -> String {
    format!("sudo apt-get {} {}", INSTALL.join(" "), packages.join(" "))
}

fn run(command: &mut Command) -> Result<(), String> {
    command.env("DEBIAN_FRONTEND", "noninteractive");
    process::run_within(command, LIMIT).map_err(|error| format!("{error:#}"))
}
