//! `SLB_SLOTS`: the schedules of all listeners.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Slots in one element of `SLB_SLOTS`; a power of two.
pub const CHUNK_SLOTS: usize = 1_024;
/// Capacity of `SLB_SLOTS` unless the agent asks for more.
pub const DEFAULT_CHUNKS: usize = 1_024;
/// The part of a slot that is an index into `SLB_BACKENDS`, or [`NO_BACKEND`].
pub const SLOT_BACKEND: u32 = 0xffff;
/// Flows of this slot may have entries, which decide.
pub const SLOT_LOOK: u32 = 1 << 31;
/// Flows of this slot get entries.
pub const SLOT_KEEP: u32 = 1 << 30;
/// In a slot: no backend takes new flows.
pub const NO_BACKEND: u32 = 0xffff;

/// Value of `SLB_SLOTS`: a run of a schedule's slots.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct Chunk {
    /// Each [`SLOT_BACKEND`], [`SLOT_LOOK`] and [`SLOT_KEEP`].
    pub slots: [u32; CHUNK_SLOTS],
}
