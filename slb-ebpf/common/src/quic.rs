//! What a load balancer may know of QUIC: RFC 8999, and the format of connection IDs that
//! draft-ietf-quic-load-balancers calls "plaintext".
//!
//! A client chooses the first ID that it sends, at random; what it sends later has one that the server has
//! issued. Such an ID says which server that was if it has this form:
//!
//! ```text
//! octet 0      bits 7 to 5: 0, the number of this configuration; bits 4 to 0: anything
//! octets 1, 2  the server ID, in network order
//! octets 3 …   at least 5 octets that cannot be guessed
//! ```

use network_types::udp::UdpHdr;

use crate::{frame::Frame, parse::Packet};

/// The first bit of a header: the connection is being established.
const LONG: u8 = 1 << 7;
/// Bits of an ID's first octet that say by which configuration it was made.
const CONFIGURATION: u8 = 0b111 << 5;
/// So many octets of an ID count. Servers that issue shorter ones are beyond help: short headers do not say how
/// long an ID is.
const LEN: usize = 8;

/// The ID of the connection that a datagram belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionId {
    /// Its first eight octets; [`crate::hash::choice_of_id`] of them chooses a slot.
    pub id: u64,
    /// The server ID in it, if its form is the one above.
    pub server: Option<u32>,
}

/// Reads the destination connection ID of the QUIC packet in a datagram, if there is one.
#[must_use]
#[inline(always)]
pub fn connection_id(frame: &Frame<'_>, packet: &Packet) -> Option<ConnectionId> {
    let at = packet.l4 as usize + UdpHdr::LEN;
    let first = frame.header::<1>(at)?.get::<u8>(0);
    if first & LONG != 0 {
        // Version, length of the ID, and the ID.
        let header = frame.header::<{ 6 + LEN }>(at)?;
        if usize::from(header.get::<u8>(5)) < LEN {
            return None;
        }
        let id = octets([header.get(6), header.get(10)]);
        return Some(ConnectionId { id, server: None });
    }
    let header = frame.header::<{ 1 + LEN }>(at)?;
    let id = octets([header.get(1), header.get(5)]);
    let configuration = header.get::<u8>(1) & CONFIGURATION;
    let server = (configuration == 0).then(|| header.get_be16(2).into());
    Some(ConnectionId { id, server })
}

/// `id` as it stands in the frame.
#[inline(always)]
const fn octets([first, second]: [u32; 2]) -> u64 {
    (first.to_le() as u64) << 32 | second.to_le() as u64
}

#[cfg(test)]
mod tests {
    use std::{vec, vec::Vec};

    use super::*;

    /// A datagram with this payload, and what is known of it.
    fn read(payload: &[u8]) -> Option<ConnectionId> {
        let packet = Packet { l4: 34, ..Packet::default() };
        let mut frame = vec![0; 34 + UdpHdr::LEN];
        frame.extend(payload);
        connection_id(&Frame::from_slice(&mut frame), &packet)
    }

    fn short(id: [u8; 8]) -> Vec<u8> {
        [&[0x40], &id[..], &[7; 20]].concat()
    }

    fn long(id: [u8; 8], len: u8) -> Vec<u8> {
        [&[0xc0, 0, 0, 0, 1, len], &id[..], &[7; 20]].concat()
    }

    #[test]
    fn given_an_id_of_the_form_when_the_header_is_short_then_it_names_the_server() {
        let id = |first, [high, low]: [u8; 2]| [first, high, low, 1, 2, 3, 4, 5];
        let server = |payload: Vec<u8>| read(&payload).map(|id| id.server);
        assert_eq!(server(short(id(0x00, [0, 7]))), Some(Some(7)));
        assert_eq!(server(short(id(0x1f, [0xab, 0xcd]))), Some(Some(0xabcd)), "low bits are free");
        assert_eq!(server(short(id(0x20, [0, 7]))), Some(None), "of another configuration");
        assert_eq!(server(short(id(0xe0, [0, 7]))), Some(None), "not routable");
        assert_eq!(server(long(id(0x00, [0, 7]), 8)), Some(None), "chosen by the client");
    }

    #[test]
    fn given_an_id_when_read_from_either_header_then_the_choice_is_the_same() {
        let id = [0xe3, 1, 2, 3, 4, 5, 6, 7];
        let choice = |payload: Vec<u8>| read(&payload).map(|id| id.id);
        assert_eq!(choice(short(id)), choice(long(id, 8)));
        assert_eq!(choice(long(id, 8)), choice(long(id, 20)), "the first octets count");
        for octet in 0..8 {
            let mut other = id;
            other[octet] ^= 1;
            assert_ne!(choice(short(id)), choice(short(other)), "octet {octet}");
        }
    }

    #[test]
    fn given_what_is_no_quic_when_read_then_there_is_no_id() {
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[0x40, 1, 2, 3, 4, 5, 6, 7]), None, "too short");
        assert_eq!(read(&long([9; 8], 7)), None, "an ID that is too short");
        assert_eq!(read(&long([9; 8], 8)[..13]), None, "ends within the ID");
    }
}
