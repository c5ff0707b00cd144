use std::time::Duration;

use slb_common::abi::{
    self, Address, BACKEND_HEALTHY, BACKEND_IN_USE, BACKEND_UNHEALTHY, BACKEND_USABLE, MODE_DSR,
    SLOT_BACKEND, SLOT_KEEP, SLOT_LOOK,
};

use super::{schedules::FIRST_PROBES, *};
use crate::{
    config::{
        AllUnhealthy, Backend as ConfigBackend, Config, Forwarding, GroupKind, Instance, Listener,
        Scheduler,
    },
    ids::fixtures::{addresses, backend, config, instance, listener},
};

use Health::{Healthy, Unhealthy, Unknown};

/// A configuration in its circumstances; by default all is healthy, and no hop is known.
struct World {
    planner: Planner,
    ids: Ids,
    health: Vec<Health>,
    routes: HashMap<IpAddr, BackendRoute>,
    interfaces: BTreeMap<u32, Interface>,
    locals: Vec<IpAddr>,
    installed: State,
    begin: Instant,
    now: Instant,
}

impl World {
    fn new(config: &Config) -> Self {
        let ids = Ids::assign(config, &State::default()).unwrap();
        Self {
            planner: Planner::default(),
            health: vec![Healthy; ids.backends.len()],
            ids,
            routes: HashMap::new(),
            interfaces: BTreeMap::new(),
            locals: Vec::new(),
            installed: State::default(),
            begin: Instant::now(),
            now: Instant::now(),
        }
    }

    /// Lets time pass.
    fn wait(&mut self, time: Duration) {
        self.now += time;
    }

    fn jiffies(&self) -> u32 {
        Jiffies::per_second(250).from_duration(self.now - self.begin)
    }

    fn desired(&mut self) -> State {
        let now = Inputs {
            health: &self.health,
            routes: &self.routes,
            generic: false,
            interfaces: &self.interfaces,
            locals: &self.locals,
            jiffies: Jiffies::per_second(250),
            installed: &self.installed,
            now: self.now,
            moment: self.jiffies(),
            trusted: &[].into(),
            closing: &HashSet::new(),
        };
        self.planner.desired(&self.ids, now)
    }

    /// The schedule of the only listener.
    fn schedule(&mut self) -> Arc<Schedule> {
        let state = self.desired();
        let schedules: Vec<_> =
            state.listeners.values().map(|listener| &listener.schedule).collect();
        let [schedule] = schedules[..] else { panic!("{schedules:?}") };
        Arc::clone(schedule)
    }

    /// Indices of the backends that get new flows at the only listener.
    fn chosen(&mut self) -> Vec<u32> {
        self.schedule().shares().into_keys().collect()
    }
}

fn three() -> Instance {
    instance(["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(backend))
}

fn primary_secondary() -> Instance {
    let mut db = instance(["10.0.0.1", "10.0.0.2"].map(backend));
    db.groups[0].kind = GroupKind::PrimarySecondary;
    db
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn given_a_primary_secondary_group_when_the_primary_is_unhealthy_then_the_secondary_gets_all() {
    for scheduler in [Scheduler::Tch, Scheduler::Wrr] {
        let mut db = primary_secondary();
        db.listeners[0].scheduler = scheduler;
        let mut world = World::new(&config([db]));
        // The secondary's own health does not count: nobody checks it.
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
                .filter(|(_, backend)| backend.flags & BACKEND_USABLE != 0)
                .map(|(&id, _)| id)
                .collect();
            assert_eq!(usable, *expected, "{case}");
        }
    }
}

#[test]
fn given_an_unchecked_listener_when_planned_then_its_backends_are_usable_whatever_is_known() {
    let mut shop = three();
    shop.listeners[0].health_check = None;
    let mut world = World::new(&config([shop]));
    world.health = vec![Unknown, Unhealthy, Healthy];

    assert_eq!(world.chosen(), [0, 1, 2]);
    let state = world.desired();
    for (id, backend) in state.backends {
        assert_eq!(backend.flags, BACKEND_IN_USE | BACKEND_USABLE, "backend {id}");
    }
}

#[test]
fn given_health_when_planned_then_the_next_agent_can_read_it_from_the_flags() {
    let mut world = World::new(&config([three()]));
    world.health = vec![Healthy, Unhealthy, Unknown];

    let flags: Vec<u32> = world.desired().backends.values().map(|backend| backend.flags).collect();

    let healthy = BACKEND_IN_USE | BACKEND_USABLE | BACKEND_HEALTHY;
    assert_eq!(flags, [healthy, BACKEND_IN_USE | BACKEND_UNHEALTHY, BACKEND_IN_USE]);
}

#[test]
fn given_failing_open_when_planned_then_the_flags_still_tell_the_truth() {
    let mut shop = three();
    shop.listeners[0].all_unhealthy = AllUnhealthy::FailOpen;
    let mut world = World::new(&config([shop]));
    world.health = vec![Unhealthy; 3];

    for (id, backend) in world.desired().backends {
        let expected = BACKEND_IN_USE | BACKEND_USABLE | BACKEND_UNHEALTHY;
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
        let usable = world.desired().backends[&1].flags & BACKEND_USABLE;
        assert_eq!(usable, BACKEND_USABLE, "{scheduler}: its flows stay");
    }
}

#[test]
fn given_nobody_with_weight_when_planned_then_the_schedule_has_nobody() {
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
    world.ids = Ids::assign(&config([shop.clone()]), &world.installed).unwrap();
    let after = world.schedule();
    assert_eq!(
        (after.scheduler, after.previous_scheduler),
        (abi::SCHEDULER_SOURCE, abi::SCHEDULER_HASH)
    );
    assert_eq!(after.previous, before.slots);
    let both = SLOT_LOOK | SLOT_KEEP;
    assert!(after.slots.iter().all(|slot| slot & both == both));

    // In turn: the same, for those that have none.
    world.wait(world.ids.listeners[0].idle_timeout);
    world.schedule();
    shop.listeners[0].scheduler = Scheduler::Wrr;
    world.ids = Ids::assign(&config([shop]), &world.installed).unwrap();
    let ring = world.schedule();
    assert_eq!(
        (ring.scheduler, ring.previous_scheduler),
        (abi::SCHEDULER_RING, abi::SCHEDULER_SOURCE)
    );
    assert_eq!(ring.previous, before.slots);
}

#[test]
fn given_schedulers_when_planned_then_the_program_is_told_how_to_choose() {
    let cases = [
        (Scheduler::Tch, 2, abi::SCHEDULER_HASH),
        (Scheduler::Wrr, 2, abi::SCHEDULER_RING),
        (Scheduler::Sch, 2, abi::SCHEDULER_SOURCE),
        (Scheduler::Rr, 2, abi::SCHEDULER_RING),
        (Scheduler::Tch, 1, abi::SCHEDULER_HASH),
        (Scheduler::Sch, 1, abi::SCHEDULER_SOURCE),
        (Scheduler::Rr, 1, abi::SCHEDULER_RING),
        (Scheduler::Wrr, 1, abi::SCHEDULER_RING),
    ];
    for (scheduler, count, expected) in cases {
        let mut shop = instance(&["10.0.0.1", "10.0.0.2"].map(backend)[..count]);
        shop.listeners[0].scheduler = scheduler;
        let schedule = World::new(&config([shop])).schedule();
        assert_eq!(schedule.scheduler, expected, "{scheduler}, {count} backends");
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
    world.ids.backends[0].weight = 50;
    let second = world.schedule();
    assert!(second.shares()[&0] < first.shares()[&0]);

    world.ids.listeners[0].scheduler = Scheduler::Wrr;
    assert_eq!(world.schedule().scheduler, abi::SCHEDULER_RING);
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
fn given_next_hops_when_planned_then_only_ways_through_our_interfaces_are_used() {
    let mut world = World::new(&config([three()]));
    let hop = |ifindex| NextHop { ifindex, dst_mac: [2; 6], src_mac: [4; 6] };
    world.interfaces.insert(2, Interface { redirect: 1 });
    let route = |ifindex| BackendRoute { hop: hop(ifindex), mtu: 1_500, source: None };
    world.routes = [(addr("10.0.0.1"), route(2)), (addr("10.0.0.2"), route(3))].into();
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

    let roles = |text| state.addresses[&Address::from(addr(text))].roles;
    assert_eq!(roles("203.0.113.10"), ROLE_VIP);
    assert_eq!(roles("10.0.0.1"), ROLE_BACKEND);
    assert_eq!(roles("203.0.113.99"), ROLE_VIP | ROLE_BACKEND);
    assert_eq!(state.addresses.len(), 5);
}

#[test]
fn given_addresses_of_the_gateway_when_planned_then_they_are_known_as_local() {
    let mut world = World::new(&config([three()]));
    world.locals = ["192.0.2.1", "203.0.113.10"].map(addr).to_vec();
    let state = world.desired();

    let roles = |text| state.addresses[&Address::from(addr(text))].roles;
    assert_eq!(roles("192.0.2.1"), ROLE_LOCAL);
    assert_eq!(roles("203.0.113.10"), ROLE_VIP | ROLE_LOCAL, "the agent holds the VIPs");
}

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
        assert_eq!(origin.flags & REVNAT_SHARED != 0, is_shared, "{endpoint:?}");
    }
    for (at, record) in &state.listeners {
        let is_shared = at.proto == abi::TCP;
        for slot in &record.schedule.slots {
            let flags = if is_shared { SLOT_LOOK | SLOT_KEEP } else { 0 };
            assert_eq!(slot & !SLOT_BACKEND, flags, "{at:?}");
            let backend = state.backends[&(slot & SLOT_BACKEND)];
            assert_eq!(backend.flags & BACKEND_SHARED != 0, is_shared, "{at:?}");
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
            let scheduler = state.listeners[&at].schedule.scheduler;
            let is_tracked = origin.flags & REVNAT_TRACKED != 0;
            assert_eq!(is_tracked, scheduler == abi::SCHEDULER_RING, "{in_turn}: {at:?}");
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
            let is_answered_here = backend.mode != MODE_DSR;
            assert_eq!(slot & (SLOT_LOOK | SLOT_KEEP) != 0, is_answered_here);
            assert_eq!(backend.flags & BACKEND_SHARED != 0, is_answered_here);
        }
    }
}

#[test]
fn given_two_vips_when_planned_then_an_answer_does_not_tell_which_it_is_for() {
    let mut shop = three();
    shop.vips = addresses(&["203.0.113.10", "203.0.113.11"]);
    let state = World::new(&config([shop])).desired();

    assert!(state.endpoints.values().all(|origin| origin.flags & REVNAT_SHARED != 0));
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
        assert_eq!((origin.port, origin.flags & REVNAT_SHARED), (81, REVNAT_SHARED));
    }
}

#[test]
fn given_flows_with_entries_when_planned_then_their_ends_are_tracked() {
    let is_tracked = |state: &State| {
        let flags: Vec<bool> =
            state.endpoints.values().map(|origin| origin.flags & REVNAT_TRACKED != 0).collect();
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
fn given_a_new_schedule_when_first_probes_are_out_then_it_waits_for_them_but_not_for_ever() {
    let mut world = World::new(&config([three()]));
    world.health = vec![Unknown, Unknown, Unknown];
    assert_eq!(world.chosen(), [0_u32; 0]);
    world.health = vec![Healthy, Unknown, Healthy];
    assert_eq!(world.chosen(), [0_u32; 0], "the second would take over slots of the others");
    assert_eq!(world.planner.due(), Some(world.now + FIRST_PROBES));

    world.wait(FIRST_PROBES);
    assert_eq!(world.chosen(), [0, 2]);
    assert!(world.schedule().slots.iter().all(|slot| slot & SLOT_LOOK == 0), "nobody had a flow");
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
    let mut world = World { ids, health, installed: before.clone(), ..World::new(&fewer) };
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
    world.planner.settle(id, schedule, &HashSet::new());
    assert!(world.schedule().slots.iter().all(|slot| slot & SLOT_LOOK == 0));
}

#[test]
fn given_a_disabled_listener_when_planned_then_its_vip_is_none() {
    let mut shop = three();
    shop.listeners[0].enabled = false;

    assert_eq!(World::new(&config([shop])).desired(), State::default());
}

#[test]
fn given_a_removed_backend_when_planned_then_its_flows_go_on_and_no_other_moves() {
    for scheduler in [Scheduler::Tch, Scheduler::Wrr] {
        let mut shop = three();
        shop.listeners[0].scheduler = scheduler;
        let mut world = World::new(&config([shop.clone()]));
        let before = world.desired();
        world.installed = before.clone();
        shop.groups[0].backends.remove(1);
        world.ids = Ids::assign(&config([shop]), &before).unwrap();
        world.planner.keep(&world.ids);
        world.health = vec![Healthy, Healthy, Unknown];
        let after = world.desired();

        assert_eq!(world.chosen(), [0, 2]);
        let answering = |state: &State| -> Vec<_> {
            state.endpoints.iter().map(|(at, origin)| (*at, origin.vip, origin.backend)).collect()
        };
        assert_eq!(answering(&after), answering(&before), "answers are still translated");
        let (was, is) = (before.backends[&1], after.backends[&1]);
        assert_eq!(is.flags & (BACKEND_IN_USE | BACKEND_USABLE), BACKEND_IN_USE);
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
    world.ids = Ids::assign(&config([shop]), &world.installed).unwrap();
    world.health = vec![Unhealthy; 3];
    assert_eq!(world.chosen(), [0, 2]);
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
    world.ids = Ids::assign(&config([shop]), &world.installed).unwrap();
    world.planner.keep(&world.ids);
    assert_eq!(world.planner.schedules.states.len(), 1);
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
    world.ids = Ids::assign(&config([shop]), &world.installed).unwrap();
    world.planner.keep(&world.ids);
    world.health.truncate(world.ids.backends.len());
    let state = world.desired();
    assert!(is_all(&state, SLOT_LOOK), "ports may have been translated");
    world.installed = state;
    let watched = world.planner.watched();
    let (&id, schedule) = watched.iter().next().unwrap();
    world.planner.settle(id, schedule, &HashSet::from([7]));
    let slots = world.schedule().slots.clone();
    let looked: Vec<usize> = (0..slots.len()).filter(|&slot| slots[slot] & both != 0).collect();
    assert_eq!(looked, [7]);
}
