//! `SLB_VERDICTS`, `SLB_TRAFFIC`, `SLB_PASSIVE_HC` and `SLB_DECAP`: counters per CPU.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Value of `SLB_PASSIVE_HC`, per CPU: how a backend answers SYNs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct SynAnswers {
    /// By accepting.
    pub accepted: u64,
    /// By a reset.
    pub refused: u64,
}

/// Value of `SLB_VERDICTS`, per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct Counter {
    /// Frames.
    pub packets: u64,
    /// Bytes of those frames, from the Ethernet header on, as they arrived.
    pub bytes: u64,
}

/// Value of `SLB_TRAFFIC`, per CPU: what one backend of one listener has got.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct Traffic {
    /// New flows.
    pub flows: u64,
    /// Frames to the backend.
    pub packets: u64,
    /// Bytes to the backend.
    pub bytes: u64,
    /// Frames from the backend.
    pub reply_packets: u64,
    /// Bytes from the backend.
    pub reply_bytes: u64,
}

impl core::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.flows += other.flows;
        self.packets += other.packets;
        self.bytes += other.bytes;
        self.reply_packets += other.reply_packets;
        self.reply_bytes += other.reply_bytes;
    }
}

/// Capacity of `SLB_DECAP`.
pub const DECAP_KINDS: usize = 3;
/// Frames without a tunnel, left alone.
pub const DECAP_PASSED: u32 = 0;
/// Packets taken out of their tunnel.
pub const DECAP_OPENED: u32 = 1;
/// Packets that were marked on their way, whose sender does not know such marks (RFC 6040).
pub const DECAP_DROPPED: u32 = 2;
