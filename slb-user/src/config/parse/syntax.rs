//! Every syntax error of a text, not only the first.
//!
//! The TOML parser recovers from a bad value, but gives up the rest of the file after a bad line.
//! So a bad line is blanked out, and the rest parsed again; every offset stays what it was.

use std::{collections::HashSet, ops::Range};

use toml::{
    Spanned,
    de::{DeTable, DeValue, Error},
};

use crate::{config::report::Finding, printable::Printable};

/// After this many blanked lines the rest of the file is not read: it is hardly TOML at all.
const MAX_ROUNDS: usize = 32;
/// Bytes that are parsed at most for that: each round parses the whole text. A larger text has two rounds all the same.
const MAX_PARSED: usize = 16 << 20;
/// Characters of the text that a message quotes.
const LONGEST_QUOTE: usize = 60;

/// A text that the TOML parser reads to its end, and what it took to get there.
pub(super) struct Readable {
    /// The text; unreadable lines are blank.
    pub(super) text: String,
    /// The syntax errors of the original.
    pub(super) errors: Vec<Finding>,
    /// Values that a syntax error made unreadable.
    pub(super) broken: HashSet<Range<usize>>,
    /// Whether lines were blanked.
    pub(super) lost: bool,
}

/// What the TOML parser makes of a text.
type Parsed<'a> = (Spanned<DeTable<'a>>, Vec<Error>);

/// Finds every syntax error of `text`, which was parsed into `first`, and blanks what cannot be read.
pub(super) fn readable(text: &str, first: Parsed<'_>) -> Readable {
    let mut readable =
        Readable { text: text.to_owned(), errors: Vec::new(), broken: HashSet::new(), lost: false };
    let lines = Lines::of(text);
    let rounds = (MAX_PARSED / text.len().max(1)).clamp(1, MAX_ROUNDS);
    let mut first = Some(first);
    for round in 0..=rounds {
        let parsed = first.take().unwrap_or_else(|| DeTable::parse_recoverable(&readable.text));
        let (table, errors) = parsed;
        let values = Values::of(table.get_ref(), text);
        let (contained, hiding) = judge(text, &lines, &errors, &values);

        let Some(hiding) = hiding else {
            for Contained { message, at, value } in contained {
                // What is wrong first explains what else is wrong with a value.
                let is_known = value.as_ref().is_some_and(|value| readable.broken.contains(value));
                if !is_known {
                    readable.errors.push((at, message));
                    // Text without its closing quotes takes the lines below with it.
                    let takes_lines = |value: &Range<usize>| text[value.clone()].contains('\n');
                    readable.lost |= value.as_ref().is_some_and(takes_lines);
                    readable.broken.extend(value);
                }
            }
            break;
        };
        readable.errors.push(hiding.finding);
        readable.lost = true;
        blank(&mut readable.text, if round < rounds { hiding.lines } else { 0..text.len() });
    }
    readable
}

/// An error that the parser gets over.
struct Contained {
    at: usize,
    message: String,
    /// What it spoils.
    value: Option<Range<usize>>,
}

/// An error that hides other lines.
struct Hiding {
    finding: Finding,
    /// What to blank, to see the others.
    lines: Range<usize>,
}

/// The errors that do no harm beyond their place, and the first of the others.
fn judge(
    text: &str,
    lines: &Lines,
    errors: &[Error],
    values: &Values,
) -> (Vec<Contained>, Option<Hiding>) {
    let mut contained = Vec::new();
    let mut hiding: Option<Hiding> = None;
    for error in errors {
        let span = error.span().unwrap_or_default();
        let at = span.start.min(text.len());
        let line = lines.at(at);
        let around = values.brackets_around(at);
        let scalar = values.scalar_at(at, span.is_empty());
        let found = match (around, scalar) {
            (Some(Brackets { span, open, close }), _) if !text[span.clone()].ends_with(*close) => {
                // It takes the lines below with it: they are read again without it.
                let message = format!("not valid TOML: '{open}' is never closed; write '{close}'");
                let first = lines.at(span.start);
                // Nested or not, a line that begins with a bracket was hardly meant as an item.
                let below = lines.from(first.end).take_while(|line| line.start <= at);
                let header =
                    { below }.find(|line| text[line.clone()].trim_start().starts_with('['));
                let end = header.map_or(line.start.max(first.end), |header| header.start);
                Hiding { finding: (span.start, message), lines: first.start..end }
            }
            _ if is_duplicate(error) => {
                let key = printable(text.get(span).unwrap_or_default());
                let message = format!("duplicate key '{key}'; write it once");
                contained.push(Contained { at, message, value: None });
                continue;
            }
            (_, Some(value)) => {
                let write = "a number, true, false, or text in double quotes";
                let message = invalid(error, &text[value.clone()], write);
                let at = value.start;
                let value = around.map_or(value, |brackets| &brackets.span).clone();
                contained.push(Contained { at, message, value: Some(value) });
                continue;
            }
            (Some(value), _) => {
                let message = invalid(error, &text[line], "one value, then ',' or the end");
                contained.push(Contained { at, message, value: Some(value.span.clone()) });
                continue;
            }
            _ if text[line.clone()].trim_start().starts_with('[') => {
                // Without its header it is not known which table the rest belongs to.
                let write = "[table] or [[table]], for nothing below it is read until then";
                let finding = (at, invalid(error, &text[line.clone()], write));
                Hiding { finding, lines: line.start..text.len() }
            }
            _ => {
                let finding = (at, invalid(error, &text[line.clone()], "key = value"));
                Hiding { finding, lines: line }
            }
        };
        if hiding.as_ref().is_none_or(|hiding| found.lines.start < hiding.lines.start) {
            hiding = Some(found);
        }
    }
    (contained, hiding)
}

/// The values of a text, in its order: an error finds its own without a look at the others.
#[derive(Default)]
struct Values {
    scalars: Vec<Range<usize>>,
    /// Arrays and inline tables that no other one holds.
    brackets: Vec<Brackets>,
}

struct Brackets {
    span: Range<usize>,
    open: char,
    close: char,
}

impl Values {
    fn of(table: &DeTable<'_>, text: &str) -> Self {
        let mut values = Self::default();
        table.values().for_each(|value| values.collect(value, text, false));
        values.scalars.sort_unstable_by_key(|span| span.start);
        values.brackets.sort_unstable_by_key(|brackets| brackets.span.start);
        values
    }

    fn collect(&mut self, value: &Spanned<DeValue<'_>>, text: &str, is_held: bool) {
        let span = value.span();
        let is_inline = |span| is_inline(text, span);
        let mut holds = is_held;
        match value.get_ref() {
            DeValue::Table(_) | DeValue::Array(_) if !is_held && is_inline(&span) => {
                let is_array = text[span.clone()].starts_with('[');
                let (open, close) = if is_array { ('[', ']') } else { ('{', '}') };
                self.brackets.push(Brackets { span, open, close });
                holds = true;
            }
            // What the parser makes up for a value that is not there at all is empty.
            DeValue::Table(_) | DeValue::Array(_) => {}
            _ if span.is_empty() => {}
            _ => self.scalars.push(span),
        }
        match value.get_ref() {
            DeValue::Table(table) => table.values().for_each(|it| self.collect(it, text, holds)),
            DeValue::Array(array) => array.iter().for_each(|it| self.collect(it, text, holds)),
            _ => {}
        }
    }

    /// The brackets around `at`.
    fn brackets_around(&self, at: usize) -> Option<&Brackets> {
        let before = self.brackets.partition_point(|brackets| brackets.span.start < at);
        self.brackets[..before].last().filter(|brackets| at <= brackets.span.end)
    }

    /// The scalar that an error at `at` is about.
    fn scalar_at(&self, at: usize, error_is_empty: bool) -> Option<&Range<usize>> {
        // An empty error at the beginning is about what should be in front of it.
        let start = |span: &Range<usize>| span.start + usize::from(error_is_empty);
        let before = self.scalars.partition_point(|span| start(span) <= at);
        // Two may touch: an error between them is about the first.
        let nearest = &self.scalars[before.saturating_sub(2)..before];
        nearest.iter().find(|span| at <= span.end)
    }
}

/// Whether the table or array at `span` is written between brackets, rather than below headers.
fn is_inline(text: &str, span: &Range<usize>) -> bool {
    const BYTE_ORDER_MARK: char = '\u{feff}';
    let before = text[..span.start].trim_end_matches([' ', '\t', BYTE_ORDER_MARK]);
    text[span.clone()].starts_with(['[', '{']) && !before.is_empty() && !before.ends_with('\n')
}

/// Where the lines of a text begin.
struct Lines {
    starts: Vec<usize>,
    /// Of the text.
    len: usize,
}

impl Lines {
    fn of(text: &str) -> Self {
        let after_breaks = text.match_indices('\n').map(|(at, _)| at + 1);
        let starts = std::iter::once(0).chain(after_breaks.filter(|&at| at < text.len())).collect();
        Self { starts, len: text.len() }
    }

    fn number(&self, index: usize) -> Range<usize> {
        self.starts[index]..self.starts.get(index + 1).copied().unwrap_or(self.len)
    }

    /// The line that has `at`, with its line break. The end of the text belongs to the last one.
    fn at(&self, at: usize) -> Range<usize> {
        self.number(self.starts.partition_point(|&start| start <= at) - 1)
    }

    /// The lines from the one that begins at `start`.
    fn from(&self, start: usize) -> impl Iterator<Item = Range<usize>> {
        let first = self.starts.partition_point(|&begin| begin < start);
        (first..self.starts.len()).map(|index| self.number(index))
    }
}

fn blank(text: &mut String, range: Range<usize>) {
    let blanked = text[range.clone()]
        .bytes()
        .map(|byte| if byte == b'\n' { '\n' } else { ' ' })
        .collect::<String>();
    text.replace_range(range, &blanked);
}

/// The TOML parser tells its errors apart by their text only.
fn is_duplicate(error: &Error) -> bool {
    error.message() == "duplicate key"
}

fn invalid(error: &Error, found: &str, write: &str) -> String {
    let found = printable(found.trim_start().lines().next().unwrap_or_default().trim_end());
    format!("not valid TOML: {}, found '{found}'; write {write}", error.message())
}

/// `text` on one line, harmless to a terminal, and not too long.
fn printable(text: &str) -> String {
    let (shown, rest) = match text.char_indices().nth(LONGEST_QUOTE) {
        Some((end, _)) => (&text[..end], "..."),
        None => (text, ""),
    };
    format!("{}{rest}", Printable(shown))
}
