//! Asks the whole link where a neighbour is, by a broadcast ARP request or a multicast neighbour solicitation.
//!
//! The kernel doubts an entry that it holds only after a while, and then asks at the MAC address that it knows. An answer
//! to a question that this program asks changes the kernel's entry, and until then the entry stays as it is.

use std::{io, net::IpAddr};

use etherparse::{ArpEthIpv4Packet, ArpOperation, Icmpv6Type, PacketBuilder};

use super::{Mac, NextHop, Wire};

const HOP_LIMIT: u8 = 255;
/// Source link-layer address, and its length in units of 8 bytes.
const OPTION: [u8; 2] = [1, 1];

impl Wire {
    /// Asks for the neighbour of a next hop; says whether there is something to ask for. Where the kernel knows no MAC
    /// address, it asks by itself.
    ///
    /// # Errors
    ///
    /// The frame could not be sent.
    pub fn ask(&self, hop: &NextHop) -> io::Result<bool> {
        let NextHop::Resolved { ifindex, neighbour, src_mac, source: Some(source), .. } = *hop
        else {
            return Ok(false);
        };
        let Some(frame) = question(src_mac, source, neighbour) else { return Ok(false) };
        self.send(ifindex, &frame).map(|()| true)
    }
}

/// `None`: the addresses are of different families.
fn question(mac: Mac, source: IpAddr, neighbour: IpAddr) -> Option<Vec<u8>> {
    let mut frame = Vec::new();
    match (source, neighbour) {
        (IpAddr::V4(source), IpAddr::V4(neighbour)) => {
            let arp = ArpEthIpv4Packet {
                operation: ArpOperation::REQUEST,
                sender_mac: mac,
                sender_ipv4: source.octets(),
                target_mac: Mac::default(),
                target_ipv4: neighbour.octets(),
            };
            PacketBuilder::ethernet2(mac, [0xff; 6]).arp(arp.into()).write(&mut frame).ok()?;
        }
        (IpAddr::V6(source), IpAddr::V6(neighbour)) => {
            // RFC 4291, section 2.7.1: the solicited-node address, and its MAC address (RFC 2464, section 7).
            let [.., a, b, c] = neighbour.octets();
            let group = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c];
            let body = [&neighbour.octets()[..], &OPTION, &mac].concat();
            PacketBuilder::ethernet2(mac, [0x33, 0x33, 0xff, a, b, c])
                .ipv6(source.octets(), group, HOP_LIMIT)
                .icmpv6(Icmpv6Type::NeighborSolicitation)
                .write(&mut frame, &body)
                .ok()?;
        }
        _ => return None,
    }
    Some(frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_sent_to_the_whole_link_and_name_the_neighbour() {
        let mac = [2, 0, 0, 0, 0, 1];
        let cases = [
            ("10.0.0.1", "10.0.0.11", [0xff; 6], 42),
            ("2001:db8::1", "2001:db8::1:203", [0x33, 0x33, 0xff, 1, 2, 3], 86),
        ];
        for (source, neighbour, to, length) in cases {
            let neighbour: IpAddr = neighbour.parse().unwrap();
            let frame = question(mac, source.parse().unwrap(), neighbour).unwrap();
            assert_eq!((&frame[..6], &frame[6..12], frame.len()), (&to[..], &mac[..], length));
            let target = match neighbour {
                IpAddr::V4(address) => address.octets().to_vec(),
                IpAddr::V6(address) => address.octets().to_vec(),
            };
            assert!(frame.windows(target.len()).any(|part| part == target), "{frame:?}");
        }
        assert_eq!(question(mac, "10.0.0.1".parse().unwrap(), "::1".parse().unwrap()), None);
    }
}
