//! The file system that pins live on.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
    unistd::geteuid,
};

/// Where distributions mount it.
const USUAL: &str = "/sys/fs/bpf";

/// bpffs cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BpffsError {
    /// The directory cannot be looked at or made.
    #[error("cannot make directory {}", path.display())]
    Directory {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not mounted, and cannot be mounted.
    #[error("cannot mount bpffs on {}; try `mount -t bpf bpf {}`", path.display(), path.display())]
    Mount {
        /// Where.
        path: PathBuf,
        /// Why.
        source: nix::Error,
    },
}

/// A bpffs that this process has mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mounted {
    /// Where.
    pub at: PathBuf,
    is_private: bool,
}

impl Mounted {
    /// That the mount will not outlive this process, in words.
    pub(super) fn warning(&self) -> Option<String> {
        self.is_private.then(|| {
            format!(
                "bpffs was mounted in a mount namespace of this process's own (`ip netns exec` makes \
                 one): when the agent ends, the pins and XDP go with it. Run `mount -t bpf bpf {}` \
                 outside first, or enter the network namespace with `nsenter --net`",
                self.at.display()
            )
        })
    }
}

/// Makes the directory `path` on bpffs, which is mounted if it is not yet: that takes `CAP_SYS_ADMIN`.
///
/// # Errors
///
/// [`BpffsError`].
pub(super) fn ensure(path: &Path) -> Result<Option<Mounted>, BpffsError> {
    let mut mounted = None;
    if !is_bpffs(path) {
        let at = if path.starts_with(USUAL) { Path::new(USUAL) } else { path };
        if at == path {
            make(at)?;
        }
        mount(Some("bpf"), at, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
            .map_err(|source| BpffsError::Mount { path: at.to_owned(), source })?;
        mounted = Some(Mounted { at: at.to_owned(), is_private: has_private_mounts() });
    }
    make(path)?;
    Ok(mounted)
}

/// Whether only this process and its children see the mounts that are made here.
fn has_private_mounts() -> bool {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    let (ours, first) = (namespace("self"), namespace("1"));
    ours.is_some() && first.is_some() && ours != first
}

/// Makes a directory that only this user can open: who can open it can lock it, and keep the agent out.
fn make(path: &Path) -> Result<(), BpffsError> {
    let owner = fs::symlink_metadata(path).map(|found| found.uid());
    if owner.is_ok_and(|owner| owner != geteuid().as_raw()) {
        // All users can make directories on a bpffs that is mounted as usual. An empty one is not an agent's.
        let _ = fs::remove_dir(path);
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| BpffsError::Directory { path: path.to_owned(), source })
}

/// Whether `path`, or the nearest of its parents that is there, is on bpffs.
fn is_bpffs(path: &Path) -> bool {
    path.ancestors()
        .find_map(|path| statfs(path).ok())
        .is_some_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}
