//! The local API: HTTP and JSON on a unix socket, for the owner of the socket only.

mod client;
mod http;
mod server;
mod status;

pub use client::{ClientError, Connection};
pub use http::{HttpError, serve_metrics};
pub use server::{ApiError, Refusal, Request, description_of_api, serve};
pub use status::{
    BackendStatus, File, FlowTableStatus, InstanceStatus, InterfaceStatus, ListenerStatus,
    MapStatus, Reloaded, Status, VerdictCount,
};

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
