//! The lab's private directory, with the bpffs that the agent mounts below it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, umount2};

use crate::naming;

/// Not `/tmp`: pins and the API's socket belong where no other user can make a name first.
const PARENT: &str = "/run";

/// Where bpffs goes.
pub(crate) const PINS: &str = "bpf";

/// A directory under `/run`; dropping it unmounts [`PINS`] and removes the directory.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// # Errors
    ///
    /// `/run` is not writable.
    pub(crate) fn create() -> Result<Self> {
        let path = Path::new(PARENT).join(naming::unique());
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self { path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Removes the directories of labs whose process is gone; with the bpffs go the pins, with the
/// last pin goes the program.
pub(crate) fn remove_stale() {
    let Ok(entries) = fs::read_dir(PARENT) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_some_and(naming::is_stale) {
            remove(&entry.path());
        }
    }
}

/// Never panics: the error that made the guard drop is the message worth reading.
fn remove(path: &Path) {
    // More than one when two agents mounted there; fails at once when there is none.
    while umount2(&path.join(PINS), MntFlags::MNT_DETACH).is_ok() {}
    if let Err(error) = fs::remove_dir_all(path) {
        eprintln!("lab: removing {}: {error}", path.display());
    }
}
