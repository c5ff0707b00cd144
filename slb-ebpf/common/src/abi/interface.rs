//! `SLB_INTERFACES`, `SLB_INGRESS`, `SLB_MACS` and `SLB_SUBNETS`: by which interfaces packets come.
//!
//! Interfaces have numbers, so that a set of them is a word: bit n is the one with [`Interface::number`] n.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::net::Address;

/// Capacity of `SLB_INTERFACES`: a set of interfaces is a word.
pub const MAX_INTERFACES: usize = 64;
/// Capacity of `SLB_INGRESS`; a power of two.
pub const MAX_INGRESS: usize = 256;
/// Capacity of `SLB_MACS`.
pub const MAX_MACS: usize = 4_096;
/// Capacity of `SLB_SUBNETS`.
pub const MAX_SUBNETS: usize = 4_096;
/// Elements of `SLB_VLANS`: a bit for each identifier.
pub const VLAN_WORDS: usize = 4_096 / 64;
/// Every interface.
pub const ANY_INTERFACE: u64 = u64::MAX;

/// The place of an interface in `SLB_INGRESS` and in [`super::Filter::elsewhere`], which others may have as well.
#[must_use]
#[inline(always)]
pub const fn ingress_place(ifindex: u32) -> usize {
    ifindex as usize % MAX_INGRESS
}

/// Value of `SLB_INTERFACES` and `SLB_INGRESS`: an interface of the gateway.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct Interface {
    /// The kernel's number for it.
    pub ifindex: u32,
    /// Ours: below [`MAX_INTERFACES`], and of no other interface.
    pub number: u32,
    /// 1: packets may be redirected to it.
    pub redirect: u32,
    /// Its MAC address; zeros if it has none.
    pub mac: [u8; 6],
    /// Zero.
    pub spare: [u8; 2],
}
const _: () = assert!(size_of::<Interface>() == 20);

impl Interface {
    /// The set of this one.
    #[must_use]
    #[inline(always)]
    pub const fn set(&self) -> u64 {
        1 << (self.number % MAX_INTERFACES as u32)
    }

    /// Whether a MAC address is the interface's own; `mac` is as the two words behind [`OwnMac::ifindex`] have it.
    #[must_use]
    #[inline(always)]
    pub const fn has_mac(&self, mac: [u32; 2]) -> bool {
        let [_, _, _, high, low]: [u32; 5] = zerocopy::transmute!(*self);
        high == mac[0] && low == mac[1]
    }
}

/// Key of `SLB_MACS`: a MAC address of this host that frames have which come by an interface, besides that one's own.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default, FromBytes, Immutable, IntoBytes,
)]
pub struct OwnMac {
    /// The interface.
    pub ifindex: u32,
    /// The address.
    pub mac: [u8; 6],
    /// Zero.
    pub spare: [u8; 2],
}
const _: () = assert!(size_of::<OwnMac>() == 12);

impl OwnMac {
    /// From an interface, and the first four bytes and the others of an address as they stand in a frame.
    #[must_use]
    #[inline(always)]
    pub const fn from_words(words: [u32; 3]) -> Self {
        zerocopy::transmute!(words)
    }
}

/// Key of `SLB_SUBNETS`, behind how many bits of it count: an address in network order, as the kernel's
/// longest-prefix-match tries want it. One of IPv4 has 96 bits more than its prefix.
pub type Subnet = [u32; 4];

/// The key of an address.
#[must_use]
#[inline(always)]
pub const fn subnet(addr: Address) -> Subnet {
    addr.words()
}
