//! Two gateways with the same file and seed behind a router that spreads flows over them.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use slb_lab::{Client, Gateway, Netns, Server, Service, Sessions, Topology};

use crate::support::{NOTICED, wait_healthy};

const HTTP: Service = Service::Http(8080);
/// Not a neighbour of the clients: a router leads there.
const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const CONNECTIONS: usize = 200;

/// As an operator adds it to the files of both.
fn share_seed(gateway: &Gateway) {
    let text = fs::read_to_string(gateway.config()).unwrap();
    let text = text.replacen("[gateway]", "[gateway]\nseed = \"shared by these two gateways\"", 1);
    fs::write(gateway.config(), text).unwrap();
}

fn instances(topology: &Topology) -> String {
    let mut text = format!("[[instance]]\nname = \"lab\"\nvips = [\"{VIP}\"]\n");
    for host in &topology.backends {
        text +=
            &format!("[[instance.backend]]\nname = \"{}\"\naddress = \"{}\"\n", host.name, host.v4);
    }
    text + "[[instance.listener]]\nprotocol = \"tcp\"\nport = 80\nbackend_port = 8080\n"
}

/// The second client becomes a router: flows to the VIP by their hash to one of these gateways.
fn routes(router: &Netns, gateways: &[&str]) {
    let hops: Vec<String> = gateways.iter().map(|at| format!("nexthop via {at}")).collect();
    router.ip(&format!("route replace {VIP}/32 {}", hops.join(" "))).unwrap();
}

fn forwarded(gateway: &Gateway) -> u64 {
    gateway.status().unwrap()["verdicts"]["forwarded"]["packets"].as_u64().unwrap_or_default()
}

#[test]
#[ignore = "needs root"]
fn given_two_gateways_when_one_is_lost_then_its_connections_go_on_through_the_other() {
    let topology = Topology::build().unwrap();
    let second = topology.second_gateway().unwrap();
    let router = &topology.clients[1].netns;
    router.sysctl("ipv4/ip_forward", "1").unwrap();
    router.sysctl("ipv4/fib_multipath_hash_policy", "1").unwrap();
    for scope in ["all", "eth0"] {
        router.sysctl(&format!("ipv4/conf/{scope}/send_redirects"), "0").unwrap();
    }
    routes(router, &["192.0.2.1", "192.0.2.2"]);
    let client = &topology.clients[0];
    client.netns.ip(&format!("route add {VIP}/32 via {}", topology.clients[1].v4)).unwrap();
    let mut servers = Vec::new();
    for host in &topology.backends {
        // What they answer goes one way only, whichever gateway it came by.
        host.netns.ip("route replace default via 10.0.0.2").unwrap();
        servers.push(Server::start(host, HTTP).unwrap());
    }

    let mut first_gateway = Gateway::new(&topology, &instances(&topology)).unwrap();
    let mut second_gateway = Gateway::new(&second, &instances(&topology)).unwrap();
    for (gateway, netns) in
        [(&mut first_gateway, &topology.gateway), (&mut second_gateway, &second.gateway)]
    {
        netns.sysctl("ipv4/conf/lan0/accept_local", "1").unwrap();
        share_seed(gateway);
        gateway.start().unwrap();
        wait_healthy(gateway, &[("tcp", 80)], 4);
    }

    let to = (IpAddr::from(VIP), 80).into();
    let sessions = Sessions::open(&Client::new(client), to, CONNECTIONS).unwrap();
    let shares = [&first_gateway, &second_gateway].map(forwarded);
    assert!(shares.iter().all(|&packets| packets > CONNECTIONS as u64), "{shares:?}");

    // It loses its power, and the router is told.
    first_gateway.kill().unwrap();
    for port in ["gw-wan", "gw-lan"] {
        topology.fabric.ip(&format!("link set {port} down")).unwrap();
    }
    routes(router, &["192.0.2.2"]);
    let before = sessions.so_far();
    let deadline = Instant::now() + NOTICED;
    let goes_on = |sessions: &Sessions| {
        let now = sessions.so_far();
        now.iter().zip(&before).all(|(now, before)| now.answered > before.answered + 10)
    };
    while !goes_on(&sessions) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(goes_on(&sessions), "{:?}", sessions.so_far());
    for session in sessions.stop().unwrap() {
        assert_eq!(session.failure, None, "{session:?}");
    }
    let outcome = Client::new(client).http(to, 200, 8).unwrap();
    assert_eq!((outcome.ok(), outcome.per_backend.len()), (200, 4), "{outcome}");
}
