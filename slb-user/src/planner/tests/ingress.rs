//! By which interfaces packets come.

use std::collections::{BTreeSet, HashMap};

use slb_common::abi::RevNat;

use super::*;
use crate::net;

fn served(index: u32, last: u8) -> net::Interface {
    net::Interface {
        index,
        name: format!("eth{index}"),
        mac: [2, 0, 0, 0, 0, last],
        mtu: 1500,
        up: true,
        is_ethernet: true,
        is_veth: false,
        master: None,
        lower: None,
    }
}

fn ingress(world: &mut World) -> &mut Ingress {
    Arc::make_mut(&mut world.ingress)
}

/// Interfaces 2 and 3, on which there are VLAN 20 and 30.
fn world(config: &Config) -> World {
    let mut world = World::new(config);
    world.interfaces = interfaces([served(2, 2), served(3, 3)].iter(), &BTreeMap::new());
    ingress(&mut world).devices =
        [(2, BTreeSet::from([2, 20])), (3, BTreeSet::from([3, 30]))].into_iter().collect();
    world
}

#[test]
fn given_interfaces_when_others_come_and_go_then_each_keeps_its_number() {
    let first = interfaces([served(7, 1), served(9, 2)].iter(), &BTreeMap::new());
    let numbers = |of: &BTreeMap<u32, Interface>| -> Vec<_> {
        of.values().map(|interface| (interface.ifindex, interface.number)).collect()
    };
    assert_eq!(numbers(&first), [(7, 0), (9, 1)]);
    let second = interfaces([served(3, 3), served(9, 4)].iter(), &first);
    assert_eq!(numbers(&second), [(3, 2), (9, 1)], "a number is not given away at once");
    assert_eq!(second[&9].mac, [2, 0, 0, 0, 0, 4]);
    let third = interfaces([served(9, 4), served(3, 3), served(5, 1)].iter(), &second);
    assert_eq!(numbers(&third), [(3, 2), (5, 0), (9, 1)]);
}

#[test]
fn given_routes_to_backends_when_planned_then_their_packets_come_by_the_interfaces_of_these() {
    let config = config([three()]);
    let cases = [
        (vec![3], (3, 0b10)),
        (vec![30], (3, 0b10)),
        (vec![2, 30], (0, 0b11)),
        (vec![8], (0, 0)),
        (vec![], (0, 0)),
    ];
    for (outputs, expected) in cases {
        let mut world = world(&config);
        ingress(&mut world).backends = HashMap::from([(addr("10.0.0.1"), outputs.clone())]);
        let state = world.desired();
        let of = |host: &str| {
            let of = |(at, _): &(&Endpoint, &RevNat)| at.addr == Address::from(addr(host));
            let (_, origin) = state.endpoints.iter().find(of).unwrap();
            (origin.ingress, origin.interfaces)
        };
        assert_eq!(of("10.0.0.1"), expected, "{outputs:?}");
        assert_eq!(of("10.0.0.2"), (0, 0), "the kernel has not said");
    }
}

#[test]
fn given_installed_origins_when_the_kernel_does_not_say_then_they_stay() {
    let config = config([three()]);
    let mut world = world(&config);
    ingress(&mut world).backends = HashMap::from([(addr("10.0.0.1"), vec![3])]);
    world.installed = world.desired();
    ingress(&mut world).backends.clear();

    assert_eq!(world.desired().endpoints, world.installed.endpoints);
}

#[test]
fn given_subnets_when_planned_then_those_behind_an_interface_say_which() {
    let config = config([three()]);
    let mut world = world(&config);
    ingress(&mut world).subnets = vec![
        (2, addr("192.0.2.1"), 24),
        (30, addr("10.0.0.1"), 8),
        (3, addr("10.7.0.1"), 8),
        (2, addr("2001:db8::1"), 64),
        (8, addr("172.16.0.1"), 16),
        (2, addr("10.0.0.1"), 8),
    ];
    ingress(&mut world).broadcasts = vec![addr("192.0.2.255")];
    ingress(&mut world).macs = BTreeSet::from([(2, [0, 0, 0x5e, 0, 1, 7])]);

    let state = world.desired();

    let expected = [
        ((96 + 24, addr("192.0.2.0").into()), 0b01),
        ((96 + 8, addr("10.0.0.0").into()), 0b11),
        ((64, addr("2001:db8::").into()), 0b01),
    ];
    assert_eq!(state.subnets, expected.into());
    assert_eq!(state.addresses[&addr("192.0.2.255").into()], Roles::BROADCAST);
    let mac = abi::OwnMac { ifindex: 2, mac: [0, 0, 0x5e, 0, 1, 7], spare: [0; 2] };
    assert_eq!(state.macs, [(mac, 1)].into());
}
