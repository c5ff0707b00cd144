//! What the agent's loop publishes.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::{Instant, SystemTime},
};

use rustc_hash::FxHashMap;
use slb_api::{FlowTableStatus, InterfaceStatus, MapStatus, Problem, Repairs};

use crate::{
    config::Config,
    health::{self, Health},
    ids::Ids,
    observe::ClaimCounts,
    state::Schedule,
};

/// Everything that the agent's loop knows and readers need, as it was when something last changed. Never changed: the
/// next state is another snapshot.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The configuration in force.
    pub config: Arc<Config>,
    /// Its file.
    pub path: Arc<PathBuf>,
    /// Its indices into the maps.
    pub ids: Arc<Ids>,
    /// When the agent was started.
    pub started: Instant,
    /// Counts configurations; the first is 1.
    pub generation: u64,
    /// Configurations that were refused.
    pub reload_failures: u64,
    /// What was put right in the datapath.
    pub repairs: Repairs,
    /// Where XDP is attached.
    pub interfaces: Vec<InterfaceStatus>,
    /// Interfaces by which replies of backends come in that the kernel may have to forward; empty: its settings make no
    /// difference.
    pub reply_interfaces: Vec<String>,
    /// The flow table.
    pub flow_table: FlowTableStatus,
    /// Places of the flow table that hold an entry, as of the last look through it, and all places.
    pub places: [u64; 2],
    /// One per element of [`Ids::backends`].
    pub health: Arc<Vec<Health>>,
    /// By [`crate::ids::IndexedBackend::id`]; backends whose health has not changed are left out.
    pub history: Arc<FxHashMap<u32, History>>,
    /// What the maps hold.
    pub installed: Arc<Installed>,
    /// What the probes have found, by [`crate::ids::IndexedBackend::id`].
    pub probes: health::Statuses<u32>,
    /// How often other hosts have claimed VIPs; it grows without another snapshot.
    pub claims: ClaimCounts,
    /// What an operator should see to, the worst first.
    pub problems: Vec<Problem>,
}

impl Snapshot {
    /// An agent that has only read its configuration so far.
    #[must_use]
    pub fn new(config: Arc<Config>, path: Arc<PathBuf>, ids: Arc<Ids>) -> Self {
        Self {
            health: Arc::new(vec![Health::Unknown; ids.backends.len()]),
            config,
            path,
            ids,
            started: Instant::now(),
            generation: 1,
            reload_failures: 0,
            repairs: Repairs::default(),
            interfaces: Vec::new(),
            reply_interfaces: Vec::new(),
            flow_table: FlowTableStatus { capacity: 0, bytes: 0 },
            places: [0; 2],
            history: Arc::default(),
            installed: Arc::default(),
            probes: health::Statuses::default(),
            claims: ClaimCounts::default(),
            problems: Vec::new(),
        }
    }
}

/// How the health of a backend has changed since the agent started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct History {
    /// When it last did.
    pub since: SystemTime,
    /// How often it did.
    pub transitions: u64,
}

/// Part of new flows that backends are to get, by index into `SLB_BACKENDS`.
pub(super) type Shares = BTreeMap<u32, f64>;

/// What a schedule gives to backends. There may be millions of slots, so they are added up when first asked for.
#[derive(Debug)]
pub struct ScheduleShares {
    schedule: Arc<Schedule>,
    shares: OnceLock<Arc<Shares>>,
}

impl ScheduleShares {
    /// Those of a schedule.
    #[must_use]
    pub const fn new(schedule: Arc<Schedule>) -> Self {
        Self { schedule, shares: OnceLock::new() }
    }

    /// Of which schedule.
    #[must_use]
    pub const fn schedule(&self) -> &Arc<Schedule> {
        &self.schedule
    }

    pub(super) fn get(&self) -> &Arc<Shares> {
        self.shares.get_or_init(|| Arc::new(self.schedule.shares()))
    }
}

/// What the maps hold, as far as readers need it.
#[derive(Clone, Debug, Default)]
pub struct Installed {
    /// The listener of every backend that the maps have, those without a flow among them:
    /// [`slb_common::abi::Listener::id`] by index into `SLB_BACKENDS`, in ascending order.
    pub listeners: Vec<(u32, u32)>,
    /// When the flows of drained backends are ended, in jiffies; others are left out.
    pub closes: FxHashMap<u32, u32>,
    /// What each schedule gives to backends, by [`crate::ids::IndexedListener::id`].
    pub shares: FxHashMap<u32, Arc<ScheduleShares>>,
    /// How full the maps are.
    pub usage: Vec<MapStatus>,
}

impl Installed {
    /// One more than the highest index into `SLB_BACKENDS`.
    #[must_use]
    pub fn backends(&self) -> u32 {
        self.listeners.last().map_or(0, |(id, _)| id + 1)
    }
}
