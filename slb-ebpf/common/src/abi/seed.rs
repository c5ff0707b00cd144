//! What hashes are made with, so that no sender can choose a slot or a bucket.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// How many words a tuple has at most: the two halves of two IPv6 addresses, and ports with the protocol.
pub const SEED_WORDS: usize = 5;

/// Secret multipliers of [`crate::hash`], one per word of a tuple. Odd, so that no word loses bits.
#[repr(transparent)]
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, FromBytes, Immutable, IntoBytes,
)]
pub struct Seed([u64; SEED_WORDS]);

impl Seed {
    /// A seed that is known, for tests and measurements: the first outputs of SplitMix64.
    pub const PUBLIC: Self = Self::new([
        0xe220_a839_7b1d_cdaf,
        0x6e78_9e6a_a1b9_65f4,
        0x06c4_5d18_8009_454f,
        0xf88b_b8a8_724c_81ec,
        0x1b39_896a_51a8_749b,
    ]);

    /// A seed of random words.
    #[must_use]
    pub const fn new(words: [u64; SEED_WORDS]) -> Self {
        let [a, b, c, d, e] = words;
        Self([a | 1, b | 1, c | 1, d | 1, e | 1])
    }

    /// Whether it was ever written: maps begin with zeros.
    #[must_use]
    pub const fn is_set(&self) -> bool {
        self.0[0] != 0
    }

    /// The words.
    #[must_use]
    #[inline(always)]
    pub const fn words(&self) -> &[u64; SEED_WORDS] {
        &self.0
    }
}

/// Without the words, which are secret.
impl core::fmt::Debug for Seed {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(if self.is_set() { "Seed(secret)" } else { "Seed(none)" })
    }
}
