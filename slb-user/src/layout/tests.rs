use std::collections::{BTreeMap, HashSet};

use proptest::{collection::vec, prelude::*};
use slb_common::abi::BACKEND_IN_USE;

use super::{fixtures::*, *};
use crate::config::{Backend, Instance, Listener};

/// Each target's index, by its service's first endpoint and its own address.
fn target_ids(layout: &Layout) -> BTreeMap<(Endpoint, SocketAddr), u32> {
    layout
        .services
        .iter()
        .flat_map(|service| {
            let targets = &layout.targets[service.targets.clone()];
            targets.iter().map(|target| ((service.endpoints[0], target.addr), target.id))
        })
        .collect()
}

fn service_ids(layout: &Layout) -> BTreeMap<Endpoint, u32> {
    let services = layout.services.iter();
    services.flat_map(|service| service.endpoints.iter().map(|&e| (e, service.id))).collect()
}

/// Two services never share an index, nor do two targets.
fn assert_distinct(layout: &Layout) {
    let services: HashSet<u32> = layout.services.iter().map(|service| service.id).collect();
    assert_eq!(services.len(), layout.services.len(), "{:?}", layout.services);
    let targets: HashSet<u32> = layout.targets.iter().map(|target| target.id).collect();
    assert_eq!(targets.len(), layout.targets.len(), "{:?}", layout.targets);
}

fn three() -> Vec<Backend> {
    ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(backend).into()
}

fn fresh(config: &Config) -> Layout {
    Layout::new(config, &State::default()).unwrap()
}

#[test]
fn given_a_configuration_when_laid_out_then_every_part_has_its_place() {
    let mut checked = listener(443);
    checked.health_check.as_mut().unwrap().port = Some(9_000);
    let unchecked = Listener { health_check: None, ..listener(80) };
    let mut shop = instance([backend("10.0.0.1"), Backend { weight: 7, ..backend("10.0.0.2") }]);
    shop.listeners = vec![unchecked, checked];
    let layout = fresh(&config([shop]));

    let [first, second] = &layout.services[..] else { panic!("{:?}", layout.services) };
    let vip = "203.0.113.10".parse().unwrap();
    assert_eq!(first.endpoints, [endpoint(vip, 80, Protocol::Tcp)]);
    assert_eq!((first.id, first.instance, first.listener), (0, 0, 0));
    assert_eq!(second.endpoints, [endpoint(vip, 443, Protocol::Tcp)]);
    assert_eq!((second.id, second.instance, second.listener), (1, 0, 1));
    assert_eq!((first.targets.clone(), second.targets.clone()), (0..2, 2..4));

    let ids: Vec<u32> = layout.targets.iter().map(|target| target.id).collect();
    assert_eq!(ids, [0, 1, 2, 3]);
    let target = &layout.targets[1];
    assert_eq!((target.backend, target.weight, target.role), (Some(1), 7, Role::Member));
    assert_eq!(target.addr, "10.0.0.2:8080".parse().unwrap());
    assert!(target.check.is_none());
    let (_, probed) = layout.targets[3].check.as_ref().unwrap();
    assert_eq!(*probed, "10.0.0.2:9000".parse().unwrap(), "the check has a port of its own");
}

#[test]
fn given_one_backend_of_two_listeners_when_laid_out_then_it_is_the_same_on_every_gateway() {
    let mut shop = instance(three());
    shop.listeners.push(listener(81));
    let layout = fresh(&config([shop]));

    assert_eq!(layout.targets[0].identity, layout.targets[3].identity);
    assert_ne!(layout.targets[0].identity, layout.targets[1].identity);
    assert_ne!(layout.targets[0].id, layout.targets[3].id, "its flows are counted apart");
}

#[test]
fn given_backend_ports_when_laid_out_then_the_nearest_one_wins() {
    let cases = [
        ("the backend's own", Some(9_001), Some(8_080), 9_001),
        ("the listener's", None, Some(8_080), 8_080),
        ("none", None, None, 80),
    ];
    for (case, own, of_listener, expected) in cases {
        let mut shop = instance([Backend { port: own, ..backend("10.0.0.1") }]);
        shop.listeners[0].backend_port = of_listener;
        let layout = fresh(&config([shop]));
        assert_eq!(layout.targets[0].addr.port(), expected, "{case}");
    }
}

#[test]
fn given_a_primary_secondary_group_when_laid_out_then_the_secondary_is_not_checked() {
    let mut db = instance([backend("10.0.0.1"), backend("10.0.0.2")]);
    db.groups[0].kind = GroupKind::PrimarySecondary;
    let layout = fresh(&config([db]));

    let [primary, secondary] = &layout.targets[..] else { panic!("{:?}", layout.targets) };
    assert_eq!((primary.role, secondary.role), (Role::Primary, Role::Secondary));
    assert!(primary.check.is_some());
    assert!(secondary.check.is_none());
}

#[test]
fn given_vips_of_both_families_when_laid_out_then_each_family_is_a_service_of_its_own() {
    let both =
        Backend { addresses: addresses(&["10.0.0.1", "2001:db8::1"]), ..backend("10.0.0.1") };
    let mut shop = instance([both, backend("10.0.0.2"), backend("2001:db8::3")]);
    shop.vips = addresses(&["203.0.113.10", "2001:db8:113::10", "203.0.113.11"]);
    let layout = fresh(&config([shop]));

    let [v4, v6] = &layout.services[..] else { panic!("{:?}", layout.services) };
    assert_eq!(v4.endpoints.len(), 2, "VIPs of a family share a service");
    assert_eq!(v6.endpoints.len(), 1);
    let addresses = |service: &Service| -> Vec<String> {
        let targets = &layout.targets[service.targets.clone()];
        targets.iter().map(|target| target.addr.ip().to_string()).collect()
    };
    assert_eq!(addresses(v4), ["10.0.0.1", "10.0.0.2"]);
    assert_eq!(addresses(v6), ["2001:db8::1", "2001:db8::3"]);
    assert_distinct(&layout);
}

#[test]
fn given_a_disabled_listener_when_laid_out_then_it_is_absent() {
    let mut shop = instance(three());
    shop.listeners = vec![Listener { enabled: false, ..listener(80) }, listener(81)];
    let layout = fresh(&config([shop]));

    let [service] = &layout.services[..] else { panic!("{:?}", layout.services) };
    assert_eq!((service.listener, service.endpoints[0].port), (1, 81));
    assert_eq!(layout.targets.len(), 3);
}

#[test]
fn given_tcp_and_udp_on_one_port_when_laid_out_then_they_are_two_listeners() {
    let mut shop = instance(three());
    shop.listeners = vec![listener(53), Listener { protocol: Protocol::Udp, ..listener(53) }];
    let layout = fresh(&config([shop]));

    assert_distinct(&layout);
    assert_eq!(layout.services[0].endpoints[0].proto, abi::TCP);
    assert_eq!(layout.services[1].endpoints[0].proto, abi::UDP);
}

/// What an edit does not concern keeps its indices: `(what, edit)`.
type Edit = (&'static str, fn(&mut Config));

#[test]
fn given_installed_maps_when_the_configuration_changes_then_the_rest_keeps_its_indices() {
    let mut shop = instance(three());
    shop.vips = addresses(&["203.0.113.10", "2001:db8:113::10"]);
    shop.groups[0].backends[1].addresses = addresses(&["10.0.0.2", "2001:db8::2"]);
    shop.listeners = vec![listener(80), listener(81), listener(82)];
    let mail = Instance { vips: addresses(&["203.0.113.99"]), ..instance([backend("10.0.1.1")]) };
    let old = config([shop, mail]);
    let (before, installed) = install(&old, &State::default());

    let edits: [Edit; 11] = [
        ("nothing", |_| ()),
        ("a new first backend", |c| {
            c.instances[0].groups[0].backends.insert(0, backend("10.0.0.9"));
        }),
        ("a new last backend", |c| c.instances[0].groups[0].backends.push(backend("10.0.0.9"))),
        ("no first backend", |c| drop(c.instances[0].groups[0].backends.remove(0))),
        ("another order of backends", |c| c.instances[0].groups[0].backends.reverse()),
        ("a new first listener", |c| c.instances[0].listeners.insert(0, listener(79))),
        ("no first listener", |c| drop(c.instances[0].listeners.remove(0))),
        ("another order of listeners", |c| c.instances[0].listeners.reverse()),
        ("another order of instances", |c| c.instances.reverse()),
        ("another VIP", |c| c.instances[0].vips.insert(0, "203.0.113.9".parse().unwrap())),
        ("another weight", |c| c.instances[0].groups[0].backends[0].weight = 1),
    ];
    for (case, edit) in edits {
        let mut new = old.clone();
        edit(&mut new);
        let (after, _) = install(&new, &installed);
        assert_distinct(&after);

        let (old_services, new_services) = (service_ids(&before), service_ids(&after));
        let mut kept = 0;
        for (endpoint, id) in &new_services {
            if let Some(old) = old_services.get(endpoint) {
                assert_eq!(id, old, "{case}: {endpoint:?}");
                kept += 1;
            }
        }
        assert!(kept >= 5, "{case}: {kept} listeners are in both");
        // By the service's index: another VIP may be its first endpoint now.
        let by_service = |layout: &Layout| -> BTreeMap<(u32, SocketAddr), u32> {
            let ids = service_ids(layout);
            target_ids(layout).into_iter().map(|((e, addr), id)| ((ids[&e], addr), id)).collect()
        };
        let (old_targets, new_targets) = (by_service(&before), by_service(&after));
        let replaced = |key| old_services.values().any(|&id| id == key);
        for (key, id) in &new_targets {
            let old = old_targets.get(key).filter(|_| replaced(key.0));
            assert!(old.is_none_or(|old| old == id), "{case}: {key:?}");
            let taken = old.is_none() && old_targets.values().any(|old| old == id);
            assert!(!taken, "{case}: {key:?} has the index of another");
        }
    }
}

#[test]
fn given_a_listener_whose_vips_are_split_when_laid_out_then_only_one_keeps_the_index() {
    let mut shop = instance(three());
    shop.vips = addresses(&["203.0.113.10", "203.0.113.11"]);
    let (_, installed) = install(&config([shop.clone()]), &State::default());

    let mut other = Instance { name: "other".to_owned(), ..shop.clone() };
    shop.vips.truncate(1);
    other.vips.remove(0);
    let split = config([shop, other]);
    let (layout, installed) = install(&split, &installed);

    assert_distinct(&layout);
    assert_eq!(layout.services[0].id, 0);
    let (again, _) = install(&split, &installed);
    assert_eq!(target_ids(&again), target_ids(&layout), "and that is stable");
    assert_eq!(service_ids(&again), service_ids(&layout));
}

#[test]
fn given_listeners_whose_vips_are_joined_when_laid_out_then_one_index_remains() {
    let mut shop = instance(three());
    let mut other = Instance { name: "other".to_owned(), ..shop.clone() };
    other.vips = addresses(&["203.0.113.11"]);
    let (_, installed) = install(&config([shop.clone(), other]), &State::default());

    shop.vips = addresses(&["203.0.113.11", "203.0.113.10"]);
    let (layout, _) = install(&config([shop]), &installed);

    let [service] = &layout.services[..] else { panic!("{:?}", layout.services) };
    assert_eq!(service.id, 1, "that of the first VIP");
}

#[test]
fn given_a_removed_backend_when_its_flows_are_over_and_it_returns_then_it_has_its_index_again() {
    let all = config([instance(three())]);
    let (before, installed) = install(&all, &State::default());
    let fewer = config([instance([backend("10.0.0.1"), backend("10.0.0.3")])]);
    let (layout, mut installed) = install(&fewer, &installed);
    let [_, _, departed] = &layout.targets[..] else { panic!("{:?}", layout.targets) };
    assert!(departed.is_departed(), "{departed:?}");
    assert_eq!((departed.id, departed.weight, &departed.check), (1, 0, &None));
    assert_eq!(departed.addr, before.targets[1].addr);
    assert_ne!(installed.backends[&1].flags, 0, "its flows go on");
    assert!(installed.endpoints.values().any(|origin| origin.backend == 1), "so do the answers");

    let returned = install(&all, &installed).0;
    assert_eq!(target_ids(&returned), target_ids(&before));

    installed.backends.entry(1).and_modify(|backend| *backend = crate::plan::retire(*backend));
    let (layout, installed) = install(&fewer, &installed);
    assert_eq!(layout.targets.len(), 2);
    assert_eq!(installed.backends[&1].flags, 0, "retired, and remembered");
    assert!(installed.endpoints.values().all(|origin| origin.backend != 1));
    let returned = install(&all, &installed).0;
    assert_eq!(target_ids(&returned), target_ids(&before));
}

#[test]
fn given_backends_that_are_reached_in_any_way_when_they_go_then_it_is_still_known_how() {
    let forwardings =
        [Forwarding::Nat, Forwarding::FullNat, Forwarding::Dsr, Forwarding::Ipip, Forwarding::Gue];
    for forwarding in forwardings {
        let mut shop = instance(three());
        shop.groups[0].forwarding = forwarding;
        if forwarding == Forwarding::FullNat {
            shop.groups[0].sources = addresses(&["192.0.2.1", "192.0.2.2"]);
            shop.groups[0].client_address = ClientAddress::ProxyV2;
        }
        let (before, installed) = install(&config([shop.clone()]), &State::default());
        shop.groups[0].backends.remove(0);
        let (after, _) = install(&config([shop]), &installed);
        let departed = after.targets.iter().find(|target| target.is_departed()).unwrap();
        let expected = Target {
            backend: None,
            weight: 0,
            drains: true,
            check: None,
            ..before.targets[0].clone()
        };
        assert_eq!(format!("{departed:?}"), format!("{expected:?}"));
    }
}

#[test]
fn given_a_listener_that_goes_when_another_gets_its_index_then_it_does_not_get_its_backends() {
    let mut installed = install(&config([instance(three())]), &State::default()).1;
    let gone = installed.listeners.values().next().unwrap().clone();
    let at = |vip| Instance { vips: vec![vip], ..instance([backend("10.0.0.7")]) };
    let mut instances = vec![at("203.0.113.99".parse().unwrap())];
    for id in 1..MAX_LISTENERS as u32 {
        let vip = IpAddr::from((0x0b00_0000 + id).to_be_bytes());
        let service = crate::state::Service { id, ..gone.clone() };
        installed.listeners.insert(endpoint(vip, 80, Protocol::Tcp), service);
        instances.push(at(vip));
    }
    let layout = Layout::new(&config(instances), &installed).unwrap();
    let first = &layout.services[0];
    assert_eq!((first.id, first.targets.len()), (0, 1), "no other index is free");
}

#[test]
fn given_retired_backends_when_new_ones_come_then_those_get_indices_that_were_never_used() {
    let (_, installed) = install(&config([instance(three())]), &State::default());
    let (_, installed) = install(&config([instance([backend("10.0.0.1")])]), &installed);

    let new = config([instance([backend("10.0.0.7"), backend("10.0.0.8")])]);
    let (layout, _) = install(&new, &installed);

    let targets = layout.targets.iter().filter(|target| !target.is_departed());
    let ids: Vec<u32> = targets.map(|target| target.id).collect();
    assert_eq!(ids, [3, 4]);
}

#[test]
fn given_no_index_that_was_never_used_when_a_backend_comes_then_a_retired_one_is_used() {
    let record = |id: u32, flags| abi::Backend {
        addr: IpAddr::from((0x0b00_0000 + id).to_be_bytes()).into(),
        port: 8_080,
        flags,
        ..abi::Backend::default()
    };
    let mut installed = State::default();
    for id in 0..MAX_BACKENDS as u32 {
        let flags = if id % 20_000 == 7 { 0 } else { BACKEND_IN_USE };
        installed.backends.insert(id, record(id, flags));
    }
    let layout = Layout::new(&config([instance(three())]), &installed).unwrap();

    let ids: Vec<u32> = layout.targets.iter().map(|target| target.id).collect();
    assert_eq!(ids, [7, 20_007, 40_007], "never one in use");

    let five = (1..=5).map(|host| backend(&format!("10.0.0.{host}"))).collect::<Vec<_>>();
    let error = Layout::new(&config([instance(five)]), &installed).unwrap_err();
    assert_eq!(error, LayoutError::TooManyBackends);
}

#[test]
fn given_as_many_listeners_as_fit_when_one_more_comes_then_that_is_an_error() {
    let mut shop = instance([]);
    shop.listeners = (0..MAX_LISTENERS as u16).map(listener).collect();
    assert_eq!(fresh(&config([shop.clone()])).services.len(), MAX_LISTENERS);

    shop.listeners.push(listener(u16::MAX));
    let error = Layout::new(&config([shop.clone()]), &State::default()).unwrap_err();
    assert_eq!(error, LayoutError::TooManyListeners);

    shop.listeners[0].enabled = false;
    assert_eq!(fresh(&config([shop])).services.len(), MAX_LISTENERS, "a disabled one takes none");
}

#[test]
fn given_listeners_on_many_vips_when_laid_out_then_each_vip_counts() {
    let mut shop = instance([]);
    shop.vips = addresses(&["203.0.113.10", "203.0.113.11"]);
    shop.listeners = (0..MAX_LISTENERS as u16 / 2).map(listener).collect();
    assert_eq!(fresh(&config([shop.clone()])).services.len(), MAX_LISTENERS / 2);

    shop.listeners.push(listener(u16::MAX));
    let error = Layout::new(&config([shop]), &State::default()).unwrap_err();
    assert_eq!(error, LayoutError::TooManyListeners);
}

#[test]
fn given_as_many_backends_as_fit_when_one_more_comes_then_that_is_an_error() {
    let many = |count: u32| {
        let addresses = (0..count).map(|n| IpAddr::from((0x0b00_0000 + n).to_be_bytes()));
        let backends: Vec<_> = addresses.map(|addr| backend(&addr.to_string())).collect();
        config([instance(backends)])
    };
    let full = MAX_BACKENDS as u32;
    assert_eq!(fresh(&many(full)).targets.len(), MAX_BACKENDS);
    let error = Layout::new(&many(full + 1), &State::default()).unwrap_err();
    assert_eq!(error, LayoutError::TooManyBackends);
}

/// Listeners by port, and the backends of all of them by host number.
fn small_configs() -> impl Strategy<Value = Config> {
    (vec(0..6_u16, 0..4), vec(0..8_u8, 0..6), 1..4_usize).prop_map(
        |(mut ports, mut hosts, vips)| {
            let mut seen = HashSet::new();
            ports.retain(|port| seen.insert(*port));
            let mut seen = HashSet::new();
            hosts.retain(|host| seen.insert(*host));
            let backends: Vec<_> =
                hosts.iter().map(|host| backend(&format!("10.0.0.{host}"))).collect();
            let vip = ["203.0.113.10", "203.0.113.11", "2001:db8::10"];
            let mut instance = instance(backends);
            instance.vips = addresses(&vip[..vips]);
            // Round robin's tables are small, and the test is not about them.
            let small = |port| Listener { scheduler: Scheduler::Wrr, ..listener(1_000 + port) };
            instance.listeners = ports.into_iter().map(small).collect();
            config([instance])
        },
    )
}

proptest! {
    #[test]
    fn given_any_history_when_an_agent_starts_again_then_everything_has_the_same_index(
        history in vec(small_configs(), 1..8),
    ) {
        let mut installed = State::default();
        for config in history {
            let (layout, state) = install(&config, &installed);
            assert_distinct(&layout);
            let (again, same) = install(&config, &state);
            prop_assert_eq!(target_ids(&again), target_ids(&layout));
            prop_assert_eq!(service_ids(&again), service_ids(&layout));
            prop_assert_eq!(&same, &state, "nothing is left to write");
            installed = state;
        }
    }

    #[test]
    fn given_an_agent_that_dies_at_any_write_when_the_next_starts_then_it_goes_on_with_the_same_indices(
        old in small_configs(),
        new in small_configs(),
    ) {
        let (_, mut state) = install(&old, &State::default());
        let (layout, finished) = install(&new, &state);
        for step in crate::plan::plan(&desired(&layout), &state.clone()) {
            let (next, converged) = install(&new, &state);
            prop_assert_eq!(target_ids(&next), target_ids(&layout));
            prop_assert_eq!(service_ids(&next), service_ids(&layout));
            prop_assert_eq!(&converged, &finished);
            crate::plan::fixtures::apply(&mut state, step);
        }
    }
}
