//! What commands write: the only place that writes to stdout and stderr, except for the log of `slb run`.
//!
//! Answers go to stdout, and a failed write is an error. Errors go to stderr; if that cannot be written to, there is no
//! other place to report it, and the exit code still says how the command has ended.

use std::{
    fmt::Display,
    io::{self, Write as _},
};

use serde::Serialize;

/// An answer could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to stdout")]
pub(super) struct OutputError(#[from] io::Error);

impl OutputError {
    /// Whether the reader has closed the pipe: it has seen enough.
    pub(super) fn is_closed(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }
}

/// Writes a text to stdout, at once.
pub(super) fn print(text: impl Display) -> Result<(), OutputError> {
    let mut stdout = io::stdout().lock();
    write!(stdout, "{text}")?;
    // What is left in the buffer would be written when the process ends, and an error would be lost.
    Ok(stdout.flush()?)
}

/// Writes a line to stdout.
pub(super) fn print_line(text: impl Display) -> Result<(), OutputError> {
    print(format_args!("{text}\n"))
}

/// Writes a value to stdout, for programs.
pub(super) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    Ok(print_line(serde_json::to_string_pretty(value)?)?)
}

/// Writes a line to stderr.
pub(super) fn print_error(text: impl Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Writes what `--help` or `--version` asks for to stdout.
pub(super) fn print_help(help: &clap::Error) -> Result<(), OutputError> {
    help.print()?;
    Ok(io::stdout().flush()?)
}
