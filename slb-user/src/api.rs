//! The local API: HTTP and JSON on a unix socket for the owner of the socket only, and on another one for those who may
//! only look.

mod body;
mod client;
mod connections;
mod http;
mod refusal;
mod server;

pub use client::{ClientError, Connection};
pub use http::{HttpError, serve_metrics};
pub use refusal::{Refusal, RefusalKind};
pub use server::{Access, Agent, ApiError, Request, description_of_api, serve};

#[cfg(test)]
mod tests;
