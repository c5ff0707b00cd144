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
    text: Arc<String>,
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
    text: Arc<String>,
    parsed: Parsed,
}

impl ConfigCache {
    /// Reads the configuration, and shares with `in_force` the instances that are the same there.
    pub(super) fn read(
        &self,
        source: &dyn ConfigSource,
        in_force: &Config,
    ) -> Result<Parsed, Refusal> {
        let text = source.read()?.text;
        let mut entry = match self.take(&text) {
            Some(entry) => entry,
            None => Entry { parsed: parse(source.path(), &text)?, text: Arc::new(text) },
        };
        entry.parsed.0.share(in_force);
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
        let text: Arc<String> = Arc::new(config::apply(edit, &before)?);
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
        let replacement = (*text != before).then(|| Replacement { base, text: Arc::clone(&text) });
        self.put(Entry { text, parsed: parsed.clone() });
        Ok((parsed, replacement))
    }

    /// The parsed text, if the text is still this one.
    fn take(&self, text: &str) -> Option<Entry> {
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cached.take().filter(|entry| *entry.text == text)
    }

    fn put(&self, entry: Entry) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(entry);
    }
}

fn parse(path: &Path, text: &str) -> Result<Parsed, Refusal> {
    config::parse(path, text).map_err(|report| Refusal::File(config::LoadError::Invalid(report)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use slb_api::Place;

    use super::*;
    use crate::config::source::FileSource;

    const TEXT: &str = "\
[gateway]
interfaces = [\"eth0\"]

[[instance]]
name = \"shop\"
vips = [\"203.0.113.10\"]

[[instance.backend]]
name = \"web-1\"
address = \"10.0.0.1\"

[[instance.listener]]
protocol = \"tcp\"
port = 80
backend_port = 8080
";

    fn weight(weight: u32) -> Edit {
        let place = Place { instance: "shop".to_owned(), group: None, backend: "web-1".to_owned() };
        Edit::SetWeight { place, weight }
    }

    #[test]
    fn edit_replaces_the_text_it_was_made_from_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("slb.toml");
        fs::write(&path, TEXT).unwrap();
        let (source, cache) = (FileSource::new(&path), ConfigCache::default());

        let ((config, _), replacement) = cache.edited(&source, &weight(7)).unwrap();
        assert_eq!(config.instances[0].groups[0].backends[0].weight, 7);
        let replacement = replacement.unwrap();
        replacement.commit(&source, &|| true).unwrap();
        let edited = source.read().unwrap().text;
        assert!(edited.contains("weight = 7"), "{edited}");
        assert_eq!(cache.read(&source, &config).unwrap().0, config);

        let (_, same) = cache.edited(&source, &weight(7)).unwrap();
        assert_eq!(same, None, "there is nothing to write");
        let (_, late) = cache.edited(&source, &weight(8)).unwrap();
        fs::write(&path, format!("# by an editor\n{edited}")).unwrap();
        let refused = late.unwrap().commit(&source, &|| true);
        assert!(matches!(refused, Err(ReplaceError::Changed)), "{refused:?}");
        assert!(source.read().unwrap().text.contains("weight = 7"));
    }
}
