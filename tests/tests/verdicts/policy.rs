//! What a listener has besides its schedule: who gets in, who stays where, and what is over.

use std::{sync::Arc, time::Instant};

use slb_common::{
    abi::{
        self, BackendFlags, ConnState, Limits, ListenerFlags, QuicKey, RevNatFlags, SLOT_KEEP,
        SLOT_LOOK, Scheduler, Seed,
    },
    hash, quic,
    verdict::Verdict,
};
use slb_user::{
    datapath::Applied,
    plan::Step,
    state::{Acl, ListenerState, Policy, Schedule, State},
};

use crate::{
    fixture::{
        FAMILIES, Outcome, Slb, answer, backend, by, client, client_of, datagram, endpoint,
        forwarded, id, port, replied, reset, syn, vip, with_slb,
    },
    fragments::fragments,
    frame::{ACK, FIN, Frame, L3, RST, SYN, tagged},
    lab::{FIRST, ROUTER, WAN},
};

/// Far more than a test takes, in nanoseconds.
const HOUR: u64 = 3_600_000_000_000;

/// Changes a listener and what belongs to it.
fn change(slb: &mut Slb<'_>, at: abi::Endpoint, change: impl FnOnce(&mut ListenerState)) {
    slb.change(|state| change(state.listeners.get_mut(&at).expect("a listener")));
}

/// The origins that a listener has.
fn mark(state: &mut State, at: abi::Endpoint, flag: RevNatFlags) {
    for origin in state.endpoints.values_mut() {
        if (origin.vip, origin.port) == (at.addr, at.port) {
            origin.flags |= flag;
        }
    }
}

/// The number of the backend that a client's frame is sent to.
fn chosen(slb: &mut Slb<'_>, frame: &Frame) -> usize {
    let run = slb.run(WAN, &frame.bytes());
    assert_eq!(run.verdict, Verdict::Forwarded, "{frame:?}");
    let (family, at) = if frame.src.is_ipv4() { (0, L3 + 19) } else { (1, L3 + 39) };
    (0..2).find(|&number| last_byte(number, family) == run.bytes[at]).expect("one of them")
}

/// Of a backend's address.
fn last_byte(number: usize, family: usize) -> u8 {
    abi::Address::from(backend(number, family, 0).ip()).bytes[15]
}

/// The list with the one network of a client, of 24 or 48 bits.
fn network_of(addr: std::net::IpAddr) -> Acl {
    let bits = if addr.is_ipv4() { 96 + 24 } else { 48 };
    [(abi::listed_bits(bits), addr.into())].into()
}

#[test]
#[ignore = "needs root"]
fn given_an_access_list_when_clients_come_then_it_says_who_gets_in() {
    with_slb(|slb| {
        for family in FAMILIES {
            let at = endpoint(vip(family, port::HTTP), abi::TCP);
            let listed = syn(client(family, 4_000), vip(family, port::HTTP));
            let other = syn(client_of(101, family, 4_000), vip(family, port::HTTP));
            let gets_in =
                |frame: &Frame| forwarded(frame.to(backend(0, family, port::HTTP_BACKEND)), FIRST);
            let denied = Outcome::Untouched(Verdict::Denied);
            for (mode, inside, outside) in
                [(ListenerFlags::ALLOW, &listed, &other), (ListenerFlags::DENY, &other, &listed)]
            {
                slb.change(|state| {
                    state.acls.insert(7, Arc::new(network_of(listed.src.ip())));
                    let service = state.listeners.get_mut(&at).expect("a listener");
                    let flags = ListenerFlags::GUARDED | mode;
                    service.policy = Policy { flags, acl: 7, ..Policy::default() };
                });
                for flags in [SYN, ACK, FIN | ACK] {
                    let (inside, outside) =
                        (inside.clone().flags(flags), outside.clone().flags(flags));
                    slb.client_sends("on the right side", &inside, &gets_in(&inside));
                    slb.client_sends("on the wrong side", &outside, &denied);
                }
                let frame = tagged(&outside.bytes(), &[(0x8100, 5)]);
                assert_eq!(slb.run(WAN, &frame).verdict, Verdict::Denied, "in a VLAN");
                let frame = tagged(&inside.bytes(), &[(0x8100, 5)]);
                assert_eq!(slb.run(WAN, &frame).verdict, Verdict::Forwarded, "in a VLAN");
            }
            // A list of all networks of one family has none of the other; an empty list has none at all.
            change(slb, at, |service| {
                service.policy = Policy {
                    flags: ListenerFlags::GUARDED | ListenerFlags::ALLOW,
                    acl: 0,
                    sticky_jiffies: 0,
                };
            });
            slb.client_sends("an empty list", &listed, &denied);
            // The list does not concern answers, nor other listeners.
            let answer = answer(&listed.to(backend(0, family, port::HTTP_BACKEND)));
            slb.backend_sends("an answer", &answer, &replied(answer.from(listed.dst), ROUTER));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_limit_of_new_flows_when_more_begin_then_only_those_are_dropped() {
    with_slb(|slb| {
        for family in FAMILIES {
            let rows = [(port::HTTP, abi::TCP), (port::SIP, abi::UDP)];
            for (port, proto) in rows {
                let at = endpoint(vip(family, port), proto);
                slb.change(|state| {
                    let service = state.listeners.get_mut(&at).expect("a listener");
                    let flags = ListenerFlags::GUARDED | ListenerFlags::LIMITED;
                    service.policy = Policy { flags, ..Policy::default() };
                    let (flow_ns, flow_burst) = (HOUR, 2 * HOUR);
                    state
                        .limits
                        .insert(service.id, Limits { flow_ns, flow_burst, ..Limits::default() });
                });
                let begin = |sport| {
                    let (from, to) = (client(family, sport), vip(family, port));
                    if proto == abi::TCP { syn(from, to) } else { datagram(from, to) }
                };
                for sport in 5_000..5_003 {
                    assert_eq!(slb.run(WAN, &begin(sport).bytes()).verdict, Verdict::Forwarded);
                }
                let dropped = Outcome::Untouched(Verdict::FlowLimit);
                slb.client_sends("the fourth", &begin(5_003), &dropped);
                for sport in 5_000..5_003 {
                    let again = begin(sport);
                    let again = if proto == abi::TCP { again.flags(ACK) } else { again };
                    assert_eq!(slb.run(WAN, &again.bytes()).verdict, Verdict::Forwarded);
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_limit_of_bandwidth_when_more_comes_then_each_direction_has_its_own() {
    with_slb(|slb| {
        for family in FAMILIES {
            let at = endpoint(vip(family, port::HTTP), abi::TCP);
            let id = id::HTTP + family as u32;
            let syn = syn(client(family, 4_000), vip(family, port::HTTP));
            let answer = answer(&syn.to(backend(0, family, port::HTTP_BACKEND)));
            slb.change(|state| {
                let service = state.listeners.get_mut(&at).expect("a listener");
                let flags = ListenerFlags::GUARDED | ListenerFlags::LIMITED;
                service.policy = Policy { flags, ..Policy::default() };
                // A frame an hour, and one ahead.
                let byte_ns = (HOUR << 16) / syn.bytes().len() as u64;
                let limits = Limits { byte_ns, byte_burst: HOUR, ..Limits::default() };
                state.limits.insert(service.id, limits);
                let listener = service.id as u16;
                mark(state, at, RevNatFlags::LIMITED);
                state.backends.get_mut(&id).expect("a backend").listener = listener;
            });
            let inside = syn.to(backend(0, family, port::HTTP_BACKEND));
            let dropped = Outcome::Untouched(Verdict::BandwidthLimit);
            for _ in 0..2 {
                slb.client_sends("a frame", &syn, &forwarded(inside.clone(), FIRST));
            }
            slb.client_sends("one too many", &syn, &dropped);
            let outside = replied(answer.from(syn.dst), ROUTER);
            slb.backend_sends("an answer", &answer, &outside);
            for _ in 0..2 {
                let _ = slb.run(crate::lab::LAN, &answer.bytes());
            }
            slb.backend_sends("one answer too many", &answer, &dropped);
            let own = crate::fixture::at(crate::fixture::SOURCES[family][0], 40_000);
            let probed = Frame { dst: own, ..answer };
            slb.backend_sends("a probe's", &probed, &Outcome::Untouched(Verdict::NotOurs));
        }
    });
}

/// Gives the backends of the ring these weights, and the listener this scheduler and policy.
fn ring(slb: &mut Slb<'_>, family: usize, weights: [u16; 2], scheduler: Scheduler, policy: Policy) {
    let at = endpoint(vip(family, port::RING), abi::TCP);
    slb.change(|state| {
        let service = state.listeners.get_mut(&at).expect("a listener");
        let slots = service.schedule.slots.clone();
        service.schedule = Arc::new(Schedule::new(by(scheduler), slots));
        service.policy = policy;
        let listener = service.id as u16;
        for (id, weight) in [id::RING, id::RING_SECOND].into_iter().zip(weights) {
            let backend = state.backends.get_mut(&(id + family as u32)).expect("a backend");
            (backend.listener, backend.weight) = (listener, weight);
        }
    });
}

const STICKY: Policy = Policy { flags: ListenerFlags::CHOOSES, acl: 0, sticky_jiffies: 1_000_000 };

#[test]
#[ignore = "needs root"]
fn given_persistence_when_a_client_comes_again_then_it_gets_the_same_backend() {
    with_slb(|slb| {
        for family in FAMILIES {
            ring(slb, family, [100, 100], abi::Scheduler::RING, STICKY);
            let to = vip(family, port::RING);
            let first = chosen(slb, &syn(client(family, 4_000), to));
            for sport in 4_001..4_010 {
                assert_eq!(chosen(slb, &syn(client(family, sport), to)), first);
            }
            let others = (101..104).map(|net| chosen(slb, &syn(client_of(net, family, 4_000), to)));
            let others: Vec<usize> = others.collect();
            assert!(others.iter().any(|other| *other != first), "{others:?}");

            // Another weight does not matter, none does.
            ring(slb, family, [1, 50], abi::Scheduler::RING, STICKY);
            assert_eq!(chosen(slb, &syn(client(family, 4_010), to)), first);
            let mut weights = [100, 100];
            weights[first] = 0;
            ring(slb, family, weights, abi::Scheduler::RING, STICKY);
            let slots = vec![[id::RING_SECOND, id::RING][first] + family as u32];
            slb.schedule(to, abi::TCP, slots);
            change(slb, endpoint(to, abi::TCP), |service| service.policy = STICKY);
            assert_eq!(chosen(slb, &syn(client(family, 4_011), to)), 1 - first);
            assert_eq!(chosen(slb, &syn(client(family, 4_012), to)), 1 - first, "and stays there");
            // A connection goes on where it began.
            let old = syn(client(family, 4_000), to).flags(ACK);
            assert_eq!(chosen(slb, &old), first);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_persistence_when_the_backend_is_not_usable_then_the_client_goes_elsewhere() {
    with_slb(|slb| {
        for family in FAMILIES {
            ring(slb, family, [100, 100], abi::Scheduler::RING, STICKY);
            let to = vip(family, port::RING);
            let first = chosen(slb, &syn(client(family, 4_000), to));
            let ids = [id::RING, id::RING_SECOND].map(|id| id + family as u32);
            let (sick, fit) = (ids[first], ids[1 - first]);
            slb.backend(sick, |backend| backend.flags &= !BackendFlags::USABLE);
            slb.schedule(to, abi::TCP, vec![fit]);
            change(slb, endpoint(to, abi::TCP), |service| service.policy = STICKY);
            assert_ne!(chosen(slb, &syn(client(family, 4_001), to)), first);
            slb.backend(sick, |backend| backend.flags |= BackendFlags::USABLE);
            assert_ne!(chosen(slb, &syn(client(family, 4_002), to)), first, "it has moved");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_least_connections_when_flows_begin_and_end_then_the_least_loaded_is_chosen() {
    with_slb(|slb| {
        for family in FAMILIES {
            let policy = Policy { flags: ListenerFlags::CHOOSES, ..Policy::default() };
            ring(slb, family, [30, 10], Scheduler::LEAST, policy);
            let to = vip(family, port::RING);
            let ids = [id::RING, id::RING_SECOND].map(|id| id + family as u32);
            let flows: Vec<Frame> =
                (6_000..6_040).map(|sport| syn(client(family, sport), to)).collect();
            let backends: Vec<usize> = flows.iter().map(|flow| chosen(slb, flow)).collect();
            let count = |number| backends.iter().filter(|chosen| **chosen == number).count();
            assert_eq!((count(0), count(1)), (30, 10), "exactly by weight: {backends:?}");
            let active = |slb: &Slb<'_>| ids.map(|id| slb.table.active(id));
            assert_eq!(active(slb), [30, 10]);

            // Those of the second backend end: by a reset, by both sides, or by a new connection.
            let of_second = flows.iter().zip(&backends).filter(|(_, chosen)| **chosen == 1);
            for (number, (flow, _)) in of_second.enumerate() {
                let inside = flow.to(backend(1, family, port::RING_BACKEND));
                if number % 2 == 0 {
                    chosen(slb, &flow.clone().flags(RST | ACK));
                } else {
                    chosen(slb, &flow.clone().flags(FIN | ACK));
                    let fin = answer(&inside).flags(FIN | ACK);
                    assert_eq!(slb.run(crate::lab::LAN, &fin.bytes()).verdict, Verdict::Replied);
                }
                // Late packets end nothing twice.
                chosen(slb, &flow.clone().flags(ACK));
                chosen(slb, &flow.clone().flags(RST));
            }
            assert_eq!(active(slb), [30, 0]);
            let next: Vec<usize> =
                (6_100..6_110).map(|sport| chosen(slb, &syn(client(family, sport), to))).collect();
            assert_eq!(next, [1; 10], "all to the one that has none");
            assert_eq!(active(slb), [30, 10]);
        }
    });
}

/// A datagram with a QUIC packet of 1-RTT.
fn quic_datagram(from: std::net::SocketAddr, to: std::net::SocketAddr, id: [u8; 8]) -> Frame {
    let payload = [&[0x40], &id[..], &[9; 30]].concat();
    Frame { payload, ..datagram(from, to) }
}

#[test]
#[ignore = "needs root"]
fn given_connection_ids_when_the_client_moves_then_its_connection_stays() {
    with_slb(|slb| {
        for family in FAMILIES {
            let to = vip(family, port::DNS);
            let at = endpoint(to, abi::UDP);
            let ids = [id::DNS, id::DNS_SECOND].map(|id| id + family as u32);
            let slots: Vec<u32> = (0..64).map(|slot| ids[slot % 2]).collect();
            slb.change(|state| {
                let service = state.listeners.get_mut(&at).expect("a listener");
                service.schedule = Arc::new(Schedule::new(by(Scheduler::QUIC), slots.clone()));
                service.policy = Policy { flags: ListenerFlags::CHOOSES, ..Policy::default() };
                let listener = service.id;
                for (server, id) in (1..).zip(ids) {
                    state.quic.insert(QuicKey { listener, server }, id);
                    let backend = state.backends.get_mut(&id).expect("a backend");
                    backend.flags = BackendFlags::IN_USE | BackendFlags::USABLE;
                    backend.listener = listener as u16;
                }
            });
            for (server, number) in [(1, 0), (2, 1)] {
                for (last, net) in (0..).zip(100..104) {
                    let id = [0x05, 0, server, 1, 2, 3, 4, last];
                    let from = client_of(net, family, 7_000 + u16::from(server));
                    assert_eq!(
                        chosen(slb, &quic_datagram(from, to, id)),
                        number,
                        "server {server}"
                    );
                }
            }
            let mut seen = [0; 2];
            for number in 0..32 {
                let id = [0xe0, 0, 1, 1, 2, 3, 4, number];
                let port = 8_000 + u16::from(number);
                let frame = quic_datagram(client_of(100, family, port), to, id);
                let first = chosen(slb, &frame);
                for net in 101..104 {
                    let moved = quic_datagram(client_of(net, family, port), to, id);
                    assert_eq!(chosen(slb, &moved), first, "{id:?}");
                }
                seen[first] += 1;
                // As everybody computes it who knows the schedule.
                let mut bytes = frame.bytes();
                let packet = abi::Packet { l4: frame.l4() as u32, ..abi::Packet::default() };
                let frame = slb_common::frame::Frame::from_slice(&mut bytes);
                let id = quic::connection_id(&frame, &packet).expect("an ID").id;
                let choice = hash::choice_of_id(id, &Seed::PUBLIC);
                let slot = slots[hash::slot(choice, slots.len() as u32) as usize];
                assert_eq!(
                    slb.maps.installed().backends[&slot].addr.bytes[15],
                    last_byte(first, family)
                );
            }
            assert!(seen[0] > 4 && seen[1] > 4, "{seen:?}");
        }
    });
}

/// A reset that is counted as one of a connection whose time is up.
fn closed(frame: &Frame) -> Outcome {
    match reset(frame) {
        Outcome::Answered(_, frame) => Outcome::Answered(Verdict::Closed, frame),
        other => other,
    }
}

#[test]
#[ignore = "needs root"]
fn given_a_connection_that_was_ended_when_either_side_speaks_then_it_is_reset() {
    with_slb(|slb| {
        for family in FAMILIES {
            let to = vip(family, port::TURN);
            let at = endpoint(to, abi::TCP);
            let first = syn(client(family, 4_000), to);
            let inside = first.to(backend(0, family, port::TURN_BACKEND));
            slb.client_sends("SYN", &first, &forwarded(inside.clone(), FIRST));
            slb.tamper(&first, |flow| flow.state |= ConnState::RST_PENDING.bits());
            slb.change(|state| mark(state, at, RevNatFlags::CLOSING));

            let ack = Frame { ack: 77, ..first.clone() }.flags(ACK);
            slb.client_sends("the client's ACK", &ack, &closed(&ack));
            let said = Frame { ack: 99, ..answer(&inside) };
            slb.backend_sends("the backend's ACK", &said, &closed(&said));
            // What ends it anyway gets through.
            let rst = first.clone().flags(RST);
            slb.client_sends("RST", &rst, &forwarded(inside.clone().flags(RST), FIRST));
            let rst = answer(&inside).flags(RST);
            slb.backend_sends("RST", &rst, &replied(rst.from(to), ROUTER));
            // And another one may begin.
            slb.client_sends("SYN", &first, &forwarded(inside.clone(), FIRST));
            slb.backend_sends(
                "an answer",
                &answer(&inside),
                &replied(answer(&inside).from(to), ROUTER),
            );
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_whose_time_is_up_when_connections_without_an_entry_speak_then_they_are_reset() {
    with_slb(|slb| {
        for family in FAMILIES {
            let to = vip(family, port::HTTP);
            let at = endpoint(to, abi::TCP);
            let second = id::HTTP_SECOND + family as u32;
            // The first has been drained, and its connections were never heard of since.
            slb.move_to(to, &[second]);
            slb.backend(id::HTTP + family as u32, |backend| backend.flags |= BackendFlags::CLOSED);
            slb.change(|state| mark(state, at, RevNatFlags::CLOSING));
            let ack = syn(client(family, 4_000), to).flags(ACK);
            slb.client_sends("an old one", &ack, &closed(&ack));
            let inside = ack.to(backend(0, family, port::HTTP_BACKEND));
            slb.backend_sends("its backend", &answer(&inside), &closed(&answer(&inside)));
            // Probes of the agent's go on.
            let own = crate::fixture::at(crate::fixture::SOURCES[family][0], 40_000);
            let probed = Frame { dst: own, ..answer(&inside) };
            slb.backend_sends("a probe's", &probed, &Outcome::Untouched(Verdict::NotOurs));
            let begin = syn(client(family, 4_001), to);
            assert_eq!(chosen(slb, &begin), 1, "a new one");
            // A segment that cannot be answered by a reset: fragments.
            slb.schedule(to, abi::TCP, vec![(id::HTTP + family as u32) | SLOT_LOOK | SLOT_KEEP]);
            let long = Frame { payload: vec![1; 700], ..ack };
            assert_eq!(slb.run(WAN, &fragments(&long, 9)[0]).verdict, Verdict::ClosedDropped);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_watched_backend_when_it_answers_syns_then_both_answers_are_counted() {
    with_slb(|slb| {
        for family in FAMILIES {
            let to = vip(family, port::HTTP);
            let at = endpoint(to, abi::TCP);
            let id = id::HTTP + family as u32;
            slb.change(|state| mark(state, at, RevNatFlags::WATCHED));
            let syn = syn(client(family, 4_000), to);
            let inside = syn.to(backend(0, family, port::HTTP_BACKEND));
            let mut say = |flags, seq| {
                let said = Frame { seq, ..answer(&inside) }.flags(flags);
                slb.backend_sends("an answer", &said, &replied(said.from(to), ROUTER));
            };
            say(SYN | ACK, 5);
            say(ACK, 6);
            say(RST | ACK, 0);
            say(RST | ACK, 0);
            say(RST, 7);
            let answers = slb.maps.answers(id).expect("counters");
            assert_eq!((answers.accepted, answers.refused), (1, 2), "{answers:?}");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_listener_that_was_just_changed_when_a_list_is_removed_then_that_is_left_for_later() {
    with_slb(|slb| {
        let list: Arc<Acl> =
            Arc::new([(abi::listed_bits(128), client(0, 4_000).ip().into())].into());
        let listeners = &slb.maps.installed().listeners;
        let (endpoint, service) =
            listeners.iter().map(|(&at, it)| (at, it.clone())).next().expect("a listener");
        // A packet may have read the record of before. A machine that pauses in between may be past that.
        let due = (0..1_000).find_map(|_| {
            slb.maps.apply(Step::PutAcl(7, Arc::clone(&list))).expect("a write");
            slb.maps.apply(Step::PutListener(endpoint, service.clone())).expect("a write");
            match slb.maps.apply(Step::RemoveAcl(7, Arc::clone(&list))).expect("a write") {
                Applied::Later(due) => Some(due),
                Applied::Done => None,
            }
        });
        let due = due.expect("the list was removed at once, each time");
        assert!(slb.maps.installed().acls.contains_key(&7), "it is planned again");
        while Instant::now() < due {}
        let removed = slb.maps.apply(Step::RemoveAcl(7, list)).expect("a write");
        assert_eq!(removed, Applied::Done);
        assert!(!slb.maps.installed().acls.contains_key(&7));
    });
}
