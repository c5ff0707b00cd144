//! Since when there is a problem.

use std::{collections::HashMap, time::SystemTime};

use slb_api::{Problem, ProblemName};

/// Remembers when each problem was first seen.
#[derive(Debug, Default)]
pub struct ProblemLog(HashMap<(ProblemName, Option<String>), f64>);

impl ProblemLog {
    /// The problems that there are `now`, each with the time when it was first seen, the worst first.
    ///
    /// A problem that is gone is forgotten: if it comes back it is new.
    #[must_use]
    pub fn update(&mut self, mut problems: Vec<Problem>, now: SystemTime) -> Vec<Problem> {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let mut since = HashMap::new();
        for problem in &mut problems {
            let key = (problem.name, problem.subject.clone());
            let first = self.0.get(&key).copied().unwrap_or(now);
            problem.since = Some(first);
            since.insert(key, first);
        }
        self.0 = since;
        Problem::sort(&mut problems);
        problems
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn problem_keeps_the_time_when_it_was_first_seen_until_it_is_gone() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let forwarding = || Problem::new(ProblemName::ForwardingOff, "off".to_owned()).of("lan0");
        let elsewhere = || Problem::new(ProblemName::ForwardingOff, "off".to_owned()).of("wan0");
        let refused = || Problem::new(ProblemName::ReloadRefused, "refused".to_owned());
        let mut log = ProblemLog::default();
        let mut since = |problems, seconds| -> Vec<_> {
            let found = log.update(problems, at(seconds));
            found.into_iter().map(|problem| (problem.subject, problem.since.unwrap())).collect()
        };
        assert_eq!(since(vec![refused()], 1), [(None, 1.0)]);
        let (lan, wan) = (Some("lan0".to_owned()), Some("wan0".to_owned()));
        let both = since(vec![refused(), forwarding()], 2);
        assert_eq!(both, [(lan.clone(), 2.0), (None, 1.0)], "the worst first");
        let subjects = since(vec![forwarding(), elsewhere()], 3);
        assert_eq!(subjects, [(lan, 2.0), (wan, 3.0)], "subjects are told apart");
        assert_eq!(since(vec![refused()], 4), [(None, 4.0)], "it was gone in between");
    }
}
