//! What is wrong with a file: every mistake, each with its place.

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashSet},
    error::Error,
    fmt, io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::printable::Printable;

/// One mistake, or one warning: where it is, what was found, and what to write instead.
///
/// `Display` is one line, `FILE:LINE:COLUMN: MESSAGE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The file, as it was named to the parser.
    pub file: Arc<Path>,
    /// Counts from 1.
    pub line: usize,
    /// In characters, counts from 1.
    pub column: usize,
    /// What was found, and what to write; no line breaks.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, column, message } = self;
        write!(f, "{}:{line}:{column}: {}", Printable(&file.display()), Printable(message))
    }
}

/// Mistakes of which a report tells: more are not read, and a file may have millions.
const MOST_MISTAKES: usize = 100;

/// The mistakes of a file, at least one, in the order of the file: the first 100, and how many more there are.
///
/// `Display` is one line for each, without a line break after the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    mistakes: Vec<Mistake>,
    more: usize,
}

impl Report {
    /// In the order of the file; never empty.
    #[must_use]
    pub fn mistakes(&self) -> &[Mistake] {
        &self.mistakes
    }

    /// How many there are, with those that [`Report::mistakes`] leaves out.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.mistakes.len() + self.more
    }

    /// A single mistake.
    pub(super) fn one(mistake: Mistake) -> Self {
        Self { mistakes: vec![mistake], more: 0 }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, mistake) in self.mistakes.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            mistake.fmt(f)?;
        }
        if self.more > 0 {
            write!(f, "\n... and {} more", self.more)?;
        }
        Ok(())
    }
}

impl Error for Report {}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file could not be read.
    // The reason is part of the message, not a source: this is one line in a log, like a mistake.
    #[error("cannot read '{}': {why}", path.display())]
    Unreadable {
        /// The file, as it was named.
        path: PathBuf,
        /// What the system said.
        why: io::Error,
    },
    /// The file was read, and is wrong.
    #[error(transparent)]
    Invalid(#[from] Report),
}

/// Turns byte offsets of one text into mistakes.
pub(super) struct Places<'a> {
    file: Arc<Path>,
    text: &'a str,
    /// Offset of each line's first byte.
    lines: Vec<usize>,
}

impl<'a> Places<'a> {
    pub(super) fn new(file: &Path, text: &'a str) -> Self {
        let after_breaks = text.match_indices('\n').map(|(at, _)| at + 1);
        let lines = std::iter::once(0).chain(after_breaks).collect();
        Self { file: file.into(), text, lines }
    }

    /// The mistake `message` at byte `at`; past the end is the end.
    pub(super) fn mistake(&self, at: usize, message: String) -> Mistake {
        let at = self.text.floor_char_boundary(at);
        let line = self.lines.partition_point(|&start| start <= at);
        let column = self.text[self.lines[line - 1]..at].chars().count() + 1;
        Mistake { file: self.file.clone(), line, column, message }
    }
}

/// Collects what is found while a file is read.
///
/// A shared reference is enough to report, so that readers can be nested freely.
#[derive(Default)]
pub(super) struct Findings {
    mistakes: RefCell<First>,
    warnings: RefCell<First>,
    /// Where syntax errors made values unreadable; each is reported already.
    broken: HashSet<Range<usize>>,
    /// Whether syntax errors hide a part of the file.
    lost: bool,
}

/// Byte offset and message.
pub(super) type Finding = (usize, String);

/// The first findings of a file, without those that are there twice, and how many more there are.
#[derive(Default)]
struct First {
    findings: BTreeSet<Finding>,
    more: usize,
}

impl First {
    fn add(&mut self, finding: Finding) {
        self.findings.insert(finding);
        if self.findings.len() > MOST_MISTAKES {
            self.findings.pop_last();
            self.more += 1;
        }
    }
}

impl Findings {
    /// Starts with the file's syntax errors.
    pub(super) fn new(mut syntax: Vec<Finding>, broken: HashSet<Range<usize>>, lost: bool) -> Self {
        // One error that the TOML parser meets twice is one mistake.
        syntax.sort();
        syntax.dedup();
        let mut first = First::default();
        syntax.into_iter().for_each(|finding| first.add(finding));
        Self { mistakes: RefCell::new(first), broken, lost, ..Self::default() }
    }

    /// Something is there that must not be.
    pub(super) fn mistake(&self, at: usize, message: String) {
        self.mistakes.borrow_mut().add((at, message));
    }

    /// Something is not there that must be.
    ///
    /// Not reported when it may be in a part of the file that could not be read.
    pub(super) fn missing(&self, at: usize, message: String) {
        if !self.lost {
            self.mistake(at, message);
        }
    }

    /// Something is allowed, but hardly meant.
    pub(super) fn warning(&self, at: usize, message: String) {
        self.warnings.borrow_mut().add((at, message));
    }

    /// Whether a syntax error made the value at `span` unreadable.
    pub(super) fn is_broken(&self, span: &Range<usize>) -> bool {
        self.broken.contains(span)
    }

    /// The warnings of a file without mistakes, or the mistakes.
    pub(super) fn finish(self, places: &Places<'_>) -> Result<Vec<Mistake>, Report> {
        let placed = |findings: BTreeSet<Finding>| {
            findings.into_iter().map(|(at, message)| places.mistake(at, message)).collect()
        };
        let First { findings, more } = self.mistakes.into_inner();
        if findings.is_empty() {
            return Ok(placed(self.warnings.into_inner().findings));
        }
        Err(Report { mistakes: placed(findings), more })
    }
}
