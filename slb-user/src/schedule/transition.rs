//! How a schedule by hash changes without moving a flow, though no flow is remembered. Pure.
//!
//! A slot whose owner changes goes through phases, and the program keeps entries for its flows in the
//! meantime. With connections, which begin with a SYN:
//!
//! ```text
//! settled ─ another owner ─► moving: SYN to the new owner, what has no entry to the previous one; both
//!    ▲                         │     leave entries. After the idle timeout every old flow has one.
//!    └── no entry is left ── watched: entries decide, all else goes to the owner
//! ```
//!
//! Datagrams do not say whether they begin a flow. So the slot is observed first, with the old owner,
//! until every live flow has an entry; then it changes owner, and is watched. An owner that takes no
//! more flows is replaced at once.

use std::time::{Duration, Instant};

use rustc_hash::FxHashSet;
use slb_common::abi::{NO_BACKEND, SLOT_BACKEND, SLOT_KEEP, SLOT_LOOK};

use crate::state::{Chooser, Schedule};

/// Where a slot is on its way from one owner to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No flow has an entry.
    Settled,
    /// TCP: since then flows without an entry are the previous owner's.
    Moving(Instant),
    /// UDP: since then flows get entries.
    Observed(Instant),
    /// Entries may be left.
    Watched,
}

/// The slots of a schedule by hash, on their way.
#[derive(Clone, Debug)]
pub struct Transition {
    /// By which hash a slot is chosen.
    by: Chooser,
    owners: Vec<u32>,
    phases: Vec<Phase>,
    /// The owners before, as many as there were then; counts where a slot is moving.
    previous: Vec<u32>,
    /// By which hash one of those is chosen.
    previous_by: Chooser,
    /// How many slots are in no phase but settled.
    settled: usize,
    /// The first moment at which some phase may end.
    due: Option<Instant>,
}

/// What a transition depends on besides the schedule that is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Flows begin with a SYN.
    pub connections: bool,
    /// A flow without a packet for this long is over.
    pub idle: Duration,
    /// The present.
    pub now: Instant,
}

impl Transition {
    /// A schedule without flows.
    #[must_use]
    pub fn new(by: Chooser, owners: Vec<u32>) -> Self {
        Self {
            by,
            phases: vec![Phase::Settled; owners.len()],
            previous: Vec::new(),
            previous_by: by,
            settled: owners.len(),
            due: None,
            owners,
        }
    }

    /// A schedule whose flows may all have entries.
    #[must_use]
    pub fn watched(by: Chooser, owners: Vec<u32>) -> Self {
        let phases = vec![Phase::Watched; owners.len()];
        Self { phases, settled: 0, ..Self::new(by, owners) }
    }

    /// A schedule by hash as an earlier agent has left it. How long its phases have lasted it did not say.
    #[must_use]
    pub fn restored(schedule: &Schedule, terms: Terms) -> Self {
        let owners: Vec<u32> = schedule.slots.iter().map(|slot| slot & SLOT_BACKEND).collect();
        let mut restored = Self::new(schedule.by, owners);
        restored.previous_by = schedule.previous_by;
        restored.previous = schedule.previous.iter().map(|slot| slot & SLOT_BACKEND).collect();
        for (phase, slot) in restored.phases.iter_mut().zip(&schedule.slots) {
            *phase = match (slot & SLOT_LOOK != 0, slot & SLOT_KEEP != 0) {
                (false, _) => Phase::Settled,
                (true, false) => Phase::Watched,
                (true, true) if terms.connections => Phase::Moving(terms.now),
                (true, true) => Phase::Observed(terms.now),
            };
        }
        restored.tidy(terms.idle);
        restored
    }

    /// Watches the slots of owners whose flows have had entries so far, in every phase.
    pub fn watch(&mut self, owners: &FxHashSet<u32>) {
        for (owner, phase) in self.owners.iter().zip(&mut self.phases) {
            if *phase == Phase::Settled && owners.contains(owner) {
                *phase = Phase::Watched;
            }
        }
        self.settled = self.count_settled();
    }

    /// Makes for another schedule; `usable` says which owners take flows.
    pub fn aim(&mut self, by: Chooser, wanted: &[u32], usable: impl Fn(u32) -> bool, terms: Terms) {
        if wanted.len() != self.owners.len() || by != self.by {
            self.remake(by, wanted, &usable, terms);
        } else {
            for (slot, &owner) in wanted.iter().enumerate() {
                self.aim_slot(slot, owner, &usable, terms);
            }
        }
        self.tidy(terms.idle);
    }

    fn aim_slot(&mut self, slot: usize, owner: u32, usable: &impl Fn(u32) -> bool, terms: Terms) {
        let (before, phase) = (self.owners[slot], self.phases[slot]);
        if terms.connections {
            if before == owner {
                return;
            }
            let is_unowned = before == NO_BACKEND && phase == Phase::Settled;
            if !is_unowned && !matches!(phase, Phase::Moving(_)) {
                self.phases[slot] = Phase::Moving(terms.now);
                self.set_previous(slot, before);
            }
            self.owners[slot] = owner;
            return;
        }
        self.phases[slot] = match phase {
            Phase::Observed(_) if before == owner => Phase::Watched,
            Phase::Settled | Phase::Watched if before == owner => phase,
            _ if before == NO_BACKEND || !usable(before) => {
                self.owners[slot] = owner;
                if phase == Phase::Settled { Phase::Settled } else { Phase::Watched }
            }
            Phase::Observed(since) if is_over(since, terms) => {
                self.owners[slot] = owner;
                Phase::Watched
            }
            Phase::Observed(since) => Phase::Observed(since),
            _ => Phase::Observed(terms.now),
        };
    }

    /// Another number of slots, or another hash: every flow has another slot, as it were.
    fn remake(&mut self, by: Chooser, wanted: &[u32], usable: &impl Fn(u32) -> bool, terms: Terms) {
        if terms.connections {
            let moving = |slot: usize| matches!(self.phases[slot], Phase::Moving(_));
            let is_alike = self.is_previous_alike();
            let previous =
                (0..self.owners.len())
                    .map(|slot| {
                        if moving(slot) && is_alike {
                            self.previous[slot]
                        } else {
                            self.owners[slot]
                        }
                    })
                    .collect();
            (self.previous, self.previous_by) = (previous, self.by);
            (self.owners, self.by) = (wanted.to_vec(), by);
            self.phases = vec![Phase::Moving(terms.now); wanted.len()];
            return;
        }
        // The old slots are observed, and then give way to the new ones.
        let observed = self
            .phases
            .iter()
            .all(|phase| matches!(phase, Phase::Observed(since) if is_over(*since, terms)));
        if observed || self.owners.iter().all(|&owner| owner == NO_BACKEND || !usable(owner)) {
            (self.owners, self.by) = (wanted.to_vec(), by);
            self.phases = vec![Phase::Watched; wanted.len()];
            return;
        }
        for slot in 0..self.owners.len() {
            if !matches!(self.phases[slot], Phase::Observed(_)) {
                self.phases[slot] = Phase::Observed(terms.now);
            }
            if self.owners[slot] == NO_BACKEND || !usable(self.owners[slot]) {
                self.owners[slot] = wanted[slot * wanted.len() / self.owners.len()];
            }
        }
    }

    /// Whether a flow's slot of the schedule before is its slot now.
    fn is_previous_alike(&self) -> bool {
        self.previous.len() == self.owners.len() && self.previous_by == self.by
    }

    fn set_previous(&mut self, slot: usize, owner: u32) {
        if !self.is_previous_alike() {
            self.previous.clone_from(&self.owners);
            self.previous_by = self.by;
        }
        self.previous[slot] = owner;
    }

    /// Ends the phases whose time has come.
    pub fn advance(&mut self, terms: Terms) {
        let is_alike = self.is_previous_alike();
        for (slot, phase) in self.phases.iter_mut().enumerate() {
            if matches!(phase, Phase::Moving(since) if is_over(*since, terms)) {
                *phase = Phase::Watched;
                // Others may go on by the schedule before.
                if is_alike {
                    self.previous[slot] = self.owners[slot];
                }
            }
        }
        self.tidy(terms.idle);
    }

    /// Ends the watch over all slots but those in `pinned`, whose flows have entries.
    pub fn settle(&mut self, pinned: &FxHashSet<usize>) {
        for (slot, phase) in self.phases.iter_mut().enumerate() {
            if *phase == Phase::Watched && !pinned.contains(&slot) {
                *phase = Phase::Settled;
            }
        }
        self.settled = self.count_settled();
    }

    /// Derives what follows from the phases.
    fn tidy(&mut self, idle: Duration) {
        if !self.phases.iter().any(|phase| matches!(phase, Phase::Moving(_))) {
            self.previous = Vec::new();
            self.previous_by = self.by;
        }
        self.settled = self.count_settled();
        let since = self.phases.iter().filter_map(|phase| match phase {
            Phase::Moving(since) | Phase::Observed(since) => Some(*since),
            _ => None,
        });
        self.due = since.min().map(|since| since + idle);
    }

    fn count_settled(&self) -> usize {
        self.phases.iter().filter(|phase| **phase == Phase::Settled).count()
    }

    /// When to come back with [`Transition::advance`] and [`Transition::aim`].
    #[must_use]
    pub const fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether no slot's flows have entries.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.settled == self.owners.len()
    }

    /// Whether a look at the entries may settle slots.
    #[must_use]
    pub fn is_watched(&self) -> bool {
        !self.is_settled() && self.phases.contains(&Phase::Watched)
    }

    /// What the program is to be told. Flows of `shared` backends always have entries.
    #[must_use]
    pub fn schedule(&self, shared: &FxHashSet<u32>) -> Schedule {
        let slots = self.owners.iter().zip(&self.phases).map(|(&owner, phase)| {
            let flags = match phase {
                _ if shared.contains(&owner) => SLOT_LOOK | SLOT_KEEP,
                Phase::Settled => 0,
                Phase::Watched => SLOT_LOOK,
                Phase::Moving(_) | Phase::Observed(_) => SLOT_LOOK | SLOT_KEEP,
            };
            owner | flags
        });
        Schedule {
            by: self.by,
            previous_by: self.previous_by,
            slots: slots.collect(),
            previous: self.previous.clone(),
        }
    }

    /// By which hash a slot is chosen.
    #[must_use]
    pub const fn by(&self) -> Chooser {
        self.by
    }

    /// The owners, without what is remembered: where flows that have no entry go.
    #[must_use]
    pub fn owners(&self) -> &[u32] {
        &self.owners
    }
}

/// Whether the idle timeout has passed.
fn is_over(since: Instant, terms: Terms) -> bool {
    terms.now.duration_since(since) >= terms.idle
}

#[cfg(test)]
mod tests;
