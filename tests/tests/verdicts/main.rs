//! The XDP program, frame by frame, in the kernel that will run it (`BPF_PROG_TEST_RUN`).
//!
//! Frames are built by etherparse, which shares no code with the datapath. What comes out is compared
//! as a whole with the frame that etherparse builds from the translated addresses, so that every
//! checksum is computed from scratch and every byte that must stay is seen to stay. Each run asserts
//! besides that exactly one counter moved, by one frame and its length, and that the XDP action is
//! the verdict's.

mod connection;
mod fixture;
mod frame;
mod lab;
mod oracle;
mod worker;

mod bypass;
mod counters;
mod cuts;
mod explained;
mod families;
mod flows;
mod forged;
mod fragments;
mod full_nat;
mod fuzz;
mod fuzz_forgery;
mod fuzz_oracle;
mod headers;
mod icmp;
mod index;
mod ingress;
mod limits;
mod policy;
mod proxy_protocol;
mod receiver;
mod replies;
mod respond;
mod shares;
mod table;
mod tunnels;
mod vlan;
