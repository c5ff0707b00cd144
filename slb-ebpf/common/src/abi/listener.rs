//! `SLB_LISTENERS`: where clients connect to, and by which rules a backend is chosen.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Capacity of `SLB_LISTENERS` and `SLB_RR_CURSORS`: one per VIP, protocol and port.
pub const MAX_LISTENERS: usize = 8_192;

/// Value of `SLB_LISTENERS`.
///
/// Replaced as a whole, and a hash map swaps a value by swapping a pointer: a packet sees either the
/// old schedule or the new one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct Listener {
    /// Index into `SLB_RR_CURSORS`; never changes while the listener exists.
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
    /// How many there are; 0: no connection goes by them.
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
/// `slb_policy` looks at its packets.
pub const LISTENER_GUARDED: u32 = 1;
/// `slb_scheduler` chooses backends for its flows.
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
