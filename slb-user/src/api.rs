//! The local API: HTTP and JSON on a unix socket, for the owner of the socket only.

mod client;
mod server;
mod status;

pub use client::{ClientError, Connection};
pub use server::{ApiError, Request, serve};
pub use status::{
    BackendStatus, FlowTableStatus, InstanceStatus, InterfaceStatus, ListenerStatus, Status,
    VerdictCount,
};

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
