//! How the agent and its datapath are, for operators: status, flows, explanations, events and metrics.
//!
//! The agent's loop publishes a [`Snapshot`] of what it knows when something has changed. Readers combine it with the
//! counters of the datapath, in threads of their own: the loop does not wait for them, nor they for it.

mod claims;
mod events;
pub mod metrics;
mod names;
mod problems;
mod rates;
mod reader;
mod snapshot;
mod status;

pub use claims::ClaimCounts;
pub use events::EventLog;
pub use names::Names;
pub use problems::ProblemLog;
pub use reader::{ExplainError, Observer, ReadError, StatusReader};
pub use snapshot::{History, Installed, ScheduleShares, Snapshot};

#[cfg(test)]
pub(crate) mod fixtures;
