//! Random choices that a seed repeats.

use std::{
    env,
    time::{SystemTime, UNIX_EPOCH},
};

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Debug)]
pub struct Dice(u64);

impl Dice {
    /// The same choices each time, unless `SLB_SEED` says otherwise: a number, or "random". Prints the seed.
    #[must_use]
    pub fn new(usual: u64) -> Self {
        let seed = match env::var("SLB_SEED") {
            Err(_) => usual,
            Ok(seed) => seed.parse().unwrap_or_else(|_| now()),
        };
        eprintln!("SLB_SEED={seed}");
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// True once in so many times.
    pub fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// One of them.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// Differs from run to run.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::from(now.subsec_nanos())
}
