//! `SLB_SETTINGS`.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::Seed;
use crate::net::Address;

/// Value of `SLB_SETTINGS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct Settings {
    /// Counts changes of the kernel's routes and neighbours: a [`super::ClientNextHop`] of another epoch is looked
    /// up again. Neither [`super::EPOCH_LEARNED`] nor [`super::EPOCH_LOCKED`].
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
    /// Counts access lists: what an [`super::AclCacheEntry`] of another epoch says is asked for again. Never 0.
    pub acl_epoch: u32,
    /// Zero.
    pub spare: u32,
    /// What outer source addresses of tunnels over IPv4 begin with: 16 bits, the rest is zero.
    pub tunnel_v4: Address,
    /// The same over IPv6: 64 bits.
    pub tunnel_v6: Address,
    /// What schedules that are made go by: each listener has a copy. It changes when the configuration names another.
    pub seed: Seed,
    /// Chooses the buckets of `SLB_FLOWS` and the places of `SLB_SRC_POLICER`; never changes while those exist.
    pub table_seed: Seed,
}

/// The kernel gets it.
pub const NO_LISTENER_PASS: u32 = 0;
/// It is dropped.
pub const NO_LISTENER_DROP: u32 = 1;
/// It is answered with a TCP reset, or with ICMP's port unreachable.
pub const NO_LISTENER_RESET: u32 = 2;
