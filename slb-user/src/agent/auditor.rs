//! Compares the datapath with what the agent has set up, and puts right what others have changed.
//!
//! A thread reads the maps, one after the other. The loop compares one at a time, so that a failed backend never waits
//! for more than one of them.

use std::sync::Arc;

use slb_api::{EventKind, Problem, ProblemName, Repairs};
use tokio::sync::mpsc;
use tracing::warn;

use super::Agent;
use crate::datapath::{Found, Loaded, TableError};

/// A part of a round.
pub(super) enum Audited {
    /// What a map holds.
    Map(Found),
    /// That was all, or the maps cannot be read.
    End(Result<(), TableError>),
}

/// Has the maps read, and knows what was put right.
pub(super) struct Auditor {
    parts: mpsc::Sender<Audited>,
    is_busy: bool,
    /// The first error of this round.
    error: Option<TableError>,
    /// Found in this round.
    found: Vec<Problem>,
    /// Found in the last round.
    before: Vec<Problem>,
    /// Since the agent started.
    pub repairs: Repairs,
}

impl Auditor {
    /// What is read goes to `parts`.
    pub(super) fn new(parts: mpsc::Sender<Audited>) -> Self {
        Self {
            parts,
            is_busy: false,
            error: None,
            found: Vec::new(),
            before: Vec::new(),
            repairs: Repairs::default(),
        }
    }

    /// Begins a round, unless one is under way.
    fn begin(&mut self, datapath: &Loaded) {
        if self.is_busy {
            return;
        }
        self.is_busy = true;
        let (kept, large) = (Arc::clone(&datapath.kept), datapath.maps.large());
        let parts = self.parts.clone();
        tokio::task::spawn_blocking(move || {
            let read = kept.read(&large, |found| parts.blocking_send(Audited::Map(found)).is_ok());
            // The agent may have ended.
            let _ = parts.blocking_send(Audited::End(read));
        });
    }

    /// What was put right. It stays a problem until a whole round has found nothing, so that it can be seen.
    pub(super) fn problems(&self) -> impl Iterator<Item = Problem> {
        let again = |problem: &&Problem| !self.found.iter().any(|it| is_same(it, problem));
        self.found.iter().chain(self.before.iter().filter(again)).cloned()
    }
}

/// Whether two problems are about the same thing.
fn is_same(one: &Problem, other: &Problem) -> bool {
    (one.name, &one.subject) == (other.name, &other.subject)
}

impl Agent {
    /// Begins to compare the datapath with what the agent has set up.
    pub(super) fn audit(&mut self) {
        self.auditor.begin(&self.datapath);
    }

    /// Puts right what others have changed in a map.
    pub(super) fn audited(&mut self, part: Audited) {
        match part {
            Audited::Map(found) => match self.datapath.maps.audit(found) {
                Ok(Some(drift)) => {
                    self.auditor.repairs.maps += drift.count as u64;
                    let text = format!("changed by another program, and written again: {drift}");
                    self.repaired(ProblemName::MapsChanged, drift.map, text);
                }
                Ok(None) => {}
                Err(error) => drop(self.auditor.error.get_or_insert(error)),
            },
            Audited::End(read) => {
                let auditor = &mut self.auditor;
                let result = auditor.error.take().map_or(read, Err);
                auditor.before = std::mem::take(&mut auditor.found);
                auditor.is_busy = false;
                self.failures.note(ProblemName::DatapathNotAudited, result);
            }
        }
    }

    /// Tells of something that was put right.
    pub(super) fn repaired(&mut self, name: ProblemName, subject: &str, text: String) {
        warn!(subject, "{text}");
        self.events.note(EventKind::Datapath, text.clone());
        let problem = Problem::new(name, text).of(subject);
        self.auditor.found.retain(|known| !is_same(known, &problem));
        self.auditor.found.push(problem);
    }
}
