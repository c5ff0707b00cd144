//! Backends that several listeners share, whose flows have entries for replies.

use super::twins;
use slb_common::{
    abi::{self, FLOW_ORIGINAL, FLOW_REPLY},
    verdict::Verdict,
};

use crate::{
    fixture::{FAMILIES, answer, client, forwarded, port, replied, syn, vip, with_slb},
    frame::{ACK, Frame, RST, SYN},
    lab::{FIRST, ROUTER},
};

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

            let port = crate::bypass::replaced_port(slb, &two, Verdict::Forwarded);

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
            let reset = answer(&one.to(at)).flags(RST);
            slb.backend_sends("end of one", &reset, &replied(reset.from(one.dst), ROUTER));

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
