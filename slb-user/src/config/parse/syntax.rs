//! Every syntax error of a text, not only the first.
//!
//! The TOML parser recovers from a bad value, but gives up the rest of the file after a bad line.
//! So a bad line is blanked out, and the rest parsed again; every offset stays what it was.

use std::ops::Range;

use toml::{
    Spanned,
    de::{DeTable, DeValue, Error},
};

use crate::config::report::Finding;

/// After this many blanked lines the rest of the file is not read: it is hardly TOML at all.
const MAX_ROUNDS: usize = 32;

/// A text that the TOML parser reads to its end, and what it took to get there.
pub(super) struct Readable {
    /// The text; unreadable lines are blank.
    pub(super) text: String,
    /// The syntax errors of the original.
    pub(super) errors: Vec<Finding>,
    /// Values that a syntax error made unreadable.
    pub(super) broken: Vec<Range<usize>>,
    /// Whether lines were blanked.
    pub(super) lost: bool,
}

/// Finds every syntax error of `text`, and blanks what cannot be read.
pub(super) fn readable(text: &str) -> Readable {
    let mut readable =
        Readable { text: text.to_owned(), errors: Vec::new(), broken: Vec::new(), lost: false };
    for round in 0..=MAX_ROUNDS {
        let (table, errors) = DeTable::parse_recoverable(&readable.text);
        let mut values = Vec::new();
        collect(table.get_ref(), text, &mut values);
        let (contained, hiding) = judge(text, &errors, &values);

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
        blank(&mut readable.text, if round < MAX_ROUNDS { hiding.lines } else { 0..text.len() });
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
fn judge(text: &str, errors: &[Error], values: &[Value]) -> (Vec<Contained>, Option<Hiding>) {
    let mut contained = Vec::new();
    let mut hiding: Option<Hiding> = None;
    for error in errors {
        let span = error.span().unwrap_or_default();
        let at = span.start.min(text.len());
        let line = line_of(text, at);
        let around = values.iter().find(|value| value.holds(at));
        let scalar = values.iter().find(|value| value.is_the_place_of(at, span.is_empty()));
        let found = match (around, scalar) {
            (Some(Value { span, kind: Kind::Brackets { open, close } }), _)
                if !text[span.clone()].ends_with(*close) =>
            {
                // It takes the lines below with it: they are read again without it.
                let message = format!("not valid TOML: '{open}' is never closed; write '{close}'");
                let first = line_of(text, span.start);
                // Nested or not, a line that begins with a bracket was hardly meant as an item.
                let header = lines_from(text, first.end).find(|line| {
                    line.start <= at && text[line.clone()].trim_start().starts_with('[')
                });
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
                let message = invalid(error, &text[value.span.clone()], write);
                let at = value.span.start;
                let value = around.unwrap_or(value).span.clone();
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

/// A value that stands in one place of the text.
struct Value {
    span: Range<usize>,
    kind: Kind,
}

enum Kind {
    Scalar,
    /// An array or inline table that no other one holds.
    Brackets {
        open: char,
        close: char,
    },
}

impl Value {
    /// Whether these are brackets around `at`.
    fn holds(&self, at: usize) -> bool {
        !matches!(self.kind, Kind::Scalar) && self.span.start < at && at <= self.span.end
    }

    /// Whether this is a scalar, and an error at `at` is about it.
    fn is_the_place_of(&self, at: usize, error_is_empty: bool) -> bool {
        // An empty error at the beginning is about what should be in front of it.
        let start = self.span.start + usize::from(error_is_empty);
        matches!(self.kind, Kind::Scalar) && (start..=self.span.end).contains(&at)
    }
}

fn collect(table: &DeTable<'_>, text: &str, values: &mut Vec<Value>) {
    table.values().for_each(|value| collect_value(value, text, values));
}

fn collect_value(value: &Spanned<DeValue<'_>>, text: &str, values: &mut Vec<Value>) {
    let span = value.span();
    let is_held = || values.iter().any(|value| value.holds(span.start));
    match value.get_ref() {
        DeValue::Table(_) | DeValue::Array(_) if is_inline(text, &span) && !is_held() => {
            let (open, close) =
                if text[span.clone()].starts_with('[') { ('[', ']') } else { ('{', '}') };
            values.push(Value { span, kind: Kind::Brackets { open, close } });
        }
        // What the parser makes up for a value that is not there at all is empty.
        DeValue::Table(_) | DeValue::Array(_) => {}
        _ if span.is_empty() => {}
        _ => values.push(Value { span, kind: Kind::Scalar }),
    }
    match value.get_ref() {
        DeValue::Table(table) => collect(table, text, values),
        DeValue::Array(array) => array.iter().for_each(|item| collect_value(item, text, values)),
        _ => {}
    }
}

/// Whether the table or array at `span` is written between brackets, rather than below headers.
fn is_inline(text: &str, span: &Range<usize>) -> bool {
    const BYTE_ORDER_MARK: char = '\u{feff}';
    let before = text[..span.start].trim_end_matches([' ', '\t', BYTE_ORDER_MARK]);
    text[span.clone()].starts_with(['[', '{']) && !before.is_empty() && !before.ends_with('\n')
}

/// `at` is within the line or at its end; the line break is part of the line.
fn line_of(text: &str, at: usize) -> Range<usize> {
    let at = text.floor_char_boundary(at);
    let start = text[..at].rfind('\n').map_or(0, |found| found + 1);
    let end = text[at..].find('\n').map_or(text.len(), |found| at + found + 1);
    start..end
}

/// The lines from the one that begins at `start`.
fn lines_from(text: &str, start: usize) -> impl Iterator<Item = Range<usize>> {
    let line = move |at: usize| (at < text.len()).then(|| line_of(text, at));
    std::iter::successors(line(start), move |previous| line(previous.end))
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
    let found = printable(found.trim().lines().next().unwrap_or_default());
    format!("not valid TOML: {}, found '{found}'; write {write}", error.message())
}

/// `text` on one line, and harmless to a terminal.
fn printable(text: &str) -> String {
    let escaped =
        |c: char| if c.is_control() { c.escape_debug().to_string() } else { c.to_string() };
    text.chars().map(escaped).collect()
}
