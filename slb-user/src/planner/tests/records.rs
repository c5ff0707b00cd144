//! The records of listeners, backends and addresses.

use super::*;

#[test]
fn given_next_hops_when_planned_then_only_ways_through_our_interfaces_are_used() {
    let mut world = World::new(&config([three()]));
    let hop = |ifindex| NextHop { ifindex, dst_mac: [2; 6], src_mac: [4; 6] };
    world.interfaces.insert(2, Interface { ifindex: 2, redirect: 1, ..Interface::default() });
    let route = |ifindex| BackendRoute { hop: hop(ifindex), mtu: 1_500, source: None };
    world.routes =
        [(addr("10.0.0.1"), route(2)), (addr("10.0.0.2"), route(3))].into_iter().collect();
    let state = world.desired();

    let hops: Vec<NextHop> = state.backends.values().map(|backend| backend.hop).collect();
    assert_eq!(
        hops,
        [hop(2), NextHop::UNRESOLVED, NextHop::UNRESOLVED],
        "ours, another's, unknown"
    );
    assert_eq!(state.interfaces, world.interfaces);
}

#[test]
fn given_a_listener_when_planned_then_its_backends_carry_its_timeout_and_index() {
    let mut shop = three();
    shop.listeners = vec![
        listener(80),
        Listener { idle_timeout: Duration::from_millis(10_001), ..listener(81) },
    ];
    let state = World::new(&config([shop])).desired();

    for (id, listener, jiffies) in [(0, 0, 225_000), (3, 1, 2_501)] {
        let backend = state.backends[&id];
        assert_eq!((backend.listener, backend.idle_jiffies), (listener, jiffies), "backend {id}");
        assert_eq!((backend.addr, backend.port), (addr("10.0.0.1").into(), 8_080), "backend {id}");
    }
}

#[test]
fn given_addresses_when_planned_then_each_has_its_roles() {
    let mut shop = three();
    // A backend that is a VIP of another instance.
    shop.groups[0].backends[2] = backend("203.0.113.99");
    let other = Instance { vips: addresses(&["203.0.113.99"]), ..three() };
    let state = World::new(&config([shop, other])).desired();

    let roles = |text| state.addresses[&Address::from(addr(text))];
    assert_eq!(roles("203.0.113.10"), Roles::VIP);
    assert_eq!(roles("10.0.0.1"), Roles::BACKEND);
    assert_eq!(roles("203.0.113.99"), Roles::VIP | Roles::BACKEND);
    assert_eq!(state.addresses.len(), 5);
}

#[test]
fn given_addresses_of_the_gateway_when_planned_then_they_are_known_as_local() {
    let mut world = World::new(&config([three()]));
    world.locals = ["192.0.2.1", "203.0.113.10"].map(addr).to_vec();
    let state = world.desired();

    let roles = |text| state.addresses[&Address::from(addr(text))];
    assert_eq!(roles("192.0.2.1"), Roles::LOCAL);
    assert_eq!(roles("203.0.113.10"), Roles::VIP | Roles::LOCAL, "the agent holds the VIPs");
}

#[test]
fn given_flows_with_entries_when_planned_then_their_ends_are_tracked() {
    let is_tracked = |state: &State| {
        let flags: Vec<bool> = state
            .endpoints
            .values()
            .map(|origin| origin.flags.intersects(RevNatFlags::TRACKED))
            .collect();
        assert!(flags.windows(2).all(|pair| pair[0] == pair[1]));
        flags[0]
    };
    let mut shop = three();
    let mut world = World::new(&config([shop.clone()]));
    assert!(!is_tracked(&world.desired()), "settled");
    world.health[0] = Unhealthy;
    assert!(is_tracked(&world.desired()), "in transition");

    shop.listeners[0].scheduler = Scheduler::Wrr;
    assert!(is_tracked(&World::new(&config([shop])).desired()), "in turn");
}

#[test]
fn given_a_disabled_listener_when_planned_then_its_vip_is_none() {
    let mut shop = three();
    shop.listeners[0].enabled = false;

    assert_eq!(World::new(&config([shop])).desired(), State::default());
}
