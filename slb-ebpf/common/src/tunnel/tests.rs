use std::{net::IpAddr, vec, vec::Vec};

use etherparse::{
    IpDscp, IpEcn, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv6Extensions, Ipv6FlowLabel,
    Ipv6Header, PacketBuilder,
};
use proptest::prelude::*;

use super::*;
use crate::{
    abi::Seed,
    hash,
    parse::{
        self, Packet,
        fixtures::{Sample, samples},
    },
};

const HOP: NextHop =
    NextHop { ifindex: 3, dst_mac: [2, 0, 0, 0, 0, 0x11], src_mac: [2, 0, 0, 0, 0, 0x22] };

/// A packet with all that its tunnel looks at.
#[derive(Clone, Debug)]
struct Case {
    sample: Sample,
    tos: u8,
    identification: u16,
    dont_fragment: bool,
}

impl Case {
    /// As a sender would have made it.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.sample.bytes();
        let (dscp, ecn) = (IpDscp::try_new(self.tos >> 2), IpEcn::try_new(self.tos & 3));
        if self.sample.dst.is_ipv4() {
            let mut ip = Ipv4Header::from_slice(&bytes[L3..]).unwrap().0;
            ip.dscp = dscp.unwrap();
            ip.ecn = ecn.unwrap();
            ip.identification = self.identification;
            ip.dont_fragment = self.dont_fragment;
            ip.header_checksum = ip.calc_header_checksum();
            let ip = ip.to_bytes();
            bytes[L3..][..ip.len()].copy_from_slice(&ip);
        } else {
            let mut ip = Ipv6Header::from_slice(&bytes[L3..]).unwrap().0;
            ip.traffic_class = self.tos;
            bytes[L3..L3 + 40].copy_from_slice(&ip.to_bytes());
        }
        bytes
    }

    fn one_hop_on(&self) -> Self {
        let sample = Sample { ttl: self.sample.ttl - 1, ..self.sample.clone() };
        Self { sample, ..self.clone() }
    }
}

fn cases() -> impl Strategy<Value = (Case, Tunnel)> {
    let case = (samples(), any::<u8>(), any::<u16>(), any::<bool>()).prop_map(
        |(sample, tos, identification, dont_fragment)| Case {
            sample,
            tos,
            identification,
            dont_fragment,
        },
    );
    let port = prop_oneof![Just(0), Just(GUE_PORT)];
    (case, any::<bool>(), any::<u64>(), port).prop_map(|(case, is_v4, hash, port)| {
        let [src, dst]: [IpAddr; 2] = if is_v4 {
            ["172.16.0.0", "10.1.2.3"].map(|addr| addr.parse().unwrap())
        } else {
            ["100::", "2001:db8::9:7"].map(|addr| addr.parse().unwrap())
        };
        (case, Tunnel { dst: dst.into(), src: src.into(), hop: HOP, hash, port })
    })
}

fn wrapped(bytes: &[u8], is_v4: bool, tunnel: &Tunnel) -> Result<Vec<u8>, Verdict> {
    let mut grown = vec![0xee; tunnel.overhead()];
    grown.extend(bytes);
    write(&mut Frame::from_slice(&mut grown), is_v4, tunnel)?;
    Ok(grown)
}

/// What another implementation makes of it.
fn expected(case: &Case, tunnel: &Tunnel) -> Vec<u8> {
    let is_v4 = case.sample.dst.is_ipv4();
    let number = IpNumber(if is_v4 { 4 } else { 41 });
    let inner = case.one_hop_on().bytes();
    let (inner, padding) = inner[L3..].split_at(inner.len() - L3 - case.sample.padding);
    let mut expected = Vec::new();
    let ethernet = PacketBuilder::ethernet2(HOP.src_mac, HOP.dst_mac);
    let hash = tunnel.hash.to_be_bytes();
    let ip = match (IpAddr::from(tunnel.src), IpAddr::from(tunnel.dst)) {
        (IpAddr::V4(_), IpAddr::V4(dst)) => {
            let src = [172, 16, hash[4], hash[5]];
            let mut ip = Ipv4Header::new(0, 64, number, src, dst.octets()).unwrap();
            ip.dscp = IpDscp::try_new(case.tos >> 2).unwrap();
            ip.ecn = IpEcn::try_new(case.tos & 3).unwrap();
            ip.identification = if is_v4 { case.identification } else { 0 };
            ip.dont_fragment = case.dont_fragment || !is_v4;
            IpHeaders::Ipv4(ip, Ipv4Extensions::default())
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let mut source = src.octets();
            source[8..].copy_from_slice(&hash);
            let ip = Ipv6Header {
                traffic_class: case.tos,
                flow_label: Ipv6FlowLabel::try_new(tunnel.hash as u32 & 0xf_ffff).unwrap(),
                hop_limit: 64,
                source,
                destination: dst.octets(),
                ..Ipv6Header::default()
            };
            IpHeaders::Ipv6(ip, Ipv6Extensions::default())
        }
        families => panic!("two families: {families:?}"),
    };
    let is_outer_v4 = matches!(ip, IpHeaders::Ipv4(..));
    let ethernet = ethernet.ip(ip);
    if tunnel.port == 0 {
        ethernet.write(&mut expected, number, inner).unwrap();
    } else {
        let sport = 0xc000 | u16::from_be_bytes([hash[6], hash[7]]);
        let payload = [&[0, number.0, 0, 0], inner].concat();
        ethernet.udp(sport, tunnel.port).write(&mut expected, &payload).unwrap();
        let at = L3 + if is_outer_v4 { 20 } else { 40 } + 6;
        expected[at..at + 2].fill(0);
    }
    expected.extend(padding);
    expected
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn given_any_packet_when_it_enters_any_tunnel_then_the_headers_are_those_of_another_maker(
        (case, tunnel) in cases(),
    ) {
        let after = wrapped(&case.bytes(), case.sample.dst.is_ipv4(), &tunnel);
        prop_assert_eq!(after, Ok(expected(&case, &tunnel)));
    }

    #[test]
    fn given_a_packet_in_a_tunnel_when_it_is_taken_out_then_it_is_one_hop_on(
        (case, tunnel) in cases(),
    ) {
        let is_v4 = case.sample.dst.is_ipv4();
        let mut bytes = wrapped(&case.bytes(), is_v4, &tunnel).unwrap();
        let mut frame = Frame::from_slice(&mut bytes);
        let found = inner(&frame, GUE_PORT).unwrap();
        prop_assert_eq!((found.strip, found.is_v4), (tunnel.overhead(), is_v4));
        prop_assert_eq!(unwrap(&mut frame, &found), Some(()));

        let mut taken_out = bytes.split_off(found.strip);
        let mut packet = Packet::default();
        let parsed = parse::packet(&Frame::from_slice(&mut taken_out), &mut packet);
        prop_assert_eq!((parsed, packet), (Ok(()), case.sample.expected()));
        prop_assert_eq!(&taken_out[..6], &HOP.dst_mac);
        prop_assert_eq!(&taken_out[6..12], &HOP.src_mac);
        prop_assert_eq!(&taken_out[12..], &case.one_hop_on().bytes()[12..]);
    }

    #[test]
    fn given_a_tunnel_that_was_congested_when_a_packet_is_taken_out_then_its_receiver_learns_of_it(
        (case, tunnel) in cases(),
    ) {
        // Marked on the way: the outer header only.
        let is_v4 = case.sample.dst.is_ipv4();
        let entered = Case { tos: case.tos & !CE | CE, ..case.clone() };
        let mut bytes = expected(&entered, &tunnel);
        let inside = case.one_hop_on().bytes();
        bytes.truncate(L3 + tunnel.overhead());
        bytes.extend(&inside[L3..]);

        let mut frame = Frame::from_slice(&mut bytes);
        let found = inner(&frame, GUE_PORT).unwrap();
        let taken_out = unwrap(&mut frame, &found);
        if case.tos & CE == 0 {
            prop_assert_eq!(taken_out, None);
        } else {
            prop_assert_eq!(taken_out, Some(()));
            let marked = Case { tos: case.tos | CE, ..case.one_hop_on() };
            prop_assert_eq!(&bytes[found.strip + 12..], &marked.bytes()[12..]);
        }
        prop_assert_eq!(found.is_v4, is_v4);
    }

    #[test]
    fn given_a_frame_that_is_too_short_when_written_or_read_then_nothing_is_touched_beyond_its_end(
        (case, tunnel) in cases(),
        len in 0..140_usize,
    ) {
        let is_v4 = case.sample.dst.is_ipv4();
        let whole = wrapped(&case.bytes(), is_v4, &tunnel).unwrap();
        let len = len.min(whole.len());
        let mut bytes = whole.clone();
        let mut frame = Frame::from_slice(&mut bytes[..len]);
        if let Some(found) = inner(&frame, GUE_PORT) {
            prop_assert!(len > L3 + found.strip);
            let _ = unwrap(&mut frame, &found);
        }
        let _ = write(&mut frame, is_v4, &tunnel);
        prop_assert_eq!(&bytes[len..], &whole[len..]);
    }

    #[test]
    fn given_a_packet_that_is_in_no_tunnel_when_it_is_looked_for_then_there_is_none(
        sample in samples(),
    ) {
        let mut bytes = sample.bytes();
        let dport = sample.dport.wrapping_add(1);
        prop_assert_eq!(inner(&Frame::from_slice(&mut bytes), dport), None);
    }
}

#[test]
fn given_a_packet_at_its_last_hop_when_it_enters_a_tunnel_then_it_ends_here_unchanged() {
    for sample in [Sample::default(), Sample::v6()] {
        for ttl in [0, 1] {
            let sample = Sample { ttl, ..sample.clone() };
            let tunnel = Tunnel {
                dst: sample.dst.into(),
                src: sample.dst.into(),
                hop: HOP,
                hash: 7,
                port: 0,
            };
            let mut grown = vec![0xee; tunnel.overhead()];
            grown.extend(sample.bytes());
            let before = grown.clone();
            let written = write(&mut Frame::from_slice(&mut grown), sample.dst.is_ipv4(), &tunnel);
            assert_eq!((written, grown), (Err(Verdict::TtlExpired), before));
        }
    }
}

#[test]
fn given_a_tunnel_that_the_kernel_has_to_look_at_when_a_packet_is_looked_for_then_there_is_none() {
    let case = Case { sample: Sample::default(), tos: 0, identification: 0, dont_fragment: true };
    let v4: IpAddr = "10.1.2.3".parse().unwrap();
    let v6: IpAddr = "2001:db8::9:7".parse().unwrap();
    let gue = |addr: IpAddr| {
        let tunnel =
            Tunnel { dst: addr.into(), src: addr.into(), hop: HOP, hash: 7, port: GUE_PORT };
        wrapped(&case.bytes(), true, &tunnel).unwrap()
    };
    // Of an IPv4 header, sealed again.
    let edited = |at: usize, byte: u8| {
        let mut bytes = gue(v4);
        bytes[L3 + at] = byte;
        let ip = Ipv4Header::from_slice(&bytes[L3..]).unwrap().0;
        bytes[L3 + 10..L3 + 12].copy_from_slice(&ip.calc_header_checksum().to_be_bytes());
        bytes
    };
    let changed = |addr: IpAddr, at: usize, byte: u8| {
        let mut bytes = gue(addr);
        bytes[at] = byte;
        bytes
    };
    let (udp4, udp6) = (L3 + 20, L3 + 40);
    let cases = [
        ("GUE over IPv4", gue(v4), true),
        ("GUE over IPv6", gue(v6), true),
        ("TTL", edited(8, 3), true),
        ("first fragment", edited(6, 0x20), false),
        ("later fragment", edited(7, 9), false),
        ("wrong header checksum", changed(v4, L3 + 11, 0x77), false),
        ("IPv6, version 4", changed(v6, L3, 0x40), false),
        ("other ethertype", changed(v6, 13, 0), false),
        ("IPv4, other port", changed(v4, udp4 + 3, 1), false),
        ("IPv6, other port", changed(v6, udp6 + 3, 1), false),
        ("checksum", changed(v6, udp6 + 7, 1), false),
        ("GUE, variant 1", changed(v4, udp4 + 8, 0x40), false),
        ("GUE, control", changed(v4, udp4 + 8, 0x20), false),
        ("GUE, optional fields", changed(v4, udp4 + 8, 1), false),
        ("GUE, flags", changed(v4, udp4 + 11, 1), false),
        ("GUE, TCP", changed(v4, udp4 + 9, 6), false),
        ("GUE, other family", changed(v4, udp4 + 9, 41), false),
        ("inner version 6", changed(v4, udp4 + 12, 0x65), false),
    ];
    for (name, mut bytes, expected) in cases {
        let found = inner(&Frame::from_slice(&mut bytes), GUE_PORT);
        assert_eq!(found.is_some(), expected, "{name}");
    }
}

#[test]
fn given_flows_with_other_hashes_when_they_enter_a_tunnel_then_they_look_different_outside() {
    let sample = Sample::default();
    for (addr, offsets) in [("172.16.0.0", [L3 + 12, L3 + 20]), ("100::", [L3 + 16, L3 + 40])] {
        let addr: IpAddr = addr.parse().unwrap();
        let mut seen: [Vec<u16>; 2] = [Vec::new(), Vec::new()];
        for sport in 1..=1_000 {
            let sample = Sample { sport, ..sample.clone() };
            let tunnel = Tunnel {
                dst: addr.into(),
                src: addr.into(),
                hop: HOP,
                hash: hash::flow(&sample.expected().key, &Seed::PUBLIC),
                port: GUE_PORT,
            };
            let bytes = wrapped(&sample.bytes(), true, &tunnel).unwrap();
            for (seen, mut at) in seen.iter_mut().zip(offsets) {
                if addr.is_ipv4() && at == L3 + 12 {
                    at += 2;
                }
                seen.push(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
            }
        }
        for mut seen in seen {
            seen.sort_unstable();
            seen.dedup();
            assert!(seen.len() > 900, "{} of 1000 over {addr}", seen.len());
        }
    }
}
