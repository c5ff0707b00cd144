//! IP in IP and GUE, to backends that have the VIP.

use std::{
    collections::HashSet,
    net::{Ipv4Addr, Ipv6Addr},
};

use etherparse::{EtherType, Ethernet2Header, IpNumber, Ipv4Header, Ipv6Header, UdpHeader};
use slb_common::{abi::Seed, hash, tunnel::GUE_PORT, verdict::Verdict};

use crate::{
    fixture::{
        BACKENDS, FAMILIES, Outcome, TUNNELS, client, datagram, id, port, syn, vip, with_slb,
    },
    frame::{ACK, Frame, L3, SYN, Transport, seal_v4},
    lab::{FIRST, WAN},
};

/// What a frame looks like in a tunnel of the family `outer`, by another implementation.
fn inside(frame: &Frame, outer: usize, is_gue: bool) -> Vec<u8> {
    let hash = hash::flow(&frame.key(), &Seed::PUBLIC);
    let packet = &frame.clone().ttl(frame.ttl - 1).bytes()[L3..];
    let is_v4 = frame.src.is_ipv4();
    let number = if is_v4 { IpNumber::IPV4 } else { IpNumber::IPV6 };
    let traffic_class = if is_v4 { packet[1] } else { packet[0] << 4 | packet[1] >> 4 };
    let mut body = Vec::new();
    if is_gue {
        let udp = UdpHeader {
            source_port: 0xc000 | hash as u16,
            destination_port: GUE_PORT,
            length: (UdpHeader::LEN + 4 + packet.len()) as u16,
            checksum: 0,
        };
        body.extend(udp.to_bytes());
        body.extend([0, number.0, 0, 0]);
    }
    body.extend(packet);
    let proto = if is_gue { IpNumber::UDP } else { number };
    let network = match outer {
        0 => {
            let [a, b, ..] = TUNNELS[0].parse::<Ipv4Addr>().expect("an address").octets();
            let [c, d] = ((hash >> 16) as u16).to_be_bytes();
            let dst = BACKENDS[0][0].parse::<Ipv4Addr>().expect("an address").octets();
            let mut ip = Ipv4Header::new(body.len() as u16, 64, proto, [a, b, c, d], dst)
                .expect("a short packet");
            ip.dont_fragment = true;
            ip.identification = if is_v4 { 0xbeef } else { 0 };
            ip.dscp = (traffic_class >> 2).try_into().expect("6 bits");
            ip.ecn = (traffic_class & 3).try_into().expect("2 bits");
            ip.header_checksum = ip.calc_header_checksum();
            ip.to_bytes().to_vec()
        }
        _ => {
            let mut source = TUNNELS[1].parse::<Ipv6Addr>().expect("an address").octets();
            source[8..].copy_from_slice(&hash.to_be_bytes());
            let ip = Ipv6Header {
                traffic_class,
                flow_label: (hash as u32 & 0x000f_ffff).try_into().expect("20 bits"),
                payload_length: body.len() as u16,
                next_header: proto,
                hop_limit: 64,
                source,
                destination: BACKENDS[0][1].parse::<Ipv6Addr>().expect("an address").octets(),
            };
            ip.to_bytes().to_vec()
        }
    };
    let eth = Ethernet2Header {
        source: FIRST.src_mac,
        destination: FIRST.dst_mac,
        ether_type: if outer == 0 { EtherType::IPV4 } else { EtherType::IPV6 },
    };
    [&eth.to_bytes()[..], &network, &body].concat()
}

/// A frame to each kind of tunnel, the family of the tunnel, and whether it is GUE.
fn rows(family: usize, sport: u16) -> [(Frame, usize, bool); 3] {
    let from = client(family, sport);
    [
        (syn(from, vip(family, port::IPIP)), family, false),
        (datagram(from, vip(family, port::GUE)), family, true),
        (syn(from, vip(family, port::CROSS)), 1 - family, false),
    ]
}

fn sent(bytes: Vec<u8>) -> Outcome {
    Outcome::Bytes(Verdict::Forwarded, FIRST.ifindex, bytes)
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_behind_a_tunnel_when_a_packet_arrives_then_it_gets_all_of_it_wrapped() {
    with_slb(|slb| {
        for family in FAMILIES {
            for (frame, outer, is_gue) in rows(family, 1_000) {
                for len in [0, 1, 3, 1_400, 5_000] {
                    let frame = Frame { payload: vec![7; len], ..frame.clone() };
                    let expected = sent(inside(&frame, outer, is_gue));
                    slb.client_sends(&format!("{len} bytes"), &frame, &expected);
                    let later = frame.flags(ACK);
                    let expected = sent(inside(&later, outer, is_gue));
                    slb.client_sends(&format!("{len} bytes, ACK"), &later, &expected);
                }
                let tags: &[(u16, u16)] = &[(0x88a8, 2), (0x8100, 3)];
                for (case, frame) in [("first", frame.clone()), ("ACK", frame.flags(ACK))] {
                    let tagged = crate::frame::tagged(&frame.bytes(), tags);
                    let expected = crate::frame::tagged(&inside(&frame, outer, is_gue), tags);
                    slb.check(&format!("{case}, tagged"), WAN, &tagged, &sent(expected));
                    let expired = frame.ttl(1);
                    let untouched = Outcome::Untouched(Verdict::TtlExpired);
                    slb.client_sends(&format!("{case}, TTL 1"), &expired, &untouched);
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_many_flows_when_they_go_through_a_tunnel_then_receivers_can_tell_them_apart() {
    with_slb(|slb| {
        for family in FAMILIES {
            for number in 0..3 {
                let sources: HashSet<Vec<u8>> = (1_000..1_064)
                    .map(|sport| {
                        let (frame, outer, _) = &rows(family, sport)[number];
                        let run = slb.run(WAN, &frame.bytes());
                        let at = if *outer == 0 { L3 + 12..L3 + 16 } else { L3 + 8..L3 + 24 };
                        run.bytes[at].to_vec()
                    })
                    .collect();
                assert!(sources.len() > 60, "{} sources of 64 flows", sources.len());
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_tunnel_that_takes_less_when_a_connection_begins_then_its_segments_are_made_to_fit() {
    with_slb(|slb| {
        for family in FAMILIES {
            for (id, to, outer) in
                [(id::IPIP, port::IPIP, family), (id::CROSS, port::CROSS, 1 - family)]
            {
                let mtu = 1_440 + 20 * family as u32;
                slb.backend(id + family as u32, |backend| backend.mtu = mtu);
                for (offered, kept) in [(1_460, 1_400), (1_400, 1_400), (536, 536)] {
                    let syn = |mss: u16| {
                        let [high, low] = mss.to_be_bytes();
                        let options = vec![1, 1, 2, 4, high, low, 1, 0];
                        let transport = Transport::Tcp { flags: SYN, options };
                        let frame = syn(client(family, 1_000), vip(family, to));
                        Frame { transport, payload: Vec::new(), ..frame }
                    };
                    let expected = sent(inside(&syn(kept), outer, false));
                    slb.client_sends(&format!("{offered}"), &syn(offered), &expected);
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_packet_in_fragments_when_it_goes_through_a_tunnel_then_each_does() {
    with_slb(|slb| {
        let frame = datagram(client(0, 1_000), vip(0, port::GUE));
        let mut first = Frame { payload: vec![7; 64], ..frame.clone() }.bytes();
        first[L3 + 6] = 0x20;
        seal_v4(&mut first);
        let mut second = first.clone();
        second[L3 + 6..L3 + 8].copy_from_slice(&[0, 9]);
        seal_v4(&mut second);
        let wrapped = |bytes: &[u8]| {
            let whole = Frame { payload: vec![7; 64], ..frame.clone() };
            let mut outer = inside(&whole, 0, true);
            let at = outer.len() - (bytes.len() - L3);
            outer[at..].copy_from_slice(&bytes[L3..]);
            // One hop less, and what may be fragmented inside may be outside.
            let mut packet = [&[0; L3], &bytes[L3..]].concat();
            packet[L3 + 8] -= 1;
            seal_v4(&mut packet);
            outer[at..].copy_from_slice(&packet[L3..]);
            outer[L3 + 6] = 0;
            seal_v4(&mut outer);
            outer
        };
        slb.check("first", WAN, &first, &sent(wrapped(&first)));
        slb.check("second", WAN, &second, &sent(wrapped(&second)));
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_behind_a_tunnel_when_the_way_there_is_not_known_then_its_packets_are_dropped() {
    with_slb(|slb| {
        for family in FAMILIES {
            for id in [id::IPIP, id::GUE, id::CROSS] {
                slb.backend(id + family as u32, |backend| {
                    backend.hop = slb_common::abi::NextHop::UNRESOLVED;
                });
            }
            for (frame, ..) in rows(family, 1_000) {
                for frame in [frame.clone(), frame.flags(ACK)] {
                    slb.client_sends("lost", &frame, &Outcome::Untouched(Verdict::NoNeighbour));
                }
            }
        }
    });
}
