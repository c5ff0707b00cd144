//! What the packet path and the agent agree on, and all code that touches only bytes.
//!
//! Compiled for the BPF target by `slb-ebpf` and for the host by `slb-user` and by the tests, so
//! that a parser bug found by `cargo test` is the parser bug of the datapath. No map is touched
//! here: stages that need one live in `slb-ebpf`.

#![no_std]

#[cfg(test)]
extern crate std;

pub mod abi;
pub mod bench;
pub mod checksum;
pub mod decide;
mod flags;
pub mod frame;
pub mod hash;
pub mod icmp;
pub mod icmp_error;
pub mod icmp_nat64;
pub mod mss;
pub mod nat64;
pub mod net;
pub mod packet;
pub mod parse;
pub mod programs;
pub mod proxy_protocol;
pub mod quic;
pub mod reset;
pub mod rewrite;
pub mod tunnel;
pub mod verdict;
pub mod words;
