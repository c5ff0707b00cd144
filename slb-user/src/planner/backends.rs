//! The record of a backend: whether it is usable, how packets reach it, when its flows end.

use std::collections::BTreeMap;

use rustc_hash::FxHashSet;
use slb_common::{
    abi::{self, Address, Backend, BackendFlags, MAX_SOURCES, Mode, NO_SOURCE, NextHop, QuicKey},
    tunnel,
};

use super::Inputs;
use crate::{
    config::{AllUnhealthy, ClientAddress, Forwarding, Scheduler},
    health::Health,
    ids::{IndexedBackend, IndexedListener, Role},
};

impl IndexedListener {
    /// Whether all of its flows have entries, with any scheduler: with persistence a client's next flow has
    /// to find its backend, and only an entry tells whether a datagram begins a flow.
    pub(super) fn remembers(&self) -> bool {
        let is_udp = self.endpoints[0].proto == abi::UDP;
        let limits = &self.limits;
        let counts_flows = limits.new_flows.is_some() || limits.new_flows_per_source.is_some();
        self.persistence.is_some() || is_udp && counts_flows
    }

    /// How packets reach a backend: between families by another source.
    pub(super) fn mode(&self, backend: &IndexedBackend) -> Mode {
        let crosses = self.endpoints[0].addr.is_v4() != backend.addr.is_ipv4();
        match backend.forwarding {
            Forwarding::Nat if crosses => Mode::FULL,
            Forwarding::Nat => Mode::NAT,
            Forwarding::FullNat => Mode::FULL,
            Forwarding::Dsr => Mode::DSR,
            Forwarding::Ipip => Mode::IPIP,
            Forwarding::Gue => Mode::GUE,
        }
    }
}

/// Which backends may get new flows.
pub(super) fn usable(
    listener: &IndexedListener,
    backends: &[IndexedBackend],
    health: &[Health],
    trusted: &FxHashSet<u32>,
) -> Vec<bool> {
    let healthy: Vec<bool> = backends
        .iter()
        .zip(health)
        .map(|(backend, &health)| match (backend.role, health) {
            _ if backend.is_orphaned() => false,
            _ if backend.check.is_none() => true,
            // The secondary is used when the primary has failed, not before the first probe of the primary.
            (Role::Primary, health) => health != Health::Unhealthy,
            (_, Health::Unknown) => trusted.contains(&backend.id),
            (_, health) => health == Health::Healthy,
        })
        .collect();
    let mut candidates = backends.iter().zip(&healthy).filter(|(backend, _)| backend.weight > 0);
    if listener.all_unhealthy == AllUnhealthy::FailOpen && !candidates.any(|(_, healthy)| *healthy)
    {
        return backends.iter().map(|backend| !backend.is_orphaned()).collect();
    }
    healthy
}

/// When the flows of a backend are ended, in jiffies; `None`: not at all.
pub(super) fn closes(
    listener: &IndexedListener,
    backend: &IndexedBackend,
    inputs: &Inputs<'_>,
) -> Option<u32> {
    let drain = listener.drain.filter(|_| backend.drains)?;
    let known = inputs.installed.backends.get(&backend.id).filter(|known| {
        known.flags.intersects(BackendFlags::IN_USE) && u32::from(known.listener) == listener.id
    });
    // 0 has a meaning of its own; a tick more does not matter.
    let since_now = inputs.moment.wrapping_add(inputs.jiffies.from_duration(drain)) | 1;
    Some(known.map(|known| known.closes).filter(|closes| *closes != 0).unwrap_or(since_now))
}

/// The entries of a backend in `SLB_QUIC`. One that the configuration does not name any more keeps its own.
pub(super) fn servers(
    listener: &IndexedListener,
    backend: &IndexedBackend,
    inputs: &Inputs<'_>,
) -> Vec<(QuicKey, u32)> {
    if listener.scheduler != Scheduler::Qch {
        return Vec::new();
    }
    let key = |server| QuicKey { listener: listener.id, server };
    if !backend.is_orphaned() {
        let server = backend.server_id.map(u32::from);
        return server.map(|server| (key(server), backend.id)).into_iter().collect();
    }
    let range = key(0)..=key(u32::MAX);
    let known = inputs.installed.quic.range(range).filter(|(_, id)| **id == backend.id);
    known.map(|(&key, &id)| (key, id)).collect()
}

/// How a backend is told who the client is.
const fn told(backend: &IndexedBackend) -> BackendFlags {
    match backend.client_address {
        ClientAddress::None => BackendFlags::empty(),
        ClientAddress::ProxyV2 => BackendFlags::PROXY,
        ClientAddress::TcpOption => BackendFlags::OPTION,
    }
}

/// The part of an MTU that packets to a backend can use beside the headers of a tunnel, in bytes.
fn inner_mtu(backend: &IndexedBackend, mtu: u32) -> u32 {
    let overhead = match backend.forwarding {
        Forwarding::Nat | Forwarding::FullNat | Forwarding::Dsr => 0,
        Forwarding::Ipip => tunnel::overhead(backend.addr.is_ipv4(), false),
        Forwarding::Gue => tunnel::overhead(backend.addr.is_ipv4(), true),
    };
    mtu.saturating_sub(overhead as u32)
}

/// Where the addresses are that packets to a backend may be given as a source: the first index, and how
/// many. What is not there yet is added.
pub(super) fn sources(
    known: &mut BTreeMap<u32, Address>,
    backend: &IndexedBackend,
    inputs: &Inputs<'_>,
) -> (u16, u16) {
    if backend.forwarding.is_direct_return() {
        return (NO_SOURCE, 0);
    }
    let own = inputs.routes.get(&backend.addr.ip()).and_then(|route| route.source);
    let own = own.map(Address::from);
    let listed: Vec<Address> = backend.sources.iter().map(|&source| source.into()).collect();
    let wanted = if listed.is_empty() { own.as_slice() } else { &listed };
    let count = wanted.len() as u32;
    if count == 0 {
        return (NO_SOURCE, 0);
    }
    let is_at = |first: &u32| (*first..).zip(wanted).all(|(at, addr)| known.get(&at) == Some(addr));
    let free = known.last_key_value().map_or(u32::from(NO_SOURCE), |(last, _)| *last) + 1;
    let first = (u32::from(NO_SOURCE) + 1..free).find(is_at).unwrap_or(free);
    if (first + count) as usize > MAX_SOURCES {
        return (NO_SOURCE, 0);
    }
    known.extend((first..).zip(wanted.iter().copied()));
    (first as u16, count as u16)
}

pub(super) fn backend(
    listener: &IndexedListener,
    backend: &IndexedBackend,
    health: Health,
    usable: bool,
    inputs: &Inputs<'_>,
) -> Backend {
    let health = match health {
        _ if backend.check.is_none() => BackendFlags::empty(),
        Health::Unknown => BackendFlags::empty(),
        Health::Healthy => BackendFlags::HEALTHY,
        Health::Unhealthy => BackendFlags::UNHEALTHY,
    };
    let route = inputs.routes.get(&backend.addr.ip());
    let route = route.filter(|route| inputs.interfaces.contains_key(&route.hop.ifindex));
    Backend {
        addr: backend.addr.ip().into(),
        port: backend.addr.port().into(),
        flags: BackendFlags::IN_USE
            | health
            | told(backend)
            | if usable { BackendFlags::USABLE } else { BackendFlags::empty() },
        idle_jiffies: inputs.jiffies.from_duration(listener.idle_timeout),
        listener: listener.id as u16,
        hop: route.map_or(NextHop::UNRESOLVED, |route| route.hop),
        mtu: route.filter(|_| !inputs.generic).map_or(0, |route| inner_mtu(backend, route.mtu)),
        mode: listener.mode(backend),
        ..Backend::default()
    }
}
