//! The agent: turns changes of health and network into map writes, for as long as it lives.
//!
//! It owns all state; everything else is asked by message. Nothing that it does is undone when it
//! ends: the datapath goes on, and the next agent starts from what it finds in the maps.

mod lock;
mod status;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use slb_common::abi::{
    BACKEND_HEALTHY, BACKEND_UNHEALTHY, CHUNK_SLOTS, DEFAULT_CHUNKS, Hop, Interface,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::MissedTickBehavior,
};
use tracing::{debug, error, info, warn};

pub use lock::{Lock, LockError};

use crate::{
    api::{self, ApiError, Request},
    clock::Jiffies,
    config::{Announce, Config, Scheduler},
    datapath::{Attachment, Capacities, LoadError, Loaded, Pins, TableError},
    desired::{Circumstances, Planner},
    health::{self, Checkers, Health},
    layout::{Layout, LayoutError},
    net::{Announcer, KEEP_INTERVAL, Keeper, Network, NextHop, forwarding_problems},
    plan::plan,
    schedule::maglev,
    state::State,
};

/// The pause before writes that failed are tried again.
const RETRY: Duration = Duration::from_secs(1);

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
    checkers: Checkers<usize>,
    network: Network,
    keeper: Keeper,
    announcer: Announcer,
    hops: HashMap<IpAddr, Hop>,
    interfaces: BTreeMap<u32, Interface>,
    attachments: Vec<(String, u32, Attachment)>,
    /// What could not be done and is tried again, by what it is.
    failures: BTreeMap<&'static str, String>,
}

/// Runs the agent until it is told to stop. `ready` is called when packets are balanced.
///
/// # Errors
///
/// [`AgentError`]; what an earlier agent has set up goes on as it is.
pub async fn run(config: Config, path: &Path, ready: impl FnOnce()) -> Result<(), AgentError> {
    let lock = Lock::take(&config.gateway.api)?;
    let (requests, mut requested) = mpsc::channel(16);
    let (events, mut transitions) = mpsc::unbounded_channel();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let mut agent = Agent::start(config, path.to_owned(), Checkers::new(events)).await?;
    api::serve(&agent.config.gateway.api, requests)?;
    ready();

    let mut housekeeping = tokio::time::interval(KEEP_INTERVAL);
    housekeeping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut retry = tokio::time::interval(RETRY);
    retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            // A failed backend does not wait for anything else.
            biased;
            Some(event) = transitions.recv() => {
                agent.transition(event);
                while let Ok(event) = transitions.try_recv() {
                    agent.transition(event);
                }
                agent.reconcile();
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            change = agent.network.changed() => agent.network_changed(change).await,
            Some(request) = requested.recv() => agent.answer(request),
            _ = housekeeping.tick() => agent.keep_neighbours().await,
            _ = retry.tick(), if !agent.failures.is_empty() => agent.retry().await,
        }
    }
    info!("stopping; packets are balanced on, `slb unload` ends that");
    drop(lock);
    Ok(())
}

impl Agent {
    async fn start(
        config: Config,
        path: PathBuf,
        checkers: Checkers<usize>,
    ) -> Result<Self, AgentError> {
        let datapath = Loaded::open(Pins::new(&config.gateway.pins), capacities(&config))?;
        let layout = Layout::new(&config, datapath.maps.installed())?;
        let health = restored(&layout, datapath.maps.installed());
        let network = Network::open().await?;
        let mut agent = Self {
            started: Instant::now(),
            layout,
            planner: Planner::default(),
            jiffies: Jiffies::from_kernel()?,
            health,
            checkers,
            keeper: Keeper::new(&network),
            announcer: Announcer::new(&network),
            network,
            hops: HashMap::new(),
            interfaces: BTreeMap::new(),
            attachments: Vec::new(),
            failures: BTreeMap::new(),
            datapath,
            config,
            path,
        };
        agent.log_flow_table();
        agent.look_at_interfaces();
        agent.resolve().await?;
        // What changed while no agent was looking, nobody has told the program.
        agent.datapath.maps.next_route_epoch()?;
        agent.apply()?;
        agent.attach().await?;
        agent.announce().await;
        agent.check_health();
        Ok(agent)
    }

    fn log_flow_table(&self) {
        let (entries, bytes) = self.datapath.flow_table();
        info!(flows = entries / 2, mebibytes = bytes >> 20, "flow table");
        if entries / 2 != self.config.gateway.flows {
            warn!("{}", self.flow_table_problem());
        }
    }

    fn flow_table_problem(&self) -> String {
        format!(
            "the flow table was made for {} flows; gateway.flows = {} takes effect after `slb unload`",
            self.datapath.flow_table().0 / 2,
            self.config.gateway.flows
        )
    }

    fn look_at_interfaces(&mut self) {
        self.interfaces = self
            .config
            .gateway
            .interfaces
            .iter()
            .filter_map(|name| self.network.interface(name))
            .map(|found| (found.index, Interface { mac: found.mac, redirect: 1 }))
            .collect();
    }

    async fn attach(&mut self) -> Result<(), AgentError> {
        self.datapath.detach_others(&self.config.gateway.interfaces)?;
        for name in self.config.gateway.interfaces.clone() {
            let interface = self
                .network
                .interface(&name)
                .ok_or_else(|| LoadError::NoInterface(name.clone()))?;
            let attached = self.network.xdp(interface.index).await?;
            let mode = self.config.gateway.xdp_mode;
            let fresh = self.datapath.attach(&name, mode, attached.map(|xdp| xdp.program))?;
            let attachment = match (fresh, attached) {
                (Some(fresh), _) => fresh,
                (None, attached) => Attachment {
                    mode: attached.map_or("native", |xdp| xdp.mode),
                    reason: Some("attached by an earlier agent".to_owned()),
                },
            };
            info!(
                interface = name,
                mode = attachment.mode,
                reason = attachment.reason,
                "XDP attached"
            );
            self.attachments.push((name, interface.index, attachment));
        }
        Ok(())
    }

    fn check_health(&mut self) {
        let targets = self.layout.targets.iter().enumerate().filter_map(|(index, target)| {
            let (check, addr) = target.check.as_ref()?;
            let (check, initial) = (Arc::new(check.clone()), self.health[index]);
            Some((index, health::Target { addr: *addr, check, initial }))
        });
        self.checkers.set(targets.collect::<Vec<_>>());
    }

    fn transition(&mut self, event: health::Event<usize>) {
        self.health[event.key] = event.health;
        let (listener, backend) = self.describe(event.key);
        match event.health {
            Health::Unhealthy => {
                warn!(listener, backend, reason = event.reason, "backend is unhealthy");
            }
            _ => info!(listener, backend, "backend is healthy"),
        }
    }

    /// Listener and backend of a target, in words.
    fn describe(&self, target: usize) -> (String, String) {
        let place = self.layout.services.iter().find(|service| service.targets.contains(&target));
        let Some(service) = place else { return (String::new(), String::new()) };
        let instance = &self.config.instances[service.instance];
        let listener = &instance.listeners[service.listener];
        let target = &self.layout.targets[target];
        let backend = &instance.groups[listener.group].backends[target.backend];
        (
            format!("{} {}/{}", instance.name, listener.protocol, listener.port),
            format!("{} {}", backend.name, target.addr),
        )
    }

    async fn network_changed(&mut self, change: crate::net::NetworkChange) {
        debug!(?change, "the kernel's network has changed");
        self.look_at_interfaces();
        if change.outdates_answers() {
            let result = self.datapath.maps.next_route_epoch();
            self.note("route epoch", result);
        }
        let result = self.resolve().await;
        self.note("next hops", result);
        self.reconcile();
        if change.links || change.addresses {
            self.announce().await;
        }
    }

    /// Asks the kernel for the way to every backend.
    async fn resolve(&mut self) -> Result<(), crate::net::Error> {
        let addresses: HashSet<IpAddr> =
            self.layout.targets.iter().map(|target| target.addr.ip()).collect();
        let answers = self.network.resolve_all(&addresses.into_iter().collect::<Vec<_>>()).await?;
        self.hops = answers
            .iter()
            .filter_map(|(&addr, hop)| match *hop {
                NextHop::Resolved { ifindex, dst_mac, src_mac, .. } => {
                    Some((addr, Hop { ifindex, dst_mac, src_mac }))
                }
                _ => None,
            })
            .collect();
        let neighbours = answers
            .values()
            .filter_map(NextHop::neighbour)
            .filter(|(index, _)| self.interfaces.contains_key(index))
            .collect();
        let result = self.keeper.keep(&neighbours).await;
        self.note("neighbours", result);
        Ok(())
    }

    async fn keep_neighbours(&mut self) {
        let result = self.resolve().await;
        self.note("next hops", result);
        self.reconcile();
    }

    async fn announce(&mut self) {
        let vips: Vec<IpAddr> = match self.config.gateway.announce {
            Announce::Arp => {
                self.config.instances.iter().flat_map(|instance| instance.vips.clone()).collect()
            }
            Announce::None => Vec::new(),
        };
        let names = &self.config.gateway.interfaces;
        let interfaces: Vec<_> =
            names.iter().filter_map(|name| self.network.interface(name)).collect();
        let result = self.announcer.set(&vips, &interfaces).await;
        if let Ok(done) = &result
            && !done.announced.is_empty()
        {
            info!(vips = ?done.announced, "announced");
        }
        self.note("VIPs", result.map(drop));
    }

    async fn retry(&mut self) {
        self.network_changed(crate::net::NetworkChange::EVERYTHING).await;
    }

    /// Brings the maps in line; what fails is tried again later.
    fn reconcile(&mut self) {
        let result = self.apply();
        self.note("maps", result);
    }

    fn apply(&mut self) -> Result<(), TableError> {
        let desired = self.desired();
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

    fn desired(&mut self) -> State {
        let now = Circumstances {
            health: &self.health,
            hops: &self.hops,
            interfaces: &self.interfaces,
            jiffies: self.jiffies,
        };
        self.planner.desired(&self.layout, now)
    }

    fn note<E: std::error::Error>(&mut self, what: &'static str, result: Result<(), E>) {
        match result {
            Ok(()) => {
                if self.failures.remove(what).is_some() {
                    info!("{what}: all right again");
                }
            }
            Err(error) => {
                let causes =
                    std::iter::successors(Some(&error as &dyn std::error::Error), |error| {
                        error.source()
                    });
                let text = causes.map(ToString::to_string).collect::<Vec<_>>().join(": ");
                if self.failures.get(what) != Some(&text) {
                    error!("{what}: {text}; trying again");
                }
                self.failures.insert(what, text);
            }
        }
    }

    fn problems(&self) -> Vec<String> {
        let names = &self.config.gateway.interfaces;
        let interfaces: Vec<_> =
            names.iter().filter_map(|name| self.network.interface(name)).collect();
        let mut problems = forwarding_problems(&interfaces);
        if self.datapath.flow_table().0 / 2 != self.config.gateway.flows {
            problems.push(self.flow_table_problem());
        }
        problems.extend(self.failures.iter().map(|(what, text)| format!("{what}: {text}")));
        problems
    }

    fn answer(&self, request: Request) {
        match request {
            // Who asked may have gone away.
            Request::Status(answer) => drop(answer.send(self.status())),
        }
    }
}

/// What the maps are made for, if this agent is the first.
fn capacities(config: &Config) -> Capacities {
    let mut chunks = 0;
    for instance in &config.instances {
        let families = [true, false].map(|v4| instance.vips.iter().any(|vip| vip.is_ipv4() == v4));
        let families = families.into_iter().filter(|used| *used).count();
        for listener in &instance.listeners {
            let backends = instance.groups[listener.group].backends.len();
            let slots = match listener.scheduler {
                Scheduler::Tch => maglev::size_for(backends),
                Scheduler::Wrr => backends * 100,
            };
            chunks += families * slots.div_ceil(CHUNK_SLOTS);
        }
    }
    // Twice for the swap, and as much again for what the file may grow to.
    let chunks = (3 * chunks).next_power_of_two().max(DEFAULT_CHUNKS);
    Capacities { flow_entries: config.gateway.flows.saturating_mul(2), chunks: chunks as u32 }
}

/// Health as an earlier agent has left it in the maps.
fn restored(layout: &Layout, installed: &State) -> Vec<Health> {
    let flags = |id| installed.backends.get(&id).map_or(0, |backend| backend.flags);
    layout
        .targets
        .iter()
        .map(|target| match flags(target.id) & (BACKEND_HEALTHY | BACKEND_UNHEALTHY) {
            BACKEND_HEALTHY => Health::Healthy,
            BACKEND_UNHEALTHY => Health::Unhealthy,
            _ => Health::Unknown,
        })
        .collect()
}
