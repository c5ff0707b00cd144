//! The adapter on aya: reads the maps into a [`State`], and carries out the steps of a plan.
//!
//! It remembers what it has read and written, so that nothing is written that is right already.

use std::{collections::BTreeMap, io, ops::Range, time::Instant};

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError};
use slb_common::{
    abi::{
        Address, Backend, BackendFlags, CHUNK_SLOTS, Chunk, Counter, EPOCH_LEARNED, EPOCH_LOCKED,
        Endpoint, Interface, Limits, Listed, Listener, MAX_BACKENDS, MAX_ENDPOINT_RECORDS,
        MAX_ENDPOINTS, MAX_INTERFACES, MAX_LISTENER_RECORDS, MAX_LISTENERS, MAX_MACS, MAX_PREFIXES,
        MAX_QUIC, MAX_SOURCES, MAX_SUBNETS, OwnMac, QuicKey, RevNat, Roles, Settings, Subnet,
        SynAnswers, Traffic,
    },
    verdict::Verdict,
};

pub use self::{apply::Applied, audit::Drift};
use super::{Counters, Pins, filter::RoleFilter, index::Indexed, slots::Chunks};
use crate::state::State;

mod apply;
mod audit;
mod read;

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
    ingress: Array<MapData, Interface>,
    macs: HashMap<MapData, OwnMac, u32>,
    subnets: LpmTrie<MapData, Subnet, u64>,
    vlans: Array<MapData, u64>,
    sources: Array<MapData, Address>,
    acls: LpmTrie<MapData, Listed, u32>,
    quic: HashMap<MapData, QuicKey, u32>,
    limits: Array<MapData, Limits>,
    settings: Array<MapData, Settings>,
    counters: Counters,
    installed: State,
    written: Written,
    chunks: Chunks,
    /// Where each listener's schedule is in `slots`.
    ranges: BTreeMap<Endpoint, Range<u32>>,
    /// Counts the steps that were carried out.
    revision: u64,
    /// When a listener's record was last replaced or removed.
    listeners_changed: Option<Instant>,
}

/// What the maps hold besides [`State`].
#[derive(Default)]
struct Written {
    settings: Settings,
    /// Without elements that are 0.
    vlans: BTreeMap<u32, u64>,
    ingress: BTreeMap<u32, Interface>,
}

/// A pinned map knows its real capacity; one taken from the loader claims the object's.
pub(super) fn open<T: TryFrom<Map, Error = MapError>>(
    pins: &Pins,
    name: &'static str,
) -> Result<T, TableError> {
    pins.open_map(name).and_then(Map::from_map_data).and_then(T::try_from).map_err(at(name))
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
            ingress: open(pins, "SLB_INGRESS")?,
            macs: open(pins, "SLB_MACS")?,
            subnets: open(pins, "SLB_SUBNETS")?,
            vlans: open(pins, "SLB_VLANS")?,
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
            written: Written::default(),
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

    /// What the program is told besides its tables.
    #[must_use]
    pub const fn settings(&self) -> Settings {
        self.written.settings
    }

    /// Changes the settings.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn set(&mut self, change: impl FnOnce(&mut Settings)) -> Result<(), TableError> {
        // Not as they are in the map: that is compared with these.
        let mut settings = self.settings();
        change(&mut settings);
        if settings == self.settings() {
            return Ok(());
        }
        self.settings.set(0, settings, 0).map_err(at("SLB_SETTINGS"))?;
        self.written.settings = settings;
        Ok(())
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
            macs,
            subnets,
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
        let in_use = backends
            .values()
            .filter(|backend| backend.flags.intersects(BackendFlags::IN_USE))
            .count();
        vec![
            ("SLB_LISTENERS", listeners.len(), MAX_LISTENERS),
            ("SLB_SLOTS", used_chunks, self.chunks()),
            ("SLB_BACKENDS", in_use, MAX_BACKENDS),
            ("SLB_ADDRESSES", addresses.len(), MAX_ENDPOINTS),
            ("SLB_REVNAT", endpoints.len(), MAX_ENDPOINTS),
            ("SLB_INTERFACES", interfaces.len(), MAX_INTERFACES),
            ("SLB_MACS", macs.len(), MAX_MACS),
            ("SLB_SUBNETS", subnets.len(), MAX_SUBNETS),
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

const fn chunks_for(slots: u32) -> u32 {
    slots.div_ceil(CHUNK_SLOTS as u32)
}
