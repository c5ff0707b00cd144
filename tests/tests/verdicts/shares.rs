//! Which backend a new flow gets, over many flows.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use etherparse::SlicedPacket;
use slb_common::{
    abi::{self, BackendFlags, FlowKey, SLOT_KEEP, SLOT_LOOK, Scheduler, Seed},
    hash,
    verdict::Verdict,
};
use slb_user::{
    schedule::{
        Member,
        maglev::{size_for, table},
        ring::ring,
    },
    state::Schedule,
};

use crate::{
    fixture::{
        FAMILIES, Slb, at, by, client, endpoint, id, port, syn, vip, with_capacity, with_slb,
    },
    frame::{ACK, Frame, L3},
    lab::WAN,
};

const FLOWS: usize = 20_000;
const BACKENDS: [(u32, u32); 3] = [(id::HTTP, 100), (id::HTTP_SECOND, 50), (id::HTTP_SICK, 30)];

fn members(family: usize) -> Vec<Member> {
    let member = |(id, weight): (u32, u32)| {
        let id = id + family as u32;
        Member { id, identity: hash::identity(vip(family, 0).ip().into(), id as u16), weight }
    };
    BACKENDS.map(member).into()
}

/// SYNs of 20 clients, from 1 000 neighbouring ports each.
fn flows(family: usize) -> Vec<Frame> {
    (0..FLOWS)
        .map(|flow| {
            let (host, port) = (1 + flow / 1_000, 10_000 + flow % 1_000);
            let from = [format!("198.51.100.{host}"), format!("2001:db8:100::{host}")];
            syn(at(&from[family], port as u16), vip(family, port::HTTP))
        })
        .collect()
}

/// Last byte of the address of the backend that a client's frame is sent to.
fn chosen(slb: &mut Slb<'_>, frame: &Frame) -> u8 {
    let run = slb.run(WAN, &frame.bytes());
    assert_eq!(run.verdict, Verdict::Forwarded, "{frame:?}");
    SlicedPacket::from_ethernet(&run.bytes).expect("a packet");
    run.bytes[L3 + if frame.src.is_ipv4() { 19 } else { 39 }]
}

/// The last byte of backend `id`'s address.
fn last_byte(slb: &Slb<'_>, id: u32) -> u8 {
    slb.maps.installed().backends[&id].addr.bytes[15]
}

#[test]
#[ignore = "needs root"]
fn given_weights_when_many_flows_begin_then_shares_are_right_and_nothing_is_remembered() {
    with_capacity(1 << 17, |slb| {
        for family in FAMILIES {
            let slots = table(&members(family), size_for(BACKENDS.len()));
            slb.backend(id::HTTP_SICK + family as u32, |backend| {
                backend.flags = BackendFlags::IN_USE | BackendFlags::USABLE;
            });
            slb.schedule(vip(family, port::HTTP), abi::TCP, slots.clone());
            let flows = flows(family);

            let first: Vec<u8> = flows.iter().map(|frame| chosen(slb, frame)).collect();

            let total: u32 = BACKENDS.iter().map(|(_, weight)| weight).sum();
            for (id, weight) in BACKENDS {
                let byte = last_byte(slb, id + family as u32);
                let count = first.iter().filter(|&&chosen| chosen == byte).count();
                let (share, expected) =
                    (count as f64 / FLOWS as f64, f64::from(weight) / f64::from(total));
                let error = (share - expected).abs();
                assert!(error < 0.01, "backend {id}, family {family}: {share}, not {expected}");
            }
            // The agent and every other gateway compute the same.
            for (frame, &chosen) in flows.iter().zip(&first) {
                let choice = hash::choice(hash::flow(&frame.key(), &Seed::PUBLIC));
                let slot = hash::slot(choice, slots.len() as u32);
                assert_eq!(chosen, last_byte(slb, slots[slot as usize]), "{frame:?}");
            }
            for (frame, &before) in flows.into_iter().zip(&first) {
                // As another gateway gets it: in the middle of the connection.
                let frame = if frame.src.port() % 2 == 0 { frame } else { frame.flags(ACK) };
                assert_eq!(chosen(slb, &frame), before, "{frame:?}");
            }
            assert_eq!(slb.flows.count(), 0, "none of them is remembered");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_the_source_as_the_choice_when_flows_begin_then_a_client_has_one_backend() {
    with_capacity(1 << 14, |slb| {
        for family in FAMILIES {
            // Room for both schedules is scarce here.
            let slots = table(&members(family), 1_021);
            let listener = vip(family, port::HTTP);
            let slot = |scheduler, key: &FlowKey| slots[by(scheduler).slot(key, slots.len())];
            let schedule = |slb: &mut Slb<'_>, schedule: Schedule| {
                slb.change(|state| {
                    let at = endpoint(listener, abi::TCP);
                    let service = state.listeners.get_mut(&at).expect("a listener");
                    service.schedule = Arc::new(schedule);
                });
            };
            schedule(slb, Schedule::new(by(Scheduler::SOURCE), slots.clone()));
            let remembered = slb.flows.count();
            let mut clients = BTreeMap::<_, BTreeSet<u8>>::new();
            for frame in flows(family) {
                let chosen = chosen(slb, &frame);
                assert_eq!(
                    chosen,
                    last_byte(slb, slot(Scheduler::SOURCE, &frame.key())),
                    "{frame:?}"
                );
                clients.entry(frame.src.ip()).or_default().insert(chosen);
            }
            assert!(clients.values().all(|backends| backends.len() == 1), "{clients:?}");
            let all: BTreeSet<&BTreeSet<u8>> = clients.values().collect();
            assert_eq!(all.len(), BACKENDS.len(), "of every backend");
            assert_eq!(slb.flows.count(), remembered, "none of them is");

            // The other hash was before: who is in the middle of a connection goes by that.
            let moving = slots.iter().map(|slot| slot | SLOT_LOOK | SLOT_KEEP).collect();
            let (previous_by, previous) = (by(Scheduler::HASH), slots.clone());
            let after =
                Schedule { previous_by, previous, ..Schedule::new(by(Scheduler::SOURCE), moving) };
            schedule(slb, after);
            for frame in flows(family).into_iter().step_by(11) {
                let (is_new, key) = (frame.src.port() % 2 == 0, frame.key());
                let scheduler = if is_new { Scheduler::SOURCE } else { Scheduler::HASH };
                let frame = if is_new { frame } else { frame.flags(ACK) };
                assert_eq!(chosen(slb, &frame), last_byte(slb, slot(scheduler, &key)), "{frame:?}");
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_ring_when_flows_begin_then_every_turn_is_exact() {
    with_slb(|slb| {
        for family in FAMILIES {
            let weights = [(id::RING, 3), (id::RING_SECOND, 2)];
            let members = weights.map(|(id, weight)| {
                let id = id + family as u32;
                Member { id, identity: id.into(), weight }
            });
            let slots = ring(&members, 1_024);
            assert_eq!(slots.len(), 5);
            let listener = vip(family, port::RING);
            slb.schedule(listener, abi::TCP, slots.clone());
            for turn in 0..100_u16 {
                let mut counts = BTreeMap::<u8, u32>::new();
                for slot in 0..5 {
                    let frame = syn(client(family, 1_000 + turn * 5 + slot), listener);
                    let chosen = chosen(slb, &frame);
                    let expected = last_byte(slb, slots[usize::from(slot)]);
                    assert_eq!(chosen, expected, "slot {slot} of turn {turn}");
                    *counts.entry(chosen).or_default() += 1;
                    // A retransmission is no new flow, and takes no turn.
                    assert_eq!(self::chosen(slb, &frame), chosen);
                }
                let exact =
                    weights.map(|(id, weight)| (last_byte(slb, id + family as u32), weight));
                assert_eq!(counts, BTreeMap::from(exact), "turn {turn}");
            }
            let flows = weights.map(|(id, _)| slb.maps.traffic(id + family as u32).unwrap().flows);
            assert_eq!(flows, [300, 200]);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_schedule_of_many_chunks_when_flows_begin_then_the_slot_is_found_in_its_chunk() {
    with_capacity(1 << 14, |slb| {
        // One slot of another backend in each chunk, at another place.
        let len = 5 * abi::CHUNK_SLOTS + 77;
        let slots: Vec<u32> = (0..len)
            .map(|slot| if slot % 1_031 == 0 { id::RING_SECOND } else { id::RING })
            .collect();
        slb.schedule(vip(0, port::RING), abi::TCP, slots.clone());
        for (slot, backend) in (0..).zip(slots) {
            let chosen = chosen(slb, &syn(client(0, 1_000 + slot), vip(0, port::RING)));
            assert_eq!(chosen, last_byte(slb, backend), "slot {slot}");
        }
    });
}
