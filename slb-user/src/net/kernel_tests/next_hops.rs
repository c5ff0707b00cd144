//! Next hops, and the events that change them.

use super::*;

#[test]
#[ignore = "needs root"]
fn given_routes_and_neighbours_when_resolved_then_next_hops_are_the_kernels() {
    in_namespace(|_peer| async {
        ip("neigh add 203.0.113.2 dev wan0 lladdr 02:00:00:00:00:22");
        ip("neigh add 2001:db8:113::2 dev wan0 lladdr 02:00:00:00:00:22");
        ip("route add 198.51.100.0/24 via 203.0.113.2 mtu 1400");
        ip("route add 192.0.2.0/25 via inet6 2001:db8:113::2");
        ip("route add 2001:db8:99::/48 via 2001:db8:113::2");
        ip("route add blackhole 192.0.2.128/25");
        ip("route add prohibit 100.64.0.0/24");
        ip("route add unreachable 2001:db8:66::/48");
        ip("route add 100.64.1.0/24 dev lo");
        ip("rule add to 172.16.0.0/16 lookup 100");
        ip("route add 172.16.0.0/16 via 203.0.113.2 table 100");
        let network = Network::open().await.unwrap();
        let wan = index(&network, "wan0");
        let resolved = |neighbour: &str, mtu| NextHop::Resolved {
            ifindex: wan,
            neighbour: addr(neighbour),
            dst_mac: PEER_MAC,
            src_mac: OWN_MAC,
            mtu,
            source: None,
        };
        let own = network.addresses().await.unwrap();
        let (v4, v6) = ("203.0.113.2", "2001:db8:113::2");
        let lan = index(&network, "lan0");
        let cases = [
            ("203.0.113.2", resolved(v4, 1500)),
            ("2001:db8:113::2", resolved(v6, 1500)),
            ("198.51.100.7", resolved(v4, 1400)),
            ("192.0.2.5", resolved(v6, 1500)),
            ("2001:db8:99::7", resolved(v6, 1500)),
            ("172.16.3.4", resolved(v4, 1500)),
            ("10.0.0.9", NextHop::Unresolved { ifindex: lan, neighbour: addr("10.0.0.9") }),
            ("10.0.0.1", NextHop::Local),
            ("2001:db8:10::1", NextHop::Local),
            ("192.0.2.200", NextHop::Unreachable(Unreachable::Blackhole)),
            ("100.64.0.1", NextHop::Unreachable(Unreachable::Prohibited)),
            ("2001:db8:66::1", NextHop::Unreachable(Unreachable::Rejected)),
            ("100.64.1.1", NextHop::Unreachable(Unreachable::NotEthernet)),
            ("8.8.8.8", NextHop::Unreachable(Unreachable::NoRoute)),
            ("2a00::1", NextHop::Unreachable(Unreachable::NoRoute)),
            ("203.0.113.255", NextHop::Unreachable(Unreachable::NotUnicast)),
        ];

        // The kernel makes the routes of IPv6 addresses in its own time.
        until(&network, "2001:db8:10::1", |hop| *hop == NextHop::Local).await;
        let hops = network.resolve_all(&cases.clone().map(|(case, _)| addr(case))).await.unwrap();

        for (case, expected) in cases {
            let mut found = hops[&addr(case)].clone();
            if let NextHop::Resolved { source, .. } = &mut found {
                // Not the source for another family's neighbour.
                let source = source.take().unwrap();
                assert!(own.iter().any(|held| held.address == source), "{case} from {source}");
                assert_eq!(source.is_ipv4(), addr(case).is_ipv4(), "{case} from {source}");
            }
            assert_eq!(found, expected, "{case}");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_resolved_next_hop_when_its_mac_changes_or_fails_then_the_agent_hears_of_it() {
    in_namespace(|_peer| async {
        ip("neigh add 10.0.0.9 dev lan0 lladdr 02:00:00:00:00:91 nud reachable");
        let network = Network::open().await.unwrap();
        until(&network, "10.0.0.9", |hop| mac_of(hop) == Some([2, 0, 0, 0, 0, 0x91])).await;
        settle(&network).await;

        ip("neigh change 10.0.0.9 dev lan0 lladdr 02:00:00:00:00:92 nud reachable");

        let change = tokio::time::timeout(BOUND, network.changed()).await.unwrap();
        assert!(change.neighbours && change.moved && !change.routes, "{change:?}");
        until(&network, "10.0.0.9", |hop| mac_of(hop) == Some([2, 0, 0, 0, 0, 0x92])).await;
        ip("neigh del 10.0.0.9 dev lan0");
        until(&network, "10.0.0.9", |hop| matches!(hop, NextHop::Unresolved { .. })).await;
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_reachable_neighbour_when_it_turns_stale_then_nothing_has_changed() {
    in_namespace(|_peer| async {
        ip("neigh add 10.0.0.9 dev lan0 lladdr 02:00:00:00:00:91 nud reachable");
        let network = Network::open().await.unwrap();
        settle(&network).await;

        ip("neigh change 10.0.0.9 dev lan0 lladdr 02:00:00:00:00:91 nud stale");
        ip("neigh add 10.0.0.10 dev lan0 lladdr 02:00:00:00:00:a1 nud reachable");

        let change = tokio::time::timeout(BOUND, network.changed()).await.unwrap();
        let first_resolution = NetworkChange { neighbours: true, ..NetworkChange::default() };
        assert_eq!(change, first_resolution, "only the second neighbour counts");
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_remembered_route_when_routes_rules_or_links_change_then_it_is_asked_for_again() {
    in_namespace(|_peer| async {
        ip("neigh add 203.0.113.2 dev wan0 lladdr 02:00:00:00:00:22");
        ip("neigh add 203.0.113.3 dev wan0 lladdr 02:00:00:00:00:33");
        ip("route add 198.51.100.0/24 via 203.0.113.2");
        let network = Network::open().await.unwrap();
        let target = "198.51.100.7";
        until(&network, target, |hop| mac_of(hop) == Some(PEER_MAC)).await;

        ip("route replace 198.51.100.0/24 via 203.0.113.3");
        until(&network, target, |hop| mac_of(hop) == Some([2, 0, 0, 0, 0, 0x33])).await;

        ip("rule add to 198.51.100.7 blackhole");
        let blackhole = NextHop::Unreachable(Unreachable::Blackhole);
        until(&network, target, |hop| *hop == blackhole).await;
        ip("rule del to 198.51.100.7 blackhole");
        until(&network, target, |hop| mac_of(hop).is_some()).await;

        ip("link set wan0 address 02:00:00:00:00:19");
        // The kernel forgets an interface's neighbours when its MAC changes.
        ip("neigh replace 203.0.113.2 dev wan0 lladdr 02:00:00:00:00:22");
        ip("neigh replace 203.0.113.3 dev wan0 lladdr 02:00:00:00:00:33");
        until(&network, target, |hop| {
            matches!(hop, NextHop::Resolved { src_mac: [2, 0, 0, 0, 0, 0x19], .. })
        })
        .await;

        ip("nexthop add id 5 via 203.0.113.2 dev wan0");
        ip("route replace 198.51.100.0/24 nhid 5");
        until(&network, target, |hop| mac_of(hop) == Some(PEER_MAC)).await;
        ip("nexthop replace id 5 via 203.0.113.3 dev wan0");
        until(&network, target, |hop| mac_of(hop) == Some([2, 0, 0, 0, 0, 0x33])).await;

        ip("route del 198.51.100.0/24");
        until(&network, target, |hop| *hop == NextHop::Unreachable(Unreachable::NoRoute)).await;

        ip("link set wan0 down");
        until(&network, "203.0.113.2", |hop| matches!(hop, NextHop::Unreachable(_))).await;
    });
}

#[test]
#[ignore = "needs root"]
fn given_more_events_than_fit_when_they_are_lost_then_the_tables_are_right_all_the_same() {
    in_namespace(|_peer| async {
        let network = Network::open().await.unwrap();
        let lan = index(&network, "lan0");
        settle(&network).await;
        // This runtime has one thread: while it is busy here, no events are read.
        let mut batch = String::new();
        for round in 0..60 {
            for host in 0..1000 {
                let (a, b) = (host / 250 + 1, host % 250 + 1);
                let mac = format!("02:00:00:{round:02x}:{a:02x}:{b:02x}");
                batch += &format!("neigh replace 10.1.{a}.{b} dev lan0 lladdr {mac}\n");
            }
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), batch).unwrap();

        run(Command::new("ip").arg("-batch").arg(file.path()));

        let last = [2, 0, 0, 59, 4, 250];
        let mut change = NetworkChange::default();
        let found = |network: &Network| {
            let tables = network.shared.tables();
            tables.neighbours.get(&(lan, addr("10.1.4.250"))).and_then(|entry| entry.mac)
        };
        while found(&network) != Some(last) || !change.routes {
            let more = tokio::time::timeout(BOUND, network.changed()).await;
            change.merge(more.unwrap_or_else(|_| panic!("{change:?}, {:?}", found(&network))));
        }
        assert_eq!(change, NetworkChange::EVERYTHING, "events were lost");
        let known = network.shared.tables().neighbours.len();
        assert!(known >= 1000, "{known}");

        // The kernel sends events again.
        ip("neigh replace 10.1.4.250 dev lan0 lladdr 02:00:00:00:00:01");
        while found(&network) != Some([2, 0, 0, 0, 0, 1]) {
            tokio::time::timeout(BOUND, network.changed()).await.expect("no event");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_ten_thousand_next_hops_when_their_gateway_appears_then_no_route_is_looked_up_again() {
    in_namespace(|_peer| async {
        ip("route add 10.128.0.0/16 via 203.0.113.2");
        let network = Network::open().await.unwrap();
        settle(&network).await;
        let addresses: Vec<IpAddr> =
            (0..10_000u16).map(|n| IpAddr::from([10, 128, (n >> 8) as u8, n as u8])).collect();
        let start = Instant::now();
        let before = network.resolve_all(&addresses).await.unwrap();
        let cold = start.elapsed();
        let remembered = network.routes.lock().unwrap().state_and_size();

        ip("neigh add 203.0.113.2 dev wan0 lladdr 02:00:00:00:00:22");
        until(&network, "203.0.113.2", |hop| mac_of(hop).is_some()).await;
        let start = Instant::now();
        let after = network.resolve_all(&addresses).await.unwrap();

        eprintln!("10 000 next hops: {cold:?}, then {:?}", start.elapsed());
        assert_eq!(before.len(), 10_000);
        assert!(before.values().all(|hop| matches!(hop, NextHop::Unresolved { .. })));
        assert!(after.values().all(|hop| mac_of(hop) == Some(PEER_MAC)));
        assert_eq!(remembered, (network.shared.routing(), 10_000), "nothing was thrown away");
    });
}
