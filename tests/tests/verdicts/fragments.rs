//! Fragments of IPv4 and IPv6: the others go where the first went.

use std::net::IpAddr;

use slb_common::{abi::NextHop, verdict::Verdict};

use crate::{
    fixture::{
        FAMILIES, Outcome, Slb, answer, backend, client, datagram, id, port, syn, vip, with_slb,
    },
    frame::{Extension, Frame, L3, seal_v4},
    lab::{FIRST, LAN, ROUTER, WAN},
};

/// Bytes of what is fragmented in each fragment but the last.
const PART: usize = 600;

/// The fragments of a frame's packet, as any router or host would make them.
pub(crate) fn fragments(frame: &Frame, id: u16) -> Vec<Vec<u8>> {
    let bytes = frame.bytes();
    let (head, body) = bytes.split_at(frame.l4());
    let parts: Vec<&[u8]> = body.chunks(PART).collect();
    let last = parts.len() - 1;
    let whole = |number: usize, part: &&[u8]| {
        let (offset, more) = ((number * PART / 8) as u16, number < last);
        match frame.src.ip() {
            IpAddr::V4(_) => {
                let mut bytes = [head, part].concat();
                let len = (bytes.len() - L3) as u16;
                bytes[L3 + 2..L3 + 4].copy_from_slice(&len.to_be_bytes());
                bytes[L3 + 4..L3 + 6].copy_from_slice(&id.to_be_bytes());
                let flags = offset | u16::from(more) << 13;
                bytes[L3 + 6..L3 + 8].copy_from_slice(&flags.to_be_bytes());
                seal_v4(&mut bytes);
                bytes
            }
            IpAddr::V6(_) => {
                let next = bytes[L3 + 6];
                let mut header = vec![next, 0];
                header.extend((offset << 3 | u16::from(more)).to_be_bytes());
                header.extend([0, 0]);
                header.extend(id.to_be_bytes());
                let mut bytes = [head, &header, part].concat();
                bytes[L3 + 6] = 44;
                let len = (8 + part.len()) as u16;
                bytes[L3 + 4..L3 + 6].copy_from_slice(&len.to_be_bytes());
                bytes
            }
        }
    };
    parts.iter().enumerate().map(|(number, part)| whole(number, part)).collect()
}

/// Every fragment of `frame` becomes the same one of `expected`.
fn follow(
    slb: &mut Slb<'_>,
    case: &str,
    ingress: u32,
    frame: &Frame,
    expected: &Frame,
    (verdict, hop): (Verdict, NextHop),
    id: u16,
) {
    let expected = fragments(&expected.clone().sent(hop), id);
    for (number, (input, output)) in fragments(frame, id).iter().zip(expected).enumerate() {
        let case = format!("{case}: fragment {number}");
        slb.check(&case, ingress, input, &Outcome::Bytes(verdict, hop.ifindex, output));
    }
}

#[test]
#[ignore = "needs root"]
fn given_a_packet_in_fragments_when_they_arrive_in_turn_then_all_go_where_the_first_does() {
    with_slb(|slb| {
        for family in FAMILIES {
            let from = client(family, 1_000);
            let payload = vec![7; 2_000];
            let forwarded = (Verdict::Forwarded, FIRST);
            for (number, to, inside) in
                [(1, port::DNS, port::DNS_BACKEND), (2, port::SIP, port::SIP_BACKEND)]
            {
                let dns = Frame { payload: payload.clone(), ..datagram(from, vip(family, to)) };
                let translated = dns.to(backend(0, family, inside));
                follow(slb, "UDP", WAN, &dns, &translated, forwarded, number);
                let reply = Frame { payload: payload.clone(), ..answer(&translated) };
                let outside = reply.from(dns.dst);
                let replied = (Verdict::Replied, ROUTER);
                follow(slb, "its answer", LAN, &reply, &outside, replied, number);
            }
            let http = Frame { payload: payload.clone(), ..syn(from, vip(family, port::HTTP)) };
            let translated = http.to(backend(0, family, port::HTTP_BACKEND));
            follow(slb, "TCP", WAN, &http, &translated, forwarded, 3);
            let direct = Frame { payload: payload.clone(), ..syn(from, vip(family, port::DSR)) };
            follow(slb, "direct return", WAN, &direct, &direct, forwarded, 4);
            let sip = Frame { payload, ..datagram(from, vip(family, port::DSR_UDP)) };
            follow(slb, "direct return in turn", WAN, &sip, &sip, forwarded, 5);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_fragment_whose_first_has_not_been_seen_when_it_arrives_then_it_is_dropped() {
    with_slb(|slb| {
        for family in FAMILIES {
            let payload = vec![7; 1_300];
            let dns = datagram(client(family, 1_000), vip(family, port::DNS));
            let dns = Frame { payload, ..dns };
            let [first, second, third] = &fragments(&dns, 7)[..] else { panic!("three parts") };
            let dropped = Outcome::Untouched(Verdict::Fragment);
            slb.check("too early", WAN, second, &dropped);
            slb.run(WAN, first);
            // Another packet of the same flow, and the same number from another client.
            slb.check("another", WAN, &fragments(&dns, 8)[1], &dropped);
            let other = dns.from(super::fixture::client_of(104, family, 1_000));
            slb.check("another client's", WAN, &fragments(&other, 7)[1], &dropped);
            for late in [third, second] {
                assert_eq!(slb.run(WAN, late).verdict, Verdict::Forwarded, "in any order");
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_first_fragment_of_long_ago_when_another_comes_then_they_do_not_belong_together() {
    with_slb(|slb| {
        // One jiffy has always passed when two more have been waited for.
        slb.set(|settings| settings.fragment_jiffies = 1_u32.wrapping_neg());
        for family in FAMILIES {
            let dns = datagram(client(family, 1_000), vip(family, port::DNS));
            let parts = fragments(&Frame { payload: vec![7; 1_300], ..dns }, 7);
            assert_eq!(slb.run(WAN, &parts[0]).verdict, Verdict::Forwarded);
            slb.check("later", WAN, &parts[1], &Outcome::Untouched(Verdict::Fragment));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_fragments_that_are_the_kernels_when_they_arrive_then_all_of_them_are() {
    with_slb(|slb| {
        for family in FAMILIES {
            let from = client(family, 1_000);
            let payload = vec![7; 1_300];
            let unheard = Frame { payload: payload.clone(), ..datagram(from, vip(family, 9)) };
            for part in fragments(&unheard, 1) {
                slb.check("no listener", WAN, &part, &Outcome::Untouched(Verdict::NoListener));
            }
            let other = Frame { payload, ..datagram(from, client(family, 9)) };
            for part in fragments(&other, 1) {
                slb.check("not ours", WAN, &part, &Outcome::Untouched(Verdict::NotOurs));
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_without_a_neighbour_when_fragments_arrive_then_the_kernel_gets_all_translated() {
    with_slb(|slb| {
        for family in FAMILIES {
            slb.backend(id::DNS + family as u32, |backend| backend.hop = NextHop::UNRESOLVED);
            let dns = datagram(client(family, 1_000), vip(family, port::DNS));
            let dns = Frame { payload: vec![7; 1_300], ..dns };
            let inside = fragments(&dns.to(backend(0, family, port::DNS_BACKEND)), 1);
            for (input, output) in fragments(&dns, 1).iter().zip(inside) {
                let run = slb.run(WAN, input);
                assert_eq!((run.verdict, run.bytes), (Verdict::ForwardedByKernel, output));
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_later_fragment_when_its_hop_limit_ends_then_it_does() {
    with_slb(|slb| {
        for family in FAMILIES {
            let dns = datagram(client(family, 1_000), vip(family, port::DNS));
            let dns = Frame { payload: vec![7; 1_300], ..dns };
            slb.run(WAN, &fragments(&dns, 1)[0]);
            let late = &fragments(&dns.ttl(1), 1)[1];
            slb.check("late", WAN, late, &Outcome::Untouched(Verdict::TtlExpired));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_extension_headers_when_a_packet_in_fragments_has_them_then_they_are_followed() {
    with_slb(|slb| {
        let from = client(1, 1_000);
        let pad = Extension::padding(etherparse::IpNumber::IPV6_HEADER_HOP_BY_HOP);
        for (offset, more, verdict) in [
            (0, true, Verdict::Forwarded),
            (1, true, Verdict::Forwarded),
            (0x1fff, false, Verdict::Forwarded),
        ] {
            let extensions = vec![pad.clone(), Extension::Fragment(offset, more)];
            let frame = Frame { extensions, ..datagram(from, vip(1, port::DNS)) };
            assert_eq!(slb.run(WAN, &frame.bytes()).verdict, verdict, "offset {offset}");
        }
    });
}
