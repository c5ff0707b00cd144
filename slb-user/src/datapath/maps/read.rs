//! Reads the maps into a [`State`](crate::state::State).

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use aya::maps::{HashMap, MapData, MapError};
use slb_common::abi::{Address, Backend, Limits, Listener};

use super::{Maps, TableError, at, chunks_for};
use crate::{
    datapath::{Pins, memory::Memory, slots::Chunks},
    state::{Acl, ListenerState, Policy, Schedule},
};

impl Maps {
    pub(super) fn read(&mut self, pins: &Pins) -> Result<(), TableError> {
        self.chunks = Chunks::new(self.slots.len());
        let mut schedules = BTreeMap::<u32, Arc<Schedule>>::new();
        for entry in &self.listeners {
            let (endpoint, listener) = entry.map_err(at("SLB_LISTENERS"))?;
            let range = chunks_of(&listener);
            self.chunks.reserve(range.clone());
            self.ranges.insert(endpoint, range);
            let schedule = match schedules.get(&listener.first_chunk) {
                // VIPs of one listener share their slots; an empty schedule has none to share.
                Some(schedule) if listener.slots > 0 => Arc::clone(schedule),
                _ => Arc::new(self.schedule(&listener)?),
            };
            if listener.slots > 0 {
                schedules.insert(listener.first_chunk, Arc::clone(&schedule));
            }
            let Listener { id, flags, acl, sticky_jiffies, .. } = listener;
            let policy = Policy { flags, acl, sticky_jiffies };
            self.installed.listeners.insert(endpoint, ListenerState { id, schedule, policy });
        }
        for (id, limits) in self.limits.iter().enumerate() {
            let limits = limits.map_err(at("SLB_LIMITS"))?;
            if limits != Limits::default() {
                self.installed.limits.insert(id as u32, limits);
            }
        }
        let mut acls = BTreeMap::<u32, Acl>::new();
        for key in self.acls.keys() {
            let key = key.map_err(at("SLB_ACL"))?;
            let [acl, a, b, c, d] = key.data();
            acls.entry(u32::from_be(acl))
                .or_default()
                .insert((key.prefix_len(), Address::from_words([a, b, c, d])));
        }
        self.installed.acls = acls.into_iter().map(|(acl, list)| (acl, Arc::new(list))).collect();
        self.installed.quic = contents(&self.quic).map_err(at("SLB_QUIC"))?;
        self.installed.backends = backends(pins)?;
        for (index, source) in self.sources.iter().enumerate() {
            let source = source.map_err(at("SLB_SOURCES"))?;
            if source != Address::default() {
                self.installed.sources.insert(index as u32, source);
            }
        }
        self.installed.addresses = contents(&self.addresses).map_err(at("SLB_ADDRESSES"))?;
        self.installed.endpoints = contents(&self.endpoints).map_err(at("SLB_REVNAT"))?;
        self.installed.interfaces = contents(&self.interfaces).map_err(at("SLB_INTERFACES"))?;
        self.filter.fill(&self.installed.addresses);
        let listeners = contents(&self.listeners).map_err(at("SLB_LISTENERS"))?;
        self.listener_index.fill(&listeners);
        self.endpoint_index.fill(&self.installed.endpoints);
        Ok(())
    }

    fn schedule(&self, listener: &Listener) -> Result<Schedule, TableError> {
        Ok(Schedule {
            scheduler: listener.scheduler,
            previous_scheduler: listener.previous_scheduler,
            slots: self.slots(listener.first_chunk, listener.slots)?,
            previous: self.slots(listener.previous_chunk, listener.previous_slots)?,
        })
    }

    fn slots(&self, first_chunk: u32, count: u32) -> Result<Vec<u32>, TableError> {
        let mut slots = Vec::with_capacity(count as usize);
        for chunk in first_chunk..first_chunk + chunks_for(count) {
            slots.extend(self.slots.get(&chunk, 0).map_err(at("SLB_SLOTS"))?.slots);
        }
        slots.truncate(count as usize);
        Ok(slots)
    }
}

/// Where the slots of a listener are, and behind them the previous ones.
fn chunks_of(listener: &Listener) -> Range<u32> {
    let chunks = chunks_for(listener.slots) + chunks_for(listener.previous_slots);
    if chunks == 0 { 0..0 } else { listener.first_chunk..listener.first_chunk + chunks }
}

/// All backends, without a system call for each of the places.
fn backends(pins: &Pins) -> Result<BTreeMap<u32, Backend>, TableError> {
    let memory = Memory::<Backend>::open(pins, "SLB_BACKENDS")?;
    let records = (0..memory.len()).filter_map(|id| Some((id as u32, memory.load(id)?)));
    Ok(records.filter(|(_, backend)| *backend != Backend::default()).collect())
}

fn contents<K: aya::Pod + Ord, V: aya::Pod>(
    map: &HashMap<MapData, K, V>,
) -> Result<BTreeMap<K, V>, MapError> {
    map.iter().collect()
}
