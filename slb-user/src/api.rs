//! The local API: HTTP and JSON on a unix socket, for the owner of the socket only.

mod client;
mod server;
mod status;

pub use client::{ClientError, Connection};
pub use server::{ApiError, Refusal, Request, serve};
pub use status::{
    BackendStatus, File, FlowTableStatus, InstanceStatus, InterfaceStatus, ListenerStatus,
    Reloaded, Status, VerdictCount,
};

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
