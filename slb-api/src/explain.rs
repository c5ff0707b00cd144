//! What would become of a packet.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::Protocol;

/// A packet to be explained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ExplainRequest {
    /// Its protocol.
    pub protocol: Protocol,
    /// Address and port of the client.
    #[param(value_type = String)]
    pub src: SocketAddr,
    /// Address and port that it talks to.
    #[param(value_type = String)]
    pub dst: SocketAddr,
    /// Whether it is in the middle of a TCP connection, and not its first packet.
    #[serde(default)]
    pub established: bool,
}

/// What would become of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExplainResponse {
    /// In the order of the packet path, each with what was found there.
    pub steps: Vec<[String; 2]>,
    /// How it ends: a label of `slb_verdicts_total`; `null`: that cannot be told.
    pub verdict: Option<String>,
    /// The backend that gets it.
    pub backend: Option<String>,
    /// Where it is sent to.
    pub to: Option<String>,
    /// Who the backend takes for the sender, if that is certain before.
    pub from: Option<String>,
}
