//! Fragments of IPv4 and IPv6: the first has ports and chooses, the others go where it went.

use aya_ebpf::bindings::BPF_ANY;
use slb_common::{
    abi::{
        Ends, FLOW_DIRECT, FLOW_FORWARD, FLOW_REPLY, Fragment, FragmentKey, Hop, Keys, MODE_DSR,
        MODE_NAT, ROLE_VIP, TCP, UDP, is_over,
    },
    parse::{FRAGMENT_FIRST, Packet},
    programs::Program,
    rewrite,
    verdict::{Action, Verdict},
};

use crate::{
    ctx::PacketCtx,
    guard, maps,
    outcome::{Delivery, Next, Outcome, Stop, deliver, exceeds, sent, too_big},
    stats,
};

/// Fragments of IPv4 packets belong together by their protocol as well (RFC 791, section 3.2); those of
/// IPv6 do not (RFC 8200, section 4.5), and their headers may name different ones.
#[inline(always)]
fn key_of(packet: &Packet) -> FragmentKey {
    FragmentKey {
        src: packet.key.src,
        dst: packet.key.dst,
        id: packet.fragment_id,
        proto: if packet.is_v4() { packet.key.proto } else { 0 },
    }
}

/// Carries out a decision. If the packet is a first fragment, notes where it goes, or that the kernel gets it, for the
/// other fragments.
#[inline(always)]
pub fn lead(work: &mut PacketCtx<'_>, decision: Result<Delivery, Stop>) -> Outcome {
    match decision {
        Ok(delivery) => {
            if work.packet.fragment == FRAGMENT_FIRST {
                note(work, Some(&delivery));
            }
            deliver(work, delivery)
        }
        Err(Stop::TailCall(program)) => Ok(Next::TailCall(program)),
        Err(Stop::End(verdict)) => {
            if matches!(verdict.action(), Action::Pass) && work.packet.fragment == FRAGMENT_FIRST {
                note(work, None);
            }
            Err(verdict)
        }
    }
}

/// A function of its own: most packets have no need of its part of the stack.
#[inline(never)]
fn note(work: &PacketCtx<'_>, delivery: Option<&Delivery>) {
    let Some(Keys { fragments: key, fragment, .. }) = maps::keys() else { return };
    *key = key_of(work.packet);
    // In place, field by field: a record on the stack would take more of that than all else.
    (fragment.src, fragment.dst) = (key.src.copied(), key.dst.copied());
    (fragment.hash, fragment.backend) = (work.handover.hash, work.handover.backend);
    fragment.expires = work.now.wrapping_add(maps::settings().fragment_jiffies);
    if let Some(delivery) = delivery {
        let end = if delivery.to.is_reply() { &mut fragment.src } else { &mut fragment.dst };
        *end = delivery.to.addr.copied();
        fragment.kind = delivery.to.kind;
        fragment.hop = Hop::from_mac_words(delivery.hop.ifindex, delivery.hop.mac_words());
        (fragment.mode, fragment.mtu) = (delivery.mode, delivery.mtu);
    } else {
        // Left to the kernel, both ends stay as they are.
        fragment.kind = FLOW_DIRECT.into();
        fragment.hop = Hop::from_mac_words(0, [0; 3]);
        (fragment.mode, fragment.mtu) = (MODE_NAT, 0);
    }
    put(key, fragment);
}

/// Notes where a first fragment goes, both of whose ends are replaced.
#[inline(never)]
pub fn note_ends(work: &PacketCtx<'_>, ends: &Ends, hop: Hop, mtu: u32, is_reply: bool) {
    let Some(Keys { fragments: key, fragment, .. }) = maps::keys() else { return };
    *key = key_of(work.packet);
    *fragment = Fragment {
        src: ends.src,
        dst: ends.dst,
        hop,
        backend: work.handover.backend,
        mode: MODE_NAT,
        kind: if is_reply { FLOW_REPLY.into() } else { FLOW_FORWARD.into() },
        mtu,
        expires: work.now.wrapping_add(maps::settings().fragment_jiffies),
        ..Fragment::default()
    };
    put(key, fragment);
}

/// Without a record the others are dropped: that is all that a full table means.
#[inline(always)]
fn put(key: &FragmentKey, fragment: &Fragment) {
    let _ = maps::SLB_FRAGMENTS.insert(key, fragment, u64::from(BPF_ANY));
}

/// A later fragment.
#[inline(always)]
pub fn follow(work: &mut PacketCtx<'_>) -> Outcome {
    let is_vip = maps::roles(&work.packet.key.dst) & ROLE_VIP != 0;
    if !matches!(work.packet.key.proto, TCP | UDP) && work.packet.is_v4() {
        return Err(if is_vip { Verdict::OtherProtocol } else { Verdict::NotOurs });
    }
    let Some(Keys { fragments: key, .. }) = maps::keys() else {
        return Err(Verdict::Inconsistent);
    };
    *key = key_of(work.packet);
    let key: &FragmentKey = key;
    // SAFETY: read once; an entry that becomes another's meanwhile was the oldest of all.
    let known = unsafe { maps::SLB_FRAGMENTS.get(key) };
    let Some(first) = known.filter(|first| !is_over(work.now, first.expires)) else {
        return Err(if is_vip { Verdict::Fragment } else { Verdict::NotOurs });
    };
    if first.kind == FLOW_DIRECT.into() {
        return Err(if is_vip { Verdict::NoListener } else { Verdict::NotOurs });
    }
    let mut hop = first.hop;
    work.check_ttl(hop)?;
    if exceeds(work.packet.len, first.mtu) {
        match too_big(work, first.mode, first.mtu)? {
            Some(other) => hop = other,
            None => return Ok(Next::TailCall(Program::Answer)),
        }
    }
    let is_reply = first.kind == FLOW_REPLY.into();
    if is_reply {
        guard::take_reply(first.backend, work.bytes)?;
        stats::reply(first.backend, work.bytes);
    } else {
        guard::take_forward(first.backend, work.bytes)?;
        stats::forward(first.backend, work.bytes);
    }
    match first.mode {
        MODE_NAT => {
            let ends = [first.src, first.dst];
            rewrite::translate_later(&mut work.frame, work.packet, ends, hop)?;
            Ok(sent(is_reply, hop))
        }
        MODE_DSR => {
            rewrite::pass_on(&mut work.frame, work.packet, hop)?;
            Ok(Next::Send { verdict: Verdict::Forwarded, egress: hop.ifindex })
        }
        _ => {
            (work.handover.hash, work.handover.backend) = (first.hash, first.backend);
            Ok(Next::TailCall(Program::Tunnel))
        }
    }
}
