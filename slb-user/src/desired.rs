//! (Layout, health, next hops) → what the maps should hold. Pure.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use slb_common::abi::{
    self, BACKEND_HEALTHY, BACKEND_IN_USE, BACKEND_UNHEALTHY, BACKEND_USABLE, Backend,
    DirectEndpoint, Endpoint, Hop, Interface, ROLE_BACKEND, ROLE_VIP,
};

use crate::{
    clock::Jiffies,
    config::{AllUnhealthy, Scheduler},
    health::Health,
    layout::{Layout, Role, Service, Target},
    schedule::{Member, maglev, ring},
    state::{self, Schedule, State},
};

/// Slots of a round-robin schedule at most: any weights of 655 backends exactly.
const RING_LIMIT: usize = 65_536;

/// Computes states, and remembers the schedules: a table of a thousand backends takes milliseconds,
/// and a change concerns few of them.
#[derive(Debug, Default)]
pub struct Planner {
    schedules: HashMap<u32, (Scheduler, Vec<Member>, usize, Arc<Schedule>)>,
}

/// What the state depends on besides the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Circumstances<'a> {
    /// One per target of the layout.
    pub health: &'a [Health],
    /// The way to each backend's address, as far as known.
    pub hops: &'a HashMap<IpAddr, Hop>,
    /// By index.
    pub interfaces: &'a BTreeMap<u32, Interface>,
    /// Converts timeouts.
    pub jiffies: Jiffies,
}

impl Planner {
    /// What the maps should hold.
    pub fn desired(&mut self, layout: &Layout, now: Circumstances<'_>) -> State {
        let mut state = State { interfaces: now.interfaces.clone(), ..State::default() };
        for service in &layout.services {
            let targets = &layout.targets[service.targets.clone()];
            let usable = usable(service, targets, &now.health[service.targets.clone()]);
            let schedule = self.schedule(service, targets, &usable);
            for &endpoint in &service.endpoints {
                let schedule = Arc::clone(&schedule);
                state.listeners.insert(endpoint, state::Service { id: service.id, schedule });
                state.addresses.entry(endpoint.addr).or_default().roles |= ROLE_VIP;
            }
            let proto = service.endpoints[0].proto;
            let health = &now.health[service.targets.clone()];
            for ((target, &health), &usable) in targets.iter().zip(health).zip(&usable) {
                let backend = backend(service, target, health, usable, &now);
                let endpoint = Endpoint { addr: backend.addr, port: backend.port, proto };
                state.backends.insert(target.id, backend);
                state.endpoints.entry(endpoint).or_insert(DirectEndpoint { backend: target.id });
                state.addresses.entry(endpoint.addr).or_default().roles |= ROLE_BACKEND;
            }
        }
        state
    }

    fn schedule(
        &mut self,
        service: &Service,
        targets: &[Target],
        usable: &[bool],
    ) -> Arc<Schedule> {
        let usable: Vec<&Target> = targets
            .iter()
            .zip(usable)
            .filter_map(|(target, usable)| usable.then_some(target))
            .collect();
        let primary = usable.iter().position(|target| target.role == Role::Primary);
        let chosen = match primary {
            Some(primary) => &usable[primary..=primary],
            None => &usable[..],
        };
        let members: Vec<Member> = chosen
            .iter()
            .map(|target| Member {
                id: target.id,
                identity: target.identity,
                weight: target.weight,
            })
            .collect();
        if let Some((scheduler, known, of, schedule)) = self.schedules.get(&service.id)
            && *scheduler == service.scheduler
            && *known == members
            && *of == targets.len()
        {
            return Arc::clone(schedule);
        }
        let (scheduler, slots) = match (service.scheduler, &members[..]) {
            // Nothing to choose.
            (_, [only]) if only.weight > 0 => (abi::SCHEDULER_HASH, vec![only.id]),
            // As large for the healthy ones as for all, so that a failure moves as little as it can.
            (Scheduler::Tch, _) => {
                (abi::SCHEDULER_HASH, maglev::table(&members, maglev::size_for(targets.len())))
            }
            (Scheduler::Wrr, _) => (abi::SCHEDULER_RING, ring::ring(&members, RING_LIMIT)),
        };
        let schedule = Arc::new(Schedule { scheduler, slots });
        let entry = (service.scheduler, members, targets.len(), Arc::clone(&schedule));
        self.schedules.insert(service.id, entry);
        schedule
    }
}

/// Which targets may get new flows.
fn usable(service: &Service, targets: &[Target], health: &[Health]) -> Vec<bool> {
    let healthy: Vec<bool> = targets
        .iter()
        .zip(health)
        .map(|(target, &health)| match (target.role, health) {
            _ if target.check.is_none() => true,
            // The secondary is for when the primary has failed, not for when nobody has looked yet.
            (Role::Primary, health) => health != Health::Unhealthy,
            (_, health) => health == Health::Healthy,
        })
        .collect();
    let mut candidates = targets.iter().zip(&healthy).filter(|(target, _)| target.weight > 0);
    if service.all_unhealthy == AllUnhealthy::FailOpen && !candidates.any(|(_, healthy)| *healthy) {
        return vec![true; targets.len()];
    }
    healthy
}

fn backend(
    service: &Service,
    target: &Target,
    health: Health,
    usable: bool,
    now: &Circumstances<'_>,
) -> Backend {
    let health = match health {
        _ if target.check.is_none() => 0,
        Health::Unknown => 0,
        Health::Healthy => BACKEND_HEALTHY,
        Health::Unhealthy => BACKEND_UNHEALTHY,
    };
    let reachable = now.hops.get(&target.addr.ip()).copied();
    Backend {
        addr: target.addr.ip().into(),
        port: target.addr.port().into(),
        flags: BACKEND_IN_USE | health | if usable { BACKEND_USABLE } else { 0 },
        idle_jiffies: now.jiffies.from_duration(service.idle_timeout),
        listener: service.id,
        hop: reachable
            .filter(|hop| now.interfaces.contains_key(&hop.ifindex))
            .unwrap_or(Hop::KERNEL),
    }
}

#[cfg(test)]
mod tests;
