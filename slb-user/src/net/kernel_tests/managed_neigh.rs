//! Neighbours that the kernel keeps resolved.

use super::*;

#[test]
#[ignore = "needs root"]
fn given_wanted_neighbours_when_kept_then_the_kernel_resolves_and_manages_them_until_released() {
    in_namespace(|_peer| async {
        ip("neigh add 203.0.113.9 dev wan0 lladdr 02:00:00:00:00:99 nud permanent");
        let network = Network::open().await.unwrap();
        let wan = index(&network, "wan0");
        let wanted: HashSet<_> =
            ["203.0.113.2", "203.0.113.9", "2001:db8:113::2"].map(|a| (wan, addr(a))).into();
        let mut managed = ManagedNeighbours::new(&network);

        managed.keep(&wanted).await.unwrap();

        until(&network, "203.0.113.2", |hop| mac_of(hop) == Some(PEER_MAC)).await;
        until(&network, "2001:db8:113::2", |hop| mac_of(hop) == Some(PEER_MAC)).await;
        settle(&network).await;
        assert_eq!(neighbours().matches("managed").count(), 2, "{}", neighbours());

        // What is kept costs nothing.
        managed.keep(&wanted).await.unwrap();
        let quiet = tokio::time::timeout(Duration::from_millis(100), network.changed()).await;
        assert!(quiet.is_err(), "{quiet:?}");

        // A sweep takes it away; the next call brings it back, and a new process adopts it.
        let mut managed = ManagedNeighbours::new(&network);
        ip("neigh flush dev wan0");
        until(&network, "203.0.113.2", |hop| mac_of(hop).is_none()).await;
        managed.keep(&wanted).await.unwrap();
        until(&network, "203.0.113.2", |hop| mac_of(hop) == Some(PEER_MAC)).await;
        settle(&network).await;

        ManagedNeighbours::new(&network).keep(&HashSet::new()).await.unwrap();

        let table = neighbours();
        assert!(!table.contains("managed"), "{table}");
        assert!(table.contains("203.0.113.2 dev wan0 lladdr 02:00:00:00:00:22"), "{table}");
        let permanent = table.lines().filter(|line| line.contains("PERMANENT"));
        assert_eq!(permanent.filter(|line| line.contains("203.0.113.9")).count(), 1, "{table}");
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_silent_neighbour_when_kept_then_it_stays_unresolved_until_it_answers() {
    in_namespace(|peer| async move {
        let network = Network::open().await.unwrap();
        let mut managed = ManagedNeighbours::new(&network);
        let wanted = HashSet::from([(index(&network, "wan0"), addr("203.0.113.5"))]);
        managed.keep(&wanted).await.unwrap();
        let hop = network.resolve(addr("203.0.113.5")).await.unwrap();
        assert!(matches!(hop, NextHop::Unresolved { .. }), "{hop:?}");

        peer.ip("addr add 203.0.113.5/24 dev wan1");

        until(&network, "203.0.113.5", |hop| mac_of(hop) == Some(PEER_MAC)).await;
    });
}
