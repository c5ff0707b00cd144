//! The Internet checksum (RFC 1071), and its update in place (RFC 1624).
//!
//! All words are taken as they stand in the frame: the sum of one's complement does not depend on
//! the byte order, only the result does, and it is stored as it was summed (RFC 1071, section 2B).

/// How much a checksummed text has changed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Delta(u64);

impl Delta {
    /// A 16-bit word was replaced.
    #[inline(always)]
    pub const fn replace16(&mut self, old: u16, new: u16) {
        self.0 += (!old) as u64 + new as u64;
    }

    /// A 32-bit word was replaced.
    #[inline(always)]
    pub const fn replace32(&mut self, old: u32, new: u32) {
        self.0 += (!old) as u64 + new as u64;
    }

    /// The checksum of the changed text, given that of the old one.
    #[must_use]
    #[inline(always)]
    pub const fn apply(self, checksum: u16) -> u16 {
        !fold(self.0 + (!checksum) as u64)
    }
}

/// Folds a sum of fewer than 2^16 words of 32 bits to 16 bits.
#[must_use]
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}
