use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use proptest::{
    collection::{btree_map, vec},
    prelude::*,
};
use slb_common::abi::{BackendFlags, NextHop, Roles, Scheduler, Seed, TCP};

use super::{fixtures::apply, *};
use crate::state::{Chooser, Policy, Schedule};

const HASH: Chooser = Chooser { scheduler: Scheduler::HASH, seed: Seed::PUBLIC };

fn vip(n: u8) -> Address {
    IpAddr::from([203, 0, 113, n]).into()
}

fn host(n: u32) -> Address {
    IpAddr::from((0x0a00_0000 + n).to_be_bytes()).into()
}

fn endpoint(addr: Address, port: u32) -> Endpoint {
    Endpoint { addr, port, proto: TCP }
}

/// `desired` on maps that held `installed`: what is no longer wanted stays known.
fn outcome(desired: &State, installed: &State) -> State {
    let mut state = desired.clone();
    for (&id, &backend) in &installed.backends {
        let retired = Backend { flags: BackendFlags::empty(), hop: NextHop::UNRESOLVED, ..backend };
        let kept = if backend.flags.is_empty() { backend } else { retired };
        state.backends.entry(id).or_insert(kept);
    }
    state
}

/// Consistent maps: a schedule names usable backends of its own, a listener's address is a VIP, a
/// backend's address is a backend's. An index means the same backend in all of them.
fn states() -> impl Strategy<Value = State> {
    let backends = btree_map(0..8_u32, (any::<bool>(), any::<bool>(), 0..3_u32), 0..8);
    let listeners = btree_map((0..3_u8, 80..83_u32), (0..3_u32, vec(any::<bool>(), 8)), 0..5);
    (backends, listeners).prop_map(|(backends, listeners)| {
        let mut state = State::default();
        for (id, (usable, healthy, ifindex)) in backends {
            let flag = |set, flag| if set { flag } else { BackendFlags::empty() };
            let backend = Backend {
                addr: host(id % 4),
                port: 8_080 + id,
                flags: BackendFlags::IN_USE
                    | flag(usable, BackendFlags::USABLE)
                    | flag(healthy, BackendFlags::HEALTHY),
                idle_jiffies: 100,
                listener: 0,
                hop: NextHop { ifindex, ..NextHop::UNRESOLVED },
                ..Backend::default()
            };
            state.backends.insert(id, backend);
            let direct = RevNat { backend: id, ..RevNat::default() };
            state.endpoints.insert(endpoint(backend.addr, backend.port), direct);
            *state.addresses.entry(backend.addr).or_default() |= Roles::BACKEND;
            if ifindex != 0 {
                state.interfaces.insert(ifindex, Interface { redirect: 1, ..Interface::default() });
            }
        }
        for ((n, port), (id, named)) in listeners {
            let slots = state
                .backends
                .iter()
                .filter(|(_, backend)| backend.flags.intersects(BackendFlags::USABLE))
                .filter(|(id, _)| named[**id as usize])
                .map(|(&id, _)| id)
                .collect();
            let schedule = Arc::new(Schedule::new(HASH, slots));
            state.listeners.insert(
                endpoint(vip(n), port),
                ListenerState { id, schedule, policy: Policy::default() },
            );
            *state.addresses.entry(vip(n)).or_default() |= Roles::VIP;
        }
        state
    })
}

/// Maps that an earlier agent has left: consistent, with some backends retired.
fn installed_states() -> impl Strategy<Value = State> {
    (states(), states()).prop_map(|(old, older)| outcome(&old, &older))
}

/// Anything at all.
fn any_states() -> impl Strategy<Value = State> {
    let backends =
        btree_map(0..5_u32, ((0..16_u32).prop_map(BackendFlags::from_bits_retain), 0..3_u32), 0..5);
    let listeners = btree_map((0..3_u8, 80..82_u32), (0..2_u32, vec(0..5_u32, 0..3)), 0..4);
    let addresses = btree_map(0..5_u8, (0..4_u32).prop_map(Roles::from_bits_retain), 0..5);
    let endpoints = btree_map((0..3_u32, 80..82_u32), 0..5_u32, 0..4);
    let interfaces = btree_map(1..4_u32, 0..2_u32, 0..3);
    (backends, listeners, addresses, endpoints, interfaces).prop_map(
        |(backends, listeners, addresses, endpoints, interfaces)| State {
            listeners: listeners
                .into_iter()
                .map(|((n, port), (id, slots))| {
                    let schedule = Arc::new(Schedule::new(HASH, slots));
                    (
                        endpoint(vip(n), port),
                        ListenerState { id, schedule, policy: Policy::default() },
                    )
                })
                .collect(),
            backends: backends
                .into_iter()
                .map(|(id, (flags, port))| {
                    (id, Backend { addr: host(id), port, flags, ..Backend::default() })
                })
                .collect(),
            addresses: addresses.into_iter().map(|(n, roles)| (vip(n), roles)).collect(),
            endpoints: endpoints
                .into_iter()
                .map(|((n, port), backend)| {
                    (endpoint(host(n), port), RevNat { backend, ..RevNat::default() })
                })
                .collect(),
            interfaces: interfaces
                .into_iter()
                .map(|(index, redirect)| (index, Interface { redirect, ..Interface::default() }))
                .collect(),
            sources: BTreeMap::new(),
            ..State::default()
        },
    )
}

fn applied(mut state: State, steps: impl IntoIterator<Item = Step>) -> State {
    for step in steps {
        apply(&mut state, step);
    }
    state
}

/// What a packet must be able to rely on at any moment.
fn check_sound(state: &State) -> Result<(), TestCaseError> {
    for (endpoint, listener) in &state.listeners {
        for id in &listener.schedule.slots {
            let flags =
                state.backends.get(id).map_or(BackendFlags::empty(), |backend| backend.flags);
            let needed = BackendFlags::IN_USE | BackendFlags::USABLE;
            prop_assert_eq!(flags & needed, needed, "{:?} names backend {}", endpoint, id);
        }
    }
    for (endpoint, direct) in &state.endpoints {
        let backend = state.backends.get(&direct.backend);
        prop_assert!(backend.is_some(), "{endpoint:?} names backend {}", direct.backend);
    }
    for (id, backend) in &state.backends {
        let index = backend.hop.ifindex;
        let is_there = index == 0 || state.interfaces.contains_key(&index);
        prop_assert!(
            is_there || backend.flags.is_empty(),
            "backend {id} is behind interface {index}"
        );
    }
    Ok(())
}

fn vips(state: &State) -> BTreeSet<Address> {
    let roles = state.addresses.iter();
    roles.filter(|(_, roles)| roles.intersects(Roles::VIP)).map(|(&addr, _)| addr).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn given_any_maps_when_the_plan_is_carried_out_then_they_hold_what_is_desired(
        desired in any_states(),
        installed in any_states(),
    ) {
        let expected = outcome(&desired, &installed);
        let steps = plan(&desired, &installed);
        prop_assert_eq!(steps.is_empty(), installed == expected, "{:?}", steps);

        let reached = applied(installed, steps);
        prop_assert_eq!(&reached, &expected);
        prop_assert_eq!(plan(&desired, &reached), []);
    }

    #[test]
    fn given_any_maps_when_planned_then_each_key_is_written_once(
        desired in any_states(),
        installed in any_states(),
    ) {
        let key = |step: &Step| match step {
            Step::PutInterface(index, _) | Step::RemoveInterface(index) => format!("i{index}"),
            Step::PutSource(index, _) => format!("s{index}"),
            Step::PutMac(mac) | Step::RemoveMac(mac) => format!("h{mac:?}"),
            Step::PutSubnet(subnet, _) | Step::RemoveSubnet(subnet) => format!("n{subnet:?}"),
            Step::PutBackend(id, _) => format!("b{id}"),
            Step::PutAcl(acl, _) | Step::RemoveAcl(acl, _) => format!("c{acl}"),
            Step::PutLimits(id, _) => format!("m{id}"),
            Step::PutQuic(server, _) | Step::RemoveQuic(server) => format!("q{server:?}"),
            Step::PutListener(endpoint, _) | Step::RemoveListener(endpoint) => {
                format!("l{endpoint:?}")
            }
            Step::PutEndpoint(endpoint, _) | Step::RemoveEndpoint(endpoint) => {
                format!("e{endpoint:?}")
            }
            Step::PutAddress(addr, _) | Step::RemoveAddress(addr) => format!("a{addr:?}"),
        };
        let steps = plan(&desired, &installed);
        let keys: BTreeSet<String> = steps.iter().map(key).collect();
        prop_assert_eq!(keys.len(), steps.len(), "{:?}", steps);
    }

    #[test]
    fn given_consistent_maps_when_writes_are_made_then_packets_find_them_sound_at_any_moment(
        desired in states(),
        installed in installed_states(),
    ) {
        let mut state = installed.clone();
        check_sound(&state)?;
        for step in plan(&desired, &installed) {
            let before = vips(&state);
            apply(&mut state, step);
            check_sound(&state)?;

            for vip in vips(&state).difference(&before) {
                let missing = desired.listeners.iter().find(|(endpoint, listener)| {
                    endpoint.addr == *vip && state.listeners.get(endpoint) != Some(listener)
                });
                prop_assert!(missing.is_none(), "{vip:?} is a VIP before {missing:?}");
            }
        }
    }

    #[test]
    fn given_an_agent_that_dies_at_any_write_when_the_next_plans_then_it_converges(
        desired in states(),
        installed in installed_states(),
        changed in states(),
    ) {
        let steps = plan(&desired, &installed);
        for done in 0..=steps.len() {
            let left = applied(installed.clone(), steps[..done].to_vec());

            let same = applied(left.clone(), plan(&desired, &left));
            prop_assert_eq!(&same, &outcome(&desired, &installed), "after {} writes", done);

            // What it wants may be something else by then.
            let mut other = left.clone();
            for step in plan(&changed, &left) {
                apply(&mut other, step);
                check_sound(&other)?;
            }
            prop_assert_eq!(&other, &outcome(&changed, &left), "after {} writes", done);
        }
    }
}

#[test]
fn given_a_backend_that_fails_when_planned_then_its_flag_goes_after_the_last_schedule() {
    let backend = |flags| Backend { addr: host(1), port: 80, flags, ..Backend::default() };
    let state = |flags, slots: &[u32]| {
        let schedule = Schedule::new(HASH, slots.to_vec());
        let listener =
            ListenerState { id: 0, schedule: Arc::new(schedule), policy: Policy::default() };
        State {
            backends: [
                (0, backend(BackendFlags::IN_USE | BackendFlags::USABLE)),
                (1, backend(flags)),
            ]
            .into(),
            listeners: [(endpoint(vip(1), 80), listener)].into(),
            ..State::default()
        }
    };
    let healthy = state(BackendFlags::IN_USE | BackendFlags::USABLE, &[0, 1]);
    let failed = state(BackendFlags::IN_USE, &[0]);

    let fails = plan(&failed, &healthy);
    assert!(matches!(fails[..], [Step::PutListener(..), Step::PutBackend(1, _)]), "{fails:?}");
    let recovers = plan(&healthy, &failed);
    assert!(
        matches!(recovers[..], [Step::PutBackend(1, _), Step::PutListener(..)]),
        "{recovers:?}"
    );
}

#[test]
fn given_a_backend_that_is_gone_when_planned_twice_then_it_is_retired_once() {
    let backend = Backend {
        addr: host(1),
        port: 80,
        flags: BackendFlags::IN_USE | BackendFlags::USABLE,
        idle_jiffies: 7,
        ..Backend::default()
    };
    let mut state = State { backends: [(4, backend)].into(), ..State::default() };

    let steps = plan(&State::default(), &state);
    assert_eq!(
        steps,
        [Step::PutBackend(
            4,
            Backend { flags: BackendFlags::empty(), hop: NextHop::UNRESOLVED, ..backend }
        )]
    );
    apply(&mut state, steps[0].clone());
    assert_eq!(plan(&State::default(), &state), []);
}
