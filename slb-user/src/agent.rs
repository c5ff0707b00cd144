//! The agent: turns changes of health and network into map writes, for as long as it lives.
//!
//! It owns all state; everything else is asked by message. Nothing that it does is undone when it
//! ends: the datapath goes on, and the next agent starts from what it finds in the maps.

mod attacher;
mod auditor;
mod backends;
mod config_cache;
mod conflicts;
mod failures;
mod file_job;
mod lock;
mod metrics_server;
mod passive;
mod private;
mod publish;
mod reconciler;
mod reloader;
mod renew;
mod sweeper;
mod watchdog;
mod watcher;

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use slb_api::{EventKind, Problem, ProblemName};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    time::{Interval, MissedTickBehavior},
};
use tracing::{info, warn};

pub use lock::{Lock, LockError};

use self::{
    attacher::Attacher,
    auditor::{AuditReport, Auditor},
    backends::Backends,
    conflicts::ConflictWatch,
    failures::Failures,
    metrics_server::MetricsServer,
    passive::PassiveChecks,
    publish::Publisher,
    reconciler::{Reconciler, capacities},
    reloader::{Origin, Reloader},
    sweeper::{Sweeper, Swept},
    watchdog::Watchdog,
    watcher::{NetworkSnapshot, NetworkWatcher, WatchOrder, WatchSpec},
};
use crate::{
    api::{self, Access, ApiError, Request},
    clock::Jiffies,
    config::{Config, source::ConfigSource},
    datapath::{Counters, LoadError, Loaded, Pins, TableError},
    descriptors::Descriptors,
    health::{self, Checkers, Health},
    ids::{CapacityError, Ids},
    net::NetworkChange,
    observe::{ClaimCounts, EventLog, Observer, Snapshot, StatusReader},
};

/// The pause before what failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often the flow table is looked through while slots are watched.
const SWEEP: Duration = Duration::from_secs(5);
/// Failed probes that may wait for their target's MAC address to be asked for.
const FAILED_AT_ONCE: usize = 1_024;
/// How often the datapath is compared with what the agent has set up.
const AUDIT: Duration = Duration::from_secs(5);
/// How often the agent looks whether XDP is attached still: the kernel does not tell of a link that was detached.
const LINKS: Duration = Duration::from_millis(250);
/// [`Jiffies::now`] is not exact: an entry counts as over when it has been for so long.
const SWEEP_SLACK: Duration = Duration::from_secs(5);

/// The agent cannot start, or go on.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Another one is there.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// No datapath.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The maps cannot be written.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The configuration is too large.
    #[error(transparent)]
    Ids(#[from] CapacityError),
    /// The network cannot be followed.
    #[error(transparent)]
    Network(#[from] crate::net::Error),
    /// No API.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// Clock or signals.
    #[error("cannot set up the agent")]
    Setup(#[from] std::io::Error),
}

/// A running agent. Each part does one job; what concerns several parts is done here.
pub struct Agent {
    config: Arc<Config>,
    path: Arc<PathBuf>,
    started: Instant,
    datapath: Loaded,
    /// The kernel's network, as it was last reported.
    network: NetworkSnapshot,
    backends: Backends,
    reconciler: Reconciler,
    attacher: Attacher,
    sweeper: Sweeper,
    auditor: Auditor,
    reloader: Reloader,
    metrics: MetricsServer,
    descriptors: Descriptors,
    failures: Failures,
    /// VIPs that other hosts claim.
    conflicts: watch::Receiver<Vec<Problem>>,
    claims: ClaimCounts,
    events: EventLog,
    counters: Arc<Counters>,
    observer: Arc<dyn Observer>,
    publisher: Publisher,
    pins_lock: Lock,
}

/// The ends of the channels by which the parts of an agent that run beside its loop reach it.
struct Inbox {
    transitions: mpsc::UnboundedReceiver<health::Event<u32>>,
    network: mpsc::Receiver<NetworkSnapshot>,
    suspects: mpsc::Receiver<Vec<passive::Suspect>>,
    sweeps: mpsc::Receiver<Swept>,
    audits: mpsc::Receiver<AuditReport>,
    requests: mpsc::Receiver<Request>,
}

/// The other ends.
struct Outbox {
    transitions: mpsc::UnboundedSender<health::Event<u32>>,
    network: mpsc::Sender<NetworkSnapshot>,
    suspects: mpsc::Sender<Vec<passive::Suspect>>,
    sweeps: mpsc::Sender<Swept>,
    audits: mpsc::Sender<AuditReport>,
    requests: mpsc::Sender<Request>,
}

fn channels() -> (Outbox, Inbox) {
    let (transitions, transitioned) = mpsc::unbounded_channel();
    let (network, network_found) = mpsc::channel(1);
    let (suspects, suspected) = mpsc::channel(1);
    let (sweeps, swept) = mpsc::channel(1);
    let (audits, audited) = mpsc::channel(1);
    let (requests, requested) = mpsc::channel(16);
    let outbox = Outbox { transitions, network, suspects, sweeps, audits, requests };
    let inbox = Inbox {
        transitions: transitioned,
        network: network_found,
        suspects: suspected,
        sweeps: swept,
        audits: audited,
        requests: requested,
    };
    (outbox, inbox)
}

/// Runs the agent until it is told to stop. `config` was read from `source`, and `pins` is what it says; `ready` is called
/// when packets are balanced.
///
/// # Errors
///
/// [`AgentError`]; what an earlier agent has set up goes on as it is.
pub async fn run(
    config: Config,
    pins: Pins,
    source: Arc<dyn ConfigSource>,
    ready: impl FnOnce(),
) -> Result<(), AgentError> {
    let _lock = Lock::take(&config.gateway.api)?;
    let (outbox, mut inbox) = channels();
    let (orders, ordered) = mpsc::unbounded_channel();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut changes = source.changes()?;

    let start = Agent::start(config, pins, source, &outbox, orders);
    let (mut agent, watcher, conflicts) = tokio::select! {
        started = start => started?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let watching = tokio::spawn(watcher.run(outbox.network, ordered));
    let mut conflicts_changed = conflicts.subscribe();
    let listening = tokio::spawn(conflicts.run());
    let most = agent.descriptors.connections().clone();
    let api = api::Agent { requests: outbox.requests, observer: Arc::clone(&agent.observer) };
    if let Some(monitor) = &agent.config.gateway.monitor {
        Lock::directory_of(monitor)?;
        api::serve(monitor, Access::Read, api.clone(), most.clone())?;
    }
    api::serve(&agent.config.gateway.api, Access::Everything, api, most)?;
    ready();
    agent.prepare_edits();
    let checks = PassiveChecks::new(Arc::clone(&agent.counters));
    let checks = checks.run(agent.publisher.subscribe(), outbox.suspects);
    let checking = tokio::spawn(checks);

    let mut sweep = every(SWEEP);
    let (mut links, mut audit) = (every(LINKS), every(AUDIT));
    let mut retry = every(RETRY);
    let mut watchdog = Watchdog::from_env()?;
    // No branch waits: a failed backend is out of the maps before anything else is done.
    loop {
        tokio::select! {
            biased;
            // First, because a loop that has much to do is alive. Nothing changes by it.
            () = watchdog.feed() => continue,
            Some(event) = inbox.transitions.recv() => {
                let more = std::iter::from_fn(|| inbox.transitions.try_recv().ok());
                agent.health_changed(std::iter::once(event).chain(more).collect());
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            Some(()) = changes.next() => agent.reload(Origin::Source),
            Some(suspects) = inbox.suspects.recv() => agent.suspect(suspects),
            event = agent.reloader.event() => agent.reload_event(event),
            Some(network) = inbox.network.recv() => agent.network_changed(network),
            Ok(()) = conflicts_changed.changed() => {}
            Some(request) = inbox.requests.recv() => agent.answer(request),
            _ = retry.tick(), if !agent.failures.is_empty() => agent.retry(),
            () = until(agent.reconciler.due()) => {
                agent.reconcile();
                if agent.has_closed_flows() {
                    sweep.reset_immediately();
                }
            }
            _ = sweep.tick() => agent.sweep(),
            Some(swept) = inbox.sweeps.recv() => agent.settle(swept),
            _ = links.tick() => if !agent.attach_detached() { continue },
            _ = audit.tick() => agent.audit(),
            Some(part) = inbox.audits.recv() => agent.audited(part),
        }
        agent.publish();
    }
    watching.abort();
    checking.abort();
    listening.abort();
    info!("stopping; the datapath keeps forwarding with the last known health, until `slb unload`");
    Ok(())
}

impl Agent {
    async fn start(
        config: Config,
        pins: Pins,
        source: Arc<dyn ConfigSource>,
        outbox: &Outbox,
        orders: mpsc::UnboundedSender<WatchOrder>,
    ) -> Result<(Self, NetworkWatcher, ConflictWatch), AgentError> {
        // Beside the loading of the datapath, which takes about as long.
        let network = tokio::spawn(watcher::open_network(backend_addresses(&config)));
        let datapath = Loaded::open(pins.clone(), capacities(&config))?;
        let pins_lock = Lock::of_directory(&config.gateway.pins)?;
        let ids = Arc::new(Ids::assign(&config, datapath.maps.installed())?);
        let spec = WatchSpec::new(&config, &ids);
        let network = network.await.map_err(std::io::Error::other)??;
        let events = EventLog::default();
        let mut watcher = NetworkWatcher::new(network, spec.clone(), events.clone());
        let (config, path) = (Arc::new(config), Arc::new(source.path().to_owned()));
        let first = Snapshot::new(Arc::clone(&config), Arc::clone(&path), Arc::clone(&ids));
        let started = first.started;
        let publisher = Publisher::new(first);
        let jiffies = Jiffies::from_kernel()?;
        let counters = Arc::new(Counters::open(&pins)?);
        let (shared, snapshots) = (Arc::clone(&counters), publisher.subscribe());
        let table = datapath.table.clone();
        let observer =
            StatusReader::open(&pins, table, jiffies, shared, snapshots, events.clone())?;
        let claims = ClaimCounts::default();
        let conflicts = ConflictWatch::new(watcher.places(), claims.clone(), events.clone());
        let (failures, failed) = mpsc::channel(FAILED_AT_ONCE);
        tokio::spawn(renew::run(failed, watcher.hops()));
        let checkers = Checkers::new(outbox.transitions.clone()).with_failures(failures);
        let mut agent = Self {
            started,
            backends: Backends::new(ids, datapath.maps.installed(), checkers),
            reconciler: Reconciler::new(jiffies),
            attacher: Attacher::default(),
            sweeper: Sweeper::new(outbox.sweeps.clone(), jiffies),
            auditor: Auditor::new(outbox.audits.clone()),
            reloader: Reloader::new(source, orders, spec),
            metrics: MetricsServer::default(),
            descriptors: Descriptors::new()?,
            // What changed while no agent was looking, the program has not been told.
            network: watcher.look(NetworkChange::EVERYTHING).await,
            failures: Failures::default(),
            conflicts: conflicts.subscribe(),
            claims,
            events,
            counters,
            observer: Arc::new(observer),
            publisher,
            datapath,
            config,
            path,
            pins_lock,
        };
        agent.set_up()?;
        watcher.announce().await;
        agent.backends.note_orphaned();
        agent.descriptors.count_open()?;
        agent.check_health();
        agent.serve_metrics();
        agent.log_datapath();
        agent.publish();
        watcher.report();
        Ok((agent, watcher, conflicts))
    }

    /// Writes the maps and attaches the program.
    fn set_up(&mut self) -> Result<(), AgentError> {
        Attacher::check(&self.datapath, &self.config, None, &self.network)?;
        self.set()?;
        self.apply()?;
        self.attach()?;
        // The mode is known only now.
        self.set()?;
        self.apply()?;
        self.datapath.detach_others(&self.config.gateway.interfaces)?;
        self.datapath.maps.next_route_epoch()?;
        Ok(())
    }

    /// Writes what the program is told besides its tables.
    fn set(&mut self) -> Result<(), TableError> {
        let is_generic = self.attacher.is_generic();
        Reconciler::set(&mut self.datapath.maps, &self.config, &self.network, is_generic)
    }

    fn apply(&mut self) -> Result<(), TableError> {
        let is_generic = self.attacher.is_generic();
        let Self { reconciler, datapath, backends, network, .. } = self;
        reconciler.apply(&mut datapath.maps, backends, network, is_generic)
    }

    fn attach(&mut self) -> Result<(), LoadError> {
        self.attacher.attach(&mut self.datapath, &self.config, &self.network)
    }

    /// Brings the maps in line, and says whether they are; what fails is tried again.
    fn reconcile(&mut self) -> bool {
        self.attempt(ProblemName::MapsNotWritten, Self::apply)
    }

    /// Tries again what failed.
    fn retry(&mut self) {
        self.serve_metrics();
        self.reconcile();
        let shortage = self.backends.checkers.shortage();
        self.failures.note(ProblemName::ProbesShortOfResources, shortage);
    }

    fn log_datapath(&self) {
        let (flows, bytes) = self.datapath.flow_table();
        info!(flows, mebibytes = bytes >> 20, "flow table");
        let size = self.flow_table_problem().map(|problem| problem.text);
        for problem in size.iter().chain(self.datapath.warning()) {
            warn!("{problem}");
        }
    }

    /// Has every backend checked as the configuration says.
    fn check_health(&mut self) {
        let checks = self.backends.check();
        self.descriptors.reserve(checks);
    }

    /// Brings the maps in line with these transitions, and tells of them after that.
    fn health_changed(&mut self, events: Vec<health::Event<u32>>) {
        let decided = events.iter().map(|event| event.at).min();
        let known = self.backends.record(events);
        let is_done = self.reconcile();
        let after = decided.and_then(|at| at.elapsed().ok()).unwrap_or_default();
        // Ahead of the events: who sees one sees in the status what it did.
        self.publish();
        known.iter().for_each(|(backend, event)| self.report_health(*backend, event));
        if is_done {
            info!(latency_us = after.as_micros(), "health change applied");
        }
    }

    fn report_health(&self, index: usize, event: &health::Event<u32>) {
        let (listener, backend) = self.backends.describe(&self.config, index);
        let reason = event.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        let health = event.health.label();
        self.events.note(EventKind::Health, format!("{listener}: {backend} is {health}{reason}"));
        if event.health == Health::Unhealthy {
            warn!(listener, backend, reason = event.reason, "backend is unhealthy");
        } else {
            info!(listener, backend, "backend is healthy");
        }
    }

    fn network_changed(&mut self, network: NetworkSnapshot) {
        self.network = network;
        self.attempt(ProblemName::XdpNotAttached, Self::attach);
        self.attempt(ProblemName::SettingsNotWritten, Self::set);
        self.reconcile();
        // Last: what is looked up from now on depends on what has just been written.
        if self.network.outdates_clients {
            self.attempt(ProblemName::RoutesOutdated, |agent| {
                agent.datapath.maps.next_route_epoch()
            });
        }
        self.network.take();
    }

    /// Listens where the configuration says, if not already.
    fn serve_metrics(&mut self) {
        self.attempt(ProblemName::MetricsNotServed, |agent| {
            let most = agent.descriptors.connections();
            agent.metrics.serve(agent.config.gateway.http, &agent.observer, most)
        });
    }

    fn answer(&mut self, request: Request) {
        match request {
            Request::Reload(answer) => self.reload(Origin::Reload(answer)),
            Request::Edit(edit, answer) => self.edit(edit, answer),
            // The command may have gone away.
            Request::Plan(config, answer) => drop(answer.send(self.plan(&config))),
        }
    }
}

/// The addresses of all backends in a configuration.
fn backend_addresses(config: &Config) -> Vec<IpAddr> {
    let groups = config.instances.iter().flat_map(|instance| &instance.groups);
    let backends = groups.flat_map(|group| &group.backends);
    let addresses: BTreeSet<IpAddr> =
        backends.flat_map(|backend| backend.addresses.iter().copied()).collect();
    addresses.into_iter().collect()
}

fn every(period: Duration) -> Interval {
    let mut turns = tokio::time::interval(period);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    turns
}

/// Waits for a moment; for ever if there is none.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}
