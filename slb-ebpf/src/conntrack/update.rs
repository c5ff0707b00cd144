//! What packets change in the entries of their flows.

use slb_common::{
    abi::{
        Backend, BackendFlags, ConnState, FlowKind, NO_PLACE, NO_SOURCE, PROXY_NONE,
        REFRESH_JIFFIES, TCP, age,
    },
    parse::TcpFlags,
};

use super::{
    Entry, count,
    create::{flow_insert_reply, is_direct, write_reply_key},
    delete, index_of, is_active, reply_of, slow_lookup,
};
use crate::{
    bypass,
    ctx::{self, PacketView},
    maps,
};

/// Takes down what a client's packet says about its flow.
#[inline(always)]
pub fn update_original(view: &PacketView<'_>, flow: Entry, backend: &Backend) {
    let flags = view.packet.flags;
    // The end of what goes past the gateway is not seen.
    let is_direct = backend.mode.is_direct();
    let fin = if is_direct {
        ConnState::FIN_ORIGINAL | ConnState::FIN_REPLY
    } else {
        ConnState::FIN_ORIGINAL
    };
    let has_ended =
        flags.intersects(TcpFlags::FIN | TcpFlags::RST) && record_fin_rst(flags, flow, fin);
    let known = ConnState::ESTABLISHED | ConnState::SYN_ACK_SEEN;
    if flow.state().load() & known == ConnState::SYN_ACK_SEEN
        && acknowledges(view, flow.sequence().load())
    {
        note(flow, ConnState::ESTABLISHED);
    }
    let until = view.now.wrapping_add(lifetime(flow, backend));
    if has_ended || age(until, flow.expires().load()) >= REFRESH_JIFFIES {
        // A client that has sent packets for a second is no flood of random sources.
        if !flags.intersects(TcpFlags::SYN) {
            note(flow, ConnState::ESTABLISHED);
        }
        flow.expires().store(until);
        if flow.peer().load() != NO_PLACE {
            keep_reply(view, flow, backend);
        }
    }
}

/// Takes down what a backend's packet says about its flow, given the client's entry.
#[inline(always)]
pub fn update_reply(view: &PacketView<'_>, flow: Entry) {
    let flags = view.packet.flags;
    let has_ended = flags.intersects(TcpFlags::FIN | TcpFlags::RST)
        && record_fin_rst(flags, flow, ConnState::FIN_REPLY);
    // A flow whose backend is told about the client has another use for the number, and another proof.
    if flags.contains(TcpFlags::SYN | TcpFlags::ACK)
        && !flow.state().load().intersects(ConnState::ESTABLISHED)
        && flow.proxy().load() == PROXY_NONE
        && let Some(tcp) = ctx::frame(view.ctx).header::<8>(view.packet.l4 as usize)
    {
        flow.sequence().store(u32::from_be(tcp.get(4)).wrapping_add(1));
        note(flow, ConnState::SYN_ACK_SEEN);
    }
    if let Some(backend) = maps::backend(flow.backend().load()) {
        let until = view.now.wrapping_add(lifetime(flow, backend));
        if has_ended || age(until, flow.expires().load()) >= REFRESH_JIFFIES {
            flow.expires().store(until);
        }
    }
}

/// Takes down that the client of the flow at `place` is where it says, and its backend knows.
#[inline(always)]
pub fn establish(now: u32, flow: Entry, place: u32, backend: &Backend) {
    let state = flow.state().load().difference(ConnState::PROXY_PENDING);
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

/// Takes down a FIN or RST; `fin` is its side's bit. Says whether the flow has ended.
#[inline(always)]
fn record_fin_rst(flags: TcpFlags, flow: Entry, fin: ConnState) -> bool {
    let was_active = is_active(flow);
    let what = if flags.intersects(TcpFlags::RST) { ConnState::RESET } else { fin };
    let state = flow.state().load() | what;
    flow.state().store(state);
    let has_ended = state.has_ended();
    if was_active && has_ended {
        count(flow.backend().load(), -1);
    }
    has_ended
}

/// Notes something that has happened. Two CPUs may do so at once, and one of the bits is lost.
#[inline(always)]
fn note(flow: Entry, what: ConnState) {
    flow.state().store(flow.state().load() | what);
}

/// For how many jiffies a flow is remembered after a packet.
#[inline(always)]
fn lifetime(flow: Entry, backend: &Backend) -> u32 {
    let state = flow.state().load();
    if state.has_ended() {
        return maps::settings().closing_jiffies();
    }
    if u32::from(flow.proto().load()) == TCP && !state.intersects(ConnState::ESTABLISHED) {
        return maps::settings().opening_jiffies();
    }
    backend.idle_jiffies
}

/// Whether a client's packet proves that the client has got the backend's answer to its SYN: who
/// sends from addresses that are not its own does not know the number.
#[inline(always)]
pub fn acknowledges(view: &PacketView<'_>, sequence: u32) -> bool {
    /// As much as a backend may have sent on its own before the client's first packet gets here.
    const WINDOW: u32 = 1 << 20;
    let known = TcpFlags::ACK | TcpFlags::SYN | TcpFlags::RST;
    if view.packet.flags & known != TcpFlags::ACK {
        return false;
    }
    let frame = ctx::frame(view.ctx);
    let tcp = frame.header::<12>(view.packet.l4 as usize);
    tcp.is_some_and(|tcp| u32::from_be(tcp.get(8)).wrapping_sub(sequence) < WINDOW)
}

/// Keeps the reply's entry, or makes it again if it is gone.
#[inline(never)]
fn keep_reply(view: &PacketView<'_>, flow: Entry, backend: &Backend) {
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
    flow_insert_reply(view.now, key, index_of(&view.packet.key));
}
