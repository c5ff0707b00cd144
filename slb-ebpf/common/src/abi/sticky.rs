//! `SLB_STICKY`: session persistence.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::net::Address;

/// Capacity of `SLB_STICKY`: clients that are kept with their backend.
pub const MAX_STICKY: usize = 131_072;

/// Key of `SLB_STICKY`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, FromBytes, Immutable, IntoBytes)]
pub struct StickyKey {
    /// The client.
    pub client: Address,
    /// [`super::Listener::id`].
    pub listener: u32,
    /// Zero.
    pub spare: u32,
}
const _: () = assert!(size_of::<StickyKey>() == 24);

/// Value of `SLB_STICKY`: where a client's flows go.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct Sticky {
    /// Index into `SLB_BACKENDS`.
    pub backend: u32,
    /// Low half of the jiffies after which it may go elsewhere.
    pub expires: u32,
}
