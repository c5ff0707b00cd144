//! The next hops to backends and clients are those of the kernel, also after they change.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use slb_common::abi::Address;
use slb_lab::{Client, Gateway, Host, Server, Sessions, Topology};

use crate::support::{
    Lab, NOTICED, expect_all_go_on, maps, output,
    plan::{self, vips},
    wait_until,
};

/// Addresses behind the backends, which the gateway reaches through one of those.
const FAR: [&str; 2] = ["10.9.0.1", "2001:db8:9::1"];

fn expect_all(client: &Client, name: Option<&str>) {
    assert_eq!(amiss(client, name), None);
}

/// What clients get, unless every request is answered, by the backend of that name or by all four.
fn amiss(client: &Client, name: Option<&str>) -> Option<String> {
    vips(plan::WEB_PORT).into_iter().find_map(|to| {
        let outcome = client.http(to, 200, 8).unwrap();
        let by_whom = match name {
            Some(name) => outcome.per_backend.get(name) == Some(&200),
            None => outcome.per_backend.len() == 4,
        };
        let is_right = (outcome.ok(), outcome.failed()) == (200, 0) && by_whom;
        (!is_right).then(|| format!("{to}: {outcome}"))
    })
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_with_connections_when_its_mac_address_changes_then_all_of_them_go_on() {
    const MAC: [u8; 6] = [0x02, 0, 0, 0, 0xbe, 0xef];
    let lab = Lab::start();
    let host = lab.host("web-1");
    let kept = vips(plan::WEB_PORT).map(|to| Sessions::open(&lab.client, to, 40).unwrap());

    // A host that is new at its address says so by asking for its gateway.
    host.netns.ip("link set eth0 address 02:00:00:00:be:ef\nneigh flush dev eth0").unwrap();
    for gateway in ["10.0.0.1", "2001:db8:10::1"] {
        output(&host.netns, "ping", &["-c", "1", "-W", "2", gateway]);
    }
    let own: Vec<Address> = host.addresses().into_iter().map(Into::into).collect();
    wait_until("the maps have the new address", || {
        let backends = maps::backends(&lab.gateway);
        let hops = backends.iter().filter(|backend| own.contains(&backend.addr));
        let macs: BTreeSet<_> = hops.map(|backend| backend.hop.dst_mac).collect();
        macs == [MAC].into()
    });

    expect_all(&lab.client, None);
    expect_all_go_on(kept);
}

#[test]
#[ignore = "needs root"]
fn backend_that_returns_with_another_mac_address_and_says_nothing_is_back_soon() {
    const MAC: [u8; 6] = [0x02, 0, 0, 0, 0xbe, 0xef];
    /// One interval of the checks, a second, and what a loaded machine takes.
    const BACK: Duration = Duration::from_millis(500 + 1_000 + 500);
    let lab = Lab::start();
    let host = lab.host("web-1");
    let own: Vec<Address> = host.addresses().into_iter().map(Into::into).collect();

    host.netns.ip("link set eth0 address 02:00:00:00:be:ef").unwrap();
    let begin = Instant::now();
    wait_until("the maps have the new address", || {
        let backends = maps::backends(&lab.gateway);
        let hops = backends.iter().filter(|backend| own.contains(&backend.addr));
        let macs: BTreeSet<_> = hops.map(|backend| backend.hop.dst_mac).collect();
        macs == [MAC].into()
    });
    let took = begin.elapsed();
    eprintln!("back after {took:?}");
    assert!(took < BACK, "{took:?}");
    let events = String::from_utf8(lab.gateway.slb(&["events"]).unwrap().stdout).unwrap();
    for address in host.addresses() {
        let moved = format!("backend {address} has another MAC address: 02:00:00:00:be:ef");
        assert!(events.contains(&moved), "{events}");
    }
    lab.wait_all_healthy();
    expect_all(&lab.client, None);
}

#[test]
#[ignore = "needs root"]
fn given_traffic_when_the_kernel_forgets_its_neighbours_then_nothing_is_lost() {
    let lab = Lab::start();
    let kept = vips(plan::WEB_PORT).map(|to| Sessions::open(&lab.client, to, 20).unwrap());
    for _ in 0..5 {
        lab.topology.gateway.ip("neigh flush dev lan0\nneigh flush dev wan0").unwrap();
        expect_all(&lab.client, None);
    }
    expect_all_go_on(kept);
}

#[test]
#[ignore = "needs root"]
fn given_unknown_neighbours_when_the_agent_starts_and_clients_come_at_once_then_all_are_served() {
    let mut lab = Lab::start();
    lab.gateway.terminate().unwrap();
    lab.topology.gateway.ip("neigh flush dev lan0\nneigh flush dev wan0").unwrap();
    lab.gateway.start().unwrap();
    expect_all(&lab.client, None);
}

#[test]
#[ignore = "needs root"]
fn given_a_running_agent_when_an_interface_is_made_anew_then_xdp_and_traffic_return_to_it() {
    let lab = Lab::start();
    let index = |status: &serde_json::Value| {
        let interfaces = status["interfaces"].as_array().unwrap();
        let lan = interfaces.iter().find(|interface| interface["name"] == "lan0");
        lan.and_then(|interface| interface["index"].as_u64())
    };
    let before = index(&lab.gateway.status().unwrap());

    lab.topology.replace_lan_card().unwrap();

    let returned = |status: &serde_json::Value| {
        index(status).is_some_and(|now| Some(now) != before) && plan::all_healthy(status)
    };
    lab.gateway.wait("the interface is back", NOTICED, returned).unwrap();
    // Backends may be taken for healthy still, and be found unhealthy for the time without a card.
    wait_until("every backend serves again", || {
        let amiss = amiss(&lab.client, None);
        amiss.iter().for_each(|amiss| eprintln!("{amiss}"));
        amiss.is_none()
    });
    let ids: BTreeSet<u32> = maps::programs(&lab.gateway).into_iter().collect();
    assert_eq!(ids.len(), 1, "one program everywhere: {ids:?}");
    let links = output(&lab.topology.gateway, "ip", &["-d", "link", "show", "lan0"]);
    assert!(links.contains(&format!("prog/xdp id {}", ids.first().unwrap())), "{links}");
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_behind_a_router_when_the_route_changes_then_new_flows_take_the_new_one() {
    let topology = Topology::build().unwrap();
    let [near, other] = ["web-3", "web-4"].map(|name| far(&topology, name));
    let servers = [(&near, "via-3"), (&other, "via-4")]
        .map(|(host, name)| Server::start_as(host, plan::WEB, name).unwrap());
    route(&topology, &router_named(&topology, "web-4"), "add");
    let mut gateway = Gateway::new(
        &topology,
        &format!(
            "[[instance]]\nname = \"far\"\nvips = [\"{}\", \"{}\"]\n[[instance.backend]]\nname = \
             \"far\"\naddress = {FAR:?}\n[[instance.listener]]\nprotocol = \"tcp\"\nport = \
             {}\nbackend_port = {}\nhealth_check.interval = \"500ms\"\nhealth_check.timeout = \
             \"200ms\"\n",
            slb_lab::topology::VIP_V4,
            slb_lab::topology::VIP_V6,
            plan::WEB_PORT,
            plan::WEB.port(),
        ),
    )
    .unwrap();
    gateway.start().unwrap();
    let healthy = |status: &serde_json::Value| {
        let backends = slb_lab::gateway::backends(status, "tcp", plan::WEB_PORT);
        backends.len() == 2 && backends.iter().all(|backend| backend["health"] == "healthy")
    };
    gateway.wait("the far backend is healthy", NOTICED, healthy).unwrap();
    let client = Client::new(&topology.clients[0]);
    expect_all(&client, Some("via-4"));

    route(&topology, &router_named(&topology, "web-3"), "replace");
    for to in vips(plan::WEB_PORT) {
        wait_until("the new route is taken", || {
            // A connection of the very moment is reset: these routers are two hosts with one address.
            client.http(to, 1, 1).unwrap().per_backend.contains_key("via-3")
        });
    }
    expect_all(&client, Some("via-3"));
    drop((gateway, servers));
}

/// The host `name`, at [`FAR`], which it has as well.
fn far(topology: &Topology, name: &str) -> Host {
    let mut host = router_named(topology, name);
    let [v4, v6] = FAR;
    host.netns.ip(&format!("addr add {v4}/32 dev lo\naddr add {v6}/128 dev lo nodad")).unwrap();
    (host.v4, host.v6) = (v4.parse().unwrap(), v6.parse().unwrap());
    host
}

fn router_named(topology: &Topology, name: &str) -> Host {
    topology.backends.iter().find(|host| host.name == name).unwrap().clone()
}

/// Sets the gateway's routes to [`FAR`].
fn route(topology: &Topology, router: &Host, verb: &str) {
    let [v4, v6] = FAR;
    let batch =
        format!("route {verb} {v4}/32 via {}\nroute {verb} {v6}/128 via {}", router.v4, router.v6);
    topology.gateway.ip(&batch).unwrap();
}
