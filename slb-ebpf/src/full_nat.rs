//! Flows whose source is replaced as well: the backend answers an address of ours, wherever it is, and
//! whatever family its client is of. Both directions have entries.

use slb_common::{
    abi::{ConnState, FlowKind, Mode, NatTuple, NextHop, PROXY_NONE, PROXY_V2, UDP},
    decide, icmp_error,
    nat64::{self, HEAD_V4, HEAD_V6},
    parse::{FRAGMENT_FIRST, L3, TcpFlags},
    programs::Program,
    proxy_protocol, rewrite,
    verdict::Verdict,
};

use crate::{
    conntrack::{self, Entry},
    ctx::PacketCtx,
    fragments, kernel, maps,
    neigh::{self, ClientRoute},
    outcome::{Next, Outcome, exceeds, respond, sent, too_big},
    stats,
};

/// Translates a packet of either direction.
#[inline(always)]
pub fn translate(pkt: &mut PacketCtx<'_>) -> Outcome {
    let is_reply = pkt.args.is(FlowKind::Reply);
    // In place, for want of stack.
    let ends = maps::ends().ok_or(Verdict::Inconsistent)?;
    let ClientRoute { mut hop, mtu } =
        if is_reply { to_client(pkt, ends)? } else { to_backend(pkt, ends)? };
    // To the kernel a source of its own is a forgery, if it comes from outside.
    if !is_reply && !hop.is_known() {
        return Err(Verdict::NoNeighbour);
    }
    decide::check_ttl(pkt, hop)?;
    // What a backend is told: it has to fit as well, and cannot be put into a fragment.
    let more = if is_reply { 0 } else { pkt.args.inserted_len };
    if !decide::may_be_translated(pkt.packet, more, false) {
        return Err(Verdict::Untranslatable);
    }
    if ends.dst.is_v4() != pkt.packet.is_v4() {
        return cross(pkt, ends, hop, mtu, is_reply);
    }
    if exceeds(pkt.packet.len.wrapping_add(more), mtu) {
        let mode = if is_reply { Mode::NAT } else { Mode::FULL };
        match too_big(pkt, mode, mtu.wrapping_sub(more))? {
            Some(other) => hop = other,
            None => return Ok(Next::TailCall(Program::Respond)),
        }
    }
    if pkt.packet.fragment == FRAGMENT_FIRST {
        fragments::note_ends(pkt, ends, hop, mtu, is_reply);
    }
    rewrite::translate_ends(&mut pkt.frame, pkt.packet, ends, hop)?;
    Ok(finish(pkt, is_reply, hop))
}

/// Sends a translated packet, unless its backend is to be told something.
#[inline(always)]
fn finish(pkt: &mut PacketCtx<'_>, is_reply: bool, hop: NextHop) -> Next {
    if pkt.args.inserted_len == 0 {
        return sent(is_reply, hop);
    }
    pkt.args.hop = hop;
    Next::TailCall(Program::Proxy)
}

/// From a client.
#[inline(always)]
fn to_backend(pkt: &mut PacketCtx<'_>, ends: &mut NatTuple) -> Result<ClientRoute, Verdict> {
    pkt.args.place = conntrack::index_of(&pkt.packet.key);
    let flow = conntrack::get(pkt.args.place).ok_or(Verdict::Inconsistent)?;
    let id = flow.backend().load();
    let backend = maps::backend(id).ok_or(Verdict::Inconsistent)?;
    ends.src = maps::source(flow.source().load()).ok_or(Verdict::Inconsistent)?.load();
    ends.dst = backend.addr.copied();
    (ends.sport, ends.dport) = (flow.port().load(), backend.port as u16);
    note_inserted_len(pkt, flow, false);
    stats::forward(id, pkt.bytes);
    pkt.args.backend = id;
    Ok(ClientRoute { hop: backend.hop, mtu: backend.mtu })
}

/// Notes how much a backend is told about a flow's client, if this packet is one for [`Program::Proxy`].
#[inline(always)]
fn note_inserted_len(pkt: &mut PacketCtx<'_>, flow: Entry, is_reply: bool) {
    pkt.args.inserted_len = 0;
    let proxy = flow.proxy().load();
    if proxy == PROXY_NONE {
        return;
    }
    let is_header = proxy == PROXY_V2;
    let len = proxy_protocol::len(is_header, flow.src().load().is_v4());
    let is_known = !flow.state().load().intersects(ConnState::PROXY_PENDING)
        && !pkt.packet.flags.intersects(TcpFlags::SYN);
    if !is_known || !is_reply && may_tell_otherwise(pkt, flow, is_header) {
        pkt.args.inserted_len = len;
    }
}

/// Whether a segment of a connection whose backend has been told may tell it something else: it may begin the
/// connection once more, or has options of its own.
#[inline(always)]
fn may_tell_otherwise(pkt: &PacketCtx<'_>, flow: Entry, is_header: bool) -> bool {
    /// Of a TCP header without options, and with as many as a timestamp takes.
    const PLAIN: u8 = 5;
    const STAMPED: u8 = 8;
    /// No operation, twice, and a timestamp of ten bytes (RFC 7323, appendix A).
    const STAMP: u32 = 0x0101_080a_u32.to_be();
    let l4 = pkt.packet.l4 as usize;
    let Some(tcp) = pkt.frame.header::<20>(l4) else { return true };
    let sequence = u32::from_be(tcp.get(proxy_protocol::SEQUENCE));
    if is_header {
        let numbers = (sequence, u32::from_be(tcp.get(proxy_protocol::ACKNOWLEDGEMENT)));
        return proxy_protocol::is_cookie(numbers, flow.sequence().load());
    }
    let words = tcp.get::<u8>(12) >> 4;
    let is_stamped = words == STAMPED
        && pkt.frame.header::<24>(l4).is_some_and(|tcp| tcp.get::<u32>(20) == STAMP);
    sequence == flow.sequence().load() || !(words == PLAIN || is_stamped)
}

/// From a backend.
#[inline(always)]
fn to_client(pkt: &mut PacketCtx<'_>, ends: &mut NatTuple) -> Result<ClientRoute, Verdict> {
    let flow = conntrack::get(pkt.args.place).ok_or(Verdict::Inconsistent)?;
    (ends.src, ends.dst) = (flow.dst().load(), flow.src().load());
    (ends.sport, ends.dport) = (flow.dport().load(), flow.sport().load());
    pkt.args.backend = flow.backend().load();
    note_inserted_len(pkt, flow, true);
    let way = neigh::client_route(pkt, &ends.src, &ends.dst)?.ok_or(Verdict::NotOurs)?;
    stats::reply(pkt.args.backend, pkt.bytes);
    Ok(way)
}

/// Into the other family (RFC 7915).
#[inline(always)]
fn cross(
    pkt: &mut PacketCtx<'_>,
    ends: &NatTuple,
    hop: NextHop,
    mtu: u32,
    is_reply: bool,
) -> Outcome {
    let is_v4 = pkt.packet.is_v4();
    let more = if is_reply { 0 } else { pkt.args.inserted_len };
    if !decide::may_be_translated(pkt.packet, more, true)
        || pkt.packet.key.proto == UDP && is_v4 && !nat64::has_checksum(&pkt.frame, pkt.packet)
    {
        return Err(Verdict::Untranslatable);
    }
    let before = pkt.packet.l4.wrapping_sub(L3 as u32);
    let after = (if is_v4 { HEAD_V6 } else { HEAD_V4 }) as u32;
    // Its length over there.
    let len = pkt.packet.len.wrapping_sub(before).wrapping_add(after).wrapping_add(more);
    if exceeds(len, mtu) {
        if !icmp_error::is_to_be_told(&pkt.frame, pkt.packet) {
            return Err(Verdict::Oversize);
        }
        pkt.args.mtu = mtu.wrapping_sub(after).wrapping_add(before).wrapping_sub(more);
        return Ok(Next::TailCall(respond(pkt, Verdict::TooBig)));
    }
    let packet = nat64::header(&pkt.frame, pkt.packet).ok_or(Verdict::Truncated)?;
    pkt.adjust_head(before as i32 - after as i32).ok_or(Verdict::Inconsistent)?;
    let id = kernel::random() as u16;
    nat64::write(&mut pkt.frame, pkt.packet, &packet, ends, hop, (more, id))?;
    Ok(finish(pkt, is_reply, hop))
}
