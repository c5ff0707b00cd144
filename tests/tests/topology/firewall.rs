//! The gateway's firewall, and clients that ask backends past the listeners.

use std::{fmt::Write as _, net::SocketAddr};

use slb_lab::Host;

use crate::support::{
    AT_ONCE, Lab, NOTICED, output,
    plan::{self, vips},
    talk::{Attempt, Talk},
    wait_until,
};

/// Source ports that the lab's own client does not use.
const PORTS: std::ops::Range<u16> = 2_000..2_200;

/// Where `host` serves the default group itself, in the family of `vip`.
fn itself(host: &Host, vip: SocketAddr) -> SocketAddr {
    let [v4, v6] = host.addresses();
    SocketAddr::new(if vip.is_ipv4() { v4 } else { v6 }, plan::WEB.port())
}

/// Keeps clients from backends.
fn close(lab: &Lab) {
    let rules = "add table inet guard\n\
                 add counter inet guard dropped\n\
                 add chain inet guard forward { type filter hook forward priority 0; }\n\
                 add rule inet guard forward iifname wan0 oifname lan0 counter name dropped drop\n";
    output(&lab.topology.gateway, "nft", &[rules]);
}

/// How many packets the firewall has dropped.
fn dropped(lab: &Lab) -> usize {
    let args = ["list", "counter", "inet", "guard", "dropped"];
    let text = output(&lab.topology.gateway, "nft", &args);
    let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
    words.nth(1).expect("a number").parse().expect("a number")
}

/// How many SYNs the backends have got for connections that they have.
fn challenged(lab: &Lab) -> usize {
    let of = |host: &Host| {
        let text = output(&host.netns, "cat", &["/proc/net/netstat"]);
        let [names, values] = ["TcpExt:"; 2].map({
            let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
            move |_| lines.next().expect("two lines").split_whitespace().collect::<Vec<_>>()
        });
        let at = names.iter().position(|name| *name == "TCPSYNChallenge").expect("the counter");
        values[at].parse::<usize>().expect("a number")
    };
    lab.topology.backends.iter().map(of).sum()
}

/// Connections through the listener, one from each of the ports, and the backend that each has got.
fn balanced(lab: &Lab, vip: SocketAddr) -> Vec<(u16, Talk, String)> {
    let client = &lab.topology.clients[0];
    let open = |port| {
        let mut talk = Talk::begin(client, port, vip, NOTICED).expect("through the listener");
        let backend = talk.ask().expect("through the listener");
        (port, talk, backend)
    };
    PORTS.map(open).collect()
}

fn are_unharmed(talks: &mut [(u16, Talk, String)]) {
    for (port, talk, backend) in talks {
        let answer = talk.ask().unwrap_or_else(|error| panic!("balanced, from {port}: {error}"));
        assert_eq!(answer, *backend, "balanced, from {port}");
    }
}

#[test]
#[ignore = "needs root"]
fn given_a_firewall_when_a_client_asks_backends_directly_then_none_of_its_ports_gets_through() {
    let lab = Lab::start();
    close(&lab);
    let client = &lab.topology.clients[0];
    for vip in vips(plan::WEB_PORT) {
        let mut talks = balanced(&lab, vip);
        let before = dropped(&lab);

        let mut attempts = Vec::new();
        for (port, _, backend) in &talks {
            // The one that takes the SYN for one of its connection, and another.
            let other = lab.topology.backends.iter().find(|host| host.name != *backend);
            for host in [lab.host(backend), other.expect("another backend")] {
                attempts.push(Attempt::begin(client, *port, itself(host, vip)));
            }
        }
        wait_until("the firewall gets each SYN", || dropped(&lab) >= before + attempts.len());

        for attempt in &attempts {
            assert!(!attempt.is_connected(), "{attempt:?} got through");
        }
        are_unharmed(&mut talks);
    }
}

#[test]
#[ignore = "needs root"]
fn given_a_firewall_and_an_access_list_when_a_denied_client_asks_then_nothing_gets_through() {
    let mut lab = Lab::prepare();
    let [denied, admitted] = &lab.topology.clients[..] else { panic!("two clients") };
    let (denied, admitted) = (denied.clone(), admitted.clone());
    let mut acl = String::from("port = 80\nbackend_port = 8080\n");
    let [v4, v6] = denied.addresses();
    writeln!(acl, "acl = {{ mode = \"deny\", sources = [\"{v4}\", \"{v6}\"] }}").unwrap();
    lab.edit("port = 80\nbackend_port = 8080\n", &acl);
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();
    close(&lab);
    for vip in vips(plan::WEB_PORT) {
        let mut other = Talk::begin(&admitted, 2_000, vip, NOTICED).unwrap();
        let backend = other.ask().unwrap();
        for host in &lab.topology.backends {
            let before = dropped(&lab);
            let to = itself(host, vip);
            let attempts: Vec<_> = PORTS.map(|port| Attempt::begin(&denied, port, to)).collect();
            let listener = Attempt::begin(&denied, PORTS.start, vip);
            wait_until("the firewall gets each SYN", || dropped(&lab) >= before + attempts.len());
            for attempt in attempts.iter().chain([&listener]) {
                assert!(!attempt.is_connected(), "{attempt:?} got through");
            }
        }
        assert_eq!(other.ask().unwrap(), backend, "another client's connection");
    }
}

#[test]
#[ignore = "needs root"]
fn given_balanced_connections_when_their_ports_ask_backends_directly_then_only_twins_fail() {
    let lab = Lab::start();
    let client = &lab.topology.clients[0];
    for vip in vips(plan::WEB_PORT) {
        let mut talks = balanced(&lab, vip);
        let before = challenged(&lab);
        let twin = |(port, _, backend): &(u16, Talk, String)| {
            Attempt::begin(client, *port, itself(lab.host(backend), vip))
        };
        let twins: Vec<Attempt> = talks.iter().map(twin).collect();
        wait_until("the backends get each SYN", || challenged(&lab) >= before + twins.len());
        are_unharmed(&mut talks);

        let mut direct = Vec::new();
        for (port, _, backend) in &talks {
            let hosts = lab.topology.backends.iter().filter(|host| host.name != *backend);
            for host in hosts.skip(usize::from(*port % 3)).take(1) {
                let case = format!("{port} to {}, balanced to {backend}", host.name);
                let mut talk = Talk::begin(client, *port, itself(host, vip), AT_ONCE).expect(&case);
                assert_eq!(talk.ask().expect(&case), host.name, "{case}");
                direct.push((*port, talk, host.name.clone()));
            }
        }
        are_unharmed(&mut talks);
        are_unharmed(&mut direct);
        for twin in &twins {
            assert!(!twin.is_connected(), "{twin:?}");
        }
    }
}

#[test]
#[ignore = "needs root"]
fn given_direct_connections_when_the_agent_is_killed_and_starts_again_then_they_live() {
    let mut lab = Lab::start();
    let client = lab.topology.clients[0].clone();
    let mut direct = Vec::new();
    for vip in vips(plan::WEB_PORT) {
        for (port, host) in PORTS.zip(&lab.topology.backends) {
            let mut talk = Talk::begin(&client, port, itself(host, vip), AT_ONCE).unwrap();
            assert_eq!(talk.ask().unwrap(), host.name);
            direct.push((port, talk, host.name.clone()));
        }
    }
    lab.gateway.kill().unwrap();
    are_unharmed(&mut direct);
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();
    are_unharmed(&mut direct);
}
