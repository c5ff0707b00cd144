//! The kernel's ticks, which the flow table counts in.

use std::time::Duration;

/// Converts durations to jiffies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Jiffies {
    per_second: u32,
}

impl Jiffies {
    /// Asks the kernel how long one is: that is the resolution of its coarse clock.
    ///
    /// # Errors
    ///
    /// The system call failed.
    pub fn from_kernel() -> std::io::Result<Self> {
        let tick = nix::time::clock_getres(nix::time::ClockId::CLOCK_MONOTONIC_COARSE)?;
        let nanoseconds = Duration::from(tick).as_nanos().max(1);
        Ok(Self { per_second: (1_000_000_000 / nanoseconds) as u32 })
    }

    /// With this many in a second.
    #[must_use]
    pub const fn per_second(per_second: u32) -> Self {
        Self { per_second }
    }

    /// Rounded up, so that nothing ends early.
    #[must_use]
    pub fn from_duration(self, duration: Duration) -> u32 {
        let jiffies = (duration.as_nanos() * u128::from(self.per_second)).div_ceil(1_000_000_000);
        u32::try_from(jiffies).unwrap_or(u32::MAX)
    }
}
