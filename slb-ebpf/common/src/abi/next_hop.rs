//! `SLB_NEXT_HOPS`: the next hops to clients.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::backend::NextHop;
use crate::net::Address;

/// Capacity of `SLB_NEXT_HOPS`; a power of two.
pub const MAX_NEXT_HOPS: usize = 65_536;

/// Value of `SLB_NEXT_HOPS`: the way to a client.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct ClientNextHop {
    /// Whose it is: others with the same hash take turns.
    pub addr: Address,
    /// The VIP that it talks to: routes may depend on it.
    pub vip: Address,
    /// The way; none for an address that is not to be translated for.
    pub hop: NextHop,
    /// [`super::Settings::route_epoch`] at which it was looked up, or [`EPOCH_LEARNED`] or [`EPOCH_LOCKED`].
    pub epoch: u32,
    /// [`NEXT_HOP_LOCAL`].
    pub flags: u32,
    /// The longest packet that gets there, in bytes from its IP header on; 0: not known.
    pub mtu: u32,
    /// Zero.
    pub spare: u32,
}
const _: () = assert!(size_of::<ClientNextHop>() == 64);
/// Never looked up: this is how the client's packets came.
pub const EPOCH_LEARNED: u32 = 0;
/// Being written.
pub const EPOCH_LOCKED: u32 = u32::MAX;
/// The gateway itself: what comes from a backend is not for a client.
pub const NEXT_HOP_LOCAL: u32 = 1;
