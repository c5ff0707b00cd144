//! (Desired, installed) → the writes that lead from one to the other, in the only safe order. Pure.
//!
//! A packet may be in the program between any two writes, and the agent may die there:
//!
//! - a source's address is there before a backend's record names it;
//! - an access list and limits are there before a listener names them;
//! - a backend's record is there before a schedule names it, and no schedule names it any more when
//!   it is marked unusable;
//! - a listener is there before its VIP is one;
//! - an interface has its number before a set of interfaces names it.

use std::{collections::BTreeMap, sync::Arc};

use slb_common::abi::{
    Address, Backend, BackendFlags, Endpoint, Interface, Limits, Mode, NextHop, OwnMac, QuicKey,
    RevNat, Roles,
};

use crate::state::{Acl, ListenerState, State};

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// To `SLB_INTERFACES`.
    PutInterface(u32, Interface),
    /// To `SLB_MACS`.
    PutMac(OwnMac),
    /// From `SLB_MACS`.
    RemoveMac(OwnMac),
    /// To `SLB_SUBNETS`: the interfaces that a subnet is behind.
    PutSubnet((u32, Address), u64),
    /// From `SLB_SUBNETS`.
    RemoveSubnet((u32, Address)),
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
    Difference { desired, installed, is_whole: true }.steps()
}

/// The same, where `part` is a part of what is desired, and all else is installed.
#[must_use]
pub fn plan_part(part: &State, installed: &State) -> Vec<Step> {
    Difference { desired: part, installed, is_whole: false }.steps()
}

type Map<K, V> = BTreeMap<K, V>;

/// Two states that are compared.
#[derive(Clone, Copy)]
struct Difference<'a> {
    desired: &'a State,
    installed: &'a State,
    /// Whether what is not desired is to go.
    is_whole: bool,
}

impl<'a> Difference<'a> {
    fn steps(self) -> Vec<Step> {
        let installed = &self.installed.backends;
        let (backends_first, backends_last): (Vec<_>, Vec<_>) = self
            .changed(|state| &state.backends)
            .map(|(&id, &backend)| (id, backend))
            .partition(|(id, backend)| gains(backend, installed.get(id)));
        let retired = self
            .gone(|state| &state.backends)
            .filter(|(_, backend)| !backend.flags.is_empty())
            .map(|(&id, &backend)| (id, retire(backend)));
        let put = |(id, backend)| Step::PutBackend(id, backend);

        let interfaces = self.changed(|state| &state.interfaces);
        let macs = self.changed(|state| &state.macs);
        let sources = self.changed(|state| &state.sources);
        let mut steps: Vec<Step> = interfaces
            .map(|(&index, &interface)| Step::PutInterface(index, interface))
            .chain(macs.map(|(&mac, _)| Step::PutMac(mac)))
            .chain(sources.map(|(&index, &addr)| Step::PutSource(index, addr)))
            .chain(backends_first.into_iter().map(put))
            .collect();
        self.put_quic(&mut steps);
        let acls = self.changed(|state| &state.acls);
        steps.extend(acls.map(|(&acl, list)| Step::PutAcl(acl, Arc::clone(list))));
        let limits = self.changed(|state| &state.limits);
        steps.extend(limits.map(|(&id, &limits)| Step::PutLimits(id, limits)));
        self.publish(&mut steps);
        steps.extend(backends_last.into_iter().chain(retired).map(put));
        self.put_addresses(&mut steps);
        steps
    }

    fn put_quic(self, steps: &mut Vec<Step>) {
        let gone = self.gone(|state| &state.quic);
        steps.extend(gone.map(|(&server, _)| Step::RemoveQuic(server)));
        let changed = self.changed(|state| &state.quic);
        steps.extend(changed.map(|(&server, &backend)| Step::PutQuic(server, backend)));
    }

    /// Replaces the records of listeners, which puts their schedules in force, and removes what only old records name.
    fn publish(self, steps: &mut Vec<Step>) {
        let changed = self.changed(|state| &state.listeners);
        steps.extend(changed.map(|(&at, listener)| Step::PutListener(at, listener.clone())));
        let gone = self.gone(|state| &state.listeners);
        steps.extend(gone.map(|(&at, _)| Step::RemoveListener(at)));
        let unlimited = self.gone(|state| &state.limits);
        steps.extend(unlimited.map(|(&id, _)| Step::PutLimits(id, Limits::default())));
        let gone = self.gone(|state| &state.acls);
        steps.extend(gone.map(|(&acl, list)| Step::RemoveAcl(acl, Arc::clone(list))));
    }

    /// Says which addresses are those of VIPs and backends, and by which interfaces their packets come.
    fn put_addresses(self, steps: &mut Vec<Step>) {
        let changed = self.changed(|state| &state.endpoints);
        steps.extend(changed.map(|(&at, &value)| Step::PutEndpoint(at, value)));
        let gone = self.gone(|state| &state.endpoints);
        steps.extend(gone.map(|(&at, _)| Step::RemoveEndpoint(at)));
        let changed = self.changed(|state| &state.addresses);
        steps.extend(changed.map(|(&addr, &roles)| Step::PutAddress(addr, roles)));
        let gone = self.gone(|state| &state.addresses);
        steps.extend(gone.map(|(&addr, _)| Step::RemoveAddress(addr)));
        let gone = self.gone(|state| &state.subnets);
        steps.extend(gone.map(|(&subnet, _)| Step::RemoveSubnet(subnet)));
        let changed = self.changed(|state| &state.subnets);
        steps.extend(changed.map(|(&subnet, &set)| Step::PutSubnet(subnet, set)));
        let gone = self.gone(|state| &state.macs);
        steps.extend(gone.map(|(&mac, _)| Step::RemoveMac(mac)));
        let gone = self.gone(|state| &state.interfaces);
        steps.extend(gone.map(|(&index, _)| Step::RemoveInterface(index)));
    }

    /// What is not installed as it is desired, in one of the maps.
    fn changed<K: Ord + 'a, V: PartialEq + 'a>(
        self,
        map: impl Fn(&'a State) -> &'a Map<K, V>,
    ) -> impl Iterator<Item = (&'a K, &'a V)> {
        let installed = map(self.installed);
        let mut alike = alike(installed);
        let is_whole = self.is_whole;
        map(self.desired).iter().filter(move |(key, value)| {
            // Among many, a few are found faster by a search.
            let known = if is_whole { alike(key) } else { installed.get(key) };
            known != Some(value)
        })
    }

    /// What is installed and to go, in one of the maps.
    fn gone<K: Ord + 'a, V: 'a>(
        self,
        map: impl Fn(&'a State) -> &'a Map<K, V>,
    ) -> impl Iterator<Item = (&'a K, &'a V)> {
        let mut alike = alike(map(self.desired));
        let installed = self.is_whole.then(|| map(self.installed).iter());
        installed.into_iter().flatten().filter(move |(key, _)| alike(key).is_none())
    }
}

/// Whether the program may do more with the backend afterwards.
fn gains(backend: &Backend, installed: Option<&Backend>) -> bool {
    let usable = |backend: &Backend| backend.flags.intersects(BackendFlags::USABLE);
    usable(backend) || !installed.is_some_and(usable)
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
