//! The flow table, in the words of the configuration.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::words;

/// Which flows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct FlowFilter {
    /// Only those through this listener, such as `tcp/80`.
    pub listener: Option<String>,
    /// Only those of this backend, by its name.
    pub backend: Option<String>,
    /// At most so many.
    pub limit: Option<usize>,
}

/// Flows that have entries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Flows {
    /// How many there are, those beyond the limit among them.
    pub total: u64,
    /// In no order.
    pub flows: Vec<FlowStatus>,
    /// The client that has most of them; `null`: there are none.
    pub busiest: Option<BusiestClient>,
}

/// The client that has most flows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BusiestClient {
    /// Its address.
    #[schema(value_type = String)]
    pub client: IpAddr,
    /// How many flows it has.
    pub flows: u64,
}

/// A flow that has an entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FlowStatus {
    /// Instance, protocol and port; `null`: the configuration does not have it any more.
    pub listener: Option<String>,
    /// Who sends.
    #[schema(value_type = String)]
    pub client: SocketAddr,
    /// To whom.
    #[schema(value_type = String)]
    pub vip: SocketAddr,
    /// The backend's name.
    pub backend: String,
    /// Its address and port; `null`: the configuration does not have it any more.
    #[schema(value_type = Option<String>)]
    pub to: Option<SocketAddr>,
    /// Port that the backend sees.
    pub port: u16,
    /// How far it is.
    pub state: FlowState,
    /// Seconds until it is forgotten, if nothing more is sent.
    pub expires_seconds: u64,
}

/// How far a flow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FlowState {
    /// The client has not acknowledged the SYN-ACK yet.
    Opening,
    /// The client has; a flow of UDP is established from its start.
    Established,
}

words!(FlowState { Opening = "opening", Established = "established" });
