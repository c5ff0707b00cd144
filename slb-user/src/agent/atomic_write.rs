//! The configuration file, about to be replaced: everything that can fail is done before.

use std::{
    fs::{self, File, Metadata},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, fchown},
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

use super::file_job::Wanted;
use crate::config::{self, LoadError};

/// Another text for a file, beside it.
pub(super) struct AtomicWrite {
    path: PathBuf,
    new: NamedTempFile,
    /// As it was when the text was made from it.
    was: Version,
}

/// What tells that a file was written to.
#[derive(PartialEq, Eq)]
struct Version {
    inode: u64,
    len: u64,
    modified: (i64, i64),
}

impl Version {
    fn of(found: &Metadata) -> Self {
        let modified = (found.mtime(), found.mtime_nsec());
        Self { inode: found.ino(), len: found.len(), modified }
    }
}

/// What a file says.
pub(super) struct Opened {
    path: PathBuf,
    found: Metadata,
    pub text: String,
}

impl Opened {
    /// Reads a file; one that a link leads to, not the link, is what will be replaced.
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        let unreadable = |why| LoadError::Unreadable { path: path.to_owned(), why };
        let real = fs::canonicalize(path).map_err(unreadable)?;
        let found = fs::metadata(&real).map_err(unreadable)?;
        Ok(Self { text: config::read(&real)?, path: real, found })
    }

    /// Writes another text beside it, with the same permissions, and the same owner if this process may give files away.
    pub fn stage(self, text: &str) -> io::Result<AtomicWrite> {
        let Self { path, found, .. } = self;
        let mut new = NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
        new.write_all(text.as_bytes())?;
        keep_owner(new.as_file(), &found)?;
        new.as_file().set_permissions(found.permissions())?;
        new.as_file().sync_all()?;
        Ok(AtomicWrite { path, new, was: Version::of(&found) })
    }
}

/// Gives a new file to the owner and the group of the one that it replaces.
///
/// An agent that is not root cannot do so with a file of another user's, but may replace it in a folder of its own; the
/// group is kept then if the agent is a member.
fn keep_owner(new: &File, old: &Metadata) -> io::Result<()> {
    let made = new.metadata()?;
    let differing = |new: u32, old: u32| (new != old).then_some(old);
    let (uid, gid) = (differing(made.uid(), old.uid()), differing(made.gid(), old.gid()));
    for (uid, gid) in [(uid, gid), (None, gid)] {
        if (uid, gid) == (None, None) {
            break;
        }
        match fchown(new, uid, gid) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            done => return done,
        }
    }
    Ok(())
}

impl AtomicWrite {
    /// Replaces the file, unless it was changed meanwhile, or its replacement is not `wanted` any more.
    pub fn commit(self, wanted: &Wanted) -> io::Result<()> {
        if Version::of(&fs::metadata(&self.path)?) != self.was {
            return Err(io::Error::other("it was changed meanwhile"));
        }
        if !wanted.holds() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.new.persist(&self.path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn given_a_file_when_replaced_then_it_is_whole_and_as_readable_as_before() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("slb.toml"), folder.path().join("link.toml"));
        fs::write(&path, "before").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for (round, at) in [&path, &link].into_iter().enumerate() {
            let text = format!("after {round}");
            let staged = Opened::read(at).unwrap().stage(&text).unwrap();
            assert_ne!(fs::read_to_string(&path).unwrap(), text);
            staged.commit(&Wanted::default()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        }
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left over");
    }

    #[test]
    fn given_a_file_that_was_changed_when_replaced_then_it_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("slb.toml");
        fs::write(&path, "before").unwrap();
        let staged = Opened::read(&path).unwrap().stage("after").unwrap();
        fs::write(&path, "by somebody else").unwrap();
        assert!(
            staged
                .commit(&Wanted::default())
                .unwrap_err()
                .to_string()
                .contains("was changed meanwhile")
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "by somebody else");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
