//! `SLB_FLOWS`: the flow table.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{
    flags::flags,
    net::{Address, FlowKey},
};

/// Entries in one element of `SLB_FLOWS`; a power of two.
pub const BUCKET_FLOWS: usize = 8;
/// Places in `SLB_FLOWS` per flow of the configuration. A flow can only be in one bucket: with four
/// places for each, a table that is full by count has one in 10 000 flows that finds its bucket full.
pub const PLACES_PER_FLOW: usize = 4;
/// Capacity of `SLB_FLOWS`, in buckets, unless the agent asks for another.
pub const DEFAULT_BUCKETS: usize = 1_048_576 * PLACES_PER_FLOW / BUCKET_FLOWS;

/// Value of `SLB_FLOWS`: a flow that cannot be told from its packets alone. One cache line.
///
/// A place is taken by exchanging its tag for [`TAG_LOCKED`], filled, and published by its tag: whoever
/// finds the tag finds the rest.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct Flow {
    /// [`TAG_FREE`], [`TAG_LOCKED`], or from the hash of the key: [`tag`].
    pub tag: u32,
    /// Low half of the jiffies after which the entry has expired.
    pub expires: u32,
    /// Source address of its packets.
    pub src: Address,
    /// Destination address of its packets.
    pub dst: Address,
    /// Source port of its packets.
    pub sport: u16,
    /// Destination port of its packets.
    pub dport: u16,
    /// Index into `SLB_BACKENDS`.
    pub backend: u32,
    /// [`super::TCP`] or [`super::UDP`].
    pub proto: u8,
    /// [`FLOW_ORIGINAL`], [`FLOW_REPLY`] or [`FLOW_BYPASS`].
    pub kind: u8,
    /// What has happened in it: bits of [`ConnState`]. A number, so that `bpftool` shows it as one.
    pub state: u8,
    /// [`FLOW_ORIGINAL`]: how its backend is told who the client is: [`PROXY_NONE`], [`PROXY_V2`] or
    /// [`PROXY_OPTION`].
    pub proxy: u8,
    /// [`FLOW_ORIGINAL`]: source port towards the backend. [`FLOW_REPLY`], if the backend is told by a header who the
    /// client is: when its SYN-ACK was seen, in units of 256 jiffies.
    pub port: u16,
    /// [`FLOW_ORIGINAL`]: index into `SLB_SOURCES` of the source address towards the backend, or
    /// [`super::NO_SOURCE`]: the client's own. [`FLOW_REPLY`], if the backend is told who the client is, with
    /// [`ConnState::FIN_REPLY`]: low half of what the client has to acknowledge to close the connection.
    pub source: u16,
    /// [`FLOW_ORIGINAL`]: place of the reply's entry, or [`NO_PLACE`] if none is needed.
    /// [`FLOW_REPLY`]: place of the client's.
    /// [`FLOW_BYPASS`] and [`ConnState::ANSWERED`]: what the client has to acknowledge.
    pub peer: u32,
    /// [`FLOW_ORIGINAL`]: what the client has to acknowledge: with [`ConnState::ANSWERED`] to be proven, with
    /// [`ConnState::FIN_REPLY`] to close the connection. In between, with [`ConnState::END_CLAIMED`], what its segments
    /// behind its FIN begin with. If its backend is told who the client is: [`FLOW_ORIGINAL`]: number of the client's
    /// first byte, and once the backend has got a header, how far that of the backend's is ahead of the header's;
    /// [`FLOW_REPLY`]: number of the backend's first byte.
    /// [`FLOW_BYPASS`]: what the backend has to acknowledge.
    pub sequence: u32,
}
const _: () = assert!(size_of::<Flow>() == 64);
/// The place is free.
pub const TAG_FREE: u32 = 0;
/// Being written.
pub const TAG_LOCKED: u32 = 1;

/// The tag of a flow with this [`crate::hash::flow`].
#[must_use]
#[inline(always)]
pub const fn tag(hash: u64) -> u32 {
    hash as u32 | 2
}

/// Value of `SLB_FLOWS`: the places that a flow may be in.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct Bucket {
    /// Place *n* of the table is `flows[n % 8]` of bucket *n* / 8.
    pub flows: [Flow; BUCKET_FLOWS],
}
const _: () = assert!(size_of::<Bucket>() == 512);
/// No place in `SLB_FLOWS`.
pub const NO_PLACE: u32 = u32::MAX;

impl Flow {
    /// Whether this is the entry of `key`, whose tag it has.
    #[must_use]
    #[inline(always)]
    pub const fn is_of(&self, key: &FlowKey) -> bool {
        self.key().same(key)
    }

    /// Whether it is of this kind.
    #[must_use]
    #[inline(always)]
    pub const fn is(&self, kind: FlowKind) -> bool {
        self.kind as u32 == kind as u32
    }

    /// What has happened in it.
    #[must_use]
    #[inline(always)]
    pub const fn state(&self) -> ConnState {
        ConnState::from_bits_retain(self.state)
    }

    /// The key of its packets.
    #[must_use]
    #[inline(always)]
    pub const fn key(&self) -> FlowKey {
        FlowKey {
            src: self.src,
            dst: self.dst,
            sport: self.sport,
            dport: self.dport,
            proto: self.proto as u32,
        }
    }
}

/// From client to backend.
pub const FLOW_ORIGINAL: u8 = 1;
/// From backend to client.
pub const FLOW_REPLY: u8 = 2;
/// From backend to a client that talks to it without a listener: passed as it is, once the backend has answered.
pub const FLOW_BYPASS: u8 = 3;

/// What packets an entry is for, and what a packet is.
///
/// `repr(u32)`: in a structure beside numbers nothing has to be cleared.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FlowKind {
    /// From client to backend.
    #[default]
    Original = FLOW_ORIGINAL as u32,
    /// From backend to client.
    Reply = FLOW_REPLY as u32,
    /// From backend to a client that talks to it without a listener.
    Bypass = FLOW_BYPASS as u32,
}

impl FlowKind {
    /// From a number in a map; `None`: it is no kind.
    #[must_use]
    #[inline(always)]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            FLOW_ORIGINAL => Some(Self::Original),
            FLOW_REPLY => Some(Self::Reply),
            FLOW_BYPASS => Some(Self::Bypass),
            _ => None,
        }
    }

    /// That of a packet in one of two directions.
    #[must_use]
    #[inline(always)]
    pub const fn of_direction(is_reply: bool) -> Self {
        if is_reply { Self::Reply } else { Self::Original }
    }
}

flags! {
    /// What has happened in a flow.
    pub struct ConnState: u8 {
        /// The client's side has said that it ends, and nothing verifies it: anyone may have sent that FIN, RST or SYN. It
        /// gives way sooner, until the client's side goes on.
        const END_CLAIMED = 1;
        /// The backend has sent FIN.
        const FIN_REPLY = 2;
        /// Not proven, but its client has sent packets for a second.
        const AGED = 4;
        /// TCP: the backend has answered, and the client can prove itself by acknowledging that. A direct flow of UDP: it
        /// has answered.
        const ANSWERED = 8;
        /// TCP: the client is proven, and the entry does not make room for another before it expires. UDP: the backend has
        /// answered.
        const ESTABLISHED = 16;
        /// The backend may not know the client's address yet, and is to be told.
        const PROXY_PENDING = 32;
        /// It has verifiably ended: the backend has sent RST, or both have closed it. Not the bit of
        /// [`crate::parse::TcpFlags::RST`], so that a test sees one taken for the other.
        const ENDED = 64;
        /// The agent has ended it: its packets are answered with resets.
        const RST_PENDING = 128;
    }
}

impl ConnState {
    /// Whether a TCP flow has verifiably ended.
    #[must_use]
    #[inline(always)]
    pub const fn has_ended(self) -> bool {
        self.intersects(Self::ENDED.union(Self::RST_PENDING))
    }

    /// Whether the backend has answered, and the client is not proven.
    #[must_use]
    #[inline(always)]
    pub const fn awaits_proof(self) -> bool {
        self.intersection(Self::ESTABLISHED.union(Self::ANSWERED)).bits() == Self::ANSWERED.bits()
    }

    /// Whether `SLB_ACTIVE` counts its flow.
    #[must_use]
    #[inline(always)]
    pub const fn is_active(self) -> bool {
        !self.intersects(Self::ENDED.union(Self::RST_PENDING).union(Self::END_CLAIMED))
    }
}

/// The backend of a flow is not told who the client is.
pub const PROXY_NONE: u8 = 0;
/// It is told by a header before the client's first byte ([`crate::proxy_protocol`]).
pub const PROXY_V2: u8 = 1;
/// It is told by a TCP option.
pub const PROXY_OPTION: u8 = 2;

/// How long ago `then` was, both in the low half of the jiffies.
///
/// Not at all if it is ahead: another CPU may have noted a packet after this one looked at the clock.
#[must_use]
#[inline(always)]
pub const fn age(now: u32, then: u32) -> u32 {
    let age = now.wrapping_sub(then);
    if age > i32::MAX as u32 { 0 } else { age }
}

/// Whether `now` is behind `expires`, both in the low half of the jiffies.
#[must_use]
#[inline(always)]
pub const fn is_over(now: u32, expires: u32) -> bool {
    age(now, expires) > 0
}

/// How far `expires` may be behind: entries in use are written about once a second, not per packet.
pub const REFRESH_JIFFIES: u32 = 256;
