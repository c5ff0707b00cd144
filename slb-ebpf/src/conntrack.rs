//! The flow table: what cannot be told from a packet alone.
//!
//! An array of buckets of eight places, one cache line each. A flow has a place in the bucket that its
//! hash says; where all eight are taken, one that nobody uses any more makes room, or one whose
//! connection was never established. Established ones stay: what comes later goes without.
//!
//! A client's packets have an entry ([`FLOW_ORIGINAL`]). What the backend answers has one only where
//! its address and port do not say enough ([`FLOW_REPLY`]): it leads to the client's.

mod create;
mod implied;
mod update;

pub use create::{create, insert_bypass, is_taken};
pub use implied::may_be_balanced;
pub use update::{establish, follow, update_bypass, update_original, update_reply};

use slb_common::{
    abi::{
        self, Address, BUCKET_FLOWS, FLOW_ORIGINAL, FLOW_REPLY, Flow, FlowKey, NO_PLACE, NO_SOURCE,
        TAG_FREE,
    },
    decide, hash,
};

use crate::{atomic, maps};

/// The entry of a packet.
#[inline(always)]
pub fn lookup(key: &FlowKey, hash: u64) -> Option<&'static mut Flow> {
    let number = hash::bucket(key, maps::settings().buckets);
    let bucket = maps::SLB_FLOWS.get_ptr_mut(number)?;
    let tag = abi::tag(hash);
    for turn in 0..BUCKET_FLOWS {
        // First places are spread over the cache's sets.
        let way = (tag as usize / 4).wrapping_add(turn) % BUCKET_FLOWS;
        // SAFETY: an element of an array lives as long as the program. A place may be given to another
        // flow meanwhile, whose `state` or `expires` may then be off for a moment: harmless.
        let flow = unsafe { &mut (*bucket).flows[way] };
        if flow.tag == tag && flow.is_of(key) {
            return Some(flow);
        }
    }
    None
}

/// [`hash::flow`], off the beaten track.
///
/// Global functions like this one are verified once, not once per way to them. All that they may take
/// is numbers and pointers to plain structures, of which the verifier says that they may be null.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn flow_hash(key: *const FlowKey) -> u64 {
    // SAFETY: the callers pass references.
    unsafe { key.as_ref() }.map_or(0, hash::flow)
}

/// The place of the entry of `key`, or [`NO_PLACE`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn flow_position(key: *const FlowKey) -> u32 {
    // SAFETY: the callers pass references.
    let Some(key) = (unsafe { key.as_ref() }) else { return NO_PLACE };
    let hash = hash::flow(key);
    let number = hash::bucket(key, maps::settings().buckets);
    let Some(bucket) = maps::SLB_FLOWS.get(number) else { return NO_PLACE };
    let tag = abi::tag(hash);
    for way in 0..BUCKET_FLOWS {
        let flow = &bucket.flows[way];
        if flow.tag == tag && flow.is_of(key) {
            return number * BUCKET_FLOWS as u32 + way as u32;
        }
    }
    NO_PLACE
}

/// [`hash::flow`], off the beaten track.
#[inline(always)]
pub fn hash(key: &FlowKey) -> u64 {
    flow_hash(key)
}

/// The place of the entry of `key`, or [`NO_PLACE`].
#[inline(always)]
pub fn index_of(key: &FlowKey) -> u32 {
    flow_position(key)
}

/// [`lookup`] off the beaten track: a call, and a look-up more.
#[inline(always)]
pub fn slow_lookup(key: &FlowKey) -> Option<&'static mut Flow> {
    get(index_of(key))
}

/// The entry at a place.
#[inline(always)]
pub fn get(place: u32) -> Option<&'static mut Flow> {
    let bucket = maps::SLB_FLOWS.get_ptr_mut(place / BUCKET_FLOWS as u32)?;
    // SAFETY: as in `lookup`.
    Some(unsafe { &mut (*bucket).flows[place as usize % BUCKET_FLOWS] })
}

/// The client's entry of `reply`, whose key is `key`: its place may belong to another flow by now.
#[inline(always)]
pub fn reverse(reply: &Flow, key: &FlowKey) -> Option<&'static mut Flow> {
    let flow = get(reply.peer)?;
    let backend = maps::backend(flow.backend)?;
    let is_it = decide::is_owner(flow, key, backend) && is_sender(flow, &key.dst);
    is_it.then_some(flow)
}

/// Whether a backend takes the packets of a client's entry to come from `addr`.
#[inline(always)]
fn is_sender(flow: &Flow, addr: &Address) -> bool {
    if flow.source == NO_SOURCE {
        return flow.src.same(*addr);
    }
    maps::source(flow.source).is_some_and(|source| source.same(*addr))
}

/// Makes a place free.
#[inline(always)]
pub fn delete(flow: &mut Flow) {
    if is_active(flow) {
        count(flow.backend, -1);
    }
    flow.tag = TAG_FREE;
}

/// Whether an entry is one that `SLB_ACTIVE` counts.
#[inline(always)]
fn is_active(flow: &Flow) -> bool {
    flow.kind == FLOW_ORIGINAL && !flow.state.has_ended()
}

/// So many more flows of a backend are active.
#[inline(always)]
fn count(backend: u32, more: i64) {
    if let Some(active) = maps::SLB_ACTIVE.get_ptr_mut(backend) {
        // SAFETY: an element of an array, which is aligned and only added to.
        unsafe { atomic::fetch_add(active, more as u64) };
    }
}

/// The reply's entry of the client's at `place`, if it is there.
#[inline(always)]
pub fn reply_of(flow: &Flow, place: u32) -> Option<&'static mut Flow> {
    get(flow.peer).filter(|reply| reply.kind == FLOW_REPLY && reply.peer == place)
}
