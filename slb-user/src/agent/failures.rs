//! What went wrong and is tried again: told once in the log, and shown in the status until it is over.

use std::{collections::BTreeMap, error::Error};

use tracing::{error, info};

use crate::causes::causes;

/// By what was tried.
#[derive(Debug, Default)]
pub(super) struct Failures(BTreeMap<&'static str, String>);

impl Failures {
    /// Takes down how an attempt at `what` has ended.
    pub fn note<E: Error + 'static>(&mut self, what: &'static str, result: Result<(), E>) {
        let Err(error) = result else {
            if self.0.remove(what).is_some() {
                info!("{what}: all right again");
            }
            return;
        };
        let text = causes(&error);
        if self.0.get(what) != Some(&text) {
            error!("{what}: {text}; trying again");
        }
        self.0.insert(what, text);
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn texts(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|(what, text)| format!("{what}: {text}"))
    }
}
