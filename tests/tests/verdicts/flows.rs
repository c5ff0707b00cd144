//! When a flow keeps its backend, and what is remembered of it.

use slb_common::{
    abi::{
        self, BACKEND_IN_USE, ConnState, FLOW_ORIGINAL, FLOW_REPLY, NO_PLACE, SLOT_KEEP, SLOT_LOOK,
        Traffic,
    },
    verdict::Verdict,
};

use crate::{
    fixture::{
        FAMILIES, IDLE_JIFFIES, Outcome, Slb, answer, at, backend, client, client_of, datagram,
        forwarded, id, port, replied, syn, vip, with_capacity, with_slb,
    },
    frame::{ACK, FIN, Frame, RST, SYN},
    lab::{FIRST, LAN, ROUTER, SECOND, WAN},
};

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
            slb.backend(first, |backend| backend.flags = BACKEND_IN_USE);
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
            slb.backend(id::HTTP + family as u32, |backend| backend.flags = BACKEND_IN_USE);
            old.reaches(slb, "ACK", ACK, 0);
            old.answers(slb, "answer", ACK, 0);
            old.reaches(slb, "FIN", FIN | ACK, 0);
            old.reaches(slb, "SYN", SYN, 1);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_nobody_for_new_connections_when_old_ones_go_on_then_they_stay() {
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
        // Nobody follows the way to it any more, so the kernel has to find it.
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
fn given_turns_when_a_flow_goes_on_then_it_keeps_its_backend() {
    with_slb(|slb| {
        for family in FAMILIES {
            let flows = [1_000, 1_001, 1_002].map(|sport| Flow::ring(family, sport));
            for (turn, flow) in flows.iter().enumerate() {
                flow.reaches(slb, "SYN", SYN, turn % 2);
            }
            for (turn, flow) in flows.iter().enumerate() {
                for flags in [SYN, ACK, FIN | ACK, ACK] {
                    flow.reaches(slb, "goes on", flags, turn % 2);
                    flow.answers(slb, "answer", ACK, turn % 2);
                }
            }
            // An odd number of turns: the next family begins with the second backend otherwise.
            Flow::ring(family, 1_003).reaches(slb, "SYN", SYN, 1);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_turns_when_a_connection_is_not_known_then_only_a_single_backend_adopts_it() {
    with_slb(|slb| {
        for family in FAMILIES {
            let flow = Flow::ring(family, 1_000);
            let ack = flow.first.clone().flags(ACK);
            slb.client_sends("two", &ack, &crate::fixture::reset(&ack));
            let [first, second] = [id::RING, id::RING_SECOND].map(|id| id + family as u32);
            // Its schedule went by hash until a moment ago.
            slb.publish(flow.first.dst, abi::TCP, vec![first, second], vec![second]);
            Flow::ring(family, 1_001).reaches(slb, "by the schedule before", ACK, 1);
            slb.schedule(flow.first.dst, abi::TCP, vec![first]);
            flow.reaches(slb, "one", ACK, 0);
            slb.schedule(flow.first.dst, abi::TCP, vec![first, second]);
            flow.reaches(slb, "two again", ACK, 0);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_turns_when_a_connection_has_ended_then_a_syn_takes_another_turn_and_not_before() {
    #[derive(Clone, Copy)]
    enum By {
        Client(u8),
        Backend(u8),
    }
    use By::{Backend, Client};
    let cases: [(&str, &[By], bool); 7] = [
        ("both have closed", &[Client(FIN | ACK), Backend(FIN | ACK)], true),
        ("both have closed, backend first", &[Backend(FIN | ACK), Client(FIN | ACK)], true),
        ("the client has closed", &[Client(FIN | ACK), Backend(ACK)], true),
        ("reset by the client", &[Client(RST)], true),
        ("reset by the backend", &[Backend(RST | ACK)], true),
        ("only the backend has closed", &[Backend(FIN | ACK), Client(ACK)], false),
        ("nobody has closed", &[Client(ACK), Backend(ACK)], false),
    ];
    with_slb(|slb| {
        for family in FAMILIES {
            let [first, second] = [id::RING, id::RING_SECOND].map(|id| id + family as u32);
            for (sport, (case, history, ends)) in (1_000..).zip(cases) {
                let flow = Flow::ring(family, sport);
                slb.schedule(flow.first.dst, abi::TCP, vec![first]);
                flow.reaches(slb, case, SYN, 0);
                slb.schedule(flow.first.dst, abi::TCP, vec![second]);
                for by in history {
                    match *by {
                        Client(flags) => flow.reaches(slb, case, flags, 0),
                        Backend(flags) => flow.answers(slb, case, flags, 0),
                    }
                }
                // What comes late still belongs to the old connection.
                flow.reaches(slb, case, ACK, 0);
                flow.answers(slb, case, ACK, 0);
                flow.reaches(slb, case, SYN, usize::from(ends));
                flow.reaches(slb, case, ACK, usize::from(ends));
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_turns_when_a_flow_is_older_than_its_timeout_then_it_begins_anew() {
    with_slb(|slb| {
        for family in FAMILIES {
            let [first, second] = [id::RING, id::RING_SECOND].map(|id| id + family as u32);
            let flow = Flow::ring(family, 1_000);
            slb.schedule(flow.first.dst, abi::TCP, vec![first]);
            flow.establishes(slb);
            slb.age(&flow.first, 1_000);
            flow.reaches(slb, "refreshed", ACK, 0);
            slb.schedule(flow.first.dst, abi::TCP, vec![second]);
            slb.age(&flow.first, IDLE_JIFFIES - 1_000);
            flow.reaches(slb, "not yet", SYN, 0);
            slb.age(&flow.first, IDLE_JIFFIES + 1_000);
            flow.reaches(slb, "idle", SYN, 1);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_handshake_when_the_client_proves_itself_then_its_entry_is_established_and_not_before() {
    let is_established = |slb: &Slb<'_>, flow: &Flow| {
        slb.flow(&flow.first).expect("an entry").state().intersects(ConnState::ESTABLISHED)
    };
    with_slb(|slb| {
        for family in FAMILIES {
            let real = Flow::ring(family, 1_000);
            real.establishes(slb);
            assert!(is_established(slb, &real));

            let blind = Flow::ring(family, 1_001);
            slb.run(WAN, &blind.first.bytes());
            let number = usize::from(
                slb.flow(&blind.first).expect("an entry").backend
                    == id::RING_SECOND + family as u32,
            );
            let synack = Frame { seq: 1 << 30, ..answer(&blind.inside[number]) }.flags(SYN | ACK);
            slb.run(LAN, &synack.bytes());
            blind.reaches(slb, "a guess", ACK, number);
            assert!(!is_established(slb, &blind));

            // Or the client goes on for a while.
            slb.age(&blind.first, abi::REFRESH_JIFFIES + 10);
            blind.reaches(slb, "later", ACK, number);
            assert!(is_established(slb, &blind));
        }
    });
}

/// SYNs from addresses that are nobody's, by number.
fn flood(family: usize, number: u32, dst: std::net::SocketAddr) -> Frame {
    let (net, host) = (number >> 16 & 0xff, number & 0xffff);
    let from = [
        format!("100.{}.{}.{}", 64 + net % 64, host >> 8, host & 0xff),
        format!("2001:db8:f00d:{net:x}::{host:x}"),
    ];
    syn(at(&from[family], 1_024 + (number.wrapping_mul(40_503) % 60_000) as u16), dst)
}

#[test]
#[ignore = "needs root"]
fn given_a_flood_of_syns_when_the_table_is_full_then_established_flows_stay_and_new_clients_get_in()
{
    with_capacity(512, |slb| {
        for family in FAMILIES {
            slb.flows.clear();
            let flows: Vec<Flow> = (0..100).map(|n| Flow::ring(family, 10_000 + 7 * n)).collect();
            let numbers: Vec<usize> = flows.iter().map(|flow| flow.establishes(slb)).collect();
            for number in 0..50_000 {
                let frame = flood(family, number, vip(family, port::RING));
                let run = slb.run(WAN, &frame.bytes());
                assert_eq!(run.verdict, Verdict::Forwarded, "{frame:?}");
                if number % 5_000 == 0 {
                    // Its own bucket is as full as any.
                    Flow::ring(family, 40_000 + (number / 5_000) as u16).establishes(slb);
                }
            }
            for (flow, &number) in flows.iter().zip(&numbers) {
                flow.reaches(slb, "through the flood", ACK, number);
                flow.answers(slb, "and back", ACK, number);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_flood_of_syns_when_slots_move_then_old_connections_stay() {
    with_capacity(512, |slb| {
        for family in FAMILIES {
            let flows: Vec<Flow> = (0..100).map(|n| Flow::http(family, 10_000 + 7 * n)).collect();
            for flow in &flows {
                flow.reaches(slb, "before", SYN, 0);
            }
            slb.move_to(vip(family, port::HTTP), &[id::HTTP_SECOND + family as u32]);
            for number in 0..20_000 {
                let frame = flood(family, number, vip(family, port::HTTP));
                let run = slb.run(WAN, &frame.bytes());
                assert_eq!(run.verdict, Verdict::Forwarded, "{frame:?}");
            }
            for flow in &flows {
                flow.reaches(slb, "through the flood", ACK, 0);
                flow.answers(slb, "and back", ACK, 0);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_bucket_of_established_flows_when_another_comes_then_turns_have_no_room_and_a_hash_needs_none()
 {
    with_capacity(2, |slb| {
        // One bucket.
        let flows: Vec<Flow> = (0..8).map(|n| Flow::ring(0, 10_000 + n)).collect();
        let numbers: Vec<usize> = flows.iter().map(|flow| flow.establishes(slb)).collect();
        let late = Flow::ring(0, 20_000);
        slb.client_sends("turns", &late.first, &Outcome::Untouched(Verdict::TableFull));
        let http = Flow::http(0, 20_000);
        slb.move_to(http.first.dst, &[id::HTTP_SECOND]);
        http.reaches(slb, "hash", SYN, 1);
        // Its answers could not be told from another listener's.
        let (shared, ..) = twins(0);
        slb.client_sends("shared", &shared, &Outcome::Untouched(Verdict::TableFull));
        for (flow, &number) in flows.iter().zip(&numbers) {
            flow.reaches(slb, "stays", ACK, number);
        }

        // One that has ended makes room.
        flows[3].reaches(slb, "end", RST, numbers[3]);
        let run = slb.run(WAN, &late.first.bytes());
        assert_eq!(run.verdict, Verdict::Forwarded);
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

/// The first flow through two listeners of one backend and port, from one client port.
fn twins(family: usize) -> (Frame, Frame, std::net::SocketAddr) {
    let one = syn(client(family, 1_000), vip(family, port::SHARED));
    let two = one.to(vip(family, port::TWIN));
    (one, two, backend(0, family, port::SHARED_BACKEND))
}

#[test]
#[ignore = "needs root"]
fn given_two_listeners_of_one_backend_when_clients_use_both_then_each_gets_its_answers() {
    with_slb(|slb| {
        for family in FAMILIES {
            let (one, _, at) = twins(family);
            let two = syn(client(family, 1_001), vip(family, port::TWIN));
            for frame in [&one, &two] {
                slb.client_sends("to", frame, &forwarded(frame.to(at), FIRST));
                let reply = answer(&frame.to(at));
                slb.backend_sends("from", &reply, &replied(reply.from(frame.dst), ROUTER));
                let kinds = [slb.flow(frame), slb.flow(&reply)].map(|flow| flow.map(|f| f.kind));
                assert_eq!(kinds, [Some(FLOW_ORIGINAL), Some(FLOW_REPLY)]);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_two_listeners_of_one_backend_when_a_client_uses_one_port_for_both_then_they_stay_apart() {
    with_slb(|slb| {
        for family in FAMILIES {
            let (one, two, at) = twins(family);
            slb.client_sends("one", &one, &forwarded(one.to(at), FIRST));

            let port = crate::direct::replaced_port(slb, &two, Verdict::Forwarded);

            let renamed = two.to(at).from(client(family, port));
            for flags in [SYN, ACK] {
                let frame = two.clone().flags(flags);
                slb.client_sends("two", &frame, &forwarded(renamed.clone().flags(flags), FIRST));
            }
            let reply = answer(&renamed);
            let to_client = Frame { src: two.dst, dst: two.src, ..reply.clone() };
            slb.backend_sends("two answers", &reply, &replied(to_client, ROUTER));
            let reply = answer(&one.to(at));
            slb.backend_sends("one answers", &reply, &replied(reply.from(one.dst), ROUTER));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_ended_flow_when_another_listener_gets_its_port_then_it_keeps_it() {
    with_slb(|slb| {
        for family in FAMILIES {
            let (one, two, at) = twins(family);
            slb.client_sends("one", &one, &forwarded(one.to(at), FIRST));
            let reset = one.clone().flags(RST);
            slb.client_sends("end of one", &reset, &forwarded(reset.to(at), FIRST));

            slb.client_sends("two", &two, &forwarded(two.to(at), FIRST));

            let reply = answer(&two.to(at));
            slb.backend_sends("two answers", &reply, &replied(reply.from(two.dst), ROUTER));
            assert_eq!(slb.flow(&one), None, "what is left of one would reach two's backend");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_lost_reply_entry_when_the_client_speaks_then_it_is_put_back() {
    with_slb(|slb| {
        for family in FAMILIES {
            let (_, two, at) = twins(family);
            let reply = answer(&two.to(at));
            slb.client_sends("SYN", &two, &forwarded(two.to(at), FIRST));
            slb.flows.remove(&reply.key());
            let ack = two.clone().flags(ACK);
            slb.age(&two, abi::REFRESH_JIFFIES + 10);

            slb.client_sends("ACK", &ack, &forwarded(ack.to(at), FIRST));

            slb.backend_sends("answer", &reply, &replied(reply.from(two.dst), ROUTER));
        }
    });
}

/// A place may be given to another flow while an entry still points to it.
#[test]
#[ignore = "needs root"]
fn given_a_reply_entry_whose_client_entry_is_another_flows_when_it_is_used_then_that_is_not_taken()
{
    with_slb(|slb| {
        for family in FAMILIES {
            let (_, two, at) = twins(family);
            let reply = answer(&two.to(at));
            slb.client_sends("SYN", &two, &forwarded(two.to(at), FIRST));
            slb.tamper(&two, |flow| flow.port = 9);

            // By its address and port alone, then.
            let origin = vip(family, port::SHARED);
            slb.backend_sends("answer", &reply, &replied(reply.from(origin), ROUTER));
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
            let roles = abi::Roles { roles: abi::ROLE_LOCAL };
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
