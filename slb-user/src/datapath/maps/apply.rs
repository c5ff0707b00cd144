//! Carries out [`Step`]s.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use aya::maps::{MapError, lpm_trie::Key};
use slb_common::abi::{self, Address, CHUNK_SLOTS, Chunk, Endpoint, Limits, Listener, VLAN_WORDS};

use super::{Maps, TableError, at, chunks_for};
use crate::{
    plan::Step,
    state::{Acl, ListenerState, Schedule},
};

/// Longer than a packet is in the program.
const PACKET: Duration = Duration::from_millis(1);

/// What has become of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It is carried out.
    Done,
    /// A packet that is under way may need what it removes; it is to be planned again at this time.
    Later(Instant),
}

impl Maps {
    /// Carries out one step.
    ///
    /// # Errors
    ///
    /// [`TableError`]; the maps are then as they were before the step.
    pub fn apply(&mut self, step: Step) -> Result<Applied, TableError> {
        self.revision += 1;
        match step {
            Step::PutInterface(index, interface) => {
                self.interfaces.insert(index, interface, 0).map_err(at("SLB_INTERFACES"))?;
                self.installed.interfaces.insert(index, interface);
                self.put_ingress(index)?;
            }
            Step::RemoveInterface(index) => {
                absent_is_fine(self.interfaces.remove(&index)).map_err(at("SLB_INTERFACES"))?;
                self.installed.interfaces.remove(&index);
                self.put_ingress(index)?;
            }
            Step::PutMac(mac) => {
                self.macs.insert(mac, 1, 0).map_err(at("SLB_MACS"))?;
                self.installed.macs.insert(mac, 1);
            }
            Step::RemoveMac(mac) => {
                absent_is_fine(self.macs.remove(&mac)).map_err(at("SLB_MACS"))?;
                self.installed.macs.remove(&mac);
            }
            Step::PutSubnet((bits, addr), interfaces) => {
                let key = Key::new(bits, abi::subnet(addr));
                self.subnets.insert(&key, interfaces, 0).map_err(at("SLB_SUBNETS"))?;
                self.installed.subnets.insert((bits, addr), interfaces);
                self.put_elsewhere();
            }
            Step::RemoveSubnet((bits, addr)) => {
                let key = Key::new(bits, abi::subnet(addr));
                absent_is_fine(self.subnets.remove(&key)).map_err(at("SLB_SUBNETS"))?;
                self.installed.subnets.remove(&(bits, addr));
                self.put_elsewhere();
            }
            Step::PutSource(index, addr) => {
                self.sources.set(index, addr, 0).map_err(at("SLB_SOURCES"))?;
                self.installed.sources.insert(index, addr);
            }
            Step::PutBackend(id, backend) => {
                self.backends.set(id, backend, 0).map_err(at("SLB_BACKENDS"))?;
                self.installed.backends.insert(id, backend);
            }
            Step::PutAcl(acl, list) => self.put_acl(acl, list)?,
            Step::RemoveAcl(acl, list) => return self.remove_acl(acl, &list),
            Step::PutLimits(id, limits) => self.put_limits(id, limits)?,
            Step::PutQuic(server, backend) => {
                self.quic.insert(server, backend, 0).map_err(at("SLB_QUIC"))?;
                self.installed.quic.insert(server, backend);
            }
            Step::RemoveQuic(server) => {
                absent_is_fine(self.quic.remove(&server)).map_err(at("SLB_QUIC"))?;
                self.installed.quic.remove(&server);
            }
            Step::PutListener(endpoint, listener) => self.put_listener(endpoint, listener)?,
            Step::RemoveListener(endpoint) => self.remove_listener(endpoint)?,
            Step::PutEndpoint(endpoint, value) => {
                self.endpoints.insert(endpoint, value, 0).map_err(at("SLB_REVNAT"))?;
                self.endpoint_index.put(endpoint, value);
                self.installed.endpoints.insert(endpoint, value);
            }
            Step::RemoveEndpoint(endpoint) => {
                absent_is_fine(self.endpoints.remove(&endpoint)).map_err(at("SLB_REVNAT"))?;
                self.endpoint_index.remove(&endpoint);
                self.installed.endpoints.remove(&endpoint);
            }
            Step::PutAddress(addr, roles) => {
                self.addresses.insert(addr, roles, 0).map_err(at("SLB_ADDRESSES"))?;
                self.installed.addresses.insert(addr, roles);
                self.filter.set(addr, &self.installed.addresses);
            }
            Step::RemoveAddress(addr) => {
                absent_is_fine(self.addresses.remove(&addr)).map_err(at("SLB_ADDRESSES"))?;
                self.installed.addresses.remove(&addr);
                self.filter.set(addr, &self.installed.addresses);
            }
        }
        Ok(Applied::Done)
    }

    /// Writes the place in `SLB_INGRESS` of an interface: it is that of the first which has it.
    fn put_ingress(&mut self, index: u32) -> Result<(), TableError> {
        let place = abi::ingress_place(index);
        let mut interfaces = self.installed.interfaces.values();
        let first = interfaces.find(|interface| abi::ingress_place(interface.ifindex) == place);
        let first = first.copied().unwrap_or_default();
        // First: if the write fails, the audit makes up for it.
        put_or_remove(&mut self.written.ingress, place as u32, first);
        self.ingress.set(place as u32, first, 0).map_err(at("SLB_INGRESS"))?;
        self.put_elsewhere();
        Ok(())
    }

    pub(super) fn put_elsewhere(&mut self) {
        self.filter.set_subnets(&self.installed.subnets, &self.installed.interfaces);
    }

    /// Says which VLANs are served; `None`: all.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn serve_vlans(&mut self, vlans: Option<&BTreeSet<u16>>) -> Result<(), TableError> {
        let is_served = |id| vlans.is_none_or(|vlans| id == 0 || vlans.contains(&id));
        for word in 0..VLAN_WORDS as u16 {
            let others = (0..64).filter(|bit| !is_served(64 * word + bit));
            let others = others.fold(0_u64, |all, bit| all | 1 << bit);
            let word = u32::from(word);
            if self.written.vlans.get(&word).copied().unwrap_or_default() != others {
                self.vlans.set(word, others, 0).map_err(at("SLB_VLANS"))?;
                put_or_remove(&mut self.written.vlans, word, others);
            }
        }
        Ok(())
    }

    fn put_acl(&mut self, acl: u32, list: Arc<Acl>) -> Result<(), TableError> {
        // Another list may have had the number.
        self.next_acl_epoch()?;
        for (done, &(bits, addr)) in list.iter().enumerate() {
            let key = Key::new(bits, abi::listed(acl, addr));
            if let Err(error) = self.acls.insert(&key, 1, 0) {
                self.remove_prefixes(acl, list.iter().take(done))?;
                return Err(at("SLB_ACL")(error));
            }
        }
        self.installed.acls.insert(acl, list);
        Ok(())
    }

    /// Makes the program look into the access lists anew.
    pub(super) fn next_acl_epoch(&mut self) -> Result<(), TableError> {
        self.set(|settings| {
            settings.acl_epoch = settings.acl_epoch.wrapping_add(1);
            settings.acl_epoch = settings.acl_epoch.max(1);
        })
    }

    fn remove_acl(&mut self, acl: u32, list: &Acl) -> Result<Applied, TableError> {
        // A packet may have read the listener's old record. The list stays installed until that is over.
        let due = self.listeners_changed.map(|changed| changed + PACKET);
        if let Some(due) = due.filter(|due| *due > Instant::now()) {
            return Ok(Applied::Later(due));
        }
        self.remove_prefixes(acl, list.iter())?;
        self.installed.acls.remove(&acl);
        Ok(Applied::Done)
    }

    fn remove_prefixes<'a>(
        &mut self,
        acl: u32,
        prefixes: impl Iterator<Item = &'a (u32, Address)>,
    ) -> Result<(), TableError> {
        for &(bits, addr) in prefixes {
            let key = Key::new(bits, abi::listed(acl, addr));
            absent_is_fine(self.acls.remove(&key)).map_err(at("SLB_ACL"))?;
        }
        Ok(())
    }

    fn put_limits(&mut self, id: u32, limits: Limits) -> Result<(), TableError> {
        self.limits.set(id, limits, 0).map_err(at("SLB_LIMITS"))?;
        if limits == Limits::default() {
            self.installed.limits.remove(&id);
        } else {
            self.installed.limits.insert(id, limits);
        }
        Ok(())
    }

    fn put_listener(&mut self, endpoint: Endpoint, state: ListenerState) -> Result<(), TableError> {
        let range = match self.range_of(&state) {
            Some(range) => range,
            None => self.write_slots(&state.schedule)?,
        };
        let listener = record(&state, range.start);
        if let Err(error) = self.listeners.insert(endpoint, listener, 0) {
            self.release(range);
            return Err(at("SLB_LISTENERS")(error));
        }
        self.listener_index.put(endpoint, listener);
        self.listeners_changed = Some(Instant::now());
        self.installed.listeners.insert(endpoint, state);
        if let Some(old) = self.ranges.insert(endpoint, range) {
            self.release(old);
        }
        Ok(())
    }

    fn remove_listener(&mut self, endpoint: Endpoint) -> Result<(), TableError> {
        absent_is_fine(self.listeners.remove(&endpoint)).map_err(at("SLB_LISTENERS"))?;
        self.listener_index.remove(&endpoint);
        self.listeners_changed = Some(Instant::now());
        self.installed.listeners.remove(&endpoint);
        if let Some(range) = self.ranges.remove(&endpoint) {
            self.release(range);
        }
        Ok(())
    }

    /// Where this schedule is already, written for another VIP of the same listener.
    fn range_of(&self, listener: &ListenerState) -> Option<Range<u32>> {
        let (endpoint, _) = self.installed.listeners.iter().find(|(_, installed)| {
            installed.id == listener.id && installed.schedule == listener.schedule
        })?;
        self.ranges.get(endpoint).cloned()
    }

    fn write_slots(&mut self, schedule: &Schedule) -> Result<Range<u32>, TableError> {
        let chunks = schedule.chunks();
        let count = chunks.clone().count() as u32;
        if count == 0 {
            return Ok(0..0);
        }
        let range = self
            .chunks
            .take(count, Instant::now())
            .ok_or(TableError::NoSlots { slots: chunks.clone().map(<[u32]>::len).sum() })?;
        for (index, part) in range.clone().zip(chunks) {
            if let Err(error) = self.slots.set(index, chunk(part), 0) {
                self.chunks.release(range, Instant::now());
                return Err(at("SLB_SLOTS")(error));
            }
        }
        Ok(range)
    }

    fn release(&mut self, range: Range<u32>) {
        if !self.ranges.values().any(|used| *used == range) {
            self.chunks.release(range, Instant::now());
        }
    }
}

fn put_or_remove<V: Default + PartialEq>(map: &mut BTreeMap<u32, V>, key: u32, value: V) {
    if value == V::default() {
        map.remove(&key);
    } else {
        map.insert(key, value);
    }
}

/// The record of a listener whose slots begin with this chunk.
pub(super) fn record(state: &ListenerState, first_chunk: u32) -> Listener {
    let ListenerState { id, schedule, policy } = state;
    let Schedule { by, previous_by, .. } = **schedule;
    Listener {
        id: *id,
        scheduler: by.scheduler,
        previous_scheduler: previous_by.scheduler,
        first_chunk,
        slots: schedule.slots.len() as u32,
        // Behind the others.
        previous_chunk: first_chunk + chunks_for(schedule.slots.len() as u32),
        previous_slots: schedule.previous.len() as u32,
        flags: policy.flags,
        acl: policy.acl,
        sticky_jiffies: policy.sticky_jiffies,
        spare: 0,
        seed: by.seed,
        previous_seed: previous_by.seed,
    }
}

/// An element of `SLB_SLOTS`.
pub(super) fn chunk(slots: &[u32]) -> Chunk {
    let mut chunk = Chunk { slots: [0; CHUNK_SLOTS] };
    chunk.slots[..slots.len()].copy_from_slice(slots);
    chunk
}

/// Removing what is not there succeeds: a retry must not trip over its own past.
fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(())
        }
        other => other,
    }
}
