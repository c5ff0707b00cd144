//! What has happened, for `slb events`: the latest of what the log has, in a form that can be asked for.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use slb_api::{Event, EventKind};

use crate::printable::Printable;

/// How many events are kept.
const KEPT: usize = 1_000;

/// The latest events. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct EventLog(Arc<Mutex<Events>>);

#[derive(Debug, Default)]
struct Events {
    latest: VecDeque<Event>,
    count: u64,
}

impl EventLog {
    /// Adds an event, on one line: names and reasons are texts of others.
    pub fn note(&self, kind: EventKind, text: String) {
        let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let at_seconds = seconds.as_secs_f64();
        let mut events = self.lock();
        events.count += 1;
        let number = events.count;
        let text = Printable(text).to_string();
        events.latest.push_back(Event { number, at_seconds, kind, text });
        if events.latest.len() > KEPT {
            events.latest.pop_front();
        }
    }

    /// The events after a number, the oldest first.
    #[must_use]
    pub fn after(&self, number: u64) -> Vec<Event> {
        self.lock().latest.iter().filter(|event| event.number > number).cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Events> {
        // Every change leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_is_one_line_of_plain_text() {
        let events = EventLog::default();
        events.note(EventKind::Health, "web-1\u{1b}[2J\u{202e}\nforged".to_owned());
        assert_eq!(events.after(0)[0].text, r"web-1\u{1b}[2J\u{202e}\nforged");
    }

    #[test]
    fn given_more_events_than_are_kept_when_asked_for_then_the_latest_are_there_in_order() {
        let events = EventLog::default();
        (1..=1_100).for_each(|number| events.note(EventKind::Health, number.to_string()));
        let all = events.after(0);
        assert_eq!((all.len(), all[0].number, all[999].number), (1_000, 101, 1_100));
        assert_eq!(events.after(1_099)[0].text, "1100");
        assert!(events.after(1_100).is_empty());
    }
}
