//! Clients that talk to a backend's address and port themselves, through the gateway: direct flows.
//!
//! What they send goes to the kernel as it is, so that its firewall decides. What the backend answers looks like an
//! answer to a flow through a listener. So a client's SYN is taken down with its number, in a record of
//! [`FlowKind::Bypass`]. The SYN-ACK or reset that acknowledges that number belongs to the direct connection, and once
//! the client has acknowledged the SYN-ACK, so does what else the backend sends there. Until then that counts as
//! balanced: a SYN from a forged address, or one that the firewall drops, changes nothing for other flows.
//!
//! Datagrams have no numbers: an answer belongs to a direct flow unless a balanced one may have the same ports.

use slb_common::{
    abi::{ConnState, Endpoint, FlowKind, RevNat, RevNatFlags, TCP, UDP, is_over},
    decide,
    parse::TcpFlags,
    verdict::Verdict,
};

use crate::{
    cell::{Elements as _, SharedCell},
    conntrack::{self, Entry},
    ctx::{self, PacketCtx, PacketView},
    maps,
};

/// A packet whose destination, `to`, may be a backend. The kernel gets it in any case.
#[inline(always)]
pub fn to_backend(pkt: &mut PacketCtx<'_>, to: &Endpoint) -> Verdict {
    let Some(origin) = maps::revnat(to) else { return Verdict::NotOurs };
    on_client_packet(&pkt.view(), origin.backend);
    Verdict::Bypass
}

/// Whether a packet from the backend `id` may belong to a direct flow, or to a balanced one whose port is not the
/// client's: then it has to be looked for. `any` is [`slb_common::abi::Filter::bypass_until`]: nearly always no client
/// talks to any backend. Nothing but the beginning of a direct flow matters before the backend has answered one.
///
/// # Errors
///
/// As [`decide::is_recent`].
#[inline(always)]
pub fn may_concern(pkt: &PacketCtx<'_>, any: u32, id: u32) -> Result<bool, Verdict> {
    let is_answer =
        pkt.packet.key.proto == UDP || pkt.packet.flags.intersects(TcpFlags::SYN | TcpFlags::RST);
    Ok(decide::is_until(any, pkt.now) && (is_answer || decide::is_recent(pkt, any, id)?))
}

/// Takes down what a client sends to the backend `id` itself.
#[inline(never)]
fn on_client_packet(view: &PacketView<'_>, id: u32) {
    let Some(reply) = maps::reply_key() else { return };
    *reply = view.packet.key.reversed();
    if let Some(record) = conntrack::slow_lookup(reply)
        && record.is(FlowKind::Bypass)
        && !is_over(view.now, record.expires().load())
    {
        on_known(view, record, id);
    } else if decide::begins(view.packet) && !conntrack::is_taken(reply, &view.packet.key) {
        conntrack::insert_bypass(view.now, reply, id, numbers(view).0.wrapping_add(1));
        mark_any(view.now.wrapping_add(maps::settings().opening_jiffies()));
    }
}

/// A client's packet of a direct flow that has a record.
#[inline(always)]
fn on_known(view: &PacketView<'_>, record: Entry, id: u32) {
    let state = record.state().load();
    if view.packet.is_syn() {
        record.sequence().store(numbers(view).0.wrapping_add(1));
        // Neither the end nor the beginning is proven. A connection that is stays direct: it may be alive.
        if decide::direct_has_ended(state) {
            record.state().store(state & ConnState::ESTABLISHED);
        }
    } else if state.awaits_proof() && acknowledges(view, record.peer().load()) {
        // What was said about its end was said too early, or not by the client.
        record.state().store(ANSWERED);
    }
    keep(view, record, id, ConnState::END_CLAIMED);
}

/// Whether a backend's packet, whose key `record` has, belongs to the direct flow. Takes down what it says.
#[inline(always)]
pub fn is_answer(view: &PacketView<'_>, record: Entry, origin: &RevNat) -> bool {
    if is_over(view.now, record.expires().load()) {
        return false;
    }
    let state = record.state().load();
    if view.packet.key.proto == UDP {
        record.state().store(state | ConnState::ANSWERED);
    } else if !state.intersects(ConnState::ESTABLISHED) {
        if !view.packet.flags.intersects(TcpFlags::SYN | TcpFlags::RST) {
            return false;
        }
        let is_syn = view.packet.flags.intersects(TcpFlags::SYN);
        let (sequence, acknowledged) = numbers(view);
        let next = sequence.wrapping_add(is_syn.into());
        let is_first =
            view.packet.flags.intersects(TcpFlags::ACK) && acknowledged == record.sequence().load();
        // The client may have sent its SYN, or another has sent one in its name, once more.
        let is_again = state.intersects(ConnState::ANSWERED) && next == record.peer().load();
        if !is_first && !is_again {
            return false;
        }
        if is_syn {
            record.peer().store(next);
            record.state().store(state | ConnState::ANSWERED);
        }
    }
    if !view.packet.flags.intersects(TcpFlags::RST) {
        // A client's reset that the backend takes no notice of was none.
        record.state().store(record.state().load().difference(ConnState::ENDED));
    }
    keep(view, record, origin.backend, ConnState::FIN_REPLY);
    true
}

/// Whether a datagram is of a direct flow only if no balanced one can have its ports: the backend has not answered the
/// client before. Of a backend that answers for several, a balanced flow would have its entry where the record is.
#[inline(always)]
pub fn is_open(view: &PacketView<'_>, record: Entry, origin: &RevNat) -> bool {
    view.packet.key.proto == UDP
        && !record.state().load().intersects(ANSWERED)
        && !is_over(view.now, record.expires().load())
        && !origin.flags.intersects(RevNatFlags::SHARED)
}

/// Decides on a datagram for which [`is_open`], and gives whether it belongs to the direct flow. Not called by others,
/// so that the deepest chain of calls is short.
#[inline(always)]
pub fn decide_open(view: &PacketView<'_>, origin: &RevNat) -> bool {
    let is_balanced = conntrack::may_be_balanced(view.now, &view.packet.key, origin.backend);
    settle(view, origin, is_balanced);
    !is_balanced
}

/// Forgets a record if the flow is a balanced one, or takes down that the backend has answered.
#[inline(never)]
fn settle(view: &PacketView<'_>, origin: &RevNat, is_balanced: bool) {
    let record = conntrack::slow_lookup(&view.packet.key);
    let Some(record) = record.filter(|record| record.is(FlowKind::Bypass)) else { return };
    if is_balanced {
        conntrack::delete(record);
    } else {
        is_answer(view, record, origin);
    }
}

/// The backend has answered; or that is proven by the client.
const ANSWERED: ConnState = ConnState::ANSWERED.union(ConnState::ESTABLISHED);

/// Keeps a record after a packet, and takes down a FIN or RST; `fin` is its side's bit.
#[inline(always)]
fn keep(view: &PacketView<'_>, record: Entry, id: u32, fin: ConnState) {
    let flags = view.packet.flags;
    let state = record.state().load();
    if flags.intersects(TcpFlags::RST) {
        record.state().store(state | ConnState::ENDED);
    } else if flags.intersects(TcpFlags::FIN) {
        record.state().store(state | fin);
    }
    let is_opening = if view.packet.key.proto == TCP {
        !state.intersects(ConnState::ESTABLISHED) || flags.intersects(TcpFlags::SYN)
    } else {
        !state.intersects(ANSWERED)
    };
    let jiffies = if is_opening {
        maps::settings().opening_jiffies()
    } else {
        maps::backend(id).map_or(0, |backend| backend.idle_jiffies)
    };
    let until = view.now.wrapping_add(jiffies);
    extend(record.expires(), until);
    if state.intersects(ANSWERED) {
        mark(until, id);
    } else {
        mark_any(until);
    }
}

/// Has flows of the backend `id` looked for in the table, as one is there that only its entry tells.
#[inline(never)]
pub fn keep_looking(now: u32, id: u32) {
    let jiffies = maps::backend(id).map_or(0, |backend| backend.idle_jiffies);
    mark(now.wrapping_add(jiffies), id);
}

/// Has flows of the backend `id` looked for in the table until then, in jiffies.
#[inline(always)]
fn mark(until: u32, id: u32) {
    if let Some(own) = maps::SLB_BYPASS.cell(id) {
        extend(own, until);
    }
    mark_any(until);
}

/// Has answers that may be the first of a direct flow looked for in the table until then, in jiffies.
#[inline(always)]
fn mark_any(until: u32) {
    if let Some(filter) = maps::SLB_FILTER.cell(0) {
        extend(filter.bypass_until(), until);
    }
}

/// Puts off the end of something. Of two CPUs that do so at once, one may lose: both write much the same.
#[inline(always)]
fn extend(end: SharedCell<u32>, until: u32) {
    let was = end.load();
    // 0 has a meaning of its own; a tick more does not matter.
    if was == 0 || is_over(until | 1, was) {
        end.store(until | 1);
    }
}

/// Whether a client's segment proves that the client has got the backend's SYN-ACK.
#[inline(always)]
fn acknowledges(view: &PacketView<'_>, sequence: u32) -> bool {
    let known = TcpFlags::ACK | TcpFlags::SYN | TcpFlags::RST;
    view.packet.flags & known == TcpFlags::ACK && decide::proves(numbers(view).1, sequence)
}

/// Sequence and acknowledgement number of a TCP segment; of anything else zeros.
#[inline(always)]
fn numbers(view: &PacketView<'_>) -> (u32, u32) {
    if view.packet.key.proto != TCP {
        return (0, 0);
    }
    let frame = ctx::frame(view.ctx);
    let Some(tcp) = frame.header::<12>(view.packet.l4 as usize) else { return (0, 0) };
    (u32::from_be(tcp.get(4)), u32::from_be(tcp.get(8)))
}
