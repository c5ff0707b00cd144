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

    /// The low half of the kernel's count, as far as it can be told from outside: a second or so off.
    ///
    /// It begins five minutes before its wrap (`INITIAL_JIFFIES` in `linux/jiffies.h`), and goes with
    /// the monotonic clock.
    ///
    /// # Errors
    ///
    /// The system call failed.
    pub fn now(self) -> std::io::Result<u32> {
        let clock = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
        let ticks = Duration::from(clock).as_nanos() * u128::from(self.per_second) / 1_000_000_000;
        Ok((ticks as u32).wrapping_sub(300 * self.per_second))
    }

    /// How many there are in so many seconds.
    #[must_use]
    pub const fn per(self, seconds: u32) -> u32 {
        self.per_second * seconds
    }

    /// Rounded up as well.
    #[must_use]
    pub fn to_duration(self, jiffies: u32) -> Duration {
        let nanoseconds = (u64::from(jiffies) * 1_000_000_000).div_ceil(self.per_second.into());
        Duration::from_nanos(nanoseconds)
    }

    /// Rounded up, so that nothing ends early.
    #[must_use]
    pub fn from_duration(self, duration: Duration) -> u32 {
        let jiffies = (duration.as_nanos() * u128::from(self.per_second)).div_ceil(1_000_000_000);
        u32::try_from(jiffies).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    #[ignore = "needs root"]
    fn given_the_kernels_own_count_when_it_is_told_from_outside_then_it_is_nearly_that() {
        let list = std::fs::read_to_string("/proc/timer_list").unwrap();
        let count = list.lines().find_map(|line| line.strip_prefix("jiffies: ")).unwrap();
        let count: u64 = count.trim().parse().unwrap();

        let jiffies = Jiffies::from_kernel().unwrap();
        let off = (count as u32).wrapping_sub(jiffies.now().unwrap()) as i32;

        let bound = jiffies.from_duration(Duration::from_secs(5)) as i32;
        assert!(off.abs() < bound, "{off} jiffies off");
    }

    #[test]
    fn given_durations_when_converted_then_they_are_rounded_up() {
        let cases = [
            (250, Duration::ZERO, 0),
            (250, Duration::from_nanos(1), 1),
            (250, Duration::from_millis(4), 1),
            (250, Duration::from_micros(4_001), 2),
            (250, Duration::from_secs(900), 225_000),
            (1_000, Duration::from_secs(90), 90_000),
            (100, Duration::from_millis(15), 2),
            (1_000, Duration::from_secs(4_294_967), 4_294_967_000),
            (1_000, Duration::from_secs(4_294_968), u32::MAX),
            (1_000, Duration::MAX, u32::MAX),
        ];
        for (rate, duration, expected) in cases {
            let found = Jiffies::per_second(rate).from_duration(duration);
            assert_eq!(found, expected, "{duration:?} at {rate} Hz");
        }
    }

    #[test]
    fn given_this_kernel_when_asked_then_its_rate_is_one_that_kernels_have() {
        let Jiffies { per_second } = Jiffies::from_kernel().unwrap();
        assert!([100, 250, 300, 1_000].contains(&per_second), "{per_second} Hz");
    }

    proptest! {
        #[test]
        fn given_any_duration_when_converted_then_nothing_ends_early_or_a_tick_late(
            rate in prop_oneof![Just(100), Just(250), Just(300), Just(1_000)],
            nanoseconds in 0..4_000_000_000_000_000_u64,
        ) {
            let found = Jiffies::per_second(rate).from_duration(Duration::from_nanos(nanoseconds));
            let ticks = u128::from(found) * 1_000_000_000;
            let wanted = u128::from(nanoseconds) * u128::from(rate);
            prop_assert!(ticks >= wanted);
            prop_assert!(ticks < wanted + 1_000_000_000);
        }
    }
}
