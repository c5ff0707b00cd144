//! The Internet checksum (RFC 1071), and its update in place (RFC 1624).
//!
//! All words are taken as they stand in the frame: the sum of one's complement does not depend on
//! the byte order, only the result does, and it is stored as it was summed (RFC 1071, section 2B).

use crate::abi::Address;

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

    /// A 32-bit word is there that was not.
    #[inline(always)]
    pub const fn add32(&mut self, new: u32) {
        self.0 += new as u64;
    }

    /// An IPv6 address was replaced. No loop: Linux 6.1 takes not every one that a compiler makes.
    #[inline(always)]
    pub const fn replace_address(&mut self, old: Address, new: Address) {
        let ([a, b, c, d], [e, f, g, h]) = (old.words(), new.words());
        self.replace32(a, e);
        self.replace32(b, f);
        self.replace32(c, g);
        self.replace32(d, h);
    }

    /// The checksum of the changed text, given that of the old one.
    #[must_use]
    #[inline(always)]
    pub const fn apply(self, checksum: u16) -> u16 {
        !fold(self.0 + (!checksum) as u64)
    }

    /// The same for UDP (RFC 768): 0 says that the sender made none, which stays so, and a sum of 0 is
    /// sent as its complement.
    #[must_use]
    #[inline(always)]
    pub const fn apply_udp(self, checksum: u16) -> u16 {
        if checksum == 0 {
            return 0;
        }
        let checksum = self.apply(checksum);
        if checksum == 0 { 0xffff } else { checksum }
    }

    /// The change of the sum alone.
    #[must_use]
    #[inline(always)]
    pub const fn folded(self) -> u16 {
        fold(self.0)
    }

    /// Both changes.
    #[must_use]
    #[inline(always)]
    pub const fn plus(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

/// Folds a sum of fewer than 2^16 words of 32 bits to 16 bits.
#[must_use]
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    // With the 16-bit digits c, b, a the product has the digits c + b + a, b + a and a, and the carry of
    // the second into the first is the one that comes round. If c is 1, b is 0 and a small.
    (sum.wrapping_mul(0x1_0001_0001) >> 32) as u16
}

/// Whether a text with this sum, of which its checksum is a part, is intact: whether it folds to 0xffff.
///
/// That it does if it is divisible by 0xffff, and not 0. An odd number's multiples are those that its inverse
/// makes small (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994, section 9).
#[must_use]
#[inline(always)]
pub const fn is_valid(sum: u64) -> bool {
    const MODULUS: u64 = 0xffff;
    // (2^16 - 1) (2^48 + 2^32 + 2^16 + 1) = 2^64 - 1
    const INVERSE: u64 = 0x0001_0001_0001_0001_u64.wrapping_neg();
    const _: () = assert!(INVERSE.wrapping_mul(MODULUS) == 1);
    sum.wrapping_mul(INVERSE).wrapping_sub(1) < u64::MAX / MODULUS
}

#[cfg(test)]
mod tests {
    use std::{vec, vec::Vec};

    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;

    /// RFC 1071, word by word, with a carry at a time.
    fn naive(words: &[u16]) -> u16 {
        let mut sum = 0_u16;
        for &word in words {
            let (wrapped, carry) = sum.overflowing_add(word);
            sum = wrapped + u16::from(carry);
        }
        !sum
    }

    proptest! {
        #[test]
        fn given_any_text_when_words_are_replaced_then_the_update_is_the_full_sum(
            text in vec(any::<u16>(), 2..100),
            changes in vec((any::<Index>(), any::<u32>(), any::<bool>()), 0..20),
        ) {
            // A text of zeros only has two checksums; no header is one.
            let mut text: Vec<u16> = [vec![0x4500], text].concat();
            let before = naive(&text);
            let mut delta = Delta::default();
            for (at, new, is_wide) in changes {
                let at = 1 + at.index(text.len() - 2);
                let [high, low] = [(new >> 16) as u16, new as u16];
                if is_wide {
                    let old = u32::from(text[at]) << 16 | u32::from(text[at + 1]);
                    delta.replace32(old, new);
                    text[at..at + 2].copy_from_slice(&[high, low]);
                } else {
                    delta.replace16(text[at], low);
                    text[at] = low;
                }
            }
            prop_assert_eq!(delta.apply(before), naive(&text));
        }

        #[test]
        fn given_any_sum_of_words_when_folded_then_the_carries_come_round(
            words in vec(prop_oneof![Just(u32::MAX), any::<u32>()], 0..200),
        ) {
            let halves: Vec<u16> =
                words.iter().flat_map(|&word| [(word >> 16) as u16, word as u16]).collect();
            let sum = words.iter().map(|&word| u64::from(word)).sum();
            prop_assert_eq!(fold(sum), !naive(&halves));
            prop_assert_eq!(is_valid(sum), naive(&halves) == 0);
        }

        #[test]
        fn given_the_other_byte_order_when_updated_then_the_result_is_swapped(
            text in vec(1..=u16::MAX, 1..20),
            new in any::<u16>(),
        ) {
            let mut delta = Delta::default();
            delta.replace16(text[0], new);
            let mut swapped = Delta::default();
            swapped.replace16(text[0].swap_bytes(), new.swap_bytes());
            let checksum = naive(&text);
            prop_assert_eq!(
                delta.apply(checksum),
                swapped.apply(checksum.swap_bytes()).swap_bytes()
            );
        }
    }

    #[test]
    fn given_the_largest_sums_when_folded_then_no_carry_is_lost() {
        let cases = [
            (0, 0),
            (1, 1),
            (0xffff, 0xffff),
            (0x1_0000, 1),
            (0x1_fffe, 0xffff),
            (0xffff_ffff, 0xffff),
            (0x1_0000_0000, 1),
            (0xffff * 0xffff_ffff, 0xffff),
            (0xffff * 0xffff_ffff - 1, 0xfffe),
            (0xffff * 0xffff_ffff + 1, 1),
        ];
        for (sum, expected) in cases {
            assert_eq!(fold(sum), expected, "{sum:#x}");
            assert_eq!(is_valid(sum), expected == 0xffff, "{sum:#x}");
        }
    }

    #[test]
    fn given_the_example_of_rfc_1624_when_updated_then_the_result_is_that_of_the_rfc() {
        // Section 4: 0x5555 becomes 0x3285 under the checksum 0xdd2f.
        let mut delta = Delta::default();
        delta.replace16(0x5555, 0x3285);
        assert_eq!(delta.apply(0xdd2f), 0x0000);
    }
}
