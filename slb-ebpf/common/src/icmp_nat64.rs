//! ICMP errors between IPv4 and IPv6 (RFC 7915, sections 4.2, 4.3, 5.2 and 5.3).
//!
//! The message is made anew, as short as it may be: what it says ([`read`]), about a packet of which it quotes
//! the header and eight bytes ([`write()`]). That much names the flow, and a TCP segment by its sequence number.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    abi::{Address, FlowKey, NatTuple, NextHop, UDP},
    checksum::{self, Delta},
    frame::Frame,
    icmp::{self, ICMP, ICMPV6, Quote},
    icmp_error::TOS,
    nat64,
    parse::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, L3},
    rewrite::{self, TTL},
};

/// Bytes of the transport header that are quoted.
const QUOTED: usize = 8;
/// By how much IPv6's header is longer.
const LONGER: u32 = (Ipv6Hdr::LEN - Ipv4Hdr::LEN) as u32;
/// The smallest MTU of IPv6 (RFC 8200, section 5): hosts ignore a smaller one.
const LEAST_V6: u32 = 1_280;
/// The same of IPv4 (RFC 791, section 3.2).
const LEAST_V4: u32 = 68;

/// Length of the frame that [`write()`] fills.
#[must_use]
#[inline(always)]
pub const fn frame_len(is_v4: bool) -> usize {
    L3 + icmp::LEN + QUOTED + 2 * if is_v4 { Ipv4Hdr::LEN } else { Ipv6Hdr::LEN }
}

/// What an error says, in the other family's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error {
    /// Type and code, and the second word of the header, in host order.
    words: [u32; 2],
    /// What is quoted of the transport header.
    quoted: [u32; 2],
    /// Length of the quoted packet without its header, its protocol, and its TTL.
    len: u16,
    proto: u8,
    ttl: u8,
    /// The MAC addresses.
    macs: [u32; 3],
}

/// Reads an error and what it quotes. `None`: the other family has no word for it, or less is quoted.
#[must_use]
#[inline(always)]
pub fn read(frame: &Frame<'_>, quote: &Quote) -> Option<Error> {
    let packet = &quote.packet;
    let (at, l4) = (quote.at as usize, packet.l4 as usize);
    if l4 + QUOTED > quote.end as usize {
        return None;
    }
    let eth = frame.header::<{ EthHdr::LEN }>(0)?;
    let macs = [eth.get(0), eth.get(4), eth.get(8)];
    let icmp = frame.header::<{ icmp::LEN }>(at)?;
    let (kind, code, rest) = (icmp.get::<u8>(0), icmp.get::<u8>(1), u32::from_be(icmp.get(4)));
    let l3 = at + icmp::LEN;
    let (words, len, ttl) = if packet.is_v4() {
        let ip = frame.header::<{ Ipv4Hdr::LEN }>(l3)?;
        let header = l4.wrapping_sub(l3) as u16;
        let len = ip.get_be16(offset_of!(Ipv4Hdr, tot_len)).wrapping_sub(header);
        (to_v6(kind, code, rest)?, len, ip.get(offset_of!(Ipv4Hdr, ttl)))
    } else {
        let ip = frame.header::<{ Ipv6Hdr::LEN }>(l3)?;
        let extensions = l4.wrapping_sub(l3 + Ipv6Hdr::LEN) as u16;
        let len = ip.get_be16(offset_of!(Ipv6Hdr, payload_len)).wrapping_sub(extensions);
        (to_v4(kind, code, rest)?, len, ip.get(offset_of!(Ipv6Hdr, hop_limit)))
    };
    let transport = frame.header::<QUOTED>(l4)?;
    let quoted = [transport.get(0), transport.get(4)];
    Some(Error { words, quoted, len, proto: packet.key.proto as u8, ttl, macs })
}

/// Type and code in the high half of a word.
const fn header(kind: u32, code: u32) -> u32 {
    kind << 24 | code << 16
}

/// RFC 7915, section 4.2.
#[inline(always)]
fn to_v6(kind: u8, code: u8, rest: u32) -> Option<[u32; 2]> {
    const UNREACHABLE: u32 = 1;
    Some(match (kind, code) {
        (3, 0 | 1 | 5..=8 | 11 | 12) => [header(UNREACHABLE, 0), 0],
        (3, 9 | 10 | 13 | 15) => [header(UNREACHABLE, 1), 0],
        (3, 3) => [header(UNREACHABLE, 4), 0],
        // No such protocol: the next header is what IPv6 has a problem with.
        (3, 2) => [header(4, 1), 6],
        (3, 4) => {
            let mtu = (rest & 0xffff) + LONGER;
            [header(2, 0), if mtu < LEAST_V6 { LEAST_V6 } else { mtu }]
        }
        (11, code) => [header(3, code.into()), 0],
        (12, 0 | 2) => [header(4, 0), pointer_v6(rest >> 24)?],
        _ => return None,
    })
}

/// RFC 7915, section 5.2.
#[inline(always)]
fn to_v4(kind: u8, code: u8, rest: u32) -> Option<[u32; 2]> {
    const UNREACHABLE: u32 = 3;
    Some(match (kind, code) {
        (1, 0 | 2 | 3) => [header(UNREACHABLE, 1), 0],
        (1, 1) => [header(UNREACHABLE, 10), 0],
        (1, 4) => [header(UNREACHABLE, 3), 0],
        (2, _) => {
            let mtu = rest.wrapping_sub(LONGER) & 0xffff;
            [header(UNREACHABLE, 4), if mtu < LEAST_V4 { LEAST_V4 } else { mtu }]
        }
        (3, code) => [header(11, code.into()), 0],
        (4, 0) => [header(12, 0), pointer_v4(rest)? << 24],
        (4, 1) => [header(UNREACHABLE, 2), 0],
        _ => return None,
    })
}

/// The field of an IPv6 header that has the part of an IPv4 header's; RFC 7915, figure 3.
#[inline(always)]
const fn pointer_v6(at: u32) -> Option<u32> {
    match at {
        0 | 1 => Some(at),
        2 | 3 => Some(4),
        8 => Some(7),
        9 => Some(6),
        12..=15 => Some(8),
        16..=19 => Some(24),
        _ => None,
    }
}

/// The reverse; RFC 7915, figure 6.
#[inline(always)]
const fn pointer_v4(at: u32) -> Option<u32> {
    match at {
        0 | 1 => Some(at),
        4 | 5 => Some(2),
        6 => Some(9),
        7 => Some(8),
        8..=23 => Some(12),
        24..=39 => Some(16),
        _ => None,
    }
}

/// Replaces the ends in what is quoted of the transport header of a packet with the key `old`.
#[inline(always)]
pub fn translate(error: &mut Error, old: &FlowKey, ends: &NatTuple) {
    let [ports, second] = error.quoted;
    let new = ends.port_word();
    error.quoted[0] = new;
    // A checksum is there only of UDP. What IPv4 addresses begin with here, ffff, adds nothing to it.
    if old.proto == UDP {
        let mut delta = Delta::default();
        delta.replace_address(old.src, ends.src);
        delta.replace_address(old.dst, ends.dst);
        delta.replace32(ports, new);
        let low = u32::from_be(second) as u16;
        let checksum = delta.apply_udp(low.to_be());
        error.quoted[1] =
            (u32::from_be(second) & 0xffff_0000 | u32::from(u16::from_be(checksum))).to_be();
    }
}

/// Writes an error about a packet with these ends, to its source, from its destination, and makes it ready for
/// the wire. The frame is as long as [`frame_len`] says.
///
/// `None`: it is not.
#[must_use]
#[inline(always)]
pub fn write(
    frame: &mut Frame<'_>,
    error: &Error,
    ends: &NatTuple,
    hop: NextHop,
    id: u16,
) -> Option<()> {
    let is_v4 = ends.src.is_v4();
    let mut eth = frame.header_mut::<{ EthHdr::LEN }>(0)?;
    let [a, b, c] = error.macs;
    eth.set(0, a);
    eth.set(4, b);
    eth.set(8, c);
    let ethertype = if is_v4 { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
    eth.set(offset_of!(EthHdr, ether_type), ethertype.to_be());
    if is_v4 {
        write_v4(frame, error, ends, id)?;
    } else {
        write_v6(frame, error, ends)?;
    }
    if hop.is_known() {
        rewrite::address(frame, hop).ok()?;
    }
    Some(())
}

#[inline(always)]
fn write_v4(frame: &mut Frame<'_>, error: &Error, ends: &NatTuple, id: u16) -> Option<()> {
    const AT: usize = L3 + Ipv4Hdr::LEN;
    const L4: usize = AT + icmp::LEN + Ipv4Hdr::LEN;
    let [_, _, _, src] = ends.src.words();
    let [_, _, _, dst] = ends.dst.words();
    let len = (frame_len(true) - L3) as u32;
    let ip = |tos: u8, len: u32, fragmentation: u32, ttl: u8, proto: u8, src, dst| {
        [
            (0x45 << 24 | u32::from(tos) << 16 | len & 0xffff).to_be(),
            fragmentation.to_be(),
            (u32::from(ttl) << 24 | u32::from(proto) << 16).to_be(),
            src,
            dst,
        ]
    };
    rewrite::write_v4(frame, ip(TOS, len, nat64::fragmentation(len, id), TTL, ICMP, dst, src))?;
    let quoted = u32::from(error.len) + Ipv4Hdr::LEN as u32;
    // Its identification was not the other family's to know.
    let fragmentation = nat64::fragmentation(quoted, 0);
    let quoted = ip(0, quoted, fragmentation, error.ttl, error.proto, src, dst);
    rewrite::write_v4_at(frame, AT + icmp::LEN, quoted)?;
    transport(frame, L4, error)?;
    // A header with its checksum adds up to nothing.
    message(frame, AT, L4, error, 0xffff)
}

#[inline(always)]
fn write_v6(frame: &mut Frame<'_>, error: &Error, ends: &NatTuple) -> Option<()> {
    const AT: usize = L3 + Ipv6Hdr::LEN;
    const L4: usize = AT + icmp::LEN + Ipv6Hdr::LEN;
    const LEN: u16 = (icmp::LEN + Ipv6Hdr::LEN + QUOTED) as u16;
    let mut sum = u64::from(LEN.to_be()) + u64::from(u16::from(ICMPV6).to_be());
    ipv6(frame, L3, TOS, LEN, ICMPV6, TTL, &ends.dst, &ends.src)?;
    ipv6(frame, AT + icmp::LEN, 0, error.len, error.proto, error.ttl, &ends.src, &ends.dst)?;
    // Both addresses are in the pseudo-header, and once more in the quote.
    sum += 2 * (add(&ends.src) + add(&ends.dst));
    let quoted = frame.header::<8>(AT + icmp::LEN)?;
    sum += u64::from(quoted.get::<u32>(0)) + u64::from(quoted.get::<u32>(4));
    transport(frame, L4, error)?;
    message(frame, AT, L4, error, sum)
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the fields of a header")]
fn ipv6(
    frame: &mut Frame<'_>,
    at: usize,
    tos: u8,
    len: u16,
    proto: u8,
    ttl: u8,
    src: &Address,
    dst: &Address,
) -> Option<()> {
    let mut ip = frame.header_mut::<{ Ipv6Hdr::LEN }>(at)?;
    ip.set(0, (6_u32 << 28 | u32::from(tos) << 20).to_be());
    ip.set(4, (u32::from(len) << 16 | u32::from(proto) << 8 | u32::from(ttl)).to_be());
    let ([a, b], [c, d]) = (src.halves(), dst.halves());
    ip.set(8, a);
    ip.set(16, b);
    ip.set(24, c);
    ip.set(32, d);
    Some(())
}

/// What an address adds to a checksum.
#[inline(always)]
fn add(addr: &Address) -> u64 {
    let [a, b, c, d] = addr.words();
    u64::from(a) + u64::from(b) + u64::from(c) + u64::from(d)
}

#[inline(always)]
fn transport(frame: &mut Frame<'_>, at: usize, error: &Error) -> Option<()> {
    let mut quoted = frame.header_mut::<QUOTED>(at)?;
    let [first, second] = error.quoted;
    quoted.set(0, first);
    quoted.set(4, second);
    Some(())
}

/// The ICMP header, summed up with what is quoted of the transport header and with `sum`.
#[inline(always)]
fn message(frame: &mut Frame<'_>, at: usize, l4: usize, error: &Error, mut sum: u64) -> Option<()> {
    let quoted = frame.header::<QUOTED>(l4)?;
    sum += u64::from(quoted.get::<u32>(0)) + u64::from(quoted.get::<u32>(4));
    let [first, second] = error.words.map(u32::to_be);
    sum += u64::from(first) + u64::from(second);
    let mut icmp = frame.header_mut::<{ icmp::LEN }>(at)?;
    icmp.set(0, first);
    icmp.set(4, second);
    icmp.set(icmp::CHECKSUM, !checksum::fold(sum));
    Some(())
}
