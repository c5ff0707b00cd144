//! The record of a backend: whether it is usable, how packets reach it, when its flows end.

use std::collections::{BTreeMap, HashSet};

use slb_common::{
    abi::{
        self, Address, BACKEND_HEALTHY, BACKEND_IN_USE, BACKEND_OPTION, BACKEND_PROXY,
        BACKEND_UNHEALTHY, BACKEND_USABLE, Backend, MAX_SOURCES, Mode, NO_SOURCE, NextHop, QuicKey,
    },
    tunnel,
};

use super::Inputs;
use crate::{
    config::{AllUnhealthy, ClientAddress, Forwarding, Scheduler},
    health::Health,
    layout::{Role, Service, Target},
};

impl Service {
    /// Whether all of its flows have entries, whatever the scheduler: with persistence a client's next flow has
    /// to find its backend, and only an entry tells whether a datagram begins a flow.
    pub(super) fn remembers(&self) -> bool {
        let is_udp = self.endpoints[0].proto == abi::UDP;
        self.persistence.is_some() || is_udp && self.limits.new_flows.is_some()
    }

    /// How packets reach a target: between families by another source.
    pub(super) fn mode(&self, target: &Target) -> Mode {
        let crosses = self.endpoints[0].addr.is_v4() != target.addr.is_ipv4();
        match target.forwarding {
            Forwarding::Nat if crosses => Mode::Full,
            Forwarding::Nat => Mode::Nat,
            Forwarding::FullNat => Mode::Full,
            Forwarding::Dsr => Mode::Dsr,
            Forwarding::Ipip => Mode::Ipip,
            Forwarding::Gue => Mode::Gue,
        }
    }
}

/// Which targets may get new flows.
pub(super) fn usable(
    service: &Service,
    targets: &[Target],
    health: &[Health],
    trusted: &HashSet<u32>,
) -> Vec<bool> {
    let healthy: Vec<bool> = targets
        .iter()
        .zip(health)
        .map(|(target, &health)| match (target.role, health) {
            _ if target.is_departed() => false,
            _ if target.check.is_none() => true,
            // The secondary is for when the primary has failed, not for when nobody has looked yet.
            (Role::Primary, health) => health != Health::Unhealthy,
            (_, Health::Unknown) => trusted.contains(&target.id),
            (_, health) => health == Health::Healthy,
        })
        .collect();
    let mut candidates = targets.iter().zip(&healthy).filter(|(target, _)| target.weight > 0);
    if service.all_unhealthy == AllUnhealthy::FailOpen && !candidates.any(|(_, healthy)| *healthy) {
        return targets.iter().map(|target| !target.is_departed()).collect();
    }
    healthy
}

/// When the flows of a target are ended, in jiffies; `None`: not at all.
pub(super) fn closes(service: &Service, target: &Target, inputs: &Inputs<'_>) -> Option<u32> {
    let drain = service.drain.filter(|_| target.drains)?;
    let known = inputs.installed.backends.get(&target.id).filter(|known| {
        known.flags & BACKEND_IN_USE != 0 && u32::from(known.listener) == service.id
    });
    // 0 has a meaning of its own; a tick more does not matter.
    let since_now = inputs.moment.wrapping_add(inputs.jiffies.from_duration(drain)) | 1;
    Some(known.map(|known| known.closes).filter(|closes| *closes != 0).unwrap_or(since_now))
}

/// The entries of a target in `SLB_QUIC`. One that the configuration does not name any more keeps its own.
pub(super) fn servers(
    service: &Service,
    target: &Target,
    inputs: &Inputs<'_>,
) -> Vec<(QuicKey, u32)> {
    if service.scheduler != Scheduler::Qch {
        return Vec::new();
    }
    let key = |server| QuicKey { listener: service.id, server };
    if !target.is_departed() {
        let server = target.server_id.map(u32::from);
        return server.map(|server| (key(server), target.id)).into_iter().collect();
    }
    let range = key(0)..=key(u32::MAX);
    let known = inputs.installed.quic.range(range).filter(|(_, backend)| **backend == target.id);
    known.map(|(&key, &backend)| (key, backend)).collect()
}

/// How a target is told who the client is.
const fn told(target: &Target) -> u32 {
    match target.client_address {
        ClientAddress::None => 0,
        ClientAddress::ProxyV2 => BACKEND_PROXY,
        ClientAddress::TcpOption => BACKEND_OPTION,
    }
}

/// What is left of an MTU for the packets that go to a target.
fn inner_mtu(target: &Target, mtu: u32) -> u32 {
    let overhead = match target.forwarding {
        Forwarding::Nat | Forwarding::FullNat | Forwarding::Dsr => 0,
        Forwarding::Ipip => tunnel::overhead(target.addr.is_ipv4(), false),
        Forwarding::Gue => tunnel::overhead(target.addr.is_ipv4(), true),
    };
    mtu.saturating_sub(overhead as u32)
}

/// Where the addresses are that packets to a target may be given as a source: the first index, and how
/// many. What is not there yet is added.
pub(super) fn sources(
    known: &mut BTreeMap<u32, Address>,
    target: &Target,
    inputs: &Inputs<'_>,
) -> (u16, u16) {
    if target.forwarding.is_direct_return() {
        return (NO_SOURCE, 0);
    }
    let own = inputs.ways.get(&target.addr.ip()).and_then(|way| way.source);
    let wanted: Vec<Address> = match target.sources.as_slice() {
        [] => own.into_iter().map(Address::from).collect(),
        sources => sources.iter().map(|&source| source.into()).collect(),
    };
    let count = wanted.len() as u32;
    if count == 0 {
        return (NO_SOURCE, 0);
    }
    let is_at =
        |first: &u32| (*first..).zip(&wanted).all(|(at, addr)| known.get(&at) == Some(addr));
    let free = known.last_key_value().map_or(u32::from(NO_SOURCE), |(last, _)| *last) + 1;
    let first = (u32::from(NO_SOURCE) + 1..free).find(is_at).unwrap_or(free);
    if (first + count) as usize > MAX_SOURCES {
        return (NO_SOURCE, 0);
    }
    known.extend((first..).zip(wanted));
    (first as u16, count as u16)
}

pub(super) fn backend(
    service: &Service,
    target: &Target,
    health: Health,
    usable: bool,
    inputs: &Inputs<'_>,
) -> Backend {
    let health = match health {
        _ if target.check.is_none() => 0,
        Health::Unknown => 0,
        Health::Healthy => BACKEND_HEALTHY,
        Health::Unhealthy => BACKEND_UNHEALTHY,
    };
    let way = inputs.ways.get(&target.addr.ip());
    let way = way.filter(|way| inputs.interfaces.contains_key(&way.hop.ifindex));
    Backend {
        addr: target.addr.ip().into(),
        port: target.addr.port().into(),
        flags: BACKEND_IN_USE | health | told(target) | if usable { BACKEND_USABLE } else { 0 },
        idle_jiffies: inputs.jiffies.from_duration(service.idle_timeout),
        listener: service.id as u16,
        hop: way.map_or(NextHop::UNRESOLVED, |way| way.hop),
        mtu: way.filter(|_| !inputs.generic).map_or(0, |way| inner_mtu(target, way.mtu)),
        mode: service.mode(target) as u32,
        ..Backend::default()
    }
}
