//! When an address is announced again because another host claims it. Pure.
//!
//! One announcement for claims and one for their end, each at most once in ten seconds. See `docs/adr/0028`.

use std::time::{Duration, Instant};

/// RFC 5227, section 2.4: a host that defends an address more often would not stop if the other does the same.
const DEFEND_INTERVAL: Duration = Duration::from_secs(10);
/// A claim waits for so long for others that belong to it: hosts send a request and a reply, or several of each.
const TOGETHER: Duration = Duration::from_millis(50);
/// Without a claim for so long, the claims have ended.
const QUIET: Duration = Duration::from_millis(700);
/// A host that claims more slowly than this is answered claim by claim.
const LONGEST_QUIET: Duration = Duration::from_secs(2);

/// The claims for one address, and the answers to them.
#[derive(Clone, Debug)]
pub struct Defence {
    /// The first claim that is not answered yet.
    claimed: Option<Instant>,
    last_claim: Instant,
    /// The last announcement because of a claim.
    defended: Option<Instant>,
    /// The last one because claims had ended.
    concluded: Option<Instant>,
    /// How long without a claim means that they have ended.
    quiet: Duration,
}

impl Defence {
    /// After the first claim.
    #[must_use]
    pub const fn new(now: Instant) -> Self {
        let (claimed, defended) = (Some(now), None);
        Self { claimed, last_claim: now, defended, concluded: None, quiet: QUIET }
    }

    /// Takes down a claim.
    pub fn claim(&mut self, now: Instant) {
        let gap = now.saturating_duration_since(self.last_claim);
        // A tenth more than the other host takes, or its next claim would make the announcement useless.
        let quiet = gap + gap / 10;
        if quiet <= LONGEST_QUIET {
            self.quiet = self.quiet.max(quiet);
        }
        self.claimed.get_or_insert(now);
        self.last_claim = now;
    }

    /// The last claim.
    #[must_use]
    pub const fn last_claim(&self) -> Instant {
        self.last_claim
    }

    /// When the address has to be announced; `None`: the last claim is answered.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        let claimed = self.claimed?;
        let allowed = |last: Option<Instant>, wanted: Instant| {
            last.map_or(wanted, |last| wanted.max(last + DEFEND_INTERVAL))
        };
        let conclusion = allowed(self.concluded, self.last_claim + self.quiet);
        Some(allowed(self.defended, claimed + TOGETHER).min(conclusion))
    }

    /// Takes down an announcement.
    pub fn announced(&mut self, now: Instant) {
        self.claimed = None;
        if self.defended.is_none_or(|last| now >= last + DEFEND_INTERVAL) {
            self.defended = Some(now);
        } else {
            self.concluded = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The times of announcements, in milliseconds, for claims at these times.
    fn announcements(claims: impl Iterator<Item = u64>) -> Vec<u64> {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let mut claims = claims.peekable();
        let mut defence = Defence::new(at(claims.next().unwrap()));
        let mut sent = Vec::new();
        loop {
            let due = defence.due();
            match claims.peek() {
                Some(&claim) if due.is_none_or(|due| at(claim) < due) => {
                    claims.next();
                    defence.claim(at(claim));
                }
                _ => {
                    let Some(due) = due else { return sent };
                    sent.push(u64::try_from((due - begin).as_millis()).unwrap());
                    defence.announced(due);
                }
            }
        }
    }

    #[test]
    fn single_claim_is_answered_at_once() {
        assert_eq!(announcements(std::iter::once(0)), [50]);
    }

    #[test]
    fn claims_in_quick_succession_are_answered_at_once_and_when_they_have_ended() {
        assert_eq!(announcements((0..50).map(|n| n * 100)), [50, 5_600]);
        assert_eq!(announcements((0..10_000).map(|n| n / 10)), [50, 1_699]);
    }

    #[test]
    fn claims_once_a_second_are_answered_every_ten_seconds_and_soon_after_the_last() {
        let sent = announcements((0..25).map(|n| n * 1_000));
        assert_eq!(sent, [50, 10_050, 20_050, 25_100]);
        // Request and reply each time.
        let sent = announcements((0..6).flat_map(|n| [n * 1_000, n * 1_000 + 1]));
        assert_eq!(sent, [50, 6_099]);
    }

    #[test]
    fn there_are_never_more_than_two_announcements_in_ten_seconds() {
        for gap in [1, 7, 90, 450, 999, 1_700, 2_500, 4_000, 9_000] {
            let sent = announcements((0..60_000 / gap).map(|n| n * gap));
            for three in sent.windows(3) {
                assert!(three[2] - three[0] >= 10_000, "{gap}: {sent:?}");
            }
        }
    }
}
