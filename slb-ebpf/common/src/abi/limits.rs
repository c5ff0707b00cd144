//! `SLB_LIMITS` and `SLB_POLICERS`: limits of new flows and of bandwidth.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Value of `SLB_LIMITS`: what a listener may take, as the time that each costs it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct Limits {
    /// Nanoseconds per new flow; 0: no limit.
    pub flow_ns: u64,
    /// How many nanoseconds it may be ahead with them.
    pub flow_burst: u64,
    /// 2^-16 nanoseconds per byte of frames in one direction; 0: no limit.
    pub byte_ns: u64,
    /// How many nanoseconds it may be ahead with them.
    pub byte_burst: u64,
}

/// Value of `SLB_POLICERS`: until when what a listener has taken is paid, in nanoseconds of the monotonic clock:
/// the theoretical arrival time of the generic cell rate algorithm (ITU-T I.371, annex A). One cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct Policers {
    /// New flows.
    pub flows: u64,
    /// Bytes from clients.
    pub forward: u64,
    /// Bytes to clients.
    pub reply: u64,
    /// Zero.
    pub spare: [u64; 5],
}
const _: () = assert!(size_of::<Policers>() == 64);
