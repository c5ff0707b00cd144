//! What packets change in the entries of their flows.

use slb_common::{
    abi::{
        Backend, BackendFlags, ConnState, FlowKey, FlowKind, NO_PLACE, NO_SOURCE, PROXY_NONE,
        REFRESH_JIFFIES, TCP, age,
    },
    decide::{Connection, Segment},
    parse::{L3, TcpFlags},
};

use super::{
    Entry, count,
    create::{flow_insert_reply, is_direct, write_reply_key},
    delete, get, index_of, is_active, reply_of, slow_lookup,
};
use crate::{
    bypass,
    ctx::{self, PacketView},
    global::global,
    maps,
};

/// Flags of segments that begin or end a connection.
pub const ENDS: TcpFlags = TcpFlags::SYN.union(TcpFlags::FIN).union(TcpFlags::RST);

/// Takes down what a client's packet says about its flow.
#[inline(always)]
pub fn update_original(view: &PacketView<'_>, flow: Entry, backend: &Backend) {
    let state = flow.state().load();
    let is_ending = state.intersects(ConnState::END_CLAIMED | ConnState::FIN_REPLY);
    if state.awaits_proof()
        || is_ending
        || view.packet.flags.intersects(ENDS)
        || is_due(view.now, flow, backend)
    {
        let key = &view.packet.key;
        // One after the other, not one inside the other: the deepest chain of calls is shorter.
        if refresh(view, flow, backend)
            && flow_keep_reply(view.now, key)
            && let Some(answer) = maps::reply_key()
        {
            flow_insert_reply(answer, index_of(key));
        }
    }
}

/// Takes down what a client's packet says that is more than the next of its flow, or the first in a second. Says whether
/// the reply's entry is to be kept, or made: the flow may have begun when its backend answered for one VIP only.
#[inline(never)]
fn refresh(view: &PacketView<'_>, flow: Entry, backend: &Backend) -> bool {
    let Some(segment) = segment(view) else { return false };
    flow_note_client(view.now, index_of(&view.packet.key), &segment)
        && (flow.peer().load() != NO_PLACE || backend.flags.intersects(BackendFlags::SHARED))
}

/// Takes down what a backend's packet says about its flow, whose client's entry is at `place`.
#[inline(always)]
pub fn update_reply(view: &PacketView<'_>, place: u32) {
    let Some(flow) = get(place) else { return };
    let Some(backend) = maps::backend(flow.backend().load()) else { return };
    if (!flow.state().load().intersects(ConnState::ESTABLISHED)
        || view.packet.flags.intersects(ENDS)
        || is_due(view.now, flow, backend))
        && let Some(segment) = segment(view)
    {
        flow_note_backend(view.now, place, &segment);
    }
}

global! {
    // The verifier follows their branches here only, and not through all that comes before and after.
    fn flow_note_client(now: u32, place: u32, segment: &Segment) -> bool = note_client, or false;
    fn flow_note_backend(now: u32, place: u32, segment: &Segment) -> bool = note_backend, or false;
    fn flow_keep_reply(now: u32, key: &FlowKey) -> bool = keep_reply, or false;
}

/// Whether it has to be noted that a flow has seen a packet.
#[inline(always)]
fn is_due(now: u32, flow: Entry, backend: &Backend) -> bool {
    let until = now.wrapping_add(lifetime(flow, backend));
    age(until, flow.expires().load()) >= REFRESH_JIFFIES
}

/// Takes down what a client's packet says of the flow at `place`. Says whether its lifetime begins anew.
#[inline(always)]
fn note_client(now: u32, place: u32, segment: &Segment) -> bool {
    let Some(flow) = get(place) else { return false };
    let Some(backend) = maps::backend(flow.backend().load()) else { return false };
    let is_tcp = u32::from(flow.proto().load()) == TCP;
    if is_tcp && flow.proxy().load() == PROXY_NONE {
        let before = Connection { state: flow.state().load(), sequence: flow.sequence().load() };
        let after = before.after_client(segment, u32::MAX);
        flow.sequence().store(after.sequence);
        turn(now, flow, after.state);
    } else if is_tcp {
        // The entry has another use for the number, and the backend another proof.
        let reply = get(flow.peer().load()).filter(|reply| reply.is(FlowKind::Reply));
        let sequence = reply.map_or(0, |reply| reply.source().load().into());
        let mask = if reply.is_some() { u16::MAX.into() } else { 0 };
        let before = Connection { state: flow.state().load(), sequence };
        turn(now, flow, before.after_client(segment, mask).state);
    }
    if !is_due(now, flow, backend) {
        return false;
    }
    let state = flow.state().load();
    // Where answers pass here, they have to be acknowledged.
    let is_answered = state.intersects(ConnState::ESTABLISHED | ConnState::ANSWERED);
    if !is_answered && !segment.flags.intersects(ENDS) {
        flow.state().store(state | ConnState::AGED);
    }
    flow.expires().store(now.wrapping_add(lifetime(flow, backend)));
    true
}

/// Takes down what a backend's packet says of the flow at `place`. Says whether its lifetime begins anew.
#[inline(always)]
fn note_backend(now: u32, place: u32, segment: &Segment) -> bool {
    let Some(flow) = get(place) else { return false };
    let Some(backend) = maps::backend(flow.backend().load()) else { return false };
    let state = flow.state().load();
    if u32::from(flow.proto().load()) != TCP {
        turn(now, flow, state | ConnState::ESTABLISHED);
    } else if flow.proxy().load() == PROXY_NONE {
        let before = Connection { state, sequence: flow.sequence().load() };
        let after = before.after_backend(segment, is_due(now, flow, backend));
        flow.sequence().store(after.sequence);
        turn(now, flow, after.state);
    } else if segment.flags.intersects(TcpFlags::RST) {
        turn(now, flow, state | ConnState::ENDED);
    } else if segment.flags.intersects(TcpFlags::FIN)
        && let Some(reply) = get(flow.peer().load()).filter(|reply| reply.is(FlowKind::Reply))
    {
        reply.source().store(segment.end() as u16);
        turn(now, flow, state | ConnState::FIN_REPLY);
    }
    if !is_due(now, flow, backend) {
        return false;
    }
    flow.expires().store(now.wrapping_add(lifetime(flow, backend)));
    true
}

/// Keeps the reply's entry of the flow of `key`. If it is gone, says so, and writes the key of the next to
/// [`maps::reply_key`].
#[inline(always)]
fn keep_reply(now: u32, key: &FlowKey) -> bool {
    let Some(flow) = slow_lookup(key) else { return false };
    let Some(backend) = maps::backend(flow.backend().load()) else { return false };
    let source = flow.source().load();
    if !backend.flags.intersects(BackendFlags::SHARED) && source == NO_SOURCE {
        // Its port is not the client's.
        bypass::keep_looking(now, flow.backend().load());
    }
    let Some(answer) = maps::reply_key() else { return false };
    write_reply_key(answer, key, backend, flow.port().load());
    if let Some(addr) = maps::source(source).filter(|_| source != NO_SOURCE) {
        answer.dst = addr.load();
    }
    if let Some(reply) = slow_lookup(answer) {
        if reply.is(FlowKind::Reply) {
            follow(reply, flow);
            return false;
        }
        // The record of a direct flow: it may not have been answered.
        if is_direct(now, reply) {
            return false;
        }
        delete(reply);
    }
    true
}

/// What a TCP segment says; nothing of a datagram.
#[inline(always)]
fn segment(view: &PacketView<'_>) -> Option<Segment> {
    let packet = view.packet;
    if packet.key.proto != TCP {
        return Some(Segment::default());
    }
    let frame = ctx::frame(view.ctx);
    let tcp = frame.header::<16>(packet.l4 as usize)?;
    let options_end = u32::from(tcp.get::<u8>(12) >> 4) * 4;
    let headers = packet.l4.wrapping_sub(L3 as u32).wrapping_add(options_end);
    Some(Segment {
        flags: packet.flags,
        sequence: u32::from_be(tcp.get(4)),
        acknowledgement: u32::from_be(tcp.get(8)),
        len: packet.len.saturating_sub(headers),
    })
}

/// Takes down that the client of the flow at `place` is where it says, and its backend knows.
#[inline(always)]
pub fn establish(now: u32, flow: Entry, place: u32, backend: &Backend) {
    let state = flow.state().load().difference(ConnState::PROXY_PENDING | ConnState::AGED);
    flow.state().store(state.union(ConnState::ESTABLISHED));
    flow.expires().store(now.wrapping_add(lifetime(flow, backend)));
    if let Some(reply) = reply_of(flow, place) {
        follow(reply, flow);
    }
}

/// A reply's entry lives as long as the client's.
#[inline(always)]
pub fn follow(reply: Entry, forward: Entry) {
    let (expires, state) = (forward.expires().load(), forward.state().load());
    if reply.expires().load() != expires {
        reply.expires().store(expires);
    }
    if reply.state().load() != state {
        reply.state().store(state);
    }
}

/// Writes a flow's state, if that is another, and counts it if it is active now and was not before, or the other way
/// round. What expires now is refreshed at once. Two CPUs may do so at once, and one of the changes is lost.
#[inline(always)]
fn turn(now: u32, flow: Entry, after: ConnState) {
    if flow.state().load() == after {
        return;
    }
    let was_active = is_active(flow);
    flow.state().store(after);
    flow.expires().store(now);
    let is_active = is_active(flow);
    if was_active != is_active {
        count(flow.backend().load(), if is_active { 1 } else { -1 });
    }
}

/// For how many jiffies a flow is remembered after a packet.
#[inline(always)]
fn lifetime(flow: Entry, backend: &Backend) -> u32 {
    let state = flow.state().load();
    if state.has_ended() {
        return maps::settings().closing_jiffies();
    }
    if u32::from(flow.proto().load()) == TCP
        && !state.intersects(ConnState::ESTABLISHED | ConnState::AGED)
    {
        return maps::settings().opening_jiffies();
    }
    backend.idle_jiffies
}
