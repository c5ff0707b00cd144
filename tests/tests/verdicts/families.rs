//! IPv4 addresses stand in the maps as `::ffff:a.b.c.d`: IPv6 packets that carry such addresses are
//! not IPv4 traffic.

use slb_common::verdict::Verdict;

use crate::{
    fixture::{
        BACKENDS, Outcome, VIPS, answer, at, backend, client, datagram, forwarded, port, syn, vip,
        with_slb,
    },
    frame::{Frame, RST},
    lab::FIRST,
};

/// The IPv6 address that `addr` is written as in the maps.
fn mapped(addr: &str, port: u16) -> std::net::SocketAddr {
    at(&format!("::ffff:{addr}"), port)
}

const CLIENT: &str = "198.51.100.7";

#[test]
#[ignore = "needs root"]
fn given_an_ipv4_listener_when_ipv6_spells_its_address_then_it_is_not_ours() {
    with_slb(|slb| {
        for from in [mapped(CLIENT, 1_000), client(1, 1_000)] {
            let http = syn(from, mapped(VIPS[0], port::HTTP));
            let dns = datagram(from, mapped(VIPS[0], port::DNS));
            slb.client_sends("TCP", &http, &Outcome::Untouched(Verdict::NotOurs));
            slb.client_sends("UDP", &dns, &Outcome::Untouched(Verdict::NotOurs));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_ipv4_backend_when_ipv6_spells_its_address_then_it_is_not_ours() {
    with_slb(|slb| {
        let direct = syn(mapped(CLIENT, 1_000), mapped(BACKENDS[0][0], port::HTTP_BACKEND));
        slb.client_sends("direct", &direct, &Outcome::Untouched(Verdict::NotOurs));
        assert_eq!(slb.flow(&answer(&direct)), None, "nothing is remembered");
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_ipv6_listener_when_the_source_is_an_ipv4_address_then_it_is_not_ours() {
    with_slb(|slb| {
        let http = syn(mapped(CLIENT, 1_000), vip(1, port::HTTP));
        slb.client_sends("mapped source", &http, &Outcome::Untouched(Verdict::NotOurs));
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_ipv4_flow_when_ipv6_spells_its_addresses_then_the_flow_is_left_alone() {
    with_slb(|slb| {
        let http = syn(client(0, 1_000), vip(0, port::HTTP));
        let inside = http.to(backend(0, 0, port::HTTP_BACKEND));
        slb.client_sends("SYN", &http, &forwarded(inside.clone(), FIRST));
        let before = (slb.flow(&http), slb.flow(&answer(&inside)));

        let src = mapped(CLIENT, 1_000);
        let forged = Frame { src, dst: mapped(VIPS[0], port::HTTP), ..http.clone() }.flags(RST);
        slb.client_sends("RST", &forged, &Outcome::Untouched(Verdict::NotOurs));
        let forged =
            Frame { src: mapped(BACKENDS[0][0], port::HTTP_BACKEND), dst: src, ..answer(&inside) };
        slb.backend_sends("answer", &forged, &Outcome::Untouched(Verdict::NotOurs));

        assert_eq!((slb.flow(&http), slb.flow(&answer(&inside))), before);
    });
}
