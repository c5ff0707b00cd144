//! The files on bpffs.
//!
//! ```text
//! <pins>/v<ABI>/maps/<MAP>         outlive every agent; never replaced
//!              /progs/slb          the program in use
//!              /progs/slb-<hash>   the same, named by the object that it was loaded from
//!              /links/<interface>  keep it attached; a newer program is swapped into them
//! ```

use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use aya::maps::{MapData, MapError};
use slb_common::abi::ABI_VERSION;

use super::{
    BpffsError, LoadError,
    bpffs::{self, Mounted},
    loader::PROGRAM,
    syscall,
};
use crate::rights::FILES;

/// Where everything is pinned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pins {
    root: PathBuf,
    mounted: Option<Mounted>,
}

impl Pins {
    /// Below `root`, the configuration's `gateway.pins`.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), mounted: None }
    }

    /// The same; mounts bpffs there if it is not mounted yet. That takes `CAP_SYS_ADMIN`, which the agent gives up before
    /// it does anything else.
    ///
    /// # Errors
    ///
    /// [`BpffsError`].
    pub fn mount(root: &Path) -> Result<Self, BpffsError> {
        Ok(Self { root: root.to_owned(), mounted: bpffs::ensure(root)? })
    }

    /// The mount that [`Pins::mount`] has made.
    pub(super) const fn mounted(&self) -> Option<&Mounted> {
        self.mounted.as_ref()
    }

    /// Opens a pinned map.
    pub(super) fn open_map(&self, name: &str) -> Result<MapData, MapError> {
        let _raised = FILES.raise();
        MapData::from_pin(self.map(name))
    }

    pub(super) fn version(&self) -> PathBuf {
        self.root.join(format!("v{ABI_VERSION}"))
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.version().join("maps").join(name)
    }

    pub(super) fn program(&self) -> PathBuf {
        self.version().join("progs").join(PROGRAM)
    }

    /// The first program of an object.
    pub(super) fn program_of(&self, object: &[u8]) -> PathBuf {
        let mut hash = DefaultHasher::new();
        object.hash(&mut hash);
        self.version().join("progs").join(format!("{PROGRAM}-{:016x}", hash.finish()))
    }

    /// The pins that [`Pins::program_of`] names, for every object.
    pub(super) fn programs_of_objects(&self) -> Result<Vec<PathBuf>, LoadError> {
        let pins = entries(&self.version().join("progs"))?.into_iter();
        let prefix = format!("{PROGRAM}-");
        Ok(pins.filter(|(name, _)| name.starts_with(&prefix)).map(|(_, path)| path).collect())
    }

    /// The link of each interface that has one.
    pub(super) fn links(&self) -> Result<Vec<(String, PathBuf)>, LoadError> {
        let links = entries(&self.version().join("links"))?;
        Ok(links.into_iter().map(|(name, path)| (interface(&name), path)).collect())
    }

    pub(super) fn link(&self, interface: &str) -> PathBuf {
        self.version().join("links").join(link(interface))
    }

    /// The directories of agents with another layout of the maps.
    pub(super) fn other_versions(&self) -> Result<Vec<PathBuf>, LoadError> {
        let own = self.version();
        Ok(versions(&self.root)?.into_iter().filter(|path| *path != own).collect())
    }

    /// Makes the directories.
    pub(super) fn make(&self) -> Result<(), LoadError> {
        for directory in ["maps", "progs", "links"] {
            let path = self.version().join(directory);
            fs::create_dir_all(&path).map_err(|source| LoadError::Path { path, source })?;
        }
        Ok(())
    }

    /// The configuration's `gateway.pins`.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }
}

/// What an interface's link is called: bpffs allows no dots, and the kernel no colons in the names of
/// interfaces.
pub(super) fn link(interface: &str) -> String {
    interface.replace('.', ":")
}

/// The interface of a link.
pub(super) fn interface(link: &str) -> String {
    link.replace(':', ".")
}

/// Detaches XDP everywhere and removes every pin below `pins`, of all versions.
///
/// # Errors
///
/// [`LoadError`]. Nothing being there is none.
pub fn unload(pins: &Pins) -> Result<Vec<PathBuf>, LoadError> {
    let mut removed = Vec::new();
    for version in versions(&pins.root)? {
        // Links first: from here on the kernel has the packets again.
        for directory in ["links", "progs", "maps"] {
            let directory = version.join(directory);
            for (_, path) in entries(&directory)? {
                remove(&path)?;
                removed.push(path);
            }
            remove_directory(&directory)?;
        }
        remove_directory(&version)?;
    }
    Ok(removed)
}

/// The directories below `root` that agents have made, one per layout of the maps.
fn versions(root: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let is_ours =
        |name: &str| name.strip_prefix('v').is_some_and(|version| version.parse::<u32>().is_ok());
    let found = entries(root)?.into_iter();
    Ok(found.filter(|(name, _)| is_ours(name)).map(|(_, path)| path).collect())
}

pub(super) fn entries(directory: &Path) -> Result<Vec<(String, PathBuf)>, LoadError> {
    let failed = |source| LoadError::Path { path: directory.to_owned(), source };
    match fs::read_dir(directory) {
        Ok(entries) => entries
            .map(|entry| {
                let entry = entry.map_err(failed)?;
                Ok((entry.file_name().to_string_lossy().into_owned(), entry.path()))
            })
            .collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

pub(super) fn remove(path: &Path) -> Result<(), LoadError> {
    fs::remove_file(path).map_err(|source| LoadError::Path { path: path.to_owned(), source })
}

/// Pins an object whose pin is gone, and says whether it was.
pub(super) fn pin_again(object: BorrowedFd<'_>, path: &Path) -> Result<bool, LoadError> {
    if path.exists() {
        return Ok(false);
    }
    match syscall::pin(object, path) {
        Ok(()) => Ok(true),
        Err(source) => Err(LoadError::Path { path: path.to_owned(), source }),
    }
}

fn remove_directory(path: &Path) -> Result<(), LoadError> {
    match fs::remove_dir(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(LoadError::Path { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}
