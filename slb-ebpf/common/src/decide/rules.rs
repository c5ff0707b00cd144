//! Rules that need no look-up.

use super::Peer;
use crate::{
    abi::{
        Address, Backend, BackendFlags, ConnState, FRAGMENTS_PER_SOURCE, FlowKey, FragmentKey,
        Listener, Mode, PROXY_NONE, PROXY_OPTION, PROXY_V2, Sticky, TAG_LOCKED, TCP, UDP, is_over,
    },
    hash,
    packet::{FRAGMENT_NONE, Packet, TcpFlags},
    verdict::Verdict,
};

/// Whether a flow begins with a packet, as far as the packet says: each datagram may be a flow's first.
#[must_use]
#[inline(always)]
pub const fn begins(packet: &Packet) -> bool {
    packet.is_syn() || packet.key.proto == UDP
}

/// Whether an address is no unicast address that a router may forward from: RFC 1812, section 5.3.7;
/// RFC 3927, section 2.7; RFC 4291, sections 2.5.2, 2.5.3, 2.5.6 and 2.7. 240.0.0.0/4 is, as to the kernel.
#[must_use]
#[inline(always)]
pub fn is_martian(addr: &Address, is_v4: bool) -> bool {
    let bytes = &addr.bytes;
    if is_v4 {
        return matches!(bytes[12], 0 | 127 | 224..=239)
            || (bytes[12] == 169 && bytes[13] == 254)
            || addr.words()[3] == u32::MAX;
    }
    let [high, low] = addr.halves();
    let is_none_or_loopback = high == 0 && u64::from_be(low) <= 1;
    let is_link_local = bytes[0] == 0xfe && bytes[1] & 0xc0 == 0x80;
    is_none_or_loopback || is_link_local || bytes[0] == 0xff
}

/// Whether something that lasts until `until`, in jiffies, goes on; 0: it has never begun.
#[must_use]
#[inline(always)]
pub const fn is_until(until: u32, now: u32) -> bool {
    until != 0 && !is_over(now, until)
}

/// Whether a backend of the listener takes new flows of clients that are kept with it.
#[must_use]
#[inline(always)]
pub fn is_open(listener: &Listener, backend: &Backend) -> bool {
    const OPEN: BackendFlags = BackendFlags::IN_USE.union(BackendFlags::USABLE);
    u32::from(backend.listener) == listener.id
        && backend.flags & (OPEN | BackendFlags::CLOSED) == OPEN
        && backend.weight != 0
}

/// Whether a client is still kept with its backend.
#[must_use]
#[inline(always)]
pub const fn is_kept(now: u32, sticky: &Sticky) -> bool {
    !is_over(now, sticky.expires)
}

/// Whether the record of a direct flow says that the backend has answered it: its port is taken, until it ends.
#[must_use]
#[inline(always)]
pub const fn is_direct(now: u32, state: ConnState, expires: u32) -> bool {
    state.intersects(ConnState::ANSWERED.union(ConnState::ESTABLISHED))
        && !direct_has_ended(state)
        && !is_over(now, expires)
}

/// Whether a direct flow has ended: by a reset, or closed by both sides.
#[must_use]
#[inline(always)]
pub const fn direct_has_ended(state: ConnState) -> bool {
    state.has_ended() || state.contains(ConnState::END_CLAIMED.union(ConnState::FIN_REPLY))
}

/// Whether and how a backend is told who the client of a new flow is.
#[must_use]
#[inline(always)]
pub fn proxy_of(proto: u32, backend: &Backend) -> u8 {
    match backend.flags & (BackendFlags::PROXY | BackendFlags::OPTION) {
        BackendFlags::PROXY if proto == TCP => PROXY_V2,
        BackendFlags::OPTION if proto == TCP => PROXY_OPTION,
        _ => PROXY_NONE,
    }
}

/// Index into `SLB_SOURCES` of the address that a backend is to see as the source of a new flow with this
/// [`hash::flow`]; `None`: it has none.
#[must_use]
#[inline(always)]
pub const fn source_of(backend: &Backend, hash: u64) -> Option<u16> {
    if backend.sources == 0 {
        return None;
    }
    Some(backend.source + hash::slot(hash as u32, backend.sources as u32) as u16)
}

/// Whether `peer`, whose backend is `backend`, is the client's entry of a backend's answer with this key: its place may
/// belong to another flow by now. That the backend takes the client to be at the answer's destination is not looked at.
#[must_use]
#[inline(always)]
pub const fn is_owner(peer: &Peer, key: &FlowKey, backend: &Backend) -> bool {
    peer.tag > TAG_LOCKED
        && peer.is_original
        && peer.proto as u32 == key.proto
        && peer.port == key.dport
        && backend.addr.same(key.src)
}

/// Whether a packet can be encapsulated for a backend, which may be another's by now.
#[must_use]
#[inline(always)]
pub const fn may_be_encapsulated(backend: &Backend) -> bool {
    matches!(backend.mode, Mode::IPIP | Mode::GUE) && backend.hop.is_known()
}

/// The verdict on a packet that is sent, or handed to the kernel for want of a next hop.
#[must_use]
#[inline(always)]
pub const fn delivered(is_reply: bool, is_known: bool) -> Verdict {
    match (is_reply, is_known) {
        (false, true) => Verdict::Forwarded,
        (true, true) => Verdict::Replied,
        (false, false) => Verdict::ForwardedByKernel,
        (true, false) => Verdict::RepliedByKernel,
    }
}

/// Whether a verdict is that of a packet that the gateway answers itself.
#[must_use]
#[inline(always)]
pub const fn is_answered(verdict: Verdict) -> bool {
    matches!(verdict, Verdict::Reset | Verdict::Closed | Verdict::Refused | Verdict::TooBig)
}

/// The verdict on a packet for which that does not succeed.
#[must_use]
#[inline(always)]
pub const fn unanswered(verdict: Verdict) -> Verdict {
    match verdict {
        Verdict::Reset => Verdict::NoFlow,
        Verdict::Closed => Verdict::ClosedDropped,
        Verdict::Refused => Verdict::NoListenerDropped,
        Verdict::TooBig => Verdict::Oversize,
        _ => Verdict::Inconsistent,
    }
}

/// Where the record of a packet in fragments is. Fragments of IPv4 packets belong together by their protocol as well
/// (RFC 791, section 3.2); those of IPv6 do not (RFC 8200, section 4.5), and their headers may name different ones.
#[must_use]
#[inline(always)]
pub const fn fragment_key(packet: &Packet) -> FragmentKey {
    let is_v4 = packet.is_v4();
    let [site, host] = packet.key.src.halves();
    // Packets that are numbered in turn have numbers in turn here. Those of the hosts of a site are mixed.
    let mixed = if is_v4 { 0 } else { host ^ host >> 32 } as u32 ^ packet.fragment_id;
    let mixed = mixed ^ mixed >> 16;
    FragmentKey {
        src: if is_v4 { packet.key.src.copied() } else { Address::from_halves([site, 0]) },
        dst: packet.key.dst.copied(),
        number: (mixed ^ mixed >> 8) % FRAGMENTS_PER_SOURCE,
        proto: if is_v4 { packet.key.proto } else { 0 },
    }
}

/// Whether a reset can answer a packet, if its headers allow that: no fragment, and no reset, is answered.
#[must_use]
#[inline(always)]
pub const fn can_be_reset(packet: &Packet) -> bool {
    packet.key.proto == TCP
        && packet.fragment == FRAGMENT_NONE
        && !packet.flags.intersects(TcpFlags::RST)
}
