//! Flows that have no entry, because their listener's schedule says where they go.

use slb_common::{
    abi::{self, Endpoint, FlowKey, Keys, Listener, SLOT_BACKEND, is_over},
    hash,
};

use super::{hash as flow_hash, slow_lookup};
use crate::{lookups, maps};

/// Whether `reply`, with which the backend `id` answers, may belong to a flow through a listener that
/// has no entry.
#[inline(always)]
pub fn may_be_balanced(now: u32, reply: &FlowKey, id: u32) -> bool {
    direct_may_be_balanced(now, reply, id) != 0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn direct_may_be_balanced(now: u32, reply: *const FlowKey, id: u32) -> u32 {
    // SAFETY: the caller above passes a reference.
    let Some(reply) = (unsafe { reply.as_ref() }) else { return 0 };
    let Some(Keys { forward: key, to: at, .. }) = maps::keys() else { return 0 };
    *at = reply.source();
    let from: &Endpoint = at;
    // The hash maps themselves take less stack than their indices.
    // SAFETY: a replaced value lives on until the program ends.
    let Some(origin) = (unsafe { maps::SLB_REVNAT.get(from) }) else { return 0 };
    *key = FlowKey {
        src: reply.dst,
        dst: origin.vip,
        sport: reply.dport,
        dport: origin.port as u16,
        proto: reply.proto,
    };
    *at = key.destination();
    let to: &Endpoint = at;
    // SAFETY: a replaced value lives on until the program ends.
    let Some(listener) = (unsafe { maps::SLB_LISTENERS.get(to) }) else { return 0 };
    if let Some(flow) = slow_lookup(key) {
        // The same as `reply.dport`, but not on the stack meanwhile.
        let is_it = flow.backend == id && flow.port == key.sport;
        let is_alive = !flow.state.has_ended() && !is_over(now, flow.expires);
        return u32::from(is_it && is_alive);
    }
    if origin.backend != id || !abi::is_by_hash(listener.scheduler) {
        return 0;
    }
    is_choice(listener, key, id)
}

/// Whether the schedule, or the one before, chooses the backend `id`.
#[inline(never)]
fn is_choice(listener: &Listener, key: &FlowKey, id: u32) -> u32 {
    let hash = flow_hash(key);
    let is_by = |scheduler, first_chunk, slots| {
        let choice = hash::choice_by(scheduler, key, hash);
        slots != 0
            && lookups::slot(first_chunk, hash::slot(choice, slots))
                .is_ok_and(|slot| slot & SLOT_BACKEND == id)
    };
    let Listener { scheduler, first_chunk, slots, .. } = *listener;
    let Listener { previous_scheduler, previous_chunk, previous_slots, .. } = *listener;
    let is_chosen = is_by(scheduler, first_chunk, slots)
        || is_by(previous_scheduler, previous_chunk, previous_slots);
    is_chosen.into()
}
