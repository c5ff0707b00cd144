//! A control group for what brings control groups of its own.
//!
//! `systemd-nspawn` puts a machine into groups with fixed names below its own. Without a group of their own two
//! machines would share them, and the systemd of one would end the processes of the other.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::naming;

/// Bound on the time that the kernel takes to reap what was killed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Below the group of this process, in each hierarchy that systemd uses. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct Cgroup {
    directories: Vec<PathBuf>,
}

impl Cgroup {
    /// A group without processes.
    ///
    /// # Errors
    ///
    /// Not root, or a kernel without control groups.
    pub(crate) fn create() -> Result<Self> {
        let mut group = Self { directories: Vec::new() };
        let name = naming::unique();
        for parent in own()? {
            remove_stale(&parent);
            let path = parent.join(&name);
            fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
            group.directories.push(path);
        }
        Ok(group)
    }

    /// Where it is in each hierarchy.
    pub(crate) fn directories(&self) -> &[PathBuf] {
        &self.directories
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        for path in &self.directories {
            while let Err(error) = remove(path) {
                if Instant::now() > deadline {
                    eprintln!("lab: removing {}: {error}", path.display());
                    break;
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// The groups of this process: that of the unified hierarchy, and systemd's own where others are not unified yet.
fn own() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("what is mounted")?;
    let groups = fs::read_to_string("/proc/self/cgroup").context("the groups of this process")?;
    let own = groups.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let mount = mounts.lines().find_map(|line| {
            let (place, file_system) = line.split_once(" - ")?;
            let mut options = file_system.split([' ', ',']);
            let is_it = match controllers {
                "" => options.next() == Some("cgroup2"),
                "name=systemd" => options.any(|option| option == controllers),
                _ => false,
            };
            is_it.then(|| place.split(' ').nth(4))?
        })?;
        Some(Path::new(mount).join(path.trim_start_matches('/')))
    });
    Ok(own.collect())
}

/// Removes the groups of labs whose process is gone.
fn remove_stale(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_some_and(naming::is_stale)
            && let Err(error) = remove(&entry.path())
        {
            eprintln!("lab: removing {}: {error}", entry.path().display());
        }
    }
}

/// The files in it are the kernel's, and go with their directory.
fn remove(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}
