//! The flow table: what cannot be told from a packet alone.
//!
//! An array of buckets of eight places, one cache line each. A flow has a place in the bucket that its
//! hash says; where all eight are taken, one that nobody uses any more makes room, or one whose
//! connection was never established. Established ones stay: what comes later goes without.
//!
//! A client's packets have an entry ([`FLOW_FORWARD`]). What the backend answers has one only where
//! its address and port do not say enough ([`FLOW_REPLY`]): it leads to the client's.

use core::{
    ptr,
    sync::atomic::{Ordering, compiler_fence},
};

use aya_ebpf::helpers::bpf_get_prandom_u32;
use slb_common::{
    abi::{
        self, Address, BACKEND_OPTION, BACKEND_PROXY, BUCKET_FLOWS, Backend, ConnState,
        FLOW_DIRECT, FLOW_FORWARD, FLOW_REPLY, Flow, FlowKey, Keys, MODE_DSR, MODE_GUE, MODE_IPIP,
        NO_PLACE, NO_SOURCE, REFRESH_JIFFIES, TAG_FREE, TAG_TAKEN, TCP, TOLD_HEADER, TOLD_NOT,
        TOLD_OPTION, age, is_over,
    },
    hash,
    parse::TcpFlags,
    verdict::Verdict,
};

use crate::{
    atomic,
    ctx::{self, PacketView},
    direct, maps,
};

/// How many source ports are tried before a flow is given up.
const PORT_ATTEMPTS: u32 = 8;
/// First port that may replace a client's.
const FIRST_PORT: u32 = 1_024;
/// The port behind the last: from here on, most clients take theirs (`net.ipv4.ip_local_port_range`).
const LAST_PORT: u32 = 32_768;

/// The entry of a packet.
#[inline(always)]
pub fn find(key: &FlowKey, hash: u64) -> Option<&'static mut Flow> {
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
pub fn position(key: &FlowKey) -> u32 {
    flow_position(key)
}

/// [`find`] off the beaten track: a call, and a look-up more.
#[inline(always)]
pub fn seek(key: &FlowKey) -> Option<&'static mut Flow> {
    at(position(key))
}

/// The entry at a place.
#[inline(always)]
pub fn at(place: u32) -> Option<&'static mut Flow> {
    let bucket = maps::SLB_FLOWS.get_ptr_mut(place / BUCKET_FLOWS as u32)?;
    // SAFETY: as in `find`.
    Some(unsafe { &mut (*bucket).flows[place as usize % BUCKET_FLOWS] })
}

/// The client's entry of `reply`, whose key is `key`: its place may belong to another flow by now.
#[inline(always)]
pub fn peer(reply: &Flow, key: &FlowKey) -> Option<&'static mut Flow> {
    let flow = at(reply.peer)?;
    let backend = maps::backend(flow.backend)?;
    let is_it = flow.tag > TAG_TAKEN
        && flow.kind == FLOW_FORWARD
        && flow.proto == reply.proto
        && flow.port == key.dport
        && backend.addr.same(key.src)
        && is_sender(flow, &key.dst);
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
pub fn forget(flow: &mut Flow) {
    if is_active(flow) {
        count(flow.backend, -1);
    }
    flow.tag = TAG_FREE;
}

/// Whether an entry is one that `SLB_ACTIVE` counts.
#[inline(always)]
fn is_active(flow: &Flow) -> bool {
    flow.kind == FLOW_FORWARD && !flow.state.has_ended()
}

/// So many more flows of a backend are active.
#[inline(always)]
fn count(backend: u32, more: i64) {
    if let Some(active) = maps::SLB_ACTIVE.get_ptr_mut(backend) {
        // SAFETY: an element of an array, which is aligned and only added to.
        unsafe { atomic::fetch_add(active, more as u64) };
    }
}

/// Takes down what a client's packet says about its flow.
#[inline(always)]
pub fn note_forward(facts: &PacketView<'_>, flow: &mut Flow, backend: &Backend) {
    let flags = facts.packet.flags;
    // The end of what goes past the gateway is not seen.
    let is_direct = matches!(backend.mode, MODE_DSR | MODE_IPIP | MODE_GUE);
    let fin = if is_direct {
        ConnState::FIN_FORWARD | ConnState::FIN_REPLY
    } else {
        ConnState::FIN_FORWARD
    };
    let has_ended = flags.intersects(TcpFlags::FIN | TcpFlags::RST) && ends(flags, flow, fin);
    if flow.state & (ConnState::ESTABLISHED | ConnState::SYN_ACK_SEEN) == ConnState::SYN_ACK_SEEN
        && acknowledges(facts, flow.sequence)
    {
        flow.state |= ConnState::ESTABLISHED;
    }
    let until = facts.now.wrapping_add(lifetime(flow, backend));
    if has_ended || age(until, flow.expires) >= REFRESH_JIFFIES {
        // Somebody who has sent packets for a second is no flood of random sources.
        if !flags.intersects(TcpFlags::SYN) {
            flow.state |= ConnState::ESTABLISHED;
        }
        flow.expires = until;
        if flow.peer != NO_PLACE {
            keep_reply(facts, flow, backend);
        }
    }
}

/// Takes down what a backend's packet says about its flow, given the client's entry.
#[inline(always)]
pub fn note_reply(facts: &PacketView<'_>, flow: &mut Flow) {
    let flags = facts.packet.flags;
    let has_ended =
        flags.intersects(TcpFlags::FIN | TcpFlags::RST) && ends(flags, flow, ConnState::FIN_REPLY);
    // A flow whose backend is told about the client has another use for the number, and another proof.
    if flags.contains(TcpFlags::SYN | TcpFlags::ACK)
        && !flow.state.intersects(ConnState::ESTABLISHED)
        && flow.told == TOLD_NOT
        && let Some(tcp) = ctx::frame(facts.ctx).header::<8>(facts.packet.l4 as usize)
    {
        flow.sequence = u32::from_be(tcp.get(4)).wrapping_add(1);
        flow.state |= ConnState::SYN_ACK_SEEN;
    }
    if let Some(backend) = maps::backend(flow.backend) {
        let until = facts.now.wrapping_add(lifetime(flow, backend));
        if has_ended || age(until, flow.expires) >= REFRESH_JIFFIES {
            flow.expires = until;
        }
    }
}

/// Takes down that the client of the flow at `place` is where it says, and its backend knows.
#[inline(always)]
pub fn establish(now: u32, flow: &mut Flow, place: u32, backend: &Backend) {
    flow.state = flow.state.difference(ConnState::PROXY_PENDING).union(ConnState::ESTABLISHED);
    flow.expires = now.wrapping_add(lifetime(flow, backend));
    if let Some(reply) = reply_of(flow, place) {
        keep_with(reply, flow);
    }
}

/// The reply's entry of the client's at `place`, if it is there.
#[inline(always)]
pub fn reply_of(flow: &Flow, place: u32) -> Option<&'static mut Flow> {
    at(flow.peer).filter(|reply| reply.kind == FLOW_REPLY && reply.peer == place)
}

/// Whether and how the backend of a new flow is told who the client is.
#[inline(always)]
fn told(key: &FlowKey, backend: &Backend) -> u8 {
    match backend.flags & (BACKEND_PROXY | BACKEND_OPTION) {
        BACKEND_PROXY if key.proto == TCP => TOLD_HEADER,
        BACKEND_OPTION if key.proto == TCP => TOLD_OPTION,
        _ => TOLD_NOT,
    }
}

/// Takes down what a packet says about a direct flow; `fin` is its side's bit.
#[inline(always)]
pub fn note_direct(facts: &PacketView<'_>, flow: &mut Flow, fin: ConnState) {
    if facts.packet.flags.intersects(TcpFlags::FIN | TcpFlags::RST) {
        ends(facts.packet.flags, flow, fin);
    } else if !facts.packet.flags.intersects(TcpFlags::SYN) {
        flow.state |= ConnState::ESTABLISHED;
    }
    if let Some(backend) = maps::backend(flow.backend) {
        flow.expires = facts.now.wrapping_add(lifetime(flow, backend));
    }
}

/// A reply's entry lives as long as the client's.
#[inline(always)]
pub fn keep_with(reply: &mut Flow, forward: &Flow) {
    if reply.expires != forward.expires {
        reply.expires = forward.expires;
    }
    if reply.state != forward.state {
        reply.state = forward.state;
    }
}

/// Takes down a FIN or RST; `fin` is its side's bit. Says whether the flow has ended.
#[inline(always)]
fn ends(flags: TcpFlags, flow: &mut Flow, fin: ConnState) -> bool {
    let was_active = is_active(flow);
    flow.state |= if flags.intersects(TcpFlags::RST) { ConnState::RESET } else { fin };
    let has_ended = flow.state.has_ended();
    if was_active && has_ended {
        count(flow.backend, -1);
    }
    has_ended
}

/// For how many jiffies a flow is remembered after a packet.
#[inline(always)]
fn lifetime(flow: &Flow, backend: &Backend) -> u32 {
    if flow.state.has_ended() {
        return maps::settings().closing_jiffies;
    }
    if u32::from(flow.proto) == TCP && !flow.state.intersects(ConnState::ESTABLISHED) {
        return maps::settings().opening_jiffies;
    }
    backend.idle_jiffies
}

/// Whether a client's packet proves that the client has got the backend's answer to its SYN: who
/// sends from addresses that are not its own does not know the number.
#[inline(always)]
fn acknowledges(facts: &PacketView<'_>, sequence: u32) -> bool {
    /// As much as a backend may have sent on its own before the client's first packet gets here.
    const WINDOW: u32 = 1 << 20;
    let known = TcpFlags::ACK | TcpFlags::SYN | TcpFlags::RST;
    if facts.packet.flags & known != TcpFlags::ACK {
        return false;
    }
    let frame = ctx::frame(facts.ctx);
    let tcp = frame.header::<12>(facts.packet.l4 as usize);
    tcp.is_some_and(|tcp| u32::from_be(tcp.get(8)).wrapping_sub(sequence) < WINDOW)
}

/// Keeps the reply's entry, or makes it again if it is gone.
#[inline(never)]
fn keep_reply(facts: &PacketView<'_>, flow: &mut Flow, backend: &Backend) {
    let Some(Keys { reply: key, .. }) = maps::keys() else { return };
    write_reply_key(key, &facts.packet.key, backend, flow.port);
    if let Some(source) = maps::source(flow.source).filter(|_| flow.source != NO_SOURCE) {
        key.dst = source.copied();
    }
    if let Some(reply) = seek(key) {
        if reply.kind == FLOW_REPLY {
            keep_with(reply, flow);
        }
        return;
    }
    flow_insert_reply(facts.now, key, position(&facts.packet.key));
}

/// What a backend answers with to `key`, if it was sent from `port`. Written in place: stack is scarce.
#[inline(always)]
fn write_reply_key(reply: &mut FlowKey, key: &FlowKey, backend: &Backend, port: u16) {
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
    let Some(owner) = seek(reply) else { return 0 };
    let is_reply = owner.kind == FLOW_REPLY;
    let mut is_free = owner.state.has_ended() || is_over(now, owner.expires);
    if is_reply {
        match peer(owner, reply) {
            Some(forward) if is_free || forward.is_of(own) => {
                forget(forward);
                is_free = true;
            }
            Some(_) => {}
            None => is_free = true,
        }
    }
    if is_free {
        forget(owner);
        return 0;
    }
    1
}

/// Which entries a flow needs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Entries {
    /// That of the client's packets.
    Forward = 0,
    /// That of the answers as well.
    Both = 1,
    /// Both, and the backend is to see a source address of ours.
    OwnSource = 2,
}

/// Makes the entries of the flow of `key` to the backend `id`, and gives the source port towards it.
#[inline(always)]
pub fn create(now: u32, key: &FlowKey, id: u32, entries: Entries) -> Result<u16, Verdict> {
    let created = flow_create(now, key, id, entries as u32);
    if created & IS_VERDICT == 0 {
        Ok(created as u16)
    } else {
        Err(Verdict::from_slot(created & !IS_VERDICT))
    }
}

/// In what [`flow_create`] gives: the rest is a verdict.
const IS_VERDICT: u32 = 1 << 16;

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn flow_create(now: u32, key: *const FlowKey, id: u32, entries: u32) -> u32 {
    // SAFETY: the caller above passes a reference.
    let (Some(key), Some(backend), Some(Keys { reply, .. })) =
        (unsafe { key.as_ref() }, maps::backend(id), maps::keys())
    else {
        return IS_VERDICT | Verdict::Inconsistent as u32;
    };
    let hash = flow_hash(key);
    let is_own = entries == Entries::OwnSource as u32;
    let mut source = NO_SOURCE;
    write_reply_key(reply, key, backend, key.sport);
    if is_own {
        source = backend.source + hash::slot(hash as u32, backend.sources.into()) as u16;
        let Some(addr) = maps::source(source).filter(|_| backend.sources != 0) else {
            return IS_VERDICT | Verdict::NoPort as u32;
        };
        reply.dst = addr.copied();
    }
    if entries != Entries::Forward as u32 {
        // A direct flow must not pass for the one through a listener that may be there without an
        // entry. With one backend any port may have one: then it has to do that few clients use it.
        let is_direct = key.dst.same(reply.src) && key.dport == reply.sport;
        // A SYN cookie of an earlier connection is good for its port only, which the client must not know.
        let salt = if told(key, backend) == TOLD_NOT {
            0
        } else {
            // SAFETY: touches no memory of ours.
            unsafe { bpf_get_prandom_u32() }
        };
        let mut draw = hash::choice(hash) ^ salt;
        let mut is_free = !is_own && !is_direct && !is_taken(now, reply, key);
        for attempt in 0..PORT_ATTEMPTS {
            if is_free {
                break;
            }
            draw = draw.wrapping_mul(0x9e37_79b1).wrapping_add(1);
            reply.dport = (FIRST_PORT + hash::slot(draw, LAST_PORT - FIRST_PORT)) as u16;
            is_free = !is_taken(now, reply, key)
                && (is_own
                    || attempt >= PORT_ATTEMPTS / 2
                    || !direct::may_be_balanced(now, reply, id));
        }
        if !is_free {
            return IS_VERDICT | Verdict::NoPort as u32;
        }
    }
    let place = flow_take(now, key, abi::tag(hash));
    let Some(flow) = at(place) else { return IS_VERDICT | Verdict::TableFull as u32 };
    fill(flow, key, id, FLOW_FORWARD, now.wrapping_add(maps::settings().opening_jiffies));
    flow.port = reply.dport;
    flow.source = source;
    flow.told = if is_own { told(key, backend) } else { TOLD_NOT };
    if flow.told != TOLD_NOT {
        flow.state = ConnState::PROXY_PENDING;
    }
    publish(flow, hash);
    count(id, 1);
    if entries != Entries::Forward as u32 && flow_insert_reply(now, reply, place) == NO_PLACE {
        forget(flow);
        return IS_VERDICT | Verdict::TableFull as u32;
    }
    reply.dport.into()
}

/// Remembers that what a backend answers with `key` is not for us.
#[inline(always)]
pub fn insert_direct(now: u32, key: &FlowKey, id: u32) {
    let hash = flow_hash(key);
    if let Some(flow) = at(flow_take(now, key, abi::tag(hash))) {
        fill(flow, key, id, FLOW_DIRECT, now.wrapping_add(maps::settings().opening_jiffies));
        publish(flow, hash);
    }
}

/// Makes the entry of an answer to the flow at `place`, and gives its own.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn flow_insert_reply(now: u32, key: *const FlowKey, place: u32) -> u32 {
    // SAFETY: the callers pass references.
    let (Some(key), Some(forward)) = (unsafe { key.as_ref() }, at(place)) else { return NO_PLACE };
    let hash = flow_hash(key);
    let own = flow_take(now, key, abi::tag(hash));
    if let Some(flow) = at(own) {
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
    flow.told = TOLD_NOT;
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
        // SAFETY: as in `find`.
        let flow = unsafe { &(*bucket).flows[way] };
        // The higher, the less it is missed: free, over, or opening, the oldest first.
        let rank = match flow.tag {
            TAG_FREE => u32::MAX,
            TAG_TAKEN => 0,
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
    // SAFETY: as in `find`.
    let tag = unsafe { &raw mut (*bucket).flows[found % BUCKET_FLOWS].tag };
    // SAFETY: an aligned word of an array. Whoever loses goes without an entry.
    let before = unsafe { *tag };
    // SAFETY: as above.
    let is_ours = unsafe { atomic::exchange(tag, before, TAG_TAKEN) };
    // SAFETY: as in `find`.
    let flow = unsafe { &(*bucket).flows[found % BUCKET_FLOWS] };
    if is_ours && before > TAG_TAKEN && is_active(flow) {
        count(flow.backend, -1);
    }
    if is_ours { number * BUCKET_FLOWS as u32 + found as u32 } else { NO_PLACE }
}
