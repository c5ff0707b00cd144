//! Fragments of IPv4 and IPv6: the first has ports and chooses, the others go where it went.

use aya_ebpf::bindings::BPF_ANY;
use slb_common::{
    abi::{
        Ends, FLOW_DIRECT, FLOW_FORWARD, FLOW_REPLY, Fragment, FragmentKey, Hop, Keys, MODE_DSR,
        MODE_NAT, ROLE_VIP, STAGE_TUNNEL, TCP, UDP,
    },
    parse::{FRAGMENT_FIRST, Packet},
    rewrite,
    verdict::{Action, Verdict},
};

use crate::{
    flows, guard, maps, stats,
    work::{Exit, Route, Sent, Work, exceeds, sent},
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

/// Sends a packet, and the other fragments after it, if it is a first one.
#[inline(always)]
pub fn lead(work: &mut Work<'_>, route: Route) -> Result<Sent, Exit> {
    if work.packet.fragment == FRAGMENT_FIRST {
        note(work, Some(&route));
    }
    work.send(route)
}

/// A packet that is not sent. If it is left to the kernel, so are the other fragments after it.
#[inline(always)]
pub fn leave(work: &Work<'_>, exit: Exit) -> Exit {
    if let Exit::Verdict(verdict) = exit
        && matches!(verdict.action(), Action::Pass)
        && work.packet.fragment == FRAGMENT_FIRST
    {
        note(work, None);
    }
    exit
}

/// A function of its own: most packets have no need of its part of the stack.
#[inline(never)]
fn note(work: &Work<'_>, route: Option<&Route>) {
    let Some(Keys { fragments: key, fragment, .. }) = maps::keys() else { return };
    *key = key_of(work.packet);
    // Left to the kernel, both ends stay as they are.
    let (mut src, mut dst) = (key.src.copied(), key.dst.copied());
    // Word by word: zeros in one piece become a call.
    let mut hop = Hop::from_mac_words(0, [0; 3]);
    let (mut kind, mut mode, mut mtu) = (FLOW_DIRECT.into(), MODE_NAT, 0);
    if let Some(route) = route {
        (kind, hop, mode, mtu) = (route.to.kind, route.hop, route.mode, route.mtu);
        *(if route.to.is_reply() { &mut src } else { &mut dst }) = route.to.addr.copied();
    }
    let (hash, backend) = (work.handover.hash, work.handover.backend);
    let expires = work.now.wrapping_add(maps::settings().fragment_jiffies);
    *fragment = Fragment { src, dst, hop, hash, backend, mode, kind, mtu, expires, spare: 0 };
    put(key, fragment);
}

/// Notes where a first fragment goes, both of whose ends are replaced.
#[inline(never)]
pub fn note_ends(work: &Work<'_>, ends: &Ends, hop: Hop, mtu: u32, is_reply: bool) {
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
pub fn follow(work: &mut Work<'_>) -> Result<Sent, Exit> {
    let is_vip = maps::roles(&work.packet.key.dst) & ROLE_VIP != 0;
    if !matches!(work.packet.key.proto, TCP | UDP) && work.packet.is_v4() {
        return Err(if is_vip { Verdict::OtherProtocol } else { Verdict::NotOurs }.into());
    }
    let Some(Keys { fragments: key, .. }) = maps::keys() else {
        return Err(Verdict::Inconsistent.into());
    };
    *key = key_of(work.packet);
    let key: &FragmentKey = key;
    // SAFETY: read once; an entry that becomes another's meanwhile was the oldest of all.
    let known = unsafe { maps::SLB_FRAGMENTS.get(key) };
    let Some(first) = known.filter(|first| !flows::is_over(work.now, first.expires)) else {
        return Err(if is_vip { Verdict::Fragment } else { Verdict::NotOurs }.into());
    };
    if first.kind == FLOW_DIRECT.into() {
        return Err(if is_vip { Verdict::NoListener } else { Verdict::NotOurs }.into());
    }
    let mut hop = first.hop;
    if work.expires(hop) {
        return Err(Verdict::TtlExpired.into());
    }
    if exceeds(work.packet.len, first.mtu) {
        hop = work.too_big(first.mode, first.mtu)?;
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
            Ok((Verdict::Forwarded, hop.ifindex))
        }
        _ => {
            (work.handover.hash, work.handover.backend) = (first.hash, first.backend);
            Err(Exit::Stage(STAGE_TUNNEL))
        }
    }
}
