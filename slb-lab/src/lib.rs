//! The lab: a client side, a gateway and backends, each a network namespace of this host.
//!
//! `cargo xtask run` and the tests that need a kernel stand on it. Nothing here touches the host's
//! own network: every device is born in a namespace of the lab and dies with it. Everything is a
//! guard, so that an error or a panic leaves nothing behind; what a killed process left is removed
//! by the next [`Topology::build`].

pub use client::{Client, Download, Exchange, Failure, Load, Outcome, Session, Sessions};
pub use dice::Dice;
pub use gateway::Gateway;
pub use lab::Lab;
pub use machine::Machine;
pub use netns::Netns;
pub use server::{Server, Service};
pub use topology::{BACKENDS, CLIENTS, Host, Topology};

pub mod attack;
mod cgroup;
pub mod client;
mod dice;
pub mod ebpf;
pub mod gateway;
mod http;
pub mod interrupt;
pub mod lab;
pub mod machine;
mod naming;
pub mod netns;
pub mod plan;
mod scratch;
pub mod server;
pub mod topology;
pub mod workers;

#[cfg(test)]
mod tests;
