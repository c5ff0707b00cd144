//! A TCP client whose segments the test writes itself.
//!
//! No kernel has its addresses, so none resets its connections.

use std::{
    cell::Cell,
    io::Read as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use etherparse::{PacketBuilder, SlicedPacket, TcpHeader, TransportSlice};
use slb_lab::{Host, Netns, Topology};
use socket2::{Domain, Protocol, Socket, Type};

use super::output;

/// Its IPv4 address, beside the clients.
pub(crate) const V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 66);
/// Its IPv6 address, beside the clients.
pub(crate) const V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x66);
/// Source ports are taken in order, from here on.
const FIRST_PORT: u16 = 10_000;

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const PSH: u8 = 8;
pub(crate) const ACK: u8 = 16;
pub(crate) const URG: u8 = 32;

/// Captures the IPv4 and IPv6 packets that a host receives.
pub(crate) struct Tap([Socket; 2]);

/// A TCP segment as it was received.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub flags: u8,
    pub sequence: u32,
    pub acknowledgement: u32,
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
}

/// A segment to send, but for its ports and numbers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Parts<'a> {
    pub flags: u8,
    pub urgent: u16,
    /// A multiple of four bytes.
    pub options: &'a [u8],
    pub payload: &'a [u8],
}

impl Parts<'_> {
    /// A segment without options or data.
    pub(crate) fn of(flags: u8) -> Self {
        Self { flags, ..Self::default() }
    }
}

/// The client: it sends and receives on the device of another host.
pub(crate) struct RawClient {
    sockets: [Socket; 2],
    tap: Tap,
    next_port: Cell<u16>,
}

impl Segment {
    /// Its options, each with kind and length, as far as a receiver reads them. End and no operation are left out.
    pub(crate) fn options(&self) -> Vec<&[u8]> {
        let (mut left, mut found) = (&self.options[..], Vec::new());
        while let [kind, rest @ ..] = left {
            left = match (*kind, rest) {
                (1, _) => rest,
                (2.., [len, ..]) if (2..=left.len()).contains(&usize::from(*len)) => {
                    let (option, rest) = left.split_at(usize::from(*len));
                    found.push(option);
                    rest
                }
                _ => break,
            };
        }
        found
    }
}

impl Tap {
    /// Starts to listen.
    pub(crate) fn new(netns: &Netns) -> Self {
        let open = |kind: i32| {
            let kind = u16::try_from(kind).unwrap().to_be();
            let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(i32::from(kind).into()));
            let socket = socket.unwrap();
            socket.set_recv_buffer_size(4 << 20).unwrap();
            socket
        };
        Self(netns.run(|| [libc::ETH_P_IP, libc::ETH_P_IPV6].map(open)).unwrap())
    }

    /// The next TCP segment of a family, if one comes before `deadline`.
    pub(crate) fn next(&self, is_v4: bool, deadline: Instant) -> Option<Segment> {
        let mut socket = &self.0[usize::from(!is_v4)];
        let mut packet = vec![0; 1 << 16];
        loop {
            // Zero would mean no limit.
            let left = deadline.saturating_duration_since(Instant::now());
            socket.set_nonblocking(left.is_zero()).unwrap();
            socket.set_read_timeout(Some(left.max(Duration::from_millis(1)))).unwrap();
            let Ok(len) = socket.read(&mut packet) else {
                if left.is_zero() {
                    return None;
                }
                // Looks once more, without waiting.
                continue;
            };
            if let Some(segment) = segment(&packet[..len]) {
                return Some(segment);
            }
        }
    }
}

/// Reads a packet; `None` if it is not TCP.
fn segment(packet: &[u8]) -> Option<Segment> {
    let packet = SlicedPacket::from_ip(packet).ok()?;
    let Some(TransportSlice::Tcp(tcp)) = packet.transport else { return None };
    let (from, to): (IpAddr, IpAddr) = match packet.net? {
        etherparse::NetSlice::Ipv4(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into())
        }
        etherparse::NetSlice::Ipv6(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into())
        }
        etherparse::NetSlice::Arp(_) => return None,
    };
    Some(Segment {
        from: (from, tcp.source_port()).into(),
        to: (to, tcp.destination_port()).into(),
        flags: tcp.slice()[13],
        sequence: tcp.sequence_number(),
        acknowledgement: tcp.acknowledgment_number(),
        options: tcp.options().to_vec(),
        payload: tcp.payload().to_vec(),
    })
}

impl RawClient {
    /// Joins the network of `host`, and tells the gateway where its addresses are.
    pub(crate) fn new(topology: &Topology, host: &Host) -> Self {
        let links = output(&host.netns, "ip", &["-json", "link", "show", "eth0"]);
        let links: serde_json::Value = serde_json::from_str(&links).unwrap();
        let mac = links[0]["address"].as_str().unwrap();
        for address in [V4.to_string(), V6.to_string()] {
            let neighbour = format!("neigh replace {address} lladdr {mac} nud permanent dev wan0");
            topology.gateway.ip(&neighbour).unwrap();
        }
        let netns: &Arc<Netns> = &host.netns;
        // With this number, packets are sent with the IP header that they begin with.
        let open = |domain| {
            Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))).unwrap()
        };
        Self {
            sockets: netns.run(|| [Domain::IPV4, Domain::IPV6].map(open)).unwrap(),
            tap: Tap::new(netns),
            next_port: Cell::new(FIRST_PORT),
        }
    }

    /// Its address in the family of `to`, with a port that it has not used before.
    pub(crate) fn source(&self, to: SocketAddr) -> SocketAddr {
        let port = self.next_port.get();
        self.next_port.set(port + 1);
        let address: IpAddr = if to.is_ipv4() { V4.into() } else { V6.into() };
        (address, port).into()
    }

    /// Sends a segment.
    pub(crate) fn send(
        &self,
        from: SocketAddr,
        to: SocketAddr,
        (sequence, acknowledgement): (u32, u32),
        parts: Parts<'_>,
    ) {
        let mut tcp = TcpHeader::new(from.port(), to.port(), sequence, 64_240);
        tcp.acknowledgment_number = acknowledgement;
        tcp.urgent_pointer = parts.urgent;
        for (flag, field) in [
            (FIN, &mut tcp.fin),
            (SYN, &mut tcp.syn),
            (RST, &mut tcp.rst),
            (PSH, &mut tcp.psh),
            (ACK, &mut tcp.ack),
            (URG, &mut tcp.urg),
        ] {
            *field = parts.flags & flag != 0;
        }
        tcp.set_options_raw(parts.options).unwrap();
        let builder = match (from.ip(), to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                PacketBuilder::ipv4(from.octets(), to.octets(), 64)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                PacketBuilder::ipv6(from.octets(), to.octets(), 64)
            }
            families => panic!("two families: {families:?}"),
        };
        let mut packet = Vec::new();
        builder.tcp_header(tcp).write(&mut packet, parts.payload).unwrap();
        let socket = &self.sockets[usize::from(to.is_ipv6())];
        // The port has to be 0: over IPv6 it would be a protocol.
        socket.send_to(&packet, &SocketAddr::new(to.ip(), 0).into()).unwrap();
    }

    /// The next segment from `peer` to `own`, if one comes before `deadline`.
    pub(crate) fn receive(
        &self,
        own: SocketAddr,
        peer: SocketAddr,
        deadline: Instant,
    ) -> Option<Segment> {
        loop {
            let segment = self.tap.next(own.is_ipv4(), deadline)?;
            if (segment.from, segment.to) == (peer, own) {
                return Some(segment);
            }
        }
    }
}
