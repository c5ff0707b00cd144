//! Hears other hosts claim addresses of this one: by ARP (RFC 5227, section 2.4) and by neighbour discovery.
//!
//! A packet socket sees what XDP passes, and XDP passes ARP and neighbour discovery. The socket filter leaves frames
//! about other addresses in the kernel, so that they wake no task. What is heard here anybody on the link can forge.

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
};

use etherparse::{
    LinkSlice, NetSlice, SlicedPacket, TransportSlice,
    icmpv6::{Icmpv6PayloadSlice, NdpOptionSlice, NdpOptionsIterator},
};
use tokio::io::{Interest, unix::AsyncFd};

use self::socket::PacketSocket;
use super::Mac;

mod filter;
mod socket;

/// Longer than every claim; a longer frame is cut off and not understood.
const LONGEST_FRAME: usize = 1_536;
/// An advertisement that a router has forwarded is none (RFC 4861, section 7.1.2).
const HOP_LIMIT: u8 = 255;

/// A host says that an address is at its MAC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The address.
    pub address: IpAddr,
    /// Where it is said to be.
    pub mac: Mac,
    /// Index of the interface that heard it.
    pub ifindex: u32,
}

/// Hears the claims for some addresses.
#[derive(Debug)]
pub struct ClaimListener {
    arp: AsyncFd<PacketSocket>,
    discovery: AsyncFd<PacketSocket>,
}

impl ClaimListener {
    /// Listens on all interfaces of this network namespace, for no address yet. Needs `CAP_NET_RAW`.
    ///
    /// # Errors
    ///
    /// The system refuses a socket.
    pub fn open() -> io::Result<Self> {
        let open = |protocol| {
            let socket = PacketSocket::open(protocol, &filter::nothing())?;
            // SAFETY: the socket owns its descriptor and never hands it out; it is closed after the registration ends.
            let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
            registered.map_err(io::Error::from)
        };
        Ok(Self { arp: open(libc::ETH_P_ARP)?, discovery: open(libc::ETH_P_IPV6)? })
    }

    /// From now on only claims for these addresses are heard.
    ///
    /// # Errors
    ///
    /// The system refuses the filter.
    pub fn listen_for(&self, addresses: impl Iterator<Item = IpAddr>) -> io::Result<()> {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for address in addresses {
            match address {
                IpAddr::V4(address) => v4.push(address),
                IpAddr::V6(address) => v6.push(address),
            }
        }
        self.arp.get_ref().set_filter(&filter::arp(&v4))?;
        self.discovery.get_ref().set_filter(&filter::discovery(&v6))
    }

    /// Waits for claims, and takes at most `most` frames of each family.
    ///
    /// The filter compares parts of addresses only, so there may be claims for other addresses as well.
    ///
    /// # Errors
    ///
    /// A socket fails.
    pub async fn hear(&self, most: usize) -> io::Result<Vec<Claim>> {
        let mut ready = tokio::select! {
            ready = self.arp.readable() => ready?,
            ready = self.discovery.readable() => ready?,
        };
        let mut claims = Vec::new();
        let mut frame = [0; LONGEST_FRAME];
        for _ in 0..most {
            let received = ready.try_io(|socket| socket.get_ref().receive(&mut frame));
            let Ok(received) = received else { break };
            let (length, ifindex) = received?;
            let claim = frame.get(..length).and_then(parse);
            claims.extend(claim.map(|(address, mac)| Claim { address, mac, ifindex }));
        }
        Ok(claims)
    }
}

/// The address that a frame claims, and for which MAC.
fn parse(frame: &[u8]) -> Option<(IpAddr, Mac)> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    match (packet.net?, packet.transport) {
        (NetSlice::Arp(arp), _) => {
            // Request or reply makes no difference. A probe has no sender, and claims nothing.
            let arp = arp.to_packet().try_eth_ipv4().ok()?;
            Some((arp.sender_ipv4_addr().into(), arp.sender_mac))
        }
        (NetSlice::Ipv6(ip), Some(TransportSlice::Icmpv6(icmp))) => {
            let header = ip.header();
            if header.hop_limit() != HOP_LIMIT
                || !icmp.is_checksum_valid(header.source(), header.destination())
            {
                return None;
            }
            let LinkSlice::Ethernet2(link) = packet.link? else { return None };
            let sender = link.source();
            discovered(&icmp.payload_slice().ok()?, header.source_addr(), sender)
        }
        _ => None,
    }
}

/// What neighbours learn from a message: an advertisement says where its target is, a solicitation where its sender is.
fn discovered(
    message: &Icmpv6PayloadSlice<'_>,
    source: Ipv6Addr,
    sender: Mac,
) -> Option<(IpAddr, Mac)> {
    match message {
        Icmpv6PayloadSlice::NeighborAdvertisement(message) => {
            let mac = link_layer_address(message.options_iterator()).unwrap_or(sender);
            Some((message.target_address().into(), mac))
        }
        Icmpv6PayloadSlice::NeighborSolicitation(message) => {
            Some((source.into(), link_layer_address(message.options_iterator())?))
        }
        _ => None,
    }
}

fn link_layer_address(mut options: NdpOptionsIterator<'_>) -> Option<Mac> {
    options.find_map(|option| match option {
        Ok(NdpOptionSlice::TargetLinkLayerAddress(option)) => {
            option.link_layer_address().try_into().ok()
        }
        Ok(NdpOptionSlice::SourceLinkLayerAddress(option)) => {
            option.link_layer_address().try_into().ok()
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::announce::frames::{Arp, gratuitous_arp, unsolicited_advertisement};

    const MAC: Mac = [2, 0, 0, 0, 0, 9];

    #[test]
    fn claims_are_read_from_what_hosts_send() {
        let v4 = [203, 0, 113, 10].into();
        for form in [Arp::Request, Arp::Reply] {
            assert_eq!(parse(&gratuitous_arp(form, MAC, v4)), Some((v4.into(), MAC)), "{form:?}");
        }
        let v6 = "2001:db8:113::10".parse().unwrap();
        let frame = unsolicited_advertisement(MAC, v6, false);
        assert_eq!(parse(&frame), Some((v6.into(), MAC)));

        let mut forwarded = frame.clone();
        forwarded[21] = 254;
        let mut damaged = frame.clone();
        damaged[62] ^= 1;
        for frame in [&forwarded[..], &damaged, &frame[..60], &[]] {
            assert_eq!(parse(frame), None);
        }
    }
}
