//! `cargo xtask fuzz`: bytes from anywhere for what reads them, and mistakes that the packet fuzz test has to find.

use anyhow::Result;
use clap::Args;

mod mutants;
mod targets;

/// Options of `cargo xtask fuzz`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// For how long each target runs, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u32).range(1..))]
    time: u32,
    /// Instead, makes each mistake of tests/mutants.toml in a copy of the sources, which the packet fuzz test has to
    /// find (as root)
    #[arg(long, conflicts_with_all = ["time", "keep"])]
    mutants: bool,
    /// Instead, adds what earlier runs have found to the corpora, as far as it reaches more of the code
    #[arg(long, conflicts_with = "time")]
    keep: bool,
    /// Only targets, or mistakes, whose names contain one of these
    #[arg(value_name = "NAME")]
    names: Vec<String>,
}

impl Options {
    fn has(&self, name: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|part| name.contains(part.as_str()))
    }
}

/// Fuzzes the targets, or shows that the packet fuzz test finds mistakes.
///
/// # Errors
///
/// A target fails, or a mistake is not found.
pub(crate) fn run(options: &Options) -> Result<()> {
    match options {
        Options { mutants: true, .. } => mutants::run(options),
        Options { keep: true, .. } => targets::keep(options),
        _ => targets::run(options),
    }
}

/// Runs every target for a moment.
///
/// # Errors
///
/// As [`run`].
pub(crate) fn briefly(time: u32) -> Result<()> {
    targets::run(&Options { time, mutants: false, keep: false, names: Vec::new() })
}
