//! What the agent knows about backends: their indices, their health, and their checks.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use rustc_hash::{FxHashMap, FxHashSet};
use slb_common::abi::BackendFlags;

use crate::{
    config::{Config, HealthCheck},
    health::{self, Checkers, Health},
    ids::{Ids, IndexedBackend, IndexedListener},
    observe::History,
    state::State,
};

/// The backends of the configuration in force, and those that were removed and have flows still.
pub(super) struct Backends {
    pub ids: Arc<Ids>,
    /// One per element of [`Ids::backends`].
    pub health: Arc<Vec<Health>>,
    /// Backends, by index, that stay in use until their first probe, see [`crate::planner::Inputs::trusted`].
    pub trusted: FxHashSet<u32>,
    /// How the health of backends has changed, by id.
    pub history: Arc<FxHashMap<u32, History>>,
    /// By [`crate::ids::IndexedBackend::id`].
    pub checkers: Checkers<u32>,
    /// What the probes have found.
    pub probes: health::Statuses<u32>,
    /// Orphaned backends: the configuration does not name them, but they have flows; and since when.
    pub orphaned: FxHashMap<u32, Instant>,
}

impl Backends {
    /// The backends of a ids, with the health that an earlier agent has left in the maps. Nothing is checked yet.
    pub(super) fn new(ids: Arc<Ids>, installed: &State, checkers: Checkers<u32>) -> Self {
        Self {
            health: Arc::new(restored(&ids, installed)),
            ids,
            trusted: FxHashSet::default(),
            history: Arc::default(),
            checkers,
            probes: health::Statuses::default(),
            orphaned: FxHashMap::default(),
        }
    }

    /// Takes over the transitions that are about a present backend, and gives them with its index in the ids.
    pub(super) fn record(
        &mut self,
        events: Vec<health::Event<u32>>,
    ) -> Vec<(usize, health::Event<u32>)> {
        let known: Vec<_> = events
            .into_iter()
            .filter(|event| self.checkers.is_current(event))
            .filter_map(|event| Some((self.position(event.key)?, event)))
            .collect();
        for (backend, event) in &known {
            Arc::make_mut(&mut self.health)[*backend] = event.health;
            self.trusted.remove(&event.key);
            let first = History { since: event.at, transitions: 0 };
            let history = Arc::make_mut(&mut self.history).entry(event.key).or_insert(first);
            *history = History { since: event.at, transitions: history.transitions + 1 };
        }
        known
    }

    /// The index in the ids of the backend with an id.
    pub(super) fn position(&self, id: u32) -> Option<usize> {
        self.ids.backends.iter().position(|backend| backend.id == id)
    }

    /// Has every backend checked as the configuration says.
    pub(super) fn check(&mut self) -> usize {
        let backends = self.ids.backends.iter().enumerate().filter_map(|(index, backend)| {
            let (check, addr) = backend.check.as_ref()?;
            let (check, initial) = (Arc::clone(check), self.health[index]);
            Some((backend.id, health::Target { addr: *addr, check, initial }))
        });
        let backends: Vec<_> = backends.collect();
        let count = backends.len();
        self.checkers.set(backends);
        self.probes = self.checkers.statuses();
        count
    }

    /// Replaces the ids by those of another configuration. Health goes with it only where a backend was checked before
    /// and is checked now. Says whether [`Backends::check`] has anything to do.
    pub(super) fn adopt(&mut self, ids: Ids) -> bool {
        let is_checked_otherwise = !checks(&self.ids).eq(checks(&ids));
        let before = Before::new(&self.ids);
        let mut health = Vec::with_capacity(ids.backends.len());
        let mut trusted = FxHashSet::default();
        for (listener, backend) in ids.listeners.iter().flat_map(|listener| {
            ids.backends[listener.backends.clone()].iter().map(move |backend| (listener, backend))
        }) {
            let was = before.find(listener, backend).filter(|_| backend.check.is_some());
            let was = was.map(|index| (&self.ids.backends[index], self.health[index]));
            let (known, is_trusted) = match was {
                Some((was, known)) if was.check.is_some() => {
                    (known, known == Health::Unknown && self.trusted.contains(&backend.id))
                }
                Some((was, _)) => (Health::Unknown, !was.is_orphaned()),
                None => (Health::Unknown, false),
            };
            health.push(known);
            if is_trusted {
                trusted.insert(backend.id);
            }
        }
        (self.health, self.trusted) = (Arc::new(health), trusted);
        let present: FxHashSet<u32> = ids.backends.iter().map(|backend| backend.id).collect();
        Arc::make_mut(&mut self.history).retain(|id, _| present.contains(id));
        self.ids = Arc::new(ids);
        self.note_orphaned();
        is_checked_otherwise
    }

    /// Records since when backends are orphaned.
    pub(super) fn note_orphaned(&mut self) {
        let now = Instant::now();
        let backends = self.ids.backends.iter();
        let since = backends
            .filter(|backend| backend.is_orphaned())
            .map(|backend| (backend.id, self.orphaned.get(&backend.id).copied().unwrap_or(now)));
        self.orphaned = since.collect();
    }

    /// Listener and backend of a backend, in words.
    pub(super) fn describe(&self, config: &Config, index: usize) -> (String, String) {
        let place = self.ids.listeners.iter().find(|listener| listener.backends.contains(&index));
        let Some(indexed) = place else { return (String::new(), String::new()) };
        let instance = &config.instances[indexed.instance];
        let listener = &instance.listeners[indexed.listener];
        let indexed_backend = &self.ids.backends[index];
        let backends = &instance.groups[listener.group].backends;
        let backend = indexed_backend.backend.map_or("", |backend| &backends[backend].name);
        (
            format!("{} {}/{}", instance.name, listener.protocol, listener.port),
            format!("{backend} {}", indexed_backend.addr),
        )
    }
}

/// How each backend is checked.
fn checks(ids: &Ids) -> impl Iterator<Item = (u32, Option<&(Arc<HealthCheck>, SocketAddr)>)> {
    ids.backends.iter().map(|backend| (backend.id, backend.check.as_ref()))
}

/// Finds the backends of the configuration before. An index alone does not name one: a listener that comes may have
/// been given that of one that goes.
struct Before<'a>(FxHashMap<u32, (&'a IndexedListener, usize)>);

impl<'a> Before<'a> {
    fn new(ids: &'a Ids) -> Self {
        let listeners = ids.listeners.iter();
        let backends = listeners.flat_map(|listener| {
            listener.backends.clone().map(move |index| (ids.backends[index].id, (listener, index)))
        });
        Self(backends.collect())
    }

    /// The index that a backend of `listener` had.
    fn find(&self, listener: &IndexedListener, backend: &IndexedBackend) -> Option<usize> {
        let (was, index) = self.0.get(&backend.id)?;
        was.endpoints.iter().any(|at| listener.endpoints.contains(at)).then_some(*index)
    }
}

/// Health as an earlier agent has left it in the maps. Where it did not check a backend, there is none.
fn restored(ids: &Ids, installed: &State) -> Vec<Health> {
    let flags =
        |id| installed.backends.get(&id).map_or(BackendFlags::empty(), |record| record.flags);
    ids.backends
        .iter()
        .map(|backend| {
            match flags(backend.id) & (BackendFlags::HEALTHY | BackendFlags::UNHEALTHY) {
                _ if backend.check.is_none() => Health::Unknown,
                BackendFlags::HEALTHY => Health::Healthy,
                BackendFlags::UNHEALTHY => Health::Unhealthy,
                _ => Health::Unknown,
            }
        })
        .collect()
}
