//! New entries: a place in the table, a port that is free, and both directions.

use slb_common::{
    abi::{
        self, BUCKET_FLOWS, Backend, ConnState, FlowKey, FlowKind, NO_PLACE, NO_SOURCE, PROXY_NONE,
        TAG_FREE,
    },
    decide::{self, Entries, Rank, Standing},
    hash,
    verdict::Verdict,
};

use super::{
    Entry, bucket, count, delete, get, implied::direct_may_be_balanced, index_of, is_active, is_of,
    reverse, table_hash,
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
    fn flow_claim_port(reply: &FlowKey, own: &FlowKey, least: u32) -> u32
        = claim_port, or Rank::STAYS.0;
    fn flow_draw_port(now: u32, key: &FlowKey, id: u32) -> Result<Source, Verdict>
        = draw_port, or Err(Verdict::Inconsistent);
    fn flow_draw_source(key: &FlowKey, id: u32) -> Result<Source, Verdict>
        = draw_source, or Err(Verdict::Inconsistent);
    fn flow_insert(now: u32, key: &FlowKey, id: u32, source: u32, both: u32) -> u32
        = insert, or NO_PLACE;
    pub fn flow_insert_reply(key: &FlowKey, place: u32) -> u32 = insert_reply, or NO_PLACE;
    fn flow_take(key: &FlowKey, tag: u32) -> u32 = take, or NO_PLACE;
    // The verifier would follow each rank through each place.
    fn flow_rank(key: &FlowKey, place: u32) -> u64 = rank, or 0;
}

/// Whether a flow other than that of `own` has the answer `reply`. An entry that has expired is removed.
#[inline(always)]
pub fn is_taken(reply: &FlowKey, own: &FlowKey) -> bool {
    Rank(flow_claim_port(reply, own, Rank::OVER.0)) < Rank::OVER
}

/// Removes the flow that has the answer `reply`, if its rank is `least` or more. Gives its [`Rank`], and that of `own`
/// is [`Rank::FREE`].
#[inline(always)]
fn claim_port(reply: &FlowKey, own: &FlowKey, least: u32) -> u32 {
    let place = index_of(reply);
    let Some(owner) = get(place) else { return Rank::FREE.0 };
    if !owner.is(FlowKind::Reply) {
        // A direct flow that the backend has not answered has nothing.
        let Rank(found) = if owner.is(FlowKind::Bypass) && !is_direct(kernel::jiffies(), owner) {
            Rank::FREE
        } else {
            rank_of(flow_rank(reply, place))
        };
        if found >= least {
            delete(owner);
        }
        return found;
    }
    let mut found = Rank::FREE.0;
    if let Some(forward) = reverse(owner, reply) {
        if !is_of(forward, own) {
            found = rank_of(flow_rank(reply, owner.peer().load())).0;
        }
        if found >= least {
            delete(forward);
        }
    }
    if found >= least {
        delete(owner);
    }
    found
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
        Entries::OwnSource => flow_draw_source(key, id)?,
    };
    match flow_insert(now, key, id, source.pack(), u32::from(entries != Entries::Forward)) {
        NO_PLACE => Err(Verdict::TableFull),
        _ => Ok(source.port()),
    }
}

/// A connection gets an entry in its middle: any segment of its backend's may prove it for as long as it is opening.
#[inline(always)]
pub fn adopt(now: u32) {
    if let Some(filter) = maps::SLB_FILTER.cell(0) {
        // 0 has a meaning of its own; a tick more does not matter.
        filter.adopted_until().store(now.wrapping_add(maps::settings().opening_jiffies()) | 1);
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
    if !is_taken(reply, key) {
        return Ok(Source::new(NO_SOURCE, reply.dport));
    }
    let mut draw = hash::choice(table_hash(key));
    let mut worst = Candidate::NONE;
    for attempt in 0..PORT_ATTEMPTS {
        draw = next_draw(draw);
        reply.dport = port(draw);
        let rank = Rank(flow_claim_port(reply, key, Rank::OVER.0));
        worst = worst.or(rank, reply.dport);
        // A flow through the listener may have that port without an entry. With one backend any port may have one:
        // then it has to do that few clients use it.
        if rank >= Rank::OVER
            && (attempt >= PORT_ATTEMPTS / 2 || !direct_may_be_balanced(now, reply, id))
        {
            return Ok(Source::new(NO_SOURCE, reply.dport));
        }
    }
    worst.give_way(reply, key, NO_SOURCE)
}

/// The port whose flow is missed least of those that were tried.
#[derive(Clone, Copy)]
struct Candidate {
    rank: Rank,
    port: u16,
}

impl Candidate {
    const NONE: Self = Self { rank: Rank::STAYS, port: 0 };

    #[inline(always)]
    fn or(self, rank: Rank, port: u16) -> Self {
        if rank > self.rank { Self { rank, port } } else { self }
    }

    /// Takes the port, unless its flow is proven.
    #[inline(always)]
    fn give_way(self, reply: &mut FlowKey, own: &FlowKey, source: u16) -> Result<Source, Verdict> {
        reply.dport = self.port;
        let is_free = self.rank > Rank::STAYS && flow_claim_port(reply, own, 1) > 0;
        if is_free { Ok(Source::new(source, self.port)) } else { Err(Verdict::NoPort) }
    }
}

/// Which address and port of the gateway the backend `id` is to see, as [`draw_port`].
#[inline(always)]
fn draw_source(key: &FlowKey, id: u32) -> Result<Source, Verdict> {
    let (Some(backend), Some(reply)) = (maps::backend(id), maps::reply_key()) else {
        return Err(Verdict::Inconsistent);
    };
    let hash = table_hash(key);
    write_reply_key(reply, key, backend, key.sport);
    let source = decide::source_of(backend, hash).ok_or(Verdict::NoPort)?;
    reply.dst = maps::source(source).ok_or(Verdict::NoPort)?.load();
    // A SYN cookie of an earlier connection is good for its port only, which the client must not know.
    let is_told = decide::proxy_of(key.proto, backend) != PROXY_NONE;
    let salt = if is_told { kernel::random() } else { 0 };
    let mut draw = hash::choice(hash) ^ salt;
    let mut worst = Candidate::NONE;
    for _ in 0..PORT_ATTEMPTS {
        draw = next_draw(draw);
        reply.dport = port(draw);
        let rank = Rank(flow_claim_port(reply, key, Rank::OVER.0));
        if rank >= Rank::OVER {
            return Ok(Source::new(source, reply.dport));
        }
        worst = worst.or(rank, reply.dport);
    }
    worst.give_way(reply, key, source)
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
    let hash = table_hash(key);
    let place = flow_take(key, abi::tag(hash));
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
    if both != 0 && flow_insert_reply(reply, place) == NO_PLACE {
        delete(flow);
        return NO_PLACE;
    }
    place
}

/// Makes the record of a direct flow that begins, whose answers have `key`: the backend is to acknowledge `sequence`.
#[inline(always)]
pub fn insert_bypass(now: u32, key: &FlowKey, id: u32, sequence: u32) {
    let hash = table_hash(key);
    if let Some(flow) = get(flow_take(key, abi::tag(hash))) {
        fill(flow, key, id, FlowKind::Bypass, now.wrapping_add(maps::settings().opening_jiffies()));
        flow.sequence().store(sequence);
        publish(flow, hash);
    }
}

/// Makes the entry of an answer to the flow at `place`, and gives its own.
#[inline(always)]
fn insert_reply(key: &FlowKey, place: u32) -> u32 {
    let Some(forward) = get(place) else { return NO_PLACE };
    let hash = table_hash(key);
    let own = flow_take(key, abi::tag(hash));
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

/// Takes a place for the flow of `key`, whose tag is `tag`; [`NO_PLACE`] if all that it could have are proven.
#[inline(always)]
fn take(key: &FlowKey, tag: u32) -> u32 {
    const WAYS: u32 = BUCKET_FLOWS as u32;
    let Some(bucket) = bucket(key) else { return NO_PLACE };
    let mut place = bucket * WAYS + tag / 4 % WAYS;
    let mut best = 0;
    for _ in 0..WAYS {
        let ranked = flow_rank(key, place);
        if ranked > best {
            best = ranked;
        }
        if rank_of(ranked) == Rank::FREE {
            break;
        }
        place = place / WAYS * WAYS + (place + 1) % WAYS;
    }
    if rank_of(best) == Rank::STAYS {
        return NO_PLACE;
    }
    let found = best as u32;
    let Some(flow) = get(found) else { return NO_PLACE };
    let before = flow.tag().load();
    // Of two CPUs that claim it, one goes without an entry.
    if flow.claim(before).is_none() {
        return NO_PLACE;
    }
    if before != TAG_FREE && is_active(flow) {
        count(flow.backend().load(), -1);
    }
    found
}

/// How little the entry at a place is missed by the flow of `key`: its [`Rank`], and below that the place.
#[inline(always)]
fn rank(key: &FlowKey, place: u32) -> u64 {
    let Some(flow) = get(place) else { return 0 };
    let now = kernel::jiffies();
    let is_own =
        flow.is(FlowKind::Original) && decide::is_same_prefix(key.src.copied(), flow.src().load());
    let proto = flow.proto().load().into();
    let standing = Standing {
        is_own,
        is_other: proto != key.proto,
        proto,
        tag: flow.tag().load(),
        expires: flow.expires().load(),
        state: flow.state().load(),
    };
    let Rank(rank) = decide::rank(now, &standing);
    u64::from(rank) << 32 | u64::from(place)
}

/// The rank that [`rank`] gives.
#[inline(always)]
const fn rank_of(ranked: u64) -> Rank {
    Rank((ranked >> 32) as u32)
}
