//! Fragments of IPv4 and IPv6: the first has ports and chooses, the others go where it went.

use aya_ebpf::bindings::BPF_ANY;
use slb_common::{
    abi::{ANY_INTERFACE, FlowKind, Fragment, FragmentKey, Mode, NatTuple, NextHop},
    decide,
    parse::FRAGMENT_FIRST,
    programs::Program,
    rewrite,
    verdict::Verdict,
};

use crate::{
    ctx::PacketCtx,
    maps,
    outcome::{Delivery, Next, Outcome, Stop, deliver, exceeds, sent, too_big},
    policy, stats,
};

/// Carries out a decision. If the packet is a first fragment, notes where it goes, for the other fragments. Of those
/// that the kernel gets only where they are to a VIP: without a record, others are left to it anyway.
#[inline(always)]
pub fn lead(pkt: &mut PacketCtx<'_>, decision: Result<Delivery, Stop>) -> Outcome {
    match decision {
        Ok(delivery) => {
            if pkt.packet.fragment == FRAGMENT_FIRST {
                note(pkt, Some(&delivery));
            }
            deliver(pkt, delivery)
        }
        Err(Stop::TailCall(program)) => Ok(Next::TailCall(program)),
        Err(Stop::End(verdict)) => {
            if matches!(verdict, Verdict::NoListener) && pkt.packet.fragment == FRAGMENT_FIRST {
                note(pkt, None);
            }
            Err(verdict)
        }
    }
}

/// A function of its own: most packets have no need of its part of the stack.
#[inline(never)]
fn note(pkt: &PacketCtx<'_>, delivery: Option<&Delivery>) {
    let Some((key, fragment)) = maps::fragment() else { return };
    *key = decide::fragment_key(pkt.packet);
    // In place, field by field: a record on the stack would take more of that than all else.
    let packet = &pkt.packet.key;
    (fragment.src, fragment.dst) = (packet.src.copied(), packet.dst.copied());
    (fragment.hash, fragment.backend) = (pkt.args.hash, pkt.args.backend);
    fragment.expires = pkt.now.wrapping_add(maps::settings().fragment_jiffies());
    (fragment.id, fragment.from) = (pkt.packet.fragment_id, packet.src.copied());
    let is_reply = delivery.is_some_and(|delivery| delivery.to.is_reply());
    fragment.interfaces = interfaces(pkt, is_reply);
    if let Some(delivery) = delivery {
        let end = if delivery.to.is_reply() { &mut fragment.src } else { &mut fragment.dst };
        *end = delivery.to.addr.copied();
        fragment.kind = delivery.to.kind as u32;
        fragment.hop = NextHop::from_mac_words(delivery.hop.ifindex, delivery.hop.mac_words());
        (fragment.mode, fragment.mtu) = (delivery.mode, delivery.mtu);
    } else {
        // Left to the kernel, both ends stay as they are.
        fragment.kind = FlowKind::Bypass as u32;
        fragment.hop.clear();
        (fragment.mode, fragment.mtu) = (Mode::NAT, 0);
    }
    put(key, fragment);
}

/// Notes where a first fragment goes, both of whose ends are replaced.
#[inline(never)]
pub fn note_ends(pkt: &PacketCtx<'_>, ends: &NatTuple, hop: NextHop, mtu: u32, is_reply: bool) {
    // First, while nothing else is needed: it is a call.
    let expires = pkt.now.wrapping_add(maps::settings().fragment_jiffies());
    let Some((key, fragment)) = maps::fragment() else { return };
    *key = decide::fragment_key(pkt.packet);
    *fragment = Fragment {
        src: ends.src,
        dst: ends.dst,
        hop,
        backend: pkt.args.backend,
        id: pkt.packet.fragment_id,
        from: pkt.packet.key.src.copied(),
        interfaces: interfaces(pkt, is_reply),
        mode: Mode::NAT,
        kind: FlowKind::of_direction(is_reply) as u32,
        mtu,
        expires,
        hash: 0,
    };
    put(key, fragment);
}

/// The interfaces that the other fragments of a packet may come by. Where those of a client's come from, they say.
#[inline(always)]
fn interfaces(pkt: &PacketCtx<'_>, is_reply: bool) -> u64 {
    if !is_reply {
        return ANY_INTERFACE;
    }
    maps::revnat_entry(&pkt.packet.key.source()).map_or(0, |origin| origin.interfaces)
}

/// Without a record the others are dropped: that is all that a full table means.
#[inline(always)]
fn put(key: &FragmentKey, fragment: &Fragment) {
    let _ = maps::SLB_FRAGMENTS.insert(key, fragment, u64::from(BPF_ANY));
}

/// A later fragment.
#[inline(always)]
pub fn follow(pkt: &mut PacketCtx<'_>) -> Outcome {
    let first = decide::later(pkt, pkt.packet)?;
    let Fragment { mut hop, mode, mtu, kind, backend, .. } = first;
    if exceeds(pkt.packet.len, mtu) {
        match too_big(pkt, mode, mtu)? {
            Some(other) => hop = other,
            None => return Ok(Next::TailCall(Program::Respond)),
        }
    }
    let is_reply = kind == FlowKind::Reply as u32;
    if is_reply {
        policy::police_reply(backend, pkt.bytes)?;
        stats::reply(backend, pkt.bytes);
    } else {
        policy::police_original(backend, pkt.bytes)?;
        stats::forward(backend, pkt.bytes);
    }
    match mode {
        Mode::NAT => {
            let ends = [first.src, first.dst];
            rewrite::translate_later(&mut pkt.frame, pkt.packet, ends, hop)?;
            Ok(sent(is_reply, hop))
        }
        Mode::DSR => {
            rewrite::rewrite_l2(&mut pkt.frame, pkt.packet, hop)?;
            Ok(Next::Send { verdict: Verdict::Forwarded, egress: hop.ifindex })
        }
        _ => {
            (pkt.args.hash, pkt.args.backend) = (first.hash, backend);
            Ok(Next::TailCall(Program::Tunnel))
        }
    }
}
