//! Why a configuration was not taken over.

use std::path::PathBuf;

use crate::{
    config::{EditError, LoadError, source::ReplaceError},
    datapath,
    ids::CapacityError,
};

/// Why a configuration was not taken over. Nothing was changed, but for [`Refusal::Incomplete`] and
/// [`Refusal::NotReplaced`].
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The file cannot be read, or is wrong.
    #[error(transparent)]
    File(#[from] LoadError),
    /// The edit cannot be made in the file.
    #[error(transparent)]
    Edit(#[from] EditError),
    /// A key that the running agent cannot change.
    #[error(
        "{}: gateway.{key} cannot change while the agent runs: {was} again, or restart the agent",
        path.display(),
    )]
    Fixed {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What to do for it to have the value in force.
        was: String,
    },
    /// The configuration does not fit into the maps.
    #[error(transparent)]
    Ids(#[from] CapacityError),
    /// `SLB_SLOTS` was made for a smaller configuration.
    #[error(
        "the schedules take {needed} chunks of SLB_SLOTS, which has {capacity} and needs three times as many; run \
         `slb unload` and start the agent again to make it larger"
    )]
    NoRoomForSchedules {
        /// Chunks that the schedules take.
        needed: usize,
        /// Chunks that there are.
        capacity: usize,
    },
    /// An interface is not there, or occupied.
    #[error(transparent)]
    Interface(#[from] datapath::LoadError),
    /// Earlier reads or writes of the file have not ended.
    #[error(
        "earlier attempts to read or write {} hang still; mend its file system, or restart the agent",
        path.display()
    )]
    FileHangs {
        /// The file.
        path: PathBuf,
    },
    /// Reading the file takes too long.
    #[error(
        "cannot read {} within {seconds} s; does its disk hang, or is it a named pipe?",
        path.display()
    )]
    FileSlow {
        /// The file.
        path: PathBuf,
        /// The limit.
        seconds: u64,
    },
    /// A panic.
    #[error("reading {} ended in a defect of slb; the log has more", path.display())]
    Defect {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be written.
    #[error("cannot write {}: {why}", path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: ReplaceError,
    },
    /// Writing the file takes too long, and it may still be replaced.
    #[error(
        "{} was not replaced within {seconds} s, and the agent goes on with the configuration that it has; once its \
         disk answers, see what the file says, and run `slb reload`",
        path.display()
    )]
    NotReplaced {
        /// The file.
        path: PathBuf,
        /// The limit.
        seconds: u64,
    },
    /// The configuration is in force, but the kernel refuses a part of it; that is tried again.
    #[error("done in part, and tried again: {}", failures.join("; "))]
    Incomplete {
        /// What failed.
        failures: Vec<String>,
    },
}

/// What a refusal means for the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// The file or the command is wrong.
    Invalid,
    /// The file is right, but not for this agent as it runs.
    Conflict,
    /// Something was done, but not all, or that is not known.
    Incomplete,
}

impl Refusal {
    /// What it means for the command.
    #[must_use]
    pub const fn kind(&self) -> RefusalKind {
        match self {
            Self::File(_) | Self::Edit(_) => RefusalKind::Invalid,
            Self::Fixed { .. }
            | Self::Ids(_)
            | Self::NoRoomForSchedules { .. }
            | Self::Interface(_)
            | Self::FileHangs { .. }
            | Self::FileSlow { .. }
            | Self::Defect { .. }
            | Self::Unwritable { .. } => RefusalKind::Conflict,
            Self::NotReplaced { .. } | Self::Incomplete { .. } => RefusalKind::Incomplete,
        }
    }
}
