//! The packet path: one XDP program on every interface of the gateway, and those behind it.
//!
//! ```text
//! slb     parse ─┬─ to a VIP ──────► forward ─┐
//!                ├─ from a backend ► reply ───┼─► rewrite ─► count ─► out
//!                └─ to a backend ──► bypass ──┘
//!           │
//!           ├► slb_icmp       echo, errors to backends
//!           │  ├► slb_icmp_client  errors to clients
//!           │  └► slb_icmp_nat64   errors into the other family
//!           ├► slb_slow_path  tagged, fragments, large
//!           │  └► slb_fragment     fragments other than the first
//!           ├► slb_policy     access lists, limits
//!           │  └► slb_reentry      as slb, once more
//!           ├► slb_scheduler  a backend is chosen by more than the schedule
//!           ├► slb_flow       a flow that needs an entry
//!           ├► slb_tunnel     a tunnel: SYNs
//!           ├► slb_full_nat   full NAT, hairpin, NAT64 and NAT46
//!           │  └► slb_proxy        the backend is told the client's address
//!           └► slb_respond    resets, ICMP errors
//! ```
//!
//! Nearly all packets begin and end in [`slb`]. What costs more code than it is worth there is left to
//! another program by a tail call: that has the stack to itself, and nothing of it is in the way of the
//! others. Wherever a packet ends, [`exit`] counts its verdict: the only place. `docs/architecture.md`
//! has the picture.

#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the `xdp` macro drops the documentation of what it wraps")]
#![allow(unreachable_pub, reason = "no other crate can use the items of a program")]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod bypass;
mod cell;
mod conntrack;
mod ctx;
mod exit;
mod forward;
mod fragments;
mod full_nat;
mod global;
mod icmp;
mod icmp_nat64;
mod ingress;
mod kernel;
mod lookups;
mod maps;
mod neigh;
mod outcome;
mod policy;
mod proxy_protocol;
mod reply;
mod respond;
mod route;
mod scheduler;
mod shared;
mod slow_path;
mod stats;
mod tunnel;
mod vlan;

use aya_ebpf::{macros::xdp, programs::XdpContext};
use slb_common::{
    parse::{self, Family, Packet, Reject},
    verdict::Verdict,
};

use ctx::PacketCtx;
use outcome::{Next, Outcome};

/// Every frame begins here.
#[xdp(frags)]
#[inline(always)]
pub fn slb(ctx: XdpContext) -> u32 {
    let bytes = ctx::frame(&ctx).len() as u64;
    let outcome = if ingress::is_to_us(&ctx, &ctx::frame(&ctx)) {
        match parse::family(&ctx::frame(&ctx)) {
            Ok(Family::V4) => v4(&ctx),
            Ok(Family::V6) => v6(&ctx),
            Err(reject) => route::rejected(reject),
        }
    } else {
        Err(Verdict::NotOurs)
    };
    exit::finish(&ctx, outcome, bytes)
}

macro_rules! entry_points {
    ($($name:ident = $slot:literal, $symbol:ident;)+) => {$(
        #[xdp(frags)]
        pub fn $symbol(ctx: XdpContext) -> u32 {
            exit::run_program(&ctx, |packet, args| parts::$symbol(&ctx, packet, args))
        }
    )+};
}
slb_common::for_each_program!(entry_points);

/// What each program does with the packet that it was handed, by the symbol of the program.
mod parts {
    use slb_common::abi::TailCallArgs;

    use super::{Outcome, Packet, PacketCtx, XdpContext};

    macro_rules! parts {
        ($($symbol:ident = $part:path;)+) => {$(
            #[inline(always)]
            pub fn $symbol(
                ctx: &XdpContext,
                packet: &mut Packet,
                args: &mut TailCallArgs,
            ) -> Outcome {
                $part(&mut PacketCtx::resume(ctx, packet, args))
            }
        )+};
    }

    pub use crate::slow_path::prepare as slb_slow_path;
    parts! {
        slb_icmp = crate::icmp::message;
        slb_reentry = crate::route::parsed;
        slb_fragment = crate::fragments::follow;
        slb_flow = crate::route::flow;
        slb_tunnel = crate::tunnel::enter;
        slb_respond = crate::respond::write;
        slb_full_nat = crate::full_nat::translate;
        slb_proxy = crate::proxy_protocol::tell;
        slb_icmp_nat64 = crate::icmp_nat64::translate;
        slb_policy = crate::policy::admit;
        slb_scheduler = crate::scheduler::choose;
        slb_icmp_client = crate::icmp::for_client;
    }
}

/// IPv4: half of each address is constant, and the packet fits into registers. Nothing has to be waited for that
/// is in a register.
#[inline(always)]
fn v4(ctx: &XdpContext) -> Outcome {
    let (kept, args) = maps::handed_over().ok_or(Verdict::Inconsistent)?;
    let mut packet = Packet::default();
    if let Err(reject) = parse::packet_of(&ctx::frame(ctx), Family::V4, &mut packet) {
        if matches!(reject, Reject::Icmp) {
            packet.copy_to(kept);
        }
        return route::rejected(reject);
    }
    let mut pkt = PacketCtx::begin(ctx, &packet, Some(kept), args);
    let outcome = route::first(&mut pkt);
    if let Ok(Next::TailCall(_)) = outcome {
        pkt.keep();
    }
    outcome
}

/// IPv6: the addresses alone would take all registers.
#[inline(always)]
fn v6(ctx: &XdpContext) -> Outcome {
    let (packet, args) = maps::handed_over().ok_or(Verdict::Inconsistent)?;
    if let Err(reject) = parse::packet_of(&ctx::frame(ctx), Family::V6, packet) {
        return route::rejected(reject);
    }
    route::first(&mut PacketCtx::begin(ctx, packet, None, args))
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel lets only programs under a GPL-compatible licence call some helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
