//! The flow table: what cannot be told from a packet alone.
//!
//! An array of buckets of eight places, one cache line each. A flow has a place in the bucket that its
//! hash says; where all eight are taken, one that has expired makes room, or one that is not proven
//! ([`slb_common::decide::rank`]). Proven ones stay: what comes later goes without.
//!
//! A client's packets have an entry ([`FlowKind::Original`]). What the backend answers has one only where
//! its address and port do not say enough ([`FlowKind::Reply`]): it leads to the client's.

mod create;
mod implied;
mod update;

pub use create::{adopt, create, insert_bypass, is_direct, is_taken, write_reply_key};
pub use implied::direct_may_be_balanced as may_be_balanced;
pub use update::{ENDS, establish, follow, update_original, update_reply};

use slb_common::{
    abi::{
        self, Address, BUCKET_FLOWS, Flow, FlowKey, FlowKind, NO_PLACE, NO_SOURCE, Seed, TAG_FREE,
        TAG_LOCKED,
    },
    decide::{self, Peer},
    hash,
};

use crate::{
    cell::{Elements as _, SharedCell},
    global::global,
    maps,
};

/// An entry. Its place may be given to another flow at any time: [`is_still`] says whether that has happened. What was
/// noted meanwhile, a `state` or `expires`, is then the other flow's for a moment: harmless.
pub type Entry = SharedCell<Flow>;

/// The entry of a packet, and its tag.
#[inline(always)]
pub fn lookup(key: &FlowKey) -> Option<(Entry, u32)> {
    let settings = maps::SLB_SETTINGS.cell(0)?;
    let seed = settings.table_seed();
    let tag = abi::tag(hash::flow(key, seed));
    let number = hash::bucket(key, seed, settings.buckets().load());
    let flows = maps::SLB_FLOWS.cell(number)?.flows();
    for turn in 0..BUCKET_FLOWS {
        // First places are spread over the cache's sets.
        let flow = flows.at((tag as usize / 4).wrapping_add(turn));
        if flow.tag().load() == tag && is_of(flow, key) {
            return Some((flow, tag));
        }
    }
    None
}

/// Whether the place that [`lookup`] has found with `tag` is still the flow's, so that what was read there is, too.
#[inline(always)]
pub fn is_still(flow: Entry, tag: u32) -> bool {
    flow.tag().load() == tag
}

/// The key of an entry's packets.
#[inline(always)]
pub fn key_of(flow: Entry) -> FlowKey {
    FlowKey {
        src: flow.src().load(),
        dst: flow.dst().load(),
        sport: flow.sport().load(),
        dport: flow.dport().load(),
        proto: flow.proto().load().into(),
    }
}

/// Whether this is the entry of `key`, whose tag it has. [`FlowKey::same`], but word by word: the packet path has no
/// registers for all of an entry's key.
#[inline(always)]
fn is_of(flow: Entry, key: &FlowKey) -> bool {
    // One branch: the verifier follows each.
    let ([a, b], [c, d]) = (key.src.halves(), key.dst.halves());
    let (src, dst) = (flow.src().words(), flow.dst().words());
    let mut differs = src.at(0).load() ^ a;
    differs |= src.at(1).load() ^ b;
    differs |= dst.at(0).load() ^ c;
    differs |= dst.at(1).load() ^ d;
    differs |= u64::from(flow.sport().load() ^ key.sport);
    differs |= u64::from(flow.dport().load() ^ key.dport);
    differs |= u64::from(u32::from(flow.proto().load()) ^ key.proto);
    differs == 0
}

global! {
    // `hash::flow`, off the beaten track.
    pub fn flow_hash(key: &FlowKey, seed: &Seed) -> u64 = hash::flow, or 0;
    // The same with the table's seed.
    pub fn table_hash(key: &FlowKey) -> u64 = with_table_seed, or 0;
    // The place of the entry of `key`, or `NO_PLACE`.
    fn flow_position(key: &FlowKey) -> u32 = position, or NO_PLACE;
}

#[inline(always)]
fn with_table_seed(key: &FlowKey) -> u64 {
    maps::SLB_SETTINGS.cell(0).map_or(0, |settings| hash::flow(key, settings.table_seed()))
}

/// The bucket of a flow.
#[inline(always)]
fn bucket(key: &FlowKey) -> Option<u32> {
    let settings = maps::SLB_SETTINGS.cell(0)?;
    Some(hash::bucket(key, settings.table_seed(), settings.buckets().load()))
}

#[inline(always)]
fn position(key: &FlowKey) -> u32 {
    let tag = abi::tag(with_table_seed(key));
    let Some(number) = bucket(key) else { return NO_PLACE };
    let Some(bucket) = maps::SLB_FLOWS.cell(number) else { return NO_PLACE };
    for way in 0..BUCKET_FLOWS {
        let flow = bucket.flows().at(way);
        if flow.tag().load() == tag && is_of(flow, key) {
            return number * BUCKET_FLOWS as u32 + way as u32;
        }
    }
    NO_PLACE
}

/// The place of the entry of `key`, or [`NO_PLACE`].
#[inline(always)]
pub fn index_of(key: &FlowKey) -> u32 {
    flow_position(key)
}

/// [`lookup`] off the beaten track: a call, and a look-up more.
#[inline(always)]
pub fn slow_lookup(key: &FlowKey) -> Option<Entry> {
    get(index_of(key))
}

/// The entry at a place.
#[inline(always)]
pub fn get(place: u32) -> Option<Entry> {
    let bucket = maps::SLB_FLOWS.cell(place / BUCKET_FLOWS as u32)?;
    Some(bucket.flows().at(place as usize))
}

/// The client's entry of `reply`, whose key is `key`: its place may belong to another flow by now.
#[inline(always)]
pub fn reverse(reply: Entry, key: &FlowKey) -> Option<Entry> {
    if !reply.is(FlowKind::Reply) {
        return None;
    }
    let flow = get(reply.peer().load())?;
    let backend = maps::backend(flow.backend().load())?;
    let peer = Peer {
        tag: flow.tag().load(),
        is_original: flow.is(FlowKind::Original),
        proto: flow.proto().load(),
        port: flow.port().load(),
    };
    let is_it = decide::is_owner(&peer, key, backend) && is_sender(flow, &key.dst);
    is_it.then_some(flow)
}

/// Whether a backend takes the packets of a client's entry to come from `addr`.
#[inline(always)]
fn is_sender(flow: Entry, addr: &Address) -> bool {
    match flow.source().load() {
        NO_SOURCE => flow.src().load().same(*addr),
        source => maps::source(source).is_some_and(|source| source.load().same(*addr)),
    }
}

/// Makes a place free, unless another CPU or the agent has done so, or is writing there. Rare, so it is a call.
#[inline(never)]
pub fn delete(flow: Entry) {
    let tag = flow.tag().load();
    let (was_active, backend) = (is_active(flow), flow.backend().load());
    if tag > TAG_LOCKED && flow.tag().compare_exchange(tag, TAG_FREE) && was_active {
        count(backend, -1);
    }
}

/// Whether an entry is one that `SLB_ACTIVE` counts.
#[inline(always)]
fn is_active(flow: Entry) -> bool {
    flow.is(FlowKind::Original) && flow.state().load().is_active()
}

/// Adds `delta` to the backend's number of active flows.
#[inline(always)]
fn count(backend: u32, delta: i64) {
    if let Some(active) = maps::SLB_ACTIVE.cell(backend) {
        active.fetch_add(delta as u64);
    }
}

/// The reply's entry of the client's at `place`, if it is there.
#[inline(always)]
pub fn reply_of(flow: Entry, place: u32) -> Option<Entry> {
    let is_it = |reply: &Entry| reply.is(FlowKind::Reply) && reply.peer().load() == place;
    get(flow.peer().load()).filter(is_it)
}
