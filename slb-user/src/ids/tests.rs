use std::collections::{BTreeMap, HashSet};

use abi::BackendFlags;
use proptest::{collection::vec, prelude::*};

use super::{fixtures::*, *};
use crate::config::{Backend, Instance, Listener};

/// Each backend's index, by its listener's first endpoint and its own address.
fn backend_ids(ids: &Ids) -> BTreeMap<(Endpoint, SocketAddr), u32> {
    ids.listeners
        .iter()
        .flat_map(|listener| {
            let backends = &ids.backends[listener.backends.clone()];
            backends.iter().map(|backend| ((listener.endpoints[0], backend.addr), backend.id))
        })
        .collect()
}

fn listener_ids(ids: &Ids) -> BTreeMap<Endpoint, u32> {
    let listeners = ids.listeners.iter();
    listeners.flat_map(|listener| listener.endpoints.iter().map(|&e| (e, listener.id))).collect()
}

/// Two listeners never share an index, nor do two backends.
fn assert_distinct(ids: &Ids) {
    let listeners: HashSet<u32> = ids.listeners.iter().map(|listener| listener.id).collect();
    assert_eq!(listeners.len(), ids.listeners.len(), "{:?}", ids.listeners);
    let backends: HashSet<u32> = ids.backends.iter().map(|backend| backend.id).collect();
    assert_eq!(backends.len(), ids.backends.len(), "{:?}", ids.backends);
}

fn three() -> Vec<Backend> {
    ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(backend).into()
}

fn fresh(config: &Config) -> Ids {
    Ids::assign(config, &State::default()).unwrap()
}

#[test]
fn given_a_configuration_when_given_ids_then_every_part_has_its_place() {
    let mut checked = listener(443);
    checked.health_check.as_mut().unwrap().port = Some(9_000);
    let unchecked = Listener { health_check: None, ..listener(80) };
    let mut shop = instance([backend("10.0.0.1"), Backend { weight: 7, ..backend("10.0.0.2") }]);
    shop.listeners = vec![unchecked, checked];
    let ids = fresh(&config([shop]));

    let [first, second] = &ids.listeners[..] else { panic!("{:?}", ids.listeners) };
    let vip = "203.0.113.10".parse().unwrap();
    assert_eq!(first.endpoints, [endpoint(vip, 80, Protocol::Tcp)]);
    assert_eq!((first.id, first.instance, first.listener), (0, 0, 0));
    assert_eq!(second.endpoints, [endpoint(vip, 443, Protocol::Tcp)]);
    assert_eq!((second.id, second.instance, second.listener), (1, 0, 1));
    assert_eq!((first.backends.clone(), second.backends.clone()), (0..2, 2..4));

    assert_eq!(ids.backends.iter().map(|backend| backend.id).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let backend = &ids.backends[1];
    assert_eq!((backend.backend, backend.weight, backend.role), (Some(1), 7, Role::Member));
    assert_eq!(backend.addr, "10.0.0.2:8080".parse().unwrap());
    assert!(backend.check.is_none());
    let (_, probed) = ids.backends[3].check.as_ref().unwrap();
    assert_eq!(*probed, "10.0.0.2:9000".parse().unwrap(), "the check has a port of its own");
}

#[test]
fn given_one_backend_of_two_listeners_when_given_ids_then_it_is_the_same_on_every_gateway() {
    let mut shop = instance(three());
    shop.listeners.push(listener(81));
    let ids = fresh(&config([shop]));

    assert_eq!(ids.backends[0].identity, ids.backends[3].identity);
    assert_ne!(ids.backends[0].identity, ids.backends[1].identity);
    assert_ne!(ids.backends[0].id, ids.backends[3].id, "its flows are counted apart");
}

#[test]
fn given_backend_ports_when_given_ids_then_the_nearest_one_wins() {
    let cases = [
        ("the backend's own", Some(9_001), Some(8_080), 9_001),
        ("the listener's", None, Some(8_080), 8_080),
        ("none", None, None, 80),
    ];
    for (case, own, of_listener, expected) in cases {
        let mut shop = instance([Backend { port: own, ..backend("10.0.0.1") }]);
        shop.listeners[0].backend_port = of_listener;
        let ids = fresh(&config([shop]));
        assert_eq!(ids.backends[0].addr.port(), expected, "{case}");
    }
}

#[test]
fn given_a_primary_secondary_group_when_given_ids_then_the_secondary_is_not_checked() {
    let mut db = instance([backend("10.0.0.1"), backend("10.0.0.2")]);
    db.groups[0].kind = GroupKind::PrimarySecondary;
    let ids = fresh(&config([db]));

    let [primary, secondary] = &ids.backends[..] else { panic!("{:?}", ids.backends) };
    assert_eq!((primary.role, secondary.role), (Role::Primary, Role::Secondary));
    assert!(primary.check.is_some());
    assert!(secondary.check.is_none());
}

#[test]
fn given_vips_of_both_families_when_given_ids_then_each_family_is_a_service_of_its_own() {
    let both =
        Backend { addresses: addresses(&["10.0.0.1", "2001:db8::1"]), ..backend("10.0.0.1") };
    let mut shop = instance([both, backend("10.0.0.2"), backend("2001:db8::3")]);
    shop.vips = addresses(&["203.0.113.10", "2001:db8:113::10", "203.0.113.11"]);
    let ids = fresh(&config([shop]));

    let [v4, v6] = &ids.listeners[..] else { panic!("{:?}", ids.listeners) };
    assert_eq!(v4.endpoints.len(), 2, "VIPs of a family share a listener");
    assert_eq!(v6.endpoints.len(), 1);
    let addresses = |listener: &IndexedListener| -> Vec<String> {
        let backends = &ids.backends[listener.backends.clone()];
        backends.iter().map(|backend| backend.addr.ip().to_string()).collect()
    };
    assert_eq!(addresses(v4), ["10.0.0.1", "10.0.0.2"]);
    assert_eq!(addresses(v6), ["2001:db8::1", "2001:db8::3"]);
    assert_distinct(&ids);
}

#[test]
fn given_a_disabled_listener_when_given_ids_then_it_is_absent() {
    let mut shop = instance(three());
    shop.listeners = vec![Listener { enabled: false, ..listener(80) }, listener(81)];
    let ids = fresh(&config([shop]));

    let [listener] = &ids.listeners[..] else { panic!("{:?}", ids.listeners) };
    assert_eq!((listener.listener, listener.endpoints[0].port), (1, 81));
    assert_eq!(ids.backends.len(), 3);
}

#[test]
fn given_tcp_and_udp_on_one_port_when_given_ids_then_they_are_two_listeners() {
    let mut shop = instance(three());
    shop.listeners = vec![listener(53), Listener { protocol: Protocol::Udp, ..listener(53) }];
    let ids = fresh(&config([shop]));

    assert_distinct(&ids);
    assert_eq!(ids.listeners[0].endpoints[0].proto, abi::TCP);
    assert_eq!(ids.listeners[1].endpoints[0].proto, abi::UDP);
}

/// What an edit does not concern keeps its indices: `(what, edit)`.
type Edit = (&'static str, fn(&mut Config));

fn first(config: &mut Config) -> &mut Instance {
    Arc::make_mut(&mut config.instances[0])
}

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
            first(c).groups[0].backends.insert(0, backend("10.0.0.9"));
        }),
        ("a new last backend", |c| first(c).groups[0].backends.push(backend("10.0.0.9"))),
        ("no first backend", |c| drop(first(c).groups[0].backends.remove(0))),
        ("another order of backends", |c| first(c).groups[0].backends.reverse()),
        ("a new first listener", |c| first(c).listeners.insert(0, listener(79))),
        ("no first listener", |c| drop(first(c).listeners.remove(0))),
        ("another order of listeners", |c| first(c).listeners.reverse()),
        ("another order of instances", |c| c.instances.reverse()),
        ("another VIP", |c| first(c).vips.insert(0, "203.0.113.9".parse().unwrap())),
        ("another weight", |c| first(c).groups[0].backends[0].weight = 1),
    ];
    for (case, edit) in edits {
        let mut new = old.clone();
        edit(&mut new);
        let (after, _) = install(&new, &installed);
        assert_distinct(&after);
        let shared = before.reassign(&old, &new, &installed).unwrap();
        assert_eq!(format!("{shared:?}"), format!("{after:?}"), "{case}: with what is the same");

        let (old_listeners, new_listeners) = (listener_ids(&before), listener_ids(&after));
        let mut kept = 0;
        for (endpoint, id) in &new_listeners {
            if let Some(old) = old_listeners.get(endpoint) {
                assert_eq!(id, old, "{case}: {endpoint:?}");
                kept += 1;
            }
        }
        assert!(kept >= 5, "{case}: {kept} listeners are in both");
        // By the listener's index: another VIP may be its first endpoint now.
        let by_listener = |ids: &Ids| -> BTreeMap<(u32, SocketAddr), u32> {
            let listeners = listener_ids(ids);
            backend_ids(ids)
                .into_iter()
                .map(|((e, addr), id)| ((listeners[&e], addr), id))
                .collect()
        };
        let (old_backends, new_backends) = (by_listener(&before), by_listener(&after));
        let replaced = |key| old_listeners.values().any(|&id| id == key);
        for (key, id) in &new_backends {
            let old = old_backends.get(key).filter(|_| replaced(key.0));
            assert!(old.is_none_or(|old| old == id), "{case}: {key:?}");
            let taken = old.is_none() && old_backends.values().any(|old| old == id);
            assert!(!taken, "{case}: {key:?} has the index of another");
        }
    }
}

#[test]
fn given_an_instance_that_stays_when_another_comes_ahead_of_it_then_their_ids_differ() {
    let mail = Instance { vips: addresses(&["203.0.113.99"]), ..instance([backend("10.0.1.1")]) };
    let old = config([mail]);
    // The maps do not have them: they could not be written.
    let before = fresh(&old);
    let mut new = config([instance(three())]);
    new.instances.push(Arc::clone(&old.instances[0]));
    let after = before.reassign(&old, &new, &State::default()).unwrap();

    assert_distinct(&after);
    let stays = after.listeners.last().unwrap();
    assert_eq!((stays.id, stays.instance), (before.listeners[0].id, 1));
    assert_eq!(after.backends[stays.backends.clone()][0].id, before.backends[0].id);
}

#[test]
fn given_a_listener_whose_vips_are_split_when_given_ids_then_only_one_keeps_the_index() {
    let mut shop = instance(three());
    shop.vips = addresses(&["203.0.113.10", "203.0.113.11"]);
    let (_, installed) = install(&config([shop.clone()]), &State::default());

    let mut other = Instance { name: "other".to_owned(), ..shop.clone() };
    shop.vips.truncate(1);
    other.vips.remove(0);
    let split = config([shop, other]);
    let (ids, installed) = install(&split, &installed);

    assert_distinct(&ids);
    assert_eq!(ids.listeners[0].id, 0);
    let (again, _) = install(&split, &installed);
    assert_eq!(backend_ids(&again), backend_ids(&ids), "and that is stable");
    assert_eq!(listener_ids(&again), listener_ids(&ids));
}

#[test]
fn given_listeners_whose_vips_are_joined_when_given_ids_then_one_index_remains() {
    let mut shop = instance(three());
    let mut other = Instance { name: "other".to_owned(), ..shop.clone() };
    other.vips = addresses(&["203.0.113.11"]);
    let (_, installed) = install(&config([shop.clone(), other]), &State::default());

    shop.vips = addresses(&["203.0.113.11", "203.0.113.10"]);
    let (ids, _) = install(&config([shop]), &installed);

    let [listener] = &ids.listeners[..] else { panic!("{:?}", ids.listeners) };
    assert_eq!(listener.id, 1, "that of the first VIP");
}

#[test]
fn given_a_removed_backend_when_its_flows_are_over_and_it_returns_then_it_has_its_index_again() {
    let all = config([instance(three())]);
    let (before, installed) = install(&all, &State::default());
    let fewer = config([instance([backend("10.0.0.1"), backend("10.0.0.3")])]);
    let (ids, mut installed) = install(&fewer, &installed);
    let [_, _, orphaned] = &ids.backends[..] else { panic!("{:?}", ids.backends) };
    assert!(orphaned.is_orphaned(), "{orphaned:?}");
    assert_eq!((orphaned.id, orphaned.weight, &orphaned.check), (1, 0, &None));
    assert_eq!(orphaned.addr, before.backends[1].addr);
    assert!(!installed.backends[&1].flags.is_empty(), "its flows go on");
    assert!(installed.endpoints.values().any(|origin| origin.backend == 1), "so do the answers");

    let returned = install(&all, &installed).0;
    assert_eq!(backend_ids(&returned), backend_ids(&before));

    installed.backends.entry(1).and_modify(|backend| *backend = crate::plan::retire(*backend));
    let (ids, installed) = install(&fewer, &installed);
    assert_eq!(ids.backends.len(), 2);
    assert!(installed.backends[&1].flags.is_empty(), "retired, and remembered");
    assert!(installed.endpoints.values().all(|origin| origin.backend != 1));
    let returned = install(&all, &installed).0;
    assert_eq!(backend_ids(&returned), backend_ids(&before));
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
        let orphaned = after.backends.iter().find(|backend| backend.is_orphaned()).unwrap();
        let expected = IndexedBackend {
            backend: None,
            weight: 0,
            drains: true,
            check: None,
            ..before.backends[0].clone()
        };
        assert_eq!(format!("{orphaned:?}"), format!("{expected:?}"));
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
        let listener = crate::state::ListenerState { id, ..gone.clone() };
        installed.listeners.insert(endpoint(vip, 80, Protocol::Tcp), listener);
        instances.push(at(vip));
    }
    let ids = Ids::assign(&config(instances), &installed).unwrap();
    let first = &ids.listeners[0];
    assert_eq!((first.id, first.backends.len()), (0, 1), "no other index is free");
}

#[test]
fn given_retired_backends_when_new_ones_come_then_those_get_indices_that_were_never_used() {
    let (_, installed) = install(&config([instance(three())]), &State::default());
    let (_, installed) = install(&config([instance([backend("10.0.0.1")])]), &installed);

    let new = config([instance([backend("10.0.0.7"), backend("10.0.0.8")])]);
    let (ids, _) = install(&new, &installed);

    let backends = ids.backends.iter().filter(|backend| !backend.is_orphaned());
    let ids: Vec<u32> = backends.map(|backend| backend.id).collect();
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
        let flags = if id % 20_000 == 7 { BackendFlags::empty() } else { BackendFlags::IN_USE };
        installed.backends.insert(id, record(id, flags));
    }
    let ids = Ids::assign(&config([instance(three())]), &installed).unwrap();

    let ids: Vec<u32> = ids.backends.iter().map(|backend| backend.id).collect();
    assert_eq!(ids, [7, 20_007, 40_007], "never one in use");

    let five = (1..=5).map(|host| backend(&format!("10.0.0.{host}"))).collect::<Vec<_>>();
    let error = Ids::assign(&config([instance(five)]), &installed).unwrap_err();
    assert_eq!(error, CapacityError::TooManyBackends);
}

#[test]
fn given_as_many_listeners_as_fit_when_one_more_comes_then_that_is_an_error() {
    let mut shop = instance([]);
    shop.listeners = (0..MAX_LISTENERS as u16).map(listener).collect();
    assert_eq!(fresh(&config([shop.clone()])).listeners.len(), MAX_LISTENERS);

    shop.listeners.push(listener(u16::MAX));
    let error = Ids::assign(&config([shop.clone()]), &State::default()).unwrap_err();
    assert_eq!(error, CapacityError::TooManyListeners);

    shop.listeners[0].enabled = false;
    assert_eq!(fresh(&config([shop])).listeners.len(), MAX_LISTENERS, "a disabled one takes none");
}

#[test]
fn given_listeners_on_many_vips_when_given_ids_then_each_vip_counts() {
    let mut shop = instance([]);
    shop.vips = addresses(&["203.0.113.10", "203.0.113.11"]);
    shop.listeners = (0..MAX_LISTENERS as u16 / 2).map(listener).collect();
    assert_eq!(fresh(&config([shop.clone()])).listeners.len(), MAX_LISTENERS / 2);

    shop.listeners.push(listener(u16::MAX));
    let error = Ids::assign(&config([shop]), &State::default()).unwrap_err();
    assert_eq!(error, CapacityError::TooManyListeners);
}

#[test]
fn given_as_many_backends_as_fit_when_one_more_comes_then_that_is_an_error() {
    let many = |count: u32| {
        let addresses = (0..count).map(|n| IpAddr::from((0x0b00_0000 + n).to_be_bytes()));
        let backends: Vec<_> = addresses.map(|addr| backend(&addr.to_string())).collect();
        config([instance(backends)])
    };
    let full = MAX_BACKENDS as u32;
    assert_eq!(fresh(&many(full)).backends.len(), MAX_BACKENDS);
    let error = Ids::assign(&many(full + 1), &State::default()).unwrap_err();
    assert_eq!(error, CapacityError::TooManyBackends);
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
            let (ids, state) = install(&config, &installed);
            assert_distinct(&ids);
            let (again, same) = install(&config, &state);
            prop_assert_eq!(backend_ids(&again), backend_ids(&ids));
            prop_assert_eq!(listener_ids(&again), listener_ids(&ids));
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
        let (ids, finished) = install(&new, &state);
        for step in crate::plan::plan(&desired(&ids), &state.clone()) {
            let (next, converged) = install(&new, &state);
            prop_assert_eq!(backend_ids(&next), backend_ids(&ids));
            prop_assert_eq!(listener_ids(&next), listener_ids(&ids));
            prop_assert_eq!(&converged, &finished);
            crate::plan::fixtures::apply(&mut state, step);
        }
    }
}
