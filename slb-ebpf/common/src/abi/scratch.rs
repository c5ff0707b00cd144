//! `SLB_SCRATCH`: what the stack has no room for, and what one program hands to the next.

use super::backend::NextHop;
use super::fragment::{Fragment, FragmentKey};
use super::sticky::StickyKey;
use crate::net::{Endpoint, FlowKey, NatTuple};
use crate::{
    packet::Packet,
    proxy_protocol::{Head, Options, Words},
};

/// Value of `SLB_SCRATCH`, per CPU: what the program's stack has no room for. Means nothing afterwards.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Scratch {
    /// The packet.
    pub packet: Packet,
    /// Keys that are made on its account.
    pub keys: Keys,
    /// What one program tells the next.
    pub args: TailCallArgs,
    /// What a backend is told about a client.
    pub words: Words,
    /// Zero.
    pub spare: u32,
    /// The beginning of a packet that something is put into.
    pub head: Head,
    /// Low half of the jiffies when this CPU last sent an ICMP error.
    pub errors_at: u32,
    /// How many it has sent in that jiffy.
    pub errors: u32,
    /// The options of a TCP segment.
    pub options: Options,
}

/// How many ICMP errors a CPU sends per jiffy at most.
pub const ERRORS_PER_JIFFY: u32 = 10;

/// Part of [`Scratch`]: what one program tells the next about the packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct TailCallArgs {
    /// Length of the frame as it arrived, in bytes.
    pub bytes: u64,
    /// [`crate::hash::flow`] of the client's packets.
    pub hash: u64,
    /// Index into `SLB_BACKENDS`.
    pub backend: u32,
    /// For `slb_full_nat`, `slb_proxy` and `slb_icmp_nat64`: place of the client's entry in `SLB_FLOWS`.
    pub place: u32,
    /// For `slb_respond`: the [`crate::verdict::Verdict`] that asks for the answer. For
    /// `slb_flow`: [`super::FLOW_ORIGINAL`] or [`super::FLOW_BYPASS`]. For the others:
    /// [`super::FLOW_ORIGINAL`] or [`super::FLOW_REPLY`].
    pub what: u32,
    /// For `slb_respond`: the MTU that the packet exceeds.
    pub mtu: u32,
    /// VLAN tags that were taken off, the outer one first, each as it stood in the frame; 0: none.
    pub tags: [u32; 2],
    /// For `slb_proxy` and `slb_icmp_nat64`: the way.
    pub hop: NextHop,
    /// How many bytes the backend is told about the client; 0: nothing.
    pub inserted_len: u32,
    /// For `slb_flow`: the slot that `slb_scheduler` has chosen, or [`NOT_CHOSEN`].
    pub chosen: u32,
}

/// In [`TailCallArgs::chosen`]: the schedule decides.
pub const NOT_CHOSEN: u32 = u32::MAX;

/// Part of [`Scratch`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Keys {
    /// What a backend would answer with.
    pub reply: FlowKey,
    /// What its client would send.
    pub forward: FlowKey,
    /// Where either goes to.
    pub to: Endpoint,
    /// Of a packet in fragments.
    pub fragments: FragmentKey,
    /// Where its first one goes.
    pub fragment: Fragment,
    /// What its ends are replaced by.
    pub ends: NatTuple,
    /// Its client.
    pub sticky: StickyKey,
    /// A question to the kernel's routing tables, and the answer: `struct bpf_fib_lookup`.
    pub route: [u64; 8],
}
