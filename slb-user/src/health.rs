//! Whether backends are fit to get new flows, found out by probing them.
//!
//! [`probe()`] asks once, [`Tracker`] turns outcomes into a state, and [`Checkers`] does both for all
//! targets, for as long as it lives. Health is that of one address on behalf of one listener.

mod bounded;
mod checker;
mod machine;
mod passive;
mod probe;
mod status;
mod window;

pub use checker::{Checkers, Event, Target};
pub use machine::{Health, Tracker};
pub use passive::PassiveCheck;
#[cfg(feature = "fuzzing")]
pub use probe::fuzz_answer;
pub use probe::{Failure, probe};
pub use status::{LastFailure, LastProbe, Shortage, Status, Statuses};
pub use window::Windows;
