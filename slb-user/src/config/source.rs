//! Where the configuration comes from: its text, the revision of that text, and when it changes.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    pin::Pin,
};

use futures_util::Stream;

pub use self::file::{FileSource, LARGEST_FILE};
use super::LoadError;

mod file;

/// A text and the revision that it has at its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// TOML, not parsed yet.
    pub text: String,
    /// Names this text in [`ConfigSource::replace`].
    pub revision: Revision,
}

/// Names one state of a source. Revisions of different sources must not be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revision(u64);

/// Yields each time the text may have changed. Changes that arrive together may be reported once.
pub type Changes = Pin<Box<dyn Stream<Item = ()> + Send>>;

/// Where the agent's configuration comes from.
///
/// [`read`](Self::read) and [`replace`](Self::replace) block, possibly for as long as a disk hangs: call them in a
/// thread that may wait.
pub trait ConfigSource: fmt::Debug + Send + Sync {
    /// Names the source in messages and in the status.
    fn path(&self) -> &Path;

    /// Reads the text as it is now.
    ///
    /// # Errors
    ///
    /// The source cannot be read, or holds no text.
    fn read(&self) -> Result<Document, LoadError>;

    /// Replaces the text, if it still has the revision `base` (compare and swap).
    ///
    /// `is_wanted` is asked as the last thing before the new text becomes visible.
    ///
    /// # Errors
    ///
    /// [`ReplaceError`]; the text is what it was.
    fn replace(
        &self,
        base: Revision,
        text: &str,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<(), ReplaceError>;

    /// Starts to watch the source. Must be called in a Tokio runtime.
    ///
    /// # Errors
    ///
    /// It cannot be watched.
    fn changes(&self) -> io::Result<Changes>;
}

/// Why a text was not replaced.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// Another writer was first.
    #[error("it was changed meanwhile")]
    Changed,
    /// The caller has given up.
    #[error("it took too long")]
    GivenUp,
    /// Only a regular file can be replaced.
    #[error("it is not a regular file")]
    NotRegular,
    /// The system refuses.
    // The reason is part of the message, not a source: this is a part of one line in a log.
    #[error("{why}{}", hint(why))]
    Io {
        /// Its answer.
        why: io::Error,
    },
}

impl From<io::Error> for ReplaceError {
    fn from(why: io::Error) -> Self {
        Self::Io { why }
    }
}

/// What makes a file writable.
fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => {
            "; under systemd, its folder has to be in the unit's ReadWritePaths="
        }
        io::ErrorKind::PermissionDenied => "; its folder has to belong to the agent's user",
        _ => "",
    }
}

fn unreadable(path: &Path, why: io::Error) -> LoadError {
    LoadError::Unreadable { path: PathBuf::from(path), why }
}
