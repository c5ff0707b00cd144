//! For which listener a backend's address and port answer.

use std::{collections::BTreeMap, ops::Range};

use slb_common::abi::{Endpoint, RevNat, RevNatFlags};

use super::{Inputs, ingress, sharing::Sharing};
use crate::ids::{Ids, IndexedBackend, IndexedListener};

/// A VIP for which a backend's address and port answer.
#[derive(Debug)]
struct Owner {
    at: Endpoint,
    vip: Endpoint,
    /// Index into [`Ids::backends`].
    backend: usize,
}

/// For whom the addresses and ports of all backends answer. All but the flags depends on nothing but [`Ids`].
#[derive(Debug)]
pub(super) struct Origins {
    /// Those of one address and port side by side, in the order of the ids.
    owners: Vec<Owner>,
    /// One per backend: whether its address and port answer for others as well, or did until now.
    are_shared: Vec<bool>,
    /// One per backend: what its record of replies says.
    flags: Vec<RevNatFlags>,
    /// One per backend: whether that was said since records were last made.
    are_set: Vec<bool>,
}

impl Origins {
    pub(super) fn new(ids: &Ids, sharing: &mut Sharing, inputs: &Inputs<'_>) -> Self {
        let owners = owners(ids);
        let count = ids.backends.len();
        let all = owners.iter().map(|owner| owner.at).collect();
        let several = owners.chunk_by(|a, b| a.at == b.at).filter(|owners| owners.len() > 1);
        let several = several.map(|owners| owners[0].at).collect();
        let idle = ids.listeners.iter().map(|listener| listener.idle_timeout).max();
        let terms = (inputs.now, idle.unwrap_or_default());
        let shared = sharing.update(several, &all, inputs.installed, terms);
        let mut are_shared = vec![false; count];
        for owner in owners.iter().filter(|owner| shared.contains(&owner.at)) {
            are_shared[owner.backend] = true;
        }
        Self {
            owners,
            are_shared,
            flags: vec![RevNatFlags::empty(); count],
            are_set: vec![false; count],
        }
    }

    /// Whether these backends have an address and port that answers for others as well.
    pub(super) fn are_shared(&self, backends: Range<usize>) -> &[bool] {
        &self.are_shared[backends]
    }

    /// Sets what the record of replies of a backend says.
    pub(super) fn set(&mut self, backend: usize, flags: RevNatFlags) {
        self.flags[backend] = flags;
        self.are_set[backend] = true;
    }

    /// The records that the backends have a part in whose flags were set since this was last called.
    pub(super) fn take_changed(
        &mut self,
        ids: &Ids,
        inputs: &Inputs<'_>,
    ) -> BTreeMap<Endpoint, RevNat> {
        let Self { owners, flags, are_set, are_shared } = self;
        let owners = owners.chunk_by(|a, b| a.at == b.at);
        let changed = owners.filter(|owners| owners.iter().any(|owner| are_set[owner.backend]));
        let records = changed.map(|owners| {
            let (at, record) = origin(owners, ids, flags, inputs);
            let is_shared = are_shared[owners[0].backend];
            let shared = if is_shared { RevNatFlags::SHARED } else { RevNatFlags::empty() };
            (at, RevNat { flags: record.flags | shared, ..record })
        });
        let records = records.collect();
        are_set.fill(false);
        records
    }
}

fn owners(ids: &Ids) -> Vec<Owner> {
    let mut owners = Vec::with_capacity(ids.backends.len());
    for listener in &ids.listeners {
        for index in listener.backends.clone() {
            let backend = &ids.backends[index];
            if backend.is_answered_here() {
                let at = listener.origin(backend);
                owners.extend(listener.endpoints.iter().map(|&vip| Owner {
                    at,
                    vip,
                    backend: index,
                }));
            }
        }
    }
    owners.sort_by_key(|owner| owner.at);
    owners
}

/// For whom an address and port answers, of all its owners; `flags` are each backend's.
fn origin(
    owners: &[Owner],
    ids: &Ids,
    flags: &[RevNatFlags],
    inputs: &Inputs<'_>,
) -> (Endpoint, RevNat) {
    let before = inputs.installed.endpoints.get(&owners[0].at);
    let is_before = |owner: &&Owner| {
        before.is_some_and(|origin| (origin.vip, origin.port) == (owner.vip.addr, owner.vip.port))
    };
    // The first owner has flows without entries.
    let Owner { at, vip, backend } = owners.iter().find(is_before).unwrap_or(&owners[0]);
    let of_all = RevNatFlags::CLOSING | RevNatFlags::WATCHED | RevNatFlags::LIMITED;
    let of_others: RevNatFlags = owners.iter().map(|owner| flags[owner.backend] & of_all).collect();
    let flags = flags[*backend] | of_others;
    let backend = ids.backends[*backend].id;
    let (ingress, interfaces) =
        ingress::of_backend(at.addr, inputs.ingress, inputs.interfaces, before);
    (*at, RevNat { vip: vip.addr, port: vip.port, backend, flags, ingress, interfaces })
}

impl IndexedBackend {
    /// Whether its answers come through the gateway.
    pub(super) fn is_answered_here(&self) -> bool {
        !self.forwarding.is_direct_return()
    }
}

impl IndexedListener {
    /// What answers of a backend come from.
    fn origin(&self, backend: &IndexedBackend) -> Endpoint {
        let (addr, port) = (backend.addr.ip().into(), backend.addr.port().into());
        Endpoint { addr, port, proto: self.endpoints[0].proto }
    }
}
