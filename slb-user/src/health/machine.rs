//! From the outcomes of single probes to the health of a backend.

/// What the probes say about a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Health {
    /// No probe has ended yet.
    Unknown,
    /// Gets new flows.
    Healthy,
    /// Gets no new flows.
    Unhealthy,
}

impl Health {
    /// The name in output, logs and metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// Follows the health of one backend, so that a single lost or lucky probe does not flip it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracker {
    health: Health,
    /// Consecutive outcomes that spoke against `health`, up to now.
    against: u8,
    /// Consecutive successes that make it healthy.
    healthy: u8,
    /// Consecutive failures that make it unhealthy.
    unhealthy: u8,
}

impl Tracker {
    /// Begins in the state `initial`, with no outcomes counted.
    ///
    /// `healthy` consecutive successes and `unhealthy` consecutive failures make a transition; 0
    /// means 1.
    #[must_use]
    pub const fn new(initial: Health, healthy: u8, unhealthy: u8) -> Self {
        Self { health: initial, against: 0, healthy, unhealthy }
    }

    /// The state after all outcomes so far.
    #[must_use]
    pub const fn health(&self) -> Health {
        self.health
    }

    /// Counts the outcome of one probe; the new state if this one made a transition.
    ///
    /// The first outcome of an unknown backend decides at once: waiting for more would keep a
    /// healthy backend out of use, or flows on their way into a dead one.
    pub fn record(&mut self, success: bool) -> Option<Health> {
        let seen = if success { Health::Healthy } else { Health::Unhealthy };
        if seen == self.health {
            self.against = 0;
            return None;
        }
        self.against = self.against.saturating_add(1);
        let needed = match self.health {
            Health::Unknown => 1,
            Health::Healthy => self.unhealthy,
            Health::Unhealthy => self.healthy,
        };
        if self.against < needed {
            return None;
        }
        *self = Self { health: seen, against: 0, ..*self };
        Some(seen)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn given_an_unknown_backend_when_the_first_probe_ends_then_it_decides() {
        for (outcome, expected) in [(true, Health::Healthy), (false, Health::Unhealthy)] {
            let mut tracker = Tracker::new(Health::Unknown, 10, 10);
            assert_eq!(tracker.record(outcome), Some(expected), "{outcome}");
            assert_eq!(tracker.health(), expected, "{outcome}");
        }
    }

    #[test]
    fn given_failures_below_the_threshold_when_one_success_comes_then_counting_begins_anew() {
        let mut tracker = Tracker::new(Health::Healthy, 2, 3);
        let transitions = [false, false, true, false, false, false].map(|ok| tracker.record(ok));
        assert_eq!(transitions, [None, None, None, None, None, Some(Health::Unhealthy)]);
    }

    /// The definition, on the whole history: a transition is due when the last `n` outcomes since
    /// the previous one all speak against the state.
    fn model(
        initial: Health,
        healthy: u8,
        unhealthy: u8,
        outcomes: &[bool],
    ) -> Vec<Option<Health>> {
        let (mut health, mut since) = (initial, 0);
        let steps = (1..=outcomes.len()).map(|end| {
            let (against, needed, next) = match health {
                Health::Unknown if outcomes[end - 1] => (true, 1, Health::Healthy),
                Health::Unknown => (false, 1, Health::Unhealthy),
                Health::Healthy => (false, unhealthy, Health::Unhealthy),
                Health::Unhealthy => (true, healthy, Health::Healthy),
            };
            let needed = usize::from(needed);
            let recent = &outcomes[since..end];
            let due = recent.len() >= needed
                && recent[recent.len() - needed..].iter().all(|&outcome| outcome == against);
            due.then(|| {
                (health, since) = (next, end);
                next
            })
        });
        steps.collect()
    }

    proptest! {
        #[test]
        fn given_any_outcomes_when_recorded_then_transitions_are_those_of_the_definition(
            initial in prop::sample::select(
                vec![Health::Unknown, Health::Healthy, Health::Unhealthy]
            ),
            (healthy, unhealthy) in (1_u8..=10, 1_u8..=10),
            // Runs of equal outcomes, so that the thresholds are met often enough.
            runs in proptest::collection::vec((any::<bool>(), 1_usize..12), 0..20),
        ) {
            let outcomes: Vec<_> = runs.into_iter()
                .flat_map(|(outcome, length)| std::iter::repeat_n(outcome, length))
                .collect();
            let mut tracker = Tracker::new(initial, healthy, unhealthy);
            let transitions: Vec<_> = outcomes.iter().map(|&ok| tracker.record(ok)).collect();
            prop_assert_eq!(transitions, model(initial, healthy, unhealthy, &outcomes));
        }
    }
}
