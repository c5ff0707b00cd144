//! Which VIP lives on which interface, and the writes that lead there. Pure.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr},
};

use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressProtocol};

use crate::net::{Error, Interface, OWNER};

/// An address of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// Interface.
    pub(super) index: u32,
    /// The address itself.
    pub(super) address: IpAddr,
    /// An address of the connected subnet: the peer's on point-to-point links.
    pub(super) network: IpAddr,
    /// Of the connected subnet.
    pub(super) prefix_len: u8,
    /// Its broadcast address, if it is not the last of the subnet.
    pub(super) broadcast: Option<Ipv4Addr>,
    /// Put there by this program.
    pub(super) own: bool,
}

impl Held {
    /// `None` if the message has no unicast address.
    pub(super) fn parse(message: &AddressMessage) -> Option<Self> {
        let (mut local, mut network, mut broadcast, mut own) = (None, None, None, false);
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(address) => local = Some(*address),
                AddressAttribute::Address(address) => network = Some(*address),
                AddressAttribute::Broadcast(address) => broadcast = Some(*address),
                AddressAttribute::Protocol(protocol) => {
                    own = *protocol == AddressProtocol::Other(OWNER);
                }
                _ => {}
            }
        }
        // IPv6 names a peer or nothing, IPv4 always names both.
        let address = local.or(network)?;
        let (index, prefix_len) = (message.header.index, message.header.prefix_len);
        let network = network.unwrap_or(address);
        Some(Self { index, address, network, prefix_len, broadcast, own })
    }

    fn connects(&self, address: IpAddr) -> bool {
        self.prefix_len < host_prefix(address)
            && bits(self.network).zip_family(bits(address)).is_some_and(|(network, address)| {
                // Both are aligned to the top, so the lengths of the families do not matter.
                self.prefix_len == 0 || (network ^ address) >> (128 - self.prefix_len) == 0
            })
    }
}

/// What to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// The interface that each VIP is announced on.
    pub(super) places: Vec<(IpAddr, u32)>,
    /// To be done first, so that a VIP that moves is never without an interface.
    pub(super) add: Vec<(IpAddr, u32)>,
    pub(super) remove: Vec<Held>,
}

/// The writes that lead from `held` to every VIP being held once.
///
/// A VIP belongs on the first of the interfaces with a connected subnet around it, the narrowest
/// subnet winning, otherwise on the first interface. An address that the administrator configured
/// already serves, wherever it is.
pub(super) fn plan(
    vips: &[IpAddr],
    interfaces: &[Interface],
    held: &[Held],
) -> Result<Plan, Error> {
    let mut plan = Plan::default();
    let mut kept = HashSet::new();
    let mut seen = HashSet::new();
    for &vip in vips.iter().filter(|&&vip| seen.insert(vip)) {
        let home = home(vip, interfaces, held).ok_or(Error::NoInterface)?;
        let foreign = || held.iter().filter(|held| held.address == vip && !held.own);
        if foreign().next().is_some() {
            // One on `lo`, say, is announced where the subnet is.
            let usable = foreign().find(|held| interfaces.iter().any(|i| i.index == held.index));
            plan.places.push((vip, usable.map_or(home, |held| held.index)));
            continue;
        }
        plan.places.push((vip, home));
        kept.insert((vip, home));
        let here = |held: &Held| {
            held.address == vip && held.index == home && held.prefix_len == host_prefix(vip)
        };
        if !held.iter().any(here) {
            plan.add.push((vip, home));
        }
    }
    let stays = |held: &Held| {
        held.prefix_len == host_prefix(held.address) && kept.contains(&(held.address, held.index))
    };
    plan.remove = held.iter().filter(|held| held.own && !stays(held)).cloned().collect();
    Ok(plan)
}

fn home(vip: IpAddr, interfaces: &[Interface], held: &[Held]) -> Option<u32> {
    let narrowest = |interface: &Interface| {
        held.iter()
            .filter(|held| held.index == interface.index && !held.own && held.connects(vip))
            .map(|held| held.prefix_len)
            .max()
    };
    let mut best: Option<(&Interface, Option<u8>)> = None;
    for interface in interfaces {
        let prefix = narrowest(interface);
        if best.is_none_or(|(_, so_far)| prefix > so_far) {
            best = Some((interface, prefix));
        }
    }
    best.map(|(interface, _)| interface.index)
}

/// The prefix length that stands for one address.
pub(super) fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// An address as a number whose first bit is the highest.
struct Bits {
    is_v4: bool,
    value: u128,
}

fn bits(address: IpAddr) -> Bits {
    match address {
        IpAddr::V4(v4) => Bits { is_v4: true, value: u128::from(v4.to_bits()) << 96 },
        IpAddr::V6(v6) => Bits { is_v4: false, value: v6.to_bits() },
    }
}

impl Bits {
    /// Both numbers, if they are of one family.
    fn zip_family(self, other: Self) -> Option<(u128, u128)> {
        (self.is_v4 == other.is_v4).then_some((self.value, other.value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAN: u32 = 2;
    const LAN: u32 = 3;
    const LO: u32 = 1;

    fn interfaces() -> [Interface; 2] {
        [(WAN, "wan0"), (LAN, "lan0")].map(|(index, name)| Interface {
            index,
            name: name.into(),
            mac: [2; 6],
            mtu: 1500,
            up: true,
            is_ethernet: true,
            is_veth: false,
            master: None,
            lower: None,
        })
    }

    fn held(index: u32, cidr: &str, own: bool) -> Held {
        let (address, prefix) = cidr.split_once('/').unwrap();
        let address = address.parse().unwrap();
        let prefix_len = prefix.parse().unwrap();
        Held { index, address, network: address, prefix_len, broadcast: None, own }
    }

    #[test]
    fn given_addresses_when_a_vip_is_planned_then_it_gets_its_place_and_nothing_else_is_touched() {
        let subnets = || {
            vec![
                held(LO, "127.0.0.1/8", false),
                held(WAN, "203.0.113.1/24", false),
                held(LAN, "10.0.0.1/8", false),
                held(LAN, "2001:db8:10::1/64", false),
            ]
        };
        let with = |more: Held| [subnets(), vec![more]].concat();
        let cases = [
            ("in the second subnet", "10.9.9.9", subnets(), LAN, true, vec![]),
            ("in the first subnet", "203.0.113.10", subnets(), WAN, true, vec![]),
            ("in none", "198.51.100.1", subnets(), WAN, true, vec![]),
            ("IPv6", "2001:db8:10::99", subnets(), LAN, true, vec![]),
            ("narrower wins", "10.1.2.3", with(held(WAN, "10.1.2.1/24", false)), WAN, true, vec![]),
            ("there", "10.9.9.9", with(held(LAN, "10.9.9.9/32", true)), LAN, false, vec![]),
            (
                "on the wrong interface",
                "10.9.9.9",
                with(held(WAN, "10.9.9.9/32", true)),
                LAN,
                true,
                vec![held(WAN, "10.9.9.9/32", true)],
            ),
            ("someone's", "10.9.9.9", with(held(WAN, "10.9.9.9/24", false)), WAN, false, vec![]),
            (
                "someone's on lo",
                "10.9.9.9",
                with(held(LO, "10.9.9.9/32", false)),
                LAN,
                false,
                vec![],
            ),
            (
                "an old VIP",
                "203.0.113.10",
                with(held(WAN, "203.0.113.9/32", true)),
                WAN,
                true,
                vec![held(WAN, "203.0.113.9/32", true)],
            ),
        ];
        for (case, vip, held, place, added, removed) in cases {
            let vip: IpAddr = vip.parse().unwrap();

            let plan = plan(&[vip, vip], &interfaces(), &held).unwrap();

            assert_eq!(plan.places, [(vip, place)], "{case}");
            assert_eq!(plan.add, if added { vec![(vip, place)] } else { vec![] }, "{case}");
            assert_eq!(plan.remove, removed, "{case}");
        }
    }
}
