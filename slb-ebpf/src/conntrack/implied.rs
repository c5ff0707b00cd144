//! Flows that have no entry, because their listener's schedule says where they go.

use slb_common::{
    abi::{FlowKey, Listener, SLOT_BACKEND, is_over},
    hash,
};

use super::{flow_hash, slow_lookup};
use crate::{global::global, lookups, maps};

global! {
    pub fn direct_may_be_balanced(now: u32, reply: &FlowKey, id: u32) -> bool
        = may_be_balanced, or false;
}

/// Whether `reply`, with which the backend `id` answers, may belong to a flow through a listener that
/// has no entry.
#[inline(always)]
fn may_be_balanced(now: u32, reply: &FlowKey, id: u32) -> bool {
    let Some((key, at)) = maps::client_key() else { return false };
    *at = reply.source();
    // The hash maps themselves take less stack than their indices.
    let Some(origin) = maps::revnat_entry(at) else { return false };
    *key = FlowKey {
        src: reply.dst,
        dst: origin.vip,
        sport: reply.dport,
        dport: origin.port as u16,
        proto: reply.proto,
    };
    *at = key.destination();
    let Some(listener) = maps::listener_entry(at) else { return false };
    let known = slow_lookup(key).filter(|flow| !is_over(now, flow.expires().load()));
    if let Some(flow) = known {
        // The same as `reply.dport`, but not on the stack meanwhile.
        let is_it = flow.backend().load() == id && flow.port().load() == key.sport;
        return is_it && !flow.state().load().has_ended();
    }
    if origin.backend != id || !listener.scheduler.is_by_hash() {
        return false;
    }
    is_choice(listener, key, id)
}

/// Whether the schedule, or the one before, chooses the backend `id`.
#[inline(never)]
fn is_choice(listener: &Listener, key: &FlowKey, id: u32) -> bool {
    let is_by = |scheduler, seed, first_chunk, slots| {
        let choice = hash::choice_by(scheduler, key, flow_hash(key, seed), seed);
        slots != 0
            && lookups::slot(first_chunk, hash::slot(choice, slots))
                .is_ok_and(|slot| slot & SLOT_BACKEND == id)
    };
    let Listener { scheduler, first_chunk, slots, .. } = *listener;
    let Listener { previous_scheduler, previous_chunk, previous_slots, .. } = *listener;
    is_by(scheduler, &listener.seed, first_chunk, slots)
        || is_by(previous_scheduler, &listener.previous_seed, previous_chunk, previous_slots)
}
