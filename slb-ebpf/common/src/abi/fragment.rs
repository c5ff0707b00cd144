//! `SLB_FRAGMENTS`: where first fragments went.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::backend::{Mode, NextHop};
use crate::net::Address;

/// Capacity of `SLB_FRAGMENTS`: datagrams whose fragments are on their way at the same time.
pub const MAX_FRAGMENTS: usize = 16_384;
/// How many of these one source (an IPv4 address, an IPv6 network of 64 bits) has per destination, and over IPv4 per
/// protocol: more push out its own. A power of two.
pub const FRAGMENTS_PER_SOURCE: u32 = 256;

/// Key of `SLB_FRAGMENTS`: of what the fragments of one packet have in common (RFC 791, RFC 8200, section 4.5), so much
/// that a source has few records. [`Fragment`] has the rest.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, FromBytes, Immutable, IntoBytes)]
pub struct FragmentKey {
    /// Source address; the first half of one of IPv6, which is a site's.
    pub src: Address,
    /// Destination address.
    pub dst: Address,
    /// Which of the source's records: below [`FRAGMENTS_PER_SOURCE`]. Those with the same one take turns.
    pub number: u32,
    /// Protocol of what is fragmented.
    pub proto: u32,
}
const _: () = assert!(size_of::<FragmentKey>() == 40);

/// Value of `SLB_FRAGMENTS`: where the first fragment of a packet went.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct Fragment {
    /// Source address afterwards.
    pub src: Address,
    /// Destination address afterwards.
    pub dst: Address,
    /// The way.
    pub hop: NextHop,
    /// [`crate::hash::flow`] of the client's packets.
    pub hash: u64,
    /// Index into `SLB_BACKENDS`.
    pub backend: u32,
    /// How packets reach the backend.
    pub mode: Mode,
    /// A [`super::FlowKind`]; [`super::FlowKind::Bypass`]: it was left to the kernel.
    pub kind: u32,
    /// The longest packet that gets there, in bytes from its IP header on; 0: not known.
    pub mtu: u32,
    /// Low half of the jiffies after which another packet may have the same key.
    pub expires: u32,
    /// Identification of the packet, as it stands in the header.
    pub id: u32,
    /// Source address of the packet as it comes.
    pub from: Address,
    /// The interfaces that the others may come by.
    pub interfaces: u64,
}
const _: () = assert!(size_of::<Fragment>() == 104);
