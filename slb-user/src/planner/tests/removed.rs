//! Backends that the configuration no longer names.

use super::*;

#[test]
fn given_a_removed_backend_when_planned_then_its_flows_go_on_and_no_other_moves() {
    for scheduler in [Scheduler::Tch, Scheduler::Wrr] {
        let mut shop = three();
        shop.listeners[0].scheduler = scheduler;
        let mut world = World::new(&config([shop.clone()]));
        let before = world.desired();
        world.installed = before.clone();
        shop.groups[0].backends.remove(1);
        world.reload(&config([shop]));
        world.planner.keep(&world.ids);
        world.health = vec![Healthy, Healthy, Unknown];
        let after = world.desired();

        assert_eq!(world.chosen(), [0, 2]);
        let answering = |state: &State| -> Vec<_> {
            state.endpoints.iter().map(|(at, origin)| (*at, origin.vip, origin.backend)).collect()
        };
        assert_eq!(answering(&after), answering(&before), "answers are still translated");
        let (was, is) = (before.backends[&1], after.backends[&1]);
        assert_eq!(is.flags & (BackendFlags::IN_USE | BackendFlags::USABLE), BackendFlags::IN_USE);
        assert_eq!((is.addr, is.port, is.mode), (was.addr, was.port, was.mode));
        if scheduler == Scheduler::Tch {
            let [was, is] = [&before, &after]
                .map(|state| Arc::clone(&state.listeners.values().next().unwrap().schedule));
            assert_eq!(is.previous, was.slots, "where what has no entry goes");
            let kept = was.slots.iter().zip(&is.slots).filter(|(was, _)| **was != 1);
            let moved = kept.filter(|(was, is)| **was != **is & SLOT_BACKEND).count();
            assert!(moved < was.slots.len() / 50, "{moved} of {}", was.slots.len());
        }
    }
}

#[test]
fn given_removed_backends_when_all_others_fail_then_failing_open_does_not_bring_them_back() {
    let mut shop = three();
    shop.listeners[0].all_unhealthy = AllUnhealthy::FailOpen;
    let mut world = World::new(&config([shop.clone()]));
    world.installed = world.desired();
    shop.groups[0].backends.remove(1);
    world.reload(&config([shop]));
    world.health = vec![Unhealthy; 3];
    assert_eq!(world.chosen(), [0, 2]);
}
