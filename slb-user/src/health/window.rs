//! How long a health check takes to find out.

use std::{fmt, time::Duration};

use humantime::format_duration;

use crate::config::HealthCheck;

/// From a change of a backend to the probe that decides, at least and at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// It refuses: every probe fails at once.
    pub refuses: (Duration, Duration),
    /// It does not answer: every probe fails after its timeout.
    pub hangs: (Duration, Duration),
    /// It answers again.
    pub recovers: (Duration, Duration),
}

impl Windows {
    /// Those of a check, whose probes begin an interval apart, but never before the one before has ended.
    #[must_use]
    pub fn of(check: &HealthCheck) -> Self {
        let HealthCheck { interval, timeout, healthy, unhealthy, .. } = *check;
        let others = |count: u8, period: Duration| period * u32::from(count.saturating_sub(1));
        let slow = interval.max(timeout);
        let (refused, hung) = (others(unhealthy, interval), others(unhealthy, slow) + timeout);
        let back = others(healthy, interval);
        Self {
            refuses: (refused, refused + interval),
            hangs: (hung, hung + interval),
            // A probe without an answer may still be under way.
            recovers: (back, back + slow),
        }
    }
}

impl fmt::Display for Windows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |(least, most): (Duration, Duration)| {
            format!("{} to {}", format_duration(least), format_duration(most))
        };
        write!(
            f,
            "a backend that refuses is out after {}, one that hangs after {}; back after {}",
            text(self.refuses),
            text(self.hangs),
            text(self.recovers)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ProbeKind;

    fn windows(interval: u64, timeout: u64, healthy: u8, unhealthy: u8) -> String {
        let check = HealthCheck {
            probe: ProbeKind::Tcp,
            port: None,
            interval: Duration::from_millis(interval),
            timeout: Duration::from_millis(timeout),
            healthy,
            unhealthy,
            passive: false,
            proxy_header: false,
        };
        Windows::of(&check).to_string()
    }

    #[test]
    fn given_settings_when_asked_for_windows_then_they_follow_from_them() {
        let cases = [
            ((2_000, 5_000, 3, 3), "4s to 6s", "15s to 17s", "4s to 9s"),
            ((2_000, 500, 2, 3), "4s to 6s", "4s 500ms to 6s 500ms", "2s to 4s"),
            ((1_000, 1_000, 1, 1), "0s to 1s", "1s to 2s", "0s to 1s"),
        ];
        for ((interval, timeout, healthy, unhealthy), refuses, hangs, back) in cases {
            let expected = format!(
                "a backend that refuses is out after {refuses}, one that hangs after {hangs}; \
                 back after {back}"
            );
            assert_eq!(windows(interval, timeout, healthy, unhealthy), expected);
        }
    }
}
