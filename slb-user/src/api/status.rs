//! What the API answers, and commands print with `--json`.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// `GET /v1/status`: a running agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Of the agent.
    pub version: String,
    /// Of the agent.
    pub pid: u32,
    /// The configuration file.
    pub config: String,
    /// Counts configurations; the first is 1.
    pub generation: u64,
    /// Configurations that were refused since the agent started.
    pub reload_failures: u64,
    /// Seconds since the agent started.
    pub uptime_seconds: u64,
    /// Where XDP is attached.
    pub interfaces: Vec<InterfaceStatus>,
    /// The flow table.
    pub flow_table: FlowTableStatus,
    /// In the order of the file.
    pub instances: Vec<InstanceStatus>,
    /// By label; those of which there were none are left out.
    pub verdicts: BTreeMap<String, VerdictCount>,
    /// How full the maps are.
    pub maps: Vec<MapStatus>,
    /// Lines of the log that could not be written, or not fast enough, since the agent started.
    pub log_lines_dropped: u64,
    /// What an operator should see to, in words.
    pub problems: Vec<String>,
}

/// An interface of the gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InterfaceStatus {
    /// Its name.
    pub name: String,
    /// The kernel's number for it.
    pub index: u32,
    /// `native` or `generic`.
    pub mode: String,
    /// Why, if the mode was not the first choice.
    pub reason: Option<String>,
}

/// The flow table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FlowTableStatus {
    /// In flows.
    pub capacity: u32,
    /// Kernel memory that it takes.
    pub bytes: u64,
}

/// A map of the datapath.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MapStatus {
    /// Its name, as it is pinned.
    pub name: String,
    /// Entries in use; `None`: nobody counts them.
    pub entries: Option<u64>,
    /// Entries that it has room for.
    pub capacity: u64,
}

/// An instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InstanceStatus {
    /// Its name.
    pub name: String,
    /// Its virtual addresses.
    pub vips: Vec<String>,
    /// In the order of the file.
    pub listeners: Vec<ListenerStatus>,
}

/// A listener.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ListenerStatus {
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Port on the VIPs.
    pub port: u16,
    /// Name of its group; `default` for the default group.
    pub group: String,
    /// How a backend is chosen.
    pub scheduler: String,
    /// A disabled listener is not balanced.
    pub enabled: bool,
    /// For how many seconds a client is kept with its backend; `None`: it is not.
    pub persistence_seconds: Option<u64>,
    /// Flows given to backends, those that are not its any more among them.
    pub flows: u64,
    /// Frames to backends.
    pub packets: u64,
    /// Bytes to backends.
    pub bytes: u64,
    /// Frames from backends to clients.
    pub reply_packets: u64,
    /// Bytes from backends to clients.
    pub reply_bytes: u64,
    /// One per backend and address.
    pub backends: Vec<BackendStatus>,
}

/// A backend of a listener, at one of its addresses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BackendStatus {
    /// Its name.
    pub name: String,
    /// `primary` or `secondary` in a group of that kind.
    pub role: Option<String>,
    /// Address and port that packets are sent to.
    pub endpoint: String,
    /// Configured weight.
    pub weight: u32,
    /// `healthy`, `unhealthy`, `unknown` (not probed yet) or `unchecked` (never probed).
    pub health: String,
    /// How long the last probe took.
    pub check_seconds: Option<f64>,
    /// How often its health has changed since the agent started.
    pub transitions: u64,
    /// Why the last failed probe failed, while the backend is not healthy.
    pub reason: Option<String>,
    /// Whether it gets new flows.
    pub active: bool,
    /// Its part of new flows, 0 to 1, among the backends of its address family.
    pub expected_share: f64,
    /// Whether it is being drained.
    pub drains: bool,
    /// Drained: in so many seconds its flows are ended; `None`: they are left alone.
    pub closes_in_seconds: Option<f64>,
    /// Flows that have an entry and have not ended.
    pub active_flows: u64,
    /// Flows that it was given.
    pub flows: u64,
    /// Frames sent to it.
    pub packets: u64,
    /// Bytes sent to it.
    pub bytes: u64,
    /// Frames from it to clients.
    pub reply_packets: u64,
    /// Bytes from it to clients.
    pub reply_bytes: u64,
}

impl BackendStatus {
    /// Whether it is probed.
    #[must_use]
    pub fn is_checked(&self) -> bool {
        self.health != "unchecked"
    }

    /// Whether its address is IPv4.
    #[must_use]
    pub fn is_v4(&self) -> bool {
        !self.endpoint.starts_with('[')
    }
}

/// Something that has happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Counts from 1 since the agent started.
    pub number: u64,
    /// Seconds since 1970.
    pub at_seconds: f64,
    /// `health`, `config` or `flows`.
    pub kind: String,
    /// In words.
    pub text: String,
}

/// Which events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct EventFilter {
    /// Those with a higher number.
    pub after: Option<u64>,
}

/// How often a verdict was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VerdictCount {
    /// Frames.
    pub packets: u64,
    /// Their bytes, as they arrived.
    pub bytes: u64,
}

/// `POST /v1/plan` takes this: a file that may become the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct File {
    /// Names it in messages.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// All of it.
    pub text: String,
}

/// `POST /v1/reload`: the file was taken over. `POST /v1/plan`: it could be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reloaded {
    /// Of the configuration that is in force now; counts those that differ from the one before.
    pub generation: u64,
    /// What is different, one line each: `+` added, `-` removed, `~` changed.
    pub changes: Vec<String>,
    /// Of the file.
    pub warnings: Vec<String>,
}
