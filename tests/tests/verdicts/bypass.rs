//! Clients that talk to backends without a listener, next to those that use one.

mod others;
mod records;

use etherparse::SlicedPacket;
use slb_common::{abi::FLOW_BYPASS, verdict::Verdict};

use crate::{
    fixture::{
        FAMILIES, Outcome, Slb, answer, backend, client, datagram, forwarded, id, port, replied,
        syn, vip, with_slb,
    },
    frame::{ACK, FIN, Frame, RST, SYN, Transport},
    lab::{FIRST, LAN, LAN_MAC, ROUTER, WAN},
};

const UNTOUCHED: Outcome = Outcome::Untouched(Verdict::Bypass);
/// The number that backends begin with.
const BACKENDS_NUMBER: u32 = 0x5000_0000;

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

/// A backend's answer that acknowledges a client's SYN: a SYN-ACK, or a reset.
pub(crate) fn acknowledging(syn: &Frame, flags: u8) -> Frame {
    let (seq, ack) = (BACKENDS_NUMBER, syn.seq.wrapping_add(1));
    Frame { seq, ack, ..answer(syn) }.flags(flags)
}

/// The client's segment that acknowledges the backend's SYN-ACK.
fn acknowledged(syn: &Frame) -> Frame {
    let (seq, ack) = (syn.seq.wrapping_add(1), BACKENDS_NUMBER.wrapping_add(1));
    Frame { seq, ack, ..syn.clone() }.flags(ACK)
}

/// Opens a direct flow: a handshake, or a datagram and its answer.
fn open(slb: &mut Slb<'_>, case: &str, direct: &Frame) {
    slb.client_sends(case, direct, &UNTOUCHED);
    if matches!(direct.transport, Transport::Tcp { .. }) {
        slb.backend_sends(case, &acknowledging(direct, SYN | ACK), &UNTOUCHED);
        slb.client_sends(case, &acknowledged(direct), &UNTOUCHED);
    }
    slb.backend_sends(case, &answer(direct), &UNTOUCHED);
}

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

/// A client's SYN to each of the listeners, in turn and by hash, and to its backend, from the same port.
fn connections(family: usize, sport: u16) -> [(Frame, Frame); 2] {
    let [in_turn, _] = pairs(family, sport);
    let http = syn(client(family, sport), vip(family, port::HTTP));
    [in_turn, (http.clone(), http.to(backend(0, family, port::HTTP_BACKEND)))]
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

/// Data of a balanced flow that has kept its port passes in both directions.
fn goes_on(slb: &mut Slb<'_>, case: &str, balanced: &Frame, direct: &Frame) {
    let inside = forwarded(direct.clone().flags(ACK), FIRST);
    slb.client_sends(case, &balanced.clone().flags(ACK), &inside);
    let reply = answer(direct);
    slb.backend_sends(case, &reply, &replied(reply.from(balanced.dst), ROUTER));
}

#[test]
#[ignore = "needs root"]
fn given_a_direct_connection_when_its_client_port_goes_through_a_listener_then_that_gets_another() {
    with_slb(|slb| {
        for family in FAMILIES {
            let [_, by_hash] = connections(family, 1_000);
            let [in_turn, datagrams] = pairs(family, 1_000);
            for (balanced, direct) in [in_turn, by_hash, datagrams] {
                open(slb, "direct", &direct);
                let record = slb.flow(&answer(&direct)).expect("it is remembered");
                assert_eq!(record.kind, FLOW_BYPASS);

                let port = replaced_port(slb, &balanced, Verdict::Forwarded);

                goes_by(slb, "balanced", &balanced, &direct, port);
                slb.client_sends("direct goes on", &acknowledged(&direct), &UNTOUCHED);
                slb.backend_sends("its answer", &answer(&direct), &UNTOUCHED);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_direct_syn_when_the_backend_has_not_acknowledged_it_then_replies_are_balanced() {
    with_slb(|slb| {
        for family in FAMILIES {
            for (balanced, direct) in connections(family, 1_000) {
                slb.client_sends("SYN", &direct, &UNTOUCHED);
                let to_vip = |frame: &Frame| replied(frame.from(balanced.dst), ROUTER);
                let others = acknowledging(&Frame { seq: 7, ..direct.clone() }, SYN | ACK);
                for (case, reply) in [
                    ("data", answer(&direct)),
                    ("FIN", answer(&direct).flags(FIN | ACK)),
                    ("a SYN-ACK for another", others.clone()),
                    ("a reset for another", others.flags(RST | ACK)),
                    ("a SYN that acknowledges nothing", answer(&direct).flags(SYN)),
                ] {
                    slb.backend_sends(case, &reply, &to_vip(&reply));
                }
                let answered = acknowledging(&direct, SYN | ACK);
                slb.backend_sends("its SYN-ACK", &answered, &UNTOUCHED);

                // The client has not acknowledged that: it may never have sent the SYN.
                let reply = answer(&direct);
                slb.backend_sends("too early", &reply, &to_vip(&reply));
                let guess = Frame { ack: BACKENDS_NUMBER - 1, ..acknowledged(&direct) };
                slb.client_sends("a guess", &guess, &UNTOUCHED);
                slb.backend_sends("still", &reply, &to_vip(&reply));
                slb.backend_sends("its SYN-ACK again", &answered, &UNTOUCHED);
                slb.client_sends("its ACK", &acknowledged(&direct), &UNTOUCHED);
                slb.backend_sends("direct", &reply, &UNTOUCHED);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_direct_syn_when_the_backend_refuses_it_then_the_client_is_told() {
    with_slb(|slb| {
        for family in FAMILIES {
            for (balanced, direct) in connections(family, 1_000) {
                slb.client_sends("SYN", &direct, &UNTOUCHED);
                slb.backend_sends("refused", &acknowledging(&direct, RST | ACK), &UNTOUCHED);

                slb.client_sends("balanced", &balanced, &forwarded(direct.clone(), FIRST));
                goes_on(slb, "it keeps its port", &balanced, &direct);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_handshake_when_another_syn_comes_in_between_then_the_connection_is_direct() {
    with_slb(|slb| {
        for family in FAMILIES {
            for (_, direct) in connections(family, 1_000) {
                let forged = Frame { seq: 7, ..direct.clone() };
                slb.client_sends("SYN", &direct, &UNTOUCHED);
                slb.backend_sends("SYN-ACK", &acknowledging(&direct, SYN | ACK), &UNTOUCHED);
                slb.client_sends("another SYN", &forged, &UNTOUCHED);
                slb.backend_sends("again", &acknowledging(&direct, SYN | ACK), &UNTOUCHED);
                slb.client_sends("ACK", &acknowledged(&direct), &UNTOUCHED);
                slb.backend_sends("data", &answer(&direct), &UNTOUCHED);

                // Neither does one end what is there, nor a reset and one.
                for forged in [forged.clone(), forged.clone().flags(RST), forged] {
                    slb.client_sends("forged", &forged, &UNTOUCHED);
                    slb.backend_sends("data", &answer(&direct), &UNTOUCHED);
                }
                let state = slb.flow(&answer(&direct)).expect("a record").state();
                assert!(!state.has_ended(), "{state:?}");
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_ended_flow_when_its_client_port_goes_to_the_backend_directly_then_that_works() {
    let ends: [(&str, &[u8], &[u8]); 3] = [
        ("closed", &[FIN | ACK], &[FIN | ACK]),
        ("reset by the client", &[RST], &[]),
        ("reset by the backend", &[], &[RST | ACK]),
    ];
    with_slb(|slb| {
        for family in FAMILIES {
            for (sport, (case, by_client, by_backend)) in (1_000..).zip(ends) {
                for (balanced, direct) in connections(family, sport) {
                    slb.client_sends(case, &balanced, &forwarded(direct.clone(), FIRST));
                    for &flags in by_client {
                        let inside = forwarded(direct.clone().flags(flags), FIRST);
                        slb.client_sends(case, &balanced.clone().flags(flags), &inside);
                    }
                    for &flags in by_backend {
                        let reply = answer(&direct).flags(flags);
                        slb.backend_sends(case, &reply, &replied(reply.from(balanced.dst), ROUTER));
                    }

                    open(slb, case, &direct);
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_ended_direct_connection_when_its_port_goes_through_a_listener_then_it_keeps_it() {
    with_slb(|slb| {
        for family in FAMILIES {
            for (balanced, direct) in connections(family, 1_000) {
                open(slb, "direct", &direct);
                slb.client_sends("its FIN", &direct.clone().flags(FIN | ACK), &UNTOUCHED);
                slb.backend_sends("their FIN", &answer(&direct).flags(FIN | ACK), &UNTOUCHED);

                slb.client_sends("balanced", &balanced, &forwarded(direct.clone(), FIRST));

                goes_on(slb, "balanced", &balanced, &direct);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_direct_connection_when_it_is_begun_again_then_it_is_alive() {
    with_slb(|slb| {
        for family in FAMILIES {
            for (balanced, direct) in connections(family, 1_000) {
                open(slb, "first", &direct);
                slb.client_sends("reset", &direct.clone().flags(RST), &UNTOUCHED);
                open(slb, "again", &Frame { seq: 0x7000_0000, ..direct.clone() });

                let port = replaced_port(slb, &balanced, Verdict::Forwarded);

                goes_by(slb, "balanced", &balanced, &direct, port);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_datagrams_to_a_backend_when_a_balanced_flow_may_have_their_port_then_that_has_the_answers()
{
    with_slb(|slb| {
        for family in FAMILIES {
            let [_, in_turn] = pairs(family, 1_000);
            let dns = datagram(client(family, 1_000), vip(family, port::DNS));
            let by_hash = (dns.clone(), dns.to(backend(0, family, port::DNS_BACKEND)));
            for (balanced, direct) in [in_turn, by_hash] {
                slb.client_sends("balanced", &balanced, &forwarded(direct.clone(), FIRST));
                slb.client_sends("direct", &direct, &UNTOUCHED);
                goes_on(slb, "balanced", &balanced, &direct);
            }
            // Nothing goes through the listener there: the hash gives that port another backend.
            open(slb, "other backend", &dns.to(backend(1, family, port::DNS_BACKEND)));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_as_the_client_of_another_when_it_talks_to_it_directly_then_both_are_left_alone()
{
    with_slb(|slb| {
        for family in FAMILIES {
            let tcp = syn(backend(1, family, 40_000), backend(0, family, port::TURN_BACKEND));
            let udp = datagram(tcp.src, backend(0, family, port::SIP_BACKEND));
            for direct in [tcp, udp] {
                let direct = Frame { dst_mac: LAN_MAC, ..direct };
                let is_tcp = matches!(direct.transport, Transport::Tcp { .. });
                slb.check("first", LAN, &direct.bytes(), &UNTOUCHED);
                if is_tcp {
                    slb.backend_sends("SYN-ACK", &acknowledging(&direct, SYN | ACK), &UNTOUCHED);
                    slb.check("ACK", LAN, &acknowledged(&direct).bytes(), &UNTOUCHED);
                }
                slb.backend_sends("answer", &answer(&direct), &UNTOUCHED);
            }
        }
    });
}

/// Whether the backends of TURN and HTTP have flows that are to be looked for.
fn is_marked(slb: &Slb<'_>, family: usize) -> [bool; 2] {
    let marks = records::marks(slb);
    [id::TURN, id::HTTP].map(|id| marks.get(&(id + family as u32), 0).expect("a mark") != 0)
}
