//! Clients that talk to backends themselves, through the gateway, beside the balancer.

use std::net::SocketAddr;

use slb_lab::{Host, Load};

use crate::support::{
    AT_ONCE, Lab, answers_more,
    plan::{self, vips},
    talk::{self, Talk},
};

/// Source ports that the lab's own client does not use.
const PORTS: std::ops::Range<u16> = 2_000..2_200;

/// Where `host` serves the default group itself, in the family of `vip`.
fn itself(host: &Host, vip: SocketAddr, port: u16) -> SocketAddr {
    let [v4, v6] = host.addresses();
    SocketAddr::new(if vip.is_ipv4() { v4 } else { v6 }, port)
}

#[test]
#[ignore = "needs root"]
fn given_load_through_a_listener_when_clients_ask_backends_directly_then_each_answers_itself() {
    let lab = Lab::start();
    for to in vips(plan::WEB_PORT) {
        let load = Load::start(&lab.client, to, 200).unwrap();
        for host in &lab.topology.backends {
            let tcp = itself(host, to, plan::WEB.port());
            let udp = itself(host, to, plan::UDP.port());
            for outcome in
                [lab.client.http(tcp, 200, 8).unwrap(), lab.client.udp(udp, 200, 8).unwrap()]
            {
                let own = outcome.per_backend.get(&host.name);
                assert_eq!((own, outcome.failed()), (Some(&200), 0), "{tcp}: {outcome}");
            }
        }
        answers_more(&load, 100);
        let outcome = load.stop().unwrap();
        assert_eq!(outcome.failed(), 0, "{to}: {outcome}");
    }
}

#[test]
#[ignore = "needs root"]
fn given_one_client_port_when_used_through_a_listener_and_directly_at_once_then_nothing_is_mixed_up()
 {
    let lab = Lab::start();
    let client = &lab.topology.clients[0];
    let mut met = 0;
    for vip in vips(plan::WEB_PORT) {
        for (index, port) in PORTS.take(80).enumerate() {
            let host = &lab.topology.backends[index % 4];
            let direct = itself(host, vip, plan::WEB.port());
            let direct_first = index % 8 < 4;
            let case = format!("{vip} and {direct} from {port}, direct first: {direct_first}");
            let connect = |to| Talk::begin(client, port, to, AT_ONCE).expect(&case);
            let before = direct_first.then(|| connect(direct));
            let mut listener = connect(vip);
            let backend = listener.ask().expect(&case);
            let is_met = backend == host.name;
            if is_met && !direct_first {
                // The backend knows that port from the connection through the listener: `firewall.rs`.
                continue;
            }
            met += u32::from(is_met);
            let mut directly = before.unwrap_or_else(|| connect(direct));
            for _ in 0..3 {
                assert_eq!(directly.ask().expect(&case), host.name, "{case}");
                assert_eq!(listener.ask().expect(&case), backend, "{case}");
            }
            // The end of either does not end the other.
            let (mut left, name) = if index % 2 == 0 {
                listener.reset();
                (directly, &host.name)
            } else {
                drop(directly);
                (listener, &backend)
            };
            assert_eq!(left.ask().expect(&case), *name, "{case}: the one that is left");
        }
    }
    assert!(met > 10, "too few cases with the same backend on both ways: {met}");
}

#[test]
#[ignore = "needs root"]
fn given_one_udp_socket_when_it_asks_a_listener_and_backends_then_answers_come_from_who_was_asked()
{
    let lab = Lab::start();
    let client = &lab.topology.clients[0];
    for vip in vips(plan::UDP_PORT) {
        for (index, port) in PORTS.take(80).enumerate() {
            let host = &lab.topology.backends[index % 4];
            let direct = itself(host, vip, plan::UDP.port());
            let socket = talk::datagrams(client, port, vip, AT_ONCE);
            let case = format!("{vip} and {direct} from {port}");
            let direct_first = index % 8 < 4;
            if direct_first {
                assert_eq!(talk::ask(&socket, direct, "first").expect(&case), host.name, "{case}");
            }
            let backend = talk::ask(&socket, vip, "a").expect(&case);
            if backend == host.name && !direct_first {
                let error = talk::ask(&socket, direct, "b").expect_err(&case);
                assert!(error.to_string().contains(&vip.to_string()), "{case}: {error}");
                assert_eq!(talk::ask(&socket, vip, "c").expect(&case), backend, "{case}");
                continue;
            }
            for _ in 0..3 {
                assert_eq!(talk::ask(&socket, direct, "b").expect(&case), host.name, "{case}");
                assert_eq!(talk::ask(&socket, vip, "c").expect(&case), backend, "{case}");
            }
        }
    }
}

#[test]
#[ignore = "needs root"]
fn given_ports_of_ended_connections_when_used_the_other_way_then_none_fails_or_stalls() {
    let lab = Lab::start();
    let client = &lab.topology.clients[0];
    let once = |port: u16, to: SocketAddr, case: &str| {
        let mut talk = Talk::begin(client, port, to, AT_ONCE)
            .unwrap_or_else(|error| panic!("{case}: {error}"));
        let answer = talk.ask().unwrap_or_else(|error| panic!("{case}: {error}"));
        // Both ways of ending leave something behind.
        if port.is_multiple_of(2) {
            talk.reset();
        }
        answer
    };
    for vip in vips(plan::WEB_PORT) {
        let backends: Vec<_> = lab.topology.backends.iter().collect();
        for port in PORTS {
            once(port, vip, &format!("{port} to {vip}"));
        }
        for host in &backends {
            let direct = itself(host, vip, plan::WEB.port());
            for port in PORTS {
                let case = format!("{port} to {direct}, after {vip}");
                assert_eq!(once(port, direct, &case), host.name, "{case}");
            }
        }
        // The client remembers connections that it has closed itself, but not those it has reset.
        for port in PORTS.filter(|port| port.is_multiple_of(2)) {
            once(port, vip, &format!("{port} to {vip}, after direct ones"));
        }
    }
}
