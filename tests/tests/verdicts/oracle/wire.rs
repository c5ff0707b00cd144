//! What a frame says, read by the RFCs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;
const IPIP: u8 = 4;
const IPV6_IN_IP: u8 = 41;
/// Generic UDP Encapsulation, as this gateway sends it.
const GUE_PORT: u16 = 6080;
/// UDP header, and that of GUE.
const GUE_LEN: usize = 8 + 4;

pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

/// Which part of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Part {
    Whole,
    First,
    Later,
}

/// An Ethernet frame with an IP packet in it.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub to_mac: [u8; 6],
    pub from_mac: [u8; 6],
    pub tags: Vec<u8>,
    pub src: IpAddr,
    pub dst: IpAddr,
    pub proto: u8,
    pub part: Part,
    /// Identification, of fragments.
    pub id: u32,
    /// From the transport header to the end of the IP packet.
    pub l4: Vec<u8>,
}

/// A TCP segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Reads a frame, with up to two VLAN tags. `None`: there is no whole IP header.
pub(crate) fn frame(bytes: &[u8]) -> Option<Packet> {
    let mut at = 12;
    while at < 20 && matches!(be16(bytes, at)?, 0x8100 | 0x88a8 | 0x9100) {
        at += 4;
    }
    let rest = bytes.get(at + 2..)?;
    let mut packet = match be16(bytes, at)? {
        0x0800 => v4(rest)?,
        0x86dd => v6(rest)?,
        _ => return None,
    };
    packet.to_mac = bytes[..6].try_into().ok()?;
    packet.from_mac = bytes[6..12].try_into().ok()?;
    packet.tags = bytes[12..at].to_vec();
    Some(packet)
}

fn packet(src: IpAddr, dst: IpAddr, proto: u8, part: (Part, u32), l4: &[u8]) -> Packet {
    Packet {
        to_mac: [0; 6],
        from_mac: [0; 6],
        tags: Vec::new(),
        src,
        dst,
        proto,
        part: part.0,
        id: part.1,
        l4: l4.to_vec(),
    }
}

/// RFC 791. What is behind the packet's length is not of it.
fn v4(bytes: &[u8]) -> Option<Packet> {
    let first = *bytes.first()?;
    let header = usize::from(first & 15) * 4;
    if first >> 4 != 4 || header < 20 || bytes.len() < header {
        return None;
    }
    let end = usize::from(be16(bytes, 2)?).min(bytes.len());
    let fragment = be16(bytes, 6)?;
    let part = match (fragment & 0x1fff, fragment & 0x2000 != 0) {
        (0, false) => Part::Whole,
        (0, true) => Part::First,
        _ => Part::Later,
    };
    let address = |at: usize| -> Option<IpAddr> { Some(Ipv4Addr::from(be32(bytes, at)?).into()) };
    let id = be16(bytes, 4)?.into();
    Some(packet(address(12)?, address(16)?, bytes[9], (part, id), bytes.get(header..end)?))
}

/// RFC 8200, with the extension headers that are in front of a transport header.
fn v6(bytes: &[u8]) -> Option<Packet> {
    if bytes.first()? >> 4 != 6 {
        return None;
    }
    let end = (40 + usize::from(be16(bytes, 4)?)).min(bytes.len());
    let address = |at: usize| -> Option<IpAddr> {
        Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?).into())
    };
    let (mut next, mut at) = (*bytes.get(6)?, 40);
    let (mut part, mut id) = (Part::Whole, 0);
    loop {
        match next {
            0 | 43 | 60 => {
                next = *bytes.get(at)?;
                at += 8 * (1 + usize::from(*bytes.get(at + 1)?));
            }
            44 => {
                next = *bytes.get(at)?;
                let fragment = be16(bytes, at + 2)?;
                id = be32(bytes, at + 4)?;
                part = match (fragment >> 3, fragment & 1) {
                    (0, 0) => Part::Whole,
                    (0, _) => Part::First,
                    _ => Part::Later,
                };
                at += 8;
                if part == Part::Later {
                    break;
                }
            }
            _ => break,
        }
    }
    Some(packet(address(8)?, address(24)?, next, (part, id), bytes.get(at..end)?))
}

impl Packet {
    /// From which address and port to which, if it is TCP or UDP and says so.
    pub(crate) fn ends(&self) -> Option<(SocketAddr, SocketAddr)> {
        if self.part == Part::Later || !matches!(self.proto, TCP | UDP) {
            return None;
        }
        let (sport, dport) = (be16(&self.l4, 0)?, be16(&self.l4, 2)?);
        Some((SocketAddr::new(self.src, sport), SocketAddr::new(self.dst, dport)))
    }

    /// The TCP segment in it.
    pub(crate) fn segment(&self) -> Option<Segment> {
        if self.proto != TCP || self.part == Part::Later {
            return None;
        }
        let header = usize::from(self.l4.get(12)? >> 4) * 4;
        Some(Segment {
            seq: be32(&self.l4, 4)?,
            ack: be32(&self.l4, 8)?,
            flags: *self.l4.get(13)?,
            options: self.l4.get(20..header)?.to_vec(),
            payload: self.l4.get(header..)?.to_vec(),
        })
    }

    /// What is behind the header of TCP or UDP.
    pub(crate) fn payload(&self) -> Option<Vec<u8>> {
        match self.proto {
            TCP => Some(self.segment()?.payload),
            UDP => Some(self.l4.get(8..)?.to_vec()),
            _ => None,
        }
    }

    /// The packet in a tunnel, with the MAC addresses of this one.
    pub(crate) fn inner(&self) -> Option<Self> {
        let skip = match self.proto {
            IPIP | IPV6_IN_IP => 0,
            UDP if be16(&self.l4, 2)? == GUE_PORT => GUE_LEN,
            _ => return None,
        };
        self.within(skip)
    }

    /// The packet that an ICMP error is about; `None`: it is no error.
    pub(crate) fn quoted(&self) -> Option<Self> {
        let kind = *self.l4.first()?;
        let is_error = match self.proto {
            ICMP => matches!(kind, 3 | 4 | 5 | 11 | 12),
            ICMPV6 => kind < 128,
            _ => false,
        };
        if is_error && self.part != Part::Later { self.within(8) } else { None }
    }

    fn within(&self, skip: usize) -> Option<Self> {
        let bytes = self.l4.get(skip..)?;
        // How long the packet was says nothing of how much of it is quoted.
        let mut bytes = bytes.to_vec();
        let found = if bytes.first()? >> 4 == 4 {
            bytes.get_mut(2..4)?.fill(0xff);
            v4(&bytes)?
        } else {
            bytes.get_mut(4..6)?.fill(0xff);
            v6(&bytes)?
        };
        let (to_mac, from_mac, tags) = (self.to_mac, self.from_mac, self.tags.clone());
        Some(Self { to_mac, from_mac, tags, ..found })
    }
}

/// An address that no client can have: none, this host, of this link, a group (RFC 6890).
pub(crate) fn is_nobody(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(it) => {
            let [first, second, ..] = it.octets();
            first == 0
                || first == 127
                || (first, second) == (169, 254)
                || (224..240).contains(&first)
                || it.is_broadcast()
        }
        IpAddr::V6(it) => {
            it.is_unspecified()
                || it.is_loopback()
                || it.segments()[0] & 0xffc0 == 0xfe80
                || it.is_multicast()
        }
    }
}
