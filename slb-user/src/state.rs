//! What the BPF maps hold: as it should be, and as it is.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use rustc_hash::FxHashMap;
use slb_common::{
    abi::{
        Address, Backend, CHUNK_SLOTS, Endpoint, FlowKey, Interface, Limits, ListenerFlags,
        NO_BACKEND, OwnMac, QuicKey, RevNat, Roles, SLOT_BACKEND, Scheduler, Seed,
    },
    hash,
};

/// An access list: how many bits of each [`slb_common::abi::Listed`] count, and its address.
pub type Acl = BTreeSet<(u32, Address)>;

/// The interfaces that subnets are behind: by how many bits of each [`slb_common::abi::subnet`] count, and its address.
pub type Subnets = BTreeMap<(u32, Address), u64>;

/// The content of every map that the agent writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// `SLB_LISTENERS` and `SLB_SLOTS`.
    pub listeners: BTreeMap<Endpoint, ListenerState>,
    /// `SLB_BACKENDS`, without the elements that were never used.
    pub backends: BTreeMap<u32, Backend>,
    /// `SLB_ADDRESSES`.
    pub addresses: BTreeMap<Address, Roles>,
    /// `SLB_REVNAT`.
    pub endpoints: BTreeMap<Endpoint, RevNat>,
    /// `SLB_INTERFACES` and `SLB_INGRESS`.
    pub interfaces: BTreeMap<u32, Interface>,
    /// `SLB_MACS`: 1 for each.
    pub macs: BTreeMap<OwnMac, u32>,
    /// `SLB_SUBNETS`.
    pub subnets: Subnets,
    /// `SLB_SOURCES`. Flows remember indices, so that an address keeps its own for ever.
    pub sources: BTreeMap<u32, Address>,
    /// `SLB_ACL`, by [`slb_common::abi::Listener::acl`]. Never changed: another list has another number.
    pub acls: BTreeMap<u32, Arc<Acl>>,
    /// `SLB_QUIC`.
    pub quic: BTreeMap<QuicKey, u32>,
    /// `SLB_LIMITS`, without the elements that have none.
    pub limits: BTreeMap<u32, Limits>,
}

/// What a listener's VIPs of one family share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerState {
    /// [`slb_common::abi::Listener::id`].
    pub id: u32,
    /// Who gets new flows.
    pub schedule: Arc<Schedule>,
    /// What else there is to it.
    pub policy: Policy,
}

/// What a listener has besides its schedule: fields of [`slb_common::abi::Listener`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// What it asks of the packet path.
    pub flags: ListenerFlags,
    /// Number of its access list.
    pub acl: u32,
    /// For how many jiffies a client is kept with its backend.
    pub sticky_jiffies: u32,
}

/// By what one of a schedule's slots is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chooser {
    /// [`slb_common::abi::Listener::scheduler`].
    pub scheduler: Scheduler,
    /// [`slb_common::abi::Listener::seed`].
    pub seed: Seed,
}

impl Chooser {
    /// The number of the slot of a flow, of so many, by a scheduler that chooses by hash.
    #[must_use]
    pub fn slot(&self, key: &FlowKey, slots: usize) -> usize {
        let hash = hash::flow(key, &self.seed);
        let choice = hash::choice_by(self.scheduler, key, hash, &self.seed);
        hash::slot(choice, slots as u32) as usize
    }
}

/// Who gets new flows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// By what one of the slots is chosen.
    pub by: Chooser,
    /// By what one of those before is.
    pub previous_by: Chooser,
    /// As in [`slb_common::abi::Chunk`]; empty: no backend.
    pub slots: Vec<u32>,
    /// The same, for connections that are older than the last change; empty: no connection goes by it.
    pub previous: Vec<u32>,
}

impl Schedule {
    /// One that no other was before.
    #[must_use]
    pub const fn new(by: Chooser, slots: Vec<u32>) -> Self {
        let previous_by = Chooser { scheduler: Scheduler::HASH, ..by };
        Self { by, previous_by, slots, previous: Vec::new() }
    }

    /// The elements of `SLB_SLOTS` that this takes: the slots, and behind them the previous ones.
    pub fn chunks(&self) -> impl Iterator<Item = &[u32]> + Clone {
        self.slots.chunks(CHUNK_SLOTS).chain(self.previous.chunks(CHUNK_SLOTS))
    }

    /// The part of new flows that each backend is to get, by its index in `SLB_BACKENDS`.
    #[must_use]
    pub fn shares(&self) -> BTreeMap<u32, f64> {
        let mut slots = FxHashMap::<u32, u32>::default();
        for &slot in &self.slots {
            *slots.entry(slot & SLOT_BACKEND).or_default() += 1;
        }
        slots.remove(&NO_BACKEND);
        let all = self.slots.len() as f64;
        slots.into_iter().map(|(backend, slots)| (backend, f64::from(slots) / all)).collect()
    }
}

#[cfg(test)]
mod tests {
    use slb_common::abi::SLOT_LOOK;

    use super::*;

    #[test]
    fn given_slots_when_asked_for_shares_then_each_backend_has_its_part() {
        let cases = [
            (vec![], vec![]),
            (vec![7], vec![(7, 1.0)]),
            (vec![1, 2, 1, 1], vec![(1, 0.75), (2, 0.25)]),
            (vec![9, 8, 9, 8], vec![(8, 0.5), (9, 0.5)]),
            (vec![3 | SLOT_LOOK, NO_BACKEND], vec![(3, 0.5)]),
        ];
        for (slots, expected) in cases {
            let by = Chooser { scheduler: Scheduler::HASH, seed: Seed::PUBLIC };
            let shares = Schedule::new(by, slots.clone()).shares();
            assert_eq!(shares, expected.into_iter().collect(), "{slots:?}");
        }
    }
}
