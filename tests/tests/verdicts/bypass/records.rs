//! What is remembered of direct flows, and what else goes by it.

use std::collections::{HashMap, HashSet};

use aya::maps::{Array, MapData};
use slb_common::{
    abi::{self, FLOW_BYPASS},
    verdict::Verdict,
};
use slb_user::datapath::{Question, SweepRequest};

use super::{UNTOUCHED, connections, open, pairs, replaced_port};
use crate::{
    fixture::{
        FAMILIES, IDLE_JIFFIES, Outcome, Slb, answer, backend, client, datagram, id, port,
        with_capacity, with_slb,
    },
    fragments::fragments,
    frame::{Frame, icmp},
    icmp::quote,
    lab::{LAN, WAN},
};

/// `SLB_BYPASS`.
pub(super) fn marks(slb: &Slb<'_>) -> Array<MapData, u32> {
    slb.pinned("SLB_BYPASS").try_into().expect("an array")
}

/// Has flows of a backend looked for until then.
pub(super) fn set_mark(slb: &Slb<'_>, id: u32, until: u32) {
    marks(slb).set(id, until, 0).expect("a mark");
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_that_knows_every_port_when_another_flow_begins_then_there_is_no_port() {
    with_capacity(1 << 18, |slb| {
        let [(balanced, direct), _] = pairs(0, 1_000);
        open(slb, "direct", &direct);
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

#[test]
#[ignore = "needs root"]
fn given_direct_packets_in_fragments_when_they_arrive_then_all_are_left_alone() {
    with_slb(|slb| {
        for family in FAMILIES {
            let payload = vec![7; 2_000];
            for (number, (_, direct)) in (1..).zip(pairs(family, 1_000)) {
                let direct = Frame { payload: payload.clone(), ..direct };
                let untouched = |number: usize| {
                    // The others have no ports.
                    Outcome::Untouched([Verdict::Bypass, Verdict::NotOurs][usize::from(number > 0)])
                };
                for (part, bytes) in fragments(&direct, number).iter().enumerate() {
                    slb.check("direct", WAN, bytes, &untouched(part));
                }
                open(slb, "whole", &direct);
                let reply = Frame { payload: payload.clone(), ..answer(&direct) };
                for (part, bytes) in fragments(&reply, number).iter().enumerate() {
                    slb.check("answer", LAN, bytes, &untouched(part));
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_error_about_a_clients_packet_when_the_backend_has_answered_it_directly_then_it_is_left_alone()
 {
    with_slb(|slb| {
        for family in FAMILIES {
            for (balanced, direct) in connections(family, 1_000) {
                let router = client(family, 0);
                let kind = [[3, 3], [1, 4]][family];
                let base = Frame { src: router, ..answer(&direct) };
                let error = icmp(&base, kind, [0; 4], &quote(&direct, 500));
                slb.client_sends("SYN", &direct, &UNTOUCHED);
                let run = slb.run(LAN, &error.bytes());
                assert_eq!(run.verdict, Verdict::Replied, "{balanced:?} may be meant");

                open(slb, "direct", &direct);
                slb.backend_sends("error", &error, &Outcome::Untouched(Verdict::NotOurs));
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_direct_flows_when_packets_are_explained_then_that_is_what_becomes_of_them() {
    with_slb(|slb| {
        let explainer = slb.explainer();
        for family in FAMILIES {
            for (balanced, direct) in connections(family, 1_000) {
                let ask = |slb: &Slb<'_>, to: &Frame| {
                    let question = Question::new(abi::TCP, to.src, to.dst);
                    explainer.explain(&question, slb.now()).expect("the maps")
                };
                assert_eq!(ask(slb, &direct).verdict, Some(Verdict::Bypass));
                slb.client_sends("SYN", &direct, &UNTOUCHED);
                let told = ask(slb, &balanced);
                assert_eq!(
                    (told.verdict, told.from),
                    (Some(Verdict::Forwarded), Some(balanced.src))
                );

                open(slb, "direct", &direct);
                assert_eq!(ask(slb, &direct).verdict, Some(Verdict::Bypass));
                let told = ask(slb, &balanced);
                assert_eq!((told.verdict, told.from), (Some(Verdict::Forwarded), None), "drawn");
                let port = replaced_port(slb, &balanced, Verdict::Forwarded);
                let told = ask(slb, &balanced);
                assert_eq!(told.from, Some(client(family, port)));
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_direct_flow_when_the_agent_starts_again_then_it_is_still_known() {
    with_slb(|slb| {
        let [(_, direct), (_, datagrams)] = pairs(0, 1_000);
        for frame in [&direct, &datagrams] {
            open(slb, "direct", frame);
        }
        slb.restart();
        for frame in [&direct, &datagrams] {
            slb.backend_sends("answer", &answer(frame), &UNTOUCHED);
            let record = slb.flow(&answer(frame)).expect("it is remembered");
            assert_eq!(record.kind, FLOW_BYPASS);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_records_that_are_over_when_the_table_is_swept_then_only_they_are_removed() {
    with_slb(|slb| {
        let [[(_, old), _], [(_, new), _]] = [1_000, 1_001].map(|sport| pairs(0, sport));
        for direct in [&old, &new] {
            open(slb, "direct", direct);
        }
        slb.age(&answer(&old), 2 * IDLE_JIFFIES);
        let now = slb.now();
        let request = SweepRequest {
            watched: HashMap::default(),
            leaving: HashSet::default(),
            closed: HashSet::default(),
            listeners: HashSet::default(),
            now,
            closing: 0,
        };
        let _ = slb.table.sweep(request);
        let are_there = [&old, &new].map(|direct| slb.flow(&answer(direct)).is_some());
        assert_eq!((are_there, slb.table.active_flows()), ([false, true], 0));
    });
}

#[test]
#[ignore = "needs root"]
fn given_full_nat_when_a_client_talks_to_the_backend_directly_then_no_port_is_taken() {
    with_slb(|slb| {
        for family in FAMILIES {
            let direct =
                datagram(client(family, 1_000), backend(0, family, port::FULL_UDP_BACKEND));
            slb.client_sends("direct", &direct, &UNTOUCHED);
            let run = slb.run(LAN, &answer(&direct).bytes());
            assert_eq!(run.verdict.action(), slb_common::verdict::Action::Pass);
            assert_eq!(run.bytes, answer(&direct).bytes());
        }
    });
}
