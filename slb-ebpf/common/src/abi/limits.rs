//! `SLB_LIMITS`, `SLB_POLICERS` and `SLB_SRC_POLICER`: limits of new flows and of bandwidth.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Value of `SLB_LIMITS`: what a listener may take, as the time that each costs it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct Limits {
    /// Nanoseconds per new flow; 0: no limit.
    pub flow_ns: u64,
    /// How many nanoseconds it may be ahead with them.
    pub flow_burst: u64,
    /// Nanoseconds per new flow of one source; 0: no limit.
    pub source_ns: u64,
    /// How many nanoseconds a source may be ahead with them.
    pub source_burst: u64,
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

/// Capacity of `SLB_SRC_POLICER`; a power of two.
pub const MAX_SOURCE_POLICERS: usize = 1 << 16;

/// Value of `SLB_SRC_POLICER`: until when what a source has taken of a listener is paid. One word, so that it is written
/// by one exchange.
///
/// A place belongs to the source that has used it last. One that is overwritten begins with nothing taken: a flood of
/// other sources lets a source have more, and never less.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct SourcePolicer {
    /// In the high 16 bits those of [`crate::hash::source`], in the others a time of the monotonic clock in units of 1 024
    /// nanoseconds.
    pub paid: u64,
}

impl SourcePolicer {
    const TIME_BITS: u32 = 48;
    const UNIT_BITS: u32 = 10;

    /// The place of a source with this [`crate::hash::source`].
    #[must_use]
    #[inline(always)]
    pub const fn place(source: u32) -> u32 {
        source % MAX_SOURCE_POLICERS as u32
    }

    /// Until when it is paid, in nanoseconds; 0: it is another source's.
    #[must_use]
    #[inline(always)]
    pub const fn paid(self, source: u32) -> u64 {
        if self.paid >> Self::TIME_BITS != source as u64 >> 16 {
            return 0;
        }
        (self.paid & ((1 << Self::TIME_BITS) - 1)) << Self::UNIT_BITS
    }

    /// Of a source that has paid until then, in nanoseconds.
    #[must_use]
    #[inline(always)]
    pub const fn new(source: u32, until: u64) -> Self {
        let time = until >> Self::UNIT_BITS & ((1 << Self::TIME_BITS) - 1);
        Self { paid: (source as u64 >> 16) << Self::TIME_BITS | time }
    }
}
