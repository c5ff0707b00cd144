//! Bytes → [`Packet`]: Ethernet, IPv4 with options, IPv6 with extension headers, TCP, UDP.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

pub use crate::packet::{FRAGMENT_FIRST, FRAGMENT_LATER, FRAGMENT_NONE, Packet, TcpFlags};
use crate::{
    checksum,
    frame::{Frame, Header},
    net::{Address, TCP, UDP},
    verdict::Verdict,
};

/// Where the network header begins.
pub const L3: usize = EthHdr::LEN;

pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;
/// Tags of IEEE 802.1Q and 802.1ad, and what came before the latter.
const ETHERTYPE_TAGS: [u16; 3] = [0x8100, 0x88a8, 0x9100];
/// Length of a VLAN tag.
pub const TAG_LEN: usize = 4;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
pub(crate) const FRAGMENT: u8 = 44;
/// In the second word of an IPv4 header.
pub(crate) const DONT_FRAGMENT: u32 = 0x4000;
const DESTINATION_OPTIONS: u8 = 60;
/// How many IPv6 extension headers are followed; RFC 8200, section 4.1, lists six in a sensible
/// packet, one of which (AH) rules out translation.
const MAX_EXTENSION_HEADERS: usize = 6;

/// Offset of the flags in a TCP header.
const TCP_FLAGS: usize = 13;

/// Why a frame is no [`Packet`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reject {
    /// It is not IP, or too short to say where it goes, or multicast, or IPv6 with an IPv4-mapped
    /// address, which has no place on a wire.
    NotIp,
    /// ICMP of either family, in [`Packet::l4`] and behind.
    Icmp,
    /// Not what nearly all packets are: tagged, a fragment, with IPv4 options, or not all in this buffer. [`rest`] knows.
    Rest,
    /// Its destination is known, and this is its verdict if that is a VIP.
    To(Address, Verdict),
}

/// What is behind an Ethernet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// The family of a frame without tags.
///
/// # Errors
///
/// [`Reject::NotIp`] or [`Reject::Rest`].
#[inline(always)]
pub fn family(frame: &Frame<'_>) -> Result<Family, Reject> {
    let eth = frame.header::<{ EthHdr::LEN }>(0).ok_or(Reject::NotIp)?;
    let is_group = eth.get::<u8>(0) & 1 != 0;
    if is_group {
        return Err(Reject::NotIp);
    }
    match eth.get_be16(offset_of!(EthHdr, ether_type)) {
        ETHERTYPE_IPV4 => Ok(Family::V4),
        ETHERTYPE_IPV6 => Ok(Family::V6),
        ethertype if is_tag(ethertype) => Err(Reject::Rest),
        _ => Err(Reject::NotIp),
    }
}

/// Parses a frame of a family into `packet`.
///
/// # Errors
///
/// [`Reject`], for every frame that cannot be balanced.
#[inline(always)]
pub fn packet_of(frame: &Frame<'_>, family: Family, packet: &mut Packet) -> Result<(), Reject> {
    match family {
        Family::V4 => v4::<false>(frame, packet, frame.len()),
        Family::V6 => v6::<false>(frame, packet, frame.len()),
    }
}

/// The same for what is rejected as [`Reject::Rest`], once its tags are gone; `len` is the frame's
/// whole length, of which only the first part may be in its first buffer.
///
/// # Errors
///
/// [`Reject`], for every frame that cannot be balanced.
#[inline(always)]
pub fn rest(frame: &Frame<'_>, packet: &mut Packet, len: usize) -> Result<(), Reject> {
    // A third tag is one too many.
    match family(frame).map_err(|_| Reject::NotIp)? {
        Family::V4 => v4::<true>(frame, packet, len),
        Family::V6 => v6::<true>(frame, packet, len),
    }
}

/// How many VLAN tags a frame has, of the two that are followed. Something has to be behind each.
#[must_use]
#[inline(always)]
pub fn tags(frame: &Frame<'_>) -> usize {
    let is_tag =
        |at| frame.header::<{ TAG_LEN + 2 }>(at).is_some_and(|tag| is_tag(tag.get_be16(0)));
    let at = offset_of!(EthHdr, ether_type);
    match (is_tag(at), is_tag(at + TAG_LEN)) {
        (true, true) => 2,
        (true, false) => 1,
        (false, _) => 0,
    }
}

#[inline(always)]
const fn is_tag(ethertype: u16) -> bool {
    let [a, b, c] = ETHERTYPE_TAGS;
    ethertype == a || ethertype == b || ethertype == c
}

#[inline(always)]
fn v4<const REST: bool>(
    frame: &Frame<'_>,
    packet: &mut Packet,
    frame_len: usize,
) -> Result<(), Reject> {
    let ip = frame.header::<{ Ipv4Hdr::LEN }>(L3).ok_or(Reject::NotIp)?;
    let src = Address::from_v4_word(ip.get(offset_of!(Ipv4Hdr, src_addr)));
    let dst = Address::from_v4_word(ip.get(offset_of!(Ipv4Hdr, dst_addr)));
    let reject = |verdict| Reject::To(dst, verdict);

    let version_and_length = ip.get::<u8>(offset_of!(Ipv4Hdr, vihl));
    let header_len = usize::from(version_and_length & 0x0f) * 4;
    let total_len = usize::from(ip.get_be16(offset_of!(Ipv4Hdr, tot_len)));
    if version_and_length >> 4 != 4 || header_len < Ipv4Hdr::LEN || total_len < header_len {
        return Err(reject(Verdict::Malformed));
    }
    if L3 + total_len > frame_len {
        return Err(if REST { reject(Verdict::Truncated) } else { Reject::Rest });
    }
    if !REST && header_len > Ipv4Hdr::LEN {
        return Err(Reject::Rest);
    }
    if !v4_checksum_holds(frame, &ip, header_len) {
        return Err(reject(Verdict::BadChecksum));
    }
    if header_len > Ipv4Hdr::LEN && is_source_routed(frame, header_len) {
        return Err(reject(Verdict::Martian));
    }
    let more_or_later_fragments = 0x3fff;
    let fragmentation = ip.get_be16(offset_of!(Ipv4Hdr, frags));
    let mut fragment = FRAGMENT_NONE;
    if fragmentation & more_or_later_fragments != 0 {
        if !REST {
            return Err(Reject::Rest);
        }
        let is_later = fragmentation & 0x1fff != 0;
        fragment = if is_later { FRAGMENT_LATER } else { FRAGMENT_FIRST };
    }
    let proto = ip.get::<u8>(offset_of!(Ipv4Hdr, proto));
    packet.v4 = 1;
    packet.fragment = fragment;
    packet.len = total_len as u32;
    (packet.key.src, packet.key.dst) = (src, dst);
    if fragment != FRAGMENT_NONE {
        packet.fragment_id = ip.get::<u16>(offset_of!(Ipv4Hdr, id)).into();
        if fragment == FRAGMENT_LATER {
            later(packet, proto, L3 + header_len);
            return Ok(());
        }
    }
    transport(frame, proto, L3 + header_len, total_len - header_len, packet)
}

/// A later fragment: no transport header, no ports.
#[inline(always)]
const fn later(packet: &mut Packet, proto: u8, l4: usize) {
    packet.key.proto = proto as u32;
    (packet.key.sport, packet.key.dport) = (0, 0);
    packet.l4 = l4 as u32;
    packet.flags = TcpFlags::empty();
}

/// RFC 1812, section 5.2.2: a router must verify the header checksum. Were it only updated, a
/// corrupt header would be forwarded to whatever address it now shows.
#[inline(always)]
fn v4_checksum_holds(
    frame: &Frame<'_>,
    ip: &Header<'_, { Ipv4Hdr::LEN }>,
    header_len: usize,
) -> bool {
    let mut sum = u64::from(ip.get::<u32>(0))
        + u64::from(ip.get::<u32>(4))
        + u64::from(ip.get::<u32>(8))
        + u64::from(ip.get::<u32>(12))
        + u64::from(ip.get::<u32>(16));
    if header_len > Ipv4Hdr::LEN {
        // Ten words of options at most.
        let mut at = Ipv4Hdr::LEN;
        for _ in 0..10 {
            if at >= header_len {
                break;
            }
            let Some(option) = frame.header::<4>(L3 + at) else { return false };
            sum += u64::from(option.get::<u32>(0));
            at += 4;
        }
    }
    checksum::is_valid(sum)
}

/// Whether the options of an IPv4 header have a source route (RFC 791, section 3.1), as far as they can be followed:
/// the kernel drops what it cannot follow.
#[inline(always)]
fn is_source_routed(frame: &Frame<'_>, header_len: usize) -> bool {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    const LOOSE: u8 = 131;
    const STRICT: u8 = 137;
    let mut next = Ipv4Hdr::LEN;
    // Byte by byte, forty at most, and not from option to option: with places that depend on what the packet says, the
    // verifier follows each way through all options. And no loop: Linux 6.1 refuses what the compiler makes of it.
    macro_rules! look_at {
        ($($at:literal)+) => {$(
            if $at >= header_len {
                return false;
            }
            let Some(option) = frame.header::<2>(L3 + $at) else { return false };
            if next == $at {
                let len = option.get::<u8>(1);
                next += match option.get::<u8>(0) {
                    LOOSE | STRICT => return true,
                    NO_OPERATION => 1,
                    END => return false,
                    _ if len < 2 => return false,
                    _ => usize::from(len),
                };
            }
        )+};
    }
    look_at! { 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 }
    look_at! { 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 }
    let _ = next;
    false
}

#[inline(always)]
fn v6<const REST: bool>(
    frame: &Frame<'_>,
    packet: &mut Packet,
    frame_len: usize,
) -> Result<(), Reject> {
    let ip = frame.header::<{ Ipv6Hdr::LEN }>(L3).ok_or(Reject::NotIp)?;
    let src = v6_address(&ip, offset_of!(Ipv6Hdr, src_addr));
    let dst = v6_address(&ip, offset_of!(Ipv6Hdr, dst_addr));
    // It would pass for an IPv4 packet everywhere behind this point.
    if src.is_v4() || dst.is_v4() {
        return Err(Reject::NotIp);
    }
    let reject = |verdict| Reject::To(dst, verdict);

    if ip.get::<u8>(0) >> 4 != 6 {
        return Err(reject(Verdict::Malformed));
    }
    let end = L3 + Ipv6Hdr::LEN + usize::from(ip.get_be16(offset_of!(Ipv6Hdr, payload_len)));
    if end > frame_len {
        return Err(if REST { reject(Verdict::Truncated) } else { Reject::Rest });
    }
    packet.v4 = 0;
    packet.fragment = FRAGMENT_NONE;
    packet.len = (end - L3) as u32;
    (packet.key.src, packet.key.dst) = (src, dst);

    let mut proto = ip.get::<u8>(offset_of!(Ipv6Hdr, next_hdr));
    let mut l4 = L3 + Ipv6Hdr::LEN;
    for _ in 0..MAX_EXTENSION_HEADERS {
        if !is_followed(proto) {
            break;
        }
        let extension = frame.header::<8>(l4).ok_or(reject(Verdict::Truncated))?;
        let mut len = 8 + usize::from(extension.get::<u8>(1)) * 8;
        if proto == FRAGMENT {
            // A packet is divided once.
            if packet.fragment != FRAGMENT_NONE {
                return Err(reject(Verdict::Malformed));
            }
            // A fragment header of a whole packet is allowed (RFC 6946); its length is fixed.
            let more_or_later_fragments = 0xfff9;
            let fragmentation = extension.get_be16(2);
            if fragmentation & more_or_later_fragments != 0 {
                if !REST {
                    return Err(Reject::Rest);
                }
                packet.fragment_id = extension.get(4);
                if fragmentation & 0xfff8 != 0 {
                    packet.fragment = FRAGMENT_LATER;
                    later(packet, extension.get(0), l4 + 8);
                    return Ok(());
                }
                packet.fragment = FRAGMENT_FIRST;
            }
            len = 8;
        }
        let segments_left = extension.get::<u8>(3);
        if proto == ROUTING && segments_left != 0 {
            // A source route that has not come to its end (RFC 5095; RFC 8200, section 4.4).
            return Err(reject(Verdict::Martian));
        }
        proto = extension.get::<u8>(0);
        l4 += len;
    }
    // What the kernel would find behind more headers is not known here.
    if l4 > end || is_followed(proto) {
        return Err(reject(Verdict::Malformed));
    }
    transport(frame, proto, l4, end - l4, packet)
}

/// Whether a number is that of an IPv6 extension header that is followed.
#[inline(always)]
const fn is_followed(proto: u8) -> bool {
    matches!(proto, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS)
}

#[inline(always)]
pub(crate) fn v6_address(ip: &Header<'_, { Ipv6Hdr::LEN }>, at: usize) -> Address {
    Address::from_halves([ip.get(at), ip.get(at + 8)])
}

/// `len` is that of the transport header and its payload.
#[inline(always)]
fn transport(
    frame: &Frame<'_>,
    proto: u8,
    l4: usize,
    len: usize,
    packet: &mut Packet,
) -> Result<(), Reject> {
    let dst = packet.key.dst;
    let reject = |verdict| Reject::To(dst, verdict);
    packet.key.proto = u32::from(proto);
    packet.l4 = l4 as u32;
    packet.flags = match packet.key.proto {
        TCP => {
            let tcp = frame.header::<{ TcpHdr::LEN }>(l4).ok_or(reject(Verdict::Truncated))?;
            let header_len = usize::from(tcp.get::<u8>(12) >> 4) * 4;
            if header_len < TcpHdr::LEN || header_len > len {
                return Err(reject(Verdict::Malformed));
            }
            TcpFlags::from_bits_retain(tcp.get::<u8>(TCP_FLAGS))
        }
        UDP => {
            let udp = frame.header::<{ UdpHdr::LEN }>(l4).ok_or(reject(Verdict::Truncated))?;
            let stated = usize::from(udp.get_be16(offset_of!(UdpHdr, len)));
            // A first fragment has a part of what is stated, but all of the header.
            let least = if packet.fragment == FRAGMENT_NONE { stated } else { UdpHdr::LEN };
            if stated < UdpHdr::LEN || len < least {
                return Err(reject(Verdict::Malformed));
            }
            TcpFlags::empty()
        }
        _ if proto == if packet.v4 != 0 { ICMP } else { ICMPV6 } => return Err(Reject::Icmp),
        _ => return Err(reject(Verdict::OtherProtocol)),
    };
    // Both transports begin with their ports.
    let ports = frame.header::<4>(l4).ok_or(reject(Verdict::Truncated))?;
    (packet.key.sport, packet.key.dport) = (ports.get_be16(0), ports.get_be16(2));
    Ok(())
}

/// Parses a frame of either family, as the first program does.
#[cfg(test)]
pub(crate) fn first(frame: &Frame<'_>, packet: &mut Packet) -> Result<(), Reject> {
    packet_of(frame, family(frame)?, packet)
}

/// Parses a frame of either family.
#[cfg(test)]
pub(crate) fn packet(frame: &Frame<'_>, packet: &mut Packet) -> Result<(), Reject> {
    match first(frame, packet) {
        Err(Reject::Rest) => rest(frame, packet, frame.len()),
        parsed => parsed,
    }
}

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
