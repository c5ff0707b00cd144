//! Frames, as the hosts around the gateway send them.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    EtherType, Ethernet2Header, IpFragOffset, IpNumber, Ipv4Header, Ipv6FragmentHeader, Ipv6Header,
    Ipv6RawExtHeader, NetSlice, SlicedPacket, TcpHeader, TransportSlice, UdpHeader,
};
use slb_common::abi::{Address, FlowKey, NextHop};

/// Length of the Ethernet header: where the network header begins.
pub(crate) const L3: usize = Ethernet2Header::LEN;

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const PSH: u8 = 0x08;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const URG: u8 = 0x20;

/// A MAC address of the gateway that is not that of an interface, as VRRP has them.
pub(crate) const VIRTUAL_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xff];

/// A frame that [`Frame::bytes`] writes out, with all lengths and checksums right.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub src_mac: [u8; 6],
    pub dst_mac: [u8; 6],
    pub src: SocketAddr,
    pub dst: SocketAddr,
    /// Or hop limit.
    pub ttl: u8,
    /// A multiple of four bytes.
    pub v4_options: Vec<u8>,
    /// In their order.
    pub extensions: Vec<Extension>,
    pub transport: Transport,
    /// TCP's sequence number.
    pub seq: u32,
    /// TCP's acknowledgement number, where the flags have it.
    pub ack: u32,
    /// TCP's window.
    pub window: u16,
    /// TCP's urgent pointer.
    pub urgent: u16,
    pub payload: Vec<u8>,
    /// Bytes behind the packet, as on a link with a minimum length.
    pub padding: usize,
}

#[derive(Clone, Debug)]
pub(crate) enum Transport {
    /// A multiple of four bytes of options.
    Tcp { flags: u8, options: Vec<u8> },
    /// Without a checksum it is 0.
    Udp { checksum: bool },
    /// Neither TCP nor UDP; the payload is everything.
    Other(IpNumber),
}

/// An IPv6 extension header.
#[derive(Clone, Debug)]
pub(crate) enum Extension {
    /// Everything from the third byte on: six bytes, or eight more, and so on.
    Raw(IpNumber, Vec<u8>),
    /// Offset in units of eight bytes, and whether more fragments follow.
    Fragment(u16, bool),
}

impl Extension {
    /// Six bytes of padding options (RFC 8200, section 4.2).
    pub(crate) fn padding(number: IpNumber) -> Self {
        Self::Raw(number, vec![1, 4, 0, 0, 0, 0])
    }

    /// An experimental routing header (RFC 4727, type 253).
    pub(crate) fn routing(segments_left: u8) -> Self {
        Self::Raw(IpNumber::IPV6_ROUTE_HEADER, vec![253, segments_left, 0, 0, 0, 0])
    }

    const fn number(&self) -> IpNumber {
        match self {
            Self::Raw(number, _) => *number,
            Self::Fragment(..) => IpNumber::IPV6_FRAGMENTATION_HEADER,
        }
    }

    fn bytes(&self, next: IpNumber) -> Vec<u8> {
        match self {
            Self::Raw(_, rest) => {
                Ipv6RawExtHeader::new_raw(next, rest).expect("whole units").to_bytes().to_vec()
            }
            &Self::Fragment(offset, more) => {
                let offset = IpFragOffset::try_new(offset).expect("13 bits");
                Ipv6FragmentHeader::new(next, offset, more, 0x1234_5678).to_bytes().to_vec()
            }
        }
    }
}

impl Frame {
    /// A SYN.
    pub(crate) fn tcp(src: SocketAddr, dst: SocketAddr) -> Self {
        Self {
            src_mac: [2, 0, 0, 0, 0, 0xfe],
            dst_mac: VIRTUAL_MAC,
            src,
            dst,
            ttl: 64,
            v4_options: Vec::new(),
            extensions: Vec::new(),
            transport: Transport::Tcp { flags: SYN, options: Vec::new() },
            seq: 0x0102_0304,
            ack: 0x0a0b_0c0d,
            window: 0xfedc,
            urgent: 0,
            payload: b"odd".to_vec(),
            padding: 0,
        }
    }

    pub(crate) fn udp(src: SocketAddr, dst: SocketAddr) -> Self {
        Self { transport: Transport::Udp { checksum: true }, ..Self::tcp(src, dst) }
    }

    /// Replaces TCP's flags.
    pub(crate) fn flags(mut self, new: u8) -> Self {
        if let Transport::Tcp { flags, .. } = &mut self.transport {
            *flags = new;
        }
        self
    }

    pub(crate) fn ttl(self, ttl: u8) -> Self {
        Self { ttl, ..self }
    }

    /// This frame on its way through `hop`.
    pub(crate) fn sent(self, hop: NextHop) -> Self {
        Self { ttl: self.ttl - 1, src_mac: hop.src_mac, dst_mac: hop.dst_mac, ..self }
    }

    /// This frame to another destination.
    pub(crate) fn to(&self, dst: SocketAddr) -> Self {
        Self { dst, ..self.clone() }
    }

    /// This frame from another source.
    pub(crate) fn from(&self, src: SocketAddr) -> Self {
        Self { src, ..self.clone() }
    }

    /// The key of its entry in the flow table.
    pub(crate) fn key(&self) -> FlowKey {
        FlowKey {
            src: Address::from(self.src.ip()),
            dst: Address::from(self.dst.ip()),
            sport: self.src.port(),
            dport: self.dst.port(),
            proto: u32::from(self.transport_number().0),
        }
    }

    /// Offset of the transport header.
    pub(crate) fn l4(&self) -> usize {
        let network = match self.src.ip() {
            IpAddr::V4(_) => Ipv4Header::MIN_LEN + self.v4_options.len(),
            IpAddr::V6(_) => Ipv6Header::LEN + self.chain().len(),
        };
        L3 + network
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let transport = self.transport();
        let (ether_type, network) = match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                (EtherType::IPV4, self.v4(src.octets(), dst.octets(), transport.len()))
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                (EtherType::IPV6, self.v6(src.octets(), dst.octets(), transport.len()))
            }
            pair => panic!("two families: {pair:?}"),
        };
        let eth = Ethernet2Header { source: self.src_mac, destination: self.dst_mac, ether_type };
        let mut bytes = [&eth.to_bytes()[..], &network, &transport].concat();
        bytes.resize(bytes.len() + self.padding, 0xee);
        bytes
    }

    fn v4(&self, source: [u8; 4], destination: [u8; 4], transport: usize) -> Vec<u8> {
        let len = u16::try_from(transport).expect("a frame of our own");
        let number = self.transport_number();
        let mut ip = Ipv4Header::new(len, self.ttl, number, source, destination)
            .expect("a frame of our own");
        ip.dscp = 0x2a.try_into().expect("6 bits");
        ip.ecn = 2.try_into().expect("2 bits");
        ip.identification = 0xbeef;
        ip.dont_fragment = true;
        ip.options = self.v4_options.as_slice().try_into().expect("whole words");
        ip.set_payload_len(transport).expect("a frame of our own");
        ip.header_checksum = ip.calc_header_checksum();
        ip.to_bytes().to_vec()
    }

    fn v6(&self, source: [u8; 16], destination: [u8; 16], transport: usize) -> Vec<u8> {
        let chain = self.chain();
        let ip = Ipv6Header {
            traffic_class: 0xa5,
            flow_label: 0xf_1234.try_into().expect("20 bits"),
            payload_length: u16::try_from(chain.len() + transport).expect("a frame of our own"),
            next_header: self.extensions.first().map_or(self.transport_number(), Extension::number),
            hop_limit: self.ttl,
            source,
            destination,
        };
        [&ip.to_bytes()[..], &chain].concat()
    }

    /// The extension headers.
    fn chain(&self) -> Vec<u8> {
        let following = self.extensions.iter().skip(1).map(Extension::number);
        let numbers = following.chain([self.transport_number()]);
        self.extensions.iter().zip(numbers).flat_map(|(header, next)| header.bytes(next)).collect()
    }

    const fn transport_number(&self) -> IpNumber {
        match self.transport {
            Transport::Tcp { .. } => IpNumber::TCP,
            Transport::Udp { .. } => IpNumber::UDP,
            Transport::Other(number) => number,
        }
    }

    fn transport(&self) -> Vec<u8> {
        let header = match &self.transport {
            Transport::Tcp { flags, options } => self.tcp_header(*flags, options),
            &Transport::Udp { checksum } => self.udp_header(checksum),
            Transport::Other(_) => Vec::new(),
        };
        [&header, self.payload.as_slice()].concat()
    }

    fn tcp_header(&self, flags: u8, options: &[u8]) -> Vec<u8> {
        let mut tcp = TcpHeader::new(self.src.port(), self.dst.port(), self.seq, self.window);
        tcp.acknowledgment_number = if flags & ACK != 0 { self.ack } else { 0 };
        (tcp.fin, tcp.syn, tcp.rst) = (flags & FIN != 0, flags & SYN != 0, flags & RST != 0);
        (tcp.psh, tcp.ack) = (flags & PSH != 0, flags & ACK != 0);
        (tcp.urg, tcp.urgent_pointer) = (flags & URG != 0, self.urgent);
        tcp.set_options_raw(options).expect("at most 40 bytes");
        tcp.checksum = match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                tcp.calc_checksum_ipv4_raw(src.octets(), dst.octets(), &self.payload)
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                tcp.calc_checksum_ipv6_raw(src.octets(), dst.octets(), &self.payload)
            }
            pair => panic!("two families: {pair:?}"),
        }
        .expect("a frame of our own");
        tcp.to_bytes().to_vec()
    }

    fn udp_header(&self, checksum: bool) -> Vec<u8> {
        let mut udp = UdpHeader {
            source_port: self.src.port(),
            destination_port: self.dst.port(),
            length: u16::try_from(UdpHeader::LEN + self.payload.len()).expect("a short frame"),
            checksum: 0,
        };
        if checksum {
            udp.checksum = match (self.src.ip(), self.dst.ip()) {
                (IpAddr::V4(src), IpAddr::V4(dst)) => {
                    udp.calc_checksum_ipv4_raw(src.octets(), dst.octets(), &self.payload)
                }
                (IpAddr::V6(src), IpAddr::V6(dst)) => {
                    udp.calc_checksum_ipv6_raw(src.octets(), dst.octets(), &self.payload)
                }
                pair => panic!("two families: {pair:?}"),
            }
            .expect("a frame of our own");
        }
        udp.to_bytes().to_vec()
    }
}

/// An ICMP message of the frame's family, in place of its transport: type, code, four bytes and the rest.
pub(crate) fn icmp(frame: &Frame, [kind, code]: [u8; 2], head: [u8; 4], rest: &[u8]) -> Frame {
    let mut message = vec![kind, code, 0, 0];
    message.extend(head);
    message.extend(rest);
    let (number, pseudo) = match (frame.src.ip(), frame.dst.ip()) {
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let len = u32::try_from(message.len()).expect("a frame of our own").to_be_bytes();
            let rest = [0, 0, 0, IpNumber::IPV6_ICMP.0];
            (IpNumber::IPV6_ICMP, [&src.octets()[..], &dst.octets(), &len, &rest].concat())
        }
        _ => (IpNumber::ICMP, Vec::new()),
    };
    let sum = naive_sum(&[&pseudo[..], &message].concat());
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    Frame { transport: Transport::Other(number), payload: message, ..frame.clone() }
}

/// An ICMP message with a checksum of zero.
fn without_sum(message: &[u8]) -> Vec<u8> {
    [&message[..2], &[0, 0], &message[4..]].concat()
}

/// RFC 1071.
pub(crate) fn naive_sum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|word| u64::from(word[0]) << 8 | u64::from(word.get(1).copied().unwrap_or_default()));
    let mut sum: u64 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A frame with VLAN tags, the outer one first: what each says, and its EtherType.
pub(crate) fn tagged(frame: &[u8], tags: &[(u16, u16)]) -> Vec<u8> {
    let mut bytes = frame[..12].to_vec();
    for (kind, tag) in tags {
        bytes.extend(kind.to_be_bytes());
        bytes.extend(tag.to_be_bytes());
    }
    bytes.extend(&frame[12..]);
    bytes
}

/// Makes the checksum of an IPv4 header right.
pub(crate) fn seal_v4(bytes: &mut [u8]) {
    let len = usize::from(bytes[L3] & 0x0f) * 4;
    bytes[L3 + 10..L3 + 12].fill(0);
    let sum: u32 = bytes[L3..L3 + len]
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    bytes[L3 + 10..L3 + 12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

/// Where a checksum stands, what it should be, and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Checksum {
    pub at: usize,
    pub right: u16,
    pub found: u16,
}

impl Checksum {
    /// 0 and 0xffff are the same number in one's complement.
    pub(crate) const fn holds(self) -> bool {
        self.right % 0xffff == self.found % 0xffff
    }
}

/// All checksums of a frame with TCP, UDP or ICMP in it, computed from scratch; `None` for any other, and
/// for those that etherparse cannot read. UDP's 0 is none.
pub(crate) fn checksums(bytes: &[u8]) -> Option<Vec<Checksum>> {
    let packet = SlicedPacket::from_ethernet(bytes).ok()?;
    let offset = |part: &[u8]| part.as_ptr() as usize - bytes.as_ptr() as usize;
    let (mut found, addresses) = match packet.net? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            let checksum = Checksum {
                at: offset(header.slice()) + 10,
                // etherparse forgets the reserved bit of the flags.
                right: naive_sum(&[&header.slice()[..10], &[0, 0], &header.slice()[12..]].concat()),
                found: header.header_checksum(),
            };
            let pair = (header.source_addr().into(), header.destination_addr().into());
            (vec![checksum], pair)
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            (vec![], (header.source_addr().into(), header.destination_addr().into()))
        }
        NetSlice::Arp(_) => return None,
    };
    match packet.transport? {
        TransportSlice::Udp(udp) if udp.checksum() == 0 => {}
        transport => found.push(transport_checksum(&transport, addresses, offset)?),
    }
    Some(found)
}

/// That of TCP, UDP or ICMP; `offset` says where a part of the frame begins.
fn transport_checksum(
    transport: &TransportSlice<'_>,
    addresses: (IpAddr, IpAddr),
    offset: impl Fn(&[u8]) -> usize,
) -> Option<Checksum> {
    let checksum = match transport {
        TransportSlice::Tcp(tcp) => Checksum {
            at: offset(tcp.slice()) + 16,
            right: match addresses {
                (IpAddr::V4(src), IpAddr::V4(dst)) => {
                    tcp.calc_checksum_ipv4(src.octets(), dst.octets())
                }
                (IpAddr::V6(src), IpAddr::V6(dst)) => {
                    tcp.calc_checksum_ipv6(src.octets(), dst.octets())
                }
                _ => return None,
            }
            .ok()?,
            found: tcp.checksum(),
        },
        TransportSlice::Udp(udp) if udp.checksum() != 0 => Checksum {
            at: offset(udp.slice()) + 6,
            right: match addresses {
                (IpAddr::V4(src), IpAddr::V4(dst)) => udp.to_header().calc_checksum_ipv4_raw(
                    src.octets(),
                    dst.octets(),
                    udp.payload(),
                ),
                (IpAddr::V6(src), IpAddr::V6(dst)) => udp.to_header().calc_checksum_ipv6_raw(
                    src.octets(),
                    dst.octets(),
                    udp.payload(),
                ),
                _ => return None,
            }
            .ok()?,
            found: udp.checksum(),
        },
        TransportSlice::Udp(_) | TransportSlice::Igmp(_) => return None,
        TransportSlice::Icmpv4(icmp) => Checksum {
            at: offset(icmp.slice()) + 2,
            right: naive_sum(&without_sum(icmp.slice())),
            found: icmp.checksum(),
        },
        TransportSlice::Icmpv6(icmp) => {
            let (IpAddr::V6(src), IpAddr::V6(dst)) = addresses else { return None };
            let right =
                icmp.icmp_type().calc_checksum(src.octets(), dst.octets(), icmp.payload()).ok()?;
            Checksum { at: offset(icmp.slice()) + 2, right, found: icmp.checksum() }
        }
    };
    Some(checksum)
}
