//! Descriptors of all maps: the maps stay although their pins are removed, and are read beside the agent's loop.

use std::{collections::BTreeMap, os::fd::AsFd as _, sync::Arc};

use aya::maps::MapData;
use slb_common::{
    abi::{
        Address, Backend, CHUNK_SLOTS, Chunk, Endpoint, Interface, Limits, Listener, OwnMac,
        QuicKey, RevNat, Roles,
    },
    programs::Program,
};
use zerocopy::{FromBytes, IntoBytes};

use super::{LoadError, Pins, TableError, batch, map_check::MAPS, memory::Memory, pins, syscall};
use crate::state::{Acl, Schedule};

/// Descriptors of all maps.
///
/// `SLB_PROGRAMS` has to be among them: the kernel empties a program array when its last pin and descriptor are gone.
#[derive(Debug)]
pub struct KeptMaps {
    maps: BTreeMap<&'static str, MapData>,
    backends: Memory<Backend>,
    /// The ids of the programs in `SLB_PROGRAMS`.
    programs: Vec<Option<u32>>,
}

/// What is too large to be compared in the agent's loop.
#[derive(Clone, Debug, Default)]
pub struct Large {
    /// The access lists, by number.
    pub acls: BTreeMap<u32, Arc<Acl>>,
    /// Schedules, each with the first of its chunks.
    pub schedules: BTreeMap<u32, Arc<Schedule>>,
}

/// What one map holds, in the order of its keys, or what differs in it.
#[derive(Debug)]
#[expect(missing_docs, reason = "each is named like its map")]
pub enum MapContents {
    Settings,
    Vlans(Vec<(u32, u64)>),
    Interfaces(Vec<(u32, Interface)>),
    Ingress(Vec<(u32, Interface)>),
    Macs(Vec<(OwnMac, u32)>),
    Subnets(Vec<((u32, Address), u64)>),
    Sources(Vec<(u32, Address)>),
    Backends(Vec<(u32, Backend)>),
    Quic(Vec<(QuicKey, u32)>),
    Limits(Vec<(u32, Limits)>),
    /// Those that are missing, and those that are too many.
    Acl(Vec<(u32, (u32, Address))>),
    /// The chunks that differ from these schedules: first chunk, schedule, and which of them.
    Slots(Vec<(u32, Arc<Schedule>, usize)>),
    Listeners(Vec<(Endpoint, Listener)>),
    ListenerIndex,
    Endpoints(Vec<(Endpoint, RevNat)>),
    EndpointIndex,
    Addresses(Vec<(Address, Roles)>),
    Filter,
}

impl KeptMaps {
    /// Opens the pinned maps.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub(super) fn open(pins: &Pins) -> Result<Self, TableError> {
        let open = |map| pins.open_map(map).map_err(|source| TableError::Map { map, source });
        let maps = MAPS.iter().map(|map| Ok((map.name, open(map.name)?)));
        let mut kept = Self {
            maps: maps.collect::<Result<_, TableError>>()?,
            backends: Memory::open(pins, "SLB_BACKENDS")?,
            programs: Vec::new(),
        };
        kept.programs = kept.programs()?;
        Ok(kept)
    }

    /// Whether a slot of `SLB_PROGRAMS` has lost its program, or has another one.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub(super) fn has_other_programs(&self) -> Result<bool, TableError> {
        Ok(self.programs()? != self.programs)
    }

    fn programs(&self) -> Result<Vec<Option<u32>>, TableError> {
        let map = "SLB_PROGRAMS";
        let slots = 0..Program::ALL.len() as u32;
        let ids = slots.map(|slot| syscall::program_in(self.maps[map].fd().as_fd(), slot));
        ids.collect::<Result<_, _>>().map_err(|source| TableError::Batch { map, source })
    }

    /// Pins the maps whose pins are gone, and gives their names.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub(super) fn pin(&self, pins: &Pins) -> Result<Vec<String>, LoadError> {
        let mut pinned = Vec::new();
        for (name, map) in &self.maps {
            if pins::pin_again(map.fd().as_fd(), &pins.map(name))? {
                pinned.push((*name).to_owned());
            }
        }
        Ok(pinned)
    }

    /// Reads all that the agent writes, map by map, and gives it to `found` until that has enough.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn read(
        &self,
        large: &Large,
        mut found: impl FnMut(MapContents) -> bool,
    ) -> Result<(), TableError> {
        let parts: [&dyn Fn() -> Result<MapContents, TableError>; 18] = [
            &|| Ok(MapContents::Settings),
            &|| Ok(MapContents::Vlans(self.elements("SLB_VLANS")?)),
            &|| Ok(MapContents::Interfaces(self.contents("SLB_INTERFACES")?)),
            &|| Ok(MapContents::Ingress(self.elements("SLB_INGRESS")?)),
            &|| Ok(MapContents::Macs(self.contents("SLB_MACS")?)),
            &|| self.subnets(),
            &|| Ok(MapContents::Sources(self.elements("SLB_SOURCES")?)),
            &|| Ok(self.backends()),
            &|| Ok(MapContents::Quic(self.contents("SLB_QUIC")?)),
            &|| Ok(MapContents::Limits(self.elements("SLB_LIMITS")?)),
            &|| self.acls(&large.acls),
            &|| self.slots(&large.schedules),
            &|| Ok(MapContents::Listeners(self.contents("SLB_LISTENERS")?)),
            &|| Ok(MapContents::ListenerIndex),
            &|| Ok(MapContents::Endpoints(self.contents("SLB_REVNAT")?)),
            &|| Ok(MapContents::EndpointIndex),
            &|| Ok(MapContents::Addresses(self.contents("SLB_ADDRESSES")?)),
            &|| Ok(MapContents::Filter),
        ];
        for part in parts {
            if !found(part()?) {
                break;
            }
        }
        Ok(())
    }

    /// All elements of a map.
    fn contents<K, V>(&self, map: &'static str) -> Result<Vec<(K, V)>, TableError>
    where
        K: FromBytes + IntoBytes + Copy + Ord,
        V: FromBytes + Copy,
    {
        let contents = batch::contents(&self.maps[map]);
        let mut contents = contents.map_err(|source| TableError::Batch { map, source })?;
        contents.sort_unstable_by_key(|(key, _)| *key);
        Ok(contents)
    }

    /// Those elements of an array that are in use.
    fn elements<V>(&self, map: &'static str) -> Result<Vec<(u32, V)>, TableError>
    where
        V: FromBytes + Copy + Default + PartialEq,
    {
        let mut elements = self.contents(map)?;
        elements.retain(|(_, value)| *value != V::default());
        Ok(elements)
    }

    fn backends(&self) -> MapContents {
        let records = (0..self.backends.len())
            .filter_map(|id| Some((id as u32, self.backends.load(id)?)))
            .filter(|(_, backend)| *backend != Backend::default());
        MapContents::Backends(records.collect())
    }

    fn subnets(&self) -> Result<MapContents, TableError> {
        let subnets = self.contents::<[u32; 5], u64>("SLB_SUBNETS")?.into_iter();
        let subnet = |([bits, words @ ..], interfaces): ([u32; 5], u64)| {
            ((bits, Address::from_words(words)), interfaces)
        };
        let mut subnets: Vec<_> = subnets.map(subnet).collect();
        subnets.sort_unstable();
        Ok(MapContents::Subnets(subnets))
    }

    fn acls(&self, expected: &BTreeMap<u32, Arc<Acl>>) -> Result<MapContents, TableError> {
        let found = self.contents::<[u32; 6], u32>("SLB_ACL")?.into_iter();
        let prefix = |([bits, acl, words @ ..], _): ([u32; 6], u32)| {
            (u32::from_be(acl), (bits, Address::from_words(words)))
        };
        let mut found: Vec<_> = found.map(prefix).collect();
        found.sort_unstable();
        let mut differing = Vec::new();
        let mut found = found.into_iter().peekable();
        let expected =
            expected.iter().flat_map(|(&acl, list)| list.iter().map(move |it| (acl, *it)));
        for prefix in expected {
            differing.extend(std::iter::from_fn(|| found.next_if(|it| *it < prefix)));
            if found.next_if(|it| *it == prefix).is_none() {
                differing.push(prefix);
            }
        }
        differing.extend(found);
        Ok(MapContents::Acl(differing))
    }

    fn slots(&self, schedules: &BTreeMap<u32, Arc<Schedule>>) -> Result<MapContents, TableError> {
        /// Chunks of one system call.
        const CHUNKS: usize = 64;
        let name = "SLB_SLOTS";
        let mut differing = Vec::new();
        let mut keys = [0_u32; CHUNKS];
        let mut values = vec![Chunk { slots: [0; CHUNK_SLOTS] }; CHUNKS];
        for (&first, schedule) in schedules {
            let chunks: Vec<&[u32]> = schedule.chunks().collect();
            let mut done = 0;
            while done < chunks.len() {
                let count = CHUNKS.min(chunks.len() - done);
                let mut cursor = batch::ahead_of(first + done as u32);
                let (keys, to) = (&mut keys[..count], values.as_mut_ptr().cast());
                // SAFETY: there is room for so many chunks.
                let read = unsafe { batch::lookup(&self.maps[name], &mut cursor, keys, to) };
                let (read, _) = read.map_err(|source| TableError::Batch { map: name, source })?;
                if read == 0 {
                    break;
                }
                let chunks = chunks[done..].iter().zip(&values[..read]).enumerate();
                let others = chunks.filter(|(_, (wanted, found))| !found.slots.starts_with(wanted));
                let others = others.map(|(index, _)| (first, Arc::clone(schedule), done + index));
                differing.extend(others);
                done += read;
            }
        }
        Ok(MapContents::Slots(differing))
    }
}
