//! Typed reading of a TOML tree that goes on after a mistake.
//!
//! A caller that gets no value from here does not report it: the mistake is reported already.

use std::fmt::Display;

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use crate::config::report::Findings;

/// A value, and the byte where it begins.
#[derive(Clone, Debug)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) at: usize,
}

/// What a key holds.
#[derive(Clone, Debug)]
pub(super) enum Field<T> {
    /// The key is not there.
    Absent,
    /// It is there, but wrong or misspelt; reported.
    Bad,
    /// It is there.
    Good(At<T>),
}

impl<T> Field<T> {
    /// The value, `default` if there is none, nothing if it is bad.
    pub(super) fn or(self, default: T) -> Option<T> {
        match self {
            Self::Absent => Some(default),
            Self::Bad => None,
            Self::Good(found) => Some(found.value),
        }
    }

    /// The value if there is one, nothing if it is bad.
    pub(super) fn optional(self) -> Option<Option<T>> {
        match self {
            Self::Absent => Some(None),
            Self::Bad => None,
            Self::Good(found) => Some(Some(found.value)),
        }
    }

    /// The value, if it is there and right.
    pub(super) fn good(&self) -> Option<&At<T>> {
        match self {
            Self::Good(found) => Some(found),
            _ => None,
        }
    }

    pub(super) fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }
}

/// The items of an array.
#[derive(Clone, Debug)]
pub(super) struct List<T> {
    /// Those that are right.
    pub(super) items: Vec<At<T>>,
    /// Whether none was wrong.
    pub(super) complete: bool,
}

/// Why a value is refused: the rest of the sentence "'key' is VALUE".
pub(super) struct Wrong {
    /// What is wrong with the value, if that needs saying; begins after a comma.
    pub(super) aside: Option<String>,
    /// What to write instead.
    pub(super) write: String,
}

impl Wrong {
    pub(super) fn write(write: impl Into<String>) -> Self {
        Self { aside: None, write: write.into() }
    }

    pub(super) fn because(aside: impl Into<String>, write: impl Into<String>) -> Self {
        Self { aside: Some(aside.into()), write: write.into() }
    }
}

/// The keys of a kind of table.
pub(super) struct Keys {
    pub(super) known: &'static [&'static str],
    /// Refused until they do something, each with what it is for.
    pub(super) later: &'static [(&'static str, &'static str)],
}

/// A table of the file.
pub(super) struct Table<'a> {
    /// What messages call it.
    pub(super) label: String,
    /// Where it begins.
    pub(super) at: usize,
    pub(super) findings: &'a Findings,
    entries: &'a DeTable<'a>,
    /// Keys that are there under a misspelt name.
    misspelt: Vec<&'static str>,
}

/// A table that has not been read yet.
#[derive(Clone, Copy)]
pub(super) struct Raw<'a> {
    pub(super) entries: &'a DeTable<'a>,
    pub(super) at: usize,
    findings: &'a Findings,
}

impl<'a> Raw<'a> {
    pub(super) fn new(entries: &'a DeTable<'a>, at: usize, findings: &'a Findings) -> Self {
        Self { entries, at, findings }
    }

    /// The value of `key`, to name the table by; nothing is reported.
    pub(super) fn peek(&self, key: &str) -> Option<&'a DeValue<'a>> {
        let value = self.entries.get(key)?;
        (!self.findings.is_broken(&value.span())).then_some(value.get_ref())
    }

    /// `noun 'name'`, or `noun #number` if it has no name to go by.
    pub(super) fn label(&self, noun: &str, number: usize) -> String {
        match self.peek("name") {
            Some(DeValue::String(name)) => format!("{noun} '{}'", name.escape_debug()),
            _ => format!("{noun} #{number}"),
        }
    }

    /// Refuses the keys that are not among `keys`.
    pub(super) fn open(self, label: String, keys: &Keys) -> Table<'a> {
        let Self { entries, at, findings } = self;
        let mut table = Table { label, at, findings, entries, misspelt: Vec::new() };
        for key in entries.keys() {
            let (at, name) = (key.span().start, key.get_ref().as_ref());
            if let Some((_, what)) = keys.later.iter().find(|(later, _)| *later == name) {
                let message = format!("'{name}' ({what}) is not supported yet; remove it");
                table.mistake(at, message);
            } else if !keys.known.contains(&name) {
                let advice = match nearest(name, keys) {
                    Some(known) => {
                        table.misspelt.push(known);
                        format!("did you mean '{known}'?")
                    }
                    None => format!("write one of {}", list(keys.known)),
                };
                table.mistake(at, format!("unknown key '{}'; {advice}", name.escape_debug()));
            }
        }
        table
    }
}

impl<'a> Table<'a> {
    /// Reports at `at`, in this table's name.
    pub(super) fn mistake(&self, at: usize, message: impl Display) {
        self.findings.mistake(at, self.says(message));
    }

    /// Reports a warning at `at`: a value that is allowed, and probably not meant.
    pub(super) fn warning(&self, at: usize, message: impl Display) {
        self.findings.warning(at, self.says(message));
    }

    /// Reports that something must be in this table and is not.
    pub(super) fn missing(&self, message: impl Display) {
        self.findings.missing(self.at, self.says(message));
    }

    fn says(&self, message: impl Display) -> String {
        if self.label.is_empty() {
            message.to_string()
        } else {
            format!("{}: {message}", self.label)
        }
    }

    /// What is written at `key`, or what the field is without a look at it.
    fn entry<T>(&self, key: &str) -> Result<&'a Spanned<DeValue<'a>>, Field<T>> {
        match self.entries.get(key) {
            Some(value) if self.findings.is_broken(&value.span()) => Err(Field::Bad),
            Some(value) => Ok(value),
            None if self.misspelt.contains(&key) => Err(Field::Bad),
            None => Err(Field::Absent),
        }
    }

    /// Where `key` is written, if it is.
    pub(super) fn key_at(&self, key: &str) -> Option<usize> {
        self.entries.get_key_value(key).map(|(key, _)| key.span().start)
    }

    /// Reads `key` with `read`.
    pub(super) fn field<T>(
        &self,
        key: &str,
        read: impl FnOnce(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> Field<T> {
        match self.entry(key) {
            Ok(value) => self.value(key, value, read).map_or(Field::Bad, Field::Good),
            Err(field) => field,
        }
    }

    /// Reads `key`, which must be there; `example` is what to write if it is not.
    pub(super) fn required<T>(
        &self,
        key: &str,
        example: &str,
        read: impl FnOnce(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> Option<At<T>> {
        match self.field(key, read) {
            Field::Absent => {
                self.report_absent(key, example);
                None
            }
            Field::Bad => None,
            Field::Good(found) => Some(found),
        }
    }

    /// Reports that `key` is not there.
    pub(super) fn report_absent(&self, key: &str, example: &str) {
        self.missing(format_args!("'{key}' is missing; write {example}"));
    }

    /// Reads the array at `key`, each item with `read`.
    pub(super) fn list<T>(
        &self,
        key: &str,
        example: &str,
        read: impl Fn(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> Field<List<T>> {
        let value = match self.entry(key) {
            Ok(value) => value,
            Err(field) => return field,
        };
        match value.get_ref() {
            DeValue::Array(array) => {
                let items: Vec<_> =
                    array.iter().filter_map(|item| self.value(key, item, &read)).collect();
                let complete = items.len() == array.len();
                Field::Good(At { value: List { items, complete }, at: value.span().start })
            }
            _ => {
                self.value::<()>(key, value, |_| {
                    Err(Wrong::write(format!("an array, such as {example}")))
                });
                Field::Bad
            }
        }
    }

    /// Like [`list`](Self::list); a single item needs no brackets.
    pub(super) fn one_or_list<T>(
        &self,
        key: &str,
        read: impl Fn(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> Field<List<T>> {
        match self.entries.get(key).map(Spanned::get_ref) {
            Some(DeValue::Array(_)) => self.list(key, "", read),
            _ => match self.field(key, read) {
                Field::Absent => Field::Absent,
                Field::Bad => Field::Bad,
                Field::Good(found) => {
                    let at = found.at;
                    Field::Good(At { value: List { items: vec![found], complete: true }, at })
                }
            },
        }
    }

    /// The table at `key`; `header` is how to write one.
    pub(super) fn table(&self, key: &str, header: &str) -> Field<Raw<'a>> {
        let value = match self.entry(key) {
            Ok(value) => value,
            Err(field) => return field,
        };
        self.raw(key, value, header).map_or(Field::Bad, Field::Good)
    }

    /// The tables at `key`; `header` is how to write one. Bad if one of them is no table.
    pub(super) fn tables(&self, key: &str, header: &str) -> Field<Vec<Raw<'a>>> {
        let value = match self.entry(key) {
            Ok(value) => value,
            Err(field) => return field,
        };
        let tables = match value.get_ref() {
            DeValue::Array(array) => {
                array.iter().map(|item| Some(self.raw(key, item, header)?.value)).collect()
            }
            _ => {
                self.value::<()>(key, value, |_| Err(Wrong::write(header)));
                None
            }
        };
        tables
            .map_or(Field::Bad, |tables| Field::Good(At { value: tables, at: value.span().start }))
    }

    fn raw(&self, key: &str, value: &'a Spanned<DeValue<'a>>, header: &str) -> Option<At<Raw<'a>>> {
        match value.get_ref() {
            DeValue::Table(entries) => {
                let at = value.span().start;
                Some(At { value: Raw::new(entries, at, self.findings), at })
            }
            _ => {
                self.value::<()>(key, value, |_| Err(Wrong::write(header)));
                None
            }
        }
    }

    fn value<T>(
        &self,
        key: &str,
        value: &Spanned<DeValue<'_>>,
        read: impl FnOnce(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> Option<At<T>> {
        let span = value.span();
        if self.findings.is_broken(&span) {
            return None;
        }
        match read(value.get_ref()) {
            Ok(value) => Some(At { value, at: span.start }),
            Err(Wrong { aside, write }) => {
                let aside = aside.map(|aside| format!(", {aside}")).unwrap_or_default();
                let found = found(value.get_ref());
                self.mistake(span.start, format_args!("'{key}' is {found}{aside}; write {write}"));
                None
            }
        }
    }
}

/// A value as a message quotes it.
fn found(value: &DeValue<'_>) -> String {
    const LONGEST: usize = 60;
    match value {
        DeValue::String(text) if text.chars().count() > LONGEST => {
            format!("{:?}...", text.chars().take(LONGEST).collect::<String>())
        }
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(truth) => truth.to_string(),
        DeValue::Datetime(time) => format!("the date {time}"),
        DeValue::Array(_) => "an array".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}

fn nearest(name: &str, keys: &Keys) -> Option<&'static str> {
    let later = keys.later.iter().map(|(key, _)| key);
    keys.known
        .iter()
        .chain(later)
        // Cheap, and true of most keys: a file may have very many that are wrong.
        .filter(|key| name.len().abs_diff(key.len()) <= most_typos(key))
        .map(|&key| (strsim::damerau_levenshtein(name, key), key))
        .filter(|&(distance, key)| distance <= most_typos(key))
        .min()
        .map(|(_, key)| key)
}

/// How many slips a misspelt key has at most.
fn most_typos(key: &str) -> usize {
    key.len().max(3) / 3
}

/// `a, b or c`, each as given.
pub(super) fn list<T: AsRef<str>>(words: &[T]) -> String {
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => words.concat(),
    }
}
