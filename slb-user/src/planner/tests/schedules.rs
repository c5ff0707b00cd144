//! Schedules: their contents, and when they change.

use super::*;
use rustc_hash::FxHashSet;

#[test]
fn given_no_backend_with_weight_when_planned_then_the_schedule_is_empty() {
    for scheduler in [Scheduler::Tch, Scheduler::Wrr] {
        for count in 0..=2 {
            let backends =
                ["10.0.0.1", "10.0.0.2"].map(|addr| ConfigBackend { weight: 0, ..backend(addr) });
            let mut shop = instance(&backends[..count]);
            shop.listeners[0].scheduler = scheduler;
            let schedule = World::new(&config([shop])).schedule();
            assert_eq!(schedule.shares(), BTreeMap::new(), "{scheduler}, {count} backends");
        }
    }
}

#[test]
fn given_weights_when_planned_then_the_expected_shares_follow_them() {
    let mut shop = three();
    for (backend, weight) in shop.groups[0].backends.iter_mut().zip([50, 30, 20]) {
        backend.weight = weight;
    }
    // The hash table gives whole slots; at 2039 of them that is far below 1 %.
    for (scheduler, tolerance) in [(Scheduler::Tch, 0.005), (Scheduler::Wrr, 1e-12)] {
        shop.listeners[0].scheduler = scheduler;
        let shares = World::new(&config([shop.clone()])).schedule().shares();
        for (id, expected) in [(0, 0.5), (1, 0.3), (2, 0.2)] {
            let found = shares[&id];
            assert!((found - expected).abs() < tolerance, "{scheduler}, backend {id}: {found}");
        }
        assert!((shares.values().sum::<f64>() - 1.0).abs() < 1e-12, "{scheduler}");
    }
}

#[test]
fn given_round_robin_when_planned_then_weights_do_not_matter_unless_they_are_nothing() {
    let mut shop = three();
    shop.listeners[0].scheduler = Scheduler::Rr;
    for (backend, weight) in shop.groups[0].backends.iter_mut().zip([1, 0, 100]) {
        backend.weight = weight;
    }
    let shares = World::new(&config([shop])).schedule().shares();
    assert_eq!(shares, BTreeMap::from([(0, 0.5), (2, 0.5)]));
}

#[test]
fn given_another_hash_when_planned_then_connections_go_by_the_one_before_until_they_have_entries() {
    let mut shop = three();
    let mut world = World::new(&config([shop.clone()]));
    let before = world.schedule();
    shop.listeners[0].scheduler = Scheduler::Sch;
    world.reload(&config([shop.clone()]));
    let after = world.schedule();
    assert_eq!(
        (after.by.scheduler, after.previous_by.scheduler),
        (abi::Scheduler::SOURCE, abi::Scheduler::HASH)
    );
    assert_eq!(after.previous, before.slots);
    let both = SLOT_LOOK | SLOT_KEEP;
    assert!(after.slots.iter().all(|slot| slot & both == both));

    // In turn: the same, for those that have none.
    world.wait(world.ids.listeners[0].idle_timeout);
    world.schedule();
    shop.listeners[0].scheduler = Scheduler::Wrr;
    world.reload(&config([shop]));
    let ring = world.schedule();
    assert_eq!(
        (ring.by.scheduler, ring.previous_by.scheduler),
        (abi::Scheduler::RING, abi::Scheduler::SOURCE)
    );
    assert_eq!(ring.previous, before.slots);
}

#[test]
fn given_another_seed_when_planned_then_connections_go_by_the_one_before_until_they_have_entries() {
    let mut world = World::new(&config([three()]));
    let before = world.schedule();
    world.seed = Seed::new([3, 5, 7, 11, 13]);
    let after = world.schedule();
    assert_eq!((after.by.seed, after.previous_by), (world.seed, before.by));
    assert_eq!(after.previous, before.slots, "the slots are the same, and other flows have them");
    let both = SLOT_LOOK | SLOT_KEEP;
    assert!(after.slots.iter().all(|slot| slot & both == both));

    // An agent that takes over goes on with it.
    world.installed = world.desired();
    world.planner = Planner::default();
    let restored = world.schedule();
    assert_eq!((restored.by, restored.previous_by), (after.by, after.previous_by));
    assert_eq!((&restored.slots, &restored.previous), (&after.slots, &after.previous));

    world.wait(world.ids.listeners[0].idle_timeout);
    let over = world.schedule();
    assert!(over.previous.is_empty());
    assert!(over.slots.iter().all(|slot| slot & both == SLOT_LOOK));
}

#[test]
fn given_schedulers_when_planned_then_the_program_is_told_how_to_choose() {
    let cases = [
        (Scheduler::Tch, 2, abi::Scheduler::HASH),
        (Scheduler::Wrr, 2, abi::Scheduler::RING),
        (Scheduler::Sch, 2, abi::Scheduler::SOURCE),
        (Scheduler::Rr, 2, abi::Scheduler::RING),
        (Scheduler::Tch, 1, abi::Scheduler::HASH),
        (Scheduler::Sch, 1, abi::Scheduler::SOURCE),
        (Scheduler::Rr, 1, abi::Scheduler::RING),
        (Scheduler::Wrr, 1, abi::Scheduler::RING),
    ];
    for (scheduler, count, expected) in cases {
        let mut shop = instance(&["10.0.0.1", "10.0.0.2"].map(backend)[..count]);
        shop.listeners[0].scheduler = scheduler;
        let schedule = World::new(&config([shop])).schedule();
        assert_eq!(schedule.by.scheduler, expected, "{scheduler}, {count} backends");
        assert_eq!(schedule.slots.len() == 1, count == 1, "{scheduler}, {count} backends");
    }
}

#[test]
fn given_a_failure_when_planned_then_the_hash_table_keeps_its_size_and_moves_little() {
    let hosts: Vec<_> = (1..=10).map(|host| backend(&format!("10.0.0.{host}"))).collect();
    let mut world = World::new(&config([instance(hosts)]));
    let before = world.schedule();
    world.health[3] = Unhealthy;
    let after = world.schedule();

    assert_eq!(after.slots.len(), before.slots.len());
    assert!(!after.shares().contains_key(&3));
    let pairs = before.slots.iter().zip(&after.slots);
    let moved = pairs.filter(|&(&old, &new)| old != 3 && old != new & SLOT_BACKEND).count();
    let share = moved as f64 / before.slots.len() as f64;
    assert!(share < 0.05, "{share:.3} of all slots moved without need");
}

#[test]
fn given_nothing_new_when_planned_again_then_the_schedule_is_the_same_object() {
    let mut world = World::new(&config([three()]));
    let first = world.schedule();
    assert!(Arc::ptr_eq(&first, &world.schedule()));

    world.routes.insert(
        addr("10.0.0.1"),
        BackendRoute {
            hop: NextHop { ifindex: 2, ..NextHop::UNRESOLVED },
            mtu: 1_500,
            source: None,
        },
    );
    world.interfaces.insert(2, Interface::default());
    assert!(Arc::ptr_eq(&first, &world.schedule()), "a hop is no matter of the schedule");

    world.health[0] = Unhealthy;
    let second = world.schedule();
    assert!(!Arc::ptr_eq(&first, &second));
    world.health[0] = Unknown;
    assert!(Arc::ptr_eq(&second, &world.schedule()), "unknown is as unusable as unhealthy");
    world.health[0] = Healthy;
    assert_eq!(world.schedule().shares(), first.shares(), "and back");
}

#[test]
fn given_another_weight_or_scheduler_when_planned_again_then_the_schedule_is_made_anew() {
    let mut world = World::new(&config([three()]));
    let first = world.schedule();
    Arc::make_mut(&mut world.ids).backends[0].weight = 50;
    let second = world.schedule();
    assert!(second.shares()[&0] < first.shares()[&0]);

    Arc::make_mut(&mut world.ids).listeners[0].scheduler = Scheduler::Wrr;
    assert_eq!(world.schedule().by.scheduler, abi::Scheduler::RING);
}

#[test]
fn given_vips_of_one_family_when_planned_then_they_share_one_schedule() {
    let mut shop = three();
    shop.vips = addresses(&["203.0.113.10", "203.0.113.11"]);
    let state = World::new(&config([shop])).desired();

    let listeners: Vec<_> = state.listeners.values().collect();
    assert_eq!(listeners.len(), 2);
    assert_eq!(listeners[0].id, listeners[1].id);
    assert!(Arc::ptr_eq(&listeners[0].schedule, &listeners[1].schedule));
}

#[test]
fn given_a_new_schedule_when_first_probes_are_out_then_it_waits_for_them_but_not_for_ever() {
    let mut world = World::new(&config([three()]));
    world.health = vec![Unknown, Unknown, Unknown];
    assert_eq!(world.chosen(), [0_u32; 0]);
    world.health = vec![Healthy, Unknown, Healthy];
    assert_eq!(world.chosen(), [0_u32; 0], "the second would take over slots of the others");
    assert_eq!(world.planner.due(), Some(world.now + FIRST_PROBES));

    world.wait(FIRST_PROBES);
    assert_eq!(world.chosen(), [0, 2]);
    assert!(world.schedule().slots.iter().all(|slot| slot & SLOT_LOOK == 0), "there were no flows");
    assert_eq!(world.planner.due(), None);

    world.health = vec![Healthy; 3];
    assert_eq!(world.chosen(), [0, 1, 2]);
    assert!(world.schedule().slots.iter().any(|slot| slot & SLOT_LOOK != 0));
}

#[test]
fn given_another_agents_schedule_when_planned_then_its_flows_are_not_forgotten() {
    let before = World::new(&config([three()])).desired();
    let mut fewer = three();
    fewer.groups[0].backends.pop();
    let fewer = config([fewer]);
    let ids = Ids::assign(&fewer, &before).unwrap();
    let health = vec![Healthy; ids.backends.len()];
    let mut world =
        World { ids: Arc::new(ids), health, installed: before.clone(), ..World::new(&fewer) };
    let schedule = world.schedule();

    let old = &before.listeners.values().next().unwrap().schedule.slots;
    assert_eq!(schedule.previous, *old);
    for (slot, old) in schedule.slots.iter().zip(old) {
        let moves = *old == 2;
        let flags = if moves { SLOT_LOOK | SLOT_KEEP } else { 0 };
        if moves {
            assert_ne!(slot & SLOT_BACKEND, 2);
        }
        if slot & SLOT_BACKEND == *old || moves {
            assert_eq!(slot & !SLOT_BACKEND, flags);
        }
    }
    let idle = world.ids.listeners[0].idle_timeout;
    assert_eq!(world.planner.due(), Some(world.now + idle));
    world.wait(idle);
    assert_eq!(world.schedule().previous, [0_u32; 0], "every old flow has an entry by now");
    let watched = world.planner.watched();
    let (&id, schedule) = watched.iter().next().unwrap();
    world.planner.settle(id, schedule, &FxHashSet::default());
    assert!(world.schedule().slots.iter().all(|slot| slot & SLOT_LOOK == 0));
}

#[test]
fn given_a_listener_that_is_gone_when_planned_then_its_schedule_is_forgotten() {
    let mut shop = three();
    shop.listeners.push(Listener { port: 81, ..listener(81) });
    let mut world = World::new(&config([shop.clone()]));
    world.installed = world.desired();
    // So that something is due.
    world.health[0] = Unhealthy;
    world.health[3] = Unhealthy;
    world.desired();
    assert_eq!(world.planner.schedules.states.len(), 2);
    shop.listeners.pop();
    world.reload(&config([shop]));
    world.planner.keep(&world.ids);
    assert_eq!(world.planner.schedules.states.len(), 1);
}
