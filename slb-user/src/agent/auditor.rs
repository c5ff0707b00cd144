//! Compares the datapath with what the agent has set up, and puts right what others have changed.
//!
//! A thread reads the maps, one after the other. The loop compares one at a time, so that a failed backend never waits
//! for more than one of them.

use std::sync::Arc;

use slb_api::{EventKind, Problem, ProblemName, Repairs};
use tokio::sync::mpsc;
use tracing::warn;

use super::{Agent, AgentError, Lock};
use crate::datapath::{LoadError, Loaded, MapContents, Restored, TableError};

/// How many pins are named.
const NAMED: usize = 3;

/// A part of a round.
pub(super) enum AuditReport {
    /// What a map holds.
    Map(MapContents),
    /// That was all, or the maps cannot be read.
    End(Result<(), TableError>),
}

/// Has the maps read, and knows what was put right.
pub(super) struct Auditor {
    parts: mpsc::Sender<AuditReport>,
    is_busy: bool,
    /// The first error of this round.
    error: Option<LoadError>,
    /// Found in this round.
    found: Vec<Problem>,
    /// Found in the last round.
    before: Vec<Problem>,
    /// Since the agent started.
    pub repairs: Repairs,
}

impl Auditor {
    /// What is read goes to `parts`.
    pub(super) fn new(parts: mpsc::Sender<AuditReport>) -> Self {
        Self {
            parts,
            is_busy: false,
            error: None,
            found: Vec::new(),
            before: Vec::new(),
            repairs: Repairs::default(),
        }
    }

    /// Begins a round.
    fn begin(&mut self, datapath: &Loaded) {
        self.is_busy = true;
        let (kept, large) = (Arc::clone(&datapath.kept), datapath.maps.large());
        let parts = self.parts.clone();
        tokio::task::spawn_blocking(move || {
            let read =
                kept.read(&large, |found| parts.blocking_send(AuditReport::Map(found)).is_ok());
            // The agent may have ended.
            let _ = parts.blocking_send(AuditReport::End(read));
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
        let has_pins = self.attempt(ProblemName::PinsNotKept, Self::restore_pins);
        if self.auditor.is_busy {
            return;
        }
        // Without pins the loader makes other maps.
        if has_pins && let Err(error) = self.restore_programs() {
            self.auditor.error = Some(error);
        }
        self.auditor.begin(&self.datapath);
    }

    /// Pins again what the agent holds, where the pin is gone.
    fn restore_pins(&mut self) -> Result<(), AgentError> {
        let Restored { pins, is_new } = self.datapath.restore_pins()?;
        if is_new {
            // The lock was on the directory that was removed.
            self.pins_lock = Lock::of_directory(&self.config.gateway.pins)?;
        }
        if pins.is_empty() {
            return Ok(());
        }
        self.auditor.repairs.pins += pins.len() as u64;
        let named = pins.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
        let more = match pins.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let text = format!("removed by another program, and pinned again: {named}{more}");
        self.repaired(ProblemName::PinsRemoved, None, text);
        Ok(())
    }

    fn restore_programs(&mut self) -> Result<(), LoadError> {
        let map = "SLB_PROGRAMS";
        if !self.datapath.has_other_programs()? {
            return Ok(());
        }
        let text = format!("changed by another program; all programs are loaded again: {map}");
        self.repaired(ProblemName::MapsChanged, Some(map), text);
        // Loading takes a while.
        self.publish();
        self.datapath.restore_programs()?;
        self.auditor.repairs.maps += 1;
        Ok(())
    }

    /// Attaches XDP again where another program has detached it. Says whether there was such an interface.
    pub(super) fn attach_detached(&mut self) -> bool {
        let detached = self.datapath.take_detached();
        for name in &detached {
            // What the network told of was the agent's own program.
            let interfaces = self.network.interfaces.iter_mut();
            let present = interfaces.filter(|(interface, _)| interface.name == *name);
            present.for_each(|(_, present)| *present = None);
        }
        if detached.is_empty() {
            return false;
        }
        let is_done = self.attempt(ProblemName::XdpNotAttached, Self::attach);
        // The mode may be another one.
        self.attempt(ProblemName::SettingsNotWritten, Self::set);
        self.reconcile();
        for name in &detached {
            self.auditor.repairs.links += u64::from(is_done);
            let end = if is_done { "is attached again" } else { "cannot be attached yet" };
            let text = format!("{name}: another program has detached XDP, which {end}");
            self.repaired(ProblemName::XdpDetached, Some(name), text);
        }
        true
    }

    /// Puts right what others have changed in a map.
    pub(super) fn audited(&mut self, part: AuditReport) {
        match part {
            AuditReport::Map(found) => match self.datapath.maps.audit(found) {
                Ok(Some(drift)) => {
                    self.auditor.repairs.maps += drift.count as u64;
                    let text = format!("changed by another program, and written again: {drift}");
                    self.repaired(ProblemName::MapsChanged, Some(drift.map), text);
                }
                Ok(None) => {}
                Err(error) => drop(self.auditor.error.get_or_insert(error.into())),
            },
            AuditReport::End(read) => {
                let auditor = &mut self.auditor;
                let result = auditor.error.take().map_or(read.map_err(LoadError::from), Err);
                auditor.before = std::mem::take(&mut auditor.found);
                auditor.is_busy = false;
                self.failures.note(ProblemName::DatapathNotAudited, result);
            }
        }
    }

    /// Tells of something that was put right.
    fn repaired(&mut self, name: ProblemName, subject: Option<&str>, text: String) {
        warn!("{text}");
        self.events.note(EventKind::Datapath, text.clone());
        let subject = subject.map(str::to_owned);
        let problem = Problem { subject, ..Problem::new(name, text) };
        self.auditor.found.retain(|known| !is_same(known, &problem));
        self.auditor.found.push(problem);
    }
}
