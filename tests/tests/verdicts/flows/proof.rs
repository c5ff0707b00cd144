//! Who is where it says, and what others can do to its flow: attackers send from any address, and see no answers.

use std::net::SocketAddr;

use slb_common::{
    abi::{self, ConnState, REFRESH_JIFFIES, SLOT_KEEP, SLOT_LOOK},
    verdict::Verdict,
};

use super::{Flow, floods::flood};
use crate::{
    fixture::{
        FAMILIES, IDLE_JIFFIES, SOURCES, Slb, answer, at, backend, client, datagram, forwarded, id,
        port, replied, sender, syn, vip, with_capacity, with_slb,
    },
    frame::{ACK, FIN, Frame, RST, SYN},
    lab::{FIRST, LAN, ROUTER, WAN},
};

/// The number of a backend's SYN-ACK.
const ISS: u32 = 7_000;

/// TCP listeners whose flows have entries, one of each mode, and what their backends are reached at; `None`: as the VIP,
/// and they answer past the gateway.
fn modes(family: usize) -> [(&'static str, u16, Option<SocketAddr>); 6] {
    let of = |family, port| Some(backend(0, family, port));
    [
        ("nat", port::TURN, of(family, port::TURN_BACKEND)),
        ("shared", port::SHARED, of(family, port::SHARED_BACKEND)),
        ("full-nat", port::FULL, of(family, port::FULL_BACKEND)),
        ("between families", port::OTHER, of(1 - family, port::OTHER_BACKEND)),
        ("direct return", port::DSR, None),
        ("ipip", port::IPIP, None),
    ]
}

/// Has the listeners of direct return give each flow an entry, as in a slot that moves.
fn keep_entries(slb: &mut Slb<'_>, family: usize) {
    for (port, id) in [(port::DSR, id::DSR), (port::IPIP, id::IPIP)] {
        let slot = (id + family as u32) | SLOT_LOOK | SLOT_KEEP;
        slb.schedule(vip(family, port), abi::TCP, vec![slot]);
    }
}

fn sends(slb: &mut Slb<'_>, case: &str, frame: &Frame) -> Vec<u8> {
    let run = slb.run(WAN, &frame.bytes());
    assert_eq!(run.verdict, Verdict::Forwarded, "{case}: {frame:?}");
    run.bytes
}

fn state(slb: &Slb<'_>, frame: &Frame) -> ConnState {
    slb.flow(frame).expect("an entry").state()
}

/// Has a backend answer to `inside`, which it has got.
fn answers(slb: &mut Slb<'_>, case: &str, inside: &Frame, flags: u8, seq: u32) {
    let answer = Frame { seq, ..answer(inside) }.flags(flags);
    let verdict = slb.run(LAN, &answer.bytes()).verdict;
    // The way to clients that are spoofed is not known.
    let is_reply = matches!(verdict, Verdict::Replied | Verdict::RepliedByKernel);
    assert!(is_reply, "{case}: {verdict:?} {answer:?}");
}

/// What a backend at `to` gets of a frame, given the bytes that were sent to it.
fn inside(sent: &[u8], frame: &Frame, to: SocketAddr) -> Frame {
    Frame { src: sender(sent, usize::from(to.is_ipv6())), dst: to, ..frame.clone() }
}

/// A connection that is as good as it can be seen to be: proven where its answers pass.
fn establishes(slb: &mut Slb<'_>, case: &str, first: &Frame, to: Option<SocketAddr>) {
    let sent = sends(slb, case, first);
    let ack = Frame { ack: ISS + 1, ..first.clone() }.flags(ACK);
    if let Some(to) = to {
        answers(slb, case, &inside(&sent, first, to), SYN | ACK, ISS);
    } else {
        slb.age(first, REFRESH_JIFFIES + 10);
    }
    sends(slb, case, &ack);
    let expected = if to.is_some() { ConnState::ESTABLISHED } else { ConnState::AGED };
    assert!(state(slb, first).intersects(expected), "{case}: {:?}", state(slb, first));
}

/// From a spoofed address, in a network of its own for each number.
fn spoofed(family: usize, number: u32, dst: SocketAddr) -> Frame {
    let from = [
        format!("100.{}.{}.9", 64 + number / 256, number % 256),
        format!("2001:db8:f00d:{number:x}::9"),
    ];
    syn(at(&from[family], 1_024), dst)
}

#[test]
#[ignore = "needs root"]
fn given_spoofed_segments_over_seconds_when_every_place_is_taken_then_new_connections_get_in() {
    // One bucket.
    with_capacity(2, |slb| {
        for family in FAMILIES {
            keep_entries(slb, family);
            for (case, port, to) in modes(family) {
                slb.flows.clear();
                let dst = vip(family, port);
                for number in 0..8 {
                    let first = spoofed(family, number, dst);
                    let sent = sends(slb, case, &first);
                    if let Some(to) = to {
                        answers(slb, case, &inside(&sent, &first, to), SYN | ACK, ISS);
                    }
                    for _ in 0..2 {
                        slb.age(&first, REFRESH_JIFFIES + 10);
                        sends(slb, case, &first.clone().flags(0));
                    }
                    let proven = state(slb, &first).intersects(ConnState::ESTABLISHED);
                    assert!(!proven, "{case}: {:?}", state(slb, &first));
                    slb.flows.age_all(10);
                }
                for turn in 0..3 {
                    let new = syn(client(family, 1_000 + turn), dst);
                    establishes(slb, case, &new, to);
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_living_flow_when_its_end_is_forged_then_it_stays_in_every_mode() {
    with_slb(|slb| {
        for family in FAMILIES {
            keep_entries(slb, family);
            for (case, port, to) in modes(family) {
                let first = syn(client(family, 1_000), vip(family, port));
                establishes(slb, case, &first, to);
                let next = Frame { seq: 50, ack: ISS + 1, payload: vec![7; 9], ..first.clone() };
                let next = next.flags(ACK);
                let before = sends(slb, case, &next);
                let known = slb.flow(&first).expect("an entry");
                for (turn, flags) in (1..).zip([RST, RST | ACK, FIN, FIN | ACK, SYN]) {
                    let case = format!("{case}: {flags:#x}");
                    let (seq, ack) = (turn * 0x1234_5678, turn * 0x0fed_cba9);
                    let forged = Frame { seq, ack, ..first.clone() }.flags(flags);
                    sends(slb, &case, &forged);
                    let after = slb.flow(&first).expect("an entry");
                    assert_eq!(after.state(), known.state() | ConnState::END_CLAIMED, "{case}");
                    assert_eq!(abi::age(known.expires, after.expires), 0, "{case}");
                    let place = (after.backend, after.port, after.peer);
                    assert_eq!(place, (known.backend, known.port, known.peer), "{case}");
                    assert_eq!(sends(slb, &case, &next), before, "{case}");
                    assert_eq!(state(slb, &first), known.state(), "{case}: its data restores it");
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_forged_end_when_the_flow_is_counted_then_it_is_not_active_until_it_goes_on() {
    with_slb(|slb| {
        for family in FAMILIES {
            let id = id::TURN + family as u32;
            let first = syn(client(family, 1_000), vip(family, port::TURN));
            establishes(slb, "TURN", &first, Some(backend(0, family, port::TURN_BACKEND)));
            assert_eq!(slb.table.active(id), 1);
            for _ in 0..2 {
                sends(slb, "RST", &first.clone().flags(RST));
                assert_eq!(slb.table.active(id), 0);
            }
            let next = Frame { payload: vec![7], ..first.clone() }.flags(ACK);
            for _ in 0..2 {
                sends(slb, "data", &next);
                assert_eq!(slb.table.active(id), 1);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_syn_to_a_proven_flow_when_the_backend_has_no_connection_then_it_begins_anew_there() {
    with_slb(|slb| {
        for family in FAMILIES {
            let flow = Flow::ring(family, 1_000);
            let number = flow.establishes(slb);
            for _ in 0..3 {
                flow.reaches(slb, "SYN", SYN, number);
            }
            flow.answers(slb, "a challenge", ACK, number);
            flow.reaches(slb, "data", ACK, number);
            assert!(state(slb, &flow.first).contains(ConnState::ESTABLISHED));
            flow.reaches(slb, "SYN", SYN, number);
            let synack = Frame { seq: 1 << 30, ..answer(&flow.inside[number]) }.flags(SYN | ACK);
            slb.backend_sends("SYN-ACK", &synack, &replied(synack.from(flow.first.dst), ROUTER));
            assert_eq!(state(slb, &flow.first), ConnState::ANSWERED);
            let ack = Frame { ack: (1 << 30) + 1, ..flow.first.clone() }.flags(ACK);
            sends(slb, "ACK", &ack);
            assert!(state(slb, &flow.first).contains(ConnState::ESTABLISHED));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_flood_of_syns_when_each_takes_a_port_then_new_connections_get_one_and_old_ones_stay() {
    with_capacity(65_536, |slb| {
        for family in FAMILIES {
            let rows = [
                (port::FULL, family, port::FULL_BACKEND, id::FULL),
                (port::OTHER, 1 - family, port::OTHER_BACKEND, id::OTHER),
            ];
            for (port, inner, backend_port, id) in rows {
                slb.flows.clear();
                slb.backend(id + family as u32, |backend| backend.sources = 1);
                let to = Some(backend(0, inner, backend_port));
                let dst = vip(family, port);
                let old = syn(client(family, 1_000), dst);
                establishes(slb, "before", &old, to);
                let before = sends(slb, "before", &old.clone().flags(ACK));
                // More than there are ports.
                for number in 0..34_000 {
                    sends(slb, "flood", &flood(family, number, dst));
                    if number % 1_000 == 999 {
                        let new = syn(client(family, 2_000 + (number / 1_000) as u16), dst);
                        establishes(slb, "new", &new, to);
                    }
                }
                assert_eq!(sends(slb, "after", &old.flags(ACK)), before);
                let source = sender(&before, inner).ip().to_string();
                assert!(SOURCES[inner].contains(&source.as_str()));
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_datagrams_in_turn_when_only_the_backend_sends_then_the_flow_stays() {
    with_slb(|slb| {
        for family in FAMILIES {
            let first = datagram(client(family, 1_000), vip(family, port::SIP));
            let inside = first.to(backend(0, family, port::SIP_BACKEND));
            slb.client_sends("first", &first, &forwarded(inside.clone(), FIRST));
            assert_eq!(state(slb, &first), ConnState::empty());
            let answer = answer(&inside);
            let outside = replied(answer.from(first.dst), ROUTER);
            slb.backend_sends("answer", &answer, &outside);
            assert_eq!(state(slb, &first), ConnState::ESTABLISHED);
            for _ in 0..3 {
                let before = slb.flow(&first).expect("an entry").expires;
                slb.age(&first, IDLE_JIFFIES / 2);
                slb.backend_sends("stream", &answer, &outside);
                let after = slb.flow(&first).expect("an entry").expires;
                assert!(abi::age(before, after) < REFRESH_JIFFIES);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_one_way_datagrams_when_every_place_is_taken_then_answered_flows_and_other_networks_stay() {
    // One bucket.
    with_capacity(2, |slb| {
        for family in FAMILIES {
            slb.flows.clear();
            let dst = vip(family, port::SIP);
            let from = |number, sport| {
                let Frame { src, .. } = spoofed(family, number, dst);
                datagram(SocketAddr::new(src.ip(), sport), dst)
            };
            let streams = |slb: &mut Slb<'_>, frame: &Frame| {
                sends(slb, "one way", frame);
                slb.age(frame, REFRESH_JIFFIES + 10);
                sends(slb, "one way", frame);
                assert_eq!(state(slb, frame), ConnState::AGED);
            };
            let answered = datagram(client(family, 1_000), dst);
            sends(slb, "answered", &answered);
            let inside = answered.to(backend(0, family, port::SIP_BACKEND));
            answers(slb, "answered", &inside, 0, 0);
            let honest = from(1, 1_000);
            streams(slb, &honest);
            slb.age(&honest, 100);
            for sport in 2_000..2_020 {
                streams(slb, &from(2, sport));
            }
            assert!(slb.flow(&honest).is_some() && slb.flow(&answered).is_some());
            // From more networks than there are places.
            for number in 10..40 {
                streams(slb, &from(number, 1_000));
            }
            assert!(slb.flow(&honest).is_none() && slb.flow(&answered).is_some());
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_connection_that_is_adopted_when_both_sides_acknowledge_each_other_then_it_is_proven() {
    with_slb(|slb| {
        for family in FAMILIES {
            let (case, dst) = ("adopted", vip(family, port::TURN));
            let first = Frame { ack: 900, ..syn(client(family, 1_000), dst) }.flags(ACK);
            let inside = first.to(backend(0, family, port::TURN_BACKEND));
            sends(slb, case, &first);
            slb.age(&first, REFRESH_JIFFIES + 10);
            sends(slb, case, &first);
            assert_eq!(state(slb, &first), ConnState::AGED, "not more by itself");
            answers(slb, case, &inside, ACK, 900);
            let aged = ConnState::AGED | ConnState::ANSWERED;
            for ack in [900, 908, 909 + (1 << 16), 1 << 31] {
                sends(slb, case, &Frame { ack, ..first.clone() });
                assert_eq!(state(slb, &first), aged, "{ack}");
            }
            sends(slb, case, &Frame { ack: 909, ..first.clone() });
            assert!(state(slb, &first).contains(ConnState::ESTABLISHED));
        }
    });
}
