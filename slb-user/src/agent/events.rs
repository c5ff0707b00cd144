//! What has happened, for `slb events`: the latest of what the log has, in a form that can be asked for.

use std::{collections::VecDeque, time::SystemTime};

use crate::api::Event;

/// So many are kept.
const KEPT: usize = 1_000;

/// The latest events.
#[derive(Debug, Default)]
pub(super) struct Events {
    latest: VecDeque<Event>,
    count: u64,
}

impl Events {
    /// Something has happened.
    pub fn note(&mut self, kind: &str, text: String) {
        self.count += 1;
        let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let at_seconds = seconds.as_secs_f64();
        self.latest.push_back(Event {
            number: self.count,
            at_seconds,
            kind: kind.to_owned(),
            text,
        });
        if self.latest.len() > KEPT {
            self.latest.pop_front();
        }
    }

    /// Those after a number, the oldest first.
    pub fn after(&self, number: u64) -> Vec<Event> {
        self.latest.iter().filter(|event| event.number > number).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_more_events_than_are_kept_when_asked_for_then_the_latest_are_there_in_order() {
        let mut events = Events::default();
        (1..=1_100).for_each(|number| events.note("health", number.to_string()));
        let all = events.after(0);
        assert_eq!((all.len(), all[0].number, all[999].number), (1_000, 101, 1_100));
        assert_eq!(events.after(1_099)[0].text, "1100");
        assert!(events.after(1_100).is_empty());
    }
}
