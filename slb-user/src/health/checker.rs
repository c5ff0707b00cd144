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
use crate::config::HealthCheck;

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
    running: HashMap<K, Checker>,
    /// How many checkers were started so far.
    started: u64,
}

impl<K: Clone + Eq + Hash + Send + 'static> Checkers<K> {
    /// Checks nothing yet; transitions will go to `events`.
    #[must_use]
    pub fn new(events: mpsc::UnboundedSender<Event<K>>) -> Self {
        Self { events, running: HashMap::new(), started: 0 }
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
                Checker::start(key.clone(), self.started, target, self.events.clone())
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

    /// Makes a target unhealthy for another reason than its probes, which then have to succeed anew; sends the event.
    pub fn fail(&self, key: &K, reason: String) {
        let Some(checker) = self.running.get(key) else { return };
        let mut state = checker.shared.lock();
        if !state.tracker.fail() {
            return;
        }
        let at = SystemTime::now();
        state.status.health = Health::Unhealthy;
        state.status.last_failure = Some(LastFailure { at, reason: reason.clone() });
        let (health, reason, duration) = (Health::Unhealthy, Some(reason), Duration::ZERO);
        // The receiver is gone only when the agent ends.
        let (key, checker) = (key.clone(), checker.number);
        let _ = self.events.send(Event { key, checker, health, reason, at, duration });
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
        events: mpsc::UnboundedSender<Event<K>>,
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
}

impl<K: Clone> Task<K> {
    async fn run(mut self) {
        let mut next = Instant::now() + self.phase;
        if self.shared.lock().status.health == Health::Unknown {
            // Out of turn: nothing can be decided before.
            self.probe().await;
        }
        loop {
            sleep_until(next).await;
            self.probe().await;
            // One that outlasts the interval is followed by the next, never overtaken.
            next = Instant::now().max(next + self.check.interval);
        }
    }

    async fn probe(&mut self) {
        let start = Instant::now();
        let outcome = probe(&self.check, self.addr).await;
        self.record(outcome, start.elapsed());
    }

    fn record(&mut self, outcome: Result<(), Failure>, duration: Duration) {
        let at = SystemTime::now();
        let mut state = self.shared.lock();
        if state.stopped {
            return;
        }
        // A gateway that is short of descriptors must not take it out on its backends.
        let is_local = outcome.as_ref().is_err_and(Failure::is_local);
        let transition = if is_local { None } else { state.tracker.record(outcome.is_ok()) };
        let reason = outcome.err().map(|failure| failure.to_string());
        state.status.shortage = reason.clone().filter(|_| is_local);
        state.status.health = state.tracker.health();
        state.status.last = Some(LastProbe { at, duration, failure: reason.clone() });
        if let Some(reason) = &reason {
            state.status.last_failure = Some(LastFailure { at, reason: reason.clone() });
        }
        if let Some(health) = transition {
            // The receiver is gone only when the agent ends.
            let (key, checker) = (self.key.clone(), self.number);
            let _ = self.events.send(Event { key, checker, health, reason, at, duration });
        }
    }
}

/// Spreads targets over an interval, so that thousands of them do not fire together.
fn phase(target: &impl Hash, interval: Duration) -> Duration {
    let mut hasher = DefaultHasher::new();
    target.hash(&mut hasher);
    interval.mul_f64(hasher.finish() as f64 / u64::MAX as f64)
}

#[cfg(test)]
mod tests {
    use tokio::{
        net::{TcpListener, UdpSocket},
        sync::mpsc::{UnboundedReceiver, error::TryRecvError},
    };

    use super::*;
    use crate::config::{ProbeKind, UdpProbe};

    fn check() -> Arc<HealthCheck> {
        Arc::new(HealthCheck {
            probe: ProbeKind::Tcp,
            port: None,
            interval: Duration::from_millis(5),
            timeout: Duration::from_secs(60),
            healthy: 2,
            unhealthy: 2,
            passive: false,
            proxy_header: false,
        })
    }

    fn target(addr: SocketAddr) -> Target {
        Target { addr, check: check(), initial: Health::Unknown }
    }

    fn checkers() -> (Checkers<u32>, UnboundedReceiver<Event<u32>>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Checkers::new(sender), receiver)
    }

    async fn listen() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        (listener, addr)
    }

    async fn transition(events: &mut UnboundedReceiver<Event<u32>>) -> (u32, Health) {
        let event = events.recv().await.unwrap();
        (event.key, event.health)
    }

    #[tokio::test]
    async fn given_a_backend_when_it_goes_and_comes_back_then_each_transition_is_told_once() {
        let (checkers, mut events) = checkers();
        let mut checkers = checkers;
        let (listener, addr) = listen().await;
        checkers.set([(7, target(addr))]);
        let up = events.recv().await.unwrap();
        assert_eq!((up.key, up.health, up.reason), (7, Health::Healthy, None));

        drop(listener);
        let down = events.recv().await.unwrap();
        let reason = Some("connection refused".to_owned());
        assert_eq!((down.key, down.health, &down.reason), (7, Health::Unhealthy, &reason));
        let status = checkers.statuses().get(&7).unwrap();
        assert_eq!(status.health, Health::Unhealthy);
        assert_eq!(status.last_failure.map(|failure| failure.reason), reason.clone());
        assert_eq!(status.last.map(|probe| probe.failure), Some(reason));

        let _listener = TcpListener::bind(addr).await.unwrap();
        assert_eq!(transition(&mut events).await, (7, Health::Healthy));
    }

    #[tokio::test]
    async fn given_a_known_backend_when_probes_agree_then_nothing_is_told() {
        let (mut checkers, mut events) = checkers();
        let (listener, addr) = listen().await;
        checkers.set([(1, Target { initial: Health::Healthy, ..target(addr) })]);
        for _ in 0..5 {
            listener.accept().await.unwrap();
        }
        assert_eq!(events.try_recv(), Err(TryRecvError::Empty));
        assert_eq!(checkers.statuses().get(&1).unwrap().health, Health::Healthy);
    }

    #[tokio::test]
    async fn given_running_checks_when_others_are_wanted_then_only_the_difference_changes() {
        let (mut checkers, mut events) = checkers();
        let ((_kept, kept), (_new, new)) = (listen().await, listen().await);
        let (gone_listener, gone) = listen().await;
        checkers.set([(1, target(kept)), (2, target(gone))]);
        let mut first = [transition(&mut events).await, transition(&mut events).await];
        first.sort_by_key(|&(key, _)| key);
        assert_eq!(first, [(1, Health::Healthy), (2, Health::Healthy)]);

        // An equal check in another allocation is no change, and so is another initial state.
        let same = Target { initial: Health::Unhealthy, ..target(kept) };
        checkers.set([(1, same), (3, target(new))]);
        drop(gone_listener);

        assert_eq!(transition(&mut events).await, (3, Health::Healthy), "the only news");
        assert_eq!(checkers.statuses().get(&1).unwrap().health, Health::Healthy, "kept");
        assert_eq!(checkers.statuses().get(&2), None, "stopped");
        assert_eq!(events.try_recv(), Err(TryRecvError::Empty));
    }

    #[tokio::test]
    async fn another_address_starts_with_the_health_that_the_caller_gives() {
        let (mut checkers, mut events) = checkers();
        let (_old_listener, old) = listen().await;
        checkers.set([(1, target(old))]);
        assert_eq!(transition(&mut events).await, (1, Health::Healthy));

        let (listener, addr) = listen().await;
        drop(listener);
        checkers.set([(1, Target { initial: Health::Healthy, ..target(addr) })]);
        assert_eq!(
            checkers.statuses().get(&1).unwrap().health,
            Health::Healthy,
            "until probes say else"
        );
        assert_eq!(transition(&mut events).await, (1, Health::Unhealthy));
    }

    #[tokio::test]
    async fn event_of_a_checker_that_was_replaced_is_not_current() {
        let (mut checkers, mut events) = checkers();
        let (_listener, addr) = listen().await;
        checkers.set([(1, target(addr))]);
        let first = events.recv().await.unwrap();
        assert!(checkers.is_current(&first));

        checkers.set([]);
        assert!(!checkers.is_current(&first), "stopped");
        checkers.set([(1, target(addr))]);
        assert!(!checkers.is_current(&first), "started again");
        assert!(checkers.is_current(&events.recv().await.unwrap()));
    }

    #[tokio::test]
    async fn given_running_checks_when_dropped_then_all_tasks_end() {
        let (mut checkers, mut events) = checkers();
        let (_listener, addr) = listen().await;
        checkers.set((0..10).map(|key| (key, target(addr))));
        drop(checkers);
        // Every task holds a sender, so the channel ends with the last of them.
        while events.recv().await.is_some() {}
    }

    #[tokio::test]
    async fn given_a_slow_backend_when_probed_then_probes_do_not_overlap() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let probe = UdpProbe { send: "ping".into(), receive: Some("pong".into()) };
        let slow = HealthCheck { probe: ProbeKind::Udp(probe), ..(*check()).clone() };
        let (mut checkers, _events) = checkers();
        let addr = socket.local_addr().unwrap();
        checkers.set([(1, Target { check: Arc::new(slow), ..target(addr) })]);

        let mut question = [0; 16];
        let (_, first) = socket.recv_from(&mut question).await.unwrap();
        let early = tokio::time::timeout(4 * check().interval, socket.recv_from(&mut question));
        assert!(early.await.is_err(), "another probe while the first is unanswered");
        socket.send_to(b"pong", first).await.unwrap();
        socket.recv_from(&mut question).await.unwrap();
    }

    #[tokio::test]
    async fn given_a_gateway_short_of_descriptors_when_probes_fail_then_health_stays() {
        let (sender, mut events) = mpsc::unbounded_channel();
        let addr = SocketAddr::from(([127, 0, 0, 1], 9));
        let mut task = Task {
            key: 1,
            number: 1,
            addr,
            check: check(),
            phase: Duration::ZERO,
            shared: Arc::new(Shared::new(Tracker::new(Health::Healthy, 1, 1))),
            events: sender,
        };
        let local = || Failure::from(std::io::Error::from_raw_os_error(libc::EMFILE));
        task.record(Err(local()), Duration::ZERO);
        assert_eq!(events.try_recv(), Err(TryRecvError::Empty));
        let status = task.shared.lock().status.clone();
        assert_eq!(status.last_failure.unwrap().reason, local().to_string());
        assert_eq!(status.shortage, Some(local().to_string()));
        task.record(Ok(()), Duration::ZERO);
        assert_eq!(task.shared.lock().status.shortage, None);
    }

    #[test]
    fn given_many_targets_when_spread_then_they_fill_the_interval_evenly() {
        let mut tenths = [0; 10];
        for key in 0..5000_u32 {
            let phase = phase(&key, Duration::from_secs(2));
            tenths[((phase.as_millis() / 200) as usize).min(9)] += 1;
        }
        assert!(tenths.iter().all(|tenth| (400..600).contains(tenth)), "{tenths:?}");
    }
}
