//! For which listener a backend's address and port answer.

use slb_common::abi::{
    Endpoint, REVNAT_CLOSING, REVNAT_LIMITED, REVNAT_SHARED, REVNAT_WATCHED, RevNat,
};

use crate::{
    layout::{Layout, Service, Target},
    state::State,
};

/// A VIP for which a backend's address and port answer.
pub(super) struct Owner {
    pub at: Endpoint,
    vip: Endpoint,
    /// Index into [`Layout::targets`].
    target: usize,
}

/// For whom each backend's address and port answer: those of one side by side, as the layout has them.
pub(super) fn owners(layout: &Layout) -> Vec<Owner> {
    let mut owners = Vec::with_capacity(layout.targets.len());
    for service in &layout.services {
        for target in service.targets.clone() {
            let backend = &layout.targets[target];
            if backend.is_answered_here() {
                let at = service.origin(backend);
                owners.extend(service.endpoints.iter().map(|&vip| Owner { at, vip, target }));
            }
        }
    }
    owners.sort_by_key(|owner| owner.at);
    owners
}

/// Which targets have an address and port that answers for others as well.
pub(super) fn shared(owners: &[Owner], targets: usize) -> Vec<bool> {
    let mut shared = vec![false; targets];
    for owners in owners.chunk_by(|a, b| a.at == b.at).filter(|owners| owners.len() > 1) {
        for owner in owners {
            shared[owner.target] = true;
        }
    }
    shared
}

/// For whom an address and port answers, of all its owners; `flags` are each target's.
pub(super) fn origin(
    owners: &[Owner],
    layout: &Layout,
    flags: &[u32],
    installed: &State,
) -> (Endpoint, RevNat) {
    let before = installed.endpoints.get(&owners[0].at);
    let is_before = |owner: &&Owner| {
        before.is_some_and(|origin| (origin.vip, origin.port) == (owner.vip.addr, owner.vip.port))
    };
    // Whoever was there first has flows without entries.
    let Owner { at, vip, target } = owners.iter().find(is_before).unwrap_or(&owners[0]);
    let of_all = REVNAT_CLOSING | REVNAT_WATCHED | REVNAT_LIMITED;
    let of_others = owners.iter().fold(0, |all, owner| all | flags[owner.target] & of_all);
    let shared = if owners.len() > 1 { REVNAT_SHARED } else { 0 };
    let flags = flags[*target] | of_others | shared;
    let backend = layout.targets[*target].id;
    (*at, RevNat { vip: vip.addr, port: vip.port, backend, flags, spare: 0 })
}

impl Target {
    /// Whether its answers come through the gateway.
    pub(super) fn is_answered_here(&self) -> bool {
        !self.forwarding.is_direct_return()
    }
}

impl Service {
    /// What answers of a target come from.
    fn origin(&self, target: &Target) -> Endpoint {
        let (addr, port) = (target.addr.ip().into(), target.addr.port().into());
        Endpoint { addr, port, proto: self.endpoints[0].proto }
    }
}
