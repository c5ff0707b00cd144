//! Backends that several listeners or VIPs share.

use super::*;
use rustc_hash::FxHashSet;

#[test]
fn given_a_backend_of_two_listeners_when_planned_then_its_flows_have_entries() {
    let mut shop = three();
    shop.listeners.push(listener(81));
    let mut dns = three();
    dns.vips = addresses(&["203.0.113.11"]);
    dns.listeners[0].protocol = crate::config::Protocol::Udp;
    let state = World::new(&config([shop, dns])).desired();

    assert_eq!(state.endpoints.len(), 6, "three backends, two protocols");
    for (endpoint, origin) in &state.endpoints {
        let backend = state.backends[&origin.backend];
        assert_eq!((backend.addr, backend.port), (endpoint.addr, endpoint.port), "{endpoint:?}");
        let is_shared = endpoint.proto == abi::TCP;
        assert_eq!(origin.flags.intersects(RevNatFlags::SHARED), is_shared, "{endpoint:?}");
    }
    for (at, record) in &state.listeners {
        let is_shared = at.proto == abi::TCP;
        for slot in &record.schedule.slots {
            let flags = if is_shared { SLOT_LOOK | SLOT_KEEP } else { 0 };
            assert_eq!(slot & !SLOT_BACKEND, flags, "{at:?}");
            let backend = state.backends[&(slot & SLOT_BACKEND)];
            assert_eq!(backend.flags.intersects(BackendFlags::SHARED), is_shared, "{at:?}");
        }
    }
}

#[test]
fn given_owners_that_differ_when_planned_then_an_endpoint_goes_by_the_one_that_it_answers_for() {
    let mut shop = three();
    shop.listeners.push(listener(81));
    for in_turn in 0..2 {
        let mut shop = shop.clone();
        shop.listeners[in_turn].scheduler = Scheduler::Wrr;
        let state = World::new(&config([shop])).desired();
        for origin in state.endpoints.values() {
            let at = Endpoint { addr: origin.vip, port: origin.port, proto: abi::TCP };
            let scheduler = state.listeners[&at].schedule.by.scheduler;
            let is_tracked = origin.flags.intersects(RevNatFlags::TRACKED);
            assert_eq!(is_tracked, scheduler == abi::Scheduler::RING, "{in_turn}: {at:?}");
        }
    }
}

#[test]
fn given_direct_return_to_a_shared_backend_when_planned_then_it_needs_no_entries() {
    let mut shop = three();
    shop.listeners.push(listener(81));
    let mut direct = three();
    direct.vips = addresses(&["203.0.113.11"]);
    direct.groups[0].forwarding = Forwarding::Dsr;
    let state = World::new(&config([shop, direct])).desired();
    for record in state.listeners.values() {
        for slot in &record.schedule.slots {
            let backend = state.backends[&(slot & SLOT_BACKEND)];
            let is_answered_here = backend.mode != Mode::DSR;
            assert_eq!(slot & (SLOT_LOOK | SLOT_KEEP) != 0, is_answered_here);
            assert_eq!(backend.flags.intersects(BackendFlags::SHARED), is_answered_here);
        }
    }
}

#[test]
fn given_two_vips_when_planned_then_an_answer_does_not_tell_which_it_is_for() {
    let mut shop = three();
    shop.vips = addresses(&["203.0.113.10", "203.0.113.11"]);
    let state = World::new(&config([shop])).desired();

    assert!(state.endpoints.values().all(|origin| origin.flags.intersects(RevNatFlags::SHARED)));
}

#[test]
fn given_a_backend_that_comes_to_be_shared_when_planned_then_it_answers_for_whom_it_did() {
    let mut shop = three();
    shop.listeners = vec![listener(81)];
    let before = World::new(&config([shop.clone()])).desired();
    shop.listeners = vec![listener(80), listener(81)];
    let mut world = World::new(&config([shop]));
    world.installed = before;

    for origin in world.desired().endpoints.values() {
        assert_eq!((origin.port, origin.flags & RevNatFlags::SHARED), (81, RevNatFlags::SHARED));
    }
}

#[test]
fn given_a_backend_that_is_shared_no_more_when_planned_then_its_flows_entries_are_looked_at() {
    let mut shop = three();
    // Both lead to port 8080 of the same backends.
    shop.listeners.push(listener(81));
    let mut world = World::new(&config([shop.clone()]));
    world.installed = world.desired();
    let both = SLOT_LOOK | SLOT_KEEP;
    let is_all = |state: &State, flags| {
        let schedule = &state.listeners.values().next().unwrap().schedule;
        schedule.slots.iter().all(|slot| slot & both == flags)
    };
    assert!(is_all(&world.installed, both));

    shop.listeners.pop();
    world.reload(&config([shop]));
    world.planner.keep(&world.ids);
    world.health.truncate(world.ids.backends.len());
    let begun = world.desired();
    assert!(is_all(&begun, both), "flows of the other listener may live");
    assert!(begun.endpoints.values().all(|it| it.flags.intersects(RevNatFlags::SHARED)));
    let idle = world.ids.listeners[0].idle_timeout;
    assert_eq!(world.planner.due(), Some(world.now + idle));
    world.installed = begun;
    world.wait(idle);
    let state = world.desired();
    assert!(is_all(&state, SLOT_LOOK), "ports may have been translated");
    assert!(!state.endpoints.values().any(|it| it.flags.intersects(RevNatFlags::SHARED)));
    world.installed = state;
    let watched = world.planner.watched();
    let (&id, schedule) = watched.iter().next().unwrap();
    world.planner.settle(id, schedule, &FxHashSet::from_iter([7]));
    let slots = world.schedule().slots.clone();
    let looked: Vec<usize> = (0..slots.len()).filter(|&slot| slots[slot] & both != 0).collect();
    assert_eq!(looked, [7]);
}

#[test]
fn given_a_vip_that_moves_to_another_instance_when_planned_then_answers_to_its_clients_are_told_apart()
 {
    let mut from = three();
    from.vips = addresses(&["203.0.113.10", "203.0.113.11"]);
    let mut to = instance(["10.0.1.1", "10.0.1.2"].map(backend));
    (to.name, to.vips) = ("other".to_owned(), addresses(&["203.0.113.12"]));
    let mut world = World::new(&config([from.clone(), to.clone()]));
    world.installed = world.desired();
    let moved = from.vips.pop();
    to.vips.extend(moved);
    for is_restarted in [false, true] {
        world.reload(&config([from.clone(), to.clone()]));
        if is_restarted {
            world.planner = Planner::default();
        }
        world.planner.keep(&world.ids);
        world.health = vec![Healthy; world.ids.backends.len()];
        world.installed = world.desired();
        let backends = &world.installed.backends;
        for (at, origin) in &world.installed.endpoints {
            assert!(origin.flags.intersects(RevNatFlags::SHARED), "{is_restarted}: {at:?}");
            assert!(backends[&origin.backend].flags.intersects(BackendFlags::SHARED), "{at:?}");
        }
    }
    world.wait(world.ids.listeners[0].idle_timeout);
    let over = world.desired();
    for (at, origin) in &over.endpoints {
        let is_of_two = origin.vip != addr("203.0.113.10").into();
        assert_eq!(origin.flags.intersects(RevNatFlags::SHARED), is_of_two, "{at:?}");
    }
}
