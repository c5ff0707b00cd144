//! Schedules in turn, which have an entry for each flow.

use super::Flow;
use slb_common::abi;

use crate::{
    fixture::{FAMILIES, IDLE_JIFFIES, answer, forwarded, id, replied, with_slb},
    frame::{ACK, FIN, Frame, RST, SYN},
    lab::{FIRST, ROUTER},
};

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
fn given_turns_when_a_connection_has_verifiably_ended_then_a_syn_takes_another_turn_and_not_before()
{
    /// Flags of a client's segment and what it acknowledges, or those of a backend's, which begins at 7 001.
    #[derive(Clone, Copy)]
    enum By {
        Client(u8, u32),
        Backend(u8),
    }
    use By::{Backend, Client};
    // "an answer", and a FIN.
    const ALL: u32 = 7_001 + 9 + 1;
    let cases: [(&str, &[By], bool); 8] = [
        (
            "both have closed",
            &[Client(FIN | ACK, 7_001), Backend(FIN | ACK), Client(ACK, ALL)],
            true,
        ),
        (
            "both have closed, backend first",
            &[Backend(FIN | ACK), Client(ACK, ALL), Client(FIN | ACK, ALL)],
            true,
        ),
        ("another number", &[Backend(FIN | ACK), Client(FIN | ACK, ALL - 1)], false),
        ("the client has closed", &[Client(FIN | ACK, 7_001), Backend(ACK)], false),
        ("reset by the client", &[Client(RST, 0)], false),
        ("reset by the backend", &[Backend(RST | ACK)], true),
        ("only the backend has closed", &[Backend(FIN | ACK), Client(ACK, ALL)], false),
        ("neither end has closed", &[Client(ACK, 7_001), Backend(ACK)], false),
    ];
    with_slb(|slb| {
        for family in FAMILIES {
            let [first, second] = [id::RING, id::RING_SECOND].map(|id| id + family as u32);
            for (sport, (case, history, ends)) in (1_000..).zip(cases) {
                let flow = Flow::ring(family, sport);
                slb.schedule(flow.first.dst, abi::TCP, vec![first]);
                flow.establishes(slb);
                slb.schedule(flow.first.dst, abi::TCP, vec![second]);
                for by in history {
                    match *by {
                        Client(flags, ack) => {
                            let bare = |frame: &Frame| {
                                Frame { ack, payload: Vec::new(), ..frame.clone() }.flags(flags)
                            };
                            let inside = forwarded(bare(&flow.inside[0]), FIRST);
                            slb.client_sends(case, &bare(&flow.first), &inside);
                        }
                        Backend(flags) => {
                            let answer =
                                Frame { seq: 7_001, ..answer(&flow.inside[0]) }.flags(flags);
                            let outside = answer.from(flow.first.dst);
                            slb.backend_sends(case, &answer, &replied(outside, ROUTER));
                        }
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
