//! Where verdict tests keep the datapaths that they use one after another.
//!
//! `cargo nextest` runs each test in a process of its own, and `cargo test` in a thread of one process. The
//! folder belongs to what outlives them: the runner of the former, the process of the latter.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MntFlags, umount2},
    unistd::getppid,
};

use crate::naming;

const PARENT: &str = "/run";
const PREFIX: &str = "slb-workers-";
/// Set by nextest for every test.
const NEXTEST: &str = "NEXTEST_RUN_ID";
/// Where a worker has bpffs.
pub const PINS: &str = "pins";

/// The folder of this run. `cargo test` removes it when it ends; after `cargo nextest`, [`remove_stale`] does.
///
/// # Errors
///
/// What another run has left cannot be removed.
pub fn folder() -> Result<PathBuf> {
    let folder = owned();
    if !folder.exists() {
        remove_stale()?;
    }
    Ok(folder)
}

fn owned() -> PathBuf {
    if std::env::var_os(NEXTEST).is_some() {
        return of(u32::try_from(getppid().as_raw()).unwrap_or_default());
    }
    static AT_EXIT: std::sync::Once = std::sync::Once::new();
    AT_EXIT.call_once(|| {
        // SAFETY: the function does not unwind and is there for as long as the process is.
        unsafe { libc::atexit(at_exit) };
    });
    of(process::id())
}

fn of(owner: u32) -> PathBuf {
    Path::new(PARENT).join(format!("{PREFIX}{owner}"))
}

extern "C" fn at_exit() {
    if let Err(error) = remove(&of(process::id())) {
        eprintln!("{error:#}");
    }
}

/// Removes what runs that are over have left.
///
/// # Errors
///
/// Something cannot be unmounted or removed.
pub fn remove_stale() -> Result<()> {
    for entry in fs::read_dir(PARENT).context(PARENT)?.flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if owner.and_then(|owner| owner.parse().ok()).is_some_and(naming::is_gone) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// A folder has one folder for each capacity, and in it one for each worker. Several tests that start at
/// once may do this at once: what another has removed is fine.
fn remove(folder: &Path) -> Result<()> {
    let inside = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    for capacity in inside(folder) {
        for worker in inside(&capacity.path()) {
            // Not mounted if the worker was never complete.
            let _ = umount2(&worker.path().join(PINS), MntFlags::MNT_DETACH);
        }
    }
    match fs::remove_dir_all(folder) {
        Err(error) if folder.exists() => {
            Err(error).with_context(|| format!("removing {}", folder.display()))
        }
        _ => Ok(()),
    }
}
