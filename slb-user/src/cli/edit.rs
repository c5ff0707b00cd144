//! `slb backend` and `slb listener`: the running agent and its file are changed together.

use std::net::IpAddr;

use slb_api::{Edit, Place, Protocol};

use super::{Exit, ask::Query, reload::tell};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Backend {
    /// Add a backend to a group.
    Add {
        #[command(flatten)]
        place: PlaceArguments,
        /// Its address; twice for one of each family.
        #[arg(long, required = true, value_name = "ADDRESS", num_args = 1..=2, value_delimiter = ',')]
        address: Vec<IpAddr>,
        /// Its port: required in a named group, refused in the default group.
        #[arg(long)]
        port: Option<u16>,
        /// Its share of new flows, 0 to 100.
        #[arg(long)]
        weight: Option<u32>,
        #[command(flatten)]
        query: Query,
    },
    /// Remove a backend: no new flows, its TCP connections go on to their ends.
    Remove {
        #[command(flatten)]
        place: PlaceArguments,
        #[command(flatten)]
        query: Query,
    },
    /// Give a backend another share of new flows; 0: none, and its flows go on.
    Weight {
        #[command(flatten)]
        place: PlaceArguments,
        /// 0 to 100.
        weight: u32,
        #[command(flatten)]
        query: Query,
    },
    /// Drain a backend: no new flows, and those that it has are ended after the listener's `drain`.
    Drain {
        #[command(flatten)]
        place: PlaceArguments,
        /// Stop draining.
        #[arg(long)]
        stop: bool,
        #[command(flatten)]
        query: Query,
    },
}

#[derive(Debug, clap::Subcommand)]
pub(super) enum Listener {
    /// Start balancing a listener.
    Start(ListenerArguments),
    /// Stop balancing a listener: its flows end, and its port is free.
    Stop(ListenerArguments),
}

#[derive(Debug, clap::Args)]
pub(super) struct ListenerArguments {
    /// The instance's name.
    instance: String,
    /// Its protocol and port, such as tcp/80.
    #[arg(value_name = "PROTOCOL/PORT", value_parser = listener)]
    listener: (Protocol, u16),
    #[command(flatten)]
    query: Query,
}

#[derive(Debug, clap::Args)]
pub(super) struct PlaceArguments {
    /// The instance's name.
    instance: String,
    /// The backend's name.
    backend: String,
    /// The group's name; without it the default group, or the only other one that has the backend.
    #[arg(long)]
    group: Option<String>,
}

/// A listener is not named by its protocol and port.
#[derive(Debug, thiserror::Error)]
#[error("write tcp/PORT or udp/PORT, such as tcp/80")]
struct NoListenerName;

fn listener(text: &str) -> Result<(Protocol, u16), NoListenerName> {
    let (protocol, port) = text.split_once('/').ok_or(NoListenerName)?;
    let protocol = protocol.parse().map_err(|_| NoListenerName)?;
    Ok((protocol, port.parse().map_err(|_| NoListenerName)?))
}

impl From<PlaceArguments> for Place {
    fn from(PlaceArguments { instance, backend, group }: PlaceArguments) -> Self {
        Self { instance, group, backend }
    }
}

pub(super) fn backend(command: Backend) -> anyhow::Result<Exit> {
    let (edit, query) = match command {
        Backend::Add { place, address, port, weight, query } => {
            let place = place.into();
            (Edit::AddBackend { place, addresses: address, port, weight }, query)
        }
        Backend::Remove { place, query } => (Edit::RemoveBackend { place: place.into() }, query),
        Backend::Weight { place, weight, query } => {
            (Edit::SetWeight { place: place.into(), weight }, query)
        }
        Backend::Drain { place, stop, query } => {
            (Edit::DrainBackend { place: place.into(), drain: !stop }, query)
        }
    };
    ask(&edit, &query)
}

pub(super) fn enable(command: Listener) -> anyhow::Result<Exit> {
    let (arguments, enabled) = match command {
        Listener::Start(arguments) => (arguments, true),
        Listener::Stop(arguments) => (arguments, false),
    };
    let ListenerArguments { instance, listener: (protocol, port), query } = arguments;
    ask(&Edit::EnableListener { instance, protocol, port, enabled }, &query)
}

fn ask(edit: &Edit, query: &Query) -> anyhow::Result<Exit> {
    let answer = query.agent.ask(async |agent| agent.post("/v1/edit", edit).await)?;
    tell(answer, query.json, |reloaded| format!("generation {}", reloaded.generation))
}
