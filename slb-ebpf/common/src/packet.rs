//! What later parts of the packet path need to know of a packet.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{flags::flags, net::FlowKey};

flags! {
    /// Flags of a TCP segment (RFC 9293, section 3.1). Those without a name are kept.
    pub struct TcpFlags: u8 {
        /// No more data from the sender.
        const FIN = 0x01;
        /// Synchronise sequence numbers.
        const SYN = 0x02;
        /// Reset the connection.
        const RST = 0x04;
        /// The acknowledgement number is valid.
        const ACK = 0x10;
    }
}

/// What later stages need to know of a packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct Packet {
    /// Addresses, ports and protocol.
    pub key: FlowKey,
    /// Offset of the transport header.
    pub l4: u32,
    /// TCP's flags; none for UDP.
    pub flags: TcpFlags,
    /// 1: IPv4, otherwise IPv6.
    pub v4: u8,
    /// [`FRAGMENT_NONE`], [`FRAGMENT_FIRST`] or [`FRAGMENT_LATER`], which has no ports.
    pub fragment: u16,
    /// Length in bytes from the IP header on.
    pub len: u32,
    /// What its fragments have in common, as it stands in the header.
    pub fragment_id: u32,
}

/// The packet is whole.
pub const FRAGMENT_NONE: u16 = 0;
/// It begins here: the transport header is there.
pub const FRAGMENT_FIRST: u16 = 1;
/// It has begun before.
pub const FRAGMENT_LATER: u16 = 2;

impl Packet {
    /// Whether this is IPv4, and not IPv6.
    #[must_use]
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.v4 != 0
    }

    /// Copies field by field. In one piece it would be copied from memory, and so not be in registers.
    #[inline(always)]
    pub const fn copy_to(&self, to: &mut Self) {
        (to.key.src, to.key.dst) = (self.key.src.copied(), self.key.dst.copied());
        (to.key.sport, to.key.dport) = (self.key.sport, self.key.dport);
        to.key.proto = self.key.proto;
        (to.l4, to.flags, to.v4) = (self.l4, self.flags, self.v4);
        (to.fragment, to.len, to.fragment_id) = (self.fragment, self.len, self.fragment_id);
    }

    /// Whether this asks for a new connection: SYN and none of ACK, FIN, RST.
    #[must_use]
    #[inline(always)]
    pub const fn is_syn(&self) -> bool {
        const OF_INTEREST: TcpFlags =
            TcpFlags::SYN.union(TcpFlags::ACK).union(TcpFlags::FIN).union(TcpFlags::RST);
        self.flags.intersection(OF_INTEREST).bits() == TcpFlags::SYN.bits()
    }
}
