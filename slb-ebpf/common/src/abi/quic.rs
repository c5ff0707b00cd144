//! `SLB_QUIC`: backends by their QUIC server ID.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::backend::MAX_BACKENDS;

/// Capacity of `SLB_QUIC`: a backend has one server ID.
pub const MAX_QUIC: usize = MAX_BACKENDS;

/// Key of `SLB_QUIC`: the server ID in connection IDs that the backends of a listener issue.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Default,
    FromBytes,
    Immutable,
    IntoBytes,
)]
pub struct QuicKey {
    /// [`super::Listener::id`].
    pub listener: u32,
    /// [`crate::quic::ConnectionId::server`].
    pub server: u32,
}
