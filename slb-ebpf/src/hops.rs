//! The way out: next hops, and the redirect.

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_BLACKHOLE, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_PROHIBIT, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LKUP_RET_UNREACHABLE,
        bpf_fib_lookup as FibLookup, xdp_action,
    },
    helpers::{bpf_fib_lookup, bpf_redirect},
    programs::XdpContext,
};
use slb_common::{
    abi::{Flow, Hop},
    verdict::Verdict,
};

use crate::{Work, maps};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Sends the frame out of an interface.
#[inline(always)]
pub fn transmit(ctx: &XdpContext, ifindex: u32) -> u32 {
    if ifindex == ctx.ingress_ifindex() as u32 {
        return xdp_action::XDP_TX;
    }
    // SAFETY: touches no memory of ours.
    unsafe { bpf_redirect(ifindex, 0) as u32 }
}

/// How the frame came: the way back to its sender, if that is where the route leads as well.
#[inline(always)]
pub fn back(work: &Work<'_>) -> Hop {
    let Some(eth) = work.frame.header::<12>(0) else { return Hop::KERNEL };
    // The sender's address comes second in a frame, and first in the answer.
    let (to_us, from): ([u16; 3], [u16; 3]) =
        ([eth.get(0), eth.get(2), eth.get(4)], [eth.get(6), eth.get(8), eth.get(10)]);
    let ([a, b, c], [d, e, f]) = (from, to_us);
    Hop::from_mac_words(work.ctx.ingress_ifindex() as u32, [pair(a, b), pair(c, d), pair(e, f)])
}

/// Two words that stand side by side in a frame, as one.
#[inline(always)]
const fn pair(first: u16, second: u16) -> u32 {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// Counts the changes of the kernel's routes and neighbours.
#[inline(always)]
pub fn route_epoch() -> u32 {
    maps::SLB_SETTINGS.get(0).map_or(0, |settings| settings.route_epoch)
}

/// The way to the client of a flow, looked up in the kernel's tables once per [`route_epoch`].
#[inline(always)]
pub fn to_client(work: &Work<'_>, flow: &mut Flow) -> Result<Hop, Verdict> {
    let epoch = route_epoch();
    if flow.epoch != epoch
        && let Some(verdict) = look_up(work, flow, epoch)
    {
        return Err(verdict);
    }
    Ok(flow.hop)
}

/// Asks the kernel for the way from the VIP to the client, and writes it to the flow. Only an answer
/// is good for the epoch; what is a makeshift is asked for again with the next reply.
#[inline(never)]
fn look_up(work: &Work<'_>, flow: &mut Flow, epoch: u32) -> Option<Verdict> {
    // SAFETY: integers and unions of integers only.
    let mut query: FibLookup = unsafe { core::mem::zeroed() };
    query.ifindex = work.ctx.ingress_ifindex() as u32;
    query.l4_protocol = work.packet.key.proto as u8;
    let src = flow.addr.words();
    let dst = work.packet.key.dst.words();
    if work.packet.is_v4 {
        query.family = AF_INET;
        query.__bindgen_anon_3.ipv4_src = src[3];
        query.__bindgen_anon_4.ipv4_dst = dst[3];
    } else {
        query.family = AF_INET6;
        query.__bindgen_anon_3.ipv6_src = src;
        query.__bindgen_anon_4.ipv6_dst = dst;
    }
    // SAFETY: the context is the kernel's, and the query is as long as it says.
    let answer = unsafe {
        bpf_fib_lookup(
            work.ctx.ctx.cast(),
            core::ptr::from_mut(&mut query).cast(),
            size_of::<FibLookup>() as i32,
            0,
        )
    } as u32;
    match answer {
        BPF_FIB_LKUP_RET_SUCCESS if can_redirect(query.ifindex) => {
            flow.hop = Hop { ifindex: query.ifindex, dst_mac: query.dmac, src_mac: query.smac };
            flow.epoch = epoch;
        }
        BPF_FIB_LKUP_RET_BLACKHOLE | BPF_FIB_LKUP_RET_UNREACHABLE | BPF_FIB_LKUP_RET_PROHIBIT => {
            return Some(Verdict::NoRoute);
        }
        // The neighbour is one that the kernel has not needed yet: the client's last packet came
        // from it, or the kernel knew it a moment ago.
        BPF_FIB_LKUP_RET_NO_NEIGH if query.ifindex == flow.hop.ifindex => {}
        // A gateway that does not forward for anybody else can still answer its clients.
        BPF_FIB_LKUP_RET_FWD_DISABLED => {}
        _ => flow.hop = Hop::KERNEL,
    }
    None
}

#[inline(always)]
fn can_redirect(ifindex: u32) -> bool {
    // SAFETY: copied out at once.
    unsafe { maps::SLB_INTERFACES.get(ifindex) }.is_some_and(|interface| interface.redirect != 0)
}
