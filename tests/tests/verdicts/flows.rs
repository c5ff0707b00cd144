//! What the flow table remembers: when a flow keeps its backend, and when it begins anew.

use slb_common::{
    abi::{self, BACKEND_IN_USE, Traffic},
    verdict::Verdict,
};

use crate::{
    fixture::{
        FAMILIES, IDLE_JIFFIES, Outcome, Slb, answer, backend, client, datagram, forwarded, id,
        port, replied, syn, vip, with_slb,
    },
    frame::{ACK, FIN, Frame, RST},
    lab::{FIRST, ROUTER, SECOND},
};

/// A flow through a listener whose new flows go elsewhere since.
struct Old {
    family: usize,
    /// The client's first frame.
    first: Frame,
    backend_port: u16,
}

impl Old {
    fn tcp(slb: &mut Slb<'_>, family: usize, sport: u16) -> Self {
        let first = syn(client(family, sport), vip(family, port::HTTP));
        Self::begin(slb, family, first, port::HTTP_BACKEND, [id::HTTP, id::HTTP_SECOND])
    }

    fn udp(slb: &mut Slb<'_>, family: usize, sport: u16) -> Self {
        let first = datagram(client(family, sport), vip(family, port::DNS));
        Self::begin(slb, family, first, port::DNS_BACKEND, [id::DNS, id::DNS_SECOND])
    }

    fn begin(
        slb: &mut Slb<'_>,
        family: usize,
        first: Frame,
        backend_port: u16,
        [before, after]: [u32; 2],
    ) -> Self {
        let (listener, proto) = (first.dst, first.key().proto);
        slb.schedule(listener, proto, vec![before + family as u32]);
        let old = Self { family, first, backend_port };
        old.stays(slb, "first", &old.first.clone());
        slb.schedule(listener, proto, vec![after + family as u32]);
        old
    }

    fn inside(&self, frame: &Frame) -> Frame {
        frame.to(backend(0, self.family, self.backend_port))
    }

    /// The first backend's answer.
    fn answer(&self) -> Frame {
        answer(&self.inside(&self.first))
    }

    fn answers(&self, slb: &mut Slb<'_>, case: &str, flags: u8) {
        let answer = self.answer().flags(flags);
        slb.backend_sends(case, &answer, &replied(answer.from(self.first.dst), ROUTER));
    }

    /// The client's frame still reaches the first backend.
    fn stays(&self, slb: &mut Slb<'_>, case: &str, frame: &Frame) {
        slb.client_sends(case, frame, &forwarded(self.inside(frame), FIRST));
    }

    /// The client's frame reaches the second backend, and the first one is out of it.
    fn moves(&self, slb: &mut Slb<'_>, case: &str, frame: &Frame) {
        let inside = frame.to(backend(1, self.family, self.backend_port));
        slb.client_sends(case, frame, &forwarded(inside.clone(), SECOND));
        let reply = answer(&inside);
        slb.backend_sends(case, &reply, &replied(reply.from(frame.dst), ROUTER));
        assert_eq!(slb.flow(&self.answer()), None, "{case}: what is left of the old flow");
    }
}

#[test]
#[ignore = "needs root"]
fn given_a_flow_when_the_schedule_changes_then_it_keeps_its_backend() {
    with_slb(|slb| {
        for family in FAMILIES {
            let tcp = Old::tcp(slb, family, 1_000);
            tcp.stays(slb, "ACK", &tcp.first.clone().flags(ACK));
            tcp.stays(slb, "SYN again", &tcp.first.clone());
            tcp.answers(slb, "answer", ACK);
            let udp = Old::udp(slb, family, 1_000);
            udp.stays(slb, "datagram", &udp.first.clone());
            udp.answers(slb, "answer", 0);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_flow_when_its_listener_is_removed_then_it_goes_on() {
    with_slb(|slb| {
        for family in FAMILIES {
            let tcp = Old::tcp(slb, family, 1_000);
            let listener = crate::fixture::endpoint(tcp.first.dst, abi::TCP);
            slb.change(|state| drop(state.listeners.remove(&listener)));
            tcp.stays(slb, "ACK", &tcp.first.clone().flags(ACK));
            tcp.answers(slb, "answer", ACK);
            let new = Outcome::Untouched(Verdict::NoListener);
            slb.client_sends("new", &syn(client(family, 2), vip(family, port::HTTP)), &new);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_flow_when_its_backend_is_not_usable_any_more_then_only_an_established_one_stays() {
    with_slb(|slb| {
        for family in FAMILIES {
            let tcp = Old::tcp(slb, family, 1_000);
            slb.backend(id::HTTP + family as u32, |backend| backend.flags = BACKEND_IN_USE);
            tcp.stays(slb, "ACK", &tcp.first.clone().flags(ACK));
            tcp.answers(slb, "answer", ACK);
            tcp.stays(slb, "FIN", &tcp.first.clone().flags(FIN | ACK));
            tcp.moves(slb, "SYN", &tcp.first.clone());

            let udp = Old::udp(slb, family, 1_000);
            slb.backend(id::DNS + family as u32, |backend| backend.flags = BACKEND_IN_USE);
            udp.moves(slb, "datagram", &udp.first.clone());
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_retired_backend_when_its_flow_goes_on_then_it_is_left_to_the_kernel() {
    with_slb(|slb| {
        let tcp = Old::tcp(slb, 0, 1_000);
        slb.change(|state| {
            state.backends.remove(&id::HTTP);
        });
        // Nobody follows the way to it any more, so the kernel has to find it.
        let ack = tcp.first.clone().flags(ACK);
        let inside = tcp.inside(&ack);
        let left = Outcome::Translated(Verdict::ForwardedByKernel, inside);
        slb.client_sends("ACK", &ack, &left);
        tcp.answers(slb, "answer", ACK);
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_flow_when_its_backends_next_hop_changes_then_it_takes_the_new_one() {
    with_slb(|slb| {
        let tcp = Old::tcp(slb, 0, 1_000);
        slb.backend(id::HTTP, |backend| backend.hop = SECOND);
        let ack = tcp.first.clone().flags(ACK);
        slb.client_sends("ACK", &ack, &forwarded(tcp.inside(&ack), SECOND));
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_connection_when_it_has_ended_then_a_syn_begins_anew_and_not_before() {
    #[derive(Clone, Copy)]
    enum By {
        Client(u8),
        Backend(u8),
    }
    use By::{Backend, Client};
    let cases: [(&str, &[By], bool); 8] = [
        ("both have closed", &[Client(FIN | ACK), Backend(FIN | ACK)], true),
        ("both have closed, backend first", &[Backend(FIN | ACK), Client(FIN | ACK)], true),
        ("closed and acknowledged", &[Client(FIN), Backend(FIN), Client(ACK)], true),
        ("reset by the client", &[Client(RST)], true),
        ("reset by the backend", &[Backend(RST | ACK)], true),
        ("only the client has closed", &[Client(FIN | ACK), Backend(ACK)], false),
        ("only the backend has closed", &[Backend(FIN | ACK), Client(ACK)], false),
        ("nobody has closed", &[Client(ACK), Backend(ACK)], false),
    ];
    with_slb(|slb| {
        for family in FAMILIES {
            for (number, (case, history, ends)) in (1_000..).zip(cases) {
                let tcp = Old::tcp(slb, family, number);
                for by in history {
                    match *by {
                        Client(flags) => tcp.stays(slb, case, &tcp.first.clone().flags(flags)),
                        Backend(flags) => tcp.answers(slb, case, flags),
                    }
                }
                // What comes late still belongs to the old connection.
                tcp.stays(slb, case, &tcp.first.clone().flags(ACK));
                tcp.answers(slb, case, ACK);
                if ends {
                    tcp.moves(slb, case, &tcp.first.clone());
                    let inside = tcp.first.to(backend(1, family, port::HTTP_BACKEND));
                    let again = forwarded(inside, SECOND);
                    slb.client_sends(case, &tcp.first, &again);
                } else {
                    tcp.stays(slb, case, &tcp.first.clone());
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_idle_flow_when_it_is_older_than_the_timeout_then_it_begins_anew() {
    with_slb(|slb| {
        for family in FAMILIES {
            for (flow, case) in
                [(Old::tcp(slb, family, 1_000), "TCP"), (Old::udp(slb, family, 1_000), "UDP")]
            {
                slb.age(&flow.first, IDLE_JIFFIES - 1_000);
                slb.age(&flow.answer(), IDLE_JIFFIES - 1_000);
                flow.stays(slb, case, &flow.first.clone());
                slb.age(&flow.first, IDLE_JIFFIES + 1_000);
                slb.age(&flow.answer(), IDLE_JIFFIES + 1_000);
                flow.moves(slb, case, &flow.first.clone());
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_no_timeout_at_all_when_a_jiffy_has_passed_then_a_flow_begins_anew() {
    with_slb(|slb| {
        let udp = Old::udp(slb, 0, 1_000);
        slb.backend(id::DNS, |backend| backend.idle_jiffies = 0);
        std::thread::sleep(std::time::Duration::from_millis(30));
        udp.moves(slb, "idle", &udp.first.clone());
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_established_flow_when_a_syn_finds_no_backend_then_the_flow_goes_on() {
    with_slb(|slb| {
        for family in FAMILIES {
            let tcp = Old::tcp(slb, family, 1_000);
            slb.backend(id::HTTP + family as u32, |backend| backend.flags = BACKEND_IN_USE);
            slb.schedule(tcp.first.dst, abi::TCP, vec![]);

            slb.client_sends("SYN", &tcp.first, &Outcome::Untouched(Verdict::NoBackend));

            tcp.stays(slb, "ACK", &tcp.first.clone().flags(ACK));
            tcp.answers(slb, "answer", ACK);
        }
    });
}

/// The table forgets entries one by one: an entry's twin may belong to a newer flow by now.
#[test]
#[ignore = "needs root"]
fn given_a_left_over_reply_entry_when_it_is_cleared_away_then_the_newer_flow_keeps_its_own() {
    with_slb(|slb| {
        for family in FAMILIES {
            let tcp = Old::tcp(slb, family, 1_000);
            tcp.answers(slb, "reset", RST | ACK);
            slb.flows.remove(&tcp.first.key()).unwrap();
            let inside = tcp.first.to(backend(1, family, port::HTTP_BACKEND));
            slb.client_sends("newer flow", &tcp.first, &forwarded(inside, SECOND));
            let newer = slb.flow(&tcp.first);

            let twin = tcp.first.to(vip(family, port::TWIN));
            slb.client_sends("clears away", &twin, &forwarded(tcp.inside(&twin), FIRST));

            assert_eq!(slb.flow(&tcp.first), newer);
        }
    });
}

/// A stream from the backend is no idle flow, even if the client says nothing for long.
#[test]
#[ignore = "needs root"]
fn given_a_flow_with_answers_only_when_the_client_speaks_again_then_it_keeps_its_backend() {
    with_slb(|slb| {
        for family in FAMILIES {
            let udp = Old::udp(slb, family, 1_000);
            slb.age(&udp.first, IDLE_JIFFIES + 1_000);
            udp.answers(slb, "answer", 0);
            udp.stays(slb, "datagram", &udp.first.clone());

            let tcp = Old::tcp(slb, family, 1_000);
            slb.age(&tcp.first, IDLE_JIFFIES + 1_000);
            tcp.answers(slb, "answer", ACK);
            tcp.stays(slb, "ACK", &tcp.first.clone().flags(ACK));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_lost_entry_when_the_other_direction_speaks_then_it_is_put_back() {
    with_slb(|slb| {
        for family in FAMILIES {
            for flow in [Old::tcp(slb, family, 1_000), Old::udp(slb, family, 1_000)] {
                let (first, answer) = (flow.first.clone().flags(ACK), flow.answer());
                let same = |found: Option<abi::Flow>| {
                    found.map(|f| (f.addr, f.sport, f.dport, f.backend, f.kind))
                };
                let (forward, reply) = (same(slb.flow(&first)), same(slb.flow(&answer)));
                assert!(forward.is_some() && reply.is_some());

                slb.flows.remove(&answer.key()).unwrap();
                slb.age(&first, 10_000);
                flow.stays(slb, "reply entry lost", &first);
                assert_eq!(same(slb.flow(&answer)), reply);
                flow.answers(slb, "reply entry is back", ACK);

                slb.flows.remove(&first.key()).unwrap();
                slb.age(&answer, 10_000);
                flow.answers(slb, "forward entry lost", ACK);
                assert_eq!(same(slb.flow(&first)), forward);
                flow.stays(slb, "forward entry is back", &first);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_two_listeners_of_one_backend_when_a_client_uses_one_port_for_both_then_they_stay_apart() {
    with_slb(|slb| {
        for family in FAMILIES {
            let one = syn(client(family, 1_000), vip(family, port::HTTP));
            let two = one.to(vip(family, port::TWIN));
            let at = backend(0, family, port::HTTP_BACKEND);
            slb.client_sends("one", &one, &forwarded(one.to(at), FIRST));

            let port = crate::direct::replaced_port(slb, &two, Verdict::Forwarded);

            let renamed = two.to(at).from(client(family, port));
            for flags in [crate::frame::SYN, ACK] {
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
            let one = syn(client(family, 1_000), vip(family, port::HTTP));
            let two = one.to(vip(family, port::TWIN));
            let at = backend(0, family, port::HTTP_BACKEND);
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
fn given_a_flow_when_frames_go_both_ways_then_its_backend_is_charged() {
    with_slb(|slb| {
        for family in FAMILIES {
            let first = syn(client(family, 1_000), vip(family, port::HTTP));
            let inside = first.to(backend(0, family, port::HTTP_BACKEND));
            for flags in [crate::frame::SYN, crate::frame::SYN, ACK] {
                let frame = first.clone().flags(flags);
                slb.client_sends("to", &frame, &forwarded(inside.clone().flags(flags), FIRST));
            }
            let reply = answer(&inside);
            slb.backend_sends("from", &reply, &replied(reply.from(first.dst), ROUTER));

            let traffic = slb.loaded.maps.traffic(id::HTTP + family as u32).unwrap();
            let expected = Traffic {
                flows: 1,
                packets: 3,
                bytes: 3 * first.bytes().len() as u64,
                reply_packets: 1,
                reply_bytes: reply.bytes().len() as u64,
            };
            assert_eq!(traffic, expected);
        }
    });
}
