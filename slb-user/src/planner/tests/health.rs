//! Which backends get new flows, by health, role and weight.

use super::*;

#[test]
fn given_a_primary_secondary_group_when_the_primary_is_unhealthy_then_the_secondary_gets_all() {
    for scheduler in [Scheduler::Tch, Scheduler::Wrr] {
        let mut db = primary_secondary();
        db.listeners[0].scheduler = scheduler;
        let mut world = World::new(&config([db]));
        // The secondary's own health does not count: it is not checked.
        let cases = [
            (Healthy, Healthy, 0),
            (Healthy, Unknown, 0),
            (Healthy, Unhealthy, 0),
            (Unhealthy, Healthy, 1),
            (Unhealthy, Unknown, 1),
            (Unhealthy, Unhealthy, 1),
            (Unknown, Unknown, 0),
            (Healthy, Unknown, 0),
        ];
        for (primary, secondary, expected) in cases {
            world.health = vec![primary, secondary];
            let case = format!("{scheduler}: {primary:?} {secondary:?}");
            assert_eq!(world.chosen(), [expected], "{case}");
            assert_eq!(world.schedule().shares()[&expected], 1.0, "{case}");
        }
    }
}

#[test]
fn given_an_unchecked_primary_secondary_group_when_planned_then_the_primary_gets_all() {
    let mut db = primary_secondary();
    db.listeners[0].health_check = None;
    let mut world = World::new(&config([db]));
    world.health = vec![Unknown, Unknown];

    assert_eq!(world.chosen(), [0]);
}

#[test]
fn given_health_when_planned_then_only_healthy_backends_get_new_flows() {
    let cases = [
        (AllUnhealthy::FailClosed, [Healthy, Healthy, Healthy], vec![0, 1, 2]),
        (AllUnhealthy::FailClosed, [Healthy, Unhealthy, Unknown], vec![0]),
        (AllUnhealthy::FailClosed, [Unhealthy, Unhealthy, Unhealthy], vec![]),
        (AllUnhealthy::FailClosed, [Unknown, Unknown, Unknown], vec![]),
        (AllUnhealthy::FailOpen, [Healthy, Unhealthy, Unknown], vec![0]),
        (AllUnhealthy::FailOpen, [Unhealthy, Unhealthy, Unhealthy], vec![0, 1, 2]),
        (AllUnhealthy::FailOpen, [Unhealthy, Unknown, Unhealthy], vec![0, 1, 2]),
    ];
    for scheduler in [Scheduler::Tch, Scheduler::Wrr] {
        for (policy, health, expected) in &cases {
            let mut shop = three();
            shop.listeners[0].all_unhealthy = *policy;
            shop.listeners[0].scheduler = scheduler;
            let mut world = World::new(&config([shop]));
            world.health = health.to_vec();
            let case = format!("{scheduler} {policy} {health:?}");
            world.desired();
            world.wait(FIRST_PROBES);
            assert_eq!(world.chosen(), *expected, "{case}");

            let state = world.desired();
            let usable: Vec<u32> = state
                .backends
                .iter()
                .filter(|(_, backend)| backend.flags.intersects(BackendFlags::USABLE))
                .map(|(&id, _)| id)
                .collect();
            assert_eq!(usable, *expected, "{case}");
        }
    }
}

#[test]
fn given_an_unchecked_listener_when_planned_then_its_backends_are_usable_with_any_health() {
    let mut shop = three();
    shop.listeners[0].health_check = None;
    let mut world = World::new(&config([shop]));
    world.health = vec![Unknown, Unhealthy, Healthy];

    assert_eq!(world.chosen(), [0, 1, 2]);
    let state = world.desired();
    for (id, backend) in state.backends {
        assert_eq!(backend.flags, BackendFlags::IN_USE | BackendFlags::USABLE, "backend {id}");
    }
}

#[test]
fn given_health_when_planned_then_the_next_agent_can_read_it_from_the_flags() {
    let mut world = World::new(&config([three()]));
    world.health = vec![Healthy, Unhealthy, Unknown];

    let flags: Vec<BackendFlags> =
        world.desired().backends.values().map(|backend| backend.flags).collect();

    let healthy = BackendFlags::IN_USE | BackendFlags::USABLE | BackendFlags::HEALTHY;
    assert_eq!(
        flags,
        [healthy, BackendFlags::IN_USE | BackendFlags::UNHEALTHY, BackendFlags::IN_USE]
    );
}

#[test]
fn given_failing_open_when_planned_then_the_flags_still_tell_the_truth() {
    let mut shop = three();
    shop.listeners[0].all_unhealthy = AllUnhealthy::FailOpen;
    let mut world = World::new(&config([shop]));
    world.health = vec![Unhealthy; 3];

    for (id, backend) in world.desired().backends {
        let expected = BackendFlags::IN_USE | BackendFlags::USABLE | BackendFlags::UNHEALTHY;
        assert_eq!(backend.flags, expected, "backend {id}");
    }
}

#[test]
fn given_weight_0_when_planned_then_a_backend_keeps_its_flows_and_gets_no_new_ones() {
    for scheduler in [Scheduler::Tch, Scheduler::Wrr] {
        let mut shop = three();
        shop.groups[0].backends[1].weight = 0;
        shop.listeners[0].scheduler = scheduler;
        let mut world = World::new(&config([shop]));

        assert_eq!(world.chosen(), [0, 2], "{scheduler}");
        let usable = world.desired().backends[&1].flags & BackendFlags::USABLE;
        assert_eq!(usable, BackendFlags::USABLE, "{scheduler}: its flows stay");
    }
}
