//! Frames from an independent implementation.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    vec::Vec,
};

use etherparse::{
    IpFragOffset, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv4Options, Ipv6Extensions,
    Ipv6FragmentHeader, Ipv6Header, Ipv6RawExtHeader, Ipv6RoutingExtensions, PacketBuilder,
    TcpHeader, TcpOptions,
};
use proptest::{collection::vec, prelude::*};

use super::{FRAGMENT_NONE, L3, Packet};
use crate::abi::{FlowKey, TCP, UDP};

pub(crate) const SOURCE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(crate) const DESTINATION_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// A TCP or UDP packet, and whatever may stand around it.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub sport: u16,
    pub dport: u16,
    /// [`TCP`] or [`UDP`].
    pub proto: u32,
    pub flags: u8,
    pub ttl: u8,
    /// IPv4 options; a multiple of 4, up to 40.
    pub options: Vec<u8>,
    /// TCP options; a multiple of 4, up to 40.
    pub tcp_options: Vec<u8>,
    pub extensions: Ipv6Extensions,
    pub payload: Vec<u8>,
    /// Behind the IP packet, as Ethernet does with short ones.
    pub padding: usize,
}

/// TCP over IPv4, SYN, from 198.51.100.7:40000 to 203.0.113.10:80.
impl Default for Sample {
    fn default() -> Self {
        Self {
            src: Ipv4Addr::new(198, 51, 100, 7).into(),
            dst: Ipv4Addr::new(203, 0, 113, 10).into(),
            sport: 40_000,
            dport: 80,
            proto: TCP,
            flags: super::TcpFlags::SYN.bits(),
            ttl: 64,
            options: Vec::new(),
            tcp_options: Vec::new(),
            extensions: Ipv6Extensions::default(),
            payload: b"hello".to_vec(),
            padding: 0,
        }
    }
}

impl Sample {
    pub(crate) fn v6() -> Self {
        Self {
            src: "2001:db8:5::7".parse().unwrap(),
            dst: "2001:db8:113::10".parse().unwrap(),
            ..Self::default()
        }
    }

    pub(crate) fn udp(self) -> Self {
        Self { proto: UDP, flags: 0, ..self }
    }

    /// What a parser should find.
    pub(crate) fn expected(&self) -> Packet {
        let extensions = self.extensions.header_len();
        let is_v4 = self.dst.is_ipv4();
        Packet {
            key: FlowKey {
                src: self.src.into(),
                dst: self.dst.into(),
                sport: self.sport,
                dport: self.dport,
                proto: self.proto,
            },
            l4: (L3 + if is_v4 { 20 + self.options.len() } else { 40 + extensions }) as u32,
            flags: super::TcpFlags::from_bits_retain(self.flags),
            v4: is_v4.into(),
            fragment: FRAGMENT_NONE,
            len: self.len(),
            fragment_id: 0,
        }
    }

    /// Length of the IP packet, in bytes.
    fn len(&self) -> u32 {
        (self.bytes().len() - L3 - self.padding) as u32
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let ip = match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut header =
                    Ipv4Header::new(0, self.ttl, IpNumber(0), src.octets(), dst.octets()).unwrap();
                header.options = Ipv4Options::try_from(&self.options[..]).unwrap();
                IpHeaders::Ipv4(header, Ipv4Extensions::default())
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let header = Ipv6Header {
                    hop_limit: self.ttl,
                    source: src.octets(),
                    destination: dst.octets(),
                    ..Ipv6Header::default()
                };
                IpHeaders::Ipv6(header, self.extensions.clone())
            }
            families => panic!("two families: {families:?}"),
        };
        let ethernet = PacketBuilder::ethernet2(SOURCE_MAC, DESTINATION_MAC).ip(ip);
        let mut bytes = Vec::new();
        if self.proto == TCP {
            let mut tcp = TcpHeader::new(self.sport, self.dport, 1_000, 65_535);
            tcp.options = TcpOptions::try_from_slice(&self.tcp_options).unwrap();
            [tcp.fin, tcp.syn, tcp.rst, tcp.psh, tcp.ack, tcp.urg, tcp.ece, tcp.cwr] =
                std::array::from_fn(|bit| self.flags >> bit & 1 != 0);
            ethernet.tcp_header(tcp).write(&mut bytes, &self.payload).unwrap();
        } else {
            ethernet.udp(self.sport, self.dport).write(&mut bytes, &self.payload).unwrap();
        }
        bytes.resize(bytes.len() + self.padding, 0xee);
        bytes
    }
}

/// Any packet that is to be accepted.
pub(crate) fn samples() -> impl Strategy<Value = Sample> {
    let families = prop_oneof![
        (any::<[u8; 4]>(), any::<[u8; 4]>())
            .prop_map(|(a, b)| (IpAddr::from(a), IpAddr::from(b)))
            .boxed(),
        (v6_addresses(), v6_addresses()).boxed(),
    ];
    (
        (families, any::<(u16, u16)>(), any::<bool>(), any::<u8>(), 2_u8..),
        (words(), words(), extensions()),
        (vec(any::<u8>(), 0..80), 0_usize..20),
    )
        .prop_map(|(header, (options, tcp_options, extensions), (payload, padding))| {
            let ((src, dst), (sport, dport), is_tcp, flags, ttl) = header;
            let proto = if is_tcp { TCP } else { UDP };
            let flags = if is_tcp { flags } else { 0 };
            // Source routes are for another test.
            let is_source_route = |byte: &u8| matches!(byte, 131 | 137);
            let options = options.into_iter().filter(|byte| !is_source_route(byte));
            let mut options: Vec<u8> = options.collect();
            options.truncate(options.len() / 4 * 4);
            Sample {
                src,
                dst,
                sport,
                dport,
                proto,
                flags,
                ttl,
                options,
                tcp_options,
                extensions,
                payload,
                padding,
            }
        })
}

/// An IPv6 address that is not an IPv4 one in disguise.
fn v6_addresses() -> impl Strategy<Value = IpAddr> {
    any::<[u8; 16]>()
        .prop_map(Ipv6Addr::from)
        .prop_filter("mapped", |addr| addr.to_ipv4_mapped().is_none())
        .prop_map(IpAddr::from)
}

fn words() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<[u8; 4]>(), 0..=10).prop_map(|words| words.concat())
}

fn extensions() -> impl Strategy<Value = Ipv6Extensions> {
    let raw = || proptest::option::of((0..4_usize).prop_map(raw_extension));
    (raw(), raw(), raw(), any::<bool>()).prop_map(|(hop_by_hop, options, routing, fragment)| {
        Ipv6Extensions {
            hop_by_hop_options: hop_by_hop,
            destination_options: options,
            routing: routing.map(|routing| Ipv6RoutingExtensions {
                routing,
                final_destination_options: Some(raw_extension(0)),
            }),
            fragment: fragment.then(whole_packet_fragment),
            auth: None,
        }
    })
}

/// All bytes 0: padding in an options header, and no segments left in a routing header.
pub(crate) fn raw_extension(units: usize) -> Ipv6RawExtHeader {
    Ipv6RawExtHeader::new_raw(IpNumber(0), &[0; 6 + 8 * 4][..6 + 8 * units]).unwrap()
}

/// RFC 6946's atomic fragment.
pub(crate) fn whole_packet_fragment() -> Ipv6FragmentHeader {
    Ipv6FragmentHeader::new(IpNumber(0), IpFragOffset::ZERO, false, 7)
}
