//! The local API: HTTP and JSON on a unix socket, for the owner of the socket only.

mod client;
mod connections;
mod flows;
mod http;
mod server;
mod status;

pub use client::{ClientError, Connection};
pub use flows::{Asked, Explained, FlowFilter, FlowStatus, Flows, Names};
pub use http::{HttpError, serve_metrics};
pub use server::{ApiError, Refusal, Request, Sight, description_of_api, serve};
pub use status::{
    BackendStatus, Event, EventFilter, File, FlowTableStatus, InstanceStatus, InterfaceStatus,
    ListenerStatus, MapStatus, Reloaded, Status, VerdictCount,
};

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
