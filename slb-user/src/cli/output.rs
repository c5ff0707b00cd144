//! What commands write: the only place that writes to stdout and stderr, except for the log of `slb run`.
//!
//! Answers go to stdout, and a failed write is an error. Errors go to stderr; if that cannot be written to, there is no
//! other place to report it, and the exit code still says how the command has ended.
//!
//! The reader may be a terminal, and texts may be those of others: what is not plain text is escaped.

use std::{
    fmt::Display,
    io::{self, Write as _},
};

use serde::Serialize;

use crate::printable::{PrintableLines, is_plain};

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
    write!(stdout, "{}", PrintableLines(text))?;
    // What is left in the buffer would be written when the process ends, and an error would be lost.
    Ok(stdout.flush()?)
}

/// Writes a line to stdout.
pub(super) fn print_line(text: impl Display) -> Result<(), OutputError> {
    print(format_args!("{text}\n"))
}

/// Writes a value to stdout, for programs.
pub(super) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    Ok(print_line(plain_json(&serde_json::to_string_pretty(value)?))?)
}

/// JSON that means the same, with escapes in place of characters that are not plain text.
pub(super) fn plain_json(json: &str) -> String {
    let mut plain = String::with_capacity(json.len());
    for c in json.chars() {
        // Line breaks can only be between values. Such characters can only be in texts, which have these escapes.
        if is_plain(c) || c == '\n' {
            plain.push(c);
        } else {
            let mut units = [0; 2];
            let escapes = c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}"));
            plain.extend(escapes);
        }
    }
    plain
}

/// Writes a line to stderr.
pub(super) fn print_error(text: impl Display) {
    let _ = writeln!(io::stderr(), "{}", PrintableLines(text));
}

/// Writes what `--help` or `--version` asks for to stdout.
pub(super) fn print_help(help: &clap::Error) -> Result<(), OutputError> {
    help.print()?;
    Ok(io::stdout().flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_means_the_same_without_characters_that_are_not_plain() {
        let text = "käse \u{1b}[2J \u{7f} \u{202e} \u{e0041} \"\\";
        let json = plain_json(&serde_json::to_string_pretty(&[text]).unwrap());
        assert!(json.chars().all(|c| is_plain(c) || c == '\n'), "{json:?}");
        assert_eq!(serde_json::from_str::<Vec<String>>(&json).unwrap(), [text]);
        assert!(json.contains("käse"));
    }
}
