//! When a flow keeps its backend, and what is remembered of it.

use slb_common::{
    abi::{self, BackendFlags, FLOW_ORIGINAL, NO_PLACE, SLOT_KEEP, SLOT_LOOK, Traffic},
    verdict::Verdict,
};

use crate::{
    fixture::{
        FAMILIES, Outcome, Slb, answer, backend, client, client_of, datagram, forwarded, id, port,
        replied, syn, vip, with_slb,
    },
    frame::{ACK, FIN, Frame, RST, SYN},
    lab::{FIRST, ROUTER, SECOND, WAN},
};

mod floods;
mod proof;
mod shared;
mod turns;

/// A client's flow, and how it looks at the first backend and at the second.
struct Flow {
    first: Frame,
    inside: [Frame; 2],
}

const HOPS: [abi::NextHop; 2] = [FIRST, SECOND];

impl Flow {
    fn new(family: usize, first: Frame, backend_port: u16) -> Self {
        let inside = [0, 1].map(|number| first.to(backend(number, family, backend_port)));
        Self { first, inside }
    }

    /// Through the listener whose connections go by hash.
    fn http(family: usize, sport: u16) -> Self {
        Self::new(family, syn(client(family, sport), vip(family, port::HTTP)), port::HTTP_BACKEND)
    }

    /// Through the listener whose datagrams go by hash.
    fn dns(family: usize, sport: u16) -> Self {
        Self::new(
            family,
            datagram(client(family, sport), vip(family, port::DNS)),
            port::DNS_BACKEND,
        )
    }

    /// Through the listener whose connections take turns.
    fn ring(family: usize, sport: u16) -> Self {
        Self::new(family, syn(client(family, sport), vip(family, port::RING)), port::RING_BACKEND)
    }

    /// The client's packet with these flags reaches the backend of this number.
    fn reaches(&self, slb: &mut Slb<'_>, case: &str, flags: u8, number: usize) {
        let inside = self.inside[number].clone().flags(flags);
        let frame = self.first.clone().flags(flags);
        slb.client_sends(case, &frame, &forwarded(inside, HOPS[number]));
    }

    /// The backend's answer with these flags reaches the client.
    fn answers(&self, slb: &mut Slb<'_>, case: &str, flags: u8, number: usize) {
        let answer = answer(&self.inside[number]).flags(flags);
        slb.backend_sends(case, &answer, &replied(answer.from(self.first.dst), ROUTER));
    }

    /// The handshake, with whichever backend it is whose turn it is.
    fn establishes(&self, slb: &mut Slb<'_>) -> usize {
        let run = slb.run(WAN, &self.first.bytes());
        assert_eq!(run.verdict, Verdict::Forwarded, "{:?}", self.first);
        let backends = [0, 1].map(|number| self.inside[number].clone().sent(HOPS[number]).bytes());
        let number = backends.iter().position(|sent| *sent == run.bytes).expect("a backend");
        let synack = Frame { seq: 7_000, ..answer(&self.inside[number]) }.flags(SYN | ACK);
        slb.backend_sends("SYN-ACK", &synack, &replied(synack.from(self.first.dst), ROUTER));
        let ack = Frame { ack: 7_001, ..self.first.clone() }.flags(ACK);
        let inside = Frame { ack: 7_001, ..self.inside[number].clone() }.flags(ACK);
        slb.client_sends("ACK", &ack, &forwarded(inside, HOPS[number]));
        number
    }
}

/// The first flow through two listeners of one backend and port, from one client port.
fn twins(family: usize) -> (Frame, Frame, std::net::SocketAddr) {
    let one = syn(client(family, 1_000), vip(family, port::SHARED));
    let two = one.to(vip(family, port::TWIN));
    (one, two, backend(0, family, port::SHARED_BACKEND))
}

#[test]
#[ignore = "needs root"]
fn given_a_settled_schedule_by_hash_when_flows_go_both_ways_then_nothing_is_remembered() {
    with_slb(|slb| {
        for family in FAMILIES {
            let http = Flow::http(family, 1_000);
            for flags in [SYN, SYN, ACK, FIN | ACK, RST] {
                http.reaches(slb, "to", flags, 0);
                http.answers(slb, "from", ACK, 0);
            }
            let dns = Flow::dns(family, 1_000);
            dns.reaches(slb, "to", 0, 0);
            dns.answers(slb, "from", 0, 0);
        }
        assert_eq!(slb.flows.count(), 0);
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_connection_when_its_slot_moves_then_it_stays_and_new_ones_move() {
    with_slb(|slb| {
        for family in FAMILIES {
            let (old, idle) = (Flow::http(family, 1_000), Flow::http(family, 1_001));
            old.reaches(slb, "before", SYN, 0);
            idle.reaches(slb, "before", SYN, 0);
            let listener = old.first.dst;
            let second = id::HTTP_SECOND + family as u32;
            slb.move_to(listener, &[second]);

            old.reaches(slb, "old", ACK, 0);
            old.answers(slb, "old answers", ACK, 0);
            let new = Flow::http(family, 2_000);
            new.reaches(slb, "new", SYN, 1);
            for flow in [&old, &new] {
                let entry = slb.flow(&flow.first).expect("an entry");
                assert_eq!((entry.kind, entry.peer), (FLOW_ORIGINAL, NO_PLACE));
            }

            // Another change, and what has an entry stays where it is.
            slb.publish(
                listener,
                abi::TCP,
                vec![(id::HTTP + family as u32) | SLOT_LOOK | SLOT_KEEP],
                vec![id::HTTP + family as u32],
            );
            new.reaches(slb, "new stays", ACK, 1);
            idle.reaches(slb, "no entry: by the schedule before", ACK, 0);

            // Watched: entries decide, and no more are made.
            slb.schedule(listener, abi::TCP, vec![second | SLOT_LOOK]);
            old.reaches(slb, "watched, old", ACK, 0);
            let count = slb.flows.count();
            let late = Flow::http(family, 3_000);
            late.reaches(slb, "watched, new", SYN, 1);
            late.reaches(slb, "watched, in the middle", ACK, 1);
            assert_eq!(slb.flows.count(), count);

            slb.schedule(listener, abi::TCP, vec![second]);
            slb.flows.clear();
            old.reaches(slb, "settled", ACK, 1);
            slb.schedule(listener, abi::TCP, vec![id::HTTP + family as u32]);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_datagrams_when_their_slot_is_observed_and_moves_then_flows_stay_and_new_ones_move() {
    with_slb(|slb| {
        for family in FAMILIES {
            let (first, second) = (id::DNS + family as u32, id::DNS_SECOND + family as u32);
            let old = Flow::dns(family, 1_000);
            slb.schedule(old.first.dst, abi::UDP, vec![first | SLOT_LOOK | SLOT_KEEP]);
            old.reaches(slb, "observed", 0, 0);
            assert!(slb.flow(&old.first).is_some());

            slb.schedule(old.first.dst, abi::UDP, vec![second | SLOT_LOOK]);
            old.reaches(slb, "old", 0, 0);
            old.answers(slb, "old answers", 0, 0);
            Flow::dns(family, 2_000).reaches(slb, "new", 0, 1);

            // A backend that takes no flows does not keep datagrams either.
            slb.backend(first, |backend| backend.flags = BackendFlags::IN_USE);
            old.reaches(slb, "not usable", 0, 1);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_that_is_not_usable_any_more_when_its_connections_go_on_then_only_a_syn_moves() {
    with_slb(|slb| {
        for family in FAMILIES {
            let old = Flow::http(family, 1_000);
            old.reaches(slb, "before", SYN, 0);
            slb.move_to(old.first.dst, &[id::HTTP_SECOND + family as u32]);
            slb.backend(id::HTTP + family as u32, |backend| backend.flags = BackendFlags::IN_USE);
            old.reaches(slb, "ACK", ACK, 0);
            old.answers(slb, "answer", ACK, 0);
            old.reaches(slb, "FIN", FIN | ACK, 0);
            old.reaches(slb, "SYN", SYN, 1);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_no_backend_for_new_connections_when_old_ones_go_on_then_they_stay() {
    with_slb(|slb| {
        for family in FAMILIES {
            let old = Flow::http(family, 1_000);
            old.reaches(slb, "before", SYN, 0);
            slb.move_to(old.first.dst, &[abi::NO_BACKEND]);
            slb.client_sends("SYN", &old.first, &Outcome::Untouched(Verdict::NoBackend));
            old.reaches(slb, "ACK", ACK, 0);
            old.answers(slb, "answer", ACK, 0);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_retired_backend_when_its_connection_goes_on_then_it_is_left_to_the_kernel() {
    with_slb(|slb| {
        let old = Flow::http(0, 1_000);
        old.reaches(slb, "before", SYN, 0);
        slb.move_to(old.first.dst, &[id::HTTP_SECOND]);
        slb.change(|state| {
            state.backends.remove(&id::HTTP);
        });
        // The agent does not follow the route to it any more, so the kernel has to find it.
        let left =
            Outcome::Translated(Verdict::ForwardedByKernel, old.inside[0].clone().flags(ACK));
        slb.client_sends("ACK", &old.first.clone().flags(ACK), &left);
        old.answers(slb, "answer", ACK, 0);
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_flow_when_its_backends_next_hop_changes_then_it_takes_the_new_one() {
    with_slb(|slb| {
        for flow in [Flow::http(0, 1_000), Flow::ring(0, 1_000)] {
            flow.reaches(slb, "before", SYN, 0);
            for id in [id::HTTP, id::RING] {
                slb.backend(id, |backend| backend.hop = SECOND);
            }
            let inside = flow.inside[0].clone().flags(ACK);
            let ack = flow.first.clone().flags(ACK);
            slb.client_sends("ACK", &ack, &forwarded(inside, SECOND));
            for id in [id::HTTP, id::RING] {
                slb.backend(id, |backend| backend.hop = FIRST);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_listener_that_is_removed_when_its_clients_go_on_then_there_is_no_listener() {
    with_slb(|slb| {
        for family in FAMILIES {
            let flow = Flow::http(family, 1_000);
            flow.reaches(slb, "before", SYN, 0);
            let listener = crate::fixture::endpoint(flow.first.dst, abi::TCP);
            slb.change(|state| drop(state.listeners.remove(&listener)));
            let none = Outcome::Untouched(Verdict::NoListener);
            slb.client_sends("ACK", &flow.first.clone().flags(ACK), &none);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_flow_when_frames_go_both_ways_then_its_backend_is_charged() {
    with_slb(|slb| {
        for family in FAMILIES {
            for (flow, id, flows) in
                [(Flow::http(family, 1_000), id::HTTP, 2), (Flow::ring(family, 1_000), id::RING, 1)]
            {
                slb.schedule(vip(family, port::RING), abi::TCP, vec![id::RING + family as u32]);
                for flags in [SYN, SYN, ACK] {
                    flow.reaches(slb, "to", flags, 0);
                }
                flow.answers(slb, "from", ACK, 0);
                let sent = flow.first.bytes().len() as u64;
                let expected = Traffic {
                    // Without an entry, a SYN that is sent again is not told from another.
                    flows,
                    packets: 3,
                    bytes: 3 * sent,
                    reply_packets: 1,
                    reply_bytes: answer(&flow.inside[0]).bytes().len() as u64,
                };
                let found = slb.maps.traffic(id + family as u32).unwrap();
                assert_eq!(found, expected, "{id}");
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_address_of_the_gateway_when_a_backend_sends_there_then_it_is_not_ours() {
    with_slb(|slb| {
        for family in FAMILIES {
            let gateway = client_of(99, family, 4_000);
            let probe = Frame { dst: gateway, ..answer(&Flow::http(family, 1).inside[0]) };
            let roles = abi::Roles::LOCAL;
            slb.change(|state| {
                state.addresses.insert(gateway.ip().into(), roles);
            });
            let ours = Outcome::Untouched(Verdict::NotOurs);
            slb.backend_sends("looked up", &probe, &ours);
            slb.backend_sends("remembered", &probe, &ours);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_direct_return_when_a_client_sends_then_only_the_way_is_written_and_answers_are_not_ours() {
    with_slb(|slb| {
        for family in FAMILIES {
            let from = client(family, 1_000);
            let tcp = syn(from, vip(family, port::DSR));
            let udp = datagram(from, vip(family, port::DSR_UDP));
            for frame in [&tcp, &tcp.clone().flags(ACK), &udp] {
                slb.client_sends("to", frame, &forwarded(frame.clone(), FIRST));
            }
            slb.client_sends("TTL", &tcp.clone().ttl(1), &Outcome::Untouched(Verdict::TtlExpired));
            // Where it passes here at all, it is traffic like any other.
            let answer = answer(&tcp.to(backend(0, family, port::DSR)));
            slb.backend_sends("from", &answer, &Outcome::Untouched(Verdict::NotOurs));
            assert!(slb.flow(&tcp).is_none() && slb.flow(&udp).is_some());
        }
    });
}
