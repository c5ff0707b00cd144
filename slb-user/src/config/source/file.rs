//! The configuration in a file: replaced as a whole, by one `rename`.

use std::{
    fs::{self, File, Metadata, TryLockError},
    hash::Hasher as _,
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, fchown},
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use futures_util::stream;
use tempfile::NamedTempFile;
use tokio::signal::unix::{SignalKind, signal};

use super::{Changes, ConfigSource, Document, ReplaceError, Revision, unreadable};
use crate::{
    config::{
        LoadError,
        report::{Places, Report},
    },
    rights::FILES,
};

/// In bytes. No configuration is as large; a device is endless.
pub const LARGEST_FILE: u64 = 64 << 20;
/// How long another process that replaces the file may take: far more than it needs.
const LOCK_WITHIN: Duration = Duration::from_secs(1);
/// How often the lock is tried meanwhile.
const LOCK_AGAIN: Duration = Duration::from_millis(10);

/// A configuration file. Its revision is a hash of its content, and SIGHUP says that it may have changed.
#[derive(Clone, Debug)]
pub struct FileSource {
    path: PathBuf,
}

impl FileSource {
    /// The file at `path`, or the one that a symbolic link there leads to.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Reads the first `most` bytes, with U+FFFD in place of those that are not UTF-8.
    ///
    /// # Errors
    ///
    /// There is no such file, or it cannot be read.
    pub fn read_lossy(&self, most: u64) -> io::Result<String> {
        let mut bytes = Vec::new();
        File::open(&self.path)?.take(most).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

impl ConfigSource for FileSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn read(&self) -> Result<Document, LoadError> {
        let _raised = FILES.raise();
        let bytes = File::open(&self.path)
            .and_then(|mut file| content(&mut file))
            .map_err(|why| unreadable(&self.path, why))?;
        let revision = revision(&bytes);
        let text = String::from_utf8(bytes).map_err(|error| {
            let (valid, rest) = error.as_bytes().split_at(error.utf8_error().valid_up_to());
            let valid = String::from_utf8_lossy(valid);
            let message = format!("byte 0x{:02x} is not UTF-8; save the file as UTF-8", rest[0]);
            Report::one(Places::new(&self.path, &valid).mistake(valid.len(), message))
        })?;
        Ok(Document { text, revision })
    }

    fn replace(
        &self,
        base: Revision,
        text: &str,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<(), ReplaceError> {
        let _raised = FILES.raise();
        // A link stays; the file that it leads to is replaced.
        let path = fs::canonicalize(&self.path)?;
        if !fs::metadata(&path)?.is_file() {
            return Err(ReplaceError::NotRegular);
        }
        let (_lock, found) = lock(&path)?;
        let folder = path.parent().unwrap_or(Path::new("."));
        let mut new = NamedTempFile::new_in(folder)?;
        new.write_all(text.as_bytes())?;
        keep_owner(new.as_file(), &found)?;
        new.as_file().set_permissions(found.permissions())?;
        new.as_file().sync_all()?;
        // After everything that takes long: editors do not take the lock.
        if revision(&content(&mut File::open(&path)?)?) != base {
            return Err(ReplaceError::Changed);
        }
        if !is_wanted() {
            return Err(ReplaceError::GivenUp);
        }
        new.persist(&path).map_err(io::Error::from)?;
        // The new text is visible from here on, so it is too late for an error. If the folder cannot be written to its
        // disk, a loss of power may bring back the text before.
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
        Ok(())
    }

    fn changes(&self) -> io::Result<Changes> {
        let mut hangup = signal(SignalKind::hangup())?;
        Ok(Box::pin(stream::poll_fn(move |context| hangup.poll_recv(context))))
    }
}

fn content(file: &mut File) -> io::Result<Vec<u8>> {
    // A file that grows meanwhile, or has no size, takes more.
    let size = file.metadata()?.len().min(LARGEST_FILE);
    let mut bytes = Vec::with_capacity(size as usize + 1);
    file.take(LARGEST_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LARGEST_FILE {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// Is compared within one process only, so the hash may differ between releases.
fn revision(bytes: &[u8]) -> Revision {
    let mut hasher = rustc_hash::FxHasher::default();
    hasher.write(bytes);
    Revision(hasher.finish())
}

/// Locks the file at `path` against other processes that replace it in the same way, until the result is dropped.
///
/// Every user that can read the file can lock it, so this does not wait for ever; the comparison of revisions remains.
fn lock(path: &Path) -> io::Result<(File, Metadata)> {
    let patience = Instant::now() + LOCK_WITHIN;
    loop {
        let file = File::open(path)?;
        loop {
            match file.try_lock() {
                Err(TryLockError::WouldBlock) if Instant::now() < patience => sleep(LOCK_AGAIN),
                Ok(()) | Err(TryLockError::WouldBlock) => break,
                // Some network file systems have no locks.
                Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                    break;
                }
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        let locked = file.metadata()?;
        let named = fs::metadata(path)?;
        if (locked.dev(), locked.ino()) == (named.dev(), named.ino()) {
            return Ok((file, locked));
        }
        // The process that had the lock has replaced the file: lock the new one.
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

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::PermissionsExt as _,
        sync::atomic::{AtomicUsize, Ordering},
        thread,
    };

    use futures_util::StreamExt as _;
    use nix::sys::signal::{Signal, raise};

    use super::*;

    const WANTED: &dyn Fn() -> bool = &|| true;

    #[test]
    fn lock_that_is_never_released_does_not_keep_the_file_from_being_replaced() {
        let (_folder, path) = folder_with_file();
        let held = File::open(&path).unwrap();
        held.lock().unwrap();
        let source = FileSource::new(&path);
        let base = source.read().unwrap().revision;
        source.replace(base, "after", WANTED).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "after");
    }

    fn folder_with_file() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("slb.toml");
        fs::write(&path, "before").unwrap();
        (folder, path)
    }

    #[test]
    fn replaced_file_is_whole_and_as_readable_as_before() {
        let (folder, path) = folder_with_file();
        let link = folder.path().join("link.toml");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for (round, at) in [&path, &link].into_iter().enumerate() {
            let text = format!("after {round}");
            let source = FileSource::new(at);
            let base = source.read().unwrap().revision;
            source.replace(base, &text, WANTED).unwrap();
            assert_eq!(source.read().unwrap().text, text);
            assert_ne!(source.read().unwrap().revision, base);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        }
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left over");
    }

    #[test]
    fn file_is_not_replaced_if_changed_or_given_up() {
        let (folder, path) = folder_with_file();
        let source = FileSource::new(&path);
        let base = source.read().unwrap().revision;

        let given_up = source.replace(base, "after", &|| false);
        assert!(matches!(given_up, Err(ReplaceError::GivenUp)), "{given_up:?}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");

        // An editor that writes while the agent prepares its own text.
        let changed = source.replace(Revision(base.0 ^ 1), "after", WANTED);
        assert!(matches!(changed, Err(ReplaceError::Changed)), "{changed:?}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left over");
    }

    #[test]
    fn only_a_regular_file_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let refused = FileSource::new(&pipe).replace(Revision(0), "after", WANTED);
        assert!(matches!(refused, Err(ReplaceError::NotRegular)), "{refused:?}");
    }

    #[test]
    fn concurrent_writers_lose_no_edit() {
        const WRITERS: usize = 4;
        const EDITS: usize = 8;
        let (_folder, path) = folder_with_file();
        fs::write(&path, "").unwrap();
        let conflicts = AtomicUsize::new(0);
        thread::scope(|scope| {
            for writer in 0..WRITERS {
                let (path, conflicts) = (&path, &conflicts);
                scope.spawn(move || {
                    let source = FileSource::new(path);
                    let mut done = 0;
                    while done < EDITS {
                        let Document { text, revision } = source.read().unwrap();
                        match source.replace(revision, &format!("{text}{writer}\n"), WANTED) {
                            Ok(()) => done += 1,
                            Err(ReplaceError::Changed) => {
                                conflicts.fetch_add(1, Ordering::Relaxed);
                            }
                            Err(error) => panic!("{error}"),
                        }
                    }
                });
            }
        });
        let text = fs::read_to_string(&path).unwrap();
        for writer in 0..WRITERS {
            let edits = text.lines().filter(|line| *line == writer.to_string()).count();
            assert_eq!(edits, EDITS, "writer {writer}, {conflicts:?} conflicts");
        }
    }

    #[test]
    fn unreadable_bytes_are_a_mistake_with_its_place_and_read_lossy_goes_on() {
        let (_folder, path) = folder_with_file();
        fs::write(&path, b"a = 1\nb = \xff\n").unwrap();
        let source = FileSource::new(&path);
        let error = source.read().unwrap_err().to_string();
        assert!(error.ends_with(":2:5: byte 0xff is not UTF-8; save the file as UTF-8"), "{error}");
        assert_eq!(source.read_lossy(LARGEST_FILE).unwrap(), "a = 1\nb = \u{fffd}\n");
        assert_eq!(source.read_lossy(3).unwrap(), "a =");
        let missing = FileSource::new("/nonexistent").read_lossy(3).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn hangup_is_a_change() {
        let mut changes = FileSource::new("slb.toml").changes().unwrap();
        raise(Signal::SIGHUP).unwrap();
        assert_eq!(changes.next().await, Some(()));
    }
}
