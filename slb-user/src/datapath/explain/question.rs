//! What is asked: a packet that is not sent.

use std::net::SocketAddr;

use slb_common::{
    abi::{FlowKey, TCP},
    packet::{FRAGMENT_FIRST, FRAGMENT_LATER, FRAGMENT_NONE, Packet, TcpFlags},
};

/// A packet that is not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// What it is.
    pub kind: Kind,
    /// [`TCP`] or [`slb_common::abi::UDP`]; no matter for an echo request.
    pub proto: u32,
    /// Source address and port.
    pub src: SocketAddr,
    /// Destination address and port.
    pub dst: SocketAddr,
    /// TCP: whether it is in the middle of a connection, and not its first.
    pub is_established: bool,
    /// Its TTL or hop limit as it arrives.
    pub ttl: u8,
    /// Which part of a packet it is.
    pub part: Part,
    /// The interface that it comes in by; 0: if a backend sends it, the one towards that backend, otherwise one that no
    /// backend is behind.
    pub ingress: u32,
}

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// TCP or UDP.
    Transport,
    /// An ICMP error about such a packet, on its way to that packet's source.
    Error,
    /// An ICMP echo request.
    Echo,
}

/// Which part of a packet something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// Its first fragment, which has the ports.
    First,
    /// Another fragment, by the identification as a number of the header; `None`: that of a packet whose first fragment
    /// has not been seen.
    Later(Option<u32>),
}

impl Question {
    /// The first packet of a flow, with a TTL or hop limit of 64.
    #[must_use]
    pub const fn new(proto: u32, src: SocketAddr, dst: SocketAddr) -> Self {
        let (kind, part) = (Kind::Transport, Part::Whole);
        Self { kind, proto, src, dst, is_established: false, ttl: 64, part, ingress: 0 }
    }

    /// Its addresses and ports, or those of the packet that it is an error about.
    pub(super) fn key(&self) -> FlowKey {
        FlowKey {
            src: self.src.ip().into(),
            dst: self.dst.ip().into(),
            sport: self.src.port(),
            dport: self.dst.port(),
            proto: self.proto,
        }
    }

    /// The packet as the packet path parses it.
    pub(super) fn packet(&self) -> Packet {
        let key = self.key();
        let is_v4 = key.src.is_v4();
        let key = match self.kind {
            Kind::Transport => key,
            // An error goes to the source of the packet that it is about.
            Kind::Error => FlowKey { proto: 0, sport: 0, dport: 0, ..key.reversed() },
            Kind::Echo => FlowKey { proto: 0, sport: 0, dport: 0, ..key },
        };
        let (fragment, id) = match self.part {
            Part::Whole => (FRAGMENT_NONE, 0),
            Part::First => (FRAGMENT_FIRST, 0),
            Part::Later(id) => (FRAGMENT_LATER, id.unwrap_or_default()),
        };
        let flags = match (self.proto, self.is_established) {
            (TCP, true) => TcpFlags::ACK,
            (TCP, false) => TcpFlags::SYN,
            _ => TcpFlags::empty(),
        };
        // As it stands in the header.
        let fragment_id = if is_v4 { u32::from((id as u16).to_be()) } else { id.to_be() };
        Packet { key, flags, v4: is_v4.into(), fragment, fragment_id, ..Packet::default() }
    }
}
