//! Flows whose source is replaced as well: the backend answers an address of ours, wherever it is, and
//! whatever family its client is of. Both directions have entries.

use aya_ebpf::helpers::bpf_xdp_adjust_head;
use slb_common::{
    abi::{
        Ends, FLOW_FORWARD, Flow, Hop, MODE_FULL, MODE_NAT, STAGE_TELL, TOLD_HEADER, TOLD_NOT, UDP,
        UNTOLD,
    },
    client_address,
    cross::{self, HEAD_V4, HEAD_V6},
    icmp_error,
    parse::{FRAGMENT_FIRST, FRAGMENT_NONE, L3, SYN},
    rewrite,
    verdict::Verdict,
};

use crate::{
    flows, fragments,
    hops::{self, Way},
    maps, stats,
    work::{self, Exit, Sent, Work, exceeds, sent},
};

/// Translates a packet of either direction.
#[inline(always)]
pub fn translate(work: &mut Work<'_>) -> Result<Sent, Exit> {
    let is_reply = work.handover.what != FLOW_FORWARD.into();
    // In place, for want of stack.
    let ends = maps::ends().ok_or(Verdict::Inconsistent)?;
    let Way { mut hop, mtu } =
        if is_reply { to_client(work, ends)? } else { to_backend(work, ends)? };
    // To the kernel a source of its own is a forgery, if it comes from outside.
    if !is_reply && !hop.is_known() {
        return Err(Verdict::NoNeighbour.into());
    }
    if work.expires(hop) {
        return Err(Verdict::TtlExpired.into());
    }
    // Nothing can be put into a fragment, nor can be told what the others have.
    if !is_reply && work.handover.told != 0 && work.packet.fragment != FRAGMENT_NONE {
        return Err(Verdict::Untranslatable.into());
    }
    // What a backend is told has to fit as well.
    let more = if is_reply { 0 } else { work.handover.told };
    if ends.dst.is_v4() != work.packet.is_v4() {
        return cross(work, ends, hop, mtu, is_reply);
    }
    if exceeds(work.packet.len.wrapping_add(more), mtu) {
        let mode = if is_reply { MODE_NAT } else { MODE_FULL };
        hop = work.too_big(mode, mtu.wrapping_sub(more))?;
    }
    if work.packet.fragment == FRAGMENT_FIRST {
        fragments::note_ends(work, ends, hop, mtu, is_reply);
    }
    rewrite::translate_ends(&mut work.frame, work.packet, ends, hop)?;
    finish(work, is_reply, hop)
}

/// Sends a translated packet, unless its backend is to be told something.
#[inline(always)]
fn finish(work: &mut Work<'_>, is_reply: bool, hop: Hop) -> Result<Sent, Exit> {
    if work.handover.told == 0 {
        return Ok(sent(is_reply, hop));
    }
    work.handover.hop = hop;
    Err(Exit::Stage(STAGE_TELL))
}

/// From a client.
#[inline(always)]
fn to_backend(work: &mut Work<'_>, ends: &mut Ends) -> Result<Way, Exit> {
    work.handover.place = flows::position(&work.packet.key);
    let flow = flows::at(work.handover.place).ok_or(Verdict::Inconsistent)?;
    let backend = maps::backend(flow.backend).ok_or(Verdict::Inconsistent)?;
    ends.src = maps::source(flow.source).ok_or(Verdict::Inconsistent)?.copied();
    ends.dst = backend.addr.copied();
    (ends.sport, ends.dport) = (flow.port, backend.port as u16);
    note_told(work, flow, false);
    stats::forward(flow.backend, work.bytes);
    work.handover.backend = flow.backend;
    Ok(Way { hop: backend.hop, mtu: backend.mtu })
}

/// Notes how much a backend is told about a flow's client, if this packet is one for [`STAGE_TELL`].
#[inline(always)]
fn note_told(work: &mut Work<'_>, flow: &Flow, is_reply: bool) {
    work.handover.told = 0;
    if flow.told == TOLD_NOT {
        return;
    }
    let is_header = flow.told == TOLD_HEADER;
    let len = client_address::len(is_header, flow.src.is_v4());
    let is_known = flow.state & UNTOLD == 0 && work.packet.flags & SYN == 0;
    if !is_known || !is_reply && may_tell_otherwise(work, flow, is_header) {
        work.handover.told = len;
    }
}

/// Whether a segment of a connection whose backend has been told may tell it something else: it may begin the
/// connection once more, or has options of its own.
#[inline(always)]
fn may_tell_otherwise(work: &Work<'_>, flow: &Flow, is_header: bool) -> bool {
    /// Of a TCP header without options, and with as many as a timestamp takes.
    const PLAIN: u8 = 5;
    const STAMPED: u8 = 8;
    /// No operation, twice, and a timestamp of ten bytes (RFC 7323, appendix A).
    const STAMP: u32 = 0x0101_080a_u32.to_be();
    let l4 = work.packet.l4 as usize;
    let Some(tcp) = work.frame.header::<20>(l4) else { return true };
    let sequence = u32::from_be(tcp.get(client_address::SEQUENCE));
    if is_header {
        let numbers = (sequence, u32::from_be(tcp.get(client_address::ACKNOWLEDGEMENT)));
        return client_address::is_cookie(numbers, flow.sequence);
    }
    let words = tcp.get::<u8>(12) >> 4;
    let is_stamped = words == STAMPED
        && work.frame.header::<24>(l4).is_some_and(|tcp| tcp.get::<u32>(20) == STAMP);
    sequence == flow.sequence || !(words == PLAIN || is_stamped)
}

/// From a backend.
#[inline(always)]
fn to_client(work: &mut Work<'_>, ends: &mut Ends) -> Result<Way, Exit> {
    let flow = flows::at(work.handover.place).ok_or(Verdict::Inconsistent)?;
    (ends.src, ends.dst) = (flow.dst.copied(), flow.src.copied());
    (ends.sport, ends.dport) = (flow.dport, flow.sport);
    work.handover.backend = flow.backend;
    note_told(work, flow, true);
    let way = hops::to_client(work, &ends.src, &ends.dst)?.ok_or(Verdict::NotOurs)?;
    stats::reply(work.handover.backend, work.bytes);
    Ok(way)
}

/// Into the other family (RFC 7915).
#[inline(always)]
fn cross(
    work: &mut Work<'_>,
    ends: &Ends,
    hop: Hop,
    mtu: u32,
    is_reply: bool,
) -> Result<Sent, Exit> {
    let is_v4 = work.packet.is_v4();
    let more = if is_reply { 0 } else { work.handover.told };
    if work.packet.fragment != FRAGMENT_NONE
        || work.packet.key.proto == UDP && is_v4 && !cross::has_checksum(&work.frame, work.packet)
    {
        return Err(Verdict::Untranslatable.into());
    }
    let before = work.packet.l4.wrapping_sub(L3 as u32);
    let after = (if is_v4 { HEAD_V6 } else { HEAD_V4 }) as u32;
    // Its length over there.
    let len = work.packet.len.wrapping_sub(before).wrapping_add(after).wrapping_add(more);
    if exceeds(len, mtu) {
        if !icmp_error::is_to_be_told(&work.frame, work.packet) {
            return Err(Verdict::Oversize.into());
        }
        work.handover.mtu = mtu.wrapping_sub(after).wrapping_add(before).wrapping_sub(more);
        return Err(work.answer(Verdict::TooBig));
    }
    let packet = cross::header(&work.frame, work.packet).ok_or(Verdict::Truncated)?;
    // SAFETY: the context is the kernel's; the frame is asked for afterwards.
    if unsafe { bpf_xdp_adjust_head(work.ctx.ctx, before as i32 - after as i32) } != 0 {
        return Err(Verdict::Inconsistent.into());
    }
    work.frame = work::frame(work.ctx);
    cross::write(&mut work.frame, work.packet, &packet, ends, hop)?;
    finish(work, is_reply, hop)
}
