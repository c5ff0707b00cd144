//! `SLB_LISTENERS`: where clients connect to, and by which rules a backend is chosen.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::Seed;
use crate::flags::flags;

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
    /// By what one of its slots is chosen.
    pub scheduler: Scheduler,
    /// The same of the schedule before; one of those that are asked about every packet.
    pub previous_scheduler: Scheduler,
    /// Where its slots begin in `SLB_SLOTS`.
    pub first_chunk: u32,
    /// How many slots it has; 0: no backend takes new flows.
    pub slots: u32,
    /// Where the slots of the schedule before begin, which connections without an entry go by.
    pub previous_chunk: u32,
    /// How many there are; 0: no connection goes by them.
    pub previous_slots: u32,
    /// What it asks of the packet path.
    pub flags: ListenerFlags,
    /// Number of its access list in `SLB_ACL`.
    pub acl: u32,
    /// For how many jiffies after its last new flow a client is kept with its backend; 0: it is not.
    pub sticky_jiffies: u32,
    /// Zero.
    pub spare: u32,
    /// With what the hash is made that chooses a slot.
    pub seed: Seed,
    /// The same of the schedule before.
    pub previous_seed: Seed,
}
const _: () = assert!(size_of::<Listener>() == 120);

flags! {
    /// What a listener asks of the packet path.
    pub struct ListenerFlags: u32 {
        /// `slb_policy` looks at its packets.
        const GUARDED = 1;
        /// `slb_scheduler` chooses backends for its flows.
        const CHOOSES = 2;
        /// `SLB_LIMITS` has limits for it.
        const LIMITED = 4;
        /// Only clients on the access list get in.
        const ALLOW = 8;
        /// Clients on the access list do not get in.
        const DENY = 16;
    }
}

/// By what a slot is chosen.
#[repr(transparent)]
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    FromBytes,
    Immutable,
    IntoBytes,
)]
pub struct Scheduler(u16);

impl Scheduler {
    /// The slot is chosen by the hash of the 4-tuple (Maglev). A flow has an entry only where the slot
    /// says so.
    pub const HASH: Self = Self(1);
    /// The same by the hash of the source address.
    pub const SOURCE: Self = Self(2);
    /// The slots are taken in turn. With this and what follows every flow has an entry: see
    /// [`Scheduler::is_by_hash`].
    pub const RING: Self = Self(3);
    /// Of [`LEAST_CANDIDATES`] slots in turn, the backend with the fewest flows for its weight.
    pub const LEAST: Self = Self(4);
    /// The slot is chosen by the hash of the QUIC connection ID, unless that names a backend.
    pub const QUIC: Self = Self(5);

    /// Whether it chooses by what all packets of a flow have in common, so that it can be asked about each.
    #[must_use]
    #[inline(always)]
    pub const fn is_by_hash(self) -> bool {
        self.0 < Self::RING.0
    }
}

/// How many backends [`Scheduler::LEAST`] compares. The least of eight is within a flow or two of the least of
/// all (Mitzenmacher, "The power of two choices in randomized load balancing", 2001), at a cost that does not
/// grow with their number.
pub const LEAST_CANDIDATES: u32 = 8;
