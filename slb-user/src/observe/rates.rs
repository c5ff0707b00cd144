//! What there is per second, from counters read at different times.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use slb_api::Rates;
use slb_common::abi::Traffic;

/// A rate is measured for this long at least.
const SHORTEST: Duration = Duration::from_secs(1);
/// What was counted longer ago says nothing about the present.
const LONGEST: Duration = Duration::from_secs(5 * 60);

/// Counters of backends, by index into `SLB_BACKENDS`.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub at: Instant,
    pub traffic: Arc<Vec<Traffic>>,
}

/// The counters that were read last.
#[derive(Debug, Default)]
pub(super) struct Samples {
    /// Read at least [`SHORTEST`] before `latest`.
    previous: Option<Sample>,
    latest: Option<Sample>,
}

impl Samples {
    /// Adds the present sample, and gives the one to compare it with.
    pub(super) fn add(&mut self, now: &Sample) -> Option<Sample> {
        let is_apart = |other: &Sample| now.at.duration_since(other.at) >= SHORTEST;
        if self.latest.as_ref().is_none_or(is_apart) {
            self.previous = self.latest.replace(now.clone());
        }
        self.previous.clone().filter(|before| now.at.duration_since(before.at) <= LONGEST)
    }
}

/// What there was per second between two samples; `None`: a counter went back, so it is another's by now.
pub(super) fn between(before: &Traffic, after: &Traffic, seconds: f64) -> Option<Rates> {
    let per_second = |before: u64, after: u64| Some(after.checked_sub(before)? as f64 / seconds);
    Some(Rates {
        seconds,
        flows: Some(per_second(before.flows, after.flows)?),
        packets: per_second(before.packets, after.packets)?,
        bytes: per_second(before.bytes, after.bytes)?,
        reply_packets: Some(per_second(before.reply_packets, after.reply_packets)?),
        reply_bytes: Some(per_second(before.reply_bytes, after.reply_bytes)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_compared_with_one_that_is_neither_too_close_nor_too_old() {
        let begin = Instant::now();
        let at = |seconds: f64| begin + Duration::from_secs_f64(seconds);
        let mut samples = Samples::default();
        let mut age = |seconds: f64| {
            let now = Sample { at: at(seconds), traffic: Arc::default() };
            samples.add(&now).map(|before| (now.at - before.at).as_secs_f64())
        };
        assert_eq!(age(0.0), None, "nothing to compare with");
        assert_eq!(age(0.5), None, "too close");
        assert_eq!(age(2.0), Some(2.0));
        assert_eq!(age(2.5), Some(2.5), "too close to the last one, so the one before counts");
        assert_eq!(age(10.0), Some(8.0));
        assert_eq!(age(1_000.0), None, "too long ago");
        assert_eq!(age(1_010.0), Some(10.0));
    }

    #[test]
    fn rate_is_the_difference_per_second_and_unknown_if_a_counter_went_back() {
        let before = Traffic { flows: 10, packets: 100, bytes: 5_000, ..Traffic::default() };
        let after = Traffic { flows: 14, packets: 300, bytes: 9_000, ..before };
        let rates = between(&before, &after, 2.0).unwrap();
        assert_eq!((rates.flows, rates.packets, rates.bytes), (Some(2.0), 100.0, 2_000.0));
        assert_eq!((rates.reply_packets, rates.seconds), (Some(0.0), 2.0));
        assert_eq!(between(&after, &before, 2.0), None);
    }
}
