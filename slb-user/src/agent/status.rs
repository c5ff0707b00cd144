//! Answers `GET /v1/status`.

use slb_common::abi::Traffic;

use super::Agent;
use crate::{
    api::{
        BackendStatus, FlowTableStatus, InstanceStatus, InterfaceStatus, ListenerStatus, Status,
        VerdictCount,
    },
    datapath::TableError,
    health::Health,
    layout::{Role, Service},
};

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
            problems: self.problems(),
        })
    }

    fn instances(&self) -> Result<Vec<InstanceStatus>, TableError> {
        let mut instances = Vec::new();
        for (instance_index, instance) in self.config.instances.iter().enumerate() {
            let mut listeners = Vec::new();
            for (listener_index, listener) in instance.listeners.iter().enumerate() {
                let mut backends = Vec::new();
                let services = self.layout.services.iter().filter(|service| {
                    (service.instance, service.listener) == (instance_index, listener_index)
                });
                for service in services {
                    self.backends(service, &mut backends)?;
                }
                let group = &instance.groups[listener.group];
                listeners.push(ListenerStatus {
                    protocol: listener.protocol.to_string(),
                    port: listener.port,
                    group: group.label().to_owned(),
                    scheduler: listener.scheduler.to_string(),
                    enabled: listener.enabled,
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

    fn backends(
        &self,
        service: &Service,
        backends: &mut Vec<BackendStatus>,
    ) -> Result<(), TableError> {
        let instance = &self.config.instances[service.instance];
        let group = &instance.groups[instance.listeners[service.listener].group];
        let installed = self.datapath.maps.installed().listeners.get(&service.endpoints[0]);
        let shares = installed.map(|installed| installed.schedule.shares()).unwrap_or_default();
        for index in service.targets.clone() {
            let target = &self.layout.targets[index];
            let health =
                if target.check.is_none() { "unchecked" } else { self.health[index].label() };
            let failure = self.checkers.status(&target.id).and_then(|status| status.last_failure);
            let Traffic { flows, packets, bytes, reply_packets, reply_bytes } =
                self.datapath.maps.traffic(target.id)?;
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
                weight: target.weight,
                health: health.to_owned(),
                reason: failure
                    .filter(|_| self.health[index] != Health::Healthy)
                    .map(|failure| failure.reason),
                active: shares.contains_key(&target.id),
                expected_share: shares.get(&target.id).copied().unwrap_or_default(),
                flows,
                packets,
                bytes,
                reply_packets,
                reply_bytes,
            });
        }
        Ok(())
    }
}
