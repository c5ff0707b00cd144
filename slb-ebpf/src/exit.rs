//! The only place where packets end, and where they pass from one program to another.
//!
//! Each frame that enters the first program is counted once, under one verdict, by [`exit`].

use aya_ebpf::{bindings::xdp_action, programs::XdpContext};
use slb_common::{
    abi::TailCallArgs,
    packet::Packet,
    programs::Program,
    verdict::{Action, Verdict},
};

use crate::{
    kernel, maps,
    outcome::{Egress, Next, Outcome},
    stats, vlan,
};

/// The end of the first program. `bytes` is the frame's length.
#[inline(always)]
pub fn finish(ctx: &XdpContext, outcome: Outcome, bytes: u64) -> u32 {
    let (verdict, egress) = match outcome {
        Ok(Next::Send { verdict, egress }) => (verdict, egress),
        Err(verdict) => (verdict, 0),
        Ok(Next::TailCall(program)) => {
            if let Some((_, args)) = maps::handed_over() {
                (args.bytes, args.tags) = (bytes, [0; 2]);
            }
            tail_call(ctx, program);
            (Verdict::Inconsistent, 0)
        }
    };
    exit(ctx, verdict, egress, bytes)
}

/// A program behind the first: does its part with the packet that it was handed, and ends.
#[inline(always)]
pub fn run_program(
    ctx: &XdpContext,
    part: impl FnOnce(&mut Packet, &mut TailCallArgs) -> Outcome,
) -> u32 {
    let Some((packet, args)) = maps::handed_over() else { return xdp_action::XDP_ABORTED };
    let (mut verdict, egress) = match part(packet, args) {
        Ok(Next::Send { verdict, egress }) => (verdict, egress),
        Err(verdict) => (verdict, 0),
        Ok(Next::TailCall(program)) => {
            tail_call(ctx, program);
            (Verdict::Inconsistent, 0)
        }
    };
    if !matches!(verdict.action(), Action::Drop) && vlan::put(ctx, args.tags).is_none() {
        verdict = Verdict::Inconsistent;
    }
    exit(ctx, verdict, egress, args.bytes)
}

macro_rules! tail_calls {
    ($($name:ident = $slot:literal, $symbol:ident;)+) => {
        /// Passes the packet on. Returns only if the agent has not put the program into its slot.
        ///
        /// Each slot is a constant that the kernel knows when it translates the program: such a tail call is a
        /// jump. Others are a look-up and an indirect jump with its guards, which takes 25 ns more.
        #[inline(always)]
        fn tail_call(ctx: &XdpContext, program: Program) {
            match program {
                $(Program::$name => jump::<$slot>(ctx),)+
            }
        }
    };
}
slb_common::for_each_program!(tail_calls);

#[inline(always)]
fn jump<const SLOT: u32>(ctx: &XdpContext) {
    // SAFETY: nothing here is needed afterwards.
    unsafe {
        maps::SLB_PROGRAMS.tail_call(ctx, SLOT);
        // Keeps the compiler from making one call of several.
        #[cfg(target_arch = "bpf")]
        core::arch::asm!("");
    }
}

/// Counts the frame, and tells the driver what to do with it.
#[inline(always)]
fn exit(ctx: &XdpContext, verdict: Verdict, egress: Egress, bytes: u64) -> u32 {
    stats::count(verdict, bytes);
    #[cfg(feature = "trace")]
    aya_log_ebpf::info!(ctx, "{} bytes: {}", bytes, verdict.label());
    if egress != 0 {
        return transmit(ctx, egress);
    }
    match verdict.action() {
        Action::Drop => xdp_action::XDP_DROP,
        Action::Pass | Action::Transmit => xdp_action::XDP_PASS,
    }
}

/// Sends the frame out of an interface.
///
/// Back the way it came `XDP_TX` is faster. But a veth whose peer has no XDP program keeps such frames
/// until something else is sent, and stops for good when it has enough of them.
#[inline(always)]
fn transmit(ctx: &XdpContext, ifindex: u32) -> u32 {
    if ifindex == kernel::ingress(ctx) && maps::settings().veth() == 0 {
        return xdp_action::XDP_TX;
    }
    kernel::redirect(ifindex)
}
