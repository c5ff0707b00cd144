//! The file as it was last read: a large one takes a tenth of a second to parse, and a command that changes one
//! weight in it is not to wait for that.

use std::{
    fmt::Display,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use super::staged::{Opened, Staged};
use crate::{
    api::Refusal,
    config::{self, Config, Edit, Mistake},
};

/// A configuration, and the warnings about its file.
pub(super) type Parsed = (Config, Vec<Mistake>);

/// The last text that was read, and what it says.
#[derive(Clone, Debug, Default)]
pub(super) struct Known(Arc<Mutex<Option<Text>>>);

#[derive(Debug)]
struct Text {
    text: String,
    parsed: Parsed,
}

impl Known {
    /// Reads the file at `path`.
    pub fn read(&self, path: &Path) -> Result<Parsed, Refusal> {
        let text = config::read(path).map_err(invalid)?;
        let known = match self.take(&text) {
            Some(known) => known,
            None => Text { parsed: config::parse(path, &text).map_err(invalid)?, text },
        };
        let parsed = known.parsed.clone();
        self.put(known);
        Ok(parsed)
    }

    /// The file as it will be, written beside it; not if it stays as it is.
    pub fn edited(&self, path: &Path, edit: &Edit) -> Result<(Parsed, Option<Staged>), Refusal> {
        let file = Opened::read(path).map_err(invalid)?;
        let before = self.take(&file.text).map(|known| known.parsed);
        let text = edit.apply(&file.text).map_err(invalid)?;
        // Warnings name lines, which may be others by now.
        let quick = before
            .filter(|(_, warnings)| warnings.is_empty())
            .and_then(|(config, warnings)| Some((config.edited(edit)?, warnings)));
        let parsed = match quick {
            Some(parsed) => parsed,
            None => match config::parse(path, &text) {
                Ok(parsed) => parsed,
                // What was wrong with it before, by the lines that it has.
                Err(error) => {
                    config::parse(path, &file.text).map_err(invalid)?;
                    return Err(invalid(error));
                }
            },
        };
        let staged = if text == file.text {
            None
        } else {
            let staged = file.stage(&text).map_err(|error| super::reload::unwritable(path, &error));
            Some(staged?)
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

fn invalid(error: impl Display) -> Refusal {
    Refusal::Invalid(error.to_string())
}
