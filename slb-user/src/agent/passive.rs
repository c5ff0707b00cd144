//! Passive health checks: what the packet path sees of a backend's answers to clients.
//!
//! A backend that refuses connections, or does not answer at all, is out of use long before probes have
//! failed often enough. Whether it is back, only probes say: nobody else goes there.

use std::{
    collections::HashMap,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use super::Agent;
use crate::health::Health;

/// How often the counters are read.
pub(super) const PERIOD: Duration = Duration::from_millis(100);
/// So many answers, or connections without one, count. Fewer may be a client's mistake.
const ENOUGH: u64 = 3;
/// For how long a connection may be without an answer: the first SYN is sent again after a second (RFC 6298,
/// section 2.1), and a backend is a millisecond away.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a backend has done since it last accepted a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Suspicion {
    /// All so far.
    accepted: u64,
    /// When it was last accepting, or nobody had asked.
    refused: u64,
    flows: u64,
    /// When the first connection since then began.
    since: Option<Instant>,
}

impl Suspicion {
    /// What the counters are now.
    const fn new(accepted: u64, refused: u64, flows: u64) -> Self {
        Self { accepted, refused, flows, since: None }
    }

    /// Looks at the counters again. Says what is wrong with the backend.
    fn look(&mut self, accepted: u64, refused: u64, flows: u64, now: Instant) -> Option<String> {
        if accepted != self.accepted {
            *self = Self::new(accepted, refused, flows);
            return None;
        }
        let (refused, flows) = (refused.wrapping_sub(self.refused), flows.wrapping_sub(self.flows));
        if flows == 0 && refused == 0 {
            self.since = None;
            return None;
        }
        let since = *self.since.get_or_insert(now);
        if refused >= ENOUGH {
            return Some(format!("refused the last {refused} connections of clients"));
        }
        let waits = now.duration_since(since);
        (flows >= ENOUGH && refused == 0 && waits >= PATIENCE).then(|| {
            format!("answered none of the last {flows} connections of clients in {waits:.1?}")
        })
    }
}

impl Agent {
    /// Whether any backend is looked at in this way.
    pub(super) fn is_passive(&self) -> bool {
        let mut checks = self.layout.targets.iter().filter_map(|target| target.check.as_ref());
        checks.any(|(check, _)| check.passive)
    }

    /// Takes out the backends that clients cannot connect to, except for the last one of a listener.
    pub(super) fn look_at_answers(&mut self) {
        let now = Instant::now();
        let before = std::mem::take(&mut self.suspicions);
        let mut suspicions = HashMap::new();
        let mut found = Vec::new();
        for service in &self.layout.services {
            for index in service.targets.clone() {
                let target = &self.layout.targets[index];
                let is_watched = target.check.as_ref().is_some_and(|(check, _)| check.passive);
                if !is_watched || self.health[index] == Health::Unhealthy {
                    continue;
                }
                let maps = &self.datapath.maps;
                let (Ok(answers), Ok(traffic)) = (maps.answers(target.id), maps.traffic(target.id))
                else {
                    continue;
                };
                let (accepted, refused) = (answers.accepted, answers.refused);
                let known = before.get(&target.id).copied();
                let mut suspicion =
                    known.unwrap_or(Suspicion::new(accepted, refused, traffic.flows));
                let wrong = suspicion.look(accepted, refused, traffic.flows, now);
                suspicions.insert(target.id, suspicion);
                if let Some(reason) = wrong {
                    found.push((service.targets.clone(), index, reason));
                }
            }
        }
        self.suspicions = suspicions;
        for (targets, index, reason) in found {
            if self.has_another(targets, index) {
                let id = self.layout.targets[index].id;
                self.checkers.fail(&id, reason);
                self.suspicions.remove(&id);
                // Ahead of the event, so that the next one knows.
                Arc::make_mut(&mut self.health)[index] = Health::Unhealthy;
            }
        }
    }

    /// Whether a service has another backend that gets new flows.
    fn has_another(&self, mut targets: Range<usize>, than: usize) -> bool {
        targets.any(|index| {
            let target = &self.layout.targets[index];
            let is_fit = target.check.is_none() || self.health[index] == Health::Healthy;
            index != than && is_fit && target.weight > 0
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found wrong as the counters go through these: accepted, refused, flows, and milliseconds.
    fn wrong(counters: &[(u64, u64, u64, u64)]) -> Option<String> {
        let begin = Instant::now();
        let mut suspicion = Suspicion::new(100, 10, 110);
        counters
            .iter()
            .map(|&(accepted, refused, flows, at)| {
                suspicion.look(accepted, refused, flows, begin + Duration::from_millis(at))
            })
            .fold(None, Option::or)
    }

    #[test]
    fn given_answers_when_a_backend_only_refuses_then_it_is_found_out_at_once() {
        let refused = wrong(&[(100, 11, 111, 0), (100, 13, 113, 100)]);
        assert_eq!(refused.unwrap(), "refused the last 3 connections of clients");
        assert_eq!(wrong(&[(100, 11, 111, 0), (101, 13, 114, 100), (102, 14, 116, 9_000)]), None);
        assert_eq!(wrong(&[(100, 12, 112, 0), (100, 12, 112, 9_000)]), None, "two are too few");
    }

    #[test]
    fn given_no_answers_when_it_takes_long_then_it_is_found_out() {
        let silent = wrong(&[(100, 10, 111, 0), (100, 10, 113, 900), (100, 10, 113, 1_000)]);
        assert_eq!(silent.unwrap(), "answered none of the last 3 connections of clients in 1.0s");
        assert_eq!(wrong(&[(100, 10, 113, 0), (100, 10, 113, 900)]), None, "not long enough");
        assert_eq!(wrong(&[(100, 10, 110, 0), (100, 10, 110, 9_000)]), None, "nobody has asked");
    }
}
