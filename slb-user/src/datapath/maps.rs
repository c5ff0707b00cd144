//! The adapter on aya: reads the maps into a [`State`], and carries out [`Step`]s.
//!
//! What it has read or written it remembers, so that nothing is written that is already right.

use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, lpm_trie::Key};
use slb_common::{
    abi::{
        self, Address, BACKEND_IN_USE, Backend, CHUNK_SLOTS, Chunk, Counter, EPOCH_LEARNED,
        EPOCH_LOCKED, Endpoint, Interface, Limits, Listed, Listener, MAX_BACKENDS,
        MAX_ENDPOINT_RECORDS, MAX_ENDPOINTS, MAX_INTERFACES, MAX_LISTENER_RECORDS, MAX_LISTENERS,
        MAX_PREFIXES, MAX_QUIC, MAX_SOURCES, QuicKey, RevNat, Roles, Settings, SynAnswers, Traffic,
    },
    verdict::Verdict,
};

use super::{Counters, Pins, filter::RoleFilter, index::Indexed, memory::Memory, slots::Chunks};
use crate::{
    plan::Step,
    state::{Acl, Policy, Schedule, Service, State},
};

/// Longer than a packet is in the program.
const PACKET: Duration = Duration::from_millis(1);

/// A map could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The kernel refused.
    #[error("map {map}")]
    Map {
        /// Which one.
        map: &'static str,
        /// Why.
        source: MapError,
    },
    /// The kernel does not show the map's memory.
    #[error("map {map}: its memory")]
    Memory {
        /// Which one.
        map: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel does not read many elements at once.
    #[error("map {map}: reading its elements")]
    Batch {
        /// Which one.
        map: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Too many schedules for the capacity that the map was made with.
    #[error(
        "SLB_SLOTS has no room for a schedule of {slots} slots; to make it larger, run `slb unload` and start the agent again"
    )]
    NoSlots {
        /// What was wanted.
        slots: usize,
    },
}

/// What has become of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It is carried out.
    Done,
    /// A packet that is under way may need what it removes; it is to be planned again at this time.
    Later(Instant),
}

/// The maps that the agent reads and writes.
pub struct Maps {
    listeners: HashMap<MapData, Endpoint, Listener>,
    slots: Array<MapData, Chunk>,
    backends: Array<MapData, Backend>,
    addresses: HashMap<MapData, Address, Roles>,
    endpoints: HashMap<MapData, Endpoint, RevNat>,
    filter: RoleFilter,
    listener_index: Indexed<Listener, MAX_LISTENER_RECORDS>,
    endpoint_index: Indexed<RevNat, MAX_ENDPOINT_RECORDS>,
    interfaces: HashMap<MapData, u32, Interface>,
    sources: Array<MapData, Address>,
    acls: LpmTrie<MapData, Listed, u32>,
    quic: HashMap<MapData, QuicKey, u32>,
    limits: Array<MapData, Limits>,
    settings: Array<MapData, Settings>,
    counters: Counters,
    installed: State,
    chunks: Chunks,
    /// Where each listener's schedule is in `slots`.
    ranges: BTreeMap<Endpoint, Range<u32>>,
    /// Counts the steps that were carried out.
    revision: u64,
    /// When a listener's record was last replaced or removed.
    listeners_changed: Option<Instant>,
}

/// A pinned map knows its real capacity; one taken from the loader claims the object's.
pub(super) fn open<T: TryFrom<Map, Error = MapError>>(
    pins: &Pins,
    name: &'static str,
) -> Result<T, TableError> {
    MapData::from_pin(pins.map(name))
        .and_then(Map::from_map_data)
        .and_then(T::try_from)
        .map_err(at(name))
}

pub(super) fn at(map: &'static str) -> impl Fn(MapError) -> TableError {
    move |source| TableError::Map { map, source }
}

impl Maps {
    /// Opens the pinned maps and reads what they hold.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn open(pins: &Pins) -> Result<Self, TableError> {
        let mut maps = Self {
            listeners: open(pins, "SLB_LISTENERS")?,
            slots: open(pins, "SLB_SLOTS")?,
            backends: open(pins, "SLB_BACKENDS")?,
            addresses: open(pins, "SLB_ADDRESSES")?,
            endpoints: open(pins, "SLB_REVNAT")?,
            interfaces: open(pins, "SLB_INTERFACES")?,
            sources: open(pins, "SLB_SOURCES")?,
            acls: open(pins, "SLB_ACL")?,
            quic: open(pins, "SLB_QUIC")?,
            limits: open(pins, "SLB_LIMITS")?,
            filter: RoleFilter::open(pins)?,
            listener_index: Indexed::open(pins, "SLB_LISTENER_INDEX")?,
            endpoint_index: Indexed::open(pins, "SLB_REVNAT_INDEX")?,
            settings: open(pins, "SLB_SETTINGS")?,
            counters: Counters::open(pins)?,
            installed: State::default(),
            chunks: Chunks::new(0),
            ranges: BTreeMap::new(),
            revision: 0,
            listeners_changed: None,
        };
        maps.read(pins)?;
        Ok(maps)
    }

    /// What the maps hold.
    #[must_use]
    pub const fn installed(&self) -> &State {
        &self.installed
    }

    /// Another number whenever [`Maps::installed`] may have changed.
    #[must_use]
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    fn read(&mut self, pins: &Pins) -> Result<(), TableError> {
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
            self.installed.listeners.insert(endpoint, Service { id, schedule, policy });
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
            }
            Step::RemoveInterface(index) => {
                absent_is_fine(self.interfaces.remove(&index)).map_err(at("SLB_INTERFACES"))?;
                self.installed.interfaces.remove(&index);
            }
            Step::PutSource(index, addr) => {
                self.sources.set(index, addr, 0).map_err(at("SLB_SOURCES"))?;
                self.installed.sources.insert(index, addr);
            }
            Step::PutBackend(id, backend) => {
                self.backends.set(id, backend, 0).map_err(at("SLB_BACKENDS"))?;
                self.installed.backends.insert(id, backend);
            }
            Step::PutAcl(acl, list) => {
                // Another list may have had the number.
                self.set(|settings| {
                    settings.acl_epoch = settings.acl_epoch.wrapping_add(1);
                    settings.acl_epoch = settings.acl_epoch.max(1);
                })?;
                for (done, &(bits, addr)) in list.iter().enumerate() {
                    let key = Key::new(bits, abi::listed(acl, addr));
                    if let Err(error) = self.acls.insert(&key, 1, 0) {
                        self.remove_prefixes(acl, list.iter().take(done))?;
                        return Err(at("SLB_ACL")(error));
                    }
                }
                self.installed.acls.insert(acl, list);
            }
            Step::RemoveAcl(acl, list) => {
                // A packet may have read the listener's old record. The list stays installed until that is over.
                let due = self.listeners_changed.map(|changed| changed + PACKET);
                if let Some(due) = due.filter(|due| *due > Instant::now()) {
                    return Ok(Applied::Later(due));
                }
                self.remove_prefixes(acl, list.iter())?;
                self.installed.acls.remove(&acl);
            }
            Step::PutLimits(id, limits) => {
                self.limits.set(id, limits, 0).map_err(at("SLB_LIMITS"))?;
                if limits == Limits::default() {
                    self.installed.limits.remove(&id);
                } else {
                    self.installed.limits.insert(id, limits);
                }
            }
            Step::PutQuic(server, backend) => {
                self.quic.insert(server, backend, 0).map_err(at("SLB_QUIC"))?;
                self.installed.quic.insert(server, backend);
            }
            Step::RemoveQuic(server) => {
                absent_is_fine(self.quic.remove(&server)).map_err(at("SLB_QUIC"))?;
                self.installed.quic.remove(&server);
            }
            Step::PutListener(endpoint, service) => self.put_listener(endpoint, service)?,
            Step::RemoveListener(endpoint) => {
                absent_is_fine(self.listeners.remove(&endpoint)).map_err(at("SLB_LISTENERS"))?;
                self.listener_index.remove(&endpoint);
                self.listeners_changed = Some(Instant::now());
                self.installed.listeners.remove(&endpoint);
                if let Some(range) = self.ranges.remove(&endpoint) {
                    self.release(range);
                }
            }
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

    fn put_listener(&mut self, endpoint: Endpoint, service: Service) -> Result<(), TableError> {
        let range = match self.range_of(&service) {
            Some(range) => range,
            None => self.write_slots(&service.schedule)?,
        };
        let listener = Listener {
            id: service.id,
            scheduler: service.schedule.scheduler,
            previous_scheduler: service.schedule.previous_scheduler,
            first_chunk: range.start,
            slots: service.schedule.slots.len() as u32,
            // Behind the others.
            previous_chunk: range.start + chunks_for(service.schedule.slots.len() as u32),
            previous_slots: service.schedule.previous.len() as u32,
            flags: service.policy.flags,
            acl: service.policy.acl,
            sticky_jiffies: service.policy.sticky_jiffies,
            spare: 0,
        };
        if let Err(error) = self.listeners.insert(endpoint, listener, 0) {
            self.release(range);
            return Err(at("SLB_LISTENERS")(error));
        }
        self.listener_index.put(endpoint, listener);
        self.listeners_changed = Some(Instant::now());
        self.installed.listeners.insert(endpoint, service);
        if let Some(old) = self.ranges.insert(endpoint, range) {
            self.release(old);
        }
        Ok(())
    }

    /// Where this schedule is already, written for another VIP of the same listener.
    fn range_of(&self, service: &Service) -> Option<Range<u32>> {
        let (endpoint, _) = self.installed.listeners.iter().find(|(_, installed)| {
            installed.id == service.id && installed.schedule == service.schedule
        })?;
        self.ranges.get(endpoint).cloned()
    }

    fn write_slots(&mut self, schedule: &Schedule) -> Result<Range<u32>, TableError> {
        let Schedule { slots, previous, .. } = schedule;
        let chunks = slots.chunks(CHUNK_SLOTS).chain(previous.chunks(CHUNK_SLOTS));
        let count = chunks.clone().count() as u32;
        if count == 0 {
            return Ok(0..0);
        }
        let range = self
            .chunks
            .take(count, Instant::now())
            .ok_or(TableError::NoSlots { slots: slots.len() + previous.len() })?;
        for (index, part) in range.clone().zip(chunks) {
            let mut chunk = Chunk { slots: [0; CHUNK_SLOTS] };
            chunk.slots[..part.len()].copy_from_slice(part);
            if let Err(error) = self.slots.set(index, chunk, 0) {
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

    /// How a backend has answered SYNs.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn answers(&self, id: u32) -> Result<SynAnswers, TableError> {
        Ok(self.counters.answers(id..id + 1)?.pop().unwrap_or_default())
    }

    /// Makes the program look up the way to every client anew.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn next_route_epoch(&mut self) -> Result<(), TableError> {
        self.set(|settings| {
            settings.route_epoch = settings.route_epoch.wrapping_add(1);
            if matches!(settings.route_epoch, EPOCH_LEARNED | EPOCH_LOCKED) {
                settings.route_epoch = EPOCH_LEARNED + 1;
            }
        })
    }

    /// Changes the settings.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn set(&mut self, change: impl FnOnce(&mut Settings)) -> Result<(), TableError> {
        let mut settings = self.settings.get(&0, 0).map_err(at("SLB_SETTINGS"))?;
        let before = settings;
        change(&mut settings);
        if settings == before {
            return Ok(());
        }
        self.settings.set(0, settings, 0).map_err(at("SLB_SETTINGS"))
    }

    /// Name, entries in use and capacity of the maps that fill up with the configuration.
    #[must_use]
    pub fn usage(&self) -> Vec<(&'static str, usize, usize)> {
        let State {
            listeners,
            backends,
            addresses,
            endpoints,
            interfaces,
            sources,
            acls,
            quic,
            limits: _,
        } = &self.installed;
        let used_chunks: usize = {
            let mut ranges: Vec<_> = self.ranges.values().collect();
            ranges.sort_by_key(|range| (range.start, range.end));
            ranges.dedup();
            ranges.into_iter().map(ExactSizeIterator::len).sum()
        };
        let in_use =
            backends.values().filter(|backend| backend.flags & BACKEND_IN_USE != 0).count();
        vec![
            ("SLB_LISTENERS", listeners.len(), MAX_LISTENERS),
            ("SLB_SLOTS", used_chunks, self.chunks()),
            ("SLB_BACKENDS", in_use, MAX_BACKENDS),
            ("SLB_ADDRESSES", addresses.len(), MAX_ENDPOINTS),
            ("SLB_REVNAT", endpoints.len(), MAX_ENDPOINTS),
            ("SLB_INTERFACES", interfaces.len(), MAX_INTERFACES),
            ("SLB_SOURCES", sources.len(), MAX_SOURCES),
            ("SLB_ACL", acls.values().map(|list| list.len()).sum(), MAX_PREFIXES),
            ("SLB_QUIC", quic.len(), MAX_QUIC),
        ]
    }

    /// How many chunks `SLB_SLOTS` has.
    #[must_use]
    pub fn chunks(&self) -> usize {
        self.slots.len() as usize
    }

    /// How many frames, and bytes, have ended in each verdict.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn verdicts(&self) -> Result<Vec<(Verdict, Counter)>, TableError> {
        self.counters.verdicts()
    }

    /// What a backend has got.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn traffic(&self, backend: u32) -> Result<Traffic, TableError> {
        Ok(self.counters.traffic(backend..backend + 1)?.pop().unwrap_or_default())
    }
}

/// Where the slots of a listener are, and behind them the previous ones.
fn chunks_of(listener: &Listener) -> Range<u32> {
    let chunks = chunks_for(listener.slots) + chunks_for(listener.previous_slots);
    if chunks == 0 { 0..0 } else { listener.first_chunk..listener.first_chunk + chunks }
}

const fn chunks_for(slots: u32) -> u32 {
    slots.div_ceil(CHUNK_SLOTS as u32)
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
