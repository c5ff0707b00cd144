//! By which interfaces packets come, in sets of the program's interfaces.

use std::{collections::BTreeMap, net::IpAddr};

use slb_common::abi::{Address, Interface, MAX_INTERFACES, OwnMac, RevNat, Roles};

use super::Inputs;
use crate::{
    net::{self, Ingress},
    state::Subnets,
};

/// The records of interfaces. One that is known keeps its number; sets of interfaces mean those.
#[must_use]
pub fn interfaces<'a>(
    served: impl Iterator<Item = &'a net::Interface>,
    installed: &BTreeMap<u32, Interface>,
) -> BTreeMap<u32, Interface> {
    let mut interfaces = BTreeMap::new();
    let mut used: u64 = installed.values().map(Interface::set).fold(0, |all, set| all | set);
    for &net::Interface { index: ifindex, mac, .. } in served {
        let number = installed.get(&ifindex).map_or(used.trailing_ones(), |known| known.number);
        let number = number.min(MAX_INTERFACES as u32 - 1);
        let interface = Interface { ifindex, number, redirect: 1, mac, spare: [0; 2] };
        used |= interface.set();
        interfaces.insert(ifindex, interface);
    }
    interfaces
}

/// The set of the interfaces that packets of a device come by.
fn set_of(device: u32, ingress: &Ingress, interfaces: &BTreeMap<u32, Interface>) -> u64 {
    let behind = ingress.devices.iter().filter(|(_, devices)| devices.contains(&device));
    let behind = behind.filter_map(|(index, _)| interfaces.get(index));
    behind.fold(0, |all, interface| all | interface.set())
}

/// The connected subnets that are behind interfaces of the program.
pub(super) fn subnets(ingress: &Ingress, interfaces: &BTreeMap<u32, Interface>) -> Subnets {
    let mut subnets = Subnets::new();
    for &(device, network, prefix_len) in &ingress.subnets {
        let set = set_of(device, ingress, interfaces);
        if set != 0 {
            *subnets.entry(subnet(network, prefix_len)).or_default() |= set;
        }
    }
    subnets
}

/// How many bits of an address count, and the address without the others.
fn subnet(network: IpAddr, prefix_len: u8) -> (u32, Address) {
    let bits = u32::from(prefix_len) + if network.is_ipv4() { 96 } else { 0 };
    let host = u128::MAX.checked_shr(bits).unwrap_or(0);
    let address = u128::from_be_bytes(Address::from(network).bytes) & !host;
    (bits, Address { bytes: address.to_be_bytes() })
}

/// The MAC addresses of this host besides those of the interfaces themselves.
pub(super) fn macs(ingress: &Ingress) -> BTreeMap<OwnMac, u32> {
    let macs = ingress.macs.iter();
    macs.map(|&(ifindex, mac)| (OwnMac { ifindex, mac, spare: [0; 2] }, 1)).collect()
}

/// By which interface a backend's packets come, and the set of all; `before` is what holds as long as the kernel has
/// not said.
pub(super) fn of_backend(
    addr: Address,
    ingress: &Ingress,
    interfaces: &BTreeMap<u32, Interface>,
    before: Option<&RevNat>,
) -> (u32, u64) {
    let Some(outputs) = ingress.backends.get(&IpAddr::from(addr)) else {
        return before.map_or((0, 0), |before| (before.ingress, before.interfaces));
    };
    let sets = outputs.iter().map(|&output| set_of(output, ingress, interfaces));
    let set = sets.fold(0, |all, set| all | set);
    let mut only = interfaces.values().filter(|interface| interface.set() & set != 0);
    let ingress = match (only.next(), only.next()) {
        (Some(only), None) => only.ifindex,
        _ => 0,
    };
    (ingress, set)
}

/// What the gateway's own addresses are, and those that a subnet's packets to all have.
pub(super) fn addresses(inputs: &Inputs<'_>) -> impl Iterator<Item = (Address, Roles)> {
    let locals = inputs.locals.iter().map(|&local| (local.into(), Roles::LOCAL));
    let broadcasts = inputs.ingress.broadcasts.iter();
    locals.chain(broadcasts.map(|&addr| (addr.into(), Roles::BROADCAST)))
}
