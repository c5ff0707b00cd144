//! The agent: turns changes of health and network into map writes, for as long as it lives.
//!
//! It owns all state; everything else is asked by message. Nothing that it does is undone when it
//! ends: the datapath goes on, and the next agent starts from what it finds in the maps.

mod events;
mod failures;
mod file_job;
mod flows;
mod follow;
mod known;
mod lock;
mod passive;
mod reload;
mod staged;
mod status;
mod watchdog;

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use slb_common::{
    abi::{
        self, BACKEND_HEALTHY, BACKEND_IN_USE, BACKEND_UNHEALTHY, Backend, CHUNK_SLOTS,
        DEFAULT_CHUNKS, MAX_SOURCES, MODE_FULL, NO_LISTENER_DROP, NO_LISTENER_PASS,
        NO_LISTENER_RESET,
    },
    verdict::Verdict,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::AbortHandle,
    time::MissedTickBehavior,
};
use tracing::{debug, info, warn};

pub use lock::{Lock, LockError};

use self::{
    events::Events,
    failures::Failures,
    follow::{Follower, Following, Surroundings},
    passive::Suspicion,
    reload::Reloads,
    watchdog::Watchdog,
};
use crate::{
    api::{self, ApiError, HttpError, Request},
    clock::Jiffies,
    config::{Announce, Config, Gateway, NoListener, Scheduler},
    datapath::{Attachment, Capacities, Explainer, LoadError, Loaded, Pins, TableError},
    descriptors::Descriptors,
    health::{self, Checkers, Health},
    layout::{Layout, LayoutError},
    net::{GENERIC, Interface, NetworkChange, local_source_problems},
    plan::plan,
    planner::{Inputs, Planner},
    schedule::maglev,
    state::State,
};

/// The pause before writes that failed are tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often the flow table is looked through while slots are watched.
const SWEEP: Duration = Duration::from_secs(5);
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
    Layout(#[from] LayoutError),
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

/// A running agent.
pub struct Agent {
    config: Config,
    path: PathBuf,
    started: Instant,
    datapath: Loaded,
    layout: Layout,
    planner: Planner,
    jiffies: Jiffies,
    /// One per target of the layout.
    health: Vec<Health>,
    /// Backends, by index, that stay in use until their first probe, see [`Inputs::trusted`].
    trusted: HashSet<u32>,
    /// By [`crate::layout::Target::id`].
    checkers: Checkers<u32>,
    /// Backends that are there for the sake of their flows only, and since when.
    departed: HashMap<u32, Instant>,
    /// Backends of which some connections are being reset, and until when.
    closing: HashMap<u32, Instant>,
    /// How often the flow table was to be looked through.
    sweeps: u32,
    /// What clients have seen of backends, by [`crate::layout::Target::id`].
    suspicions: HashMap<u32, Suspicion>,
    /// How often the health of a target has changed, by id.
    transitions: HashMap<u32, u64>,
    reloads: Reloads,
    descriptors: Descriptors,
    /// Where metrics are, and who answers.
    http: Option<(SocketAddr, AbortHandle)>,
    requests: mpsc::Sender<Request>,
    surroundings: Surroundings,
    attachments: Vec<(Interface, Attachment)>,
    failures: Failures,
    events: Events,
    explainer: Arc<Explainer>,
    _pins_lock: Lock,
}

/// Runs the agent until it is told to stop. `ready` is called when packets are balanced.
///
/// # Errors
///
/// [`AgentError`]; what an earlier agent has set up goes on as it is.
pub async fn run(config: Config, path: &Path, ready: impl FnOnce()) -> Result<(), AgentError> {
    let _lock = Lock::take(&config.gateway.api)?;
    let (requests, mut requested) = mpsc::channel(16);
    let (events, mut transitions) = mpsc::unbounded_channel();
    let (news, mut followed) = mpsc::channel(1);
    let (orders, ordered) = mpsc::unbounded_channel();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;

    let start =
        Agent::start(config, path.to_owned(), Checkers::new(events), orders, requests.clone());
    let (mut agent, follower) = tokio::select! {
        started = start => started?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let following = tokio::spawn(follower.run(news, ordered));
    api::serve(&agent.config.gateway.api, requests, agent.descriptors.connections().clone())?;
    ready();
    agent.prepare_edits();

    let (swept, mut sweeps) = mpsc::channel(1);
    let mut sweep = tokio::time::interval(SWEEP);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut answers = tokio::time::interval(passive::PERIOD);
    answers.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut retry = tokio::time::interval(RETRY);
    retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut watchdog = Watchdog::from_env()?;
    // Nothing in here waits: a failed backend is out of the maps before anything else is done.
    loop {
        tokio::select! {
            biased;
            // First, because a loop that has much to do is alive.
            () = watchdog.feed() => {}
            Some(event) = transitions.recv() => {
                let more = std::iter::from_fn(|| transitions.try_recv().ok());
                agent.health_changed(std::iter::once(event).chain(more).collect());
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => agent.reload(None),
            (work, outcome) = agent.reloads.ended() => agent.file_job_ended(work, outcome),
            Some(surroundings) = followed.recv() => agent.surroundings_changed(surroundings),
            Some(request) = requested.recv() => agent.answer(request),
            _ = retry.tick(), if !agent.failures.is_empty() => {
                agent.serve_metrics();
                agent.reconcile();
                agent.failures.note("health checks", agent.checkers.shortage());
            }
            () = until(agent.planner.due()) => {
                agent.reconcile();
                if agent.has_closed_flows() {
                    sweep.reset_immediately();
                }
            }
            _ = answers.tick(), if agent.is_passive() => agent.look_at_answers(),
            _ = sweep.tick() => agent.sweep(&swept),
            Some(swept) = sweeps.recv() => agent.settle(swept),
        }
    }
    following.abort();
    info!("stopping; packets are balanced on, `slb unload` ends that");
    Ok(())
}

impl Agent {
    async fn start(
        config: Config,
        path: PathBuf,
        checkers: Checkers<u32>,
        orders: mpsc::UnboundedSender<Following>,
        requests: mpsc::Sender<Request>,
    ) -> Result<(Self, Follower), AgentError> {
        let datapath = Loaded::open(Pins::new(&config.gateway.pins), capacities(&config))?;
        let pins_lock = Lock::of_directory(&config.gateway.pins)?;
        let layout = Layout::new(&config, datapath.maps.installed())?;
        let following = Following::new(&config, &layout);
        let mut follower = Follower::open(following.clone()).await?;
        let mut agent = Self {
            started: Instant::now(),
            health: restored(&layout, datapath.maps.installed()),
            trusted: HashSet::new(),
            planner: Planner::default(),
            jiffies: Jiffies::from_kernel()?,
            checkers,
            departed: HashMap::new(),
            closing: HashMap::new(),
            sweeps: 0,
            suspicions: HashMap::new(),
            transitions: HashMap::new(),
            reloads: Reloads::new(orders, following),
            descriptors: Descriptors::count()?,
            http: None,
            requests,
            // What changed while no agent was looking, nobody has told the program.
            surroundings: follower.look(NetworkChange::EVERYTHING).await,
            attachments: Vec::new(),
            failures: Failures::default(),
            events: Events::default(),
            explainer: Arc::new(Explainer::open(&Pins::new(&config.gateway.pins))?),
            datapath,
            layout,
            config,
            path,
            _pins_lock: pins_lock,
        };
        agent.check_interfaces()?;
        agent.set()?;
        agent.apply()?;
        agent.attach()?;
        // In which mode, nobody knew before.
        agent.set()?;
        agent.apply()?;
        agent.datapath.detach_others(&agent.config.gateway.interfaces)?;
        agent.datapath.maps.next_route_epoch()?;
        follower.announce().await;
        agent.note_departed();
        // All that stays open is open now.
        agent.descriptors = Descriptors::count()?;
        agent.check_health();
        agent.serve_metrics();
        agent.log_datapath();
        follower.report();
        Ok((agent, follower))
    }

    /// What the program is told besides the maps.
    fn set(&mut self) -> Result<(), TableError> {
        let Gateway { no_listener, tunnel_source, .. } = &self.config.gateway;
        let generic = self.is_generic();
        let veth = self.surroundings.interfaces.iter().any(|(interface, _)| interface.is_veth);
        self.datapath.maps.set(|settings| {
            settings.no_listener = match no_listener {
                NoListener::Pass => NO_LISTENER_PASS,
                NoListener::Drop => NO_LISTENER_DROP,
                NoListener::Reset => NO_LISTENER_RESET,
            };
            settings.tunnel_v4 = IpAddr::from(tunnel_source.v4).into();
            settings.tunnel_v6 = IpAddr::from(tunnel_source.v6).into();
            settings.generic = generic.into();
            settings.veth = veth.into();
        })
    }

    /// Whether XDP is in generic mode somewhere.
    fn is_generic(&self) -> bool {
        self.attachments.iter().any(|(_, attachment)| attachment.mode == GENERIC)
    }

    fn log_datapath(&self) {
        let (flows, bytes) = self.datapath.flow_table();
        info!(flows, mebibytes = bytes >> 20, "flow table");
        for problem in self.flow_table_problem().iter().chain(self.datapath.warning()) {
            warn!("{problem}");
        }
    }

    fn flow_table_problem(&self) -> Option<String> {
        let (made, wanted) = (self.datapath.flow_table().0, self.config.gateway.flows);
        // Rounded up to whole buckets.
        (made != wanted.next_multiple_of(2)).then(|| {
            format!(
                "the flow table was made for {made} flows; gateway.flows = {wanted} takes effect \
                 after `slb unload`"
            )
        })
    }

    /// Whether every configured interface is there, and free or ours. Changes nothing.
    fn check_interfaces(&self) -> Result<(), LoadError> {
        let mut interfaces = self.config.gateway.interfaces.iter();
        interfaces.try_for_each(|name| self.check_interface(&self.surroundings, name))
    }

    fn check_interface(&self, around: &Surroundings, name: &str) -> Result<(), LoadError> {
        let (interface, present) = around.interface(name)?;
        self.datapath.check(interface, *present)
    }

    /// Attaches the program to each interface that does not have it: all of them at first, and later
    /// those that were deleted and made again, or that somebody has taken it from.
    fn attach(&mut self) -> Result<(), LoadError> {
        let mut result = Ok(());
        for name in self.config.gateway.interfaces.clone() {
            // One that fails is no reason to leave the others without.
            if let Err(error) = self.attach_to(&name) {
                result = Err(error);
            }
        }
        result
    }

    fn attach_to(&mut self, name: &str) -> Result<(), LoadError> {
        self.attachments.retain(|(known, _)| {
            known.name != name
                || self.surroundings.interfaces.iter().any(|(found, _)| found.index == known.index)
        });
        let (interface, present) = self.surroundings.interface(name)?.clone();
        let is_known = self.attachments.iter().any(|(known, _)| known.name == name);
        if is_known && self.datapath.is_attached(&interface)? {
            return Ok(());
        }
        self.attachments.retain(|(known, _)| known.name != name);
        let attachment = self.datapath.attach(&interface, self.config.gateway.xdp_mode, present)?;
        let Attachment { mode, reason } = &attachment;
        info!(interface = name, mode, reason, "XDP attached");
        self.attachments.push((interface, attachment));
        Ok(())
    }

    fn check_health(&mut self) {
        let targets = self.layout.targets.iter().enumerate().filter_map(|(index, target)| {
            let (check, addr) = target.check.as_ref()?;
            let (check, initial) = (Arc::new(check.clone()), self.health[index]);
            Some((target.id, health::Target { addr: *addr, check, initial }))
        });
        let targets: Vec<_> = targets.collect();
        self.descriptors.reserve(targets.len());
        self.checkers.set(targets);
    }

    /// Brings the maps in line with these transitions, and tells of them after that.
    fn health_changed(&mut self, events: Vec<health::Event<u32>>) {
        let decided = events.iter().map(|event| event.at).min();
        let known: Vec<_> = events
            .into_iter()
            .filter(|event| self.checkers.is_current(event))
            .filter_map(|event| {
                let mut targets = self.layout.targets.iter();
                Some((targets.position(|target| target.id == event.key)?, event))
            })
            .collect();
        for (target, event) in &known {
            self.health[*target] = event.health;
            self.trusted.remove(&event.key);
            *self.transitions.entry(event.key).or_default() += 1;
        }
        let is_done = self.reconcile();
        let after = decided.and_then(|at| at.elapsed().ok()).unwrap_or_default();
        known.iter().for_each(|(target, event)| self.report_health(*target, event));
        if is_done {
            info!(microseconds = after.as_micros(), "in effect after the deciding probe");
        }
    }

    fn report_health(&mut self, target: usize, event: &health::Event<u32>) {
        let (listener, backend) = self.describe(target);
        let reason = event.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        let health = event.health.label();
        self.events.note("health", format!("{listener}: {backend} is {health}{reason}"));
        if event.health == Health::Unhealthy {
            warn!(listener, backend, reason = event.reason, "backend is unhealthy");
        } else {
            info!(listener, backend, "backend is healthy");
        }
    }

    /// Listener and backend of a target, in words.
    fn describe(&self, target: usize) -> (String, String) {
        let place = self.layout.services.iter().find(|service| service.targets.contains(&target));
        let Some(service) = place else { return (String::new(), String::new()) };
        let instance = &self.config.instances[service.instance];
        let listener = &instance.listeners[service.listener];
        let target = &self.layout.targets[target];
        let backends = &instance.groups[listener.group].backends;
        let backend = target.backend.map_or("", |backend| &backends[backend].name);
        (
            format!("{} {}/{}", instance.name, listener.protocol, listener.port),
            format!("{backend} {}", target.addr),
        )
    }

    fn surroundings_changed(&mut self, surroundings: Surroundings) {
        if self.awaits(&surroundings) {
            return self.network_known(surroundings);
        }
        self.surroundings = surroundings;
        let result = self.attach();
        self.failures.note("XDP", result);
        let result = self.set();
        self.failures.note("settings", result);
        self.reconcile();
        // Last: what is looked up from now on depends on what has just been written.
        if self.surroundings.outdates_clients {
            self.failures.note("route epoch", self.datapath.maps.next_route_epoch());
        }
        self.surroundings.take();
    }

    /// Brings the maps in line, and says whether they are; what fails is tried again.
    fn reconcile(&mut self) -> bool {
        let result = self.apply();
        let is_done = result.is_ok();
        self.failures.note("maps", result);
        is_done
    }

    fn apply(&mut self) -> Result<(), TableError> {
        let interfaces = self.surroundings.interfaces.iter();
        let interfaces =
            interfaces.map(|(found, _)| (found.index, abi::Interface { redirect: 1 })).collect();
        let closing = self.closing.keys().copied().collect();
        let now = Inputs {
            health: &self.health,
            trusted: &self.trusted,
            ways: &self.surroundings.ways,
            generic: self.is_generic(),
            interfaces: &interfaces,
            locals: &self.surroundings.addresses,
            jiffies: self.jiffies,
            installed: self.datapath.maps.installed(),
            now: Instant::now(),
            moment: self.jiffies.now().unwrap_or_default(),
            closing: &closing,
        };
        let desired = self.planner.desired(&self.layout, now);
        let steps = plan(&desired, self.datapath.maps.installed());
        let writes = steps.len();
        for step in steps {
            self.datapath.maps.apply(step)?;
        }
        if writes > 0 {
            debug!(writes, "maps changed");
        }
        Ok(())
    }

    /// Listens where the configuration says, if not already.
    fn serve_metrics(&mut self) {
        let wanted = self.config.gateway.http;
        if self.http.as_ref().map(|(addr, _)| *addr) == wanted {
            return;
        }
        if let Some((_, task)) = self.http.take() {
            task.abort();
        }
        let result = wanted.map_or(Ok(None), |addr| {
            let most = self.descriptors.connections().clone();
            let task = api::serve_metrics(addr, self.requests.clone(), most)?;
            Ok::<_, HttpError>(Some((addr, task)))
        });
        self.failures.note("metrics", result.map(|http| self.http = http));
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = self.surroundings.problems.clone();
        problems.extend(self.datapath.warning().cloned());
        problems.extend(self.flow_table_problem());
        problems.extend(self.sourceless());
        problems.extend(self.lost_replies());
        problems.extend(self.descriptors.problem());
        problems.extend(self.failures.texts());
        problems.extend(self.reloads.refused.clone());
        problems
    }

    /// Without an address of the gateway as source nothing goes to a backend of full NAT.
    fn sourceless(&self) -> Option<String> {
        let installed = &self.datapath.maps.installed().backends;
        let is_sourceless = |backend: &&Backend| {
            backend.flags & BACKEND_IN_USE != 0 && backend.mode == MODE_FULL && backend.sources == 0
        };
        let count = installed.values().filter(is_sourceless).count();
        (count > 0).then(|| {
            format!(
                "{count} backends behind full NAT get no new flows (no_port): the kernel knows no \
                 address to reach them from, so look at its routes; or {MAX_SOURCES} sources are in \
                 the maps already, those of former configurations among them, which \
                 `slb unload` removes"
            )
        })
    }

    /// A reply that is left to the kernel has the VIP as its source: if that is an address of this
    /// host, IPv4 takes the packet for a forgery.
    fn lost_replies(&self) -> Vec<String> {
        let replies = self.datapath.maps.verdicts().unwrap_or_default();
        let left = replies
            .iter()
            .any(|(verdict, count)| *verdict == Verdict::RepliedByKernel && count.packets > 0);
        if !left || self.config.gateway.announce == Announce::None {
            return Vec::new();
        }
        // Those that replies come in by.
        let interfaces = self.surroundings.interfaces.iter().filter(|(interface, _)| {
            self.surroundings.ways.values().any(|way| way.hop.ifindex == interface.index)
        });
        local_source_problems(interfaces.map(|(interface, _)| interface.name.as_str()))
    }

    fn answer(&mut self, request: Request) {
        match request {
            // Who asked may have gone away.
            Request::Status(answer) => drop(answer.send(self.status())),
            Request::Events(after, answer) => drop(answer.send(self.events.after(after))),
            Request::Sight(answer) => drop(answer.send(self.sight())),
            Request::Reload(answer) => self.reload(Some(answer)),
            Request::Edit(edit, answer) => self.edit(edit, answer),
            Request::Plan(config, answer) => drop(answer.send(self.plan(&config))),
        }
    }
}

/// Waits for a moment; for ever if there is none.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

/// What the maps are made for, if this agent is the first.
fn capacities(config: &Config) -> Capacities {
    // Twice for the schedule before, twice for the swap, and as much again for what the file may grow
    // to.
    let chunks = (6 * chunks(config)).next_power_of_two().max(DEFAULT_CHUNKS);
    Capacities { flows: config.gateway.flows, chunks: chunks as u32 }
}

/// How many chunks of `SLB_SLOTS` the schedules take.
fn chunks(config: &Config) -> usize {
    let mut chunks = 0;
    for instance in &config.instances {
        let families = [true, false].map(|v4| instance.vips.iter().any(|vip| vip.is_ipv4() == v4));
        let families = families.into_iter().filter(|used| *used).count();
        for listener in &instance.listeners {
            let backends = instance.groups[listener.group].backends.len();
            let slots = match listener.scheduler {
                Scheduler::Tch | Scheduler::Sch | Scheduler::Qch => maglev::size_for(backends),
                Scheduler::Wrr => backends * 100,
                Scheduler::Rr | Scheduler::Wlc => backends,
            };
            chunks += families * slots.div_ceil(CHUNK_SLOTS);
        }
    }
    chunks
}

/// Health as an earlier agent has left it in the maps. Where it did not check a backend, there is none.
fn restored(layout: &Layout, installed: &State) -> Vec<Health> {
    let flags = |id| installed.backends.get(&id).map_or(0, |backend| backend.flags);
    layout
        .targets
        .iter()
        .map(|target| match flags(target.id) & (BACKEND_HEALTHY | BACKEND_UNHEALTHY) {
            _ if target.check.is_none() => Health::Unknown,
            BACKEND_HEALTHY => Health::Healthy,
            BACKEND_UNHEALTHY => Health::Unhealthy,
            _ => Health::Unknown,
        })
        .collect()
}
