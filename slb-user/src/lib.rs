//! slb: turns a Linux gateway into a server load balancer for TCP and UDP.
//!
//! ```text
//! config ─► ids ─────┐
//! health ────────────┼─► planner ─► plan ─► datapath (BPF maps)
//! net (next hops) ───┘
//! ```
//!
//! [`agent`] turns that crank and publishes what it knows; [`observe`] reads that and the counters; [`api`] serves it;
//! [`cli`] asks for it.

// One write to a pipe that is not read would stop the agent: [`log`] and `cli::output` do what is safe.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod agent;
pub mod api;
pub mod cli;
pub mod clock;
pub mod config;
mod contained;
pub mod datapath;
pub mod descriptors;
pub mod distribution;
pub mod error_chain;
pub mod health;
pub mod ids;
pub mod log;
pub mod net;
pub mod observe;
mod parallel;
pub mod plan;
pub mod planner;
pub mod printable;
#[cfg(test)]
mod reference;
mod rights;
pub mod schedule;
pub mod seed;
pub mod state;
