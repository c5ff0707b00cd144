//! Maps that fail hold what is planned once they fail no more.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;
use slb_common::abi;
use tokio::sync::mpsc;

use super::*;
use crate::{
    health::{Checkers, Health},
    ids::fixtures::{backend, config, instance, listener},
    net::Interface,
    plan::fixtures,
    planner::BackendRoute,
};

/// What becomes of a write.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    Done,
    /// Nothing is written.
    Refused,
    /// The write is carried out, but reported as failed, as one of several system calls may fail.
    Half,
    /// Only the removal of an access list waits.
    Later,
}

/// Maps of which writes end like this, and then all are done.
#[derive(Default)]
struct Flaky {
    installed: State,
    revision: u64,
    outcomes: VecDeque<Outcome>,
    writes: usize,
}

impl Tables for Flaky {
    fn installed(&self) -> &State {
        &self.installed
    }

    fn revision(&self) -> u64 {
        self.revision
    }

    fn settings(&self) -> Settings {
        Settings::default()
    }

    fn apply(&mut self, step: Step) -> Result<Applied, TableError> {
        self.revision += 1;
        self.writes += 1;
        let failed = Err(TableError::NoSlots { slots: 0 });
        match self.outcomes.pop_front().unwrap_or(Outcome::Done) {
            Outcome::Refused => return failed,
            Outcome::Later if matches!(step, Step::RemoveAcl(..)) => {
                return Ok(Applied::Later(Instant::now()));
            }
            Outcome::Half => {
                fixtures::apply(&mut self.installed, step);
                return failed;
            }
            Outcome::Done | Outcome::Later => fixtures::apply(&mut self.installed, step),
        }
        Ok(Applied::Done)
    }
}

/// Something that happens to a gateway.
#[derive(Clone, Debug)]
enum Event {
    Health(usize, Health),
    Route(u8, bool),
    Weight(usize, u8),
    Listener(usize),
    Acl(usize, u8),
    Interface(u8),
    Nothing,
}

fn events() -> impl Strategy<Value = (Event, Vec<Outcome>)> {
    let health = proptest::sample::select(vec![Health::Healthy, Health::Unhealthy]);
    let event = prop_oneof![
        3 => (any::<usize>(), health).prop_map(|(which, health)| Event::Health(which, health)),
        2 => (1..4_u8, any::<bool>()).prop_map(|(host, known)| Event::Route(host, known)),
        2 => (0..3_usize, 0..=100_u8).prop_map(|(which, weight)| Event::Weight(which, weight)),
        1 => (0..3_usize).prop_map(Event::Listener),
        1 => (0..3_usize, 0..3_u8).prop_map(|(which, list)| Event::Acl(which, list)),
        1 => (1..4_u8).prop_map(Event::Interface),
        1 => Just(Event::Nothing),
    ];
    let outcome = prop_oneof![
        4 => Just(Outcome::Done),
        1 => Just(Outcome::Refused),
        1 => Just(Outcome::Half),
        1 => Just(Outcome::Later),
    ];
    (event, proptest::collection::vec(outcome, 0..12))
}

struct Gateway {
    config: Config,
    backends: Backends,
    network: NetworkSnapshot,
    reconciler: Reconciler,
    maps: Flaky,
}

impl Gateway {
    fn new() -> Self {
        let mut shop = instance(["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(backend));
        let wrr = crate::config::Listener { scheduler: Scheduler::Wrr, ..listener(82) };
        shop.listeners.extend([listener(81), wrr]);
        let config = config([shop]);
        let ids = Arc::new(Ids::assign(&config, &State::default()).unwrap());
        let (transitions, _) = mpsc::unbounded_channel();
        let backends = Backends::new(ids, &State::default(), Checkers::new(transitions));
        Self {
            config,
            backends,
            network: NetworkSnapshot::default(),
            reconciler: Reconciler::new(Jiffies::per_second(250)),
            maps: Flaky::default(),
        }
    }

    fn happen(&mut self, event: &Event) {
        match *event {
            Event::Health(which, health) => {
                let healths = Arc::make_mut(&mut self.backends.health);
                let count = healths.len().max(1);
                if let Some(known) = healths.get_mut(which % count) {
                    *known = health;
                }
            }
            Event::Route(host, is_known) => {
                let addr = IpAddr::from([10, 0, 0, host]);
                let hop = abi::NextHop { ifindex: 1, dst_mac: [host; 6], src_mac: [2; 6] };
                let route = BackendRoute { hop, mtu: 1_500, source: None };
                if is_known {
                    self.network.routes.insert(addr, route);
                } else {
                    self.network.routes.remove(&addr);
                }
            }
            Event::Weight(which, weight) => {
                self.edit(|instance| instance.groups[0].backends[which].weight = weight);
            }
            Event::Listener(which) => self.edit(|instance| {
                let is_enabled = &mut instance.listeners[which].enabled;
                *is_enabled = !*is_enabled;
            }),
            Event::Acl(which, list) => self.edit(|instance| {
                let lists = [None, Some("192.0.2.0/24"), Some("198.51.100.0/24")];
                instance.listeners[which].acl =
                    lists[usize::from(list)].map(|sources| crate::config::Acl {
                        mode: crate::config::AclMode::Allow,
                        sources: Arc::new([sources.parse().unwrap()].into()),
                    });
            }),
            Event::Interface(index) => {
                let found = interface(index);
                let mut known = self.network.interfaces.iter();
                match known.position(|(known, _)| *known == found) {
                    Some(known) => drop(self.network.interfaces.remove(known)),
                    None => self.network.interfaces.push((found, None)),
                }
            }
            Event::Nothing => {}
        }
    }

    fn edit(&mut self, change: impl FnOnce(&mut crate::config::Instance)) {
        change(Arc::make_mut(&mut self.config.instances[0]));
        let ids = Ids::assign(&self.config, &self.maps.installed).unwrap();
        self.reconciler.keep(&ids);
        self.backends.adopt(ids);
    }

    fn reconcile(&mut self) -> Result<(), TableError> {
        self.reconciler.apply(&mut self.maps, &self.backends, &self.network, false)
    }

    /// The backends that a reconciler puts into empty maps. Schedules and numbers depend on the past.
    fn expected(&self) -> BTreeMap<u32, abi::Backend> {
        let mut reconciler = Reconciler::new(Jiffies::per_second(250));
        let mut maps = Flaky::default();
        reconciler.apply(&mut maps, &self.backends, &self.network, false).unwrap();
        in_use(&maps.installed)
    }
}

fn in_use(state: &State) -> BTreeMap<u32, abi::Backend> {
    let backends = state.backends.iter().map(|(&id, backend)| {
        // Another listener may have shared it, and its part in the schedule depends on what was before.
        let past = BackendFlags::SHARED.union(BackendFlags::USABLE);
        (id, abi::Backend { flags: backend.flags.difference(past), weight: 0, ..*backend })
    });
    backends.filter(|(_, backend)| backend.flags.contains(BackendFlags::IN_USE)).collect()
}

fn interface(index: u8) -> Interface {
    Interface {
        index: index.into(),
        name: format!("eth{index}"),
        mac: [2, 0, 0, 0, 0, index],
        mtu: 1_500,
        up: true,
        is_ethernet: true,
        is_veth: false,
        master: None,
        lower: None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(96) })]

    #[test]
    fn given_maps_that_fail_when_they_fail_no_more_then_they_hold_what_is_planned(
        events in proptest::collection::vec(events(), 1..24),
    ) {
        let mut gateway = Gateway::new();
        for (event, outcomes) in events {
            gateway.happen(&event);
            gateway.maps.outcomes = outcomes.into();
            // What fails is tried again, here after the next event.
            let _ = gateway.reconcile();
        }
        gateway.maps.outcomes.clear();
        gateway.reconcile().unwrap();

        prop_assert_eq!(in_use(&gateway.maps.installed), gateway.expected());
        let writes = gateway.maps.writes;
        gateway.reconciler.in_line = None;
        gateway.reconcile().unwrap();
        prop_assert_eq!(gateway.maps.writes, writes, "a plan of everything changes nothing");
    }
}
