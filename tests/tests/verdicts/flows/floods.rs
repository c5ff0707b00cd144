//! A full flow table: established flows keep their entries.

use super::{Flow, twins};
use slb_common::{
    abi::{self, ConnState},
    verdict::Verdict,
};

use crate::{
    fixture::{FAMILIES, Outcome, Slb, answer, at, id, port, syn, vip, with_capacity, with_slb},
    frame::{ACK, Frame, RST, SYN},
    lab::{LAN, WAN},
};

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

            // Nor if the client goes on for a while.
            slb.age(&blind.first, abi::REFRESH_JIFFIES + 10);
            blind.reaches(slb, "later", ACK, number);
            let proven = ConnState::ESTABLISHED | ConnState::AGED;
            assert!(!slb.flow(&blind.first).expect("an entry").state().intersects(proven));
            // The largest of the numbers that count, and the next.
            for (ack, expected) in
                [((1 << 30) + (1 << 16) + 1, false), ((1 << 30) + (1 << 16), true)]
            {
                let guess = Frame { ack, ..blind.first.clone() }.flags(ACK);
                slb.run(WAN, &guess.bytes());
                assert_eq!(is_established(slb, &blind), expected);
            }
        }
    });
}

/// SYNs from spoofed addresses, by number.
pub(super) fn flood(family: usize, number: u32, dst: std::net::SocketAddr) -> Frame {
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

        // One that its backend has ended makes room.
        flows[3].answers(slb, "end", RST, numbers[3]);
        let run = slb.run(WAN, &late.first.bytes());
        assert_eq!(run.verdict, Verdict::Forwarded);
    });
}
