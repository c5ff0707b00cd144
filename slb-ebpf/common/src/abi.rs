//! Keys, values and limits of the BPF maps.
//!
//! Everything here is `repr(C)` without implicit padding and made of integers and byte arrays only,
//! so that any bytes are a valid value and hash keys compare byte by byte. Addresses are bytes in
//! network order; all other numbers are in host order. `docs/maps.md` describes the maps themselves.

use core::fmt;

/// Names the pin directory (`…/v1`). Changes with any layout in this file, so that an old map and a
/// new program never meet.
pub const ABI_VERSION: u32 = 1;

/// Capacity of `SLB_LISTENERS` and `SLB_CURSORS`: one per VIP, protocol and port.
pub const MAX_LISTENERS: usize = 8_192;
/// Capacity of `SLB_BACKENDS`: one per listener, backend and address.
pub const MAX_BACKENDS: usize = 65_536;
/// Capacity of `SLB_ADDRESSES` and `SLB_ENDPOINTS`.
pub const MAX_ENDPOINTS: usize = 65_536;
/// Capacity of `SLB_INTERFACES`.
pub const MAX_INTERFACES: usize = 64;
/// Slots in one element of `SLB_SLOTS`; a power of two.
pub const CHUNK_SLOTS: usize = 1_024;
/// Capacity of `SLB_SLOTS` unless the agent asks for more.
pub const DEFAULT_CHUNKS: usize = 1_024;
/// Capacity of `SLB_FLOWS` unless the agent asks for another; a flow takes two entries.
pub const DEFAULT_FLOW_ENTRIES: usize = 2 * 1_048_576;

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
    /// From four words in network order.
    #[must_use]
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        // SAFETY: both are 16 bytes, and any bytes are a valid `Address`.
        unsafe { core::mem::transmute::<[u32; 4], Self>(words) }
    }

    /// From the 32 bits of an IPv4 address in network order.
    #[must_use]
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self::from_words([0, 0, 0xffff_u32.to_be(), word])
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
        let words = self.words();
        words[0] == 0 && words[1] == 0 && words[2] == 0xffff_u32.to_be()
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Index into `SLB_CURSORS`; never changes while the listener exists.
    pub id: u32,
    /// [`SCHEDULER_HASH`] or [`SCHEDULER_RING`].
    pub scheduler: u32,
    /// Where its slots begin in `SLB_SLOTS`.
    pub first_chunk: u32,
    /// How many slots it has; 0: no backend takes new flows.
    pub slots: u32,
}
const _: () = assert!(size_of::<Listener>() == 16);

/// The slot is chosen by the hash of the 4-tuple (Maglev).
pub const SCHEDULER_HASH: u32 = 1;
/// The slots are taken in turn.
pub const SCHEDULER_RING: u32 = 2;

/// Value of `SLB_SLOTS`: a run of a schedule's slots.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Indices into `SLB_BACKENDS`.
    pub backends: [u32; CHUNK_SLOTS],
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
    /// Port that packets are sent to.
    pub port: u32,
    /// [`BACKEND_IN_USE`], [`BACKEND_USABLE`], [`BACKEND_HEALTHY`] and [`BACKEND_UNHEALTHY`].
    pub flags: u32,
    /// A flow without a packet for this many jiffies is forgotten.
    pub idle_jiffies: u32,
    /// [`Listener::id`] of the listener that this is a backend of.
    pub listener: u32,
    /// The way to it.
    pub hop: Hop,
}
const _: () = assert!(size_of::<Backend>() == 48);

/// The configuration knows this backend.
pub const BACKEND_IN_USE: u32 = 1;
/// New flows may go there, and connectionless ones stay.
pub const BACKEND_USABLE: u32 = 2;
/// A probe has found it healthy. Not for the program: a restarted agent goes on from here.
pub const BACKEND_HEALTHY: u32 = 4;
/// A probe has found it unhealthy. Not for the program either.
pub const BACKEND_UNHEALTHY: u32 = 8;

/// Value of `SLB_ADDRESSES`: what an address is to us.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Roles {
    /// [`ROLE_VIP`] and [`ROLE_BACKEND`].
    pub roles: u32,
}

/// A virtual address of an instance.
pub const ROLE_VIP: u32 = 1;
/// The address of a backend.
pub const ROLE_BACKEND: u32 = 2;

/// Value of `SLB_ENDPOINTS`: a backend's address and port, which clients may also talk to directly.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DirectEndpoint {
    /// Index into `SLB_BACKENDS` of a backend with this address and port.
    pub backend: u32,
}

/// Value of `SLB_INTERFACES`: an interface of the gateway.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Interface {
    /// 1: packets may be redirected to it.
    pub redirect: u32,
}

/// Key of `SLB_FLOWS`: a packet's addresses and ports as they arrive.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

impl FlowKey {
    /// Where the packet goes.
    #[must_use]
    #[inline(always)]
    pub const fn destination(&self) -> Endpoint {
        Endpoint { addr: self.dst, port: self.dport as u32, proto: self.proto }
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

/// Value of `SLB_FLOWS`: what to do with packets of one direction of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// [`FLOW_FORWARD`]: replaces the destination address. [`FLOW_REPLY`]: replaces the source.
    pub addr: Address,
    /// Replaces the source port.
    pub sport: u16,
    /// Replaces the destination port.
    pub dport: u16,
    /// Index into `SLB_BACKENDS`.
    pub backend: u32,
    /// [`FLOW_FORWARD`], [`FLOW_REPLY`] or [`FLOW_DIRECT`].
    pub kind: u32,
    /// [`FIN_FORWARD`], [`FIN_REPLY`] and [`RST`] as far as seen by this entry.
    pub state: u32,
    /// Low half of the jiffies of a recent packet; behind by up to [`REFRESH_JIFFIES`].
    pub last_seen: u32,
    /// [`Settings::route_epoch`] at which `hop` was looked up.
    pub epoch: u32,
    /// [`FLOW_REPLY`]: the way to the client. Otherwise without meaning.
    pub hop: Hop,
}
const _: () = assert!(size_of::<Flow>() == 56);

impl Flow {
    /// What is to be written into its packets.
    #[must_use]
    #[inline(always)]
    pub const fn translation(&self) -> Translation {
        Translation { addr: self.addr, sport: self.sport, dport: self.dport, kind: self.kind }
    }

    /// The key of this flow's other direction, given the key of this one.
    ///
    /// Backends answer to what they were sent, clients send to what they were answered from.
    #[must_use]
    #[inline(always)]
    pub const fn twin(&self, key: &FlowKey) -> FlowKey {
        if self.kind == FLOW_REPLY {
            FlowKey { src: key.dst, dst: self.addr, sport: self.dport, dport: self.sport, ..*key }
        } else {
            FlowKey { src: self.addr, dst: key.src, sport: self.dport, dport: self.sport, ..*key }
        }
    }
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
        self.kind == FLOW_REPLY
    }
}

/// From client to backend.
pub const FLOW_FORWARD: u32 = 1;
/// From backend to client.
pub const FLOW_REPLY: u32 = 2;
/// From backend to a client that talks to it without a listener: passed as it is.
pub const FLOW_DIRECT: u32 = 3;

/// The client has sent FIN.
pub const FIN_FORWARD: u32 = 1;
/// The backend has sent FIN.
pub const FIN_REPLY: u32 = 2;
/// Either has sent RST.
pub const RST: u32 = 4;

/// Whether a TCP flow with these state bits, of both of its entries, has ended.
#[must_use]
#[inline(always)]
pub const fn has_ended(state: u32) -> bool {
    state & RST != 0 || state & (FIN_FORWARD | FIN_REPLY) == FIN_FORWARD | FIN_REPLY
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

/// How far `last_seen` may be behind: entries in use are written about once a second, not per packet.
pub const REFRESH_JIFFIES: u32 = 256;

/// Value of `SLB_SETTINGS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Settings {
    /// Counts changes of the kernel's routes and neighbours: a [`Flow::hop`] of another epoch is
    /// looked up again.
    pub route_epoch: u32,
}

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

#[cfg(feature = "user")]
mod pod {
    macro_rules! pod {
        ($($name:ident)*) => {$(
            // SAFETY: `repr(C)`, `Copy`, no implicit padding, and any bytes are a valid value.
            unsafe impl aya::Pod for super::$name {}
        )*};
    }
    pod! { Endpoint Listener Chunk Backend Address Roles DirectEndpoint Interface FlowKey Flow }
    pod! { Settings Counter Traffic }
}

#[cfg(test)]
mod tests;
