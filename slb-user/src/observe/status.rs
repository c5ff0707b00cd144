//! Makes a status of a snapshot and of what was measured at the same time. Pure.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Instant, SystemTime},
};

use rustc_hash::FxHashMap;
use slb_api::{
    BackendStatus, Drop, Health, InstanceStatus, LastProbe, ListenerStatus, MapStatus, Problem,
    Protocol, Rates, Role, Scheduler, Status, VerdictCount,
};
use slb_common::{
    abi::{Counter, Traffic},
    verdict::{Action, Verdict},
};

use super::{
    Snapshot,
    rates::{self, Sample},
    snapshot::Shares,
};
use crate::{
    clock::Jiffies,
    config::{Forwarding, Group, Instance, Listener},
    health,
    ids::{self, IndexedBackend, IndexedListener},
    log,
};

/// What was measured.
pub(super) struct Measured<'a> {
    pub sample: Sample,
    /// An earlier sample, to tell rates.
    pub before: Option<Sample>,
    pub verdicts: Vec<(Verdict, Counter)>,
    /// Of one backend.
    pub active: &'a dyn Fn(u32) -> u64,
    pub jiffies: Jiffies,
    /// In jiffies; `None`: the clock cannot be read.
    pub now: Option<u32>,
}

/// The status of the agent.
pub(super) fn status(
    snapshot: &Snapshot,
    measured: &Measured<'_>,
    problems: Vec<Problem>,
) -> Status {
    let mut maps = snapshot.installed.usage.clone();
    maps.push(MapStatus {
        name: "SLB_FLOWS".to_owned(),
        entries: Some(snapshot.places[0]),
        capacity: snapshot.places[1],
    });
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        config: snapshot.path.display().to_string(),
        generation: snapshot.generation,
        reload_failures: snapshot.reload_failures,
        repairs: snapshot.repairs,
        uptime_seconds: snapshot.started.elapsed().as_secs(),
        interfaces: snapshot.interfaces.clone(),
        flow_table: snapshot.flow_table.clone(),
        instances: Reader::new(snapshot, measured).instances(),
        verdicts: verdicts(&measured.verdicts),
        drops: drops(&measured.verdicts),
        maps,
        vip_claims: vip_claims(snapshot),
        log_lines_dropped: log::dropped_lines(),
        problems,
    }
}

/// Of every VIP, so that a counter begins at 0.
fn vip_claims(snapshot: &Snapshot) -> BTreeMap<String, u64> {
    let counts = snapshot.claims.all();
    let vips = snapshot.config.instances.iter().flat_map(|instance| &instance.vips);
    vips.map(|vip| (vip.to_string(), counts.get(vip).copied().unwrap_or(0))).collect()
}

fn given(verdicts: &[(Verdict, Counter)]) -> impl Iterator<Item = &(Verdict, Counter)> {
    verdicts.iter().filter(|(_, count)| count.packets > 0)
}

fn verdicts(verdicts: &[(Verdict, Counter)]) -> BTreeMap<String, VerdictCount> {
    let counts = given(verdicts).map(|(verdict, Counter { packets, bytes })| {
        (verdict.label().to_owned(), VerdictCount { packets: *packets, bytes: *bytes })
    });
    counts.collect()
}

/// The datapath counts drops for the gateway as a whole.
fn drops(verdicts: &[(Verdict, Counter)]) -> Vec<Drop> {
    let dropped = given(verdicts).filter(|(verdict, _)| verdict.action() == Action::Drop);
    let mut drops: Vec<Drop> = dropped
        .map(|(verdict, Counter { packets, bytes })| Drop {
            verdict: verdict.label().to_owned(),
            listener: None,
            packets: *packets,
            bytes: *bytes,
        })
        .collect();
    drops.sort_by_key(|drop| std::cmp::Reverse(drop.packets));
    drops
}

/// Counters of a backend, or of several.
#[derive(Clone, Copy, Default)]
struct Sums {
    now: Traffic,
    before: Traffic,
}

/// Which of the counters tell something.
#[derive(Clone, Copy)]
struct Counted {
    flows: bool,
    replies: bool,
}

impl Counted {
    fn of(listener: &Listener, group: &Group) -> Self {
        // The datapath does not see when a flow of UDP begins that needs no entry.
        let is_plain_udp = listener.protocol == Protocol::Udp
            && listener.scheduler.is_by_hash()
            && group.forwarding != Forwarding::FullNat;
        let returns = matches!(group.forwarding, Forwarding::Nat | Forwarding::FullNat);
        Self { flows: !is_plain_udp, replies: returns }
    }

    /// The number of flows, or of packets where flows are not counted.
    const fn unit(self, traffic: &Traffic) -> u64 {
        if self.flows { traffic.flows } else { traffic.packets }
    }
}

struct Reader<'a> {
    snapshot: &'a Snapshot,
    measured: &'a Measured<'a>,
    /// Between the two samples; `None`: there is only one.
    seconds: Option<f64>,
    /// By the index of their instance and of their listener in it.
    listeners: FxHashMap<(usize, usize), Vec<&'a IndexedListener>>,
    /// By [`IndexedListener::id`]. What was a listener's backend's once is still the listener's.
    by_listener: FxHashMap<u32, Sums>,
}

impl<'a> Reader<'a> {
    fn new(snapshot: &'a Snapshot, measured: &'a Measured<'a>) -> Self {
        let mut listeners = FxHashMap::<_, Vec<_>>::default();
        for indexed in &snapshot.ids.listeners {
            listeners.entry((indexed.instance, indexed.listener)).or_default().push(indexed);
        }
        let since = measured.before.as_ref().map(|before| before.at);
        let seconds = since.map(|at: Instant| measured.sample.at.duration_since(at).as_secs_f64());
        let mut reader =
            Self { snapshot, measured, seconds, listeners, by_listener: FxHashMap::default() };
        for &(backend, listener) in &snapshot.installed.listeners {
            let Sums { now, before } = reader.sums(backend);
            let sums = reader.by_listener.entry(listener).or_default();
            sums.now += now;
            sums.before += before;
        }
        reader
    }

    fn sums(&self, backend: u32) -> Sums {
        let of = |sample: &Sample| sample.traffic.get(backend as usize).copied();
        let now = of(&self.measured.sample).unwrap_or_default();
        // What was not there before had no traffic.
        let before = self.measured.before.as_ref().and_then(of).unwrap_or_default();
        Sums { now, before }
    }

    fn instances(&self) -> Vec<InstanceStatus> {
        let instances = self.snapshot.config.instances.iter().enumerate();
        instances
            .map(|(index, instance)| InstanceStatus {
                name: instance.name.clone(),
                vips: instance.vips.clone(),
                listeners: (0..instance.listeners.len())
                    .map(|listener| self.listener(index, instance, listener))
                    .collect(),
            })
            .collect()
    }

    fn listener(&self, index: usize, instance: &Instance, at: usize) -> ListenerStatus {
        let listener = &instance.listeners[at];
        let group = &instance.groups[listener.group];
        let counted = Counted::of(listener, group);
        let listeners = self.listeners.get(&(index, at)).map_or(&[][..], Vec::as_slice);
        let mut sums = Sums::default();
        let mut backends = Vec::new();
        for indexed in listeners {
            let found = self.by_listener.get(&indexed.id).copied().unwrap_or_default();
            sums.now += found.now;
            sums.before += found.before;
            self.backends(indexed, group, counted, &mut backends);
        }
        let Traffic { flows, packets, bytes, reply_packets, reply_bytes } = sums.now;
        ListenerStatus {
            protocol: listener.protocol,
            port: listener.port,
            group: group.label().to_owned(),
            scheduler: listener.scheduler,
            enabled: listener.enabled,
            persistence_seconds: listener.persistence.map(|kept| kept.as_secs()),
            flows: counted.flows.then_some(flows),
            packets,
            bytes,
            reply_packets: counted.replies.then_some(reply_packets),
            reply_bytes: counted.replies.then_some(reply_bytes),
            rates: self.rates(&sums, counted),
            backends,
        }
    }

    fn backends(
        &self,
        listener: &IndexedListener,
        group: &Group,
        counted: Counted,
        backends: &mut Vec<BackendStatus>,
    ) {
        let indexed = &self.snapshot.ids.backends[listener.backends.clone()];
        let shares = self.snapshot.installed.shares.get(&listener.id).map(|shares| shares.get());
        let shares = shares.map(|shares| match listener.scheduler {
            Scheduler::Wlc => Arc::new(by_weight(shares, indexed)),
            _ => Arc::clone(shares),
        });
        let units = |backend: &IndexedBackend| counted.unit(&self.sums(backend.id).now);
        let all: u64 = indexed.iter().map(units).sum();
        for index in listener.backends.clone() {
            let backend = &self.snapshot.ids.backends[index];
            let share = (all > 0).then(|| units(backend) as f64 / all as f64);
            let mut status = self.backend(index, group, counted);
            if let Some(shares) = &shares {
                status.active = shares.contains_key(&backend.id);
                status.expected_share = Some(shares.get(&backend.id).copied().unwrap_or_default());
            }
            backends.push(BackendStatus { share, ..status });
        }
    }

    /// A backend without its shares.
    fn backend(&self, index: usize, group: &Group, counted: Counted) -> BackendStatus {
        let Snapshot { ids, health, history, installed, probes, .. } = self.snapshot;
        let indexed = &ids.backends[index];
        let probe = probes.get(&indexed.id);
        let failure = probe.as_ref().and_then(|probe| probe.last_failure.as_ref());
        let history = history.get(&indexed.id);
        let sums = self.sums(indexed.id);
        let Traffic { flows, packets, bytes, reply_packets, reply_bytes } = sums.now;
        let member = indexed.backend.map(|at| &group.backends[at]);
        BackendStatus {
            name: member.map_or_else(|| indexed.addr.ip().to_string(), |it| it.name.clone()),
            role: role(indexed),
            endpoint: indexed.addr,
            // That of one that is drained counts as 0.
            weight: member.map(|member| member.weight.into()),
            health: self::health(indexed, health[index]),
            health_since: history.map(|history| seconds(history.since)),
            last_probe: probe.as_ref().and_then(|probe| {
                let last = probe.last.as_ref()?;
                Some(LastProbe {
                    at_seconds: seconds(last.at),
                    duration_seconds: last.duration.as_secs_f64(),
                    error: last.failure.clone(),
                })
            }),
            transitions: history.map_or(0, |history| history.transitions),
            reason: failure
                .filter(|_| health[index] != health::Health::Healthy)
                .map(|failure| failure.reason.clone()),
            active: false,
            expected_share: None,
            share: None,
            drains: indexed.drains,
            closes_in_seconds: installed.closes.get(&indexed.id).and_then(|closes| {
                let left = closes.wrapping_sub(self.measured.now?) as i32;
                Some(self.measured.jiffies.to_duration(left.max(0) as u32).as_secs_f64())
            }),
            active_flows: (self.measured.active)(indexed.id),
            flows: counted.flows.then_some(flows),
            packets,
            bytes,
            reply_packets: counted.replies.then_some(reply_packets),
            reply_bytes: counted.replies.then_some(reply_bytes),
            rates: self.rates(&sums, counted),
        }
    }

    fn rates(&self, sums: &Sums, counted: Counted) -> Option<Rates> {
        let rates = rates::between(&sums.before, &sums.now, self.seconds?)?;
        Some(Rates {
            flows: rates.flows.filter(|_| counted.flows),
            reply_packets: rates.reply_packets.filter(|_| counted.replies),
            reply_bytes: rates.reply_bytes.filter(|_| counted.replies),
            ..rates
        })
    }
}

/// Shares in proportion to the weights: a schedule of `wlc` has each backend once.
fn by_weight(shares: &Shares, backends: &[IndexedBackend]) -> Shares {
    let weights = backends.iter().map(|backend| (backend.id, f64::from(backend.weight)));
    let weights: Shares = weights.filter(|(id, _)| shares.contains_key(id)).collect();
    let all: f64 = weights.values().sum();
    if all > 0.0 {
        weights.into_iter().map(|(id, weight)| (id, weight / all)).collect()
    } else {
        shares.clone()
    }
}

const fn role(backend: &IndexedBackend) -> Role {
    match backend.role {
        ids::Role::Member if backend.is_orphaned() => Role::Removed,
        ids::Role::Member => Role::Member,
        ids::Role::Primary => Role::Primary,
        ids::Role::Secondary => Role::Secondary,
    }
}

const fn health(backend: &IndexedBackend, health: health::Health) -> Health {
    match health {
        _ if backend.check.is_none() => Health::Unchecked,
        health::Health::Healthy => Health::Healthy,
        health::Health::Unhealthy => Health::Unhealthy,
        health::Health::Unknown => Health::Unknown,
    }
}

/// Since 1970.
fn seconds(at: SystemTime) -> f64 {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests;
