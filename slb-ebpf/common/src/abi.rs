//! Keys, values and limits of the BPF maps.
//!
//! Everything here is `repr(C)` without implicit padding and made of integers and byte arrays only,
//! so that any bytes are a valid value and hash keys compare byte by byte. Addresses are bytes in
//! network order; all other numbers are in host order. `docs/maps.md` describes the maps themselves.

use core::fmt;

use crate::client_address::{Head, Options, Words};
pub use crate::parse::Packet;

/// Names the pin directory (`…/v1`). Changes with any layout in this file, so that an old map and a
/// new program never meet.
pub const ABI_VERSION: u32 = 6;

/// Capacity of `SLB_LISTENERS` and `SLB_CURSORS`: one per VIP, protocol and port.
pub const MAX_LISTENERS: usize = 8_192;
/// Capacity of `SLB_BACKENDS`: one per listener, backend and address. [`NO_BACKEND`] is none.
pub const MAX_BACKENDS: usize = 65_535;
/// Capacity of `SLB_ADDRESSES` and `SLB_ENDPOINTS`.
pub const MAX_ENDPOINTS: usize = 65_536;
/// Capacity of `SLB_INTERFACES`.
pub const MAX_INTERFACES: usize = 64;
/// Slots in one element of `SLB_SLOTS`; a power of two.
pub const CHUNK_SLOTS: usize = 1_024;
/// Capacity of `SLB_SLOTS` unless the agent asks for more.
pub const DEFAULT_CHUNKS: usize = 1_024;
/// Entries in one element of `SLB_FLOWS`; a power of two.
pub const BUCKET_FLOWS: usize = 8;
/// Places in `SLB_FLOWS` per flow of the configuration. A flow can only be in one bucket: with four
/// places for each, a table that is full by count has one in 10 000 flows that finds its bucket full.
pub const PLACES_PER_FLOW: usize = 4;
/// Capacity of `SLB_FLOWS`, in buckets, unless the agent asks for another.
pub const DEFAULT_BUCKETS: usize = 1_048_576 * PLACES_PER_FLOW / BUCKET_FLOWS;
/// Hashes in an [`Index`]; a power of two.
pub const INDEX_SLOTS: usize = 65_536;
/// Records in `SLB_LISTENER_INDEX`: twice the listeners, so that nearly all can be replaced at once.
pub const MAX_LISTENER_RECORDS: usize = 2 * MAX_LISTENERS;
/// Records in `SLB_ENDPOINT_INDEX`: as many as half a word can name. Who finds no room, as more than half of them are
/// replaced at once, is found by the hash map only, until the next change.
pub const MAX_ENDPOINT_RECORDS: usize = 65_536;
/// Hashes in `SLB_FILTER`; a power of two. With ten thousand addresses of ours one stranger in a hundred has
/// the hash of one.
pub const FILTER_HASHES: usize = 1 << 20;
/// Of so many in one byte.
pub const FILTER_PER_BYTE: usize = 4;
/// Capacity of `SLB_CLIENTS`; a power of two.
pub const MAX_CLIENTS: usize = 65_536;
/// Capacity of `SLB_SOURCES`; [`NO_SOURCE`] is none.
pub const MAX_SOURCES: usize = 1_024;
/// Capacity of `SLB_STICKY`: clients that are kept with their backend.
pub const MAX_STICKY: usize = 131_072;
/// Capacity of `SLB_ACL`: prefixes of all lists together, twice, so that each can be replaced at once.
pub const MAX_PREFIXES: usize = 1 << 18;
/// Capacity of `SLB_ADMITTED`; a power of two.
pub const MAX_ADMITTED: usize = 65_536;
/// Capacity of `SLB_QUIC`: a backend has one server ID.
pub const MAX_QUIC: usize = MAX_BACKENDS;
/// Capacity of `SLB_FRAGMENTS`: datagrams whose fragments are on their way at the same time.
pub const MAX_FRAGMENTS: usize = 16_384;

/// The programs that the first one passes packets on to, by their index in `SLB_STAGES`: each has the
/// stack and the verifier's patience to itself.
pub const STAGES: [&str; 12] = [
    "slb_icmp",
    "slb_rest",
    "slb_parsed",
    "slb_later",
    "slb_flow",
    "slb_tunnel",
    "slb_answer",
    "slb_full",
    "slb_tell",
    "slb_error",
    "slb_guard",
    "slb_choose",
];
/// ICMP: echo requests, and errors about flows.
pub const STAGE_ICMP: u32 = 0;
/// Tagged frames, fragments, and frames in several buffers.
pub const STAGE_REST: u32 = 1;
/// What [`STAGE_REST`] has made a packet like any other.
pub const STAGE_PARSED: u32 = 2;
/// Fragments other than the first.
pub const STAGE_LATER: u32 = 3;
/// The first packet of a flow that has no entry and may need one.
pub const STAGE_FLOW: u32 = 4;
/// A SYN, or what another stage has prepared, to a backend behind a tunnel.
pub const STAGE_TUNNEL: u32 = 5;
/// What the gateway answers itself.
pub const STAGE_ANSWER: u32 = 6;
/// A flow whose source is replaced as well.
pub const STAGE_FULL: u32 = 7;
/// A flow whose backend is told who the client is.
pub const STAGE_TELL: u32 = 8;
/// An ICMP error about a flow of another family.
pub const STAGE_ERROR: u32 = 9;
/// To or from a listener with an access list or limits.
pub const STAGE_GUARD: u32 = 10;
/// A flow whose backend more than a schedule chooses.
pub const STAGE_CHOOSE: u32 = 11;

/// IP protocol number of TCP.
pub const TCP: u32 = 6;
/// IP protocol number of UDP.
pub const UDP: u32 = 17;

/// An address of either family, IPv4 as `::ffff:a.b.c.d` (RFC 4291, section 2.5.5.2).
///
/// One representation means one code path; aligned so that it is copied in two moves.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
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
        // SAFETY: both are 16 bytes, and any bytes are a valid `Address`.
        unsafe { core::mem::transmute::<[u64; 2], Self>(halves) }
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
        // SAFETY: both are 16 bytes, and any bytes are a valid `Address`.
        unsafe { core::mem::transmute::<[u32; 4], Self>(words) }
    }

    /// As four words in network order.
    #[must_use]
    #[inline(always)]
    pub const fn words(self) -> [u32; 4] {
        // SAFETY: both are 16 bytes, and any bytes are valid words.
        unsafe { core::mem::transmute::<Self, [u32; 4]>(self) }
    }

    /// As two words in network order.
    #[must_use]
    #[inline(always)]
    pub const fn halves(self) -> [u64; 2] {
        // SAFETY: both are 16 bytes, and any bytes are valid words.
        unsafe { core::mem::transmute::<Self, [u64; 2]>(self) }
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

/// Key of `SLB_LISTENERS` and `SLB_ENDPOINTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Endpoint {
    /// Address.
    pub addr: Address,
    /// Port; this wide so that the key has no padding.
    pub port: u32,
    /// [`TCP`] or [`UDP`].
    pub proto: u32,
}
const _: () = assert!(size_of::<Endpoint>() == 24);

/// Value of `SLB_LISTENERS`.
///
/// Replaced as a whole, and a hash map swaps a value by swapping a pointer: a packet sees either the
/// old schedule or the new one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Listener {
    /// Index into `SLB_CURSORS`; never changes while the listener exists.
    pub id: u32,
    /// [`SCHEDULER_HASH`] or another.
    pub scheduler: u16,
    /// The same of the schedule before; one of those that are asked about every packet.
    pub previous_scheduler: u16,
    /// Where its slots begin in `SLB_SLOTS`.
    pub first_chunk: u32,
    /// How many slots it has; 0: no backend takes new flows.
    pub slots: u32,
    /// Where the slots of the schedule before begin, which connections without an entry go by.
    pub previous_chunk: u32,
    /// How many there are; 0: nobody goes by them any more.
    pub previous_slots: u32,
    /// [`LISTENER_GUARDED`], [`LISTENER_CHOOSES`], [`LISTENER_LIMITED`] and [`ACL_ALLOW`] or [`ACL_DENY`].
    pub flags: u32,
    /// Number of its access list in `SLB_ACL`.
    pub acl: u32,
    /// For how many jiffies after its last new flow a client is kept with its backend; 0: it is not.
    pub sticky_jiffies: u32,
    /// Zero.
    pub spare: u32,
}
const _: () = assert!(size_of::<Listener>() == 40);

/// [`STAGE_GUARD`] looks at its packets.
pub const LISTENER_GUARDED: u32 = 1;
/// [`STAGE_CHOOSE`] chooses backends for its flows.
pub const LISTENER_CHOOSES: u32 = 2;
/// `SLB_LIMITS` has limits for it.
pub const LISTENER_LIMITED: u32 = 4;
/// Only clients on the access list get in.
pub const ACL_ALLOW: u32 = 8;
/// Clients on the access list do not get in.
pub const ACL_DENY: u32 = 16;

/// The slot is chosen by the hash of the 4-tuple (Maglev). A flow has an entry only where the slot
/// says so.
pub const SCHEDULER_HASH: u16 = 1;
/// The same by the hash of the source address.
pub const SCHEDULER_SOURCE: u16 = 2;
/// The slots are taken in turn. With this and what follows every flow has an entry: see
/// [`is_by_hash`].
pub const SCHEDULER_RING: u16 = 3;
/// Of [`LEAST_CANDIDATES`] slots in turn, the backend with the fewest flows for its weight.
pub const SCHEDULER_LEAST: u16 = 4;
/// The slot is chosen by the hash of the QUIC connection ID, unless that names a backend.
pub const SCHEDULER_QUIC: u16 = 5;

/// Whether a scheduler chooses by what all packets of a flow have in common, so that it can be asked about each.
#[must_use]
#[inline(always)]
pub const fn is_by_hash(scheduler: u16) -> bool {
    scheduler < SCHEDULER_RING
}

/// How many backends [`SCHEDULER_LEAST`] compares. The least of eight is within a flow or two of the least of
/// all (Mitzenmacher, "The power of two choices in randomized load balancing", 2001), at a cost that does not
/// grow with their number.
pub const LEAST_CANDIDATES: u32 = 8;

/// The part of a slot that is an index into `SLB_BACKENDS`, or [`NO_BACKEND`].
pub const SLOT_BACKEND: u32 = 0xffff;
/// Flows of this slot may have entries, which decide.
pub const SLOT_LOOK: u32 = 1 << 31;
/// Flows of this slot get entries.
pub const SLOT_KEEP: u32 = 1 << 30;
/// In a slot: nobody takes new flows.
pub const NO_BACKEND: u32 = 0xffff;

/// Value of `SLB_SLOTS`: a run of a schedule's slots.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Each [`SLOT_BACKEND`], [`SLOT_LOOK`] and [`SLOT_KEEP`].
    pub slots: [u32; CHUNK_SLOTS],
}

/// The way to a neighbour.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Hop {
    /// Output interface; 0: not known, the kernel has to find out.
    pub ifindex: u32,
    /// The neighbour's MAC address.
    pub dst_mac: [u8; 6],
    /// The output interface's MAC address.
    pub src_mac: [u8; 6],
}
const _: () = assert!(size_of::<Hop>() == 16);

impl Hop {
    /// The kernel has to find out.
    pub const KERNEL: Self = Self { ifindex: 0, dst_mac: [0; 6], src_mac: [0; 6] };

    /// Whether the frame can be sent from XDP.
    #[must_use]
    #[inline(always)]
    pub const fn is_known(self) -> bool {
        self.ifindex != 0
    }

    /// Both MAC addresses, as they stand at the beginning of a frame.
    #[must_use]
    #[inline(always)]
    pub const fn mac_words(self) -> [u32; 3] {
        // SAFETY: 16 bytes without padding on both sides, and any bytes are valid words.
        let [_, a, b, c] = unsafe { core::mem::transmute::<Self, [u32; 4]>(self) };
        [a, b, c]
    }

    /// From an interface and the first 12 bytes of a frame.
    #[must_use]
    #[inline(always)]
    pub const fn from_mac_words(ifindex: u32, [a, b, c]: [u32; 3]) -> Self {
        // SAFETY: 16 bytes without padding on both sides, and any bytes are a valid `Hop`.
        unsafe { core::mem::transmute::<[u32; 4], Self>([ifindex, a, b, c]) }
    }
}

/// Value of `SLB_BACKENDS`: one backend of one listener at one of its addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Backend {
    /// Address that packets are sent to.
    pub addr: Address,
    /// The way to it.
    pub hop: Hop,
    /// Port that packets are sent to.
    pub port: u32,
    /// [`BACKEND_IN_USE`], [`BACKEND_USABLE`], [`BACKEND_HEALTHY`], [`BACKEND_UNHEALTHY`],
    /// [`BACKEND_SHARED`], [`BACKEND_PROXY`], [`BACKEND_OPTION`] and [`BACKEND_CLOSED`].
    pub flags: u32,
    /// A flow without a packet for this many jiffies is forgotten.
    pub idle_jiffies: u32,
    /// [`Listener::id`] of the listener that this is a backend of.
    pub listener: u16,
    /// For [`SCHEDULER_LEAST`]: how many flows it is to have, relative to the others.
    pub weight: u16,
    /// How a packet reaches it: [`MODE_NAT`] or another.
    pub mode: u32,
    /// The longest packet that gets there, in bytes from its IP header on, as it arrives here: what a
    /// tunnel adds is taken off. 0: not known.
    pub mtu: u32,
    /// First index into `SLB_SOURCES` of the addresses that packets to it may be given as a source, or
    /// [`NO_SOURCE`].
    pub source: u16,
    /// How many there are.
    pub sources: u16,
    /// Low half of the jiffies when the flows of a backend that is being drained are ended; 0: never. Not for the
    /// program: a restarted agent goes on from here.
    pub closes: u32,
}
const _: () = assert!(size_of::<Backend>() == 64);

/// Destination address and port are rewritten.
pub const MODE_NAT: u32 = 0;
/// Only the MAC addresses are: the backend has the VIP as well, and answers by itself.
pub const MODE_DSR: u32 = 1;
/// IP in IP, to a backend that has the VIP as well.
pub const MODE_IPIP: u32 = 2;
/// Generic UDP encapsulation, to a backend that has the VIP as well.
pub const MODE_GUE: u32 = 3;
/// All of it is rewritten, the source as well; the family may change.
pub const MODE_FULL: u32 = 4;

/// In place of an index into `SLB_SOURCES`.
pub const NO_SOURCE: u16 = 0;

/// The configuration knows this backend.
pub const BACKEND_IN_USE: u32 = 1;
/// New flows may go there, and connectionless ones stay.
pub const BACKEND_USABLE: u32 = 2;
/// A probe has found it healthy. Not for the program: a restarted agent goes on from here.
pub const BACKEND_HEALTHY: u32 = 4;
/// A probe has found it unhealthy. Not for the program either.
pub const BACKEND_UNHEALTHY: u32 = 8;
/// Another VIP or listener has a backend at the same address, port and protocol: what it answers does
/// not tell which of them it is for, so its flows have entries.
pub const BACKEND_SHARED: u32 = 16;
/// What a client sends begins with a PROXY protocol header ([`crate::client_address`]).
pub const BACKEND_PROXY: u32 = 32;
/// A client's first packets have a TCP option that says who it is.
pub const BACKEND_OPTION: u32 = 64;
/// Its time is up: connections that it still has are reset.
pub const BACKEND_CLOSED: u32 = 128;

/// Value of `SLB_LISTENER_INDEX` and `SLB_ENDPOINT_INDEX`. All in one: the program computes where a record is,
/// and does not have to ask a second map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Index<V, const RECORDS: usize> {
    /// Where an endpoint's record is, by its [`crate::hash::endpoint`]: [`INDEX_NONE`], [`INDEX_MANY`], or in its low
    /// half the number of a record, and in its high half that of another of the same hash, or 0. One word each, so it is
    /// replaced as a whole.
    pub places: [u32; INDEX_SLOTS],
    /// The records. The first is nobody's.
    pub records: [Record<V>; RECORDS],
}

/// That of listeners.
pub type ListenerIndex = Index<Listener, MAX_LISTENER_RECORDS>;
/// That of backends' addresses and ports.
pub type EndpointIndex = Index<Origin, MAX_ENDPOINT_RECORDS>;

/// No endpoint has this hash.
pub const INDEX_NONE: u32 = 0;
/// More than two have it, or there was no room for a record: the hash map knows.
pub const INDEX_MANY: u32 = u32::MAX;

/// The word of one or two records; `second` is 0 if there is none.
#[must_use]
#[inline(always)]
pub const fn index_word(first: u32, second: u32) -> u32 {
    second << 16 | first
}

/// The records that a word names, if it does; 0: none.
#[must_use]
#[inline(always)]
pub const fn index_records(word: u32) -> (u32, u32) {
    (word & 0xffff, word >> 16)
}

/// Part of [`Index`]: a copy of an entry of the hash map, which is not written again while a place names it.
/// One cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Record<V> {
    /// The key.
    pub at: Endpoint,
    /// The value.
    pub value: V,
}

const _: () = assert!(size_of::<Record<Listener>>() == 64 && size_of::<Record<Origin>>() == 64);
const _: () = assert!(
    MAX_LISTENER_RECORDS.is_power_of_two()
        && MAX_LISTENER_RECORDS <= 1 << 16
        && MAX_ENDPOINT_RECORDS.is_power_of_two()
        && MAX_ENDPOINT_RECORDS <= 1 << 16,
    "the program takes the lowest bits of half a word"
);

/// Value of `SLB_FILTER`: what every packet is asked first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Written by the program: until when somebody may be talking to any backend directly, in jiffies; 0: nobody
    /// ever has. `SLB_DIRECT` says to which.
    pub direct_until: u32,
    /// What the addresses of a hash may be to us, [`ROLE_VIP`] and [`ROLE_BACKEND`], two bits each. What is not in
    /// here needs no look-up. Of four hashes each, by [`crate::hash::filter`]; the first in the lowest bits.
    pub roles: [u8; FILTER_HASHES / FILTER_PER_BYTE],
}

/// Value of `SLB_ADDRESSES`: what an address is to us.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Roles {
    /// [`ROLE_VIP`], [`ROLE_BACKEND`] and [`ROLE_LOCAL`].
    pub roles: u32,
}

/// A virtual address of an instance.
pub const ROLE_VIP: u32 = 1;
/// The address of a backend.
pub const ROLE_BACKEND: u32 = 2;
/// An address of the gateway itself: what backends send there is the agent's or the kernel's.
pub const ROLE_LOCAL: u32 = 4;

/// Value of `SLB_ENDPOINTS`: where packets from a backend's address and port come from, in the eyes of
/// clients.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Origin {
    /// The VIP that it answers for.
    pub vip: Address,
    /// The listener's port.
    pub port: u32,
    /// Index into `SLB_BACKENDS`.
    pub backend: u32,
    /// [`ORIGIN_SHARED`], [`ORIGIN_TRACKED`], [`ORIGIN_WATCHED`], [`ORIGIN_CLOSING`] and [`ORIGIN_LIMITED`].
    pub flags: u32,
    /// Zero.
    pub spare: u32,
}
const _: () = assert!(size_of::<Origin>() == 32);

/// It answers for other VIPs or listeners, too: a flow's entry says for which.
pub const ORIGIN_SHARED: u32 = 1;
/// Its flows have entries that want to know of SYN, FIN and RST.
pub const ORIGIN_TRACKED: u32 = 2;
/// How it answers SYNs is counted, in `SLB_ANSWERS`.
pub const ORIGIN_WATCHED: u32 = 4;
/// Some of its connections are being reset.
pub const ORIGIN_CLOSING: u32 = 8;
/// Its listener has limits, for answers as well.
pub const ORIGIN_LIMITED: u32 = 16;

/// Value of `SLB_CLIENTS`: the way to a client.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Client {
    /// Whose it is: others with the same hash take turns.
    pub addr: Address,
    /// The VIP that it talks to: routes may depend on it.
    pub vip: Address,
    /// The way; none for an address that is not to be translated for.
    pub hop: Hop,
    /// [`Settings::route_epoch`] at which it was looked up, or [`EPOCH_MET`] or [`EPOCH_TAKEN`].
    pub epoch: u32,
    /// [`CLIENT_LOCAL`].
    pub flags: u32,
    /// The longest packet that gets there, in bytes from its IP header on; 0: not known.
    pub mtu: u32,
    /// Zero.
    pub spare: u32,
}
const _: () = assert!(size_of::<Client>() == 64);

/// Never looked up: this is how the client's packets came.
pub const EPOCH_MET: u32 = 0;
/// Being written.
pub const EPOCH_TAKEN: u32 = u32::MAX;

/// The gateway itself: what comes from a backend is not for a client.
pub const CLIENT_LOCAL: u32 = 1;

/// Value of `SLB_INTERFACES`: an interface of the gateway.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Interface {
    /// 1: packets may be redirected to it.
    pub redirect: u32,
}

/// A packet's addresses and ports as they arrive.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
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

/// Value of `SLB_FLOWS`: a flow that cannot be told from its packets alone. One cache line.
///
/// A place is taken by exchanging its tag for [`TAG_TAKEN`], filled, and published by its tag: whoever
/// finds the tag finds the rest.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// [`TAG_FREE`], [`TAG_TAKEN`], or from the hash of the key: [`tag`].
    pub tag: u32,
    /// Low half of the jiffies after which nobody uses it any more.
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
    /// [`TCP`] or [`UDP`].
    pub proto: u8,
    /// [`FLOW_FORWARD`], [`FLOW_REPLY`] or [`FLOW_DIRECT`].
    pub kind: u8,
    /// [`ESTABLISHED`] and the others.
    pub state: u8,
    /// [`FLOW_FORWARD`]: how its backend is told who the client is: [`TOLD_NOT`], [`TOLD_HEADER`] or
    /// [`TOLD_OPTION`].
    pub told: u8,
    /// [`FLOW_FORWARD`]: source port towards the backend. [`FLOW_REPLY`], if the backend is told by a header who the
    /// client is: when its SYN-ACK was seen, in units of 256 jiffies.
    pub port: u16,
    /// [`FLOW_FORWARD`]: index into `SLB_SOURCES` of the source address towards the backend, or
    /// [`NO_SOURCE`]: the client's own.
    pub source: u16,
    /// [`FLOW_FORWARD`]: place of the reply's entry, or [`NO_PLACE`] if none is needed.
    /// [`FLOW_REPLY`]: place of the client's.
    pub peer: u32,
    /// [`FLOW_FORWARD`] and [`ANSWERED`]: what the client has to acknowledge. If its backend is told who the
    /// client is: [`FLOW_FORWARD`]: number of the client's first byte, and once the backend has got a header, how far
    /// that of the backend's is ahead of the header's; [`FLOW_REPLY`]: number of the backend's first byte.
    pub sequence: u32,
}
const _: () = assert!(size_of::<Flow>() == 64);

/// Nobody's.
pub const TAG_FREE: u32 = 0;
/// Being written.
pub const TAG_TAKEN: u32 = 1;

/// The tag of a flow with this [`crate::hash::flow`].
#[must_use]
#[inline(always)]
pub const fn tag(hash: u64) -> u32 {
    hash as u32 | 2
}

/// Value of `SLB_FLOWS`: the places that a flow may be in.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
        // One branch: the verifier follows each.
        let ([a, b], [c, d]) = (self.src.halves(), key.src.halves());
        let ([e, f], [g, h]) = (self.dst.halves(), key.dst.halves());
        let ports = (self.sport ^ key.sport) | (self.dport ^ key.dport);
        let rest = ports as u32 | (self.proto as u32 ^ key.proto);
        (a ^ c) | (b ^ d) | (e ^ g) | (f ^ h) | rest as u64 == 0
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

/// Value of `SLB_SCRATCH`, per CPU: what the program's stack has no room for. Means nothing afterwards.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Scratch {
    /// The packet.
    pub packet: Packet,
    /// Keys that are made on its account.
    pub keys: Keys,
    /// What one program tells the next.
    pub handover: Handover,
    /// What a backend is told about a client.
    pub words: Words,
    /// Zero.
    pub spare: u32,
    /// The beginning of a packet that something is put into.
    pub head: Head,
    /// Low half of the jiffies when this CPU last sent an ICMP error.
    pub errors_at: u32,
    /// How many it has sent in that jiffy.
    pub errors: u32,
    /// The options of a TCP segment.
    pub options: Options,
}

/// How many ICMP errors a CPU sends per jiffy at most.
pub const ERRORS_PER_JIFFY: u32 = 10;

/// Part of [`Scratch`]: what one program tells the next about the packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Handover {
    /// Length of the frame as it arrived, in bytes.
    pub bytes: u64,
    /// [`crate::hash::flow`] of the client's packets.
    pub hash: u64,
    /// Index into `SLB_BACKENDS`.
    pub backend: u32,
    /// For [`STAGE_FULL`], [`STAGE_TELL`] and [`STAGE_ERROR`]: place of the client's entry in `SLB_FLOWS`.
    pub place: u32,
    /// For [`STAGE_ANSWER`]: the [`crate::verdict::Verdict`] that asks for the answer. For
    /// [`STAGE_FLOW`]: [`FLOW_FORWARD`] or [`FLOW_DIRECT`]. For the others:
    /// [`FLOW_FORWARD`] or [`FLOW_REPLY`].
    pub what: u32,
    /// For [`STAGE_ANSWER`]: the MTU that the packet exceeds.
    pub mtu: u32,
    /// VLAN tags that were taken off, the outer one first, each as it stood in the frame; 0: none.
    pub tags: [u32; 2],
    /// For [`STAGE_TELL`] and [`STAGE_ERROR`]: the way.
    pub hop: Hop,
    /// How many bytes the backend is told about the client; 0: nothing.
    pub told: u32,
    /// For [`STAGE_FLOW`]: the slot that [`STAGE_CHOOSE`] has chosen, or [`NOT_CHOSEN`].
    pub chosen: u32,
}

/// In [`Handover::chosen`]: the schedule decides.
pub const NOT_CHOSEN: u32 = u32::MAX;

/// Key of `SLB_STICKY`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct StickyKey {
    /// The client.
    pub client: Address,
    /// [`Listener::id`].
    pub listener: u32,
    /// Zero.
    pub spare: u32,
}
const _: () = assert!(size_of::<StickyKey>() == 24);

/// Value of `SLB_STICKY`: where a client's flows go.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Sticky {
    /// Index into `SLB_BACKENDS`.
    pub backend: u32,
    /// Low half of the jiffies after which it may go elsewhere.
    pub expires: u32,
}

/// Key of `SLB_ACL`, behind how many bits of it count: the number of the list and the address, both in network
/// order, as the kernel's longest-prefix-match tries want it.
pub type Listed = [u32; 5];

/// The key of an address.
#[must_use]
#[inline(always)]
pub const fn listed(acl: u32, addr: Address) -> Listed {
    let [a, b, c, d] = addr.words();
    [acl.to_be(), a, b, c, d]
}

/// Bits of a [`Listed`] of an IPv6 network whose prefix has so many; one of IPv4 has 96 more.
#[must_use]
pub const fn listed_bits(prefix: u32) -> u32 {
    u32::BITS + prefix
}

/// Value of `SLB_ADMITTED`: what an access list says about a client. The list takes as long as it has prefixes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Admitted {
    /// The client: others with the same hash take turns.
    pub addr: Address,
    /// [`Listener::acl`].
    pub acl: u32,
    /// [`Settings::acl_epoch`] at which the list was asked.
    pub epoch: u32,
    /// Not 0: it is on the list.
    pub is_listed: u32,
    /// Counts the beginnings and the ends of writes: odd while there is one.
    pub write: u32,
}
const _: () = assert!(size_of::<Admitted>() == 32);

/// Key of `SLB_QUIC`: the server ID in connection IDs that the backends of a listener issue.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct QuicKey {
    /// [`Listener::id`].
    pub listener: u32,
    /// [`crate::quic::ConnectionId::server`].
    pub server: u32,
}

/// Value of `SLB_LIMITS`: what a listener may take, as the time that each costs it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Limits {
    /// Nanoseconds per new flow; 0: no limit.
    pub flow_ns: u64,
    /// How many nanoseconds it may be ahead with them.
    pub flow_burst: u64,
    /// 2^-16 nanoseconds per byte of frames in one direction; 0: no limit.
    pub byte_ns: u64,
    /// How many nanoseconds it may be ahead with them.
    pub byte_burst: u64,
}

/// Value of `SLB_METERS`: until when what a listener has taken is paid, in nanoseconds of the monotonic clock:
/// the theoretical arrival time of the generic cell rate algorithm (ITU-T I.371, annex A). One cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Meters {
    /// New flows.
    pub flows: u64,
    /// Bytes from clients.
    pub forward: u64,
    /// Bytes to clients.
    pub reply: u64,
}

/// Value of `SLB_ANSWERS`, per CPU: how a backend answers SYNs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Answers {
    /// By accepting.
    pub accepted: u64,
    /// By a reset.
    pub refused: u64,
}

/// Key of `SLB_FRAGMENTS`: what the fragments of one packet have in common (RFC 791, RFC 8200,
/// section 4.5).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct FragmentKey {
    /// Source address.
    pub src: Address,
    /// Destination address.
    pub dst: Address,
    /// Identification, as it stands in the header.
    pub id: u32,
    /// Protocol of what is fragmented.
    pub proto: u32,
}
const _: () = assert!(size_of::<FragmentKey>() == 40);

/// Value of `SLB_FRAGMENTS`: where the first fragment of a packet went.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Fragment {
    /// Source address afterwards.
    pub src: Address,
    /// Destination address afterwards.
    pub dst: Address,
    /// The way.
    pub hop: Hop,
    /// [`crate::hash::flow`] of the client's packets.
    pub hash: u64,
    /// Index into `SLB_BACKENDS`.
    pub backend: u32,
    /// [`MODE_NAT`] or another.
    pub mode: u32,
    /// [`FLOW_FORWARD`], [`FLOW_REPLY`], or [`FLOW_DIRECT`]: it was left to the kernel.
    pub kind: u32,
    /// The longest packet that gets there, in bytes from its IP header on; 0: not known.
    pub mtu: u32,
    /// Low half of the jiffies after which another packet may have the same key.
    pub expires: u32,
    /// Zero.
    pub spare: u32,
}
const _: () = assert!(size_of::<Fragment>() == 80);

/// Both ends of a packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Ends {
    /// Source address.
    pub src: Address,
    /// Destination address.
    pub dst: Address,
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
}

impl Ends {
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

/// Part of [`Scratch`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Keys {
    /// What a backend would answer with.
    pub reply: FlowKey,
    /// What its client would send.
    pub forward: FlowKey,
    /// Where either goes to.
    pub to: Endpoint,
    /// Of a packet in fragments.
    pub fragments: FragmentKey,
    /// Where its first one goes.
    pub fragment: Fragment,
    /// What its ends are replaced by.
    pub ends: Ends,
    /// Its client.
    pub sticky: StickyKey,
    /// A question to the kernel's routing tables, and the answer: `struct bpf_fib_lookup`.
    pub route: [u64; 8],
}

/// What is written into a packet of a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Translation {
    /// Replaces the source address of a reply, otherwise the destination address.
    pub addr: Address,
    /// Replaces the source port.
    pub sport: u16,
    /// Replaces the destination port.
    pub dport: u16,
    /// [`FLOW_FORWARD`] or [`FLOW_REPLY`]; this wide so that there is no padding to be cleared.
    pub kind: u32,
}

impl Translation {
    /// From a backend to a client.
    #[must_use]
    #[inline(always)]
    pub const fn is_reply(&self) -> bool {
        self.kind == FLOW_REPLY as u32
    }
}

/// From client to backend.
pub const FLOW_FORWARD: u8 = 1;
/// From backend to client.
pub const FLOW_REPLY: u8 = 2;
/// From backend to a client that talks to it without a listener: passed as it is.
pub const FLOW_DIRECT: u8 = 3;

/// The client has sent FIN.
pub const FIN_FORWARD: u8 = 1;
/// The backend has sent FIN.
pub const FIN_REPLY: u8 = 2;
/// Either has sent RST.
pub const RST: u8 = 4;
/// The backend has answered the client's SYN.
pub const ANSWERED: u8 = 8;
/// Both sides are there: the entry does not make room for another before it expires.
pub const ESTABLISHED: u8 = 16;
/// The backend may not know yet who the client is, and is to be told.
pub const UNTOLD: u8 = 32;
/// The backend has accepted the connection that it is told about: its SYN-ACK was seen.
pub const ACCEPTED: u8 = 64;
/// The agent has ended it: its packets are answered with resets.
pub const CLOSED: u8 = 128;

/// The backend of a flow is not told who the client is.
pub const TOLD_NOT: u8 = 0;
/// It is told by a header before the client's first byte ([`crate::client_address`]).
pub const TOLD_HEADER: u8 = 1;
/// It is told by a TCP option.
pub const TOLD_OPTION: u8 = 2;

/// Whether a TCP flow with these state bits has ended.
#[must_use]
#[inline(always)]
pub const fn has_ended(state: u8) -> bool {
    state & (RST | CLOSED) != 0 || state & (FIN_FORWARD | FIN_REPLY) == FIN_FORWARD | FIN_REPLY
}

/// How long ago `then` was, both in the low half of the jiffies.
///
/// Not at all if it is ahead: another CPU may have noted a packet after this one looked at the clock.
#[must_use]
#[inline(always)]
pub const fn age(now: u32, then: u32) -> u32 {
    let age = now.wrapping_sub(then);
    if age > i32::MAX as u32 { 0 } else { age }
}

/// How far `expires` may be behind: entries in use are written about once a second, not per packet.
pub const REFRESH_JIFFIES: u32 = 256;

/// Value of `SLB_SETTINGS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Settings {
    /// Counts changes of the kernel's routes and neighbours: a [`Client`] of another epoch is looked
    /// up again. Neither [`EPOCH_MET`] nor [`EPOCH_TAKEN`].
    pub route_epoch: u32,
    /// How many elements of `SLB_FLOWS` are in use.
    pub buckets: u32,
    /// After so many jiffies without a packet a connection that is not established is forgotten.
    pub opening_jiffies: u32,
    /// The same for one that both sides have closed, or one has reset.
    pub closing_jiffies: u32,
    /// For how many jiffies fragments follow their first (RFC 791, section 3.2).
    pub fragment_jiffies: u32,
    /// What TCP and UDP get at a VIP where no listener is: [`NO_LISTENER_PASS`] or another.
    pub no_listener: u32,
    /// Not 0: XDP is in generic mode somewhere, where packets may be as long as the stack has made them,
    /// so that no MTU counts.
    pub generic: u32,
    /// Not 0: an interface is a veth, and nothing may be sent back by `XDP_TX`.
    pub veth: u32,
    /// Counts access lists: what an [`Admitted`] of another epoch says is asked for again. Never 0.
    pub acl_epoch: u32,
    /// Zero.
    pub spare: u32,
    /// What outer source addresses of tunnels over IPv4 begin with: 16 bits, the rest is zero.
    pub tunnel_v4: Address,
    /// The same over IPv6: 64 bits.
    pub tunnel_v6: Address,
}

/// The kernel gets it.
pub const NO_LISTENER_PASS: u32 = 0;
/// It is dropped.
pub const NO_LISTENER_DROP: u32 = 1;
/// It is answered with a TCP reset, or with ICMP's port unreachable.
pub const NO_LISTENER_RESET: u32 = 2;

/// Value of `SLB_VERDICTS`, per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Counter {
    /// Frames.
    pub packets: u64,
    /// Bytes of those frames, from the Ethernet header on, as they arrived.
    pub bytes: u64,
}

/// Value of `SLB_TRAFFIC`, per CPU: what one backend of one listener has got.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Traffic {
    /// New flows.
    pub flows: u64,
    /// Frames to the backend.
    pub packets: u64,
    /// Bytes to the backend.
    pub bytes: u64,
    /// Frames from the backend.
    pub reply_packets: u64,
    /// Bytes from the backend.
    pub reply_bytes: u64,
}

impl core::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.flows += other.flows;
        self.packets += other.packets;
        self.bytes += other.bytes;
        self.reply_packets += other.reply_packets;
        self.reply_bytes += other.reply_bytes;
    }
}

/// Capacity of `SLB_DECAP`.
pub const DECAP_KINDS: usize = 3;
/// Frames without a tunnel, left alone.
pub const DECAP_PASSED: u32 = 0;
/// Packets taken out of their tunnel.
pub const DECAP_OPENED: u32 = 1;
/// Packets that were marked on their way, whose sender does not know such marks (RFC 6040).
pub const DECAP_DROPPED: u32 = 2;

#[cfg(feature = "user")]
mod pod {
    macro_rules! pod {
        ($($name:ident)*) => {$(
            // SAFETY: `repr(C)`, `Copy`, no implicit padding, and any bytes are a valid value.
            unsafe impl aya::Pod for super::$name {}
        )*};
    }
    pod! { Endpoint Listener Chunk Backend Address Roles Origin Interface FlowKey Flow Bucket }
    // SAFETY: as above, but for what fills a record's cache line, which nobody looks at.
    unsafe impl<V: aya::Pod, const RECORDS: usize> aya::Pod for super::Index<V, RECORDS> {}
    pod! { Settings Counter Traffic Client Filter Packet Keys Handover Scratch }
    pod! { FragmentKey Fragment QuicKey Limits Meters Admitted Answers StickyKey Sticky }
}

#[cfg(test)]
mod tests;
