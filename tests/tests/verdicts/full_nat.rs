//! Flows whose backend sees a source of ours: full NAT, between families, and backends as clients.

use std::{collections::HashSet, net::SocketAddr};

use slb_common::{
    abi::{self, NextHop},
    verdict::Verdict,
};

use crate::{
    fixture::{
        FAMILIES, Outcome, SOURCES, Slb, answer, at, backend, client, datagram, forwarded, id,
        port, sender, syn, vip, with_slb,
    },
    frame::{ACK, Extension, Frame, L3, Transport, seal_v4},
    lab::{FIRST, LAN, LAN_MAC, ROUTER, WAN},
};

/// A flow of a client's family to a backend's, and its answers; gives what the backend sees as source.
fn talks(slb: &mut Slb<'_>, case: &str, frame: &Frame, inside: SocketAddr) -> SocketAddr {
    let family = usize::from(inside.is_ipv6());
    let run = slb.run(WAN, &frame.bytes());
    assert_eq!(run.verdict, Verdict::Forwarded, "{case}");
    let source = sender(&run.bytes, family);
    assert!(SOURCES[family].contains(&source.ip().to_string().as_str()), "{case}: from {source}");
    assert!((1_024..32_768).contains(&source.port()), "{case}: from {source}");
    let expected = Frame { src: source, dst: inside, ..frame.clone() };
    assert_eq!(run.bytes, between(&expected, frame).sent_as(FIRST), "{case}");

    let reply = answer(&between(&expected, frame).0);
    let outside = Frame { src: frame.dst, dst: frame.src, ..reply.clone() };
    let run = slb.run(LAN, &reply.bytes());
    assert_eq!(run.verdict, Verdict::Replied, "{case}");
    assert_eq!(run.bytes, between(&outside, &reply).sent_as(ROUTER), "{case}");
    source
}

/// Writes what a packet that becomes one of IPv4 is to have: up to 1 260 bytes it may be fragmented (RFC 7915, section
/// 5.1). Its identification is random: [`Slb::run`] makes that 0.
pub(crate) fn may_be_fragmented(bytes: &mut [u8]) {
    let len = u16::from_be_bytes([bytes[L3 + 2], bytes[L3 + 3]]);
    bytes[L3 + 4..L3 + 8].copy_from_slice(&[0, 0, if len > 1_260 { 0x40 } else { 0 }, 0]);
    seal_v4(bytes);
}

/// A frame that was translated from another family looks a bit different.
pub(crate) struct Between(pub Frame, bool);

pub(crate) fn between(frame: &Frame, from: &Frame) -> Between {
    let crosses = frame.src.is_ipv4() != from.src.is_ipv4();
    let mut frame = frame.clone();
    if crosses {
        (frame.v4_options, frame.extensions) = (Vec::new(), Vec::new());
    }
    Between(frame, crosses)
}

impl Between {
    pub(crate) fn sent_as(&self, hop: NextHop) -> Vec<u8> {
        let mut bytes = self.0.clone().sent(hop).bytes();
        if self.1 {
            // Traffic class: that of the other family. No identification, no flow label.
            if self.0.src.is_ipv4() {
                bytes[L3 + 1] = 0xa5;
                may_be_fragmented(&mut bytes);
            } else {
                bytes[L3..L3 + 4].copy_from_slice(&[0x6a, 0xa0, 0, 0]);
            }
        }
        bytes
    }
}

#[test]
#[ignore = "needs root"]
fn given_full_nat_when_clients_come_then_the_backend_sees_the_gateway_and_they_see_the_vip() {
    with_slb(|slb| {
        for family in FAMILIES {
            for sport in [1_000, 40_000] {
                let from = client(family, sport);
                let tcp = syn(from, vip(family, port::FULL));
                let inside = backend(0, family, port::FULL_BACKEND);
                let source = talks(slb, "SYN", &tcp, inside);
                let later = tcp.flags(ACK);
                assert_eq!(talks(slb, "ACK", &later, inside), source, "it stays");
                let large = Frame { payload: vec![7; 5_000], ..later };
                assert_eq!(talks(slb, "large", &large, inside), source, "it stays");
                let udp = datagram(from, vip(family, port::FULL_UDP));
                let inside = backend(0, family, port::FULL_UDP_BACKEND);
                let source = talks(slb, "UDP", &udp, inside);
                let bare = Frame { transport: Transport::Udp { checksum: false }, ..udp };
                assert_eq!(talks(slb, "no checksum", &bare, inside), source, "it stays");
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_vip_of_another_family_when_clients_come_then_they_are_translated_both_ways() {
    with_slb(|slb| {
        for family in FAMILIES {
            for sport in [1_000, 40_000] {
                let from = client(family, sport);
                let tcp = syn(from, vip(family, port::OTHER));
                let inside = backend(0, 1 - family, port::OTHER_BACKEND);
                let source = talks(slb, "SYN", &tcp, inside);
                let later = tcp.flags(ACK);
                assert_eq!(talks(slb, "ACK", &later, inside), source, "it stays");
                let more = if family == 0 {
                    Frame { v4_options: vec![1; 8], ..later }
                } else {
                    let padding = etherparse::IpNumber::IPV6_DESTINATION_OPTIONS;
                    Frame { extensions: vec![Extension::padding(padding)], ..later }
                };
                assert_eq!(talks(slb, "options", &more, inside), source, "it stays");
                let udp = datagram(from, vip(family, port::OTHER_UDP));
                talks(slb, "UDP", &udp, backend(0, 1 - family, port::OTHER_UDP_BACKEND));
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_packets_that_the_other_family_cannot_have_when_they_come_then_they_are_dropped() {
    with_slb(|slb| {
        let udp = datagram(client(0, 1_000), vip(0, port::OTHER_UDP));
        slb.run(WAN, &udp.bytes());
        let dropped = Outcome::Untouched(Verdict::Untranslatable);
        let bare = Frame { transport: Transport::Udp { checksum: false }, ..udp };
        slb.client_sends("no checksum", &bare, &dropped);
        let udp = datagram(client(1, 1_000), vip(1, port::OTHER_UDP));
        slb.run(WAN, &udp.bytes());
        let first = Frame { extensions: vec![Extension::Fragment(0, true)], ..udp };
        slb.client_sends("a fragment", &first, &dropped);
    });
}

#[test]
#[ignore = "needs root"]
fn given_many_flows_when_they_go_to_one_backend_then_no_two_have_the_same_source() {
    with_slb(|slb| {
        for family in FAMILIES {
            let mut seen = HashSet::new();
            for sport in 2_000..2_600 {
                let tcp = syn(client(family, sport), vip(family, port::FULL));
                let source = talks(slb, "many", &tcp, backend(0, family, port::FULL_BACKEND));
                assert!(seen.insert(source), "{source} twice");
            }
            let addresses: HashSet<_> = seen.iter().map(SocketAddr::ip).collect();
            assert_eq!(addresses.len(), 2, "all addresses are used");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_packet_above_the_mtu_when_it_changes_its_family_then_the_mtu_is_told_in_that_of_the_sender()
 {
    with_slb(|slb| {
        for family in FAMILIES {
            let open = syn(client(family, 1_000), vip(family, port::OTHER));
            slb.run(WAN, &open.bytes());
            slb.backend(id::OTHER + family as u32, |backend| backend.mtu = 1_400);
            // The header of the backend's family, and TCP's.
            let fits = 1_400 - [60, 40][family];
            let with = |len| Frame { payload: vec![7; len], ..open.clone().flags(ACK) };
            assert_eq!(slb.run(WAN, &with(fits).bytes()).verdict, Verdict::Forwarded);
            let run = slb.run(WAN, &with(fits + 1).bytes());
            assert_eq!(run.verdict, Verdict::TooBig);
            let at = L3 + [20, 40][family] + 6;
            let told = u16::from_be_bytes([run.bytes[at], run.bytes[at + 1]]);
            assert_eq!(told, [1_380, 1_420][family]);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_as_client_of_its_own_vip_when_it_talks_then_answers_find_it() {
    with_slb(|slb| {
        // The kernel knows the way to them.
        slb.netns
            .ip("neigh add 192.0.12.1 lladdr 02:00:00:00:03:01 dev lan0 nud permanent\n\
                 neigh add 2001:db8:ff:12::1 lladdr 02:00:00:00:03:01 dev lan0 nud permanent\n\
                 route add 10.0.0.0/24 via 192.0.12.1\n\
                 route add 2001:db8:a::/64 via 2001:db8:ff:12::1\n")
            .expect("routes");
        for family in FAMILIES {
            let number = id::HTTP + family as u32;
            slb.backend(number, |backend| {
                backend.source = 1 + 2 * family as u16;
                backend.sources = 2;
            });
            // Itself, and another on the same side.
            for host in [backend(0, family, 5_000), backend(2, family, 5_001)] {
                let inside = backend(0, family, port::HTTP_BACKEND);
                let own = syn(host, vip(family, port::HTTP));
                let own = Frame { src_mac: FIRST.dst_mac, dst_mac: LAN_MAC, ..own };
                for frame in [own.clone(), own.flags(ACK)] {
                    let run = slb.run(LAN, &frame.bytes());
                    assert_eq!(run.verdict, Verdict::Forwarded);
                    let source = sender(&run.bytes, family);
                    assert!(SOURCES[family].contains(&source.ip().to_string().as_str()));
                    let expected = Frame { src: source, dst: inside, ..frame.clone() };
                    assert_eq!(run.bytes, expected.clone().sent(FIRST).bytes());
                    let reply = answer(&expected);
                    let run = slb.run(LAN, &reply.bytes());
                    let outside = Frame { src: frame.dst, dst: frame.src, ..reply };
                    assert_eq!(run.verdict, Verdict::Replied, "{host}");
                    // Back where it came from.
                    let back = NextHop { ifindex: LAN, dst_mac: FIRST.dst_mac, src_mac: LAN_MAC };
                    assert_eq!(run.bytes, outside.sent(back).bytes());
                }
            }
            // On another side it is a client like any other.
            let host = backend(0, family, 6_000);
            let other = syn(host, vip(family, port::HTTP));
            slb.client_sends(
                "routed",
                &other,
                &forwarded(other.to(backend(0, family, port::HTTP_BACKEND)), FIRST),
            );
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_full_nat_when_a_datagram_comes_in_fragments_then_all_get_the_same_ends() {
    with_slb(|slb| {
        let udp = datagram(client(0, 1_000), vip(0, port::FULL_UDP));
        let inside = backend(0, 0, port::FULL_UDP_BACKEND);
        let source = talks(slb, "whole", &udp, inside);
        let fragment = |frame: &Frame, flags: [u8; 2]| {
            let mut bytes = Frame { payload: vec![7; 64], ..frame.clone() }.bytes();
            bytes[L3 + 6..L3 + 8].copy_from_slice(&flags);
            crate::frame::seal_v4(&mut bytes);
            bytes
        };
        let expected = Frame { src: source, dst: inside, ..udp.clone() }.sent(FIRST);
        let first = Outcome::Bytes(Verdict::Forwarded, LAN, fragment(&expected, [0x20, 0]));
        slb.check("first", WAN, &fragment(&udp, [0x20, 0]), &first);
        // The rest has no ports: what stands there stays.
        let mut input = fragment(&udp, [0, 9]);
        let mut output = fragment(&expected, [0, 9]);
        let l4 = L3 + 20;
        input[l4..l4 + 8].fill(7);
        output[l4..l4 + 8].fill(7);
        let later = Outcome::Bytes(Verdict::Forwarded, LAN, output);
        slb.check("later", WAN, &input, &later);
    });
}

#[test]
#[ignore = "needs root"]
fn given_full_nat_when_a_backend_talks_to_the_gateway_itself_then_it_is_left_alone() {
    with_slb(|slb| {
        for family in FAMILIES {
            let own = at(SOURCES[family][0], 40_000);
            let check = answer(&syn(own, backend(0, family, port::FULL_BACKEND)));
            slb.backend_sends("a health check", &check, &Outcome::Untouched(Verdict::NotOurs));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_flow_when_the_forwarding_of_its_group_changes_then_it_begins_anew() {
    with_slb(|slb| {
        for family in FAMILIES {
            let from = client(family, 1_000);
            let (to, number) = (vip(family, port::SIP), id::SIP + family as u32);
            let inside = backend(0, family, port::SIP_BACKEND);
            let udp = datagram(from, to);
            slb.client_sends("nat", &udp, &forwarded(udp.to(inside), FIRST));
            slb.backend(number, |backend| {
                backend.mode = abi::Mode::FULL;
                backend.source = 1 + 2 * family as u16;
                backend.sources = 2;
            });
            talks(slb, "full-nat", &udp, inside);
            slb.backend(number, |backend| backend.mode = abi::Mode::DSR);
            slb.client_sends("dsr", &udp, &forwarded(udp.clone(), FIRST));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_full_nat_when_the_way_to_the_backend_is_not_known_then_its_packets_are_dropped() {
    with_slb(|slb| {
        for family in FAMILIES {
            slb.backend(id::FULL + family as u32, |backend| backend.hop = NextHop::UNRESOLVED);
            let tcp = syn(client(family, 1_000), vip(family, port::FULL));
            slb.client_sends("lost", &tcp, &Outcome::Untouched(Verdict::NoNeighbour));
        }
    });
}
