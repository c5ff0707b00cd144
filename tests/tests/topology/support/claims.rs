//! A host that claims addresses which are not its own.

use std::net::{IpAddr, Ipv6Addr};

use etherparse::{
    ArpEthIpv4Packet, ArpOperation, Icmpv6Type, PacketBuilder, icmpv6::NeighborAdvertisementHeader,
};
use slb_lab::Host;
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

/// The claims have this MAC address, which no host has.
pub(crate) const MAC: [u8; 6] = [0x02, 0, 0, 0, 0xca, 0xd1];
/// As it is written.
pub(crate) const MAC_TEXT: &str = "02:00:00:00:ca:d1";

/// Sends claims from a host.
pub(crate) struct Claimer {
    socket: Socket,
    out: SockAddr,
}

impl Claimer {
    pub(crate) fn new(host: &Host) -> Self {
        let (socket, index) = host
            .netns
            .run(|| {
                let index = nix::net::if_::if_nametoindex("eth0").unwrap();
                let nothing = Some(Protocol::from(0));
                (Socket::new(Domain::PACKET, Type::RAW, nothing).unwrap(), index)
            })
            .unwrap();
        let mut storage = SockAddrStorage::zeroed();
        // SAFETY: `sockaddr_ll` is a socket address type, and plain integers throughout.
        let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
        address.sll_family = libc::AF_PACKET as libc::sa_family_t;
        address.sll_ifindex = i32::try_from(index).unwrap();
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the storage holds a `sockaddr_ll` of this length, all of it initialized.
        Self { socket, out: unsafe { SockAddr::new(storage, length) } }
    }

    /// Gratuitous ARP, or an unsolicited advertisement, from this MAC address.
    pub(crate) fn claim(&self, address: IpAddr, mac: [u8; 6]) {
        self.socket.send_to(&claim(address, mac), &self.out).unwrap();
    }
}

fn claim(address: IpAddr, mac: [u8; 6]) -> Vec<u8> {
    let mut frame = Vec::new();
    match address {
        IpAddr::V4(address) => {
            let arp = ArpEthIpv4Packet {
                operation: ArpOperation::REQUEST,
                sender_mac: mac,
                sender_ipv4: address.octets(),
                target_mac: [0; 6],
                target_ipv4: address.octets(),
            };
            let packet = PacketBuilder::ethernet2(mac, [0xff; 6]).arp(arp.into());
            packet.write(&mut frame).unwrap();
        }
        IpAddr::V6(address) => {
            let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).octets();
            let header =
                NeighborAdvertisementHeader { router: false, solicited: false, r#override: true };
            let body = [&address.octets()[..], &[2, 1], &mac].concat();
            let packet = PacketBuilder::ethernet2(mac, [0x33, 0x33, 0, 0, 0, 1])
                .ipv6(address.octets(), all_nodes, 255)
                .icmpv6(Icmpv6Type::NeighborAdvertisement(header));
            packet.write(&mut frame, &body).unwrap();
        }
    }
    frame
}
