//! What has happened.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::words;

/// Something that has happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Counts from 1 since the agent started.
    pub number: u64,
    /// Seconds since 1970.
    pub at_seconds: f64,
    /// What it is about.
    pub kind: EventKind,
    /// In words.
    pub text: String,
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// The health of a backend.
    Health,
    /// The configuration.
    Config,
    /// Flows that the agent has ended.
    Flows,
    /// Other hosts on the links.
    Network,
    /// Maps, links and pins that another program has changed.
    Datapath,
}

words!(EventKind {
    Health = "health",
    Config = "config",
    Flows = "flows",
    Network = "network",
    Datapath = "datapath",
});

/// Which events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct EventFilter {
    /// Those with a higher number.
    pub after: Option<u64>,
}
