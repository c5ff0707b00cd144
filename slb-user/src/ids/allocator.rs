//! Hands out the indices that the maps and the flows know listeners and backends by.

use std::{collections::BTreeMap, net::IpAddr};

use rustc_hash::{FxHashMap, FxHashSet};
use slb_common::abi::{self, Address, Endpoint, MAX_BACKENDS, MAX_LISTENERS};

use super::{CapacityError, IndexedBackend, IndexedListener, endpoint};
use crate::{config::Config, state::State};

/// Hands out indices.
pub(super) struct Allocator<'a> {
    installed: &'a State,
    given_listeners: FxHashSet<u32>,
    /// Backends that the maps know, in use or not: by listener, address and port.
    backends: FxHashMap<(u32, Address, u32), u32>,
    given_backends: FxHashSet<u32>,
    /// Backends in use, by listener.
    used_backends: FxHashMap<u32, Vec<u32>>,
    /// Never used, then those of listeners that go.
    free_listeners: Box<dyn Iterator<Item = u32> + 'a>,
    /// How many entries of `SLB_LISTENERS` those given so far take.
    endpoints: usize,
    /// Never used, then retired ones: a flow may still refer to those.
    free_backends: Box<dyn Iterator<Item = u32> + 'a>,
}

impl<'a> Allocator<'a> {
    pub(super) fn new(config: &Config, installed: &'a State) -> Self {
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
        let free_listeners =
            (0..MAX_LISTENERS as u32).filter(move |id| !used.contains(id)).chain(last);
        let known: BTreeMap<u32, _> = installed.backends.iter().map(|(&id, b)| (id, b)).collect();
        let backends =
            known.iter().map(|(&id, b)| ((b.listener.into(), b.addr, b.port), id)).collect();
        let mut retired = Vec::new();
        let mut used_backends = FxHashMap::<u32, Vec<u32>>::default();
        for (&id, backend) in &known {
            if backend.flags.intersects(abi::BackendFlags::IN_USE) {
                used_backends.entry(backend.listener.into()).or_default().push(id);
            } else {
                retired.push(id);
            }
        }
        let never_used = (0..MAX_BACKENDS as u32).filter(move |id| !known.contains_key(id));
        Self {
            installed,
            given_listeners: FxHashSet::default(),
            backends,
            given_backends: FxHashSet::default(),
            used_backends,
            free_listeners: Box::new(free_listeners),
            endpoints: 0,
            free_backends: Box::new(never_used.chain(retired)),
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
        self.given_backends.extend(backends.iter().map(|backend| backend.id));
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
        let known = self.backends.get(&(listener, addr.into(), port.into())).copied();
        if let Some(id) = known.filter(|id| self.given_backends.insert(*id)) {
            return Ok(id);
        }
        let free = self.free_backends.find(|id| !self.given_backends.contains(id));
        let id = free.ok_or(CapacityError::TooManyBackends)?;
        self.given_backends.insert(id);
        Ok(id)
    }

    /// The backends of a listener that the maps have in use, and that were not given an index again. Must be called
    /// after all backends of the listener have theirs.
    pub(super) fn orphaned(&self, listener: u32, endpoints: &[Endpoint]) -> Vec<u32> {
        // An index that another listener has had before says nothing.
        let is_it = |at| self.installed.listeners.get(at).is_some_and(|known| known.id == listener);
        if !endpoints.iter().any(is_it) {
            return Vec::new();
        }
        let used = self.used_backends.get(&listener).into_iter().flatten().copied();
        used.filter(|id| !self.given_backends.contains(id)).collect()
    }
}
