//! `SLB_FILTER`: spares most packets a look-up of their addresses.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU8, Ordering},
};

use slb_common::{
    abi::{Address, FILTER_BYTES, Filter, Roles},
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
    pub fn open(pins: &Pins) -> Result<Self, TableError> {
        Ok(Self { memory: Memory::open(pins, "SLB_FILTER")?, addresses: BTreeMap::new() })
    }

    /// Writes all of it.
    pub fn fill(&mut self, roles: &BTreeMap<Address, Roles>) {
        for &addr in roles.keys() {
            self.addresses.entry(hash::address(addr)).or_default().push(addr);
        }
        for index in 0..FILTER_BYTES {
            self.write(index, roles);
        }
    }

    /// Writes what has changed with `addr`, given what all addresses are now.
    pub fn set(&mut self, addr: Address, roles: &BTreeMap<Address, Roles>) {
        let index = hash::address(addr);
        let addresses = self.addresses.entry(index).or_default();
        addresses.retain(|known| *known != addr);
        if roles.contains_key(&addr) {
            addresses.push(addr);
        }
        self.write(index, roles);
    }

    fn write(&self, index: usize, roles: &BTreeMap<Address, Roles>) {
        let addresses = self.addresses.get(&index).into_iter().flatten();
        let all = addresses.filter_map(|addr| roles.get(addr)).fold(0, |all, r| all | r.roles);
        let filter = self.memory.first();
        // SAFETY: a byte of the mapping, which is only accessed in this way.
        let byte = unsafe { AtomicU8::from_ptr((&raw mut (*filter.as_ptr()).roles[index]).cast()) };
        byte.store(all as u8, Ordering::Release);
    }
}
