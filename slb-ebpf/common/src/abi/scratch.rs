//! `SLB_SCRATCH`: what the stack has no room for, and what one program hands to the next.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::backend::NextHop;
use super::flow::FlowKind;
use super::fragment::{Fragment, FragmentKey};
use super::sticky::StickyKey;
use crate::net::{Endpoint, FlowKey, NatTuple};
use crate::{
    packet::Packet,
    proxy_protocol::{Head, Options, Words},
    verdict::Verdict,
    words,
};

/// Value of `SLB_SCRATCH`, per CPU: what the program's stack has no room for. Means nothing afterwards.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct TailCallArgs {
    /// Length of the frame as it arrived, in bytes.
    pub bytes: u64,
    /// [`crate::hash::flow`] of the client's packets.
    pub hash: u64,
    /// Index into `SLB_BACKENDS`.
    pub backend: u32,
    /// For `slb_full_nat`, `slb_proxy` and `slb_icmp_nat64`: place of the client's entry in `SLB_FLOWS`.
    pub place: u32,
    /// A [`Task`], packed: see [`TailCallArgs::task`].
    pub task: u32,
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

/// What a program is to do with the packet that it is handed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// To go on with a packet of this kind: [`FlowKind::Original`] or [`FlowKind::Reply`].
    Pass(FlowKind),
    /// `slb_respond`: to answer it, with this verdict if that succeeds.
    Answer(Verdict),
}

impl TailCallArgs {
    /// In [`TailCallArgs::task`]: behind the kinds come verdicts.
    const ANSWER: u32 = 1 << 8;

    /// What is to be done.
    #[must_use]
    #[inline(always)]
    pub const fn task(&self) -> Task {
        match FlowKind::from_number(self.task as u8) {
            Some(kind) if self.task < Self::ANSWER => Task::Pass(kind),
            _ => Task::Answer(self.answer()),
        }
    }

    /// Says what is to be done.
    #[inline(always)]
    pub const fn set_task(&mut self, task: Task) {
        self.task = match task {
            Task::Pass(kind) => kind as u32,
            Task::Answer(verdict) => Self::ANSWER + verdict as u32,
        };
    }

    /// Whether that is to go on with a packet of this kind. One comparison, unlike [`TailCallArgs::task`].
    #[must_use]
    #[inline(always)]
    pub const fn is(&self, kind: FlowKind) -> bool {
        self.task == kind as u32
    }

    /// The verdict of [`Task::Answer`]; [`Verdict::Inconsistent`] if something else is to be done.
    #[must_use]
    #[inline(always)]
    pub const fn answer(&self) -> Verdict {
        Verdict::from_slot(self.task.wrapping_sub(Self::ANSWER))
    }
}

/// In [`TailCallArgs::chosen`]: the schedule decides.
pub const NOT_CHOSEN: u32 = u32::MAX;

/// Part of [`Scratch`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
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
    /// A question to the kernel's routing tables, and the answer.
    pub route: RouteQuery,
}

/// Part of [`Keys`]: `struct bpf_fib_lookup` of the kernel (`linux/bpf.h`). Addresses are in network order; one of IPv4 is
/// the first word.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct RouteQuery {
    /// `AF_INET` or `AF_INET6`.
    pub family: u8,
    /// [`super::TCP`] or [`super::UDP`].
    pub proto: u8,
    /// Source port: not asked about.
    pub sport: u16,
    /// Destination port: not asked about.
    pub dport: u16,
    /// In the answer, from Linux 5.12 on: the MTU of the way.
    pub mtu: u16,
    /// The interface that the packet has come in by, and in the answer that of the next hop.
    pub ifindex: u32,
    /// Flow label: not asked about.
    pub flow_info: u32,
    /// Source address.
    pub src: [u32; 4],
    /// Destination address, and in the answer that of the next hop.
    pub dst: [u32; 4],
    /// VLAN of the answer: not asked about.
    pub vlan: u32,
    /// In the answer: MAC address of the interface.
    pub src_mac: [u8; 6],
    /// In the answer: MAC address of the next hop.
    pub dst_mac: [u8; 6],
}
const _: () = assert!(size_of::<RouteQuery>() == 64);

impl RouteQuery {
    /// Forgets another question.
    #[inline(always)]
    pub fn clear(&mut self) {
        words::clear::<16>(zerocopy::transmute_mut!(self));
    }

    /// The next hop in the answer.
    #[must_use]
    #[inline(always)]
    pub const fn hop(&self) -> NextHop {
        let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (self.dst_mac, self.src_mac);
        let (first, second) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]));
        NextHop::from_mac_words(self.ifindex, [first, second, u32::from_ne_bytes([i, j, k, l])])
    }
}
