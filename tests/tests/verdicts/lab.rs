//! A gateway without neighbours: its interfaces and routes, in a namespace of their own.

use slb_common::abi::{Interface, NextHop};
use slb_lab::Netns;

/// Index of the interface towards the clients.
pub(crate) const WAN: u32 = 11;
/// Index of the interface towards the backends.
pub(crate) const LAN: u32 = 12;
/// Index of an interface that XDP is not attached to.
pub(crate) const MGMT: u32 = 13;

pub(crate) const WAN_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
pub(crate) const LAN_MAC: [u8; 6] = [2, 0, 0, 0, 1, 2];
const MGMT_MAC: [u8; 6] = [2, 0, 0, 0, 1, 3];

/// The record of one of these interfaces, as the agent writes it.
pub(crate) fn interface(ifindex: u32) -> Interface {
    let mac = if ifindex == WAN { WAN_MAC } else { LAN_MAC };
    Interface { ifindex, number: ifindex - WAN, redirect: 1, mac, spare: [0; 2] }
}

/// The set of one of them.
pub(crate) fn set(ifindex: u32) -> u64 {
    interface(ifindex).set()
}

/// The router that leads to most clients.
pub(crate) const ROUTER: NextHop =
    NextHop { ifindex: WAN, dst_mac: [2, 0, 0, 0, 2, 1], src_mac: WAN_MAC };
/// Another one beside it, which no route leads to yet.
pub(crate) const OTHER_ROUTER: NextHop = NextHop { dst_mac: [2, 0, 0, 0, 2, 2], ..ROUTER };
/// `10.0.0.11` and `2001:db8:a::11`.
pub(crate) const FIRST: NextHop =
    NextHop { ifindex: LAN, dst_mac: [2, 0, 0, 0, 3, 1], src_mac: LAN_MAC };
/// `10.0.0.12` and `2001:db8:a::12`: on the clients' side, so that its frames leave as they came.
pub(crate) const SECOND: NextHop =
    NextHop { ifindex: WAN, dst_mac: [2, 0, 0, 0, 3, 2], src_mac: WAN_MAC };

/// The namespace. Clients of `198.51.N.0/24` and `2001:db8:N::/64` differ in the way to them:
///
/// | N | |
/// |---|---|
/// | 100 | by `ROUTER` |
/// | 101, 102, 103 | blackhole, unreachable, prohibit |
/// | 104 | by a neighbour on WAN that the kernel has not met |
/// | 105 | by a neighbour on LAN that the kernel has not met |
/// | 106 | by a neighbour on MGMT |
/// | 107 | no route |
pub(crate) fn gateway() -> Netns {
    let netns = Netns::create("verdicts").expect("root");
    let mut batch = String::new();
    let devices = [("wan0", WAN, WAN_MAC), ("lan0", LAN, LAN_MAC), ("mgmt0", MGMT, MGMT_MAC)];
    for (name, index, mac) in devices {
        batch += &format!(
            "link add {name} index {index} address {} type veth peer name {name}-peer\n\
             link set {name} addrgenmode none\n\
             link set {name}-peer addrgenmode none up\n\
             link set {name} up\n\
             addr add 192.0.{index}.254/24 dev {name}\n\
             addr add 2001:db8:ff:{index}::254/64 dev {name} nodad\n",
            text(mac),
        );
    }
    let neighbours = [
        ("wan0", WAN, 1, ROUTER.dst_mac),
        ("wan0", WAN, 2, OTHER_ROUTER.dst_mac),
        ("mgmt0", MGMT, 1, [2, 0, 0, 0, 4, 1]),
    ];
    for (name, index, host, mac) in neighbours {
        let mac = text(mac);
        batch += &format!(
            "neigh add 192.0.{index}.{host} lladdr {mac} dev {name} nud permanent\n\
             neigh add 2001:db8:ff:{index}::{host} lladdr {mac} dev {name} nud permanent\n",
        );
    }
    let routes = [(100, WAN, 1), (104, WAN, 9), (105, LAN, 9), (106, MGMT, 1)];
    for (clients, index, host) in routes {
        batch += &format!(
            "route add 198.51.{clients}.0/24 via 192.0.{index}.{host}\n\
             route add 2001:db8:{clients}::/64 via 2001:db8:ff:{index}::{host}\n",
        );
    }
    for (clients, kind) in [(101, "blackhole"), (102, "unreachable"), (103, "prohibit")] {
        batch += &format!(
            "route add {kind} 198.51.{clients}.0/24\nroute add {kind} 2001:db8:{clients}::/64\n",
        );
    }
    netns.ip(&batch).expect("devices and routes");
    for family in ["ipv4", "ipv6"] {
        forwarding(&netns, family, true);
    }
    netns
}

/// Switches the kernel's own forwarding.
pub(crate) fn forwarding(netns: &Netns, family: &str, on: bool) {
    netns
        .sysctl(&format!("{family}/conf/all/forwarding"), if on { "1" } else { "0" })
        .expect("forwarding");
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
