//! By which interfaces packets come: the devices behind an interface, the MAC addresses that frames to this host have
//! there, and the subnets and addresses that a source tells.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr},
};

use super::{
    HostAddress, Interface, Network,
    tables::{Mac, Tables},
};

/// What the kernel knows about where packets come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ingress {
    /// By index of a served interface: those whose packets come by it, itself included.
    pub devices: BTreeMap<u32, BTreeSet<u32>>,
    /// MAC addresses of this host besides the interface's own, each with a served interface that its frames come by.
    pub macs: BTreeSet<(u32, Mac)>,
    /// The connected subnets: interface, address, and how many bits of that count.
    pub subnets: Vec<(u32, IpAddr, u8)>,
    /// Broadcast addresses of these subnets.
    pub broadcasts: Vec<IpAddr>,
    /// The output interfaces of the routes to addresses of backends.
    pub backends: HashMap<IpAddr, Vec<u32>>,
}

impl Network {
    /// What the tables say about the interfaces that are served.
    #[must_use]
    pub fn ingress(
        &self,
        served: &[Interface],
        addresses: &[HostAddress],
        backends: HashMap<IpAddr, Vec<u32>>,
    ) -> Ingress {
        let tables = self.shared.tables();
        let devices = served.iter().map(|of| (of.index, devices(&tables, of.index)));
        let devices: BTreeMap<_, _> = devices.collect();
        let macs = devices.iter().flat_map(|(&of, devices)| macs(&tables, of, devices));
        Ingress {
            macs: macs.collect(),
            subnets: addresses.iter().filter_map(subnet).collect(),
            broadcasts: addresses.iter().flat_map(broadcasts).collect(),
            devices,
            backends,
        }
    }
}

/// The interfaces whose packets come by this one: what is on top of it, the bridge or bond that it is a port of, the
/// other ports of that (the kernel takes frames to any of them), and what is on top of these.
fn devices(tables: &Tables, index: u32) -> BTreeSet<u32> {
    let mut devices = BTreeSet::from([index]);
    let mut found = 0;
    while found < devices.len() {
        found = devices.len();
        for (&index, interface) in &tables.interfaces {
            let above = [interface.master, interface.lower].into_iter().flatten();
            if above.into_iter().any(|other| devices.contains(&other)) {
                devices.insert(index);
            }
            if devices.contains(&index) {
                devices.extend(interface.master);
            }
        }
    }
    devices
}

/// The MAC addresses of these devices, but that of the interface itself.
fn macs(tables: &Tables, of: u32, devices: &BTreeSet<u32>) -> BTreeSet<(u32, Mac)> {
    let own = tables.interfaces.get(&of).map(|interface| interface.mac);
    let devices = devices.iter().filter_map(|device| tables.interfaces.get(device));
    devices
        .filter(|device| device.up && device.is_ethernet && Some(device.mac) != own)
        .map(|device| (of, device.mac))
        .collect()
}

/// Not that of an address alone, nor of link-local ones, which every link has.
fn subnet(address: &HostAddress) -> Option<(u32, IpAddr, u8)> {
    let HostAddress { ifindex, network, prefix_len, .. } = *address;
    let is_subnet = match network {
        IpAddr::V4(v4) => prefix_len < 32 && !v4.is_loopback(),
        IpAddr::V6(v6) => prefix_len < 128 && !v6.is_unicast_link_local(),
    };
    is_subnet.then_some((ifindex, network, prefix_len))
}

/// As the kernel has them: the last address of a subnet that has more than two, and the one that was given.
fn broadcasts(address: &HostAddress) -> impl Iterator<Item = IpAddr> {
    let last = match address.network {
        IpAddr::V4(v4) if address.prefix_len < 31 => {
            let host = u32::MAX >> address.prefix_len;
            Some(Ipv4Addr::from(u32::from(v4) | host))
        }
        _ => None,
    };
    [last, address.broadcast].into_iter().flatten().map(IpAddr::V4)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(index: u32, master: Option<u32>, lower: Option<u32>) -> Interface {
        Interface {
            index,
            name: format!("eth{index}"),
            mac: [2, 0, 0, 0, 0, index as u8],
            mtu: 1500,
            up: true,
            is_ethernet: true,
            is_veth: false,
            master,
            lower,
        }
    }

    fn tables(interfaces: &[Interface]) -> Tables {
        let interfaces = interfaces.iter().map(|of| (of.index, of.clone())).collect();
        Tables { interfaces, ..Tables::default() }
    }

    #[test]
    fn given_devices_on_top_of_others_when_asked_for_an_interface_then_all_that_come_by_it_are_found()
     {
        let plain = tables(&[interface(1, None, None), interface(2, None, None)]);
        let stacked = tables(&[
            interface(1, None, None),
            interface(2, None, Some(1)),
            interface(3, None, Some(2)),
            interface(4, None, None),
        ]);
        let bridged = tables(&[
            interface(1, Some(9), None),
            interface(2, Some(9), None),
            interface(3, None, Some(9)),
            interface(4, None, None),
            interface(9, None, None),
        ]);
        let cases = [
            ("alone", &plain, 1, vec![1]),
            ("a macvlan on a VLAN", &stacked, 1, vec![1, 2, 3]),
            ("the VLAN", &stacked, 2, vec![2, 3]),
            ("another", &stacked, 4, vec![4]),
            ("a port", &bridged, 1, vec![1, 2, 3, 9]),
            ("the bridge", &bridged, 9, vec![1, 2, 3, 9]),
        ];
        for (case, tables, of, expected) in cases {
            assert_eq!(devices(tables, of), expected.into_iter().collect(), "{case}");
        }
    }

    #[test]
    fn given_a_virtual_mac_when_its_device_is_up_then_frames_to_it_are_ours() {
        let mut vrrp = interface(2, None, Some(1));
        vrrp.mac = [0, 0, 0x5e, 0, 1, 7];
        let same = Interface { mac: [2, 0, 0, 0, 0, 1], ..interface(3, None, Some(1)) };
        let down = Interface { up: false, ..interface(4, None, Some(1)) };
        let tables = tables(&[interface(1, None, None), vrrp.clone(), same, down]);

        let found = macs(&tables, 1, &devices(&tables, 1));

        assert_eq!(found, BTreeSet::from([(1, vrrp.mac)]));
    }

    #[test]
    fn given_addresses_of_this_host_when_asked_then_subnets_and_broadcasts_are_the_kernels() {
        let cases = [
            ("10.0.0.1", 24, None, true, vec!["10.0.0.255"]),
            ("10.0.0.1", 24, Some("10.0.0.0"), true, vec!["10.0.0.255", "10.0.0.0"]),
            ("10.0.0.1", 31, None, true, vec![]),
            ("203.0.113.10", 32, None, false, vec![]),
            ("127.0.0.1", 8, None, false, vec!["127.255.255.255"]),
            ("2001:db8::1", 64, None, true, vec![]),
            ("2001:db8::1", 128, None, false, vec![]),
            ("fe80::1", 64, None, false, vec![]),
        ];
        for (address, prefix_len, broadcast, is_subnet, expected) in cases {
            let network: IpAddr = address.parse().unwrap();
            let broadcast = broadcast.map(|address: &str| address.parse().unwrap());
            let held = HostAddress { ifindex: 7, address: network, network, prefix_len, broadcast };
            let expected: Vec<IpAddr> = expected.iter().map(|addr| addr.parse().unwrap()).collect();

            assert_eq!(subnet(&held).is_some(), is_subnet, "{address}/{prefix_len}");
            assert_eq!(broadcasts(&held).collect::<Vec<_>>(), expected, "{address}/{prefix_len}");
        }
    }
}
