//! Clients that talk to backends without a listener, next to those that use one.

use etherparse::SlicedPacket;
use slb_common::{
    abi::{self, FLOW_BYPASS},
    verdict::Verdict,
};

use crate::{
    fixture::{
        FAMILIES, Outcome, Slb, answer, backend, client, datagram, forwarded, id, port, replied,
        syn, vip, with_capacity, with_slb,
    },
    frame::{ACK, FIN, Frame, RST, SYN},
    lab::{FIRST, ROUTER, WAN},
};

/// Runs a client's frame and gives the source port that it leaves with, which must be another.
pub(crate) fn replaced_port(slb: &mut Slb<'_>, frame: &Frame, verdict: Verdict) -> u16 {
    let run = slb.run(WAN, &frame.bytes());
    assert_eq!(run.verdict, verdict, "{frame:?}");
    let packet = SlicedPacket::from_ethernet(&run.bytes).expect("a packet");
    let port = match packet.transport.expect("a transport header") {
        etherparse::TransportSlice::Tcp(tcp) => tcp.source_port(),
        etherparse::TransportSlice::Udp(udp) => udp.source_port(),
        other => panic!("{other:?}"),
    };
    assert_ne!(port, frame.src.port(), "the backend would take it for the other flow");
    assert!(port >= 1_024, "port {port} is a privileged one");
    port
}

const UNTOUCHED: Outcome = Outcome::Untouched(Verdict::Bypass);

/// A client's first frame to a listener whose flows have entries, and to its backend, from the same
/// port.
fn pairs(family: usize, sport: u16) -> [(Frame, Frame); 2] {
    let from = client(family, sport);
    let (tcp, udp) = (syn(from, vip(family, port::TURN)), datagram(from, vip(family, port::SIP)));
    [
        (tcp.clone(), tcp.to(backend(0, family, port::TURN_BACKEND))),
        (udp.clone(), udp.to(backend(0, family, port::SIP_BACKEND))),
    ]
}

/// The flow of `frame` is translated to `port` in both directions.
fn goes_by(slb: &mut Slb<'_>, case: &str, frame: &Frame, to: &Frame, port: u16) {
    let mut inside = to.clone();
    inside.src.set_port(port);
    for flags in [SYN, ACK] {
        let (frame, inside) = (frame.clone().flags(flags), inside.clone().flags(flags));
        slb.client_sends(case, &frame, &forwarded(inside, FIRST));
    }
    let reply = answer(&inside);
    let to_client = Frame { src: frame.dst, dst: frame.src, ..reply.clone() };
    slb.backend_sends(case, &reply, &replied(to_client, ROUTER));
}

#[test]
#[ignore = "needs root"]
fn given_a_direct_connection_when_its_client_port_goes_through_a_listener_then_that_gets_another() {
    with_slb(|slb| {
        for family in FAMILIES {
            for (balanced, direct) in pairs(family, 1_000) {
                slb.client_sends("direct", &direct, &UNTOUCHED);
                let marker = slb.flow(&answer(&direct)).expect("it is remembered");
                assert_eq!(marker.kind, FLOW_BYPASS);
                slb.backend_sends("its answer", &answer(&direct), &UNTOUCHED);

                let port = replaced_port(slb, &balanced, Verdict::Forwarded);

                goes_by(slb, "balanced", &balanced, &direct, port);
                slb.client_sends("direct goes on", &direct.clone().flags(ACK), &UNTOUCHED);
                slb.backend_sends("its answer", &answer(&direct), &UNTOUCHED);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_flow_when_its_client_port_goes_to_the_backend_directly_then_that_gets_another() {
    with_slb(|slb| {
        for family in FAMILIES {
            for (balanced, direct) in pairs(family, 1_000) {
                slb.client_sends("balanced", &balanced, &forwarded(direct.clone(), FIRST));

                let port = replaced_port(slb, &direct, Verdict::Forwarded);

                goes_by(slb, "direct", &direct, &direct, port);
                let frame = balanced.clone().flags(ACK);
                let inside = forwarded(direct.clone().flags(ACK), FIRST);
                slb.client_sends("balanced goes on", &frame, &inside);
                let reply = answer(&direct);
                slb.backend_sends("answer", &reply, &replied(reply.from(balanced.dst), ROUTER));
            }
            let flows = slb.maps.traffic(id::TURN + family as u32).unwrap().flows;
            assert_eq!(flows, 1, "a direct connection is no flow of a listener");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_ended_flows_of_which_the_direct_one_had_another_port_when_it_begins_again_then_it_keeps_its()
 {
    with_slb(|slb| {
        for family in FAMILIES {
            let [(balanced, direct), _] = pairs(family, 1_000);
            slb.client_sends("balanced", &balanced, &forwarded(direct.clone(), FIRST));
            let port = replaced_port(slb, &direct, Verdict::Forwarded);
            let mut moved = direct.clone();
            moved.src.set_port(port);
            for (case, frame, inside) in
                [("balanced", &balanced, &direct), ("direct", &direct, &moved)]
            {
                let inside = forwarded(inside.clone().flags(RST), FIRST);
                slb.client_sends(case, &frame.clone().flags(RST), &inside);
            }

            slb.client_sends("again", &direct, &UNTOUCHED);

            slb.backend_sends("answer", &answer(&direct).flags(SYN | ACK), &UNTOUCHED);
            slb.client_sends("ACK", &direct.clone().flags(ACK), &UNTOUCHED);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_ended_flow_when_its_client_port_goes_to_the_backend_directly_then_it_is_left_alone() {
    let ends: [(&str, &[u8], &[u8]); 3] = [
        ("closed", &[FIN | ACK], &[FIN | ACK]),
        ("reset by the client", &[RST], &[]),
        ("reset by the backend", &[], &[RST | ACK]),
    ];
    with_slb(|slb| {
        for family in FAMILIES {
            for (sport, (case, by_client, by_backend)) in (1_000..).zip(ends) {
                let [(balanced, direct), _] = pairs(family, sport);
                slb.client_sends(case, &balanced, &forwarded(direct.clone(), FIRST));
                for &flags in by_client {
                    let inside = forwarded(direct.clone().flags(flags), FIRST);
                    slb.client_sends(case, &balanced.clone().flags(flags), &inside);
                }
                for &flags in by_backend {
                    let reply = answer(&direct).flags(flags);
                    slb.backend_sends(case, &reply, &replied(reply.from(balanced.dst), ROUTER));
                }

                slb.client_sends(case, &direct, &UNTOUCHED);

                let reply = answer(&direct);
                slb.backend_sends(case, &reply.clone().flags(SYN | ACK), &UNTOUCHED);
                slb.client_sends(case, &direct.clone().flags(ACK), &UNTOUCHED);
                slb.backend_sends(case, &reply, &UNTOUCHED);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_ended_direct_connection_when_its_port_goes_through_a_listener_then_it_keeps_it() {
    with_slb(|slb| {
        for family in FAMILIES {
            let [(balanced, direct), _] = pairs(family, 1_000);
            slb.client_sends("direct", &direct, &UNTOUCHED);
            slb.client_sends("its FIN", &direct.clone().flags(FIN | ACK), &UNTOUCHED);
            slb.backend_sends("their FIN", &answer(&direct).flags(FIN | ACK), &UNTOUCHED);

            slb.client_sends("balanced", &balanced, &forwarded(direct.clone(), FIRST));

            let reply = answer(&direct);
            slb.backend_sends("answer", &reply, &replied(reply.from(balanced.dst), ROUTER));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_direct_connection_when_it_is_begun_again_then_it_is_alive() {
    with_slb(|slb| {
        for family in FAMILIES {
            let [(balanced, direct), _] = pairs(family, 1_000);
            slb.client_sends("first", &direct, &UNTOUCHED);
            slb.client_sends("reset", &direct.clone().flags(RST), &UNTOUCHED);
            slb.client_sends("again", &direct, &UNTOUCHED);

            let port = replaced_port(slb, &balanced, Verdict::Forwarded);

            goes_by(slb, "balanced", &balanced, &direct, port);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_that_knows_every_port_when_another_flow_begins_then_there_is_no_port() {
    with_capacity(1 << 18, |slb| {
        let [(balanced, direct), _] = pairs(0, 1_000);
        slb.client_sends("direct", &direct, &UNTOUCHED);
        let answer = answer(&direct);
        let marker = slb.flow(&answer).expect("it is remembered");
        for port in (1..=u16::MAX).filter(|port| *port != direct.src.port()) {
            slb.flows.insert(&abi::FlowKey { dport: port, ..answer.key() }, marker);
        }

        slb.client_sends("no port", &balanced, &Outcome::Untouched(Verdict::NoPort));

        assert_eq!(slb.flow(&balanced), None);
        assert_eq!(slb.maps.traffic(id::TURN).unwrap().flows, 0);
    });
}

/// Without an entry, a flow may be there or not.
#[test]
#[ignore = "needs root"]
fn given_a_listener_by_hash_when_a_client_talks_to_its_backend_directly_then_both_can_live() {
    with_slb(|slb| {
        for family in FAMILIES {
            let from = client(family, 1_000);
            let http = syn(from, vip(family, port::HTTP));
            let dns = datagram(from, vip(family, port::DNS));
            for (balanced, backend_port) in [(http, port::HTTP_BACKEND), (dns, port::DNS_BACKEND)] {
                let inside = balanced.to(backend(0, family, backend_port));
                slb.client_sends("balanced", &balanced, &forwarded(inside.clone(), FIRST));

                let port = replaced_port(slb, &inside, Verdict::Forwarded);

                goes_by(slb, "direct", &inside, &inside, port);
                let ack = balanced.clone().flags(ACK);
                let to = forwarded(inside.clone().flags(ACK), FIRST);
                slb.client_sends("balanced goes on", &ack, &to);
                let reply = answer(&inside);
                slb.backend_sends("answer", &reply, &replied(reply.from(balanced.dst), ROUTER));

                // The backend that the hash would not choose cannot take it for another flow.
                let other = balanced.to(backend(1, family, backend_port));
                slb.client_sends("other backend", &other, &UNTOUCHED);
                slb.backend_sends("its answer", &answer(&other), &UNTOUCHED);
            }
        }
    });
}
