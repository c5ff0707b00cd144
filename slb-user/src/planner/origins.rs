//! For which listener a backend's address and port answer.

use slb_common::abi::{Endpoint, RevNat, RevNatFlags};

use crate::{
    ids::{Ids, IndexedBackend, IndexedListener},
    state::State,
};

/// A VIP for which a backend's address and port answer.
pub(super) struct Owner {
    pub at: Endpoint,
    vip: Endpoint,
    /// Index into [`Ids::backends`].
    backend: usize,
}

/// For whom each backend's address and port answer: those of one backend side by side, in the order of `ids`.
pub(super) fn owners(ids: &Ids) -> Vec<Owner> {
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

/// Which backends have an address and port that answers for others as well.
pub(super) fn shared(owners: &[Owner], backends: usize) -> Vec<bool> {
    let mut shared = vec![false; backends];
    for owners in owners.chunk_by(|a, b| a.at == b.at).filter(|owners| owners.len() > 1) {
        for owner in owners {
            shared[owner.backend] = true;
        }
    }
    shared
}

/// For whom an address and port answers, of all its owners; `flags` are each backend's.
pub(super) fn origin(
    owners: &[Owner],
    ids: &Ids,
    flags: &[RevNatFlags],
    installed: &State,
) -> (Endpoint, RevNat) {
    let before = installed.endpoints.get(&owners[0].at);
    let is_before = |owner: &&Owner| {
        before.is_some_and(|origin| (origin.vip, origin.port) == (owner.vip.addr, owner.vip.port))
    };
    // The first owner has flows without entries.
    let Owner { at, vip, backend } = owners.iter().find(is_before).unwrap_or(&owners[0]);
    let of_all = RevNatFlags::CLOSING | RevNatFlags::WATCHED | RevNatFlags::LIMITED;
    let of_others: RevNatFlags = owners.iter().map(|owner| flags[owner.backend] & of_all).collect();
    let shared = if owners.len() > 1 { RevNatFlags::SHARED } else { RevNatFlags::empty() };
    let flags = flags[*backend] | of_others | shared;
    let backend = ids.backends[*backend].id;
    (*at, RevNat { vip: vip.addr, port: vip.port, backend, flags, spare: 0 })
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
