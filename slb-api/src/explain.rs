//! What would become of a packet.

use std::{net::SocketAddr, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::{UnknownWord, words};

/// What a packet to be explained carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PacketProtocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
    /// An echo request of RFC 792 or RFC 4443.
    Icmp,
}

words!(PacketProtocol { Tcp = "tcp", Udp = "udp", Icmp = "icmp" });

/// Which fragment of its packet something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FragmentPart {
    /// The one that has the ports.
    First,
    /// Another one.
    Later,
}

words!(FragmentPart { First = "first", Later = "later" });

/// A packet to be explained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ExplainRequest {
    /// What it carries.
    pub protocol: PacketProtocol,
    /// Source address and port: the client's. ICMP has no port: 0.
    #[param(value_type = String)]
    pub src: SocketAddr,
    /// Destination address and port.
    #[param(value_type = String)]
    pub dst: SocketAddr,
    /// Whether it is in the middle of a TCP connection, and not its first packet.
    #[serde(default)]
    pub established: bool,
    /// TTL or hop limit with which it arrives; 64 if absent.
    #[serde(default)]
    pub ttl: Option<u8>,
    /// Which fragment it is; absent: it is whole.
    #[serde(default)]
    pub fragment: Option<FragmentPart>,
    /// Identification of the packet that it is a later fragment of; absent: its first fragment was not seen.
    #[serde(default)]
    pub fragment_id: Option<u32>,
    /// Whether it is an ICMP error about such a packet, on its way to `src`.
    #[serde(default)]
    pub icmp_error: bool,
    /// Name of the interface that it comes in by; absent: one that it may come in by.
    #[serde(default)]
    pub interface: Option<String>,
}

impl ExplainRequest {
    /// The first packet of a flow.
    #[must_use]
    pub const fn new(protocol: PacketProtocol, src: SocketAddr, dst: SocketAddr) -> Self {
        Self {
            protocol,
            src,
            dst,
            established: false,
            ttl: None,
            fragment: None,
            fragment_id: None,
            icmp_error: false,
            interface: None,
        }
    }
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
    /// Source address and port that the backend sees, if they are certain before.
    pub from: Option<String>,
}

impl FromStr for PacketProtocol {
    type Err = UnknownWord;

    fn from_str(word: &str) -> Result<Self, UnknownWord> {
        UnknownWord::find(Self::WORDS, word, "tcp, udp or icmp")
    }
}

impl FromStr for FragmentPart {
    type Err = UnknownWord;

    fn from_str(word: &str) -> Result<Self, UnknownWord> {
        UnknownWord::find(Self::WORDS, word, "first or later")
    }
}
