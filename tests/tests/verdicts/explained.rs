//! `slb explain` says what the packet path does.

mod compare;
mod packets;
mod world;

use slb_common::{abi, verdict::Verdict};
use slb_lab::Dice;
use slb_user::datapath::{Capacities, Question};

use crate::{
    fixture::{FAMILIES, backend, id, port, syn, vip, with_capacities, with_slb},
    frame::ACK,
    lab::{LAN, WAN},
};
use compare::{Sample, Tally};
use packets::Packets;
use world::World;

const FLOWS: usize = 10_000;
/// Each with two phases.
const WORLDS: usize = 5;

/// What has to be among the verdicts that are compared.
const VERDICTS: &[Verdict] = &[
    Verdict::Forwarded,
    Verdict::ForwardedByKernel,
    Verdict::Replied,
    Verdict::Echo,
    Verdict::NotOurs,
    Verdict::OtherProtocol,
    Verdict::NoListener,
    Verdict::NoBackend,
    Verdict::NoNeighbour,
    Verdict::Reset,
    Verdict::NoFlow,
    Verdict::Closed,
    Verdict::Denied,
    Verdict::FlowLimit,
    Verdict::BandwidthLimit,
    Verdict::SourceLimit,
    Verdict::Fragment,
    Verdict::Martian,
    Verdict::TtlExpired,
    Verdict::Untranslatable,
    Verdict::BeforeClientAddress,
];

/// What explanations look at.
const LOOKS: &[&str] = &[
    "TTL",
    "access list",
    "address",
    "backend",
    "echo",
    "error",
    "flow",
    "flow table",
    "fragments",
    "limit",
    "listener",
    "persistence",
    "proxy protocol",
    "route",
    "schedule",
    "slot",
    "source",
];

#[test]
#[ignore = "needs root"]
fn given_a_backend_as_client_when_its_flows_are_explained_then_its_side_of_the_gateway_counts() {
    with_slb(|slb| {
        let explainer = slb.explainer();
        let mut tally = Tally::default();
        for family in FAMILIES {
            let number = id::HTTP + family as u32;
            slb.backend(number, |backend| {
                backend.source = 1 + 2 * family as u16;
                backend.sources = 2;
            });
            let to = vip(family, port::HTTP);
            let host = backend(0, family, 5_000);
            for is_established in [false, true] {
                let frame = if is_established { syn(host, to).flags(ACK) } else { syn(host, to) };
                // The agent's maps know the interface of a backend; 0 asks them.
                for ingress in [0, LAN] {
                    let question =
                        Question { is_established, ingress, ..Question::new(abi::TCP, host, to) };
                    let sample = Sample { question, ingress: LAN, bytes: frame.bytes() };
                    let verdict = tally.compare(slb, &explainer, &sample);
                    assert_eq!(verdict, Verdict::Forwarded);
                }
            }
            let question = Question::new(abi::TCP, backend(0, family, 5_001), to);
            let told = explainer.explain(&question, slb.now()).expect("the maps");
            let says = |text: &str| told.steps.iter().any(|step| step.found.contains(text));
            assert!(says("sees an address of the gateway"), "{:#?}", told.steps);
            assert_eq!(told.from, None, "the port is drawn later");
            // By another interface it is a client like any other.
            let other = backend(0, family, 6_000);
            let question = Question { ingress: WAN, ..Question::new(abi::TCP, other, to) };
            let sample = Sample { question, ingress: WAN, bytes: syn(other, to).bytes() };
            assert_eq!(tally.compare(slb, &explainer, &sample), Verdict::Forwarded);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_random_configurations_when_packets_are_explained_then_that_is_what_becomes_of_them() {
    let mut dice = Dice::new(7);
    let mut tally = Tally::default();
    with_capacities(Capacities { flows: 1 << 14, chunks: 1_024 }, |slb| {
        let explainer = slb.explainer();
        let mut packets = Packets::default();
        for number in 0..WORLDS {
            let mut world = World::draw(&mut dice, slb, number);
            packets.forget_flows();
            for _ in 0..2 {
                let until = tally.samples() + FLOWS / WORLDS / 2;
                while tally.samples() < until {
                    let samples = packets.draw(&mut dice, slb, &world);
                    for sample in samples {
                        tally.compare(slb, &explainer, &sample);
                        packets.note(&sample, tally.last());
                    }
                }
                world.turn(&mut dice, slb);
            }
        }
    });
    println!("{tally}");
    tally.assert_covers(VERDICTS, LOOKS);
    assert!(tally.unknown * 20 < tally.samples(), "too much cannot be told: {tally}");
}
