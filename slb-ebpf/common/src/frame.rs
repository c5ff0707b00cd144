//! A window on a frame: all pointer arithmetic, and the only place that knows how to load and store.
//!
//! [`Frame::header`] checks the bounds once; the header's fields are then loaded without any. The
//! same lines run in the kernel and under `cargo test`.

use core::{marker::PhantomData, ptr};

/// No header begins behind this offset. Keeps sums of offsets from wrapping, and gives the verifier
/// the upper bound that it demands of an offset that was computed from packet bytes.
pub const REACH: usize = 1_024;

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
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
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
    pub fn number(&self, at: usize) -> u16 {
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
