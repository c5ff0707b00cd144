//! Addresses, ports, and what is made of them: the keys of flows and listeners.

use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::abi::FlowKind;

/// IP protocol number of TCP.
pub const TCP: u32 = 6;
/// IP protocol number of UDP.
pub const UDP: u32 = 17;

/// An address of either family, IPv4 as `::ffff:a.b.c.d` (RFC 4291, section 2.5.5.2).
///
/// One representation means one code path; aligned so that it is copied in two moves.
#[repr(C, align(8))]
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, FromBytes, Immutable, IntoBytes,
)]
pub struct Address {
    /// Network order.
    pub bytes: [u8; 16],
}

impl Address {
    /// The unspecified address of IPv6.
    pub const NOTHING: Self = Self { bytes: [0; 16] };

    /// From two words in network order.
    ///
    /// Addresses are written as they are read: a CPU that reads eight bytes of which it has written four and
    /// four a moment ago waits until they are in its cache.
    #[must_use]
    #[inline(always)]
    pub const fn from_halves(halves: [u64; 2]) -> Self {
        zerocopy::transmute!(halves)
    }

    /// From the 32 bits of an IPv4 address in network order.
    #[must_use]
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self::from_halves([0, ((word.to_le() as u64) << 32 | 0xffff_0000).to_le()])
    }

    /// From four words in network order.
    #[must_use]
    pub const fn from_words(words: [u32; 4]) -> Self {
        zerocopy::transmute!(words)
    }

    /// As four words in network order.
    #[must_use]
    #[inline(always)]
    pub const fn words(self) -> [u32; 4] {
        zerocopy::transmute!(self)
    }

    /// As two words in network order.
    #[must_use]
    #[inline(always)]
    pub const fn halves(self) -> [u64; 2] {
        zerocopy::transmute!(self)
    }

    /// The same, half by half. A plain copy from one place in memory to another becomes a call, as they may overlap.
    #[must_use]
    #[inline(always)]
    pub const fn copied(&self) -> Self {
        let [high, low] = self.halves();
        Self::from_halves([high, low])
    }

    /// Whether both are the same. `==` would compare byte by byte, with a call.
    #[must_use]
    #[inline(always)]
    pub const fn same(self, other: Self) -> bool {
        let ([a, b], [c, d]) = (self.halves(), other.halves());
        a == c && b == d
    }

    /// Whether this is an IPv4 address.
    #[must_use]
    #[inline(always)]
    pub const fn is_v4(self) -> bool {
        let [high, low] = self.halves();
        high == 0 && low & 0xffff_ffff_0000_0000_u64.to_be() == 0xffff_0000_0000_u64.to_be()
    }
}

impl From<core::net::IpAddr> for Address {
    fn from(addr: core::net::IpAddr) -> Self {
        let bytes = match addr {
            core::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            core::net::IpAddr::V6(v6) => v6.octets(),
        };
        Self { bytes }
    }
}

impl From<Address> for core::net::IpAddr {
    fn from(addr: Address) -> Self {
        core::net::Ipv6Addr::from(addr.bytes).to_canonical()
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&core::net::IpAddr::from(*self), f)
    }
}

/// Key of `SLB_LISTENERS` and `SLB_REVNAT`.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Default,
    FromBytes,
    Immutable,
    IntoBytes,
)]
pub struct Endpoint {
    /// Address.
    pub addr: Address,
    /// Port; this wide so that the key has no padding.
    pub port: u32,
    /// [`TCP`] or [`UDP`].
    pub proto: u32,
}
const _: () = assert!(size_of::<Endpoint>() == 24);

/// A packet's addresses and ports as they arrive.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, FromBytes, Immutable, IntoBytes)]
pub struct FlowKey {
    /// Source address.
    pub src: Address,
    /// Destination address.
    pub dst: Address,
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// [`TCP`] or [`UDP`].
    pub proto: u32,
}
const _: () = assert!(size_of::<FlowKey>() == 40);

impl Endpoint {
    /// Whether both are the same. `==` would compare byte by byte, with a call.
    #[must_use]
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        let ([a, b], [c, d]) = (self.addr.halves(), other.addr.halves());
        let rest = (self.port ^ other.port) | (self.proto ^ other.proto);
        (a ^ c) | (b ^ d) | rest as u64 == 0
    }
}

impl FlowKey {
    /// Whether both are the same. `==` would compare byte by byte, with a call.
    #[must_use]
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        // One branch: the verifier follows each.
        let ([a, b], [c, d]) = (self.src.halves(), other.src.halves());
        let ([e, f], [g, h]) = (self.dst.halves(), other.dst.halves());
        let ports = (self.sport ^ other.sport) | (self.dport ^ other.dport);
        let rest = ports as u32 | (self.proto ^ other.proto);
        (a ^ c) | (b ^ d) | (e ^ g) | (f ^ h) | rest as u64 == 0
    }

    /// Where the packet goes.
    #[must_use]
    #[inline(always)]
    pub const fn destination(&self) -> Endpoint {
        Endpoint { addr: self.dst.copied(), port: self.dport as u32, proto: self.proto }
    }

    /// Where the packet comes from.
    #[must_use]
    #[inline(always)]
    pub const fn source(&self) -> Endpoint {
        Endpoint { addr: self.src.copied(), port: self.sport as u32, proto: self.proto }
    }

    /// What an answer to this packet looks like.
    #[must_use]
    #[inline(always)]
    pub const fn reversed(&self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
            proto: self.proto,
        }
    }
}

/// Both ends of a packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct NatTuple {
    /// Source address.
    pub src: Address,
    /// Destination address.
    pub dst: Address,
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// Zero.
    pub spare: u32,
}

impl NatTuple {
    /// Both ports, as they stand at the beginning of a transport header.
    #[must_use]
    #[inline(always)]
    pub const fn port_word(&self) -> u32 {
        port_word(self.sport, self.dport)
    }
}

/// Both ports, as they stand at the beginning of a transport header.
#[must_use]
#[inline(always)]
pub const fn port_word(sport: u16, dport: u16) -> u32 {
    ((sport as u32) << 16 | dport as u32).to_be()
}

/// What is written into a packet of a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NatRewrite {
    /// Replaces the source address of a reply, otherwise the destination address.
    pub addr: Address,
    /// Replaces the source port.
    pub sport: u16,
    /// Replaces the destination port.
    pub dport: u16,
    /// Of which direction the packet is.
    pub kind: FlowKind,
}

impl NatRewrite {
    /// From a backend to a client.
    #[must_use]
    #[inline(always)]
    pub const fn is_reply(&self) -> bool {
        matches!(self.kind, FlowKind::Reply)
    }
}
