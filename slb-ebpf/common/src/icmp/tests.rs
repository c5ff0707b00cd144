use std::{net::IpAddr, vec, vec::Vec};

use etherparse::{
    Icmpv4Header, Icmpv6Header, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv4Options,
    Ipv6Extensions, Ipv6Header, PacketBuilder,
};
use proptest::{collection::vec, prelude::*};

use super::*;
use crate::{
    abi::FlowKind,
    parse::{
        self, Reject,
        fixtures::{
            DESTINATION_MAC, SOURCE_MAC, Sample, raw_extension, samples, whole_packet_fragment,
        },
    },
};

const HOP: NextHop =
    NextHop { ifindex: 3, dst_mac: [2, 0, 0, 0, 0, 0x11], src_mac: [2, 0, 0, 0, 0, 0x22] };

/// An ICMP message as another implementation makes it.
#[derive(Clone, Debug)]
struct Sent {
    src: IpAddr,
    dst: IpAddr,
    ttl: u8,
    /// IPv4 only.
    options: Vec<u8>,
    kind: u8,
    code: u8,
    rest: [u8; 4],
    payload: Vec<u8>,
}

impl Sent {
    fn bytes(&self) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2(SOURCE_MAC, DESTINATION_MAC);
        let mut bytes = Vec::new();
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut ip =
                    Ipv4Header::new(0, self.ttl, IpNumber(0), src.octets(), dst.octets()).unwrap();
                ip.options = Ipv4Options::try_from(&self.options[..]).unwrap();
                ethernet
                    .ip(IpHeaders::Ipv4(ip, Ipv4Extensions::default()))
                    .icmpv4_raw(self.kind, self.code, self.rest)
                    .write(&mut bytes, &self.payload)
                    .unwrap();
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let ip = Ipv6Header {
                    hop_limit: self.ttl,
                    source: src.octets(),
                    destination: dst.octets(),
                    ..Ipv6Header::default()
                };
                ethernet
                    .ip(IpHeaders::Ipv6(ip, Ipv6Extensions::default()))
                    .icmpv6_raw(self.kind, self.code, self.rest)
                    .write(&mut bytes, &self.payload)
                    .unwrap();
            }
            families => panic!("two families: {families:?}"),
        }
        bytes
    }
}

fn rejection(bytes: &mut [u8]) -> Result<(), Reject> {
    parse::packet(&Frame::from_slice(bytes), &mut Packet::default())
}

fn quoted_in(bytes: &[u8]) -> Option<Quote> {
    quote(&Frame::from_slice(&mut bytes.to_vec()))
}

/// But source routes, which are for another test.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let words = vec(any::<[u8; 4]>(), 0..=10).prop_map(|words| words.concat());
    words.prop_map(|bytes| bytes.into_iter().map(|byte| byte & !1).collect())
}

fn echoes() -> impl Strategy<Value = Sent> {
    (samples(), options(), any::<[u8; 4]>(), vec(any::<u8>(), 0..100)).prop_map(
        |(Sample { src, dst, ttl, .. }, options, rest, payload)| {
            let kind = if src.is_ipv4() { 8 } else { 128 };
            Sent { src, dst, ttl, options, kind, code: 0, rest, payload }
        },
    )
}

/// A packet that can be quoted.
fn quotable() -> impl Strategy<Value = Sample> {
    (samples(), any::<bool>()).prop_map(|(sample, is_fragment)| Sample {
        extensions: Ipv6Extensions {
            fragment: is_fragment.then(whole_packet_fragment),
            ..Ipv6Extensions::default()
        },
        padding: 0,
        ..sample
    })
}

/// An error from `router` about `sample`, of which the first `len` bytes are quoted.
fn error(router: IpAddr, sample: &Sample, len: usize, options: &[u8]) -> Sent {
    let packet = &sample.bytes()[L3..];
    Sent {
        src: router,
        dst: sample.src,
        ttl: 9,
        options: options.to_vec(),
        kind: if sample.src.is_ipv4() { 3 } else { 2 },
        code: if sample.src.is_ipv4() { 4 } else { 0 },
        rest: [0, 0, 5, 0],
        payload: packet[..len.min(packet.len())].to_vec(),
    }
}

/// A quotable packet, an error about it, and where the error is translated to.
fn errors() -> impl Strategy<Value = (Sample, Sent, NatRewrite, NextHop)> {
    let hop = prop_oneof![Just(NextHop::UNRESOLVED), Just(HOP)];
    let router = prop_oneof![Just(None), any::<[u8; 16]>().prop_map(Some)];
    // The ports are quoted at least, behind headers of up to 60 bytes.
    let len = prop_oneof![Just(0_usize), 0..120_usize, Just(usize::MAX >> 1)];
    let to = (any::<[u8; 16]>(), any::<(u16, u16, bool)>());
    (quotable(), router, len, options(), to, hop).prop_map(
        |(sample, router, len, options, (addr, (sport, dport, is_reply)), hop)| {
            let like = |bytes: [u8; 16]| match sample.src {
                IpAddr::V4(_) => IpAddr::from([bytes[12], bytes[13], bytes[14], bytes[15]]),
                IpAddr::V6(_) => {
                    let [_, rest @ ..] = bytes;
                    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o] = rest;
                    IpAddr::from([0x20, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o])
                }
            };
            let router = router.map_or(sample.dst, like);
            let least = sample.expected().l4 as usize - L3 + 8;
            let sent = error(router, &sample, least + len, &options);
            let kind = FlowKind::of_direction(is_reply);
            let addr = like(addr).into();
            (sample, sent, NatRewrite { addr, sport, dport, kind }, hop)
        },
    )
}

/// The end of a quoted packet that stays.
fn other(quote: &Quote, to: &NatRewrite) -> Address {
    if to.is_reply() { quote.packet.key.src } else { quote.packet.key.dst }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn given_an_echo_request_when_it_is_answered_then_the_reply_is_what_its_receiver_would_send(
        echo in echoes(),
    ) {
        let mut bytes = echo.bytes();
        prop_assert_eq!(rejection(&mut bytes), Err(Reject::Icmp));
        prop_assert_eq!(answer_echo(&mut Frame::from_slice(&mut bytes)), Some(()));

        let kind = if echo.src.is_ipv4() { 0 } else { 129 };
        let reply = Sent { src: echo.dst, dst: echo.src, ttl: 64, kind, ..echo };
        let mut expected = reply.bytes();
        expected[..6].copy_from_slice(&SOURCE_MAC);
        expected[6..12].copy_from_slice(&DESTINATION_MAC);
        let at = L3 + 2 + if reply.src.is_ipv4() { 20 + reply.options.len() } else { 40 };
        if expected[at..at + 2] == [0, 0] {
            // The same number in one's complement.
            expected[at..at + 2].fill(0xff);
        }
        prop_assert_eq!(bytes, expected);
    }

    #[test]
    fn given_anything_but_an_echo_request_when_it_is_to_be_answered_then_it_stays_as_it_is(
        echo in echoes(),
        kind in any::<u8>(),
        sample in samples(),
    ) {
        let request = echo.kind;
        let other = Sent { kind, ..echo }.bytes();
        for before in [other, sample.bytes()] {
            let mut after = before.clone();
            let answer = answer_echo(&mut Frame::from_slice(&mut after));
            if answer.is_some() {
                prop_assert_eq!(kind, request);
            } else {
                prop_assert_eq!(after, before);
            }
        }
    }

    #[test]
    fn given_an_error_when_its_quote_is_read_then_it_is_the_packet_that_was_sent(
        (sample, sent, ..) in errors(),
    ) {
        let quote = quoted_in(&sent.bytes()).unwrap();
        let icmp = L3 + if sent.src.is_ipv4() { 20 + sent.options.len() } else { 40 };
        let packet = sample.expected();
        let l4 = packet.l4 + (icmp + 8 - L3) as u32;
        prop_assert_eq!(quote.packet, Packet { l4, flags: crate::parse::TcpFlags::empty(), len: 0, ..packet });
    }

    #[test]
    fn given_an_error_when_translated_then_it_is_one_about_the_translated_packet(
        (sample, sent, to, hop) in errors(),
    ) {
        let mut after = sent.bytes();
        let quote = quoted_in(&after).unwrap();
        let translated = translate_error(&mut Frame::from_slice(&mut after), &quote, &to, other(&quote, &to), hop);
        prop_assert_eq!(translated, Ok(()));

        // Made anew, with all checksums, by the other implementation.
        let addr = IpAddr::from(to.addr);
        let (sport, dport) = (to.sport, to.dport);
        let mut expected = sent.clone();
        let quoted = if to.is_reply() {
            if sent.src == sample.dst {
                expected.src = addr;
            }
            Sample { dst: addr, sport, dport, ..sample }
        } else {
            expected.dst = addr;
            Sample { src: addr, sport, dport, ..sample }
        };
        expected.payload = quoted.bytes()[L3..][..sent.payload.len()].to_vec();
        // A checksum that the quote ends in the middle of, or before, was not made anew.
        expected.ttl = if hop.is_known() { sent.ttl - 1 } else { sent.ttl };
        let at = quoted.expected().l4 as usize - L3 + if quoted.proto == TCP { 16 } else { 6 };
        if expected.payload.len() == at + 1 {
            expected.payload[at] = sent.payload[at];
        }
        let mut expected = expected.bytes();
        if hop.is_known() {
            expected[..6].copy_from_slice(&HOP.dst_mac);
            expected[6..12].copy_from_slice(&HOP.src_mac);
        }
        prop_assert_eq!(after, expected);
    }

    #[test]
    fn given_quoted_udp_without_a_checksum_when_translated_then_it_still_has_none(
        (sample, sent, to, hop) in errors(),
    ) {
        let sample = sample.udp();
        let mut sent = error(sent.src, &sample, usize::MAX, &sent.options);
        let at = sample.expected().l4 as usize - L3 + 6;
        sent.payload[at..at + 2].fill(0);
        let mut after = sent.bytes();
        let quote = quoted_in(&after).unwrap();
        translate_error(&mut Frame::from_slice(&mut after), &quote, &to, other(&quote, &to), hop).unwrap();

        let icmp = quote.at as usize;
        prop_assert_eq!(&after[icmp + 8 + at..][..2], &[0, 0]);
        let (stated, computed) = icmp_checksums(&after, icmp, sent.src.is_ipv4());
        prop_assert_eq!(stated, computed);
    }

    #[test]
    fn given_any_bytes_behind_an_error_when_read_and_translated_then_nothing_is_touched_beyond(
        (_, sent, to, hop) in errors(),
        payload in vec(any::<u8>(), 0..120),
        cut in 0..160_usize,
    ) {
        let whole = Sent { payload, ..sent }.bytes();
        let len = cut.min(whole.len());
        let mut bytes = whole.clone();
        let (head, _) = bytes.split_at_mut(len);
        let mut frame = Frame::from_slice(head);
        if let Some(quote) = quote(&frame) {
            let _ = translate_error(&mut frame, &quote, &to, other(&quote, &to), hop);
        }
        let _ = answer_echo(&mut frame);
        prop_assert_eq!(&bytes[len..], &whole[len..]);
    }
}

/// As stated, and as another implementation computes it.
fn icmp_checksums(bytes: &[u8], at: usize, is_v4: bool) -> (u16, u16) {
    let (stated, computed) = if is_v4 {
        let (header, payload) = Icmpv4Header::from_slice(&bytes[at..]).unwrap();
        (header.checksum, header.icmp_type.calc_checksum(payload))
    } else {
        let (header, payload) = Icmpv6Header::from_slice(&bytes[at..]).unwrap();
        let (src, dst) = (bytes[L3 + 8..L3 + 24].try_into(), bytes[L3 + 24..L3 + 40].try_into());
        let computed = header.icmp_type.calc_checksum(src.unwrap(), dst.unwrap(), payload).unwrap();
        (header.checksum, computed)
    };
    (stated, computed)
}

#[test]
fn given_an_echo_request_of_zeros_when_it_is_answered_then_the_reply_has_a_right_checksum() {
    for (sample, kind) in [(Sample::default(), 8), (Sample::v6(), 128)] {
        let (src, dst, is_v4) = (sample.src, sample.dst, sample.src.is_ipv4());
        let echo = Sent {
            src,
            dst,
            ttl: 9,
            options: Vec::new(),
            kind,
            code: 0,
            rest: [0; 4],
            payload: vec![0; 56],
        };
        let mut bytes = echo.bytes();
        answer_echo(&mut Frame::from_slice(&mut bytes)).unwrap();
        let (stated, computed) = icmp_checksums(&bytes, L3 + if is_v4 { 20 } else { 40 }, is_v4);
        assert_eq!(stated, computed, "{src}");
    }
}

#[test]
fn given_icmp_of_any_type_when_its_quote_is_asked_for_then_only_errors_have_one() {
    for (sample, errors) in [(Sample::default(), vec![3, 11, 12]), (Sample::v6(), vec![1, 2, 3, 4])]
    {
        let found: Vec<u8> = (0..=255)
            .filter(|&kind| {
                let sent = Sent { kind, ..error(sample.dst, &sample, 128, &[]) };
                quoted_in(&sent.bytes()).is_some()
            })
            .collect();
        assert_eq!(found, errors);
    }
}

#[test]
fn given_an_unusable_quote_when_it_is_asked_for_then_there_is_none() {
    let v4 = error(Sample::default().dst, &Sample::default(), 28, &[]);
    let v6 = error(Sample::v6().dst, &Sample::v6(), 48, &[]);
    let fragment = Sample {
        extensions: Ipv6Extensions {
            fragment: Some(whole_packet_fragment()),
            ..Ipv6Extensions::default()
        },
        ..Sample::v6()
    };
    let fragment = error(fragment.dst, &fragment, 56, &[]);
    let options = Sample {
        extensions: Ipv6Extensions {
            hop_by_hop_options: Some(raw_extension(0)),
            ..Ipv6Extensions::default()
        },
        ..Sample::v6()
    };
    let options = error(options.dst, &options, 56, &[]);
    let edited = |sent: &Sent, at: usize, byte: u8| {
        let mut sent = sent.clone();
        sent.payload[at] = byte;
        sent
    };
    let cut =
        |sent: &Sent, len: usize| Sent { payload: sent.payload[..len].to_vec(), ..sent.clone() };
    let cases = [
        ("IPv4", v4.clone(), true),
        ("IPv4, first fragment", edited(&v4, 6, 0x20), true),
        ("IPv4, later fragment", edited(&v4, 7, 1), false),
        ("IPv4, later fragment, far", edited(&v4, 6, 0x10), false),
        ("IPv4, version 6", edited(&v4, 0, 0x65), false),
        ("IPv4, header of 16 bytes", edited(&v4, 0, 0x44), false),
        ("IPv4, options that are not quoted", edited(&v4, 0, 0x4f), false),
        ("IPv4, ICMP", edited(&v4, 9, 1), false),
        ("IPv4, ports only", cut(&v4, 24), true),
        ("IPv4, half of the ports", cut(&v4, 22), false),
        ("IPv6", v6.clone(), true),
        ("IPv6, version 4", edited(&v6, 0, 0x40), false),
        ("IPv6, ICMPv6", edited(&v6, 6, 58), false),
        ("IPv6, half of the ports", cut(&v6, 42), false),
        ("IPv6, whole in a fragment", fragment.clone(), true),
        ("IPv6, first fragment", edited(&fragment, 43, 1), true),
        ("IPv6, later fragment", edited(&fragment, 43, 8), false),
        ("IPv6, options", options, false),
    ];
    for (name, sent, expected) in cases {
        let mut bytes = sent.bytes();
        // Ethernet's padding is no part of the quote.
        bytes.extend([0; 40]);
        assert_eq!(quoted_in(&bytes).is_some(), expected, "{name}");
    }
    let mut mapped = v6;
    mapped.payload[8..24].copy_from_slice(&Address::from_v4_word(7).bytes);
    assert_eq!(quoted_in(&mapped.bytes()), None, "IPv6 from an IPv4-mapped address");
}

#[test]
fn given_an_error_at_its_last_hop_when_translated_then_it_ends_here_unchanged() {
    for sample in [Sample::default(), Sample::v6()] {
        let to =
            NatRewrite { addr: sample.dst.into(), sport: 1, dport: 2, kind: FlowKind::Original };
        for ttl in [0, 1] {
            let before = Sent { ttl, ..error(sample.dst, &sample, 128, &[]) }.bytes();
            let quote = quoted_in(&before).unwrap();
            let mut after = before.clone();
            let sent = translate_error(
                &mut Frame::from_slice(&mut after),
                &quote,
                &to,
                other(&quote, &to),
                HOP,
            );
            assert_eq!((sent, after), (Err(Verdict::TtlExpired), before));
        }
    }
}
