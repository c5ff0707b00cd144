//! What direct packets change for the flows of others: nothing, until a backend has answered them.

use slb_common::{
    abi::{ConnState, FLOW_ORIGINAL},
    verdict::Verdict,
};

use super::{
    UNTOUCHED, acknowledging, connections, goes_by, goes_on, is_marked, open, pairs, records,
    replaced_port,
};
use crate::{
    fixture::{
        FAMILIES, IDLE_JIFFIES, answer, backend, client, datagram, forwarded, id, port, replied,
        syn, vip, with_slb,
    },
    frame::{ACK, FIN, Frame, RST, SYN},
    lab::{FIRST, ROUTER},
};

#[test]
#[ignore = "needs root"]
fn given_balanced_connections_when_their_ports_go_to_the_backend_directly_then_nothing_changes() {
    with_slb(|slb| {
        for family in FAMILIES {
            for (sport, challenge) in [(1_000, true), (1_001, false)] {
                for (balanced, direct) in connections(family, sport) {
                    slb.client_sends("balanced", &balanced, &forwarded(direct.clone(), FIRST));
                    for flags in [SYN, ACK, FIN | ACK, SYN, RST, SYN] {
                        let forged = Frame { seq: 7, ..direct.clone() }.flags(flags);
                        slb.client_sends("direct", &forged, &UNTOUCHED);
                        if challenge {
                            let ack = Frame { seq: 9, ack: 11, ..answer(&direct) };
                            let to_client = replied(ack.from(balanced.dst), ROUTER);
                            slb.backend_sends("challenge ACK", &ack, &to_client);
                        }
                        goes_on(slb, "balanced goes on", &balanced, &direct);
                    }
                }
            }
            assert_eq!(is_marked(slb, family), [false; 2]);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_direct_syns_without_an_answer_when_flows_begin_then_they_need_no_more_entries() {
    with_slb(|slb| {
        for family in FAMILIES {
            for sport in 1_000..1_100 {
                for (_, direct) in connections(family, sport) {
                    slb.client_sends("direct", &direct, &UNTOUCHED);
                }
            }
            for sport in (1_000..1_200).step_by(10) {
                for (balanced, direct) in connections(family, sport) {
                    slb.client_sends("balanced", &balanced, &forwarded(direct.clone(), FIRST));
                    let reply = acknowledging(&Frame { seq: 7, ..direct.clone() }, SYN | ACK);
                    let to_client = replied(reply.from(balanced.dst), ROUTER);
                    slb.backend_sends("its SYN-ACK", &reply, &to_client);
                    goes_on(slb, "data", &balanced, &direct);
                    let kind = slb.flow(&balanced).map(|flow| flow.kind);
                    let is_in_turn = balanced.dst.port() == port::TURN;
                    assert_eq!(kind, is_in_turn.then_some(FLOW_ORIGINAL), "{balanced:?}");
                }
            }
            assert_eq!(is_marked(slb, family), [false; 2]);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_direct_connection_when_others_begin_by_hash_then_they_need_no_entries() {
    with_slb(|slb| {
        for family in FAMILIES {
            let [_, (_, direct)] = connections(family, 1_000);
            open(slb, "direct", &direct);
            assert_eq!(is_marked(slb, family), [false, true]);
            for (balanced, direct) in
                [connections(family, 1_001), connections(family, 1_002)].map(|[_, by_hash]| by_hash)
            {
                slb.client_sends("balanced", &balanced, &forwarded(direct.clone(), FIRST));
                goes_on(slb, "data", &balanced, &direct);
                assert_eq!(slb.flow(&balanced), None);
                assert_eq!(slb.flow(&answer(&direct)), None);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_listeners_that_share_a_backend_when_a_direct_syn_comes_then_their_flows_are_as_before() {
    with_slb(|slb| {
        for family in FAMILIES {
            let balanced = syn(client(family, 1_000), vip(family, port::TWIN));
            let direct = balanced.to(backend(0, family, port::SHARED_BACKEND));
            slb.client_sends("balanced", &balanced, &forwarded(direct.clone(), FIRST));
            slb.client_sends("direct", &Frame { seq: 7, ..direct.clone() }, &UNTOUCHED);
            goes_on(slb, "balanced", &balanced, &direct);

            // The entry of its answers is gone, and a record takes its place.
            slb.flows.remove(&answer(&direct).key());
            slb.client_sends("direct", &Frame { seq: 7, ..direct.clone() }, &UNTOUCHED);
            slb.age(&balanced, IDLE_JIFFIES / 2);
            goes_on(slb, "balanced", &balanced, &direct);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_flow_with_another_port_when_it_goes_on_then_it_is_looked_for() {
    with_slb(|slb| {
        for family in FAMILIES {
            let [_, (balanced, direct)] = connections(family, 1_000);
            open(slb, "direct", &direct);
            let port = replaced_port(slb, &balanced, Verdict::Forwarded);
            goes_by(slb, "balanced", &balanced, &direct, port);
            // As if the direct connection had ended long ago.
            let inside = Frame { src: client(family, port), ..direct };
            for side in ["client", "backend"] {
                let until = slb.now().wrapping_add(1_000);
                records::set_mark(slb, id::HTTP + family as u32, until);
                slb.age(&balanced, IDLE_JIFFIES / 2);

                if side == "client" {
                    let frame = balanced.clone().flags(ACK);
                    slb.client_sends(side, &frame, &forwarded(inside.clone().flags(ACK), FIRST));
                } else {
                    let reply = answer(&inside);
                    let to_client = Frame { src: balanced.dst, dst: balanced.src, ..reply.clone() };
                    slb.backend_sends(side, &reply, &replied(to_client, ROUTER));
                }

                let mark = records::marks(slb).get(&(id::HTTP + family as u32), 0).expect("a mark");
                assert!(mark.wrapping_sub(until) < IDLE_JIFFIES, "{side}: {until} to {mark}");
                assert_ne!(mark, until | 1, "{side}");
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_datagram_in_the_name_of_a_client_when_its_server_streams_then_that_goes_on() {
    with_slb(|slb| {
        for family in FAMILIES {
            let [_, (balanced, direct)] = pairs(family, 1_000);
            let dns = datagram(client(family, 1_000), vip(family, port::DNS));
            let by_hash = (dns.clone(), dns.to(backend(0, family, port::DNS_BACKEND)));
            for (balanced, direct) in [(balanced, direct), by_hash] {
                slb.client_sends("balanced", &balanced, &forwarded(direct.clone(), FIRST));
                for _ in 0..3 {
                    slb.client_sends("forged", &direct, &UNTOUCHED);
                    let reply = answer(&direct);
                    let to_client = replied(reply.from(balanced.dst), ROUTER);
                    slb.backend_sends("streams", &reply, &to_client);
                }
                assert_eq!(slb.flow(&answer(&direct)), None, "the record is gone");
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_record_of_long_ago_when_its_client_sends_then_it_counts_no_more() {
    with_slb(|slb| {
        for family in FAMILIES {
            for (balanced, direct) in connections(family, 1_000) {
                open(slb, "direct", &direct);
                slb.age(&answer(&direct), 2 * IDLE_JIFFIES);
                let state = slb.flow(&answer(&direct)).expect("a record").state();
                assert!(state.contains(ConnState::ESTABLISHED));

                slb.client_sends("direct", &acknowledging(&answer(&direct), ACK), &UNTOUCHED);
                let reply = answer(&direct);
                slb.backend_sends("answer", &reply, &replied(reply.from(balanced.dst), ROUTER));
            }
        }
    });
}
