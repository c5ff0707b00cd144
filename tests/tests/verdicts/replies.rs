//! From backends to clients: which way, and for how long.

use slb_common::{abi::NextHop, verdict::Verdict};

use crate::{
    fixture::{
        FAMILIES, Outcome, Slb, answer, backend, client, client_of, datagram, forwarded, port,
        replied, syn, vip, with_slb,
    },
    frame::{ACK, Frame, PSH},
    lab::{self, FIRST, LAN, LAN_MAC, OTHER_ROUTER, ROUTER},
};

/// A flow from a client of `net` through the router `by`, and its backend's answer.
fn flow(slb: &mut Slb<'_>, net: u32, family: usize, by: NextHop) -> (Frame, Frame) {
    let http = syn(client_of(net, family, 1_000), vip(family, port::HTTP));
    let http = Frame { src_mac: by.dst_mac, ..http };
    let inside = http.to(backend(0, family, port::HTTP_BACKEND));
    slb.client_sends("SYN", &http, &forwarded(inside.clone(), FIRST));
    let answer = answer(&inside);
    (answer.clone(), answer.from(http.dst))
}

#[test]
#[ignore = "needs root"]
fn given_flows_when_backends_answer_then_clients_see_the_vip() {
    with_slb(|slb| {
        for family in FAMILIES {
            for sport in [1, 1_000, 65_535] {
                let from = client(family, sport);
                let pairs = [
                    (syn(from, vip(family, port::HTTP)), port::HTTP_BACKEND),
                    (datagram(from, vip(family, port::DNS)), port::DNS_BACKEND),
                ];
                for (frame, port) in pairs {
                    let inside = frame.to(backend(0, family, port));
                    slb.client_sends("to", &frame, &forwarded(inside.clone(), FIRST));
                    let answer = answer(&inside).flags(ACK | PSH);
                    let case = format!("{answer:?}");
                    slb.backend_sends(&case, &answer, &replied(answer.from(frame.dst), ROUTER));
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_answer_when_its_ttl_ends_here_then_it_is_dropped_unless_the_kernel_sends_it() {
    with_slb(|slb| {
        for family in FAMILIES {
            let (answer, to_client) = flow(slb, 100, family, ROUTER);
            for ttl in [0, 1] {
                let expired = answer.clone().ttl(ttl);
                slb.backend_sends("TTL", &expired, &Outcome::Untouched(Verdict::TtlExpired));
            }
            let last = replied(to_client.ttl(2), ROUTER);
            slb.backend_sends("TTL 2", &answer.ttl(2), &last);

            let (answer, to_client) = flow(slb, 106, family, ROUTER);
            let left = Outcome::Translated(Verdict::RepliedByKernel, to_client.ttl(1));
            slb.backend_sends("TTL 1", &answer.ttl(1), &left);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_known_way_when_the_route_changes_then_it_is_taken_until_the_next_epoch() {
    with_slb(|slb| {
        for family in FAMILIES {
            let (answer, to_client) = flow(slb, 100, family, ROUTER);
            slb.backend_sends("first", &answer, &replied(to_client.clone(), ROUTER));
            let route = [
                "route replace 198.51.100.0/24 via 192.0.11.2",
                "route replace 2001:db8:100::/64 via 2001:db8:ff:11::2",
            ];
            slb.netns.ip(route[family]).unwrap();

            slb.backend_sends("same epoch", &answer, &replied(to_client.clone(), ROUTER));
            slb.maps.next_route_epoch().unwrap();
            slb.backend_sends("next epoch", &answer, &replied(to_client, OTHER_ROUTER));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_neighbour_that_the_kernel_has_not_met_when_it_is_where_the_flow_came_from_then_it_goes_back_there()
 {
    with_slb(|slb| {
        for family in FAMILIES {
            let (answer, to_client) = flow(slb, 104, family, OTHER_ROUTER);
            slb.backend_sends("back", &answer, &replied(to_client, OTHER_ROUTER));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_neighbour_that_the_kernel_has_not_met_when_it_is_elsewhere_then_the_kernel_sends_until_it_has()
 {
    with_slb(|slb| {
        for family in FAMILIES {
            let (answer, to_client) = flow(slb, 105, family, ROUTER);
            let left = Outcome::Translated(Verdict::RepliedByKernel, to_client.clone());
            slb.backend_sends("not met", &answer, &left);
            let neighbour = ["192.0.12.9", "2001:db8:ff:12::9"][family];
            let batch = format!(
                "neigh replace {neighbour} lladdr 02:00:00:00:05:09 dev lan0 nud permanent"
            );
            slb.netns.ip(&batch).unwrap();
            let hop = NextHop { ifindex: LAN, dst_mac: [2, 0, 0, 0, 5, 9], src_mac: LAN_MAC };
            slb.backend_sends("met", &answer, &replied(to_client, hop));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_host_that_does_not_forward_when_a_backend_answers_then_the_answer_goes_back_as_it_came()
{
    with_slb(|slb| {
        for (family, name) in [(0, "ipv4"), (1, "ipv6")] {
            lab::forwarding(slb.netns, name, false);
            let (answer, to_client) = flow(slb, 100, family, OTHER_ROUTER);
            slb.backend_sends(name, &answer, &replied(to_client, OTHER_ROUTER));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_no_route_when_a_backend_answers_then_the_kernel_is_left_to_say_so() {
    with_slb(|slb| {
        for family in FAMILIES {
            let (answer, to_client) = flow(slb, 107, family, ROUTER);
            let left = Outcome::Translated(Verdict::RepliedByKernel, to_client);
            slb.backend_sends("no route", &answer, &left);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_on_the_clients_side_when_it_answers_then_the_frame_leaves_as_it_came() {
    with_slb(|slb| {
        for family in FAMILIES {
            let second = backend(1, family, port::HTTP_BACKEND);
            let listener = vip(family, port::HTTP);
            let id = crate::fixture::id::HTTP_SECOND + family as u32;
            slb.schedule(listener, slb_common::abi::TCP, vec![id]);
            let http = syn(client(family, 1_000), listener);
            let inside = http.to(second);
            slb.client_sends("SYN", &http, &forwarded(inside.clone(), lab::SECOND));
            let answer = answer(&inside);
            slb.client_sends("answer", &answer, &replied(answer.from(listener), ROUTER));
        }
    });
}
