//! One agent at a time.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::sys::stat::{major, minor};

use super::private;
use crate::{printable::Printable, rights::FILES};

/// The lock cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent has it.
    #[error("another agent (pid {pid}) is running with this `gateway.api`; stop it first")]
    Held {
        /// Who.
        pid: String,
    },
    /// Another process has locked the directory of the pins: an agent with another socket, or any process that could open
    /// the directory before the agent has closed it to other users.
    #[error("{} is locked by {holder}; stop it first", path.display())]
    PinsHeld {
        /// `gateway.pins`.
        path: PathBuf,
        /// Pid and command, as far as they are known.
        holder: String,
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
        let _raised = FILES.raise();
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
        let _raised = FILES.raise();
        let failed = |source| LockError::File { path: socket.to_owned(), source };
        socket.parent().map_or(Ok(()), private::make_directory).map_err(failed)
    }

    /// Takes the lock of a directory of pins, which has to be there, and which no other user can open from then on.
    ///
    /// # Errors
    ///
    /// [`LockError`].
    pub fn of_directory(path: &Path) -> Result<Self, LockError> {
        let _raised = FILES.raise();
        let failed = |source| LockError::File { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        private::close_directory(path, &file).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => {
                let holder = holder(&file).map_err(failed)?;
                Err(LockError::PinsHeld { path: path.to_owned(), holder })
            }
            Err(TryLockError::Error(source)) => Err(failed(source)),
        }
    }
}

/// The process that has locked `file`, in words: "process 7 (slb)".
fn holder(file: &File) -> io::Result<String> {
    let found = file.metadata()?;
    let (dev, inode) = (found.dev(), found.ino());
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let Some(pid) = holder_of(&locks, (major(dev), minor(dev)), inode) else {
        return Ok("another process".to_owned());
    };
    // A unit with ProtectProc=invisible does not see the processes of other users.
    let command = fs::read_to_string(format!("/proc/{pid}/comm"));
    Ok(command.map_or_else(
        |_| format!("process {pid}"),
        |command| format!("process {pid} ({})", Printable(command.trim_end())),
    ))
}

/// The process that holds a lock by flock(2) on this file, by the text of `/proc/locks` (proc_locks(5)).
fn holder_of(locks: &str, (major, minor): (u64, u64), inode: u64) -> Option<u32> {
    let file = format!("{major:02x}:{minor:02x}:{inode}");
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // A lock that is waited for has "->" ahead of its kind.
        let [_, "FLOCK", _, _, pid, at, ..] = fields[..] else { return None };
        (at == file).then(|| pid.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

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
    fn directory_of_pins_that_is_locked_names_the_process() {
        let directory = tempfile::tempdir().unwrap();
        let _first = Lock::of_directory(directory.path()).unwrap();
        let error = Lock::of_directory(directory.path()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&format!("is locked by process {} (", own_pid())), "{text}");
    }

    #[test]
    fn holder_of_a_lock_is_read_from_the_list_of_locks() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 00:1b:700 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 12 00:1b:700 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 13 00:1b:700 0 EOF\n\
                     3: FLOCK  ADVISORY  READ  14 103:02:5 0 EOF\n";
        let cases = [
            ((0, 0x1b), 700, Some(12)),
            ((0x103, 2), 5, Some(14)),
            ((0, 0x1b), 70, None),
            ((0, 0x1c), 700, None),
        ];
        for (device, inode, expected) in cases {
            assert_eq!(holder_of(locks, device, inode), expected, "{device:?} {inode}");
        }
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
