//! The file as it was last read: a large one takes a tenth of a second to parse, and a command that changes one
//! weight in it is not to wait for that.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use super::atomic_write::{AtomicWrite, Opened};
use crate::{
    api::Refusal,
    config::{self, Config, Edit, Mistake},
};

/// A configuration, and the warnings about its file.
pub(super) type Parsed = (Config, Vec<Mistake>);

/// The last text that was read, and what it says.
#[derive(Clone, Debug, Default)]
pub(super) struct ConfigCache(Arc<Mutex<Option<Text>>>);

#[derive(Debug)]
struct Text {
    text: String,
    parsed: Parsed,
}

impl ConfigCache {
    /// Reads the file at `path`.
    pub fn read(&self, path: &Path) -> Result<Parsed, Refusal> {
        let text = config::read(path)?;
        let known = match self.take(&text) {
            Some(known) => known,
            None => Text { parsed: parse(path, &text)?, text },
        };
        let parsed = known.parsed.clone();
        self.put(known);
        Ok(parsed)
    }

    /// The file as it will be, written beside it; not if it stays as it is.
    pub fn edited(
        &self,
        path: &Path,
        edit: &Edit,
    ) -> Result<(Parsed, Option<AtomicWrite>), Refusal> {
        let file = Opened::read(path)?;
        let before = self.take(&file.text).map(|known| known.parsed);
        let text = config::apply(edit, &file.text)?;
        // Warnings name lines, which may be others by now.
        let quick = before
            .filter(|(_, warnings)| warnings.is_empty())
            .and_then(|(config, warnings)| Some((config.edited(edit)?, warnings)));
        let parsed = match quick {
            Some(parsed) => parsed,
            None => match parse(path, &text) {
                Ok(parsed) => parsed,
                // What was wrong with it before, by the lines that it has.
                Err(error) => {
                    parse(path, &file.text)?;
                    return Err(error);
                }
            },
        };
        let staged = if text == file.text {
            None
        } else {
            let staged = file.stage(&text);
            Some(staged.map_err(|why| Refusal::Unwritable { path: path.to_owned(), why })?)
        };
        self.put(Text { text, parsed: parsed.clone() });
        Ok((parsed, staged))
    }

    /// The parsed file, if its text is still this one.
    fn take(&self, text: &str) -> Option<Text> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.take().filter(|known| known.text == text)
    }

    fn put(&self, text: Text) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
    }
}

fn parse(path: &Path, text: &str) -> Result<Parsed, Refusal> {
    config::parse(path, text).map_err(|report| Refusal::File(config::LoadError::Invalid(report)))
}
