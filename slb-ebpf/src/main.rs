//! The packet path: one XDP program on every interface of the gateway, and those behind it.
//!
//! ```text
//! slb     parse ─┬─ to a VIP ──────► forward ─┐
//!                ├─ from a backend ► reply ───┼─► rewrite ─► count ─► out
//!                └─ to a backend ──► direct ──┘
//!           │                          │
//!           ├► slb_icmp  echo, errors  ├► slb_flow    a flow that needs an entry
//!           │  └► slb_error            │  └ slb_choose before it, if more than a schedule chooses
//!           ├► slb_rest  tagged,       ├► slb_tunnel  a tunnel: SYNs
//!           │  │ fragments, large      ├► slb_full    full NAT, hairpin, NAT64 and NAT46
//!           │  └► slb_later            │  └► slb_tell the backend learns who the client is
//!           └► slb_guard access lists, └► slb_answer  resets, ICMP errors
//!              │ limits
//!              └► slb_parsed: as slb, once more
//! ```
//!
//! Nearly all packets begin and end in [`slb`]. What costs more code than it is worth there is left to
//! another program by a tail call: that has the stack to itself, and nothing of it is in the way of the
//! others. Wherever a packet ends, [`exit`] counts its verdict: the only place. `docs/architecture.md`
//! has the picture.

#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the `xdp` macro drops the documentation of what it wraps")]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod answer;
mod atomic;
mod choose;
mod conntrack;
mod ctx;
mod direct;
mod error;
mod exit;
mod forward;
mod fragments;
mod full;
mod guard;
mod hops;
mod icmp;
mod maps;
mod outcome;
mod reply;
mod rest;
mod route;
mod stats;
mod tags;
mod tell;
mod tunnel;

use aya_ebpf::{macros::xdp, programs::XdpContext};
use slb_common::{
    abi::Scratch,
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
    let outcome = match parse::family(&ctx::frame(&ctx)) {
        Ok(Family::V4) => v4(&ctx),
        Ok(Family::V6) => v6(&ctx),
        Err(reject) => route::rejected(reject),
    };
    exit::finish(&ctx, outcome, bytes)
}

macro_rules! entry_points {
    ($($name:ident = $slot:literal, $symbol:ident;)+) => {$(
        #[xdp(frags)]
        pub fn $symbol(ctx: XdpContext) -> u32 {
            exit::run_program(&ctx, |scratch| parts::$symbol(&ctx, scratch))
        }
    )+};
}
slb_common::for_each_program!(entry_points);

/// What each program does with the packet that it was handed, by the symbol of the program.
mod parts {
    use super::{Outcome, PacketCtx, Scratch, XdpContext};

    macro_rules! parts {
        ($($symbol:ident = $part:path;)+) => {$(
            #[inline(always)]
            pub fn $symbol(ctx: &XdpContext, scratch: &mut Scratch) -> Outcome {
                $part(&mut PacketCtx::resume(ctx, scratch))
            }
        )+};
    }

    pub use crate::rest::prepare as slb_rest;
    parts! {
        slb_icmp = crate::icmp::message;
        slb_parsed = crate::route::parsed;
        slb_later = crate::fragments::follow;
        slb_flow = crate::route::flow;
        slb_tunnel = crate::tunnel::enter;
        slb_answer = crate::answer::write;
        slb_full = crate::full::translate;
        slb_tell = crate::tell::tell;
        slb_error = crate::error::translate;
        slb_guard = crate::guard::admit;
        slb_choose = crate::choose::choose;
        slb_icmp_client = crate::icmp::for_client;
    }
}

/// IPv4: half of each address is constant, and the packet fits into registers. Nothing has to be waited for that
/// is in a register.
#[inline(always)]
fn v4(ctx: &XdpContext) -> Outcome {
    let Scratch { packet: kept, handover, .. } = maps::scratch().ok_or(Verdict::Inconsistent)?;
    let mut packet = Packet::default();
    if let Err(reject) = parse::packet_of(&ctx::frame(ctx), Family::V4, &mut packet) {
        if matches!(reject, Reject::Icmp) {
            packet.copy_to(kept);
        }
        return route::rejected(reject);
    }
    let mut work = PacketCtx::begin(ctx, &packet, Some(kept), handover);
    let outcome = route::first(&mut work);
    if let Ok(Next::TailCall(_)) = outcome {
        work.keep();
    }
    outcome
}

/// IPv6: the addresses alone would take all registers.
#[inline(always)]
fn v6(ctx: &XdpContext) -> Outcome {
    let Scratch { packet, handover, .. } = maps::scratch().ok_or(Verdict::Inconsistent)?;
    if let Err(reject) = parse::packet_of(&ctx::frame(ctx), Family::V6, packet) {
        return route::rejected(reject);
    }
    route::first(&mut PacketCtx::begin(ctx, packet, None, handover))
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
