//! What is planned, by topic; here: a configuration in its environment.

use std::time::Duration;

use rustc_hash::{FxHashMap, FxHashSet};
use slb_common::abi::{self, Address, BackendFlags, Mode, SLOT_BACKEND, SLOT_KEEP, SLOT_LOOK};

use super::{schedules::FIRST_PROBES, *};
use crate::{
    config::{
        AllUnhealthy, Backend as ConfigBackend, Config, Forwarding, GroupKind, Instance, Listener,
        Scheduler,
    },
    ids::fixtures::{addresses, backend, config, instance, listener},
};

use Health::{Healthy, Unhealthy, Unknown};

mod health;
mod ingress;
mod parts;
mod records;
mod removed;
mod schedules;
mod shared;

/// A configuration in its environment; by default all backends are healthy, and no route is known.
struct World {
    planner: Planner,
    ids: Arc<Ids>,
    health: Vec<Health>,
    routes: FxHashMap<IpAddr, BackendRoute>,
    interfaces: BTreeMap<u32, Interface>,
    ingress: Arc<Ingress>,
    locals: Vec<IpAddr>,
    installed: State,
    begin: Instant,
    now: Instant,
    seed: Seed,
}

impl World {
    fn new(config: &Config) -> Self {
        let ids = Arc::new(Ids::assign(config, &State::default()).unwrap());
        Self {
            planner: Planner::default(),
            health: vec![Healthy; ids.backends.len()],
            ids,
            routes: FxHashMap::default(),
            interfaces: BTreeMap::new(),
            ingress: Arc::default(),
            locals: Vec::new(),
            installed: State::default(),
            begin: Instant::now(),
            now: Instant::now(),
            seed: Seed::PUBLIC,
        }
    }

    /// Takes over another configuration.
    fn reload(&mut self, config: &Config) {
        self.ids = Arc::new(Ids::assign(config, &self.installed).unwrap());
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
            ingress: &self.ingress,
            locals: &self.locals,
            jiffies: Jiffies::per_second(250),
            installed: &self.installed,
            now: self.now,
            moment: self.jiffies(),
            trusted: &FxHashSet::default(),
            closing: &FxHashSet::default(),
            seed: self.seed,
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
