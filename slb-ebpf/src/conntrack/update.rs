//! What packets change in the entries of their flows.

use slb_common::{
    abi::{
        Backend, BackendFlags, ConnState, FlowKind, NO_PLACE, NO_SOURCE, PROXY_NONE,
        REFRESH_JIFFIES, TCP, age,
    },
    decide::{Connection, PROOF_WINDOW, Segment},
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
    maps,
};

/// Flags of segments that begin or end a connection.
const ENDS: TcpFlags = TcpFlags::SYN.union(TcpFlags::FIN).union(TcpFlags::RST);

/// Takes down what a client's packet says about its flow.
#[inline(always)]
pub fn update_original(view: &PacketView<'_>, flow: Entry, backend: &Backend) {
    if says_more(view, flow) || is_due(view, flow, backend) {
        refresh(view, flow, backend);
    }
}

/// Whether a client's packet may be more than the next of its flow.
#[inline(always)]
fn says_more(view: &PacketView<'_>, flow: Entry) -> bool {
    let state = flow.state().load();
    let is_unproven = state & (ConnState::ESTABLISHED | ConnState::ANSWERED) == ConnState::ANSWERED;
    let is_ending = state.intersects(ConnState::END_CLAIMED | ConnState::FIN_REPLY);
    is_unproven || is_ending || view.packet.flags.intersects(ENDS)
}

/// Whether it has to be noted that a flow has seen a packet.
#[inline(always)]
fn is_due(view: &PacketView<'_>, flow: Entry, backend: &Backend) -> bool {
    let until = view.now.wrapping_add(lifetime(flow, backend));
    age(until, flow.expires().load()) >= REFRESH_JIFFIES
}

/// Takes down what a client's segment says that is not just the next of its connection.
#[inline(never)]
fn note_client(view: &PacketView<'_>, flow: Entry) {
    let Some(segment) = segment(view) else { return };
    let state = flow.state().load();
    if flow.proxy().load() == PROXY_NONE {
        let before = Connection { state, sequence: flow.sequence().load() };
        let after = before.after_client(&segment, u32::MAX);
        flow.sequence().store(after.sequence);
        turn(view.now, flow, state, after.state);
        return;
    }
    // The entry has another use for the number, and the backend another proof.
    let reply = get(flow.peer().load()).filter(|reply| reply.is(FlowKind::Reply));
    let sequence = reply.map_or(0, |reply| reply.source().load().into());
    let mask = if reply.is_some() { u16::MAX.into() } else { 0 };
    turn(view.now, flow, state, Connection { state, sequence }.after_client(&segment, mask).state);
}

/// Takes down what [`says_more`], keeps the flow for as long as it may live from now on, and the reply's entry, or makes that again if it is gone.
#[inline(never)]
fn refresh(view: &PacketView<'_>, flow: Entry, backend: &Backend) {
    if says_more(view, flow) {
        note_client(view, flow);
        if !is_due(view, flow, backend) {
            return;
        }
    }
    let state = flow.state().load();
    // Where answers pass here, they have to be acknowledged.
    let is_answered = state.intersects(ConnState::ESTABLISHED | ConnState::ANSWERED);
    if !is_answered && !view.packet.flags.intersects(ENDS) {
        flow.state().store(state | ConnState::AGED);
    }
    flow.expires().store(view.now.wrapping_add(lifetime(flow, backend)));
    if flow.peer().load() == NO_PLACE {
        return;
    }
    if !backend.flags.intersects(BackendFlags::SHARED) && flow.source().load() == NO_SOURCE {
        // Its port is not the client's.
        bypass::keep_looking(view.now, flow.backend().load());
    }
    let Some(key) = maps::reply_key() else { return };
    write_reply_key(key, &view.packet.key, backend, flow.port().load());
    let source = flow.source().load();
    if let Some(addr) = maps::source(source).filter(|_| source != NO_SOURCE) {
        key.dst = addr.load();
    }
    if let Some(reply) = slow_lookup(key) {
        if reply.is(FlowKind::Reply) {
            follow(reply, flow);
            return;
        }
        // The record of a direct flow: it may not have been answered.
        if is_direct(view.now, reply) {
            return;
        }
        delete(reply);
    }
    flow_insert_reply(key, index_of(&view.packet.key));
}

/// Takes down what a backend's packet says about its flow, given the client's entry.
#[inline(always)]
pub fn update_reply(view: &PacketView<'_>, flow: Entry) {
    let Some(backend) = maps::backend(flow.backend().load()) else { return };
    if !flow.state().load().intersects(ConnState::ESTABLISHED) || view.packet.flags.intersects(ENDS)
    {
        note_backend(view, flow, is_due(view, flow, backend).into());
    }
    if is_due(view, flow, backend) {
        flow.expires().store(view.now.wrapping_add(lifetime(flow, backend)));
    }
}

/// Takes down what a backend's packet says that is not just the next of its flow.
#[inline(never)]
fn note_backend(view: &PacketView<'_>, flow: Entry, is_due: u32) {
    let state = flow.state().load();
    if view.packet.key.proto != TCP {
        return turn(view.now, flow, state, state | ConnState::ESTABLISHED);
    }
    let Some(segment) = segment(view) else { return };
    if flow.proxy().load() == PROXY_NONE {
        let before = Connection { state, sequence: flow.sequence().load() };
        let after = before.after_backend(&segment, is_due != 0);
        flow.sequence().store(after.sequence);
        return turn(view.now, flow, state, after.state);
    }
    if segment.flags.intersects(TcpFlags::RST) {
        return turn(view.now, flow, state, state | ConnState::ENDED);
    }
    if segment.flags.intersects(TcpFlags::FIN)
        && let Some(reply) = get(flow.peer().load()).filter(|reply| reply.is(FlowKind::Reply))
    {
        reply.source().store(segment.end() as u16);
        turn(view.now, flow, state, state | ConnState::FIN_REPLY);
    }
}

/// What a TCP segment says.
#[inline(always)]
fn segment(view: &PacketView<'_>) -> Option<Segment> {
    let packet = view.packet;
    let frame = ctx::frame(view.ctx);
    let tcp = frame.header::<16>(packet.l4 as usize)?;
    let headers =
        packet.l4.wrapping_sub(L3 as u32).wrapping_add(u32::from(tcp.get::<u8>(12) >> 4) * 4);
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
fn turn(now: u32, flow: Entry, before: ConnState, after: ConnState) {
    if before == after {
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

/// Whether a client's packet proves that the client has got the backend's answer to its SYN: who
/// sends from addresses that are not its own does not know the number.
#[inline(always)]
pub fn acknowledges(view: &PacketView<'_>, sequence: u32) -> bool {
    let known = TcpFlags::ACK | TcpFlags::SYN | TcpFlags::RST;
    if view.packet.flags & known != TcpFlags::ACK {
        return false;
    }
    let frame = ctx::frame(view.ctx);
    let tcp = frame.header::<12>(view.packet.l4 as usize);
    tcp.is_some_and(|tcp| u32::from_be(tcp.get(8)).wrapping_sub(sequence) < PROOF_WINDOW)
}
