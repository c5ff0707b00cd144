//! One agent at a time.

use std::{
    fs::{File, TryLockError},
    io::{self, Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
};

use super::private;

/// The lock cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent has it.
    #[error("another agent (pid {pid}) is running with this `gateway.api`; stop it first")]
    Held {
        /// Who.
        pid: String,
    },
    /// Another agent has it, with another socket.
    #[error("another agent is running with the pins in {}; stop it first", path.display())]
    PinsHeld {
        /// `gateway.pins`.
        path: PathBuf,
    },
    /// The file cannot be made or opened.
    #[error("lock file {}", path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Held until dropped, or until the process dies.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock that belongs to the API socket `api`, whose directory is made if need be.
    ///
    /// Any process that can open a file can lock it, so no other user can open this one; and no other user can write
    /// to the directory, or the lock would be on a file of that user's choice.
    ///
    /// # Errors
    ///
    /// [`LockError`].
    pub fn take(api: &Path) -> Result<Self, LockError> {
        let mut path = api.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let failed = |source| LockError::File { path: path.clone(), source };
        if let Some(directory) = path.parent() {
            private::make_directory(directory).map_err(failed)?;
        }
        let mut file = private::open_file(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                file.read_to_string(&mut pid).map_err(failed)?;
                return Err(LockError::Held { pid: pid.trim().to_owned() });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        file.set_len(0).map_err(failed)?;
        file.rewind().map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { _file: file })
    }

    /// Makes the directory of a socket if need be. No other user may write to it.
    ///
    /// # Errors
    ///
    /// [`LockError::File`].
    pub fn directory_of(socket: &Path) -> Result<(), LockError> {
        let failed = |source| LockError::File { path: socket.to_owned(), source };
        socket.parent().map_or(Ok(()), private::make_directory).map_err(failed)
    }

    /// Takes the lock of a directory of pins, which has to be there, and which no other user can open from then on.
    ///
    /// # Errors
    ///
    /// [`LockError`].
    pub fn of_directory(path: &Path) -> Result<Self, LockError> {
        let failed = |source| LockError::File { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        private::close_directory(path, &file).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(LockError::PinsHeld { path: path.to_owned() }),
            Err(TryLockError::Error(source)) => Err(failed(source)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn lock_file_is_private_and_one_that_was_not_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let api = directory.path().join("api.sock");
        let file = directory.path().join("api.sock.lock");
        drop(Lock::take(&api).unwrap());
        assert_eq!(mode(&file), 0o600);

        // Another user has it open, and keeps it locked.
        set_mode(&file, 0o644);
        let held = File::open(&file).unwrap();
        held.lock().unwrap();
        let _lock = Lock::take(&api).unwrap();
        assert_eq!(mode(&file), 0o600);
        assert!(matches!(Lock::take(&api), Err(LockError::Held { .. })));
    }

    #[test]
    fn lock_file_is_no_symbolic_link() {
        let directory = tempfile::tempdir().unwrap();
        let precious = directory.path().join("precious");
        fs::write(&precious, "content").unwrap();
        symlink(&precious, directory.path().join("api.sock.lock")).unwrap();

        let error = Lock::take(&directory.path().join("api.sock")).unwrap_err();
        assert!(matches!(error, LockError::File { .. }), "{error:?}");
        assert_eq!(fs::read_to_string(&precious).unwrap(), "content");
    }

    #[test]
    fn directory_that_others_can_write_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let cases = [
            // outer, inner, whether it is fine
            (0o755, 0o755, true),
            (0o1777, 0o755, true),
            (0o755, 0o1777, false),
            (0o755, 0o775, false),
            (0o777, 0o700, false),
        ];
        for (outer_mode, inner_mode, is_fine) in cases {
            set_mode(directory.path(), outer_mode);
            set_mode(&inner, inner_mode);
            let taken = Lock::take(&inner.join("api.sock"));
            assert_eq!(taken.is_ok(), is_fine, "{outer_mode:o} {inner_mode:o}: {taken:?}");
        }
    }

    #[test]
    fn directory_of_pins_is_closed_to_others_by_its_lock() {
        let directory = tempfile::tempdir().unwrap();
        set_mode(directory.path(), 0o755);
        let _lock = Lock::of_directory(directory.path()).unwrap();
        assert_eq!(mode(directory.path()), 0o700);
    }

    fn own_pid() -> String {
        std::process::id().to_string()
    }

    #[test]
    fn given_a_taken_lock_when_another_takes_it_then_it_is_refused_with_the_pid() {
        let directory = tempfile::tempdir().unwrap();
        let api = directory.path().join("api.sock");
        let _first = Lock::take(&api).unwrap();

        for attempt in 1..=2 {
            match Lock::take(&api).unwrap_err() {
                LockError::Held { pid } => assert_eq!(pid, own_pid(), "attempt {attempt}"),
                other => panic!("attempt {attempt}: {other:?}"),
            }
        }
    }

    #[test]
    fn given_a_lock_when_it_is_dropped_then_the_next_one_gets_it() {
        let directory = tempfile::tempdir().unwrap();
        let api = directory.path().join("api.sock");
        drop(Lock::take(&api).unwrap());

        Lock::take(&api).unwrap();
    }

    #[test]
    fn given_two_sockets_when_both_are_locked_then_neither_is_in_the_way() {
        let directory = tempfile::tempdir().unwrap();
        let _first = Lock::take(&directory.path().join("one.sock")).unwrap();

        Lock::take(&directory.path().join("two.sock")).unwrap();
    }

    #[test]
    fn given_no_directory_when_the_lock_is_taken_then_it_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let api = directory.path().join("run").join("slb").join("api.sock");

        let _lock = Lock::take(&api).unwrap();

        assert!(api.parent().unwrap().is_dir());
    }

    #[test]
    fn given_a_file_of_a_dead_agent_when_the_lock_is_taken_then_only_the_new_pid_is_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let api = directory.path().join("api.sock");
        fs::write(directory.path().join("api.sock.lock"), "99999999999999\n").unwrap();

        let _lock = Lock::take(&api).unwrap();

        let content = fs::read_to_string(directory.path().join("api.sock.lock")).unwrap();
        assert_eq!(content, format!("{}\n", own_pid()));
    }

    #[test]
    fn given_a_place_where_no_file_can_be_when_the_lock_is_taken_then_the_error_names_it() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();

        match Lock::take(&file.join("api.sock")).unwrap_err() {
            LockError::File { path, .. } => assert_eq!(path, file.join("api.sock.lock")),
            other => panic!("{other:?}"),
        }
    }
}
