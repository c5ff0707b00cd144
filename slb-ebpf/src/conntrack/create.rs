//! New entries: a place in the table, a port that is free, and both directions.

use slb_common::{
    abi::{
        self, BUCKET_FLOWS, Backend, ConnState, FlowKey, FlowKind, NO_PLACE, NO_SOURCE, PROXY_NONE,
        TAG_FREE, TAG_LOCKED, is_over,
    },
    decide::{self, Entries},
    hash,
    verdict::Verdict,
};

use super::{
    Entry, count, delete, flow_hash, get, implied::direct_may_be_balanced, is_active, is_of,
    reverse, slow_lookup,
};
use crate::{
    cell::{Claim, Elements as _},
    global::{Packed, global},
    kernel, maps,
};

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

global! {
    pub fn flow_is_taken(now: u32, reply: &FlowKey, own: &FlowKey) -> bool = is_taken, or true;
    fn flow_draw_port(now: u32, key: &FlowKey, id: u32) -> Result<Source, Verdict>
        = draw_port, or Err(Verdict::Inconsistent);
    fn flow_draw_source(now: u32, key: &FlowKey, id: u32) -> Result<Source, Verdict>
        = draw_source, or Err(Verdict::Inconsistent);
    fn flow_insert(now: u32, key: &FlowKey, id: u32, source: u32, both: u32) -> u32
        = insert, or NO_PLACE;
    pub fn flow_insert_reply(now: u32, key: &FlowKey, place: u32) -> u32 = insert_reply, or NO_PLACE;
    fn flow_take(now: u32, key: &FlowKey, tag: u32) -> u32 = take, or NO_PLACE;
}

/// Whether a flow other than that of `own` has the answer `reply`. An entry that has expired is removed.
#[inline(always)]
fn is_taken(now: u32, reply: &FlowKey, own: &FlowKey) -> bool {
    let Some(owner) = slow_lookup(reply) else { return false };
    let is_reply = owner.is(FlowKind::Reply);
    // A direct flow that the backend has not answered has nothing.
    let mut is_free = owner.state().load().has_ended()
        || is_over(now, owner.expires().load())
        || owner.is(FlowKind::Bypass) && !is_direct(now, owner);
    if is_reply {
        match reverse(owner, reply) {
            Some(forward) if is_free || is_of(forward, own) => {
                delete(forward);
                is_free = true;
            }
            Some(_) => {}
            None => is_free = true,
        }
    }
    if is_free {
        delete(owner);
    }
    !is_free
}

/// Whether an entry is the record of a direct flow that its backend has answered.
#[inline(always)]
pub fn is_direct(now: u32, flow: Entry) -> bool {
    flow.is(FlowKind::Bypass) && decide::is_direct(now, flow.state().load(), flow.expires().load())
}

/// Makes the entries of the flow of `key` to the backend `id`, and gives the source port towards it.
///
/// Calls one after the other: the search for a port is the deepest chain of calls, so nothing that the
/// entries need is on the stack meanwhile.
#[inline(always)]
pub fn create(now: u32, key: &FlowKey, id: u32, entries: Entries) -> Result<u16, Verdict> {
    let source = match entries {
        Entries::Forward => Source::new(NO_SOURCE, key.sport),
        Entries::Both => flow_draw_port(now, key, id)?,
        Entries::OwnSource => flow_draw_source(now, key, id)?,
    };
    match flow_insert(now, key, id, source.pack(), u32::from(entries != Entries::Forward)) {
        NO_PLACE => Err(Verdict::TableFull),
        _ => Ok(source.port()),
    }
}

/// Where a backend takes the packets of a flow to come from: in the low half a port, in the high half an index into
/// `SLB_SOURCES`, or [`NO_SOURCE`] for the client's address.
#[derive(Clone, Copy)]
struct Source(u32);

impl Source {
    #[inline(always)]
    const fn new(number: u16, port: u16) -> Self {
        Self((number as u32) << 16 | port as u32)
    }

    #[inline(always)]
    const fn number(self) -> u16 {
        (self.0 >> 16) as u16
    }

    #[inline(always)]
    const fn port(self) -> u16 {
        self.0 as u16
    }
}

impl Packed for Source {
    type Register = u32;

    #[inline(always)]
    fn pack(self) -> u32 {
        self.0
    }

    #[inline(always)]
    fn unpack(register: u32) -> Self {
        Self(register)
    }
}

/// Which port the backend `id` is to see: the client's, or another if that is taken. Leaves the key of the replies in
/// [`maps::reply_key`], where [`insert`] finds it.
#[inline(always)]
fn draw_port(now: u32, key: &FlowKey, id: u32) -> Result<Source, Verdict> {
    let (Some(backend), Some(reply)) = (maps::backend(id), maps::reply_key()) else {
        return Err(Verdict::Inconsistent);
    };
    write_reply_key(reply, key, backend, key.sport);
    if !flow_is_taken(now, reply, key) {
        return Ok(Source::new(NO_SOURCE, reply.dport));
    }
    let mut draw = hash::choice(flow_hash(key));
    for attempt in 0..PORT_ATTEMPTS {
        draw = next_draw(draw);
        reply.dport = port(draw);
        // A flow through the listener may have that port without an entry. With one backend any port may have one:
        // then it has to do that few clients use it.
        if !flow_is_taken(now, reply, key)
            && (attempt >= PORT_ATTEMPTS / 2 || !direct_may_be_balanced(now, reply, id))
        {
            return Ok(Source::new(NO_SOURCE, reply.dport));
        }
    }
    Err(Verdict::NoPort)
}

/// Which address and port of the gateway the backend `id` is to see, as [`draw_port`].
#[inline(always)]
fn draw_source(now: u32, key: &FlowKey, id: u32) -> Result<Source, Verdict> {
    let (Some(backend), Some(reply)) = (maps::backend(id), maps::reply_key()) else {
        return Err(Verdict::Inconsistent);
    };
    let hash = flow_hash(key);
    write_reply_key(reply, key, backend, key.sport);
    let source = decide::source_of(backend, hash).ok_or(Verdict::NoPort)?;
    reply.dst = maps::source(source).ok_or(Verdict::NoPort)?.load();
    // A SYN cookie of an earlier connection is good for its port only, which the client must not know.
    let is_told = decide::proxy_of(key.proto, backend) != PROXY_NONE;
    let salt = if is_told { kernel::random() } else { 0 };
    let mut draw = hash::choice(hash) ^ salt;
    for _ in 0..PORT_ATTEMPTS {
        draw = next_draw(draw);
        reply.dport = port(draw);
        if !flow_is_taken(now, reply, key) {
            return Ok(Source::new(source, reply.dport));
        }
    }
    Err(Verdict::NoPort)
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

/// Makes the entries of a flow with that source, packed, for both directions if that is asked for. Gives the place of
/// the client's.
#[inline(always)]
fn insert(now: u32, key: &FlowKey, id: u32, source: u32, both: u32) -> u32 {
    let (Some(backend), Some(reply)) = (maps::backend(id), maps::reply_key()) else {
        return NO_PLACE;
    };
    let hash = flow_hash(key);
    let place = flow_take(now, key, abi::tag(hash));
    let Some(flow) = get(place) else { return NO_PLACE };
    fill(flow, key, id, FlowKind::Original, now.wrapping_add(maps::settings().opening_jiffies()));
    let source = Source::unpack(source);
    let number = source.number();
    flow.source().store(number);
    flow.port().store(source.port());
    let proxy = if number == NO_SOURCE { PROXY_NONE } else { decide::proxy_of(key.proto, backend) };
    if proxy != PROXY_NONE {
        flow.proxy().store(proxy);
        flow.state().store(ConnState::PROXY_PENDING);
    }
    publish(flow, hash);
    count(id, 1);
    if both != 0 && flow_insert_reply(now, reply, place) == NO_PLACE {
        delete(flow);
        return NO_PLACE;
    }
    place
}

/// Makes the record of a direct flow that begins, whose answers have `key`: the backend is to acknowledge `sequence`.
#[inline(always)]
pub fn insert_bypass(now: u32, key: &FlowKey, id: u32, sequence: u32) {
    let hash = flow_hash(key);
    if let Some(flow) = get(flow_take(now, key, abi::tag(hash))) {
        fill(flow, key, id, FlowKind::Bypass, now.wrapping_add(maps::settings().opening_jiffies()));
        flow.sequence().store(sequence);
        publish(flow, hash);
    }
}

/// Makes the entry of an answer to the flow at `place`, and gives its own.
#[inline(always)]
fn insert_reply(now: u32, key: &FlowKey, place: u32) -> u32 {
    let Some(forward) = get(place) else { return NO_PLACE };
    let hash = flow_hash(key);
    let own = flow_take(now, key, abi::tag(hash));
    if let Some(flow) = get(own) {
        fill(flow, key, forward.backend().load(), FlowKind::Reply, forward.expires().load());
        flow.state().store(forward.state().load());
        flow.peer().store(place);
        publish(flow, hash);
        forward.peer().store(own);
    }
    own
}

/// Writes an entry, except for its tag.
#[inline(always)]
fn fill(flow: Entry, key: &FlowKey, id: u32, kind: FlowKind, expires: u32) {
    flow.expires().store(expires);
    flow.src().store(key.src);
    flow.dst().store(key.dst);
    flow.sport().store(key.sport);
    flow.dport().store(key.dport);
    flow.backend().store(id);
    flow.proto().store(key.proto as u8);
    flow.kind().store(kind as u8);
    flow.state().store(ConnState::empty());
    flow.proxy().store(PROXY_NONE);
    flow.port().store(key.sport);
    flow.source().store(NO_SOURCE);
    flow.peer().store(NO_PLACE);
    flow.sequence().store(0);
}

/// Lets others find an entry that [`flow_take`] has claimed.
#[inline(always)]
fn publish(flow: Entry, hash: u64) {
    Claim::handed_over(flow).publish(abi::tag(hash));
}

/// Takes a place for the flow of `key`, whose tag is `tag`; [`NO_PLACE`] if all that it could have are established.
#[inline(always)]
fn take(now: u32, key: &FlowKey, tag: u32) -> u32 {
    let number = hash::bucket(key, maps::settings().buckets());
    let Some(bucket) = maps::SLB_FLOWS.cell(number) else { return NO_PLACE };
    let mut best = 0;
    let mut found = 0;
    for turn in 0..BUCKET_FLOWS {
        let way = (tag as usize / 4).wrapping_add(turn) % BUCKET_FLOWS;
        let rank = rank(now, bucket.flows().at(way));
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
    let flow = bucket.flows().at(found);
    let before = flow.tag().load();
    // Of two CPUs that claim it, one goes without an entry.
    if flow.claim(before).is_none() {
        return NO_PLACE;
    }
    if before != TAG_FREE && is_active(flow) {
        count(flow.backend().load(), -1);
    }
    number * BUCKET_FLOWS as u32 + found as u32
}

/// How little an entry is missed: free, over, or opening, the oldest first. 0: it stays.
#[inline(always)]
fn rank(now: u32, flow: Entry) -> u32 {
    match flow.tag().load() {
        TAG_FREE => return u32::MAX,
        TAG_LOCKED => return 0,
        _ => {}
    }
    let (expires, state) = (flow.expires().load(), flow.state().load());
    if is_over(now, expires) {
        return u32::MAX - 1;
    }
    if state.intersects(ConnState::ESTABLISHED) && !state.has_ended() {
        return 0;
    }
    i32::MAX as u32 - expires.wrapping_sub(now).min(i32::MAX as u32 - 1)
}
