//! Reads the maps into a [`State`](crate::state::State).

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use aya::{
    Pod,
    maps::{Array, MapData},
};
use slb_common::abi::{Address, Backend, Endpoint, Listener};
use zerocopy::{FromBytes, IntoBytes};

use super::{Maps, TableError, at, chunks_for};
use crate::{
    datapath::{Pins, batch, memory::Memory, slots::Chunks},
    state::{Acl, Chooser, ListenerState, Policy, Schedule},
};

impl Maps {
    pub(super) fn read(&mut self, pins: &Pins) -> Result<(), TableError> {
        self.chunks = Chunks::new(self.slots.len());
        let mut schedules = BTreeMap::<u32, Arc<Schedule>>::new();
        let listeners: BTreeMap<Endpoint, Listener> = contents(pins, "SLB_LISTENERS")?;
        for (&endpoint, listener) in &listeners {
            let range = chunks_of(listener);
            self.chunks.reserve(range.clone());
            self.ranges.insert(endpoint, range);
            let schedule = match schedules.get(&listener.first_chunk) {
                // VIPs of one listener share their slots; an empty schedule has none to share.
                Some(schedule) if listener.slots > 0 => Arc::clone(schedule),
                _ => Arc::new(self.schedule(listener)?),
            };
            if listener.slots > 0 {
                schedules.insert(listener.first_chunk, Arc::clone(&schedule));
            }
            let Listener { id, flags, acl, sticky_jiffies, .. } = *listener;
            let policy = Policy { flags, acl, sticky_jiffies };
            self.installed.listeners.insert(endpoint, ListenerState { id, schedule, policy });
        }
        self.installed.limits = used(&self.limits, "SLB_LIMITS")?;
        let mut acls = BTreeMap::<u32, Acl>::new();
        for key in self.acls.keys() {
            let key = key.map_err(at("SLB_ACL"))?;
            let [acl, a, b, c, d] = key.data();
            acls.entry(u32::from_be(acl))
                .or_default()
                .insert((key.prefix_len(), Address::from_words([a, b, c, d])));
        }
        self.installed.acls = acls.into_iter().map(|(acl, list)| (acl, Arc::new(list))).collect();
        self.installed.quic = contents(pins, "SLB_QUIC")?;
        self.installed.backends = backends(pins)?;
        self.installed.sources = used(&self.sources, "SLB_SOURCES")?;
        self.installed.addresses = contents(pins, "SLB_ADDRESSES")?;
        self.installed.endpoints = contents(pins, "SLB_REVNAT")?;
        self.installed.interfaces = contents(pins, "SLB_INTERFACES")?;
        self.installed.macs = contents(pins, "SLB_MACS")?;
        for entry in &self.subnets {
            let (key, interfaces) = entry.map_err(at("SLB_SUBNETS"))?;
            let subnet = (key.prefix_len(), Address::from_words(key.data()));
            self.installed.subnets.insert(subnet, interfaces);
        }
        self.written.settings = self.settings.get(&0, 0).map_err(at("SLB_SETTINGS"))?;
        self.written.vlans = used(&self.vlans, "SLB_VLANS")?;
        self.written.ingress = used(&self.ingress, "SLB_INGRESS")?;
        self.filter.fill(&self.installed.addresses);
        self.put_elsewhere();
        self.listener_index.fill(&listeners);
        self.endpoint_index.fill(&self.installed.endpoints);
        Ok(())
    }

    fn schedule(&self, listener: &Listener) -> Result<Schedule, TableError> {
        Ok(Schedule {
            by: Chooser { scheduler: listener.scheduler, seed: listener.seed },
            previous_by: Chooser {
                scheduler: listener.previous_scheduler,
                seed: listener.previous_seed,
            },
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

/// The elements of an array that are in use.
fn used<V: Pod + Default + PartialEq>(
    map: &Array<MapData, V>,
    name: &'static str,
) -> Result<BTreeMap<u32, V>, TableError> {
    let mut used = BTreeMap::new();
    for (index, value) in (0..).zip(map.iter()) {
        let value = value.map_err(at(name))?;
        if value != V::default() {
            used.insert(index, value);
        }
    }
    Ok(used)
}

/// All backends, without a system call for each of the places.
fn backends(pins: &Pins) -> Result<BTreeMap<u32, Backend>, TableError> {
    let memory = Memory::<Backend>::open(pins, "SLB_BACKENDS")?;
    let records = (0..memory.len()).filter_map(|id| Some((id as u32, memory.load(id)?)));
    Ok(records.filter(|(_, backend)| *backend != Backend::default()).collect())
}

fn contents<K, V>(pins: &Pins, map: &'static str) -> Result<BTreeMap<K, V>, TableError>
where
    K: FromBytes + IntoBytes + Copy + Ord,
    V: FromBytes + Copy,
{
    let data = pins.open_map(map).map_err(at(map))?;
    let contents = batch::contents(&data).map_err(|source| TableError::Batch { map, source })?;
    Ok(contents.into_iter().collect())
}
