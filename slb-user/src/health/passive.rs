//! Passive health checks: what the packet path sees of a backend's answers to clients.
//!
//! A backend that refuses connections, or does not answer at all, is probed at once, long before its next probe is due.
//! Only that probe decides: a host that sends packets to a VIP, or as a backend, can make these counters say anything.

use std::time::{Duration, Instant};

/// At least so many answers, or connections without one, count. Fewer may be a client's mistake.
const ENOUGH: u64 = 3;
/// For how long a connection may be without an answer: the first SYN is sent again after a second (RFC 6298,
/// section 2.1), and a backend is a millisecond away.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a backend has done since it last accepted a connection of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassiveCheck {
    /// All so far.
    accepted: u64,
    /// When it last accepted one, or no client had tried.
    refused: u64,
    flows: u64,
    /// When the first connection since then began.
    since: Option<Instant>,
}

impl PassiveCheck {
    /// What the counters are now.
    #[must_use]
    pub const fn new(accepted: u64, refused: u64, flows: u64) -> Self {
        Self { accepted, refused, flows, since: None }
    }

    /// Looks at the counters again. Says what seems wrong with the backend, and counts anew from there.
    pub fn look(
        &mut self,
        accepted: u64,
        refused: u64,
        flows: u64,
        now: Instant,
    ) -> Option<String> {
        if accepted != self.accepted {
            *self = Self::new(accepted, refused, flows);
            return None;
        }
        let suspicion = self.suspicion(refused, flows, now);
        if suspicion.is_some() {
            *self = Self::new(accepted, refused, flows);
        }
        suspicion
    }

    /// What has happened since it last accepted a connection, if that is suspicious.
    fn suspicion(&mut self, refused: u64, flows: u64, now: Instant) -> Option<String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found wrong as the counters go through these: accepted, refused, flows, and milliseconds.
    fn wrong(counters: &[(u64, u64, u64, u64)]) -> Option<String> {
        let begin = Instant::now();
        let mut check = PassiveCheck::new(100, 10, 110);
        counters
            .iter()
            .map(|&(accepted, refused, flows, at)| {
                check.look(accepted, refused, flows, begin + Duration::from_millis(at))
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
        assert_eq!(
            wrong(&[(100, 10, 110, 0), (100, 10, 110, 9_000)]),
            None,
            "no client has connected"
        );
    }

    #[test]
    fn suspicion_takes_as_many_connections_again_after_it_was_told() {
        let begin = Instant::now();
        let mut check = PassiveCheck::new(100, 10, 110);
        let mut is_suspected = |refused, at| {
            let now = begin + Duration::from_millis(at);
            check.look(100, refused, 100 + refused, now).is_some()
        };
        assert!(is_suspected(13, 0));
        assert!(!is_suspected(13, 9_000), "nothing new");
        assert!(!is_suspected(15, 9_100), "two are too few");
        assert!(is_suspected(16, 9_200));
    }
}
