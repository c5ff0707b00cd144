//! `SLB_ACL` and `SLB_ACL_CACHE`: access lists.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::net::Address;

/// Capacity of `SLB_ACL`: prefixes of all lists together, twice, so that each can be replaced at once.
pub const MAX_PREFIXES: usize = 1 << 18;
/// Capacity of `SLB_ACL_CACHE`; a power of two.
pub const MAX_ACL_CACHE: usize = 65_536;

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

/// Value of `SLB_ACL_CACHE`: what an access list says about a client. The list takes as long as it has prefixes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct AclCacheEntry {
    /// The client: others with the same hash take turns.
    pub addr: Address,
    /// [`super::Listener::acl`].
    pub acl: u32,
    /// [`super::Settings::acl_epoch`] at which the list was asked.
    pub epoch: u32,
    /// Not 0: it is on the list.
    pub is_listed: u32,
    /// Counts the beginnings and the ends of writes: odd while there is one.
    pub write: u32,
}
const _: () = assert!(size_of::<AclCacheEntry>() == 32);
