//! Between IPv4 and IPv6 (RFC 7915): the packet's head is moved by the difference of the headers, [`header`]
//! reads the old one before that, and [`write()`] the new one.
//!
//! The transport's checksum is updated, not made: so a datagram needs one ([`has_checksum`]). Options and
//! extension headers are left behind (section 4.1, 5.1).

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{
    abi::{Address, NatTuple, NextHop, TCP},
    checksum::Delta,
    frame::Frame,
    parse::{DONT_FRAGMENT, ETHERTYPE_IPV4, ETHERTYPE_IPV6, L3, Packet},
    rewrite,
    verdict::Verdict,
};

/// Length of an IPv4 header that is written.
pub const HEAD_V4: usize = Ipv4Hdr::LEN;
/// Length of an IPv6 header that is written.
pub const HEAD_V6: usize = Ipv6Hdr::LEN;

/// What the new header takes from the old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// DSCP and ECN.
    tos: u8,
    /// TTL or hop limit.
    ttl: u8,
    /// The MAC addresses.
    macs: [u32; 3],
}

/// Whether a datagram over IPv4 has a checksum: over IPv6 it needs one (RFC 8200, section 8.1).
#[must_use]
#[inline(always)]
pub fn has_checksum(frame: &Frame<'_>, packet: &Packet) -> bool {
    let udp = frame.header::<{ UdpHdr::LEN }>(packet.l4 as usize);
    udp.is_some_and(|udp| udp.get::<u16>(offset_of!(UdpHdr, check)) != 0)
}

/// Reads the header of a packet that is to be translated.
#[must_use]
#[inline(always)]
pub fn header(frame: &Frame<'_>, packet: &Packet) -> Option<Header> {
    let eth = frame.header::<{ EthHdr::LEN }>(0)?;
    let macs = [eth.get(0), eth.get(4), eth.get(8)];
    if packet.is_v4() {
        let ip = frame.header::<{ Ipv4Hdr::LEN }>(L3)?;
        let (tos, ttl) = (ip.get(offset_of!(Ipv4Hdr, tos)), ip.get(offset_of!(Ipv4Hdr, ttl)));
        Some(Header { tos, ttl, macs })
    } else {
        let ip = frame.header::<{ Ipv6Hdr::LEN }>(L3)?;
        let tos = (ip.get_be16(0) >> 4) as u8;
        Some(Header { tos, ttl: ip.get(offset_of!(Ipv6Hdr, hop_limit)), macs })
    }
}

/// Longest IPv4 packet, in bytes, that routers may fragment: over IPv6 all that is shorter gets there (RFC 7915,
/// section 5.1).
pub const LONGEST_FRAGMENTED: u32 = 1_260;

/// The second word of an IPv4 header, in host order, of a packet that was translated and is so many bytes long: its
/// identification, which is `id` if it may be fragmented, and its flags. What may not be needs none (RFC 6864); if it
/// is too long, its sender is told.
#[must_use]
#[inline(always)]
pub const fn fragmentation(len: u32, id: u16) -> u32 {
    if len <= LONGEST_FRAGMENTED { (id as u32) << 16 } else { DONT_FRAGMENT }
}

/// Writes the packet's header of the other family, and translates its ports. `packet` is as it was
/// parsed, `inserted_len` how many bytes are still to be put into it, and `id` what an IPv4 packet is identified by that
/// may be fragmented.
///
/// # Errors
///
/// [`Verdict::Truncated`]: the frame was not made ready for it.
#[inline(always)]
pub fn write(
    frame: &mut Frame<'_>,
    packet: &Packet,
    header: &Header,
    ends: &NatTuple,
    hop: NextHop,
    (inserted_len, id): (u32, u16),
) -> Result<(), Verdict> {
    let payload = packet.len.wrapping_sub(packet.l4).wrapping_add(L3 as u32);
    let ttl = header.ttl.wrapping_sub(u8::from(hop.is_known()));
    let mut eth = frame.header_mut::<{ EthHdr::LEN }>(0).ok_or(Verdict::Truncated)?;
    let ethertype = if packet.is_v4() { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 };
    for (at, word) in [0, 4, 8].into_iter().zip(header.macs) {
        eth.set(at, word);
    }
    eth.set(offset_of!(EthHdr, ether_type), ethertype.to_be());
    let mut delta = Delta::default();
    // Length and protocol stand in either pseudo-header, and are the same.
    if packet.is_v4() {
        let [_, _, _, src] = packet.key.src.words();
        let [_, _, _, dst] = packet.key.dst.words();
        delta.replace32(src, 0);
        delta.replace32(dst, 0);
        write_v6(frame, packet, header, ttl, payload, ends, &mut delta)?;
        ports(frame, L3 + HEAD_V6, packet, ends, delta)?;
    } else {
        delta.replace_address(packet.key.src, Address::NOTHING);
        delta.replace_address(packet.key.dst, Address::NOTHING);
        let word = fragmentation(payload + HEAD_V4 as u32 + inserted_len, id);
        write_v4(frame, packet, header, (ttl, word), payload, ends, &mut delta)?;
        ports(frame, L3 + HEAD_V4, packet, ends, delta)?;
    }
    if hop.is_known() {
        rewrite::address(frame, hop)?;
    }
    Ok(())
}

#[inline(always)]
fn write_v6(
    frame: &mut Frame<'_>,
    packet: &Packet,
    header: &Header,
    ttl: u8,
    payload: u32,
    ends: &NatTuple,
    delta: &mut Delta,
) -> Result<(), Verdict> {
    let mut ip = frame.header_mut::<{ Ipv6Hdr::LEN }>(L3).ok_or(Verdict::Truncated)?;
    ip.set(0, (6 << 28 | u32::from(header.tos) << 20).to_be());
    ip.set(4, (payload << 16 | packet.key.proto << 8 | u32::from(ttl)).to_be());
    for (at, addr) in
        [(offset_of!(Ipv6Hdr, src_addr), ends.src), (offset_of!(Ipv6Hdr, dst_addr), ends.dst)]
    {
        let [a, b, c, d] = addr.words();
        ip.set(at, a);
        ip.set(at + 4, b);
        ip.set(at + 8, c);
        ip.set(at + 12, d);
        delta.replace_address(Address::NOTHING, addr);
    }
    Ok(())
}

#[inline(always)]
fn write_v4(
    frame: &mut Frame<'_>,
    packet: &Packet,
    header: &Header,
    (ttl, fragmentation): (u8, u32),
    payload: u32,
    ends: &NatTuple,
    delta: &mut Delta,
) -> Result<(), Verdict> {
    let [_, _, _, src] = ends.src.words();
    let [_, _, _, dst] = ends.dst.words();
    let words = [
        (0x45 << 24 | u32::from(header.tos) << 16 | (payload + HEAD_V4 as u32) & 0xffff).to_be(),
        fragmentation.to_be(),
        (u32::from(ttl) << 24 | packet.key.proto << 16).to_be(),
        src,
        dst,
    ];
    rewrite::write_v4(frame, words).ok_or(Verdict::Truncated)?;
    delta.replace32(0, src);
    delta.replace32(0, dst);
    Ok(())
}

#[inline(always)]
fn ports(
    frame: &mut Frame<'_>,
    l4: usize,
    packet: &Packet,
    ends: &NatTuple,
    mut delta: Delta,
) -> Result<(), Verdict> {
    let mut ports = frame.header_mut::<4>(l4).ok_or(Verdict::Truncated)?;
    let new = ends.port_word();
    delta.replace32(ports.get(0), new);
    ports.set(0, new);
    let is_tcp = packet.key.proto == TCP;
    let at = if is_tcp { offset_of!(TcpHdr, check) } else { offset_of!(UdpHdr, check) };
    let mut field = frame.header_mut::<2>(l4 + at).ok_or(Verdict::Truncated)?;
    let checksum = field.get(0);
    field.set(0, if is_tcp { delta.apply(checksum) } else { delta.apply_udp(checksum) });
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, vec, vec::Vec};

    use etherparse::{
        IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv6Extensions, Ipv6Header, PacketBuilder,
        TcpHeader, TcpOptions,
    };
    use proptest::prelude::*;

    use super::*;
    use crate::parse::{
        self,
        fixtures::{DESTINATION_MAC, SOURCE_MAC, Sample, samples},
    };

    const HOP: NextHop = NextHop { ifindex: 3, dst_mac: [6; 6], src_mac: [8; 6] };

    const ID: u16 = 0xabcd;

    /// What the program does around `write`.
    fn translated(bytes: &[u8], ends: &NatTuple, hop: NextHop) -> Option<Vec<u8>> {
        let mut bytes = bytes.to_vec();
        let mut packet = Packet::default();
        parse::packet(&Frame::from_slice(&mut bytes), &mut packet).unwrap();
        let frame = Frame::from_slice(&mut bytes);
        if packet.key.proto != TCP && packet.is_v4() && !has_checksum(&frame, &packet) {
            return None;
        }
        let header = header(&frame, &packet)?;
        let before = packet.l4 as usize - L3;
        let after = if packet.is_v4() { HEAD_V6 } else { HEAD_V4 };
        let mut moved = vec![0xee; after];
        moved.extend(&bytes[before..]);
        let mut frame = Frame::from_slice(&mut moved);
        write(&mut frame, &packet, &header, ends, hop, (0, ID)).unwrap();
        Some(moved)
    }

    /// What another implementation makes of the same segment.
    fn expected(sample: &Sample, ends: &NatTuple, hop: NextHop) -> Vec<u8> {
        let (src_mac, dst_mac, ttl) = if hop.is_known() {
            (hop.src_mac, hop.dst_mac, sample.ttl - 1)
        } else {
            (SOURCE_MAC, DESTINATION_MAC, sample.ttl)
        };
        let ip = match (IpAddr::from(ends.src), IpAddr::from(ends.dst)) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let number = IpNumber(0);
                let mut ip = Ipv4Header::new(0, ttl, number, src.octets(), dst.octets()).unwrap();
                let transport = if sample.proto == TCP { 20 + sample.tcp_options.len() } else { 8 };
                ip.dont_fragment = HEAD_V4 + transport + sample.payload.len() > 1_260;
                ip.identification = if ip.dont_fragment { 0 } else { ID };
                IpHeaders::Ipv4(ip, Ipv4Extensions::default())
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let ip = Ipv6Header {
                    hop_limit: ttl,
                    source: src.octets(),
                    destination: dst.octets(),
                    ..Ipv6Header::default()
                };
                IpHeaders::Ipv6(ip, Ipv6Extensions::default())
            }
            families => panic!("two families: {families:?}"),
        };
        let builder = PacketBuilder::ethernet2(src_mac, dst_mac).ip(ip);
        let mut bytes = Vec::new();
        if sample.proto == TCP {
            let mut tcp = TcpHeader::new(ends.sport, ends.dport, 1_000, 65_535);
            tcp.options = TcpOptions::try_from_slice(&sample.tcp_options).unwrap();
            [tcp.fin, tcp.syn, tcp.rst, tcp.psh, tcp.ack, tcp.urg, tcp.ece, tcp.cwr] =
                std::array::from_fn(|bit| sample.flags >> bit & 1 != 0);
            builder.tcp_header(tcp).write(&mut bytes, &sample.payload).unwrap();
        } else {
            builder.udp(ends.sport, ends.dport).write(&mut bytes, &sample.payload).unwrap();
        }
        bytes.resize(bytes.len() + sample.padding, 0xee);
        bytes
    }

    proptest! {
        #[test]
        fn given_any_packet_when_it_goes_to_the_other_family_then_it_is_the_same_segment_there(
            sample in samples(),
            v4 in any::<([u8; 4], [u8; 4])>(),
            v6 in any::<([u8; 16], [u8; 16])>(),
            (sport, dport) in any::<(u16, u16)>(),
            is_known in any::<bool>(),
        ) {
            let (src, dst): (IpAddr, IpAddr) = if sample.dst.is_ipv4() {
                ((v6.0).into(), (v6.1).into())
            } else {
                ((v4.0).into(), (v4.1).into())
            };
            prop_assume!(src.to_canonical() == src && dst.to_canonical() == dst);
            let ends = NatTuple { src: src.into(), dst: dst.into(), sport, dport, spare: 0 };
            let hop = if is_known { HOP } else { NextHop::UNRESOLVED };
            let found = translated(&sample.bytes(), &ends, hop);
            prop_assert_eq!(found, Some(expected(&sample, &ends, hop)), "{:?}", sample);
        }
    }

    #[test]
    fn given_a_length_when_a_packet_becomes_ipv4_then_up_to_1260_bytes_it_may_be_fragmented() {
        for (len, expected) in [(40, 0xabcd_0000), (1_260, 0xabcd_0000), (1_261, 0x4000)] {
            assert_eq!(fragmentation(len, ID), expected, "{len} bytes");
        }
    }

    #[test]
    fn given_a_datagram_without_a_checksum_when_asked_then_it_has_none() {
        let mut bytes = Sample::default().udp().bytes();
        let mut packet = Packet::default();
        parse::packet(&Frame::from_slice(&mut bytes), &mut packet).unwrap();
        assert!(has_checksum(&Frame::from_slice(&mut bytes), &packet));
        let at = packet.l4 as usize + 6;
        bytes[at..at + 2].fill(0);
        assert!(!has_checksum(&Frame::from_slice(&mut bytes), &packet));
    }
}
