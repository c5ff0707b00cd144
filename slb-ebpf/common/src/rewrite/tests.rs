use std::{net::IpAddr, vec::Vec};

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;
use crate::{
    abi::{Address, FlowKey, FlowKind, UDP},
    parse::{
        self,
        fixtures::{Sample, samples},
    },
};

const HOP: NextHop =
    NextHop { ifindex: 3, dst_mac: [2, 0, 0, 0, 0, 0x11], src_mac: [2, 0, 0, 0, 0, 0x22] };

fn parse(bytes: &mut [u8]) -> Packet {
    try_parse(bytes).unwrap()
}

fn try_parse(bytes: &mut [u8]) -> Result<Packet, parse::Reject> {
    let mut packet = Packet::default();
    parse::packet(&Frame::from_slice(bytes), &mut packet).map(|()| packet)
}

fn translated(bytes: &[u8], to: &NatRewrite, hop: NextHop) -> Result<Vec<u8>, Verdict> {
    let mut bytes = bytes.to_vec();
    let packet = parse(&mut bytes);
    translate(&mut Frame::from_slice(&mut bytes), &packet, to, hop)?;
    Ok(bytes)
}

/// The tuple that `key` has after `to`.
fn expected(key: &FlowKey, to: &NatRewrite) -> FlowKey {
    let (sport, dport) = (to.sport, to.dport);
    if to.is_reply() {
        FlowKey { src: to.addr, sport, dport, ..*key }
    } else {
        FlowKey { dst: to.addr, sport, dport, ..*key }
    }
}

/// What undoes `to` in a packet that had the tuple `key` before.
fn inverse(key: &FlowKey, to: &NatRewrite) -> NatRewrite {
    let addr = if to.is_reply() { key.src } else { key.dst };
    NatRewrite { addr, sport: key.sport, dport: key.dport, kind: to.kind }
}

/// Checksums as stated, and as another implementation computes them: of the IPv4 header, and of the
/// transport.
fn checksums(bytes: &[u8]) -> [(u16, u16); 2] {
    let sliced = SlicedPacket::from_ethernet(bytes).unwrap();
    let transport = sliced.transport.unwrap();
    match sliced.net.unwrap() {
        NetSlice::Ipv4(ip) => {
            let ip = ip.header().to_header();
            let transport = match transport {
                TransportSlice::Tcp(tcp) => (
                    tcp.checksum(),
                    tcp.to_header().calc_checksum_ipv4(&ip, tcp.payload()).unwrap(),
                ),
                TransportSlice::Udp(udp) => (
                    udp.checksum(),
                    udp.to_header().calc_checksum_ipv4(&ip, udp.payload()).unwrap(),
                ),
                other => panic!("{other:?}"),
            };
            [(ip.header_checksum, ip.calc_header_checksum()), transport]
        }
        NetSlice::Ipv6(ip) => {
            let ip = ip.header().to_header();
            let transport = match transport {
                TransportSlice::Tcp(tcp) => (
                    tcp.checksum(),
                    tcp.to_header().calc_checksum_ipv6(&ip, tcp.payload()).unwrap(),
                ),
                TransportSlice::Udp(udp) => (
                    udp.checksum(),
                    udp.to_header().calc_checksum_ipv6(&ip, udp.payload()).unwrap(),
                ),
                other => panic!("{other:?}"),
            };
            [(0, 0), transport]
        }
        NetSlice::Arp(arp) => panic!("{arp:?}"),
    }
}

/// Blanks what a translation may change: MAC addresses, TTL, checksums, one address, ports.
fn blanked(bytes: &[u8], packet: &Packet, is_reply: bool) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let address = if packet.is_v4() {
        bytes[L3 + 8] = 0;
        bytes[L3 + 10..L3 + 12].fill(0);
        if is_reply { L3 + 12..L3 + 16 } else { L3 + 16..L3 + 20 }
    } else {
        bytes[L3 + 7] = 0;
        if is_reply { L3 + 8..L3 + 24 } else { L3 + 24..L3 + 40 }
    };
    let l4 = packet.l4 as usize;
    let at = l4 + if packet.key.proto == TCP { 16 } else { 6 };
    for range in [0..12, address, l4..l4 + 4, at..at + 2] {
        bytes[range].fill(0);
    }
    bytes
}

/// A packet, where it is translated to, and whether the hop is known.
fn cases() -> impl Strategy<Value = (Sample, NatRewrite, NextHop)> {
    let address = prop_oneof![
        8 => any::<[u8; 16]>(),
        1 => Just([0; 16]),
        1 => Just([0xff; 16]),
    ];
    let hop = prop_oneof![Just(NextHop::UNRESOLVED), Just(HOP)];
    (samples(), address, any::<(u16, u16, bool)>(), hop).prop_map(
        |(sample, address, (sport, dport, is_reply), hop)| {
            let [.., a, b, c, d] = address;
            let addr = match sample.dst {
                IpAddr::V4(_) => IpAddr::from([a, b, c, d]).into(),
                IpAddr::V6(_) => Address { bytes: address },
            };
            (sample, NatRewrite { addr, sport, dport, kind: FlowKind::of_direction(is_reply) }, hop)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn given_any_packet_when_translated_then_it_is_what_a_sender_would_have_made(
        (sample, to, hop) in cases(),
    ) {
        let mut before = sample.bytes();
        let packet = parse(&mut before);
        let mut after = translated(&before, &to, hop).unwrap();

        let [header, transport] = checksums(&after);
        prop_assert_eq!(header.0, header.1, "IPv4 header checksum");
        prop_assert_eq!(transport.0, transport.1, "transport checksum");
        let key = expected(&packet.key, &to);
        // An arbitrary IPv6 address may be one that no packet may have.
        if let Ok(reparsed) = try_parse(&mut after) {
            prop_assert_eq!(reparsed, Packet { key, ..packet });
        }
        prop_assert_eq!(
            blanked(&after, &packet, to.is_reply()),
            blanked(&before, &packet, to.is_reply()),
            "nothing else changes"
        );
        let at = L3 + if packet.is_v4() { 8 } else { 7 };
        if hop.is_known() {
            prop_assert_eq!(after[at], sample.ttl - 1);
            prop_assert_eq!(&after[..6], &HOP.dst_mac);
            prop_assert_eq!(&after[6..12], &HOP.src_mac);
        } else {
            prop_assert_eq!(after[at], sample.ttl);
            prop_assert_eq!(&after[..12], &before[..12]);
        }
    }

    #[test]
    fn given_any_packet_when_translated_there_and_back_then_it_is_as_before(
        (sample, to, _) in cases(),
    ) {
        let mut before = sample.bytes();
        let packet = parse(&mut before);
        let mut there = before.clone();
        translate(&mut Frame::from_slice(&mut there), &packet, &to, NextHop::UNRESOLVED).unwrap();
        let back = inverse(&packet.key, &to);
        translate(&mut Frame::from_slice(&mut there), &packet, &back, NextHop::UNRESOLVED).unwrap();

        prop_assert_eq!(there, before);
    }

    #[test]
    fn given_udp_without_a_checksum_when_translated_then_it_still_has_none(
        (sample, to, hop) in cases(),
    ) {
        let sample = sample.udp();
        let mut before = sample.bytes();
        let at = sample.expected().l4 as usize + 6;
        before[at..at + 2].fill(0);
        let after = translated(&before, &to, hop).unwrap();

        prop_assert_eq!(&after[at..at + 2], &[0, 0]);
        let [header, _] = checksums(&after);
        prop_assert_eq!(header.0, header.1, "IPv4 header checksum");
    }

    #[test]
    fn given_a_wrong_transport_checksum_when_translated_then_it_stays_wrong_by_as_much(
        (sample, to, hop) in cases(),
        error in 1..0xffff_u16,
    ) {
        let mut before = Sample { proto: TCP, ..sample }.bytes();
        let packet = parse(&mut before);
        let at = packet.l4 as usize + 16;
        let right = u16::from_be_bytes([before[at], before[at + 1]]);
        // One's complement: 0 and 0xffff are the same number.
        let plus = |a: u16, b: u16| ((u32::from(a) + u32::from(b)) % 0xffff) as u16;
        before[at..at + 2].copy_from_slice(&plus(right, error).to_be_bytes());
        let after = translated(&before, &to, hop).unwrap();

        let [_, (stated, computed)] = checksums(&after);
        prop_assert_eq!(stated % 0xffff, plus(computed, error), "corruption is not hidden");
    }
}

#[test]
fn given_udp_when_the_new_checksum_is_zero_then_its_complement_is_sent() {
    for (family, sample) in [("IPv4", Sample::default()), ("IPv6", Sample::v6())] {
        let sample = sample.udp();
        let bytes = sample.bytes();
        let mut complements = 0;
        for dport in 0..=u16::MAX {
            let Sample { dst, sport, .. } = sample;
            let to = NatRewrite { addr: dst.into(), sport, dport, kind: FlowKind::Original };
            let after = translated(&bytes, &to, NextHop::UNRESOLVED).unwrap();
            let at = sample.expected().l4 as usize + 6;
            match [after[at], after[at + 1]] {
                [0, 0] => panic!("{family}, port {dport}: says that there is no checksum"),
                [0xff, 0xff] => {
                    complements += 1;
                    let [_, (stated, computed)] = checksums(&after);
                    assert_eq!(stated, computed, "{family}, port {dport}");
                    // And from there to another: 0xffff is a checksum like any other.
                    let to = NatRewrite { dport: sample.dport, ..to };
                    let back = translated(&after, &to, NextHop::UNRESOLVED).unwrap();
                    assert_eq!(back, bytes, "{family}, port {dport}, and back");
                }
                _ => {}
            }
        }
        assert!(matches!(complements, 1..=2), "{family}: {complements} ports have that checksum");
    }
}

#[test]
fn given_tcp_when_the_new_checksum_is_zero_then_zero_is_sent() {
    let sample = Sample::default();
    let bytes = sample.bytes();
    let at = sample.expected().l4 as usize + 16;
    let zero = (0..=u16::MAX).any(|dport| {
        let to = NatRewrite { addr: sample.dst.into(), sport: 1, dport, kind: FlowKind::Original };
        let after = translated(&bytes, &to, NextHop::UNRESOLVED).unwrap();
        after[at..at + 2] == [0, 0]
    });
    assert!(zero, "for TCP, 0 is a checksum like any other");
}

#[test]
fn given_a_packet_at_its_last_hop_when_translated_then_it_ends_here_unchanged() {
    for (family, sample) in [("IPv4", Sample::default()), ("IPv6", Sample::v6())] {
        let to =
            NatRewrite { addr: sample.src.into(), sport: 1, dport: 2, kind: FlowKind::Original };
        for ttl in [0, 1] {
            let before = Sample { ttl, ..sample.clone() }.bytes();
            let mut bytes = before.clone();
            let packet = parse(&mut bytes);
            let sent = translate(&mut Frame::from_slice(&mut bytes), &packet, &to, HOP);
            assert_eq!(sent, Err(Verdict::TtlExpired), "{family}, TTL {ttl}");
            assert_eq!(bytes, before, "{family}, TTL {ttl}");

            let left_to_kernel = translated(&before, &to, NextHop::UNRESOLVED);
            assert!(left_to_kernel.is_ok(), "{family}, TTL {ttl}: the kernel tells the sender");
        }
        let last = translated(&Sample { ttl: 2, ..sample }.bytes(), &to, HOP);
        assert!(last.is_ok(), "{family}, TTL 2");
    }
}

#[test]
fn given_a_frame_that_has_become_shorter_when_translated_then_nothing_is_written_past_its_end() {
    for sample in [Sample::default(), Sample::v6(), Sample::default().udp()] {
        let mut whole = sample.bytes();
        let packet = parse(&mut whole);
        let to =
            NatRewrite { addr: sample.src.into(), sport: 1, dport: 2, kind: FlowKind::Original };
        let header = if sample.proto == UDP { 8 } else { 20 };
        for len in 0..packet.l4 as usize + header {
            let (_, rest) = whole.split_at(len);
            let rest = rest.to_vec();
            let mut bytes = whole.clone();
            let sent = translate(&mut Frame::from_slice(&mut bytes[..len]), &packet, &to, HOP);
            assert_eq!(sent, Err(Verdict::Truncated), "{len} bytes");
            assert_eq!(bytes[len..], rest, "{len} bytes");
        }
    }
}
