//! Keeps probing all targets, and reports their transitions.
//!
//! One small task per target. It sends transitions into a channel, at once, and keeps the latest details in a
//! [`Status`](super::Status) that any thread can read.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher as _},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::mpsc,
    task::AbortHandle,
    time::{Instant, sleep_until},
};

use super::{
    machine::{Health, Tracker},
    probe::{Failure, probe},
    status::{LastFailure, LastProbe, Shared, Shortage, Statuses},
};
use crate::{config::HealthCheck, printable::Printable};

/// How often at most a suspicion has a target probed early: who causes suspicions must not cause a flood of probes.
const SUSPECTED_EVERY: Duration = Duration::from_secs(1);

/// What is probed, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Where probes go; [`HealthCheck::port`] is taken into account already.
    pub addr: SocketAddr,
    /// How it is probed, shared by all backends of a listener.
    pub check: Arc<HealthCheck>,
    /// Its health before the first probe; used when its checker starts.
    pub initial: Health,
}

/// A transition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event<K> {
    /// Whose.
    pub key: K,
    /// The checker that sent it, see [`Checkers::is_current`].
    checker: u64,
    /// The new state; never [`Health::Unknown`].
    pub health: Health,
    /// Why the probe that decided failed; `None` if it succeeded.
    pub reason: Option<String>,
    /// When that probe ended.
    pub at: SystemTime,
    /// How long that probe took.
    pub duration: Duration,
}

/// The running checks. Dropping it stops all of them.
#[derive(Debug)]
pub struct Checkers<K> {
    events: mpsc::UnboundedSender<Event<K>>,
    failures: Option<mpsc::Sender<SocketAddr>>,
    running: HashMap<K, Checker>,
    /// How many checkers were started so far.
    started: u64,
}

impl<K: Clone + Eq + Hash + Send + 'static> Checkers<K> {
    /// Checks nothing yet; transitions will go to `events`.
    #[must_use]
    pub fn new(events: mpsc::UnboundedSender<Event<K>>) -> Self {
        Self { events, failures: None, running: HashMap::new(), started: 0 }
    }

    /// The same, and the target of every probe that fails is sent to `failures`, unless that is full.
    #[must_use]
    pub fn with_failures(self, failures: mpsc::Sender<SocketAddr>) -> Self {
        Self { failures: Some(failures), ..self }
    }

    /// Makes `wanted` the targets that are checked.
    ///
    /// New ones are started, missing ones stopped. Those with the same address and check go on as if
    /// nothing had happened; those with another are started anew. When this returns, those stopped send no
    /// more events; what they sent before may still be in the channel, and is not
    /// [current](Self::is_current).
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime.
    pub fn set(&mut self, wanted: impl IntoIterator<Item = (K, Target)>) {
        let mut before = std::mem::take(&mut self.running);
        for (key, target) in wanted {
            let is_same =
                |known: &Checker| known.addr == target.addr && known.check == target.check;
            let checker = before.remove(&key).filter(is_same).unwrap_or_else(|| {
                self.started += 1;
                let outbox = (self.events.clone(), self.failures.clone());
                Checker::start(key.clone(), self.started, target, outbox)
            });
            self.running.insert(key, checker);
        }
    }

    /// Whether the checker that sent `event` still runs: a target that was removed and added again, or is
    /// probed in another way by now, has nothing to do with what was found before.
    #[must_use]
    pub fn is_current(&self, event: &Event<K>) -> bool {
        self.running.get(&event.key).is_some_and(|running| running.number == event.checker)
    }

    /// Has a target probed early, because `reason` suggests that it fails. Only the probes decide.
    ///
    /// They follow each other without a pause until one succeeds or the target is unhealthy. That begins at most once
    /// in [`SUSPECTED_EVERY`]; a suspicion that comes sooner waits. A target that is not healthy is not probed early.
    pub fn suspect(&self, key: &K, reason: String) {
        let Some(checker) = self.running.get(key) else { return };
        checker.shared.lock().suspicion = Some(reason);
        checker.shared.suspected.notify_one();
    }

    /// Whether all targets could be probed when it was last their turn.
    ///
    /// # Errors
    ///
    /// What the gateway lacked.
    pub fn shortage(&self) -> Result<(), Shortage> {
        let mut checkers = self.running.values();
        let found = checkers.find_map(|checker| checker.shared.lock().status.shortage.clone());
        found.map_or(Ok(()), |lacked| Err(Shortage(lacked)))
    }

    /// The latest about all targets that are checked now, for any thread.
    #[must_use]
    pub fn statuses(&self) -> Statuses<K> {
        let shared = self.running.iter().map(|(key, it)| (key.clone(), Arc::clone(&it.shared)));
        Statuses(Arc::new(shared.collect()))
    }
}

/// The handle to one target's task. Dropping it stops the task.
#[derive(Debug)]
struct Checker {
    /// No other checker of this process has it.
    number: u64,
    addr: SocketAddr,
    check: Arc<HealthCheck>,
    shared: Arc<Shared>,
    task: AbortHandle,
}

impl Checker {
    fn start<K: Hash + Clone + Send + 'static>(
        key: K,
        number: u64,
        Target { addr, check, initial }: Target,
        (events, failures): (mpsc::UnboundedSender<Event<K>>, Option<mpsc::Sender<SocketAddr>>),
    ) -> Self {
        let tracker = Tracker::new(initial, check.healthy, check.unhealthy);
        let shared = Arc::new(Shared::new(tracker));
        let task = Task {
            phase: phase(&(&key, addr), check.interval),
            key,
            number,
            addr,
            check: Arc::clone(&check),
            shared: Arc::clone(&shared),
            events,
            failures,
            unsuspected_until: Instant::now(),
        };
        Self { number, addr, check, shared, task: tokio::spawn(task.run()).abort_handle() }
    }
}

impl Drop for Checker {
    /// No event is sent after this.
    fn drop(&mut self) {
        self.task.abort();
        // A task that is being polled elsewhere ends only at its next `await`.
        self.shared.lock().stopped = true;
    }
}

/// Probes one target for ever.
struct Task<K> {
    key: K,
    number: u64,
    addr: SocketAddr,
    check: Arc<HealthCheck>,
    /// When in each interval it is this target's turn.
    phase: Duration,
    shared: Arc<Shared>,
    events: mpsc::UnboundedSender<Event<K>>,
    failures: Option<mpsc::Sender<SocketAddr>>,
    /// Before that, a suspicion waits.
    unsuspected_until: Instant,
}

impl<K: Clone> Task<K> {
    async fn run(mut self) {
        let mut next = Instant::now() + self.phase;
        if self.shared.lock().status.health == Health::Unknown {
            // Out of turn: nothing can be decided before.
            self.probe().await;
        }
        loop {
            tokio::select! {
                () = sleep_until(next) => {
                    self.probe().await;
                    // One that outlasts the interval is followed by the next, never overtaken.
                    next = Instant::now().max(next + self.check.interval);
                }
                suspicion = self.suspicion() => self.verify(&suspicion).await,
            }
        }
    }

    /// Waits until the target is suspected, and may be probed early.
    async fn suspicion(&mut self) -> String {
        loop {
            sleep_until(self.unsuspected_until).await;
            self.shared.suspected.notified().await;
            let mut state = self.shared.lock();
            // Probes have the say already about one that is not healthy.
            let reason = state.suspicion.take();
            let is_healthy = state.tracker.health() == Health::Healthy;
            drop(state);
            if let Some(reason) = reason.filter(|_| is_healthy) {
                return reason;
            }
        }
    }

    /// Probes without a pause, until one probe speaks for the target or enough speak against it.
    async fn verify(&mut self, suspicion: &str) {
        self.unsuspected_until = Instant::now() + SUSPECTED_EVERY;
        while self.ask(Some(suspicion)).await == Outcome::Failed {}
    }

    async fn probe(&mut self) {
        self.ask(None).await;
    }

    /// Probes once. `suspicion`: why it is done early.
    async fn ask(&mut self, suspicion: Option<&str>) -> Outcome {
        let start = Instant::now();
        let outcome = probe(&self.check, self.addr).await;
        self.record(outcome, start.elapsed(), suspicion)
    }

    fn record(
        &mut self,
        outcome: Result<(), Failure>,
        duration: Duration,
        suspicion: Option<&str>,
    ) -> Outcome {
        let at = SystemTime::now();
        let mut state = self.shared.lock();
        if state.stopped {
            return Outcome::Settled;
        }
        // A gateway that is short of descriptors must not take it out on its backends.
        let is_local = outcome.as_ref().is_err_and(Failure::is_local);
        if outcome.is_err()
            && !is_local
            && let Some(failures) = &self.failures
        {
            // Full: many fail, and this one will again.
            let _ = failures.try_send(self.addr);
        }
        let transition = if is_local { None } else { state.tracker.record(outcome.is_ok()) };
        let reason = outcome.err().map(|failure| match suspicion {
            // The backend may have worded a part of it.
            Some(suspicion) => format!("{}; probed early, as it {suspicion}", Printable(failure)),
            None => Printable(failure).to_string(),
        });
        state.status.shortage = reason.clone().filter(|_| is_local);
        state.status.health = state.tracker.health();
        state.status.last = Some(LastProbe { at, duration, failure: reason.clone() });
        if let Some(reason) = &reason {
            state.status.last_failure = Some(LastFailure { at, reason: reason.clone() });
        }
        let is_open = reason.is_some() && !is_local && state.tracker.health() != Health::Unhealthy;
        if let Some(health) = transition {
            // The receiver is gone only when the agent ends.
            let (key, checker) = (self.key.clone(), self.number);
            let _ = self.events.send(Event { key, checker, health, reason, at, duration });
        }
        drop(state);
        if is_open { Outcome::Failed } else { Outcome::Settled }
    }
}

/// What a probe means for those that follow without a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// It failed, and more may fail before the target is unhealthy.
    Failed,
    /// It succeeded, or decided, or said nothing about the target.
    Settled,
}

/// Spreads targets over an interval, so that thousands of them do not fire together.
fn phase(target: &impl Hash, interval: Duration) -> Duration {
    let mut hasher = DefaultHasher::new();
    target.hash(&mut hasher);
    interval.mul_f64(hasher.finish() as f64 / u64::MAX as f64)
}

#[cfg(test)]
mod tests;
