//! Sends both ends of a TCP connection a segment that they answer with a challenge ACK.
//!
//! Where a connection is in its sequence numbers only its ends know, and a reset with another number is no reset
//! (RFC 5961, section 3). But an end answers a segment that does not fit by an acknowledgement of where it is (RFC
//! 9293, section 3.10.7.4), and that the packet path answers with a reset that fits.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use etherparse::PacketBuilder;
use slb_common::abi::Flow;
use socket2::{Domain, Protocol, Socket, Type};
use tracing::debug;

use crate::rights::RAW_SOCKET;

/// The ends of a connection that is to be reset.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionEnds {
    /// What the client talks to, and the client.
    pub to_client: (SocketAddr, SocketAddr),
    /// Who the backend believes to talk to, and the backend; `None`: it answers by itself.
    pub to_backend: Option<(SocketAddr, SocketAddr)>,
}

impl ConnectionEnds {
    /// Those of an entry; `backend` is the address and port, `source` what replaces the client's address. A backend
    /// with `is_direct` has the client's packets as they are, which the kernel here cannot send it.
    #[must_use]
    pub fn new(flow: &Flow, backend: SocketAddr, source: Option<IpAddr>, is_direct: bool) -> Self {
        let client = SocketAddr::new(flow.src.into(), flow.sport);
        let vip = SocketAddr::new(flow.dst.into(), flow.dport);
        let inside = SocketAddr::new(source.unwrap_or(client.ip()), flow.port);
        Self { to_client: (vip, client), to_backend: (!is_direct).then_some((inside, backend)) }
    }
}

/// Makes the ends of connections send challenge ACKs. Connections for which that fails end by their own timeouts.
///
/// # Errors
///
/// No raw sockets.
pub fn send_challenge_acks(connections: &[ConnectionEnds]) -> io::Result<()> {
    let raw = Some(Protocol::from(libc::IPPROTO_RAW));
    let open = |domain| RAW_SOCKET.during(|| Socket::new(domain, Type::RAW, raw));
    let (v4, v6) = (open(Domain::IPV4)?, open(Domain::IPV6)?);
    for connection in connections {
        for (from, to) in [Some(connection.to_client), connection.to_backend].into_iter().flatten()
        {
            // Half of all numbers apart, so that one of them at least is far from the right one.
            for sequence in [0, 1 << 31] {
                let Some(segment) = segment(from, to, sequence) else { continue };
                // Raw sockets of IPv6 take a port for a protocol.
                let there = SocketAddr::new(to.ip(), 0).into();
                let sent = if to.is_ipv4() { &v4 } else { &v6 }.send_to(&segment, &there);
                if let Err(error) = sent {
                    debug!(%from, %to, %error, "cannot reset");
                }
            }
        }
    }
    Ok(())
}

/// An acknowledgement without data.
fn segment(from: SocketAddr, to: SocketAddr, sequence: u32) -> Option<Vec<u8>> {
    const TTL: u8 = 64;
    let packet = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), TTL),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), TTL),
        _ => return None,
    };
    let packet = packet.tcp(from.port(), to.port(), sequence, 0).ack(sequence);
    let mut bytes = Vec::with_capacity(packet.size(0));
    packet.write(&mut bytes, &[]).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_both_families_when_a_segment_is_made_then_its_checksums_are_right() {
        for (from, to) in [("192.0.2.1:80", "198.51.100.7:4000"), ("[::1]:80", "[::2]:4000")] {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            let segment = segment(from, to, 7).unwrap();
            let packet = etherparse::PacketHeaders::from_ip_slice(&segment).unwrap();
            let tcp = packet.transport.unwrap().tcp().unwrap();
            assert!(tcp.ack && !tcp.rst && !tcp.syn);
            assert_eq!((tcp.source_port, tcp.destination_port), (80, 4_000));
            let sum = match packet.net.unwrap() {
                etherparse::NetHeaders::Ipv4(ip, _) => tcp.calc_checksum_ipv4(&ip, &[]),
                etherparse::NetHeaders::Ipv6(ip, _) => tcp.calc_checksum_ipv6(&ip, &[]),
                etherparse::NetHeaders::Arp(_) => panic!("not ARP"),
            };
            assert_eq!(sum.unwrap(), tcp.checksum);
        }
        assert_eq!(segment("[::1]:80".parse().unwrap(), "192.0.2.1:80".parse().unwrap(), 7), None);
    }
}
