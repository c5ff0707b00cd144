//! `SLB_LISTENER_INDEX` and `SLB_REVNAT_INDEX`: copies of the hash maps, which cost the program a fifth of what
//! those do.
//!
//! A record is written while no index names it, and the index is then replaced by one atomic store; so a
//! packet sees the old record or the new one. The old one is left alone for a while, as in `slots.rs`.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use slb_common::{
    abi::{self, Endpoint, INDEX_MANY, INDEX_NONE, INDEX_SLOTS, Index, Record},
    hash,
};
use zerocopy::FromBytes;

use super::{Pins, TableError, memory::Memory, slots::GRACE};

/// An index and its records.
pub(super) struct Indexed<V, const RECORDS: usize> {
    index: Memory<Index<V, RECORDS>>,
    /// What was written to each slot.
    words: Vec<u32>,
    /// The record of each endpoint.
    places: BTreeMap<Endpoint, u32>,
    /// Endpoints of the same hash.
    hashes: HashMap<usize, Vec<Endpoint>>,
    free: Vec<u32>,
    released: VecDeque<(Instant, u32)>,
}

impl<V: Copy + FromBytes + PartialEq, const RECORDS: usize> Indexed<V, RECORDS> {
    /// Opens the pinned map.
    pub(super) fn open(pins: &Pins, name: &'static str) -> Result<Self, TableError> {
        Ok(Self {
            index: Memory::open(pins, name)?,
            words: vec![INDEX_NONE; INDEX_SLOTS],
            free: Vec::new(),
            places: BTreeMap::new(),
            hashes: HashMap::new(),
            released: VecDeque::new(),
        })
    }

    /// Brings it in line with `entries`, those of the hash map; writes only differences.
    pub(super) fn fill(&mut self, entries: &BTreeMap<Endpoint, V>) {
        let named: HashSet<u32> = (0..INDEX_SLOTS)
            .map(|slot| self.slot(slot).load(Ordering::Acquire))
            .filter(|word| *word != INDEX_MANY)
            .flat_map(|word| <[u32; 2]>::from(abi::index_records(word)))
            .filter(|&place| place != 0)
            .collect();
        for &place in &named {
            let Some(record) = self.record(place) else { continue };
            // SAFETY: in the mapping; only one agent writes, and it is here.
            let (at, value) = unsafe { ((*record).at, (*record).value) };
            if entries.get(&at) == Some(&value) {
                self.places.insert(at, place);
            }
        }
        self.free = (1..RECORDS as u32).rev().filter(|place| !named.contains(place)).collect();
        for &endpoint in entries.keys() {
            self.hashes.entry(hash::endpoint(&endpoint)).or_default().push(endpoint);
        }
        for (&endpoint, &value) in entries {
            if !self.places.contains_key(&endpoint) {
                self.write(endpoint, value);
            }
        }
        (0..INDEX_SLOTS).for_each(|slot| self.publish(slot));
        // Those that nothing names any more.
        let used: HashSet<u32> = self.places.values().copied().collect();
        let now = Instant::now();
        self.released.extend(named.difference(&used).map(|&place| (now, place)));
    }

    /// An entry was written to the hash map.
    pub(super) fn put(&mut self, endpoint: Endpoint, value: V) {
        let slot = hash::endpoint(&endpoint);
        let endpoints = self.hashes.entry(slot).or_default();
        if !endpoints.contains(&endpoint) {
            endpoints.push(endpoint);
        }
        let before = self.places.get(&endpoint).copied();
        self.write(endpoint, value);
        self.publish(slot);
        self.released.extend(before.map(|place| (Instant::now(), place)));
    }

    /// An entry was removed from the hash map.
    pub(super) fn remove(&mut self, endpoint: &Endpoint) {
        let slot = hash::endpoint(endpoint);
        if let Some(endpoints) = self.hashes.get_mut(&slot) {
            endpoints.retain(|known| known != endpoint);
        }
        let before = self.places.remove(endpoint);
        self.publish(slot);
        self.released.extend(before.map(|place| (Instant::now(), place)));
    }

    /// Writes a record; without room for one, the hash map has to do.
    fn write(&mut self, endpoint: Endpoint, value: V) {
        while let Some((since, _)) = self.released.front()
            && since.elapsed() >= GRACE
            && let Some((_, place)) = self.released.pop_front()
        {
            self.free.push(place);
        }
        let place = self.free.pop();
        let Some((place, record)) = place.and_then(|place| Some((place, self.record(place)?)))
        else {
            self.places.remove(&endpoint);
            return;
        };
        // SAFETY: in the mapping, and the program does not read it: no place names it.
        unsafe { record.write(Record { at: endpoint, value }) };
        self.places.insert(endpoint, place);
    }

    /// Where a record is.
    fn record(&self, place: u32) -> Option<*mut Record<V>> {
        let index = self.index.first().as_ptr();
        // SAFETY: one of the mapping, whose address is taken.
        ((place as usize) < RECORDS)
            .then(|| unsafe { (&raw mut (*index).records).cast::<Record<V>>().add(place as usize) })
    }

    /// Compares it with `entries`, those of the hash map, and writes again what differs: those endpoints, and how many
    /// slots lead elsewhere.
    pub(super) fn audit<'a>(
        &mut self,
        entries: impl Iterator<Item = (&'a Endpoint, V)>,
    ) -> (Vec<Endpoint>, usize) {
        let differing = entries.filter(|(at, value)| {
            let record = self.places.get(at).and_then(|&place| self.record(place));
            // SAFETY: in the mapping; the program only reads it, and the agent writes here alone.
            record
                .is_some_and(|record| unsafe { ((*record).at, (*record).value) != (**at, *value) })
        });
        let differing: Vec<(Endpoint, V)> = differing.map(|(at, value)| (*at, value)).collect();
        for &(endpoint, value) in &differing {
            self.put(endpoint, value);
        }
        let slots = 0..INDEX_SLOTS;
        let elsewhere =
            slots.filter(|&slot| self.slot(slot).load(Ordering::Relaxed) != self.words[slot]);
        let elsewhere: Vec<usize> = elsewhere.collect();
        elsewhere.iter().for_each(|&slot| self.publish(slot));
        (differing.into_iter().map(|(at, _)| at).collect(), elsewhere.len())
    }

    fn publish(&mut self, slot: usize) {
        let place = |endpoint| self.places.get(endpoint).copied();
        let word = match self.hashes.get(&slot).map(Vec::as_slice) {
            None | Some([]) => Some(INDEX_NONE),
            Some([only]) => place(only),
            Some([one, two]) => {
                place(one).zip(place(two)).map(|(one, two)| abi::index_word(one, two))
            }
            Some(_) => None,
        };
        let word = word.unwrap_or(INDEX_MANY);
        self.words[slot] = word;
        self.slot(slot).store(word, Ordering::Release);
    }

    fn slot(&self, slot: usize) -> &AtomicU32 {
        let index = self.index.first();
        // SAFETY: a word of the mapping, which is only accessed in this way.
        unsafe { AtomicU32::from_ptr((&raw mut (*index.as_ptr()).places[slot]).cast()) }
    }
}
