//! Packages of Debian and what is like it.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{self as this, Command},
    sync::Once,
    time::Duration,
};

use crate::process;

/// A mirror that has sent nothing useful by then never will.
const LIMIT: Duration = Duration::from_secs(900);
const INSTALL: [&str; 3] = ["install", "-y", "--no-install-recommends"];

/// What Debian's tools run to learn whether a package may start or stop a service: yes if it is not there.
const POLICY: &str = "/usr/sbin/policy-rc.d";
/// How a policy of ours is told from one of the machine's owner.
const MARK: &str = "# cargo xtask setup";

/// Installs packages, or brings them up to date. Refreshes the lists first: old ones name versions
/// that the mirrors have dropped, or that are too old for us.
///
/// # Errors
///
/// Says why not, in a few words.
pub fn install(packages: &[&str]) -> Result<(), String> {
    is_possible()?;
    refresh();
    run(Command::new("apt-get").args(INSTALL).args(packages))
}

/// [`install`] for packages that bring a service of the same name, of which only the program is needed: the service is
/// neither started now nor with the machine.
///
/// # Errors
///
/// As those of [`install`].
pub fn install_without_services(packages: &[&str]) -> Result<(), String> {
    is_possible()?;
    let policy = Policy::create(Path::new(POLICY))?;
    let installed = install(packages);
    drop(policy);
    installed?;
    for package in packages {
        run(Command::new("update-rc.d").args([package, "disable"]))?;
    }
    Ok(())
}

fn is_possible() -> Result<(), String> {
    if process::find("apt-get").is_none() {
        return Err("this is not a Debian-like system, find the package yourself".to_owned());
    }
    if !process::is_root() {
        return Err("installing packages takes root".to_owned());
    }
    Ok(())
}

/// Keeps packages from starting services, until it is dropped or this process ends.
struct Policy {
    /// `None`: the machine has a policy of its own, which stays.
    path: Option<PathBuf>,
}

impl Policy {
    fn create(path: &Path) -> Result<Self, String> {
        let error = |error| format!("{}: {error}", path.display());
        if let Ok(text) = fs::read_to_string(path)
            && !text.contains(MARK)
        {
            return Ok(Self { path: None });
        }
        fs::write(path, policy(this::id())).map_err(error)?;
        let this = Self { path: Some(path.to_owned()) };
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(error)?;
        Ok(this)
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        if let Some(path) = &self.path
            && let Err(error) = fs::remove_file(path)
        {
            println!("setup: remove {}: {error}", path.display());
        }
    }
}

/// Denies everything as long as the process lives, so a killed one leaves nothing that matters.
fn policy(pid: u32) -> String {
    format!("#!/bin/sh\n{MARK}\nif kill -0 {pid}; then exit 101; fi 2>/dev/null\nexit 0\n")
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

#[cfg(test)]
mod tests {
    use super::*;

    fn status(path: &Path) -> Option<i32> {
        Command::new("sh").arg(path).status().unwrap().code()
    }

    #[test]
    fn given_a_policy_when_its_process_is_gone_then_it_denies_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy-rc.d");
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        fs::write(&path, policy(child.id())).unwrap();
        assert_eq!(status(&path), Some(0));

        let ours = Policy::create(&path).unwrap();
        assert_eq!(status(&path), Some(101), "what is left is replaced");
        drop(ours);
        assert!(!path.exists());
    }

    #[test]
    fn given_a_policy_of_the_machines_owner_when_packages_are_installed_then_it_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy-rc.d");
        fs::write(&path, "exit 7").unwrap();
        drop(Policy::create(&path).unwrap());
        assert_eq!(status(&path), Some(7));
    }
}
