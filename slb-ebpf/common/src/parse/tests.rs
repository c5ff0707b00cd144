use std::{vec, vec::Vec};

use etherparse::{
    IpFragOffset, IpNumber, Ipv6Extensions, Ipv6FragmentHeader, NetSlice, SlicedPacket,
    TransportSlice,
};
use proptest::{collection::vec, prelude::*, sample::Index};

use crate::net::FlowKey;

use super::{
    fixtures::{Sample, raw_extension, samples},
    *,
};

/// As the program does it: what few packets are is left to [`rest`], which takes all others alike.
fn parse(bytes: &mut [u8]) -> Result<Packet, Reject> {
    let (mut found, mut again) = (Packet::default(), Packet::default());
    let at_once = first(&Frame::from_slice(bytes), &mut found).map(|()| found);
    let len = bytes.len();
    let second = rest(&Frame::from_slice(bytes), &mut again, len).map(|()| again);
    if at_once != Err(Reject::Rest) {
        assert_eq!(at_once, second, "{bytes:02x?}");
    }
    second
}

/// Corrects the IPv4 header checksum after a change.
fn seal(bytes: &mut [u8]) {
    let len = usize::from(bytes[L3] & 0x0f) * 4;
    bytes[L3 + 10..L3 + 12].fill(0);
    let words =
        bytes[L3..L3 + len].chunks(2).map(|word| u64::from(word[0]) << 8 | u64::from(word[1]));
    let sum = !checksum::fold(words.sum());
    bytes[L3 + 10..L3 + 12].copy_from_slice(&sum.to_be_bytes());
}

/// The tuple as the other implementation sees it; `None`: it does not get as far as the ports.
fn independent(bytes: &[u8]) -> Option<(FlowKey, bool)> {
    let sliced = SlicedPacket::from_ethernet(bytes).ok()?;
    let (src, dst, is_v4): (core::net::IpAddr, core::net::IpAddr, _) = match sliced.net? {
        NetSlice::Ipv4(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into(), true)
        }
        NetSlice::Ipv6(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into(), false)
        }
        NetSlice::Arp(_) => return None,
    };
    let (sport, dport, proto) = match sliced.transport? {
        TransportSlice::Tcp(tcp) => (tcp.source_port(), tcp.destination_port(), TCP),
        TransportSlice::Udp(udp) => (udp.source_port(), udp.destination_port(), UDP),
        _ => return None,
    };
    Some((FlowKey { src: src.into(), dst: dst.into(), sport, dport, proto }, is_v4))
}

/// What holds whatever the bytes are.
fn check_any(bytes: &mut [u8]) -> Result<(), TestCaseError> {
    let parsed = parse(bytes);
    match parsed {
        Ok(packet) => {
            let header = if packet.key.proto == TCP { TcpHdr::LEN } else { UdpHdr::LEN };
            if packet.fragment == FRAGMENT_LATER {
                return Ok(());
            }
            prop_assert!(packet.l4 as usize + header <= bytes.len(), "{packet:?}");
            prop_assert_eq!(packet.is_v4(), bytes[12..14] == [0x08, 0x00]);
            if let Some((key, is_v4)) = independent(bytes) {
                prop_assert_eq!((packet.key, packet.is_v4()), (key, is_v4));
            }
        }
        Err(Reject::To(_, verdict)) => prop_assert!(
            matches!(
                verdict,
                Verdict::Truncated
                    | Verdict::Malformed
                    | Verdict::BadChecksum
                    | Verdict::OtherProtocol
                    | Verdict::Martian
            ),
            "{verdict:?}"
        ),
        Err(Reject::NotIp | Reject::Icmp) => {}
        Err(Reject::Rest) => prop_assert!(false, "nobody is left to ask"),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn given_any_bytes_when_parsed_then_nothing_panics(
        mut bytes in vec(any::<u8>(), 0..1600),
        ethertype in prop_oneof![Just(None), Just(Some([0x08, 0x00])), Just(Some([0x86, 0xdd]))],
        proto in prop_oneof![Just(0), Just(6), Just(17), Just(43), Just(44), Just(60), any::<u8>()],
    ) {
        if let (Some(ethertype), true) = (ethertype, bytes.len() > L3 + 20) {
            bytes[0] &= !1;
            bytes[12..14].copy_from_slice(&ethertype);
            if ethertype == [0x08, 0x00] {
                bytes[L3] = 0x40 | bytes[L3] & 0x0f;
                bytes[L3 + 2] &= 0x03;
                bytes[L3 + 9] = proto;
                if bytes.len() > L3 + 60 {
                    seal(&mut bytes);
                }
            } else {
                bytes[L3] = 0x60 | bytes[L3] & 0x0f;
                bytes[L3 + 4] &= 0x03;
                bytes[L3 + 6] = proto;
            }
        }
        check_any(&mut bytes)?;
    }

    #[test]
    fn given_a_valid_frame_when_parsed_then_exactly_its_tuple_is_found(sample in samples()) {
        prop_assert_eq!(parse(&mut sample.bytes()), Ok(sample.expected()), "{:?}", sample);
    }

    #[test]
    fn given_a_valid_frame_when_any_bytes_change_then_it_agrees_with_another_parser(
        sample in samples(),
        changes in vec((any::<Index>(), any::<u8>()), 1..4),
        sealed in any::<bool>(),
    ) {
        let mut bytes = sample.bytes();
        // Payload bytes change nothing.
        let headers = sample.expected().l4 as usize + 14;
        for (at, value) in changes {
            let at = at.index(headers.min(bytes.len()));
            bytes[at] = value;
        }
        if sealed && sample.dst.is_ipv4() && bytes.len() >= L3 + 60 {
            seal(&mut bytes);
        }
        check_any(&mut bytes)?;
    }

    #[test]
    fn given_a_valid_frame_when_it_is_cut_then_it_is_rejected(
        sample in samples(),
        at in any::<Index>(),
    ) {
        let mut bytes = sample.bytes();
        bytes.truncate(bytes.len() - sample.padding);
        bytes.truncate(at.index(bytes.len()));
        let fixed = L3 + if sample.dst.is_ipv4() { 20 } else { 40 };
        let expected = if bytes.len() < fixed {
            Reject::NotIp
        } else {
            Reject::To(sample.dst.into(), Verdict::Truncated)
        };
        prop_assert_eq!(parse(&mut bytes), Err(expected));
    }

    #[test]
    fn given_a_valid_ipv4_frame_when_one_header_bit_flips_then_it_is_no_packet(
        sample in samples().prop_filter("IPv4", |sample| sample.dst.is_ipv4()),
        bit in any::<Index>(),
    ) {
        let mut bytes = sample.bytes();
        let bit = bit.index((sample.expected().l4 as usize - L3) * 8);
        bytes[L3 + bit / 8] ^= 1 << (bit % 8);
        prop_assert!(parse(&mut bytes).is_err());
    }
}

fn v4_with(change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    changed(&Sample::default(), |bytes| {
        change(bytes);
        seal(bytes);
    })
}

fn changed(sample: &Sample, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = sample.bytes();
    change(&mut bytes);
    bytes
}

#[test]
fn given_an_ipv4_packet_that_cannot_be_balanced_when_parsed_then_the_verdict_says_why() {
    let udp = Sample::default().udp();
    let options = Sample { options: vec![1; 8], ..Sample::default() };
    let cases = [
        ("version 5", v4_with(|b| b[L3] = 0x55), Verdict::Malformed),
        ("header of 16 bytes", v4_with(|b| b[L3] = 0x44), Verdict::Malformed),
        ("total below header", v4_with(|b| b[L3 + 2..L3 + 4].fill(0)), Verdict::Malformed),
        ("total above frame", v4_with(|b| b[L3 + 3] += 1), Verdict::Truncated),
        ("wrong checksum", changed(&Sample::default(), |b| b[L3 + 10] ^= 1), Verdict::BadChecksum),
        ("wrong option", changed(&options, |b| b[L3 + 27] ^= 1), Verdict::BadChecksum),
        ("ICMPv6", v4_with(|b| b[L3 + 9] = 58), Verdict::OtherProtocol),
        ("data offset 4", changed(&Sample::default(), |b| b[L3 + 32] = 0x40), Verdict::Malformed),
        ("data offset 15", changed(&Sample::default(), |b| b[L3 + 32] = 0xf0), Verdict::Malformed),
        ("UDP length 7", changed(&udp, |b| b[L3 + 25] = 7), Verdict::Malformed),
        ("UDP length 0", changed(&udp, |b| b[L3 + 25] = 0), Verdict::Malformed),
        ("UDP length above IP's", changed(&udp, |b| b[L3 + 25] += 1), Verdict::Malformed),
    ];
    for (case, mut bytes, verdict) in cases {
        let expected = Err(Reject::To(Sample::default().dst.into(), verdict));
        assert_eq!(parse(&mut bytes), expected, "{case}");
    }
}

#[test]
fn given_ipv4_options_when_parsed_then_source_routes_are_found_where_the_kernel_finds_them() {
    let (loose, strict) = ([131, 7, 4, 192, 0, 2, 1], [137, 7, 4, 192, 0, 2, 1]);
    let behind = |before: &[u8]| [before, &loose].concat();
    let cases = [
        ("loose", loose.to_vec(), true),
        ("strict", strict.to_vec(), true),
        ("behind nothing", behind(&[1, 1, 1]), true),
        ("behind a timestamp", behind(&[68, 8, 5, 0, 0, 0, 0, 0]), true),
        ("last of all", behind(&[1; 33]), true),
        ("behind the end", behind(&[0]), false),
        ("in another option", behind(&[7, 20]), false),
        ("behind one without a length", behind(&[7, 0]), false),
        ("record route", vec![7, 7, 4, 0, 0, 0, 0], false),
    ];
    for (case, mut options, is_source_routed) in cases {
        options.resize(options.len().next_multiple_of(4), 0);
        let sample = Sample { options, ..Sample::default() };
        let expected = if is_source_routed {
            Err(Reject::To(sample.dst.into(), Verdict::Martian))
        } else {
            Ok(sample.expected())
        };
        assert_eq!(parse(&mut sample.bytes()), expected, "{case}");
    }
}

#[test]
fn given_a_first_fragment_within_the_udp_header_when_parsed_then_padding_is_no_header() {
    for (len, expected) in [(0, false), (4, false), (7, false), (8, true)] {
        let sample = Sample { payload: vec![7; 40], ..Sample::default() }.udp();
        let mut bytes = changed(&sample, |bytes| {
            bytes[L3 + 2..L3 + 4].copy_from_slice(&(20 + len as u16).to_be_bytes());
            bytes[L3 + 6] = 0x20;
            seal(bytes);
        });
        let parsed = parse(&mut bytes);
        let malformed = Err(Reject::To(sample.dst.into(), Verdict::Malformed));
        assert_eq!(parsed.is_ok(), expected, "{len} bytes");
        assert_eq!(parsed == malformed, !expected, "{len} bytes");
    }
}

#[test]
fn given_an_ipv4_total_length_within_the_tcp_header_when_parsed_then_padding_is_no_header() {
    let sample = Sample { payload: Vec::new(), padding: 40, ..Sample::default() };
    let mut bytes = changed(&sample, |bytes| {
        bytes[L3 + 3] -= 1;
        seal(bytes);
    });
    let expected = Reject::To(sample.dst.into(), Verdict::Malformed);
    assert_eq!(parse(&mut bytes), Err(expected));
}

#[test]
fn given_harmless_ipv4_flags_when_parsed_then_it_is_a_packet() {
    for (case, flags) in [("don't fragment", 0x40), ("reserved bit", 0x80)] {
        let mut bytes = v4_with(|bytes| bytes[L3 + 6] = flags);
        assert_eq!(parse(&mut bytes), Ok(Sample::default().expected()), "{case}");
    }
}

/// An IPv6 frame with these extension headers, by number and bytes, and TCP behind them.
fn v6_chain(chain: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let plain = Sample::v6().bytes();
    let mut bytes = plain[..L3 + 40].to_vec();
    let mut at = L3 + 6;
    for (number, header) in chain {
        bytes[at] = *number;
        at = bytes.len();
        bytes.extend_from_slice(header);
    }
    bytes[at] = 6;
    bytes.extend_from_slice(&plain[L3 + 40..]);
    let payload = (bytes.len() - L3 - 40) as u16;
    bytes[L3 + 4..L3 + 6].copy_from_slice(&payload.to_be_bytes());
    bytes
}

#[test]
fn given_an_ipv6_packet_that_cannot_be_balanced_when_parsed_then_the_verdict_says_why() {
    let v6 = Sample::v6();
    let routing = v6_chain(&[(ROUTING, vec![0, 0, 4, 1, 0, 0, 0, 0])]);
    let part = (FRAGMENT, vec![0, 0, 0, 1, 0, 0, 0, 9]);
    let long = v6_chain(&[(HOP_BY_HOP, vec![0, 200, 0, 0, 0, 0, 0, 0])]);
    let past_payload = {
        let mut bytes = v6_chain(&[(HOP_BY_HOP, vec![0, 6, 0, 0, 0, 0, 0, 0])]);
        bytes.resize(bytes.len() + 80, 0);
        bytes
    };
    let cases = [
        ("version 4", changed(&v6, |b| b[L3] = 0x40), Verdict::Malformed),
        ("payload above frame", changed(&v6, |b| b[L3 + 5] += 1), Verdict::Truncated),
        ("ICMP", changed(&v6, |b| b[L3 + 6] = 1), Verdict::OtherProtocol),
        ("AH", changed(&v6, |b| b[L3 + 6] = 51), Verdict::OtherProtocol),
        ("no next header", changed(&v6, |b| b[L3 + 6] = 59), Verdict::OtherProtocol),
        ("segments left", routing, Verdict::Martian),
        ("seven headers", v6_chain(&vec![(60, vec![0; 8]); 7]), Verdict::Malformed),
        ("a fragment of a fragment", v6_chain(&[part.clone(), part]), Verdict::Malformed),
        ("a header that ends behind the payload", past_payload, Verdict::Malformed),
        ("a header that ends behind the frame", long, Verdict::Malformed),
        ("UDP length 0", changed(&v6.clone().udp(), |b| b[L3 + 45] = 0), Verdict::Malformed),
    ];
    for (case, mut bytes, verdict) in cases {
        let expected = Err(Reject::To(v6.dst.into(), verdict));
        assert_eq!(parse(&mut bytes), expected, "{case}");
    }
}

#[test]
fn given_ipv6_extension_headers_when_parsed_then_six_in_any_order_are_followed() {
    let long = [vec![0, 3], vec![0; 30]].concat();
    let cases = [
        ("one", vec![(DESTINATION_OPTIONS, vec![0; 8])]),
        ("six", vec![(DESTINATION_OPTIONS, vec![0; 8]); 6]),
        ("hop-by-hop last", vec![(DESTINATION_OPTIONS, vec![0; 8]), (HOP_BY_HOP, long.clone())]),
        // The second byte of a fragment header is no length (RFC 8200, section 4.5).
        ("fragment with a length", vec![(FRAGMENT, vec![0, 0xff, 0, 0, 0, 0, 0, 9])]),
        ("routing, at its end", vec![(ROUTING, long)]),
    ];
    for (case, chain) in cases {
        let mut bytes = v6_chain(&chain);
        let found = parse(&mut bytes).map(|packet| packet.key);
        assert_eq!(found, Ok(Sample::v6().expected().key), "{case}");
    }
}

#[test]
fn given_an_atomic_fragment_when_parsed_then_it_is_a_packet() {
    let extensions = Ipv6Extensions {
        hop_by_hop_options: Some(raw_extension(2)),
        fragment: Some(super::fixtures::whole_packet_fragment()),
        ..Ipv6Extensions::default()
    };
    let sample = Sample { extensions, ..Sample::v6().udp() };
    assert_eq!(parse(&mut sample.bytes()), Ok(sample.expected()));
}

#[test]
fn given_ipv6_between_mapped_addresses_when_parsed_then_it_is_not_mistaken_for_ipv4() {
    let mapped = "::ffff:203.0.113.10".parse().unwrap();
    let cases = [
        ("destination", Sample { dst: mapped, ..Sample::v6() }),
        ("source", Sample { src: mapped, ..Sample::v6() }),
        ("both", Sample { src: mapped, dst: mapped, ..Sample::v6() }),
    ];
    for (case, sample) in cases {
        assert_eq!(parse(&mut sample.bytes()), Err(Reject::NotIp), "{case}");
    }
}

#[test]
fn given_frames_that_are_not_for_us_when_parsed_then_they_have_no_destination() {
    let sample = Sample::default();
    let cases = [
        ("empty", Vec::new()),
        ("a cut Ethernet header", sample.bytes()[..13].to_vec()),
        ("Ethernet alone", sample.bytes()[..14].to_vec()),
        ("ARP", changed(&sample, |bytes| bytes[12..14].copy_from_slice(&[0x08, 0x06]))),
        ("VLAN", changed(&sample, |bytes| bytes[12..14].copy_from_slice(&[0x81, 0x00]))),
        ("broadcast", changed(&sample, |bytes| bytes[..6].fill(0xff))),
        ("IPv4 multicast", changed(&sample, |bytes| bytes[0] = 0x01)),
        ("IPv6 multicast", changed(&Sample::v6(), |bytes| bytes[..2].fill(0x33))),
    ];
    for (case, mut bytes) in cases {
        assert_eq!(parse(&mut bytes), Err(Reject::NotIp), "{case}");
    }
}

#[test]
fn given_fragments_when_parsed_then_the_first_has_ports_and_the_others_what_they_share() {
    let v4 = |flags: [u8; 2]| {
        v4_with(|b| {
            b[L3 + 4..L3 + 6].copy_from_slice(&[0xab, 0xcd]);
            b[L3 + 6..L3 + 8].copy_from_slice(&flags);
        })
    };
    let v6 = |offset, more| {
        let offset = IpFragOffset::try_new(offset).unwrap();
        let header = Ipv6FragmentHeader::new(IpNumber(0), offset, more, 0x0102_0304);
        let extensions = Ipv6Extensions { fragment: Some(header), ..Ipv6Extensions::default() };
        Sample { extensions, ..Sample::v6() }.bytes()
    };
    let (first, later) = (FRAGMENT_FIRST, FRAGMENT_LATER);
    let (v4_key, v6_key) = (Sample::default().expected().key, Sample::v6().expected().key);
    let cases = [
        ("IPv4, first", v4([0x20, 0]), first, v4_key),
        ("IPv4, in the middle", v4([0x20, 1]), later, v4_key),
        ("IPv4, last", v4([0, 1]), later, v4_key),
        ("IPv4, high bits", v4([0x10, 0]), later, v4_key),
        ("IPv6, first", v6(0, true), first, v6_key),
        ("IPv6, in the middle", v6(1, true), later, v6_key),
        ("IPv6, last", v6(0x1fff, false), later, v6_key),
    ];
    for (case, mut bytes, fragment, key) in cases {
        let mut found = Packet::default();
        let rejected = super::first(&Frame::from_slice(&mut bytes), &mut found);
        assert_eq!(rejected, Err(Reject::Rest), "{case}");
        let found = parse(&mut bytes).unwrap();
        let ports = if fragment == later { (0, 0) } else { (key.sport, key.dport) };
        let expected = FlowKey { sport: ports.0, dport: ports.1, ..key };
        assert_eq!((found.fragment, found.key), (fragment, expected), "{case}");
        let id: &[u8] = if found.is_v4() { &[0xab, 0xcd, 0, 0] } else { &[1, 2, 3, 4] };
        assert_eq!(found.fragment_id.to_ne_bytes(), id, "{case}");
    }
}

#[test]
fn given_icmp_when_parsed_then_it_is_left_to_others_with_its_ends() {
    for (sample, at, proto) in [(Sample::default(), 9, 1), (Sample::v6(), 6, 58)] {
        let mut bytes = changed(&sample, |bytes| bytes[L3 + at] = proto);
        if sample.dst.is_ipv4() {
            seal(&mut bytes);
        }
        let mut found = Packet::default();
        let rejected = super::first(&Frame::from_slice(&mut bytes), &mut found);
        assert_eq!(rejected, Err(Reject::Icmp), "{sample:?}");
        let expected = sample.expected();
        assert_eq!((found.key.src, found.key.dst), (expected.key.src, expected.key.dst));
        assert_eq!((found.l4, found.is_v4()), (expected.l4, expected.is_v4()));
    }
}

#[test]
fn given_tags_when_counted_then_two_are_followed() {
    let plain = Sample::default().bytes();
    let tagged = |tags: &[[u8; 2]]| {
        let mut bytes = plain[..12].to_vec();
        for tag in tags {
            bytes.extend([tag[0], tag[1], 0x00, 0x64]);
        }
        bytes.extend(&plain[12..]);
        bytes
    };
    let (vlan, service, old) = ([0x81, 0x00], [0x88, 0xa8], [0x91, 0x00]);
    let cases = [
        (tagged(&[]), 0),
        (tagged(&[vlan]), 1),
        (tagged(&[service]), 1),
        (tagged(&[service, vlan]), 2),
        (tagged(&[old, vlan]), 2),
        (tagged(&[vlan, vlan, vlan]), 2),
    ];
    for (mut bytes, count) in cases {
        assert_eq!(tags(&Frame::from_slice(&mut bytes)), count, "{bytes:02x?}");
        let mut found = Packet::default();
        let rejected = super::first(&Frame::from_slice(&mut bytes), &mut found);
        assert_eq!(rejected, if count == 0 { Ok(()) } else { Err(Reject::Rest) });
    }
}

#[test]
fn given_a_packet_that_is_longer_than_its_first_buffer_when_parsed_then_only_the_rest_is_missing() {
    for sample in [Sample::default(), Sample::v6().udp()] {
        let sample = Sample { payload: vec![7; 6_000], ..sample };
        let mut bytes = sample.bytes();
        let len = bytes.len();
        let mut found = Packet::default();
        let buffer = Frame::from_slice(&mut bytes[..3_000]);
        assert_eq!(first(&buffer, &mut found), Err(Reject::Rest));
        assert_eq!(rest(&buffer, &mut found, len), Ok(()));
        assert_eq!(found, sample.expected());
        let truncated = Reject::To(sample.dst.into(), Verdict::Truncated);
        assert_eq!(rest(&buffer, &mut found, len - 1), Err(truncated));
    }
}

#[test]
fn given_tcp_flags_when_asked_then_only_a_bare_syn_asks_for_a_connection() {
    for flags in 0..=u8::MAX {
        let mut bytes = Sample { flags, ..Sample::default() }.bytes();
        let packet = parse(&mut bytes).unwrap();
        assert_eq!(packet.flags.bits(), flags);
        let bare = flags & 0b10 != 0 && flags & 0b1_0101 == 0;
        assert_eq!(packet.is_syn(), bare, "flags {flags:#04x}");
    }
}
