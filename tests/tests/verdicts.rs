//! The XDP program, frame by frame, in the kernel that will run it (`BPF_PROG_TEST_RUN`).
//!
//! Frames are built by etherparse, which shares no code with the datapath. What comes out is compared
//! as a whole with the frame that etherparse builds from the translated addresses, so that every
//! checksum is computed from scratch and every byte that must stay is seen to stay. Each run asserts
//! besides that exactly one counter moved, by one frame and its length, and that the XDP action is
//! the verdict's.

#[path = "verdicts/fixture.rs"]
mod fixture;
#[path = "verdicts/frame.rs"]
mod frame;
#[path = "verdicts/lab.rs"]
mod lab;
#[path = "verdicts/worker.rs"]
mod worker;

#[path = "verdicts/answers.rs"]
mod answers;
#[path = "verdicts/counters.rs"]
mod counters;
#[path = "verdicts/cuts.rs"]
mod cuts;
#[path = "verdicts/direct.rs"]
mod direct;
#[path = "verdicts/explained.rs"]
mod explained;
#[path = "verdicts/families.rs"]
mod families;
#[path = "verdicts/flows.rs"]
mod flows;
#[path = "verdicts/fragments.rs"]
mod fragments;
#[path = "verdicts/full.rs"]
mod full;
#[path = "verdicts/fuzz.rs"]
mod fuzz;
#[path = "verdicts/headers.rs"]
mod headers;
#[path = "verdicts/icmp.rs"]
mod icmp;
#[path = "verdicts/index.rs"]
mod index;
#[path = "verdicts/policy.rs"]
mod policy;
#[path = "verdicts/replies.rs"]
mod replies;
#[path = "verdicts/shares.rs"]
mod shares;
#[path = "verdicts/table.rs"]
mod table;
#[path = "verdicts/tags.rs"]
mod tags;
#[path = "verdicts/tell.rs"]
mod tell;
#[path = "verdicts/tunnels.rs"]
mod tunnels;
