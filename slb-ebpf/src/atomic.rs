//! Atomic instructions that the BPF target of rustc does not offer: kernel 5.12 and newer have them.

/// Adds, wrapping, and gives what was there before, in one step for all CPUs.
///
/// # Safety
///
/// `counter` must be valid, aligned to 8 bytes, and written in this way only.
#[inline(always)]
pub unsafe fn fetch_add(counter: *mut u64, value: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut turn = value;
        // SAFETY: one instruction on memory that the caller vouches for.
        unsafe {
            core::arch::asm!(
                "{turn} = atomic_fetch_add((u64 *)({counter} + 0), {turn})",
                turn = inout(reg) turn,
                counter = in(reg) counter,
            );
        }
        turn
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        let _ = (counter, value);
        unreachable!("compiled for the host by linters only")
    }
}

/// [`compare_exchange`] of 64 bits.
///
/// # Safety
///
/// `word` must be valid and aligned to 8 bytes.
#[inline(always)]
pub unsafe fn compare_exchange64(word: *mut u64, old: u64, new: u64) -> bool {
    #[cfg(target_arch = "bpf")]
    {
        let mut found = old;
        // SAFETY: one instruction on memory that the caller vouches for.
        unsafe {
            core::arch::asm!(
                "r0 = cmpxchg_64(r1 + 0, r0, r2)",
                inout("r0") found,
                in("r1") word,
                in("r2") new,
            );
        }
        found == old
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        let _ = (word, old, new);
        unreachable!("compiled for the host by linters only")
    }
}

/// Writes `new` if `old` is there, and says whether it was, in one step for all CPUs.
///
/// # Safety
///
/// `word` must be valid and aligned to 4 bytes.
#[inline(always)]
pub unsafe fn compare_exchange(word: *mut u32, old: u32, new: u32) -> bool {
    #[cfg(target_arch = "bpf")]
    {
        let mut found = u64::from(old);
        // SAFETY: one instruction on memory that the caller vouches for.
        unsafe {
            core::arch::asm!(
                "w0 = cmpxchg32_32(r1 + 0, w0, w2)",
                inout("r0") found,
                in("r1") word,
                in("r2") u64::from(new),
            );
        }
        found as u32 == old
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        let _ = (word, old, new);
        unreachable!("compiled for the host by linters only")
    }
}
