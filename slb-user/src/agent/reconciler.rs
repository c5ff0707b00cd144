//! Brings the maps in line with the configuration, health and network.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use rustc_hash::{FxHashMap, FxHashSet};
use slb_common::abi::{
    BackendFlags, CHUNK_SLOTS, DEFAULT_CHUNKS, Flow, NO_LISTENER_DROP, NO_LISTENER_PASS,
    NO_LISTENER_RESET, Settings,
};
use tracing::debug;

use super::{SWEEP_SLACK, backends::Backends, watcher::NetworkSnapshot};
use crate::{
    clock::Jiffies,
    config::{Config, Gateway, NoListener, Scheduler},
    datapath::{Applied, Capacities, Maps, TableError},
    ids::Ids,
    plan::{Step, plan, plan_part},
    planner::{self, Inputs, Planner},
    schedule::maglev,
    state::{Schedule, State},
};

/// For how long the packets of a connection that was ended are answered with resets.
pub(super) const CLOSING: Duration = Duration::from_secs(5);

/// The maps, as far as a plan is carried out on them.
pub(super) trait Tables {
    /// [`Maps::installed`].
    fn installed(&self) -> &State;
    /// [`Maps::revision`].
    fn revision(&self) -> u64;
    /// [`Maps::settings`].
    fn settings(&self) -> Settings;
    /// [`Maps::apply`].
    fn apply(&mut self, step: Step) -> Result<Applied, TableError>;
}

impl Tables for Maps {
    fn installed(&self) -> &State {
        self.installed()
    }

    fn revision(&self) -> u64 {
        self.revision()
    }

    fn settings(&self) -> Settings {
        self.settings()
    }

    fn apply(&mut self, step: Step) -> Result<Applied, TableError> {
        self.apply(step)
    }
}

/// Plans what the maps are to hold, and writes what differs.
pub(super) struct Reconciler {
    planner: Planner,
    jiffies: Jiffies,
    /// Backends of which some connections are being reset, and until when.
    closing: FxHashMap<u32, Instant>,
    /// When the maps take what they did not take yet.
    later: Option<Instant>,
    /// [`Maps::revision`] when they last held all that was planned.
    in_line: Option<u64>,
}

impl Reconciler {
    pub(super) fn new(jiffies: Jiffies) -> Self {
        Self {
            planner: Planner::default(),
            jiffies,
            closing: FxHashMap::default(),
            later: None,
            in_line: None,
        }
    }

    /// Writes what the program is told besides its tables.
    pub(super) fn set(
        maps: &mut Maps,
        config: &Config,
        network: &NetworkSnapshot,
        is_generic: bool,
    ) -> Result<(), TableError> {
        let Gateway { no_listener, vlans, tunnel_source, seed, .. } = &config.gateway;
        maps.serve_vlans(vlans.as_ref())?;
        let veth = network.interfaces.iter().any(|(interface, _)| interface.is_veth);
        maps.set(|settings| {
            settings.no_listener = match no_listener {
                NoListener::Pass => NO_LISTENER_PASS,
                NoListener::Drop => NO_LISTENER_DROP,
                NoListener::Reset => NO_LISTENER_RESET,
            };
            settings.tunnel_v4 = IpAddr::from(tunnel_source.v4).into();
            settings.tunnel_v6 = IpAddr::from(tunnel_source.v6).into();
            settings.generic = is_generic.into();
            settings.veth = veth.into();
            if let Some(shared) = seed {
                settings.seed = shared.seed();
            }
        })
    }

    /// Brings the maps in line.
    pub(super) fn apply(
        &mut self,
        maps: &mut impl Tables,
        backends: &Backends,
        network: &NetworkSnapshot,
        is_generic: bool,
    ) -> Result<(), TableError> {
        let served = network.interfaces.iter().map(|(found, _)| found);
        let interfaces = planner::interfaces(served, &maps.installed().interfaces);
        let closing = self.closing.keys().copied().collect();
        let inputs = Inputs {
            health: &backends.health,
            trusted: &backends.trusted,
            routes: &network.routes,
            generic: is_generic,
            interfaces: &interfaces,
            ingress: &network.ingress,
            locals: &network.addresses,
            jiffies: self.jiffies,
            installed: maps.installed(),
            now: Instant::now(),
            moment: self.jiffies.now().unwrap_or_default(),
            closing: &closing,
            seed: maps.settings().seed,
        };
        let is_in_line = self.in_line.take() == Some(maps.revision());
        let part = if is_in_line { self.planner.desired_part(&backends.ids, inputs) } else { None };
        let steps = match part {
            Some(part) => plan_part(&part, maps.installed()),
            None => plan(&self.planner.desired(&backends.ids, inputs), maps.installed()),
        };
        let writes = steps.len();
        self.later = None;
        for step in steps {
            if let Applied::Later(at) = maps.apply(step)? {
                self.later = self.later.max(Some(at));
            }
        }
        if writes > 0 {
            debug!(writes, "maps changed");
        }
        self.in_line = self.later.is_none().then(|| maps.revision());
        Ok(())
    }

    /// When the maps have to be brought in line again although nothing else changes.
    pub(super) fn due(&self) -> Option<Instant> {
        self.planner.due().into_iter().chain(self.later).min()
    }

    /// Forgets the schedules of listeners that `ids` does not have.
    pub(super) fn keep(&mut self, ids: &Ids) {
        self.planner.keep(ids);
    }

    /// The schedules of which slots may be settled, by the id of their listener.
    pub(super) fn watched(&self) -> FxHashMap<u32, Arc<Schedule>> {
        self.planner.watched()
    }

    /// Settles the slots of a listener that no entry differs from.
    pub(super) fn settle(&mut self, id: u32, schedule: &Arc<Schedule>, pinned: &FxHashSet<usize>) {
        self.planner.settle(id, schedule, pinned);
    }

    /// From now on the packets of these connections are answered with resets, for [`CLOSING`].
    pub(super) fn close(&mut self, ended: &[Flow]) {
        let until = Instant::now() + CLOSING;
        self.closing.extend(ended.iter().map(|flow| (flow.backend, until)));
    }

    /// Whether a backend's connections need no answer any more.
    pub(super) fn end_closing(&mut self) -> bool {
        let (now, known) = (Instant::now(), self.closing.len());
        self.closing.retain(|_, until| *until > now);
        self.closing.len() != known
    }

    /// The backends that were removed so long ago that all flows that they still have left an entry.
    pub(super) fn leaving(maps: &Maps, backends: &Backends) -> FxHashSet<u32> {
        let Backends { ids, orphaned, .. } = backends;
        let indexed = ids.listeners.iter().flat_map(|listener| {
            let indexed = ids.backends[listener.backends.clone()].iter();
            indexed.map(move |backend| (backend.id, listener.idle_timeout + SWEEP_SLACK))
        });
        indexed
            .filter(|(id, idle)| orphaned.get(id).is_some_and(|since| since.elapsed() > *idle))
            .map(|(id, _)| id)
            .chain(Self::closed(maps).into_iter().filter(|id| orphaned.contains_key(id)))
            .collect()
    }

    /// The backends that are drained, and whose time is up.
    pub(super) fn closed(maps: &Maps) -> FxHashSet<u32> {
        const CLOSED: BackendFlags = BackendFlags::CLOSED.union(BackendFlags::IN_USE);
        let backends = maps.installed().backends.iter();
        backends.filter(|(_, backend)| backend.flags.contains(CLOSED)).map(|(&id, _)| id).collect()
    }
}

/// What the maps are made for, if this agent is the first.
pub(super) fn capacities(config: &Config) -> Capacities {
    // Twice for the schedule before, twice for the swap, and as much again for what the file may grow
    // to.
    let chunks = (6 * chunks(config)).next_power_of_two().max(DEFAULT_CHUNKS);
    Capacities { flows: config.gateway.flows, chunks: chunks as u32 }
}

/// How many chunks of `SLB_SLOTS` the schedules take.
pub(super) fn chunks(config: &Config) -> usize {
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

#[cfg(test)]
mod tests;
