//! How a running agent and its datapath are. Metrics and commands are views of this.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Problem, Protocol, Scheduler, words};

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
    /// The packets that were dropped, most first.
    pub drops: Vec<Drop>,
    /// How full the maps are.
    pub maps: Vec<MapStatus>,
    /// By VIP: how often another host has claimed it by ARP or neighbour discovery, since the agent started.
    pub vip_claims: BTreeMap<String, u64>,
    /// Lines of the log that could not be written, or not fast enough, since the agent started.
    pub log_lines_dropped: u64,
    /// What another program has changed in the datapath, and the agent has put right, since the agent started.
    pub repairs: Repairs,
    /// What an operator should see to, the worst first.
    pub problems: Vec<Problem>,
}

/// How often the agent has put right what another program had changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Repairs {
    /// Elements of maps.
    pub maps: u64,
    /// Links, each of which holds XDP at an interface.
    pub links: u64,
    /// Pins.
    pub pins: u64,
}

/// An interface of the gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InterfaceStatus {
    /// Its name.
    pub name: String,
    /// The kernel's number for it.
    pub index: u32,
    /// How XDP is attached.
    pub mode: XdpMode,
    /// Why, if the mode was not the first choice.
    pub reason: Option<String>,
}

/// How XDP is attached to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum XdpMode {
    /// In the driver.
    Native,
    /// In the kernel's stack, which is slower.
    Generic,
}

words!(XdpMode { Native = "native", Generic = "generic" });

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
    /// Entries in use; `null`: not counted.
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
    #[schema(value_type = Vec<String>)]
    pub vips: Vec<IpAddr>,
    /// In the order of the file.
    pub listeners: Vec<ListenerStatus>,
}

/// A listener.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ListenerStatus {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port on the VIPs.
    pub port: u16,
    /// Name of its group; `default` for the default group.
    pub group: String,
    /// How a backend is chosen.
    pub scheduler: Scheduler,
    /// A disabled listener is not balanced.
    pub enabled: bool,
    /// For how many seconds a client is kept with its backend; `null`: it is not.
    pub persistence_seconds: Option<u64>,
    /// Flows given to backends, those that are not its any more among them; `null`: not counted.
    pub flows: Option<u64>,
    /// Frames to backends.
    pub packets: u64,
    /// Bytes to backends.
    pub bytes: u64,
    /// Frames from backends to clients; `null`: they do not pass the gateway.
    pub reply_packets: Option<u64>,
    /// Bytes from backends to clients; `null`: they do not pass the gateway.
    pub reply_bytes: Option<u64>,
    /// Of all its backends; `null`: not measured yet.
    pub rates: Option<Rates>,
    /// One per backend and address.
    pub backends: Vec<BackendStatus>,
}

/// A backend of a listener, at one of its addresses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BackendStatus {
    /// Its name.
    pub name: String,
    /// Its place in the group.
    pub role: Role,
    /// Address and port that packets are sent to.
    #[schema(value_type = String)]
    pub endpoint: SocketAddr,
    /// Configured weight; `null`: the configuration does not name the backend any more.
    pub weight: Option<u32>,
    /// Whether it is fit to get new flows.
    pub health: Health,
    /// Seconds since 1970 when its health last changed; `null`: not since the agent started.
    pub health_since: Option<f64>,
    /// `null`: not probed yet, or never.
    pub last_probe: Option<LastProbe>,
    /// How often its health has changed since the agent started.
    pub transitions: u64,
    /// Why the last failed probe failed, while the backend is not healthy.
    pub reason: Option<String>,
    /// Whether it gets new flows.
    pub active: bool,
    /// Part of new flows that it is to get now, 0 to 1, among the backends of its address family; `null`: the listener
    /// has no schedule.
    pub expected_share: Option<f64>,
    /// Part of all flows so far that it has got, 0 to 1, among the backends of its address family; of packets where
    /// flows are not counted; `null`: there were none.
    pub share: Option<f64>,
    /// Whether it is being drained.
    pub drains: bool,
    /// Drained: in so many seconds its flows are ended; `null`: they are left alone.
    pub closes_in_seconds: Option<f64>,
    /// Flows that have an entry and have not ended.
    pub active_flows: u64,
    /// Flows that it was given; `null`: not counted.
    pub flows: Option<u64>,
    /// Frames sent to it.
    pub packets: u64,
    /// Bytes sent to it.
    pub bytes: u64,
    /// Frames from it to clients; `null`: they do not pass the gateway.
    pub reply_packets: Option<u64>,
    /// Bytes from it to clients; `null`: they do not pass the gateway.
    pub reply_bytes: Option<u64>,
    /// `null`: not measured yet.
    pub rates: Option<Rates>,
}

/// How much there was per second, lately.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Rates {
    /// For how many seconds this was measured, until now.
    pub seconds: f64,
    /// New flows per second; `null`: not counted.
    pub flows: Option<f64>,
    /// Frames to backends per second.
    pub packets: f64,
    /// Bytes to backends per second.
    pub bytes: f64,
    /// Frames from backends per second; `null`: they do not pass the gateway.
    pub reply_packets: Option<f64>,
    /// Bytes from backends per second; `null`: they do not pass the gateway.
    pub reply_bytes: Option<f64>,
}

/// The last probe of a backend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LastProbe {
    /// Seconds since 1970 when it ended.
    pub at_seconds: f64,
    /// How many seconds it took.
    pub duration_seconds: f64,
    /// Why it failed; `null`: it succeeded.
    pub error: Option<String>,
}

/// Whether a backend is fit to get new flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Its probes succeed.
    Healthy,
    /// They fail, or clients cannot connect.
    Unhealthy,
    /// Not probed yet.
    Unknown,
    /// Never probed: it counts as healthy.
    Unchecked,
}

words!(Health {
    Healthy = "healthy",
    Unhealthy = "unhealthy",
    Unknown = "unknown",
    Unchecked = "unchecked"
});

/// Place of a backend in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// One of many.
    Member,
    /// Gets everything while healthy.
    Primary,
    /// Gets everything while the primary is not healthy.
    Secondary,
    /// The configuration does not name it any more; it is there until its flows have ended.
    Removed,
}

words!(Role {
    Member = "member",
    Primary = "primary",
    Secondary = "secondary",
    Removed = "removed"
});

impl BackendStatus {
    /// Whether it is probed.
    #[must_use]
    pub fn is_checked(&self) -> bool {
        self.health != Health::Unchecked
    }

    /// Whether its address is IPv4.
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.endpoint.is_ipv4()
    }
}

impl ListenerStatus {
    /// Protocol and port, such as `tcp/80`.
    #[must_use]
    pub fn label(&self) -> String {
        format!("{}/{}", self.protocol, self.port)
    }
}

/// How often a verdict was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VerdictCount {
    /// Frames.
    pub packets: u64,
    /// Their bytes, as they arrived.
    pub bytes: u64,
}

/// Packets that were dropped for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Drop {
    /// A label of `slb_verdicts_total`.
    pub verdict: String,
    /// The listener that they were for, as `instance tcp/80`; `null`: not counted per listener.
    pub listener: Option<String>,
    /// Frames.
    pub packets: u64,
    /// Their bytes, as they arrived.
    pub bytes: u64,
}
