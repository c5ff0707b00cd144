//! The service manager's watchdog, fed by the agent's loop.
//!
//! The manager restarts an agent that does not report in time. So a report has to mean that the loop comes round:
//! a timer of its own would go on while health changes are applied no more.

use std::{sync::mpsc, thread, time::Duration};

use sd_notify::NotifyState;
use tokio::time::{Interval, MissedTickBehavior};
use tracing::warn;

/// Reports progress, if the service manager wants to know.
pub(super) struct Watchdog(Option<Fed>);

struct Fed {
    interval: Interval,
    reports: mpsc::SyncSender<()>,
}

impl Watchdog {
    /// As the environment says: nothing is reported unless the manager watches this process.
    pub(super) fn from_env() -> std::io::Result<Self> {
        let limit = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
        limit.map(Fed::start).transpose().map(Self)
    }

    /// Waits until a report is due, and makes it; for ever if nothing is to be reported.
    pub(super) async fn feed(&mut self) {
        match &mut self.0 {
            Some(fed) => {
                fed.interval.tick().await;
                // One that waits already says the same.
                let _ = fed.reports.try_send(());
            }
            None => std::future::pending().await,
        }
    }
}

impl Fed {
    /// Twice within `limit`, as sd_watchdog_enabled(3) recommends.
    fn start(limit: Duration) -> std::io::Result<Self> {
        let mut interval = tokio::time::interval(limit / 2);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (reports, due) = mpsc::sync_channel(1);
        // Sending waits while the manager's queue is full, which the loop must not.
        thread::Builder::new().name("watchdog".to_owned()).spawn(move || {
            while due.recv().is_ok() {
                if let Err(error) = sd_notify::notify(&[NotifyState::Watchdog]) {
                    warn!(%error, "cannot report progress to the service manager");
                }
            }
        })?;
        Ok(Self { interval, reports })
    }
}
