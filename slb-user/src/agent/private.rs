//! Files that no other user may get in the way of.

use std::{
    fs::{self, DirBuilder, File, Metadata, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use nix::{libc, unistd::geteuid};

/// Write permission of the group and of others.
const OTHERS_WRITE: u32 = 0o022;
/// In such a directory others can make files, but not remove or replace those of this process.
const STICKY: u32 = 0o1000;
/// Any permission of the group and of others.
const OTHERS: u32 = 0o077;

/// Another user could put other files in place of ours.
#[derive(Debug, thiserror::Error)]
enum Unsafe {
    #[error("{} can be written by other users; let only its owner write (chmod go-w), or use another directory", .0.display())]
    Writable(PathBuf),
    #[error("{} belongs to user {owner}; give it to the user that the agent runs as", path.display())]
    Owner { path: PathBuf, owner: u32 },
    #[error("it is not a regular file")]
    NotRegular,
}

impl From<Unsafe> for io::Error {
    fn from(error: Unsafe) -> Self {
        Self::new(io::ErrorKind::PermissionDenied, error)
    }
}

/// Whether files of this user may be trusted. Root trusts the user that the service runs as, which owns the directories.
fn is_trusted(owner: u32) -> bool {
    let own = geteuid();
    own.is_root() || owner == 0 || owner == own.as_raw()
}

/// Makes `path` if need be, and sees that no other user can make, remove or rename anything in it, or move it away.
pub(super) fn make_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(path)?;
    let path = fs::canonicalize(path)?;
    for directory in path.ancestors() {
        let found = fs::metadata(directory)?;
        let is_the_one = directory == path;
        let is_kept = !is_the_one && found.mode() & STICKY != 0;
        if found.mode() & OTHERS_WRITE != 0 && !is_kept {
            return Err(Unsafe::Writable(directory.to_owned()).into());
        }
        if is_the_one && !is_trusted(found.uid()) {
            return Err(Unsafe::Owner { path: directory.to_owned(), owner: found.uid() }.into());
        }
    }
    Ok(())
}

/// Opens the file `path`, or makes it, in a directory that [`make_directory`] has found to be ours.
///
/// A file that others could open is replaced: they may have it open, and hold a lock on it.
pub(super) fn open_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path)?;
    if is_private(&file.metadata()?)? {
        return Ok(file);
    }
    fs::remove_file(path)?;
    options.create_new(true).open(path)
}

fn is_private(found: &Metadata) -> Result<bool, Unsafe> {
    if !found.is_file() {
        return Err(Unsafe::NotRegular);
    }
    Ok(is_trusted(found.uid()) && found.mode() & OTHERS == 0)
}

/// Sees that no other user can open the directory `path` from now on.
pub(super) fn close_directory(path: &Path, directory: &File) -> io::Result<()> {
    let found = directory.metadata()?;
    if !is_trusted(found.uid()) {
        return Err(Unsafe::Owner { path: path.to_owned(), owner: found.uid() }.into());
    }
    // Where the file system itself is mounted, other programs have their pins as well.
    let is_mount = path
        .parent()
        .map(fs::metadata)
        .transpose()?
        .is_some_and(|parent| parent.dev() != found.dev());
    if found.mode() & OTHERS != 0 && !is_mount {
        let mut permissions = found.permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o700);
        directory.set_permissions(permissions)?;
    }
    Ok(())
}
