//! `SLB_FILTER`: spares most packets a look-up of their addresses.

use std::{
    collections::{BTreeMap, HashSet},
    sync::atomic::{AtomicU8, Ordering},
};

use slb_common::{
    abi::{Address, FILTER_HASHES, FILTER_PER_BYTE, Filter, Roles},
    hash,
};

use super::{Pins, TableError, memory::Memory};

/// What the addresses of each hash are to us, together.
#[derive(Debug)]
pub(super) struct RoleFilter {
    memory: Memory<Filter>,
    /// Those of each hash.
    addresses: BTreeMap<usize, Vec<Address>>,
}

impl RoleFilter {
    /// Opens the pinned filter.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub(super) fn open(pins: &Pins) -> Result<Self, TableError> {
        Ok(Self { memory: Memory::open(pins, "SLB_FILTER")?, addresses: BTreeMap::new() })
    }

    /// Writes all of it.
    pub(super) fn fill(&mut self, roles: &BTreeMap<Address, Roles>) {
        for &addr in roles.keys() {
            self.addresses.entry(hash::filter(addr)).or_default().push(addr);
        }
        let ours: HashSet<usize> =
            self.addresses.keys().map(|hash| hash / FILTER_PER_BYTE).collect();
        for number in 0..FILTER_HASHES / FILTER_PER_BYTE {
            self.write(number, if ours.contains(&number) { self.byte(number, roles) } else { 0 });
        }
    }

    /// Writes what has changed with `addr`, given what all addresses are now.
    pub(super) fn set(&mut self, addr: Address, roles: &BTreeMap<Address, Roles>) {
        let hash = hash::filter(addr);
        let addresses = self.addresses.entry(hash).or_default();
        addresses.retain(|known| *known != addr);
        if roles.contains_key(&addr) {
            addresses.push(addr);
        }
        let number = hash / FILTER_PER_BYTE;
        self.write(number, self.byte(number, roles));
    }

    /// What the addresses of the hashes in a byte are.
    fn byte(&self, number: usize, roles: &BTreeMap<Address, Roles>) -> u8 {
        (0..FILTER_PER_BYTE).fold(0, |byte, place| {
            let addresses = self.addresses.get(&(number * FILTER_PER_BYTE + place));
            let known = addresses.into_iter().flatten().filter_map(|addr| roles.get(addr));
            let all = known.copied().collect::<Roles>() & Roles::FILTERED;
            byte | (all.bits() as u8) << (2 * place)
        })
    }

    fn write(&self, number: usize, value: u8) {
        let filter = self.memory.first();
        // SAFETY: a byte of the mapping, which is only accessed in this way.
        let byte = unsafe { AtomicU8::from_ptr(&raw mut (*filter.as_ptr()).roles[number]) };
        byte.store(value, Ordering::Release);
    }
}
