//! What the agent knows about backends: their indices, their health, and their checks.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

use slb_common::abi::{BACKEND_HEALTHY, BACKEND_UNHEALTHY};

use crate::{
    config::Config,
    health::{self, Checkers, Health},
    layout::{Layout, Service, Target},
    observe::History,
    state::State,
};

/// The backends of the configuration in force, and those that were removed and have flows still.
pub(super) struct Backends {
    pub layout: Arc<Layout>,
    /// One per target of the layout.
    pub health: Arc<Vec<Health>>,
    /// Backends, by index, that stay in use until their first probe, see [`crate::planner::Inputs::trusted`].
    pub trusted: HashSet<u32>,
    /// How the health of targets has changed, by id.
    pub history: Arc<HashMap<u32, History>>,
    /// By [`crate::layout::Target::id`].
    pub checkers: Checkers<u32>,
    /// What the probes have found.
    pub probes: health::Statuses<u32>,
    /// Backends that are there for the sake of their flows only, and since when.
    pub orphaned: HashMap<u32, Instant>,
}

impl Backends {
    /// The backends of a layout, with the health that an earlier agent has left in the maps. Nothing is checked yet.
    pub fn new(layout: Arc<Layout>, installed: &State, checkers: Checkers<u32>) -> Self {
        Self {
            health: Arc::new(restored(&layout, installed)),
            layout,
            trusted: HashSet::new(),
            history: Arc::default(),
            checkers,
            probes: health::Statuses::default(),
            orphaned: HashMap::new(),
        }
    }

    /// Takes over the transitions that are about a present target, and gives them with its index in the layout.
    pub fn record(&mut self, events: Vec<health::Event<u32>>) -> Vec<(usize, health::Event<u32>)> {
        let known: Vec<_> = events
            .into_iter()
            .filter(|event| self.checkers.is_current(event))
            .filter_map(|event| Some((self.position(event.key)?, event)))
            .collect();
        for (target, event) in &known {
            Arc::make_mut(&mut self.health)[*target] = event.health;
            self.trusted.remove(&event.key);
            let first = History { since: event.at, transitions: 0 };
            let history = Arc::make_mut(&mut self.history).entry(event.key).or_insert(first);
            *history = History { since: event.at, transitions: history.transitions + 1 };
        }
        known
    }

    /// The index in the layout of the target with an id.
    pub fn position(&self, id: u32) -> Option<usize> {
        self.layout.targets.iter().position(|target| target.id == id)
    }

    /// Makes a target unhealthy because of what clients see; the event that tells of it follows.
    pub fn fail(&mut self, index: usize, reason: String) {
        self.checkers.fail(&self.layout.targets[index].id, reason);
        Arc::make_mut(&mut self.health)[index] = Health::Unhealthy;
    }

    /// Whether the service of a target has another one that gets new flows.
    pub fn has_another(&self, than: usize) -> bool {
        let mut services = self.layout.services.iter();
        let service = services.find(|service| service.targets.contains(&than));
        service.is_some_and(|service| {
            service.targets.clone().any(|index| {
                let target = &self.layout.targets[index];
                let is_fit = target.check.is_none() || self.health[index] == Health::Healthy;
                index != than && is_fit && target.weight > 0
            })
        })
    }

    /// Has every target checked as the layout says.
    pub fn check(&mut self) -> usize {
        let targets = self.layout.targets.iter().enumerate().filter_map(|(index, target)| {
            let (check, addr) = target.check.as_ref()?;
            let (check, initial) = (Arc::new(check.clone()), self.health[index]);
            Some((target.id, health::Target { addr: *addr, check, initial }))
        });
        let targets: Vec<_> = targets.collect();
        let count = targets.len();
        self.checkers.set(targets);
        self.probes = self.checkers.statuses();
        count
    }

    /// Replaces the layout. Health goes with it only where a backend was checked before and is checked now.
    pub fn adopt(&mut self, layout: Layout) {
        let before = Before::new(&self.layout);
        let mut health = Vec::with_capacity(layout.targets.len());
        let mut trusted = HashSet::new();
        for (service, target) in layout.services.iter().flat_map(|service| {
            layout.targets[service.targets.clone()].iter().map(move |target| (service, target))
        }) {
            let was = before.find(service, target).filter(|_| target.check.is_some());
            let was = was.map(|index| (&self.layout.targets[index], self.health[index]));
            let (known, is_trusted) = match was {
                Some((was, known)) if was.check.is_some() => {
                    (known, known == Health::Unknown && self.trusted.contains(&target.id))
                }
                Some((was, _)) => (Health::Unknown, !was.is_departed()),
                None => (Health::Unknown, false),
            };
            health.push(known);
            if is_trusted {
                trusted.insert(target.id);
            }
        }
        (self.health, self.trusted) = (Arc::new(health), trusted);
        let ids: HashSet<u32> = layout.targets.iter().map(|target| target.id).collect();
        Arc::make_mut(&mut self.history).retain(|id, _| ids.contains(id));
        self.layout = Arc::new(layout);
        self.note_orphaned();
    }

    /// Takes down since when backends are there for the sake of their flows only.
    pub fn note_orphaned(&mut self) {
        let now = Instant::now();
        let targets = self.layout.targets.iter();
        let since = targets
            .filter(|target| target.is_departed())
            .map(|target| (target.id, self.orphaned.get(&target.id).copied().unwrap_or(now)));
        self.orphaned = since.collect();
    }

    /// Listener and backend of a target, in words.
    pub fn describe(&self, config: &Config, target: usize) -> (String, String) {
        let place = self.layout.services.iter().find(|service| service.targets.contains(&target));
        let Some(service) = place else { return (String::new(), String::new()) };
        let instance = &config.instances[service.instance];
        let listener = &instance.listeners[service.listener];
        let target = &self.layout.targets[target];
        let backends = &instance.groups[listener.group].backends;
        let backend = target.backend.map_or("", |backend| &backends[backend].name);
        (
            format!("{} {}/{}", instance.name, listener.protocol, listener.port),
            format!("{backend} {}", target.addr),
        )
    }
}

/// Finds the targets of the layout before. An index alone does not name one: a listener that comes may have
/// been given that of one that goes.
struct Before<'a>(HashMap<u32, (&'a Service, usize)>);

impl<'a> Before<'a> {
    fn new(layout: &'a Layout) -> Self {
        let services = layout.services.iter();
        let targets = services.flat_map(|service| {
            service.targets.clone().map(move |index| (layout.targets[index].id, (service, index)))
        });
        Self(targets.collect())
    }

    /// The index that a target of `service` had.
    fn find(&self, service: &Service, target: &Target) -> Option<usize> {
        let (was, index) = self.0.get(&target.id)?;
        was.endpoints.iter().any(|at| service.endpoints.contains(at)).then_some(*index)
    }
}

/// Health as an earlier agent has left it in the maps. Where it did not check a backend, there is none.
fn restored(layout: &Layout, installed: &State) -> Vec<Health> {
    let flags = |id| installed.backends.get(&id).map_or(0, |backend| backend.flags);
    layout
        .targets
        .iter()
        .map(|target| match flags(target.id) & (BACKEND_HEALTHY | BACKEND_UNHEALTHY) {
            _ if target.check.is_none() => Health::Unknown,
            BACKEND_HEALTHY => Health::Healthy,
            BACKEND_UNHEALTHY => Health::Unhealthy,
            _ => Health::Unknown,
        })
        .collect()
}
