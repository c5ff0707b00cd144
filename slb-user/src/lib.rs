//! slb: turns a Linux gateway into a server load balancer for TCP and UDP.
//!
//! ```text
//! config ─► layout ──┐
//! health ────────────┼─► desired ─► plan ─► datapath (BPF maps)
//! net (next hops) ───┘
//! ```
//!
//! [`agent`] turns that crank; [`api`] answers questions; [`cli`] asks them.

pub mod agent;
pub mod api;
pub mod causes;
pub mod cli;
pub mod clock;
pub mod config;
pub mod datapath;
pub mod desired;
pub mod distribution;
pub mod health;
pub mod layout;
pub mod metrics;
pub mod net;
pub mod plan;
pub mod schedule;
pub mod state;
