//! Services that packages bring, of which only the programs are needed.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process as this,
};

/// What Debian's tools run to learn whether a package may start or stop a service: yes if it is not there.
pub(super) const POLICY: &str = "/usr/sbin/policy-rc.d";
/// How a policy of ours is told from one of the machine's owner.
const MARK: &str = "# cargo xtask setup";

/// Keeps packages from starting services, until it is dropped or this process ends.
pub(super) struct Policy {
    /// `None`: the machine has a policy of its own, which stays.
    path: Option<PathBuf>,
}

impl Policy {
    /// Writes it to a file, unless the owner of the machine has one there.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub(super) fn create(path: &Path) -> Result<Self, String> {
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

#[cfg(test)]
mod tests {
    use std::process::Command;

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
