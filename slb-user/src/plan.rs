//! (Desired, installed) → the writes that lead from one to the other, in the only safe order. Pure.
//!
//! A packet may be in the program between any two writes, and the agent may die there:
//!
//! - a source's address is there before a backend's record names it;
//! - an access list and limits are there before a listener names them;
//! - a backend's record is there before a schedule names it, and no schedule names it any more when
//!   it is marked unusable;
//! - a listener is there before its VIP is one.

use std::sync::Arc;

use slb_common::abi::{
    Address, Backend, BackendFlags, Endpoint, Interface, Limits, Mode, NextHop, QuicKey, RevNat,
    Roles,
};

use crate::state::{Acl, ListenerState, State};

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// To `SLB_INTERFACES`.
    PutInterface(u32, Interface),
    /// To `SLB_SOURCES`.
    PutSource(u32, Address),
    /// To `SLB_BACKENDS`.
    PutBackend(u32, Backend),
    /// To `SLB_ACL`, a whole list.
    PutAcl(u32, Arc<Acl>),
    /// From `SLB_ACL`, a whole list.
    RemoveAcl(u32, Arc<Acl>),
    /// To `SLB_LIMITS`.
    PutLimits(u32, Limits),
    /// To `SLB_QUIC`.
    PutQuic(QuicKey, u32),
    /// From `SLB_QUIC`.
    RemoveQuic(QuicKey),
    /// To `SLB_SLOTS`, then to `SLB_LISTENERS`.
    PutListener(Endpoint, ListenerState),
    /// From `SLB_LISTENERS`.
    RemoveListener(Endpoint),
    /// To `SLB_REVNAT`.
    PutEndpoint(Endpoint, RevNat),
    /// From `SLB_REVNAT`.
    RemoveEndpoint(Endpoint),
    /// To `SLB_ADDRESSES`.
    PutAddress(Address, Roles),
    /// From `SLB_ADDRESSES`.
    RemoveAddress(Address),
    /// From `SLB_INTERFACES`.
    RemoveInterface(u32),
}

/// What is left of a backend that the configuration does not know any more: flows may refer to it. The
/// agent does not follow the route to it any more, so the kernel has to route its packets. Only NAT can be left to the
/// kernel; other packets use the last next hop.
#[must_use]
pub fn retire(backend: Backend) -> Backend {
    let hop = if backend.mode == Mode::NAT { NextHop::UNRESOLVED } else { backend.hop };
    Backend { flags: BackendFlags::empty(), hop, closes: 0, ..backend }
}

/// The writes that lead from `installed` to `desired`.
#[must_use]
pub fn plan(desired: &State, installed: &State) -> Vec<Step> {
    let (backends_first, backends_last): (Vec<_>, Vec<_>) =
        changed(&desired.backends, &installed.backends)
            .map(|(&id, &backend)| (id, backend))
            .partition(|(id, backend)| gains(backend, installed.backends.get(id)));
    let retired = gone(&desired.backends, &installed.backends)
        .filter(|(_, backend)| !backend.flags.is_empty())
        .map(|(&id, &backend)| (id, retire(backend)));

    let mut steps = Vec::new();
    steps.extend(
        changed(&desired.interfaces, &installed.interfaces)
            .map(|(&index, &interface)| Step::PutInterface(index, interface)),
    );
    steps.extend(
        changed(&desired.sources, &installed.sources)
            .map(|(&index, &addr)| Step::PutSource(index, addr)),
    );
    steps.extend(backends_first.into_iter().map(|(id, backend)| Step::PutBackend(id, backend)));
    steps.extend(gone(&desired.quic, &installed.quic).map(|(&server, _)| Step::RemoveQuic(server)));
    steps.extend(
        changed(&desired.quic, &installed.quic)
            .map(|(&server, &backend)| Step::PutQuic(server, backend)),
    );
    steps.extend(
        changed(&desired.acls, &installed.acls)
            .map(|(&acl, list)| Step::PutAcl(acl, Arc::clone(list))),
    );
    steps.extend(
        changed(&desired.limits, &installed.limits)
            .map(|(&id, &limits)| Step::PutLimits(id, limits)),
    );
    publish(desired, installed, &mut steps);
    steps.extend(
        backends_last.into_iter().chain(retired).map(|(id, backend)| Step::PutBackend(id, backend)),
    );
    put_addresses(desired, installed, &mut steps);
    steps
}

/// Replaces the records of listeners, which puts their schedules in force, and removes what only old records name.
fn publish(desired: &State, installed: &State, steps: &mut Vec<Step>) {
    steps.extend(
        changed(&desired.listeners, &installed.listeners)
            .map(|(&endpoint, listener)| Step::PutListener(endpoint, listener.clone())),
    );
    steps.extend(
        gone(&desired.listeners, &installed.listeners)
            .map(|(&endpoint, _)| Step::RemoveListener(endpoint)),
    );
    steps.extend(
        gone(&desired.limits, &installed.limits)
            .map(|(&id, _)| Step::PutLimits(id, Limits::default())),
    );
    steps.extend(
        gone(&desired.acls, &installed.acls)
            .map(|(&acl, list)| Step::RemoveAcl(acl, Arc::clone(list))),
    );
}

/// Says which addresses are those of VIPs and backends, and by which interfaces their packets come.
fn put_addresses(desired: &State, installed: &State, steps: &mut Vec<Step>) {
    steps.extend(
        changed(&desired.endpoints, &installed.endpoints)
            .map(|(&endpoint, &value)| Step::PutEndpoint(endpoint, value)),
    );
    steps.extend(
        gone(&desired.endpoints, &installed.endpoints)
            .map(|(&endpoint, _)| Step::RemoveEndpoint(endpoint)),
    );
    steps.extend(
        changed(&desired.addresses, &installed.addresses)
            .map(|(&addr, &roles)| Step::PutAddress(addr, roles)),
    );
    steps.extend(
        gone(&desired.addresses, &installed.addresses).map(|(&addr, _)| Step::RemoveAddress(addr)),
    );
    steps.extend(
        gone(&desired.interfaces, &installed.interfaces)
            .map(|(&index, _)| Step::RemoveInterface(index)),
    );
}

/// Whether the program may do more with the backend afterwards.
fn gains(backend: &Backend, installed: Option<&Backend>) -> bool {
    let usable = |backend: &Backend| backend.flags.intersects(BackendFlags::USABLE);
    usable(backend) || !installed.is_some_and(usable)
}

type Map<K, V> = std::collections::BTreeMap<K, V>;

fn changed<'a, K: Ord, V: PartialEq>(
    desired: &'a Map<K, V>,
    installed: &'a Map<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    let mut alike = alike(installed);
    desired.iter().filter(move |(key, value)| alike(key) != Some(value))
}

fn gone<'a, K: Ord, V>(
    desired: &'a Map<K, V>,
    installed: &'a Map<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    let mut alike = alike(desired);
    installed.iter().filter(move |(key, _)| alike(key).is_none())
}

/// Finds keys that come in order: one step each, where a search takes a dozen.
fn alike<'a, K: Ord, V>(map: &'a Map<K, V>) -> impl FnMut(&K) -> Option<&'a V> {
    let mut left = map.iter().peekable();
    move |key| {
        while left.next_if(|(known, _)| *known < key).is_some() {}
        left.next_if(|(known, _)| *known == key).map(|(_, value)| value)
    }
}

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
