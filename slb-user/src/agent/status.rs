//! Answers `GET /v1/status`.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use slb_common::abi::Traffic;

use super::Agent;
use crate::{
    api::{
        BackendStatus, FlowTableStatus, InstanceStatus, InterfaceStatus, ListenerStatus, MapStatus,
        Names, Sight, Status, VerdictCount,
    },
    config::Scheduler,
    datapath::TableError,
    health::Health,
    layout::{Role, Service, Target},
    log,
};

/// By index into `SLB_BACKENDS`, or by [`slb_common::abi::Listener::id`].
type Traffics = HashMap<u32, Traffic>;

/// Makes the shares of those that have one proportional to their weights: a schedule of `wlc` has each once.
fn by_weight(shares: &mut BTreeMap<u32, f64>, targets: &[Target]) {
    let weight = |id: &u32| {
        targets.iter().find(|target| target.id == *id).map_or(0.0, |target| target.weight.into())
    };
    let all: f64 = shares.keys().map(weight).sum();
    for (id, share) in shares.iter_mut().filter(|_| all > 0.0) {
        *share = weight(id) / all;
    }
}

impl Agent {
    pub(super) fn status(&self) -> Result<Status, String> {
        self.collect().map_err(|error| error.to_string())
    }

    fn collect(&self) -> Result<Status, TableError> {
        let (flows, bytes) = self.datapath.flow_table();
        let verdicts = self.datapath.maps.verdicts()?;
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            config: self.path.display().to_string(),
            generation: self.reloads.generation,
            reload_failures: self.reloads.failures,
            uptime_seconds: self.started.elapsed().as_secs(),
            interfaces: self
                .attachments
                .iter()
                .map(|(interface, attachment)| InterfaceStatus {
                    name: interface.name.clone(),
                    index: interface.index,
                    mode: attachment.mode.to_owned(),
                    reason: attachment.reason.clone(),
                })
                .collect(),
            flow_table: FlowTableStatus { capacity: flows, bytes },
            instances: self.instances()?,
            verdicts: verdicts
                .into_iter()
                .filter(|(_, count)| count.packets > 0)
                .map(|(verdict, count)| {
                    let count = VerdictCount { packets: count.packets, bytes: count.bytes };
                    (verdict.label().to_owned(), count)
                })
                .collect(),
            maps: self.maps(),
            log_lines_dropped: log::dropped_lines(),
            problems: self.problems(),
        })
    }

    fn maps(&self) -> Vec<MapStatus> {
        let status = |name: &str, entries: Option<usize>, capacity: usize| MapStatus {
            name: name.to_owned(),
            entries: entries.map(|entries| entries as u64),
            capacity: capacity as u64,
        };
        let usage = self.datapath.maps.usage().into_iter();
        let mut maps: Vec<_> =
            usage.map(|(name, used, capacity)| status(name, Some(used), capacity)).collect();
        // Of clients' packets: what the capacity counts.
        let flows = self.datapath.table.active_flows() as usize;
        maps.push(status("SLB_FLOWS", Some(flows), self.datapath.flow_table().0 as usize));
        maps
    }

    /// What every backend has got, and every listener: what was its backends' once is its own still.
    fn traffic(&self) -> Result<(Traffics, Traffics), TableError> {
        let (mut backends, mut listeners) = (Traffics::new(), Traffics::new());
        for (&id, backend) in &self.datapath.maps.installed().backends {
            let traffic = self.datapath.maps.traffic(id)?;
            *listeners.entry(backend.listener.into()).or_default() += traffic;
            backends.insert(id, traffic);
        }
        Ok((backends, listeners))
    }

    fn instances(&self) -> Result<Vec<InstanceStatus>, TableError> {
        let (by_backend, by_listener) = self.traffic()?;
        let mut instances = Vec::new();
        for (instance_index, instance) in self.config.instances.iter().enumerate() {
            let mut listeners = Vec::new();
            for (listener_index, listener) in instance.listeners.iter().enumerate() {
                let mut backends = Vec::new();
                let mut sum = Traffic::default();
                let services = self.layout.services.iter().filter(|service| {
                    (service.instance, service.listener) == (instance_index, listener_index)
                });
                for service in services {
                    let traffic = by_listener.get(&service.id).copied().unwrap_or_default();
                    sum += traffic;
                    self.backends(service, &by_backend, &mut backends);
                }
                let group = &instance.groups[listener.group];
                listeners.push(ListenerStatus {
                    protocol: listener.protocol.to_string(),
                    port: listener.port,
                    group: group.label().to_owned(),
                    scheduler: listener.scheduler.to_string(),
                    enabled: listener.enabled,
                    persistence_seconds: listener.persistence.map(|kept| kept.as_secs()),
                    flows: sum.flows,
                    packets: sum.packets,
                    bytes: sum.bytes,
                    reply_packets: sum.reply_packets,
                    reply_bytes: sum.reply_bytes,
                    backends,
                });
            }
            instances.push(InstanceStatus {
                name: instance.name.clone(),
                vips: instance.vips.iter().map(ToString::to_string).collect(),
                listeners,
            });
        }
        Ok(instances)
    }

    /// In how many seconds the flows of a drained backend are ended.
    fn closes_in(&self, id: u32) -> Option<f64> {
        let closes = self.datapath.maps.installed().backends.get(&id)?.closes;
        let left = closes.wrapping_sub(self.jiffies.now().ok()?) as i32;
        (closes != 0).then(|| self.jiffies.to_duration(left.max(0) as u32).as_secs_f64())
    }

    /// What can be looked at without this task.
    pub(super) fn sight(&self) -> Sight {
        let mut names = Names::default();
        for service in &self.layout.services {
            let instance = &self.config.instances[service.instance];
            let listener = &instance.listeners[service.listener];
            let label = format!("{} {}/{}", instance.name, listener.protocol, listener.port);
            names.listeners.extend(service.endpoints.iter().map(|&at| (at, label.clone())));
            let backends = &instance.groups[listener.group].backends;
            for target in &self.layout.targets[service.targets.clone()] {
                let name = target
                    .backend
                    .map_or_else(|| target.addr.ip().to_string(), |it| backends[it].name.clone());
                names.backends.insert(target.id, (name, target.addr));
            }
        }
        let (explainer, table) = (Arc::clone(&self.explainer), self.datapath.table.clone());
        Sight { names: Arc::new(names), explainer, table, jiffies: self.jiffies }
    }

    fn backends(&self, service: &Service, traffics: &Traffics, backends: &mut Vec<BackendStatus>) {
        let instance = &self.config.instances[service.instance];
        let group = &instance.groups[instance.listeners[service.listener].group];
        let installed = self.datapath.maps.installed().listeners.get(&service.endpoints[0]);
        let mut shares = installed.map(|it| it.schedule.shares()).unwrap_or_default();
        if service.scheduler == Scheduler::Wlc {
            by_weight(&mut shares, &self.layout.targets[service.targets.clone()]);
        }
        for index in service.targets.clone() {
            let target = &self.layout.targets[index];
            let health =
                if target.check.is_none() { "unchecked" } else { self.health[index].label() };
            let check = self.checkers.status(&target.id);
            let duration = check.as_ref().and_then(|check| check.duration);
            let failure = check.and_then(|check| check.last_failure);
            let Traffic { flows, packets, bytes, reply_packets, reply_bytes } =
                traffics.get(&target.id).copied().unwrap_or_default();
            backends.push(BackendStatus {
                name: match target.backend {
                    Some(backend) => group.backends[backend].name.clone(),
                    None => target.addr.ip().to_string(),
                },
                role: match target.role {
                    Role::Member if target.is_departed() => Some("removed".to_owned()),
                    Role::Member => None,
                    Role::Primary => Some("primary".to_owned()),
                    Role::Secondary => Some("secondary".to_owned()),
                },
                endpoint: target.addr.to_string(),
                // That of one that is drained counts as 0.
                weight: target.backend.map_or(0, |backend| group.backends[backend].weight.into()),
                health: health.to_owned(),
                check_seconds: duration.map(|duration| duration.as_secs_f64()),
                transitions: self.transitions.get(&target.id).copied().unwrap_or_default(),
                reason: failure
                    .filter(|_| self.health[index] != Health::Healthy)
                    .map(|failure| failure.reason),
                active: shares.contains_key(&target.id),
                drains: target.drains,
                closes_in_seconds: self.closes_in(target.id),
                active_flows: self.datapath.table.active(target.id),
                expected_share: shares.get(&target.id).copied().unwrap_or_default(),
                flows,
                packets,
                bytes,
                reply_packets,
                reply_bytes,
            });
        }
    }
}
