//! Hands out the indices that the maps and the flows know listeners and backends by.

use std::{cell::OnceCell, iter, net::IpAddr};

use rustc_hash::{FxHashMap, FxHashSet};
use slb_common::abi::{self, Address, Endpoint, MAX_BACKENDS, MAX_LISTENERS};

use super::{CapacityError, IndexedBackend, IndexedListener, endpoint};
use crate::{config::Config, state::State};

/// Hands out indices.
pub(super) struct Allocator<'a> {
    installed: &'a State,
    given_listeners: FxHashSet<u32>,
    /// Listeners that keep their backends.
    kept: FxHashSet<u32>,
    /// The backends of all other listeners.
    known: OnceCell<KnownBackends>,
    /// By index.
    given_backends: Vec<bool>,
    /// Never used, then those of listeners that go.
    free_listeners: Box<dyn Iterator<Item = u32> + 'a>,
    /// How many entries of `SLB_LISTENERS` those given so far take.
    endpoints: usize,
    /// Never used, then retired ones: a flow may still refer to those.
    free_backends: Box<dyn Iterator<Item = u32> + 'a>,
}

/// Backends that the maps know.
#[derive(Default)]
struct KnownBackends {
    /// In use or not: by listener, address and port.
    ids: FxHashMap<(u32, Address, u32), u32>,
    /// Those in use, by listener.
    used: FxHashMap<u32, Vec<u32>>,
}

impl KnownBackends {
    /// Those of listeners that are not in `kept`.
    fn new(installed: &State, kept: &FxHashSet<u32>) -> Self {
        let mut known = Self::default();
        for (&id, backend) in &installed.backends {
            let listener = backend.listener.into();
            if kept.contains(&listener) {
                continue;
            }
            known.ids.insert((listener, backend.addr, backend.port), id);
            if backend.flags.intersects(abi::BackendFlags::IN_USE) {
                known.used.entry(listener).or_default().push(id);
            }
        }
        known
    }
}

/// Indices of listeners: those never used, then those of listeners that are not in `config` any more.
fn free_listeners<'a>(config: &Config, installed: &'a State) -> impl Iterator<Item = u32> + 'a {
    let wanted: FxHashSet<Endpoint> = config
        .instances
        .iter()
        .flat_map(|instance| {
            instance.listeners.iter().flat_map(|listener| {
                instance.vips.iter().map(|&vip| endpoint(vip, listener.port, listener.protocol))
            })
        })
        .collect();
    let listeners = installed.listeners.iter();
    let used: FxHashSet<u32> = listeners.clone().map(|(_, record)| record.id).collect();
    let kept = listeners.filter(|(at, _)| wanted.contains(*at));
    let kept: FxHashSet<u32> = kept.map(|(_, record)| record.id).collect();
    // What belongs to a listener that goes is not to pass to one that comes.
    let last: Vec<u32> = used.difference(&kept).copied().collect();
    (0..MAX_LISTENERS as u32).filter(move |id| !used.contains(id)).chain(last)
}

/// Indices of backends: those never used, then those not in use.
fn free_backends(installed: &State) -> impl Iterator<Item = u32> {
    let backends = &installed.backends;
    let never_used = (0..MAX_BACKENDS as u32).filter(|id| !backends.contains_key(id));
    let retired = backends.iter().filter(|(_, it)| !it.flags.intersects(abi::BackendFlags::IN_USE));
    never_used.chain(retired.map(|(&id, _)| id))
}

impl<'a> Allocator<'a> {
    pub(super) fn new(config: &'a Config, installed: &'a State) -> Self {
        Self {
            installed,
            given_listeners: FxHashSet::default(),
            kept: FxHashSet::default(),
            known: OnceCell::new(),
            given_backends: vec![false; MAX_BACKENDS],
            // Most edits take none.
            free_listeners: Box::new(
                iter::once_with(|| free_listeners(config, installed)).flatten(),
            ),
            endpoints: 0,
            free_backends: Box::new(free_backends(installed)),
        }
    }

    /// Takes note of a listener that keeps its id, and of its backends, which do so as well.
    pub(super) fn keep(
        &mut self,
        listener: &IndexedListener,
        backends: &[IndexedBackend],
    ) -> Result<(), CapacityError> {
        self.count(&listener.endpoints)?;
        self.given_listeners.insert(listener.id);
        self.kept.insert(listener.id);
        for backend in backends {
            self.given_backends[backend.id as usize] = true;
        }
        Ok(())
    }

    const fn count(&mut self, endpoints: &[Endpoint]) -> Result<(), CapacityError> {
        self.endpoints += endpoints.len();
        if self.endpoints > MAX_LISTENERS { Err(CapacityError::TooManyListeners) } else { Ok(()) }
    }

    /// For a listener with these VIPs and this port.
    pub(super) fn listener(&mut self, endpoints: &[Endpoint]) -> Result<u32, CapacityError> {
        self.count(endpoints)?;
        let mut known =
            endpoints.iter().filter_map(|endpoint| self.installed.listeners.get(endpoint));
        // VIPs that shared a listener may have one each by now: only one of those inherits.
        if let Some(record) = known.find(|record| self.given_listeners.insert(record.id)) {
            return Ok(record.id);
        }
        let free = self.free_listeners.find(|id| !self.given_listeners.contains(id));
        let id = free.ok_or(CapacityError::TooManyListeners)?;
        self.given_listeners.insert(id);
        Ok(id)
    }

    /// For a backend of a listener.
    pub(super) fn backend(
        &mut self,
        listener: u32,
        addr: IpAddr,
        port: u16,
    ) -> Result<u32, CapacityError> {
        let known = self.known().ids.get(&(listener, addr.into(), port.into())).copied();
        let known = known.filter(|id| !self.given_backends[*id as usize]);
        let mut free = self.free_backends.by_ref().filter(|id| !self.given_backends[*id as usize]);
        let id = known.or_else(|| free.next()).ok_or(CapacityError::TooManyBackends)?;
        drop(free);
        self.given_backends[id as usize] = true;
        Ok(id)
    }

    /// Those of listeners that were not [kept](Self::keep) until this is first called.
    fn known(&self) -> &KnownBackends {
        self.known.get_or_init(|| KnownBackends::new(self.installed, &self.kept))
    }

    /// The backends of a listener that the maps have in use, and that were not given an index again. Must be called
    /// after all backends of the listener have theirs.
    pub(super) fn orphaned(&self, listener: u32, endpoints: &[Endpoint]) -> Vec<u32> {
        // An index that another listener has had before says nothing.
        let is_it = |at| self.installed.listeners.get(at).is_some_and(|known| known.id == listener);
        if !endpoints.iter().any(is_it) {
            return Vec::new();
        }
        let used = self.known().used.get(&listener).into_iter().flatten().copied();
        used.filter(|id| !self.given_backends[*id as usize]).collect()
    }
}
