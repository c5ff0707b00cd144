//! What checks have found so far, for any thread to read.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::sync::Notify;

use super::machine::{Health, Tracker};

/// The latest about a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The state after all probes so far.
    pub health: Health,
    /// `None` before the first probe.
    pub last: Option<LastProbe>,
    /// Kept when later probes succeed.
    pub last_failure: Option<LastFailure>,
    /// What the gateway lacked for the last probe, which says nothing about the backend then.
    pub shortage: Option<String>,
}

/// The last probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastProbe {
    /// When it ended.
    pub at: SystemTime,
    /// How long it took.
    pub duration: Duration,
    /// [`Failure`](super::Failure), in words; `None`: it succeeded.
    pub failure: Option<String>,
}

/// When and why a probe failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastFailure {
    /// When the probe ended.
    pub at: SystemTime,
    /// [`Failure`](super::Failure), in words.
    pub reason: String,
}

/// Probes fail for want of something that the gateway itself has too little of; health stays as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the gateway lacks what probes take ({0}), so health is kept as it was")]
pub struct Shortage(pub(super) String);

/// What the checkers of some targets have found; it goes on with what they find. Clones share it.
#[derive(Debug)]
pub struct Statuses<K>(pub(super) Arc<HashMap<K, Arc<Shared>>>);

impl<K> Clone for Statuses<K> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<K> Default for Statuses<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Eq + Hash> Statuses<K> {
    /// The latest about one target; `None` if it is not checked.
    #[must_use]
    pub fn get(&self, key: &K) -> Option<Status> {
        self.0.get(key).map(|shared| shared.lock().status.clone())
    }
}

/// What a task and its handle both see; locked for moments only, never across an `await`.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    /// Wakes the task: [`State::suspicion`] is new.
    pub suspected: Notify,
}

#[derive(Debug)]
pub(super) struct State {
    pub status: Status,
    pub tracker: Tracker,
    pub stopped: bool,
    /// Why the target is to be probed early; `it {suspicion}` is a sentence.
    pub suspicion: Option<String>,
}

impl Shared {
    pub(super) fn new(tracker: Tracker) -> Self {
        let health = tracker.health();
        let status = Status { health, last: None, last_failure: None, shortage: None };
        let state = State { status, tracker, stopped: false, suspicion: None };
        Self { state: Mutex::new(state), suspected: Notify::new() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Every write leaves it whole, so a panic elsewhere is no reason to stop checking.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
