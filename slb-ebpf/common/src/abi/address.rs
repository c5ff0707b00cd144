//! `SLB_FILTER` and `SLB_ADDRESSES`: what an address is to us.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::interface::MAX_INGRESS;
use crate::flags::flags;

/// Hashes in `SLB_FILTER`; a power of two. With ten thousand addresses of ours one stranger in a hundred has
/// the hash of one.
pub const FILTER_HASHES: usize = 1 << 20;
/// Of so many in one byte.
pub const FILTER_PER_BYTE: usize = 4;

/// Value of `SLB_FILTER`: what every packet is asked first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct Filter {
    /// Written by the program: until when answers that may be the first to a direct flow are looked for in the flow
    /// table, in jiffies; 0: there never was one. `SLB_BYPASS` says of which backends all packets are.
    pub bypass_until: u32,
    /// Written by the program: until when a connection may have an entry that was made in its middle, and be proven by
    /// any segment of its backend's, in jiffies; 0: none ever has.
    pub adopted_until: u32,
    /// What the addresses of a hash may be to us, [`Roles::FILTERED`], two bits each. What is not in
    /// here needs no look-up. Of four hashes each, by [`crate::hash::filter`]; the first in the lowest bits.
    pub roles: [u8; FILTER_HASHES / FILTER_PER_BYTE],
    /// Networks in which there are subnets that are not behind an interface, by its place ([`super::ingress_place`]) and
    /// [`crate::hash::network`], a bit each; the first in the lowest bits. Interfaces of one place have those of all. A
    /// source in another network comes from where it may.
    pub elsewhere: [u8; MAX_INGRESS * NETWORK_BYTES],
}

/// Part of [`Filter::elsewhere`] that is one place's.
pub const NETWORK_BYTES: usize = (1 << 16) / 8;

flags! {
    /// Value of `SLB_ADDRESSES`: what an address is to us. Zero: nothing.
    pub struct Roles: u32 {
        /// A virtual address of an instance.
        const VIP = 1;
        /// The address of a backend.
        const BACKEND = 2;
        /// An address of the gateway itself: what backends send there is the agent's or the kernel's.
        const LOCAL = 4;
        /// The broadcast address of a subnet.
        const BROADCAST = 8;
    }
}

impl Roles {
    /// Those that [`Filter`] knows.
    pub const FILTERED: Self = Self::VIP.union(Self::BACKEND);
    /// Of addresses that no packet from outside can have as its source.
    pub const NO_SOURCE: Self = Self::VIP.union(Self::LOCAL).union(Self::BROADCAST);

    /// What [`Filter`] says of an address with these roles. Those that it has no bits for count as
    /// [`Roles::BACKEND`]: the exact roles are looked up of these, too.
    #[must_use]
    pub const fn filtered(self) -> Self {
        let others =
            if self.difference(Self::VIP).is_empty() { Self::empty() } else { Self::BACKEND };
        self.intersection(Self::VIP).union(others)
    }
}
