//! The kernel's links and neighbours, held in memory, and what an event changes in them.
//!
//! Pure: no sockets here. An event that leaves every next hop as it was is no change, however
//! often a neighbour goes from reachable to stale and back.

use std::{collections::HashMap, net::IpAddr};

use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{
        InfoKind, InfoPortKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
    },
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
        NeighbourState,
    },
    route::RouteProtocol,
};

use super::OWNER;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// An interface of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its Ethernet address; zeros if it has none.
    pub mac: Mac,
    /// Largest packet, from the IP header on, in bytes.
    pub mtu: u32,
    /// Switched on, and with a carrier.
    pub up: bool,
    /// Packets on it have Ethernet headers.
    pub is_ethernet: bool,
    /// One end of a pair.
    pub is_veth: bool,
    /// The bridge or bond that it is a port of.
    pub master: Option<u32>,
    /// For a VLAN, `macvlan` or `ipvlan`: the interface of this namespace that it is on top of.
    pub lower: Option<u32>,
}

/// What has changed in the kernel's network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetworkChange {
    /// A route, a policy rule or a next-hop object.
    pub routes: bool,
    /// A neighbour got its first MAC, or another one, or has none any more.
    pub neighbours: bool,
    /// A neighbour that *had* a MAC has another one or none: a remembered MAC may be wrong.
    pub moved: bool,
    /// An interface appeared, vanished, or changed its name, MAC, MTU or state.
    pub links: bool,
    /// An address of this host.
    pub addresses: bool,
}

impl NetworkChange {
    /// What must be assumed after events were lost.
    pub const EVERYTHING: Self =
        Self { routes: true, neighbours: true, moved: true, links: true, addresses: true };

    /// Whether anything has changed.
    #[must_use]
    pub fn any(self) -> bool {
        self != Self::default()
    }

    /// Whether an answer that the kernel gave earlier, to anybody, may be wrong now.
    ///
    /// A neighbour's first resolution is not such a change: no entry can have its MAC yet.
    #[must_use]
    pub fn outdates_answers(self) -> bool {
        self.routes || self.links || self.moved || self.addresses
    }

    /// Whether route look-ups must be repeated.
    pub(super) fn outdates_routes(self) -> bool {
        self.routes || self.links || self.addresses
    }

    pub(super) fn merge(&mut self, other: Self) {
        self.routes |= other.routes;
        self.neighbours |= other.neighbours;
        self.moved |= other.moved;
        self.links |= other.links;
        self.addresses |= other.addresses;
    }
}

/// An entry of the neighbour table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Neighbour {
    /// Where the kernel would send packets; `None` while that is unknown.
    pub(super) mac: Option<Mac>,
    /// The kernel keeps it resolved without traffic.
    pub(super) managed: bool,
    /// Made by this program.
    pub(super) ours: bool,
    /// Someone else decides what it is: permanent, or put there by a control plane.
    pub(super) fixed: bool,
}

/// Interface index and address.
pub(super) type NeighbourKey = (u32, IpAddr);

/// Links and neighbours.
#[derive(Debug, Default)]
pub(super) struct Tables {
    pub(super) interfaces: HashMap<u32, Interface>,
    pub(super) neighbours: HashMap<NeighbourKey, Neighbour>,
}

impl Tables {
    /// Takes in an event or a line of a dump.
    pub(super) fn apply(&mut self, message: &RouteNetlinkMessage) -> NetworkChange {
        match message {
            RouteNetlinkMessage::NewLink(link) if is_link(link) => self.put_link(link),
            RouteNetlinkMessage::DelLink(link) if is_link(link) => self.drop_link(link),
            RouteNetlinkMessage::NewNeighbour(neighbour) => match key(neighbour) {
                Some(key) => self.put_neighbour(key, Some(parse_neighbour(neighbour))),
                None => NetworkChange::default(),
            },
            RouteNetlinkMessage::DelNeighbour(neighbour) => match key(neighbour) {
                Some(key) => self.put_neighbour(key, None),
                None => NetworkChange::default(),
            },
            _ => NetworkChange::default(),
        }
    }

    fn put_link(&mut self, message: &LinkMessage) -> NetworkChange {
        let index = message.header.index;
        let before = self.interfaces.get(&index);
        let now = parse_link(message, before);
        let links = before != Some(&now);
        self.interfaces.insert(index, now);
        NetworkChange { links, ..NetworkChange::default() }
    }

    fn drop_link(&mut self, message: &LinkMessage) -> NetworkChange {
        let index = message.header.index;
        let links = self.interfaces.remove(&index).is_some();
        self.neighbours.retain(|(interface, _), _| *interface != index);
        NetworkChange { links, ..NetworkChange::default() }
    }

    fn put_neighbour(&mut self, key: NeighbourKey, now: Option<Neighbour>) -> NetworkChange {
        let before = match now {
            Some(now) => self.neighbours.insert(key, now),
            None => self.neighbours.remove(&key),
        };
        let before = before.and_then(|neighbour| neighbour.mac);
        let neighbours = before != now.and_then(|neighbour| neighbour.mac);
        let moved = neighbours && before.is_some();
        NetworkChange { neighbours, moved, ..NetworkChange::default() }
    }
}

/// Takes in the netlink messages that `bytes` begin with, for `tests/fuzz`.
#[cfg(feature = "fuzzing")]
pub fn fuzz_messages(mut bytes: &[u8]) {
    use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};

    let mut tables = Tables::default();
    while let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) {
        let len = message.header.length as usize;
        if let NetlinkPayload::InnerMessage(inner) = &message.payload {
            let _ = tables.apply(inner);
            if let RouteNetlinkMessage::NewRoute(route) = inner {
                super::resolve::fuzz_route(route);
            }
        }
        // Messages begin at multiples of four bytes.
        let next = len.next_multiple_of(4);
        if len == 0 || next > bytes.len() {
            break;
        }
        bytes = &bytes[next..];
    }
}

/// Not about a bridge's port: such a message says nothing of the link itself, and its deletion
/// only means that the link has left the bridge.
fn is_link(message: &LinkMessage) -> bool {
    message.header.interface_family == AddressFamily::Unspec
}

/// What a message leaves out (some events carry one attribute only) stays as it was. But one that names the interface
/// is whole.
fn parse_link(message: &LinkMessage, before: Option<&Interface>) -> Interface {
    let running = LinkFlags::Up | LinkFlags::LowerUp;
    let mut interface = before.cloned().unwrap_or_else(|| Interface {
        index: message.header.index,
        name: String::new(),
        mac: Mac::default(),
        mtu: 0,
        up: false,
        is_ethernet: false,
        is_veth: false,
        master: None,
        lower: None,
    });
    if message.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::IfName(_))) {
        interface.master = master(message);
        interface.lower = lower(message);
    }
    interface.up = message.header.flags.contains(running);
    interface.is_ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::LinkInfo(infos) => {
                interface.is_veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth));
            }
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            LinkAttribute::Address(address) => {
                interface.mac = Mac::try_from(address.as_slice()).unwrap_or_default();
            }
            _ => {}
        }
    }
    interface
}

/// Not that of a VRF, which only says which routes count.
fn master(message: &LinkMessage) -> Option<u32> {
    let is_of_vrf = |info: &LinkInfo| matches!(info, LinkInfo::PortKind(InfoPortKind::Vrf));
    let mut master = None;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Controller(index) => master = Some(*index),
            LinkAttribute::LinkInfo(infos) if infos.iter().any(is_of_vrf) => return None,
            _ => {}
        }
    }
    master
}

fn lower(message: &LinkMessage) -> Option<u32> {
    let is_on_top = |info: &LinkInfo| {
        matches!(info, LinkInfo::Kind(InfoKind::Vlan | InfoKind::MacVlan | InfoKind::IpVlan))
    };
    let (mut lower, mut is_stacked) = (None, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Link(index) => lower = Some(*index),
            // The number is that of another namespace.
            LinkAttribute::LinkNetNsId(_) => return None,
            LinkAttribute::LinkInfo(infos) => is_stacked = infos.iter().any(is_on_top),
            _ => {}
        }
    }
    lower.filter(|_| is_stacked)
}

/// `None` for entries that are not IP neighbours: a bridge's forwarding entries, and proxy entries.
fn key(message: &NeighbourMessage) -> Option<NeighbourKey> {
    if message.header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    })?;
    Some((message.header.ifindex, address))
}

fn parse_neighbour(message: &NeighbourMessage) -> Neighbour {
    let state = message.header.state;
    // The states in which the kernel sends without asking first (`NUD_VALID`).
    let usable = matches!(
        state,
        NeighbourState::Permanent
            | NeighbourState::Noarp
            | NeighbourState::Reachable
            | NeighbourState::Probe
            | NeighbourState::Stale
            | NeighbourState::Delay
    );
    let mut neighbour = Neighbour {
        mac: None,
        managed: false,
        ours: false,
        fixed: matches!(state, NeighbourState::Permanent | NeighbourState::Noarp)
            || message.header.flags.contains(NeighbourFlags::ExtLearned),
    };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(address) if usable => {
                neighbour.mac = Mac::try_from(address.as_slice()).ok();
            }
            NeighbourAttribute::ExtFlags(flags) => {
                neighbour.managed = flags.contains(NeighbourExtFlags::Managed);
            }
            NeighbourAttribute::Protocol(protocol) => {
                neighbour.ours = *protocol == RouteProtocol::Other(OWNER);
            }
            _ => {}
        }
    }
    neighbour
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 1];
    const OTHER_MAC: Mac = [2, 0, 0, 0, 0, 2];

    fn neighbour(state: NeighbourState, mac: Mac) -> RouteNetlinkMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = 7;
        message.header.state = state;
        let address = NeighbourAddress::Inet([10, 0, 0, 1].into());
        message.attributes.push(NeighbourAttribute::Destination(address));
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        RouteNetlinkMessage::NewNeighbour(message)
    }

    fn deleted(message: RouteNetlinkMessage) -> RouteNetlinkMessage {
        match message {
            RouteNetlinkMessage::NewNeighbour(message) => {
                RouteNetlinkMessage::DelNeighbour(message)
            }
            RouteNetlinkMessage::NewLink(message) => RouteNetlinkMessage::DelLink(message),
            other => other,
        }
    }

    fn link(family: AddressFamily, attributes: Vec<LinkAttribute>) -> RouteNetlinkMessage {
        let mut message = LinkMessage::default();
        message.header.interface_family = family;
        message.header.index = 7;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.header.flags = LinkFlags::Up | LinkFlags::LowerUp;
        message.attributes = attributes;
        RouteNetlinkMessage::NewLink(message)
    }

    #[test]
    fn given_a_resolved_neighbour_when_events_arrive_then_only_another_mac_or_none_is_a_change() {
        let none = NetworkChange::default();
        let moved = NetworkChange { neighbours: true, moved: true, ..none };
        let cases = [
            ("stale", neighbour(NeighbourState::Stale, MAC), none),
            ("delay", neighbour(NeighbourState::Delay, MAC), none),
            ("probe", neighbour(NeighbourState::Probe, MAC), none),
            ("permanent", neighbour(NeighbourState::Permanent, MAC), none),
            ("another MAC", neighbour(NeighbourState::Reachable, OTHER_MAC), moved),
            ("failed", neighbour(NeighbourState::Failed, MAC), moved),
            ("deleted", deleted(neighbour(NeighbourState::Stale, MAC)), moved),
        ];
        for (case, event, expected) in cases {
            let mut tables = Tables::default();
            tables.apply(&neighbour(NeighbourState::Reachable, MAC));

            assert_eq!(tables.apply(&event), expected, "{case}");
        }
    }

    #[test]
    fn given_no_neighbour_when_it_is_resolved_then_nothing_remembered_is_outdated() {
        let mut tables = Tables::default();
        assert!(!tables.apply(&neighbour(NeighbourState::Incomplete, MAC)).any());

        let change = tables.apply(&neighbour(NeighbourState::Reachable, MAC));

        assert!(change.neighbours);
        assert!(!change.outdates_answers());
    }

    #[test]
    fn given_a_link_when_messages_arrive_then_only_what_packets_see_is_a_change() {
        let whole = || {
            let mac = LinkAttribute::Address(MAC.to_vec());
            vec![LinkAttribute::IfName("wan0".into()), LinkAttribute::Mtu(1500), mac]
        };
        let unspec = AddressFamily::Unspec;
        let cases = [
            ("the same again", link(unspec, whole()), false),
            ("nothing but a queue length", link(unspec, vec![LinkAttribute::TxQueueLen(5)]), false),
            ("MTU", link(unspec, vec![LinkAttribute::Mtu(9000)]), true),
            ("MAC", link(unspec, vec![LinkAttribute::Address(OTHER_MAC.to_vec())]), true),
            ("left a bridge", deleted(link(AddressFamily::Bridge, whole())), false),
            ("deleted", deleted(link(unspec, whole())), true),
        ];
        for (case, event, expected) in cases {
            let mut tables = Tables::default();
            tables.apply(&link(unspec, whole()));

            assert_eq!(tables.apply(&event).links, expected, "{case}");
        }
    }
}
