//! The configuration as it was last read: a large one takes a tenth of a second to parse, and a command that changes one
//! weight in it must not wait for that.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    api::Refusal,
    config::{
        self, Config, Edit, Mistake,
        source::{ConfigSource, Document, ReplaceError, Revision},
    },
};

/// A configuration, and the warnings about its text.
pub(super) type Parsed = (Config, Vec<Mistake>);

/// A text that an edit has made, and the revision that it was made from.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Replacement {
    base: Revision,
    text: String,
}

impl Replacement {
    /// Replaces the text of `source`.
    pub(super) fn commit(
        &self,
        source: &dyn ConfigSource,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<(), ReplaceError> {
        source.replace(self.base, &self.text, is_wanted)
    }
}

/// The last text that was read, and its meaning.
#[derive(Clone, Debug, Default)]
pub(super) struct ConfigCache(Arc<Mutex<Option<Entry>>>);

#[derive(Debug)]
struct Entry {
    text: String,
    parsed: Parsed,
}

impl ConfigCache {
    /// Reads the configuration.
    pub(super) fn read(&self, source: &dyn ConfigSource) -> Result<Parsed, Refusal> {
        let text = source.read()?.text;
        let entry = match self.take(&text) {
            Some(entry) => entry,
            None => Entry { parsed: parse(source.path(), &text)?, text },
        };
        let parsed = entry.parsed.clone();
        self.put(entry);
        Ok(parsed)
    }

    /// The configuration after an edit, and the text to write; `None`: the text stays as it is.
    pub(super) fn edited(
        &self,
        source: &dyn ConfigSource,
        edit: &Edit,
    ) -> Result<(Parsed, Option<Replacement>), Refusal> {
        let Document { text: before, revision: base } = source.read()?;
        let cached = self.take(&before).map(|entry| entry.parsed);
        let text = config::apply(edit, &before)?;
        // Warnings name lines, which an edit moves.
        let quick = cached
            .filter(|(_, warnings)| warnings.is_empty())
            .and_then(|(config, warnings)| Some((config.edited(edit)?, warnings)));
        let parsed = match quick {
            Some(parsed) => parsed,
            None => match parse(source.path(), &text) {
                Ok(parsed) => parsed,
                // Mistakes that were there before the edit are reported by the lines that the file has now.
                Err(error) => {
                    parse(source.path(), &before)?;
                    return Err(error);
                }
            },
        };
        let replacement = (text != before).then(|| Replacement { base, text: text.clone() });
        self.put(Entry { text, parsed: parsed.clone() });
        Ok((parsed, replacement))
    }

    /// The parsed text, if the text is still this one.
    fn take(&self, text: &str) -> Option<Entry> {
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cached.take().filter(|entry| entry.text == text)
    }

    fn put(&self, entry: Entry) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(entry);
    }
}

fn parse(path: &Path, text: &str) -> Result<Parsed, Refusal> {
    config::parse(path, text).map_err(|report| Refusal::File(config::LoadError::Invalid(report)))
}
