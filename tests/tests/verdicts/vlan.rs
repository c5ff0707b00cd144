//! VLAN tags, and frames that are longer than one buffer.

use slb_common::{abi::NO_LISTENER_RESET, verdict::Verdict};

use crate::{
    fixture::{
        FAMILIES, Outcome, answer, backend, client, datagram, port, reset, syn, vip, with_slb,
    },
    frame::{ACK, Frame, tagged},
    lab::{FIRST, LAN, ROUTER, WAN},
};

/// 802.1Q; 802.1ad with 802.1Q inside; what came before 802.1ad.
const TAGS: [&[(u16, u16)]; 4] = [
    &[(0x8100, 0x2064)],
    &[(0x88a8, 0x0fff), (0x8100, 0xe001)],
    &[(0x9100, 1)],
    &[(0x8100, 0), (0x8100, 2)],
];

#[test]
#[ignore = "needs root"]
fn given_a_tagged_packet_when_it_is_balanced_then_its_tags_are_kept() {
    with_slb(|slb| {
        for (family, tags) in
            FAMILIES.into_iter().flat_map(|family| TAGS.map(|tags| (family, tags)))
        {
            let from = client(family, 1_000);
            let rows = [
                (syn(from, vip(family, port::HTTP)), port::HTTP_BACKEND),
                (datagram(from, vip(family, port::DNS)), port::DNS_BACKEND),
                (syn(from, vip(family, port::TURN)), port::TURN_BACKEND),
                (datagram(from, vip(family, port::SIP)), port::SIP_BACKEND),
            ];
            for (frame, inside) in rows {
                let case = format!("{tags:x?} {:?}", frame.transport);
                let translated = frame.to(backend(0, family, inside));
                let sent = tagged(&translated.clone().sent(FIRST).bytes(), tags);
                let expected = Outcome::Bytes(Verdict::Forwarded, FIRST.ifindex, sent);
                slb.check(&case, WAN, &tagged(&frame.bytes(), tags), &expected);
                let reply = answer(&translated);
                let sent = tagged(&reply.from(frame.dst).sent(ROUTER).bytes(), tags);
                let expected = Outcome::Bytes(Verdict::Replied, ROUTER.ifindex, sent);
                slb.check(&case, LAN, &tagged(&reply.bytes(), tags), &expected);
            }
            let direct = syn(from, vip(family, port::DSR));
            let sent = tagged(&direct.clone().sent(FIRST).bytes(), tags);
            let expected = Outcome::Bytes(Verdict::Forwarded, FIRST.ifindex, sent);
            slb.check("direct return", WAN, &tagged(&direct.bytes(), tags), &expected);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_tagged_packet_when_it_is_not_balanced_then_it_is_as_it_was() {
    with_slb(|slb| {
        for (family, tags) in
            FAMILIES.into_iter().flat_map(|family| TAGS.map(|tags| (family, tags)))
        {
            let from = client(family, 1_000);
            let cases = [
                (syn(from, vip(family, 9)), Verdict::NoListener),
                (syn(from, client(family, 9)), Verdict::NotOurs),
                (syn(from, vip(family, port::HTTP)).ttl(1), Verdict::TtlExpired),
                (syn(from, vip(family, port::EMPTY)), Verdict::NoBackend),
            ];
            for (frame, verdict) in cases {
                let run = slb.run(WAN, &tagged(&frame.bytes(), tags));
                assert_eq!(run.verdict, verdict, "{tags:x?}");
                if run.verdict.action() == slb_common::verdict::Action::Pass {
                    assert_eq!(run.bytes, tagged(&frame.bytes(), tags), "{tags:x?}");
                }
            }
            let three = [tags, &[(0x8100, 9), (0x8100, 10)]].concat();
            let deep = tagged(&syn(from, vip(family, port::HTTP)).bytes(), &three);
            slb.check("three or more", WAN, &deep, &Outcome::Untouched(Verdict::NotOurs));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_tagged_packet_when_it_is_answered_then_so_is_its_tag() {
    with_slb(|slb| {
        slb.set(|settings| settings.no_listener = NO_LISTENER_RESET);
        for (family, tags) in
            FAMILIES.into_iter().flat_map(|family| TAGS.map(|tags| (family, tags)))
        {
            let stray = syn(client(family, 1_000), vip(family, port::RING)).flags(ACK);
            let Outcome::Answered(verdict, expected) = reset(&stray) else { panic!("a reset") };
            let expected = Outcome::Bytes(verdict, WAN, tagged(&expected.bytes(), tags));
            slb.check("a reset", WAN, &tagged(&stray.bytes(), tags), &expected);
            let unheard = datagram(client(family, 1_000), vip(family, 9));
            let plain = slb.run(WAN, &unheard.bytes());
            let with_tags = slb.run(WAN, &tagged(&unheard.bytes(), tags));
            assert_eq!((plain.verdict, with_tags.verdict), (Verdict::Refused, Verdict::Refused));
            assert_eq!(with_tags.bytes, tagged(&plain.bytes, tags));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_cut_frame_with_tags_when_it_arrives_then_nothing_comes_of_it() {
    with_slb(|slb| {
        for tags in TAGS {
            let bytes = tagged(&syn(client(0, 1_000), vip(0, port::HTTP)).bytes(), tags);
            for len in 14..bytes.len() {
                let verdict = slb.run(WAN, &bytes[..len]).verdict;
                let known = len >= 14 + 4 * tags.len() + 20;
                let expected = if known { Verdict::Truncated } else { Verdict::NotOurs };
                assert_eq!(verdict, expected, "{len} bytes of {bytes:02x?}");
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_packet_in_several_buffers_when_it_is_balanced_then_none_of_it_is_lost() {
    with_slb(|slb| {
        for family in FAMILIES {
            let from = client(family, 1_000);
            // The kernel puts 4096 bytes, less than the headroom, into the first.
            for len in [3_500, 4_000, 8_900, 20_000] {
                let payload: Vec<u8> = (0..len).map(|at| (at * 7) as u8).collect();
                let rows = [
                    (syn(from, vip(family, port::HTTP)).flags(ACK), port::HTTP_BACKEND),
                    (datagram(from, vip(family, port::DNS)), port::DNS_BACKEND),
                ];
                for (frame, inside) in rows {
                    let frame = Frame { payload: payload.clone(), ..frame };
                    let translated = frame.to(backend(0, family, inside));
                    let case = format!("{len} bytes, {:?}", frame.transport);
                    let expected = super::fixture::forwarded(translated.clone(), FIRST);
                    slb.client_sends(&case, &frame, &expected);
                    let tags = TAGS[1];
                    let sent = tagged(&translated.sent(FIRST).bytes(), tags);
                    let expected = Outcome::Bytes(Verdict::Forwarded, FIRST.ifindex, sent);
                    slb.check(&case, WAN, &tagged(&frame.bytes(), tags), &expected);
                }
                let other = Frame { payload, ..syn(from, client(family, 9)) };
                slb.client_sends("others", &other, &Outcome::Untouched(Verdict::NotOurs));
            }
        }
    });
}
