//! `SLB_FILTER`: spares most packets a look-up of their addresses.

use std::{
    collections::{BTreeMap, HashSet},
    sync::atomic::{AtomicU8, Ordering},
};

use slb_common::{
    abi::{self, Address, FILTER_HASHES, FILTER_PER_BYTE, Filter, Interface, NETWORK_BYTES, Roles},
    hash,
};

use super::{Pins, TableError, memory::Memory};
use crate::state::Subnets;

/// What the addresses of each hash are to us, together.
#[derive(Debug)]
pub(super) struct RoleFilter {
    memory: Memory<Filter>,
    /// What was written to [`Filter::roles`].
    roles: Vec<u8>,
    /// What was written to [`Filter::elsewhere`], by the place of an interface.
    elsewhere: BTreeMap<usize, Vec<u8>>,
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
        Ok(Self {
            memory: Memory::open(pins, "SLB_FILTER")?,
            roles: vec![0; FILTER_HASHES / FILTER_PER_BYTE],
            elsewhere: BTreeMap::new(),
            addresses: BTreeMap::new(),
        })
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

    /// Says of each interface in which networks there are subnets that are not behind it.
    pub(super) fn set_subnets(&mut self, subnets: &Subnets, interfaces: &BTreeMap<u32, Interface>) {
        let mut places = BTreeMap::<usize, Vec<u8>>::new();
        for (&ifindex, interface) in interfaces {
            let place = places.entry(abi::ingress_place(ifindex));
            let networks = place.or_insert_with(|| vec![0; NETWORK_BYTES]);
            for (subnet, _) in subnets.iter().filter(|(_, set)| *set & interface.set() == 0) {
                for network in networks_of(*subnet) {
                    networks[network / 8] |= 1 << (network % 8);
                }
            }
        }
        self.elsewhere = places;
        self.audit_subnets();
    }

    /// Compares it with what was written, and writes again what differs: addresses, and how many bytes.
    pub(super) fn audit(&self) -> (Vec<Address>, usize) {
        let mut addresses = Vec::new();
        let mut count = self.audit_subnets();
        for (number, &value) in self.roles.iter().enumerate() {
            let byte = self.role(number);
            if byte.load(Ordering::Relaxed) != value {
                byte.store(value, Ordering::Release);
                let first = number * FILTER_PER_BYTE;
                let known = self.addresses.range(first..first + FILTER_PER_BYTE);
                addresses.extend(known.flat_map(|(_, addresses)| addresses));
                count += 1;
            }
        }
        (addresses, count)
    }

    fn audit_subnets(&self) -> usize {
        let mut count = 0;
        for (place, networks) in &self.elsewhere {
            let first = place * NETWORK_BYTES;
            for (byte, &value) in (first..).zip(networks) {
                let filter = self.memory.first();
                // SAFETY: a byte of the mapping, which is only accessed in this way.
                let byte =
                    unsafe { AtomicU8::from_ptr(&raw mut (*filter.as_ptr()).elsewhere[byte]) };
                if byte.load(Ordering::Relaxed) != value {
                    byte.store(value, Ordering::Release);
                    count += 1;
                }
            }
        }
        count
    }

    /// What the addresses of the hashes in a byte are.
    fn byte(&self, number: usize, roles: &BTreeMap<Address, Roles>) -> u8 {
        (0..FILTER_PER_BYTE).fold(0, |byte, place| {
            let addresses = self.addresses.get(&(number * FILTER_PER_BYTE + place));
            let known = addresses.into_iter().flatten().filter_map(|addr| roles.get(addr));
            let all = known.copied().collect::<Roles>().filtered();
            byte | (all.bits() as u8) << (2 * place)
        })
    }

    fn write(&mut self, number: usize, value: u8) {
        self.roles[number] = value;
        self.role(number).store(value, Ordering::Release);
    }

    fn role(&self, number: usize) -> &AtomicU8 {
        let filter = self.memory.first();
        // SAFETY: a byte of the mapping, which is only accessed in this way.
        unsafe { AtomicU8::from_ptr(&raw mut (*filter.as_ptr()).roles[number]) }
    }
}

/// The networks, by [`hash::network`], that addresses of a subnet are in.
fn networks_of((bits, addr): (u32, Address)) -> impl Iterator<Item = usize> {
    let is_v4 = bits >= 96 && addr.is_v4();
    let network = move |addr: u128| hash::network(Address { bytes: addr.to_be_bytes() }, is_v4);
    // Below the first bits that tell networks apart.
    let (told, shift) = if is_v4 { (96 + 16, 16) } else { (32, 96) };
    let missing = told.max(bits) - bits;
    // Fewer bits than the half of IPv6's: nearly all networks are among them, whose hashes need not be computed.
    let all = (missing > 16).then_some(0..1 << 16);
    let first = u128::from_be_bytes(addr.bytes);
    let some = (missing <= 16).then(|| 0..1_u128 << missing);
    let some = some.into_iter().flatten().map(move |of| network(first | of << shift));
    all.into_iter().flatten().chain(some)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, net::IpAddr};

    use super::*;

    #[test]
    fn given_subnets_when_their_networks_are_named_then_each_address_is_in_one() {
        let cases = [
            ("10.0.0.0", 24, 1, ["10.0.0.7", "10.0.255.255"]),
            ("10.0.0.0", 8, 256, ["10.0.0.1", "10.255.0.1"]),
            ("0.0.0.0", 0, 65_536, ["1.2.3.4", "255.0.0.1"]),
            ("2001:db8::", 64, 1, ["2001:db8::1", "2001:db8:ffff::1"]),
            ("2001:db0::", 28, 16, ["2001:db8::1", "2001:dbf:ffff::1"]),
            ("2000::", 3, 65_536, ["2001:db8::1", "3fff::1"]),
        ];
        for (subnet, prefix, networks, inside) in cases {
            let subnet: IpAddr = subnet.parse().unwrap();
            let bits = prefix + if subnet.is_ipv4() { 96 } else { 0 };
            let found: BTreeSet<usize> = networks_of((bits, subnet.into())).collect();
            assert_eq!(found.len(), networks, "{subnet}/{prefix}");
            for addr in inside {
                let addr: IpAddr = addr.parse().unwrap();
                let network = hash::network(addr.into(), addr.is_ipv4());
                assert!(found.contains(&network), "{addr} in {subnet}/{prefix}");
            }
        }
    }
}
