//! The frames that tell a link's hosts which MAC has a VIP; built by hand, bytes in order.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::net::Mac;

const BROADCAST: Mac = [0xff; 6];
/// Where IPv6 multicast to `ff02::1` (all nodes) goes on Ethernet.
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;
const IPPROTO_ICMPV6: u8 = 58;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const ROUTER: u8 = 0x80;
const OVERRIDE: u8 = 0x20;
const TARGET_LINK_LAYER_ADDRESS: u8 = 2;

/// The two forms of gratuitous ARP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::net) enum Arp {
    /// An "ARP announcement" (RFC 5227): updates hosts that have an entry already.
    Request = 1,
    /// An unasked reply (RFC 5944, section 4.6), for hosts that learn from replies only.
    Reply = 2,
}

/// `vip` is at `mac`.
pub(in crate::net) fn gratuitous_arp(form: Arp, mac: Mac, vip: Ipv4Addr) -> Vec<u8> {
    // A request has no target MAC; a reply names the one to remember.
    let target = match form {
        Arp::Request => Mac::default(),
        Arp::Reply => mac,
    };
    let mut frame = ethernet(BROADCAST, mac, ETH_P_ARP);
    frame.extend([0, 1, 0x08, 0, 6, 4, 0, form as u8]); // Ethernet, IPv4, and their lengths
    frame.extend(mac);
    frame.extend(vip.octets());
    frame.extend(target);
    frame.extend(vip.octets());
    frame
}

/// `vip` is at `mac`; replaces what neighbours knew before (RFC 4861, section 7.2.6).
pub(in crate::net) fn unsolicited_advertisement(mac: Mac, vip: Ipv6Addr, router: bool) -> Vec<u8> {
    let flags = if router { ROUTER | OVERRIDE } else { OVERRIDE };
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend(vip.octets());
    message.extend([TARGET_LINK_LAYER_ADDRESS, 1]); // length in units of 8 bytes
    message.extend(mac);
    let length = u8::try_from(message.len()).expect("an advertisement has 32 bytes");
    let checksum = checksum(&pseudo_header(vip, length), &message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    let mut frame = ethernet(ALL_NODES_MAC, mac, ETH_P_IPV6);
    // Hop limit 255 proves that no router forwarded it.
    frame.extend([0x60, 0, 0, 0, 0, length, IPPROTO_ICMPV6, 255]);
    frame.extend(vip.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

fn ethernet(to: Mac, from: Mac, kind: u16) -> Vec<u8> {
    [to.as_slice(), &from, &kind.to_be_bytes()].concat()
}

fn pseudo_header(source: Ipv6Addr, length: u8) -> Vec<u8> {
    let tail = [0, 0, 0, length, 0, 0, 0, IPPROTO_ICMPV6];
    [source.octets().as_slice(), &ALL_NODES.octets(), &tail].concat()
}

/// The Internet checksum over both parts, each of even length.
fn checksum(pseudo_header: &[u8], message: &[u8]) -> u16 {
    let words = pseudo_header.chunks(2).chain(message.chunks(2));
    let mut sum: u32 = words.map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded to 16 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0xaa, 0xbb, 0xcc];

    #[test]
    fn given_a_vip_when_announced_by_arp_then_every_field_is_in_its_place() {
        let vip = [203, 0, 113, 10];
        for (form, operation, target) in [(Arp::Request, 1, [0; 6]), (Arp::Reply, 2, MAC)] {
            let frame = gratuitous_arp(form, MAC, vip.into());

            assert_eq!(frame[..6], BROADCAST, "{form:?}");
            assert_eq!(frame[6..12], MAC, "{form:?}");
            assert_eq!(frame[12..20], [8, 6, 0, 1, 8, 0, 6, 4], "{form:?}");
            assert_eq!(frame[20..22], [0, operation], "{form:?}");
            assert_eq!(frame[22..28], MAC, "{form:?}: sender MAC");
            assert_eq!(frame[28..32], vip, "{form:?}: sender IP");
            assert_eq!(frame[32..38], target, "{form:?}: target MAC");
            assert_eq!(frame[38..], vip, "{form:?}: target IP");
        }
    }

    #[test]
    fn given_a_vip_when_advertised_then_fields_and_checksum_are_right() {
        let vip: Ipv6Addr = "2001:db8:113::10".parse().unwrap();
        for (router, flags) in [(true, 0xa0), (false, 0x20)] {
            let frame = unsolicited_advertisement(MAC, vip, router);

            assert_eq!(frame.len(), 14 + 40 + 32);
            assert_eq!(frame[..14], ethernet(ALL_NODES_MAC, MAC, 0x86dd));
            assert_eq!(frame[18..22], [0, 32, 58, 255], "length, next header, hop limit");
            assert_eq!(frame[22..38], vip.octets(), "source");
            assert_eq!(frame[38..54], ALL_NODES.octets(), "destination");
            assert_eq!((frame[54], frame[58]), (136, flags), "type, flags");
            assert_eq!(frame[62..78], vip.octets(), "target");
            assert_eq!(frame[78..], [[2, 1].as_slice(), &MAC].concat(), "option");

            // From scratch, and another way: what is checksummed adds up to all ones.
            let mut summed = frame[22..].to_vec();
            summed.extend([0, 32, 0, 58]);
            let sum = summed
                .chunks(2)
                .fold(0u64, |sum, word| sum + u64::from(u16::from_be_bytes([word[0], word[1]])));
            assert_eq!(sum % 0xffff, 0, "checksum");
        }
    }
}
