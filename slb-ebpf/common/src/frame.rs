//! A window on a frame: all pointer arithmetic, and the only place that knows how to load and store.
//!
//! [`Frame::header`] checks the bounds once; the header's fields are then loaded without any. The
//! same lines run in the kernel and under `cargo test`.

use core::{marker::PhantomData, ptr};

/// Nothing is looked at that begins behind this offset: no header does in a sensible packet, and our own
/// ICMP errors are shorter. Keeps sums of offsets from wrapping, and gives the verifier
/// the upper bound that it demands of an offset that was computed from packet bytes.
pub const REACH: usize = 1_536;

/// A frame, from its Ethernet header to its end.
pub struct Frame<'a> {
    start: *mut u8,
    end: *mut u8,
    borrow: PhantomData<&'a mut [u8]>,
}

/// Bytes of a frame that are known to be there.
pub struct Header<'a, const N: usize> {
    start: *mut u8,
    borrow: PhantomData<&'a mut [u8; N]>,
}

/// An integer that can be loaded from any bytes.
pub trait Word: Copy + private::Word {}
impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}

mod private {
    pub trait Word {}
    impl Word for u8 {}
    impl Word for u16 {}
    impl Word for u32 {}
    impl Word for u64 {}
}

impl<'a> Frame<'a> {
    /// A frame from the kernel.
    ///
    /// # Safety
    ///
    /// `start..end` must be valid for reads and writes for `'a`, and not be accessed otherwise.
    #[must_use]
    #[inline(always)]
    pub const unsafe fn from_raw(start: *mut u8, end: *mut u8) -> Self {
        Self { start, end, borrow: PhantomData }
    }

    /// A frame in memory.
    #[must_use]
    pub const fn from_slice(bytes: &'a mut [u8]) -> Self {
        let range = bytes.as_mut_ptr_range();
        Self { start: range.start, end: range.end, borrow: PhantomData }
    }

    /// Length in bytes.
    #[must_use]
    #[inline(always)]
    #[expect(clippy::len_without_is_empty, reason = "a frame is never empty")]
    pub fn len(&self) -> usize {
        self.end as usize - self.start as usize
    }

    /// `N` bytes from `offset` on, if they are there.
    #[must_use]
    #[inline(always)]
    pub fn header<const N: usize>(&self, offset: usize) -> Option<Header<'_, N>> {
        if offset > REACH {
            return None;
        }
        let start = self.start.wrapping_add(offset);
        (start.wrapping_add(N) <= self.end).then_some(Header { start, borrow: PhantomData })
    }

    /// The same, to write to.
    #[must_use]
    #[inline(always)]
    pub fn header_mut<const N: usize>(&mut self, offset: usize) -> Option<Header<'_, N>> {
        self.header(offset)
    }
}

impl<const N: usize> Header<'_, N> {
    /// The word at `at`, as it stands there: in network order.
    #[must_use]
    #[inline(always)]
    pub fn get<T: Word>(&self, at: usize) -> T {
        assert!(at + size_of::<T>() <= N, "a header ends before this field");
        // SAFETY: in bounds by the construction of `self`.
        unsafe { load(self.start.wrapping_add(at).cast()) }
    }

    /// The 16-bit number at `at`.
    #[must_use]
    #[inline(always)]
    pub fn get_be16(&self, at: usize) -> u16 {
        u16::from_be(self.get(at))
    }

    /// Writes a word, given in network order.
    #[inline(always)]
    pub fn set<T: Word>(&mut self, at: usize, value: T) {
        assert!(at + size_of::<T>() <= N, "a header ends before this field");
        // SAFETY: in bounds by the construction of `self`.
        unsafe { store(self.start.wrapping_add(at).cast(), value) };
    }
}

/// # Safety
///
/// `at` must be valid for reads.
#[inline(always)]
unsafe fn load<T: Word>(at: *const T) -> T {
    if cfg!(target_arch = "bpf") {
        // An unaligned read would be compiled to one load per byte: LLVM's BPF target takes no
        // misaligned access for granted. The machines behind it (x86-64, arm64) do, and on others
        // the verifier refuses the program.
        // SAFETY: valid for reads by the caller's promise; one load instruction, see above.
        unsafe { ptr::read(at) }
    } else {
        // SAFETY: valid for reads by the caller's promise.
        unsafe { ptr::read_unaligned(at) }
    }
}

/// # Safety
///
/// `at` must be valid for writes.
#[inline(always)]
unsafe fn store<T: Word>(at: *mut T, value: T) {
    if cfg!(target_arch = "bpf") {
        // SAFETY: valid for writes by the caller's promise; one store instruction, see `load`.
        unsafe { ptr::write(at, value) };
    } else {
        // SAFETY: valid for writes by the caller's promise.
        unsafe { ptr::write_unaligned(at, value) };
    }
}

#[cfg(test)]
mod tests {
    use std::vec;

    use super::*;

    #[test]
    fn given_a_frame_when_a_header_is_asked_for_then_it_is_there_only_if_it_fits() {
        for len in 0..64 {
            let mut bytes = vec![0; len];
            let frame = Frame::from_slice(&mut bytes);
            assert_eq!(frame.len(), len);
            for offset in 0..80 {
                let found = [
                    frame.header::<1>(offset).is_some(),
                    frame.header::<14>(offset).is_some(),
                    frame.header::<20>(offset).is_some(),
                ];
                let expected = [1, 14, 20].map(|header| offset + header <= len);
                assert_eq!(found, expected, "offset {offset} of {len}");
            }
        }
    }

    #[test]
    fn given_a_long_frame_when_a_header_is_far_then_reach_is_the_last_place() {
        let mut bytes = vec![0; 2 * REACH];
        let mut frame = Frame::from_slice(&mut bytes);
        let cases = [(0, true), (REACH, true), (REACH + 1, false), (usize::MAX, false)];
        for (offset, expected) in cases {
            assert_eq!(frame.header::<40>(offset).is_some(), expected, "offset {offset}");
            assert_eq!(frame.header_mut::<40>(offset).is_some(), expected, "offset {offset}");
        }
    }

    #[test]
    fn given_a_frame_that_ends_at_reach_when_a_header_is_asked_for_there_then_there_is_none() {
        let mut bytes = vec![0; REACH];
        assert!(Frame::from_slice(&mut bytes).header::<1>(REACH).is_none());
    }

    #[test]
    fn given_a_header_when_words_are_loaded_then_they_are_as_they_stand_at_any_alignment() {
        let mut bytes: [u8; 24] = core::array::from_fn(|at| at as u8);
        let frame = Frame::from_slice(&mut bytes);
        for offset in 0..8 {
            let header = frame.header::<16>(offset).unwrap();
            for at in 0..8 {
                let first = (offset + at) as u8;
                let eight: [u8; 8] = core::array::from_fn(|next| first + next as u8);
                let [a, b, c, d, ..] = eight;
                assert_eq!(header.get::<u8>(at), a);
                assert_eq!(header.get::<u16>(at), u16::from_ne_bytes([a, b]));
                assert_eq!(header.get::<u32>(at), u32::from_ne_bytes([a, b, c, d]));
                assert_eq!(header.get::<u64>(at), u64::from_ne_bytes(eight));
                assert_eq!(header.get_be16(at), u16::from_be_bytes([a, b]));
            }
        }
    }

    #[test]
    fn given_a_header_when_a_word_is_stored_then_its_neighbours_stay() {
        for at in 0..=8 {
            let mut bytes = [0xaa; 14];
            let mut frame = Frame::from_slice(&mut bytes);
            let mut header = frame.header_mut::<12>(1).unwrap();
            header.set(at, 0x0102_0304_u32.to_be());
            let mut expected = [0xaa; 14];
            expected[1 + at..5 + at].copy_from_slice(&[1, 2, 3, 4]);
            assert_eq!(bytes, expected, "at {at}");
        }
    }

    #[test]
    #[should_panic = "a header ends before this field"]
    fn given_a_header_when_a_field_behind_it_is_loaded_then_it_panics() {
        let mut bytes = [0; 64];
        let frame = Frame::from_slice(&mut bytes);
        let _: u32 = frame.header::<12>(0).unwrap().get(9);
    }

    #[test]
    #[should_panic = "a header ends before this field"]
    fn given_a_header_when_a_field_behind_it_is_stored_then_it_panics() {
        let mut bytes = [0; 64];
        let mut frame = Frame::from_slice(&mut bytes);
        frame.header_mut::<12>(0).unwrap().set(11, 0_u16);
    }
}
