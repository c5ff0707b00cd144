//! New entries: a place in the table, a port that is free, and both directions.

use core::{
    ptr,
    sync::atomic::{Ordering, compiler_fence},
};

use aya_ebpf::helpers::bpf_get_prandom_u32;
use slb_common::{
    abi::{
        self, BUCKET_FLOWS, Backend, ConnState, FLOW_BYPASS, FLOW_ORIGINAL, FLOW_REPLY, Flow,
        FlowKey, Keys, NO_PLACE, NO_SOURCE, PROXY_NONE, TAG_FREE, TAG_LOCKED, is_over,
    },
    decide::{self, Entries},
    hash,
    verdict::Verdict,
};

use super::{
    count, delete, flow_hash, get, implied::may_be_balanced, is_active, reverse, slow_lookup,
};
use crate::{atomic, maps};

/// How many source ports are tried before a flow is given up.
const PORT_ATTEMPTS: u32 = 8;

/// First port that may replace a client's.
const FIRST_PORT: u32 = 1_024;

/// The port behind the last: from here on, most clients take theirs (`net.ipv4.ip_local_port_range`).
const LAST_PORT: u32 = 32_768;

/// What a backend answers with to `key`, if it was sent from `port`. Written in place: stack is scarce.
#[inline(always)]
pub fn write_reply_key(reply: &mut FlowKey, key: &FlowKey, backend: &Backend, port: u16) {
    reply.src = backend.addr.copied();
    reply.dst = key.src.copied();
    reply.sport = backend.port as u16;
    reply.dport = port;
    reply.proto = key.proto;
}

/// Whether a flow other than that of `own` has the answer `reply`. What nobody uses any more is removed.
#[inline(always)]
pub fn is_taken(now: u32, reply: &FlowKey, own: &FlowKey) -> bool {
    flow_is_taken(now, reply, own) != 0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn flow_is_taken(now: u32, reply: *const FlowKey, own: *const FlowKey) -> u32 {
    // SAFETY: the caller above passes references.
    let (Some(reply), Some(own)) = (unsafe { (reply.as_ref(), own.as_ref()) }) else { return 1 };
    let Some(owner) = slow_lookup(reply) else { return 0 };
    let is_reply = owner.kind == FLOW_REPLY;
    let mut is_free = owner.state.has_ended() || is_over(now, owner.expires);
    if is_reply {
        match reverse(owner, reply) {
            Some(forward) if is_free || forward.is_of(own) => {
                delete(forward);
                is_free = true;
            }
            Some(_) => {}
            None => is_free = true,
        }
    }
    if is_free {
        delete(owner);
        return 0;
    }
    1
}

/// Makes the entries of the flow of `key` to the backend `id`, and gives the source port towards it.
///
/// Calls one after the other: the search for a port is the deepest chain of calls, so nothing that the
/// entries need is on the stack meanwhile.
#[inline(always)]
pub fn create(now: u32, key: &FlowKey, id: u32, entries: Entries) -> Result<u16, Verdict> {
    let drawn = match entries {
        Entries::Forward => pack(NO_SOURCE, key.sport),
        Entries::Both => flow_draw_port(now, key, id),
        Entries::OwnSource => flow_draw_source(now, key, id),
    };
    if drawn & IS_VERDICT != 0 {
        return Err(Verdict::from_slot(drawn as u32));
    }
    match flow_insert(now, key, id, drawn as u32, u32::from(entries != Entries::Forward)) {
        NO_PLACE => Err(Verdict::TableFull),
        _ => Ok(drawn as u16),
    }
}

/// In what [`flow_draw_port`] and [`flow_draw_source`] give: the rest is a verdict.
const IS_VERDICT: u64 = 1 << 32;

/// Which port the backend `id` is to see: the client's, or another if that is taken. Leaves the key of the replies in
/// this CPU's [`Keys`], where [`flow_insert`] finds it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn flow_draw_port(now: u32, key: *const FlowKey, id: u32) -> u64 {
    // SAFETY: the caller above passes a reference.
    let (Some(key), Some(backend), Some(Keys { reply, .. })) =
        (unsafe { key.as_ref() }, maps::backend(id), maps::keys())
    else {
        return IS_VERDICT | Verdict::Inconsistent as u64;
    };
    write_reply_key(reply, key, backend, key.sport);
    // A direct flow must not pass for the one through a listener that may be there without an
    // entry. With one backend any port may have one: then it has to do that few clients use it.
    let is_direct = key.dst.same(reply.src) && key.dport == reply.sport;
    if !is_direct && !is_taken(now, reply, key) {
        return pack(NO_SOURCE, reply.dport);
    }
    let mut draw = hash::choice(flow_hash(key));
    for attempt in 0..PORT_ATTEMPTS {
        draw = next_draw(draw);
        reply.dport = port(draw);
        if !is_taken(now, reply, key)
            && (attempt >= PORT_ATTEMPTS / 2 || !may_be_balanced(now, reply, id))
        {
            return pack(NO_SOURCE, reply.dport);
        }
    }
    IS_VERDICT | Verdict::NoPort as u64
}

/// Which address and port of the gateway the backend `id` is to see, as [`flow_draw_port`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn flow_draw_source(now: u32, key: *const FlowKey, id: u32) -> u64 {
    // SAFETY: the caller above passes a reference.
    let (Some(key), Some(backend), Some(Keys { reply, .. })) =
        (unsafe { key.as_ref() }, maps::backend(id), maps::keys())
    else {
        return IS_VERDICT | Verdict::Inconsistent as u64;
    };
    let hash = flow_hash(key);
    write_reply_key(reply, key, backend, key.sport);
    let Some(source) = decide::source_of(backend, hash) else {
        return IS_VERDICT | Verdict::NoPort as u64;
    };
    let Some(addr) = maps::source(source) else { return IS_VERDICT | Verdict::NoPort as u64 };
    reply.dst = addr.copied();
    // A SYN cookie of an earlier connection is good for its port only, which the client must not know.
    let salt = if decide::proxy_of(key.proto, backend) == PROXY_NONE {
        0
    } else {
        // SAFETY: touches no memory of ours.
        unsafe { bpf_get_prandom_u32() }
    };
    let mut draw = hash::choice(hash) ^ salt;
    for _ in 0..PORT_ATTEMPTS {
        draw = next_draw(draw);
        reply.dport = port(draw);
        if !is_taken(now, reply, key) {
            return pack(source, reply.dport);
        }
    }
    IS_VERDICT | Verdict::NoPort as u64
}

/// A linear congruential generator.
#[inline(always)]
const fn next_draw(draw: u32) -> u32 {
    draw.wrapping_mul(0x9e37_79b1).wrapping_add(1)
}

#[inline(always)]
const fn port(draw: u32) -> u16 {
    (FIRST_PORT + hash::slot(draw, LAST_PORT - FIRST_PORT)) as u16
}

#[inline(always)]
const fn pack(source: u16, port: u16) -> u64 {
    (source as u64) << 16 | port as u64
}

/// Makes the entries of a flow whose source is `drawn`, for both directions if that is asked for. Gives the place of
/// the client's.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn flow_insert(now: u32, key: *const FlowKey, id: u32, drawn: u32, both: u32) -> u32 {
    // SAFETY: the caller above passes a reference.
    let (Some(key), Some(backend), Some(Keys { reply, .. })) =
        (unsafe { key.as_ref() }, maps::backend(id), maps::keys())
    else {
        return NO_PLACE;
    };
    let hash = flow_hash(key);
    let place = flow_take(now, key, abi::tag(hash));
    let Some(flow) = get(place) else { return NO_PLACE };
    fill(flow, key, id, FLOW_ORIGINAL, now.wrapping_add(maps::settings().opening_jiffies));
    (flow.source, flow.port) = ((drawn >> 16) as u16, drawn as u16);
    flow.proxy =
        if flow.source == NO_SOURCE { PROXY_NONE } else { decide::proxy_of(key.proto, backend) };
    if flow.proxy != PROXY_NONE {
        flow.state = ConnState::PROXY_PENDING;
    }
    publish(flow, hash);
    count(id, 1);
    if both != 0 && flow_insert_reply(now, reply, place) == NO_PLACE {
        delete(flow);
        return NO_PLACE;
    }
    place
}

/// Remembers that what a backend answers with `key` is not for us.
#[inline(always)]
pub fn insert_bypass(now: u32, key: &FlowKey, id: u32) {
    let hash = flow_hash(key);
    if let Some(flow) = get(flow_take(now, key, abi::tag(hash))) {
        fill(flow, key, id, FLOW_BYPASS, now.wrapping_add(maps::settings().opening_jiffies));
        publish(flow, hash);
    }
}

/// Makes the entry of an answer to the flow at `place`, and gives its own.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn flow_insert_reply(now: u32, key: *const FlowKey, place: u32) -> u32 {
    // SAFETY: the callers pass references.
    let (Some(key), Some(forward)) = (unsafe { key.as_ref() }, get(place)) else { return NO_PLACE };
    let hash = flow_hash(key);
    let own = flow_take(now, key, abi::tag(hash));
    if let Some(flow) = get(own) {
        fill(flow, key, forward.backend, FLOW_REPLY, forward.expires);
        flow.state = forward.state;
        flow.peer = place;
        publish(flow, hash);
        forward.peer = own;
    }
    own
}

/// Writes an entry, except for its tag.
#[inline(always)]
fn fill(flow: &mut Flow, key: &FlowKey, id: u32, kind: u8, expires: u32) {
    flow.expires = expires;
    flow.src = key.src.copied();
    flow.dst = key.dst.copied();
    flow.sport = key.sport;
    flow.dport = key.dport;
    flow.backend = id;
    flow.proto = key.proto as u8;
    flow.kind = kind;
    flow.state = ConnState::empty();
    flow.proxy = PROXY_NONE;
    flow.port = key.sport;
    flow.source = NO_SOURCE;
    flow.peer = NO_PLACE;
    flow.sequence = 0;
}

/// Lets others find an entry.
#[inline(always)]
fn publish(flow: &mut Flow, hash: u64) {
    compiler_fence(Ordering::Release);
    // SAFETY: an aligned word.
    unsafe { ptr::write_volatile(&raw mut flow.tag, abi::tag(hash)) };
}

/// Takes a place for the flow of `key`, whose tag is `tag`; [`NO_PLACE`] if all that it could have are established.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn flow_take(now: u32, key: *const FlowKey, tag: u32) -> u32 {
    // SAFETY: the callers pass references.
    let Some(key) = (unsafe { key.as_ref() }) else { return NO_PLACE };
    let number = hash::bucket(key, maps::settings().buckets);
    let Some(bucket) = maps::SLB_FLOWS.get_ptr_mut(number) else { return NO_PLACE };
    let mut best = 0;
    let mut found = 0;
    for turn in 0..BUCKET_FLOWS {
        let way = (tag as usize / 4).wrapping_add(turn) % BUCKET_FLOWS;
        // SAFETY: as in `lookup`.
        let flow = unsafe { &(*bucket).flows[way] };
        // The higher, the less it is missed: free, over, or opening, the oldest first.
        let rank = match flow.tag {
            TAG_FREE => u32::MAX,
            TAG_LOCKED => 0,
            _ if is_over(now, flow.expires) => u32::MAX - 1,
            _ if !flow.state.intersects(ConnState::ESTABLISHED) || flow.state.has_ended() => {
                i32::MAX as u32 - flow.expires.wrapping_sub(now).min(i32::MAX as u32 - 1)
            }
            _ => 0,
        };
        if rank > best {
            best = rank;
            found = way;
        }
        if rank == u32::MAX {
            break;
        }
    }
    if best == 0 {
        return NO_PLACE;
    }
    // SAFETY: as in `lookup`.
    let tag = unsafe { &raw mut (*bucket).flows[found % BUCKET_FLOWS].tag };
    // SAFETY: an aligned word of an array. Whoever loses goes without an entry.
    let before = unsafe { *tag };
    // SAFETY: as above.
    let is_ours = unsafe { atomic::compare_exchange(tag, before, TAG_LOCKED) };
    // SAFETY: as in `lookup`.
    let flow = unsafe { &(*bucket).flows[found % BUCKET_FLOWS] };
    if is_ours && before > TAG_LOCKED && is_active(flow) {
        count(flow.backend, -1);
    }
    if is_ours { number * BUCKET_FLOWS as u32 + found as u32 } else { NO_PLACE }
}
