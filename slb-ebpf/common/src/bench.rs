//! What `cargo xtask bench` tells the program that puts frames back.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bytes of a frame's headers that are written again: a multiple of 8, no longer than the shortest frame.
pub const HEADER_BYTES: usize = 80;

/// Name of the program that only redirects.
pub const REDIRECT: &str = "redirect";

/// A frame, and how flows differ.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct Template {
    /// Its first bytes.
    pub words: [u64; HEADER_BYTES / 8],
    /// Its length in bytes.
    pub len: u32,
    /// By how many bytes the program grows its head; less than 0: shrinks it.
    pub grown: i32,
    /// Not 0: there was a frame before this one.
    pub has_run: u32,
    /// Not 0: IPv4, without options; otherwise IPv6.
    pub is_v4: u32,
    /// How many flows take turns; 1: the headers as they are.
    pub flows: u32,
    /// The next one.
    pub next: u32,
    /// Ports per address.
    pub ports: u32,
    /// The first of them.
    pub first_port: u32,
    /// The first address, or 32 bits of it, in host order.
    pub first_addr: u32,
    /// Offset of the address that differs: 26 or 30, 34 or 50.
    pub addr_at: u32,
    /// Offset of the port that does.
    pub port_at: u32,
    /// Interface that [`REDIRECT`] sends it through.
    pub ifindex: u32,
    /// For the references: slots of a schedule.
    pub slots: u32,
    /// And how many backends they name.
    pub backends: u32,
    /// Zero.
    pub spare: u32,
    /// Sum of the IPv4 header without checksum and that address, folded.
    pub sum: u32,
}
