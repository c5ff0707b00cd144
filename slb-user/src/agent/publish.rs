//! Publishes what the agent knows, for readers that do not wait for its loop.

use std::{sync::Arc, time::SystemTime};

use rustc_hash::{FxBuildHasher, FxHashMap};
use slb_api::{FlowTableStatus, InterfaceStatus, MapStatus, Problem, ProblemName, XdpMode};
use slb_common::abi::{Backend, BackendFlags, MAX_SOURCES, Mode, PLACES_PER_FLOW};
use tokio::sync::watch;

use super::Agent;
use crate::{
    config::Announce,
    datapath::Maps,
    net::GENERIC,
    observe::{Installed, ProblemLog, ScheduleShares, Snapshot},
};

/// Makes snapshots, and remembers what is the same in the next one.
pub(super) struct Publisher {
    snapshots: watch::Sender<Arc<Snapshot>>,
    problems: ProblemLog,
    /// What the maps hold, and [`Maps::revision`] then.
    installed: (u64, Arc<Installed>),
}

/// What the schedule of each listener gives to backends, by the listener's id.
type Shares = FxHashMap<u32, Arc<ScheduleShares>>;

impl Publisher {
    pub(super) fn new(first: Snapshot) -> Self {
        Self {
            snapshots: watch::Sender::new(Arc::new(first)),
            problems: ProblemLog::default(),
            // No maps have this revision.
            installed: (u64::MAX, Arc::default()),
        }
    }

    /// Where the latest snapshot is.
    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshots.subscribe()
    }

    fn installed(&mut self, maps: &Maps) -> Arc<Installed> {
        if self.installed.0 != maps.revision() {
            let shares = shares(maps, &self.installed.1.shares);
            self.installed = (maps.revision(), Arc::new(installed(maps, shares)));
        }
        Arc::clone(&self.installed.1)
    }
}

/// Those of `before`, where the schedule is the same: they may have been added up by now.
fn shares(maps: &Maps, before: &Shares) -> Shares {
    let listeners = &maps.installed().listeners;
    let mut shares = Shares::with_capacity_and_hasher(listeners.len(), FxBuildHasher);
    for listener in listeners.values() {
        shares.entry(listener.id).or_insert_with(|| {
            let known = before.get(&listener.id);
            let known = known.filter(|it| Arc::ptr_eq(it.schedule(), &listener.schedule));
            let new = || Arc::new(ScheduleShares::new(Arc::clone(&listener.schedule)));
            known.map_or_else(new, Arc::clone)
        });
    }
    shares
}

fn installed(maps: &Maps, shares: Shares) -> Installed {
    let backends = &maps.installed().backends;
    let usage = maps.usage().into_iter().map(|(name, used, capacity)| MapStatus {
        name: name.to_owned(),
        entries: Some(used as u64),
        capacity: capacity as u64,
    });
    Installed {
        listeners: backends.iter().map(|(&id, it)| (id, it.listener.into())).collect(),
        closes: backends
            .iter()
            .filter(|(_, backend)| backend.closes != 0)
            .map(|(&id, backend)| (id, backend.closes))
            .collect(),
        shares,
        usage: usage.collect(),
    }
}

impl Agent {
    /// Publishes the present state. Answers to commands are sent after that, so that who has one sees what it did.
    pub(super) fn publish(&mut self) {
        let problems = self.problems();
        let problems = self.publisher.problems.update(problems, SystemTime::now());
        let installed = self.publisher.installed(&self.datapath.maps);
        let (capacity, bytes) = self.datapath.flow_table();
        let snapshot = Snapshot {
            config: Arc::clone(&self.config),
            path: Arc::clone(&self.path),
            ids: Arc::clone(&self.backends.ids),
            started: self.started,
            generation: self.reloader.generation,
            reload_failures: self.reloader.failures,
            repairs: self.auditor.repairs,
            interfaces: self.interfaces(),
            reply_interfaces: self.reply_interfaces(),
            flow_table: FlowTableStatus { capacity, bytes },
            places: [self.sweeper.occupied, u64::from(capacity) * PLACES_PER_FLOW as u64],
            health: Arc::clone(&self.backends.health),
            history: Arc::clone(&self.backends.history),
            installed,
            probes: self.backends.probes.clone(),
            claims: self.claims.clone(),
            problems,
        };
        let before = self.publisher.snapshots.send_replace(Arc::new(snapshot));
        if !Arc::ptr_eq(&before.ids, &self.backends.ids) {
            // To free the ids of ten thousand backends takes a millisecond, and a command waits for its answer.
            tokio::task::spawn_blocking(move || drop(before));
        }
    }

    fn interfaces(&self) -> Vec<InterfaceStatus> {
        let attached =
            self.attacher.attached().iter().map(|(interface, attachment)| InterfaceStatus {
                name: interface.name.clone(),
                index: interface.index,
                mode: if attachment.mode == GENERIC { XdpMode::Generic } else { XdpMode::Native },
                reason: attachment.reason.clone(),
            });
        attached.collect()
    }

    /// Those that replies come in by; none if the VIPs are not this host's.
    fn reply_interfaces(&self) -> Vec<String> {
        if self.config.gateway.announce == Announce::None {
            return Vec::new();
        }
        let interfaces = self.network.interfaces.iter().filter(|(interface, _)| {
            self.network.routes.values().any(|route| route.hop.ifindex == interface.index)
        });
        interfaces.map(|(interface, _)| interface.name.clone()).collect()
    }

    fn problems(&self) -> Vec<Problem> {
        let mut problems = self.network.problems.clone();
        problems.extend(self.conflicts.borrow().iter().cloned());
        let warning = self.datapath.warning().cloned();
        problems.extend(warning.map(|text| Problem::new(ProblemName::PinsNotKept, text)));
        problems.extend(self.flow_table_problem());
        problems.extend(self.filling());
        problems.extend(self.sourceless());
        let short = self.descriptors.problem();
        problems.extend(short.map(|text| Problem::new(ProblemName::TooFewDescriptors, text)));
        problems.extend(self.failures.problems());
        problems.extend(self.auditor.problems());
        let refused = self.reloader.refused.clone();
        problems.extend(refused.map(|text| Problem::new(ProblemName::ReloadRefused, text)));
        problems
    }

    pub(super) fn flow_table_problem(&self) -> Option<Problem> {
        let (made, wanted) = (self.datapath.flow_table().0, self.config.gateway.flows);
        // Rounded up to whole buckets.
        (made != wanted.next_multiple_of(2)).then(|| {
            let text = format!(
                "the flow table was made for {made} flows; gateway.flows = {wanted} takes effect after `slb unload`"
            );
            Problem::new(ProblemName::FlowTableSize, text)
        })
    }

    fn filling(&self) -> Option<Problem> {
        let (flows, capacity) = (self.sweeper.filling?, self.datapath.flow_table().0);
        let text = format!(
            "the flow table holds {flows} flows and was made for {capacity} (gateway.flows): the more it holds above \
             that, the more new flows are dropped (table_full); raise gateway.flows, which takes effect after `slb unload`"
        );
        Some(Problem::new(ProblemName::FlowTableFilling, text))
    }

    /// Without an address of the gateway as source nothing goes to a backend of full NAT.
    fn sourceless(&self) -> Option<Problem> {
        let installed = &self.datapath.maps.installed().backends;
        let is_sourceless = |backend: &&Backend| {
            backend.flags.intersects(BackendFlags::IN_USE)
                && backend.mode == Mode::FULL
                && backend.sources == 0
        };
        let count = installed.values().filter(is_sourceless).count();
        (count > 0).then(|| {
            let text = format!(
                "{count} backends behind full NAT get no new flows (no_port): the kernel knows no address to reach them \
                 from, so look at its routes; or {MAX_SOURCES} sources are in the maps already, those of former \
                 configurations among them, which `slb unload` removes"
            );
            Problem::new(ProblemName::NoSourceAddress, text)
        })
    }
}
