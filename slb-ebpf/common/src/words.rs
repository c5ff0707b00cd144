//! Words in memory that the compiler is to leave there: it would keep them in registers, or call `memset`.

/// Reads one.
#[must_use]
#[inline(always)]
pub fn load(word: &u32) -> u32 {
    // SAFETY: a reference.
    unsafe { core::ptr::from_ref(word).read_volatile() }
}

/// Writes zeros.
#[inline(always)]
pub fn clear<const LEN: usize>(words: &mut [u32; LEN]) {
    for word in words {
        store(word, 0);
    }
}

/// Writes one.
#[inline(always)]
pub fn store(word: &mut u32, value: u32) {
    // SAFETY: a reference.
    unsafe { core::ptr::from_mut(word).write_volatile(value) };
}
