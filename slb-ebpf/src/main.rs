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
//! others. Wherever a packet ends, [`work`] counts its verdict: the single exit. `docs/architecture.md`
//! has the picture.

#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the `xdp` macro drops the documentation of what it wraps")]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod answer;
mod atomic;
mod choose;
mod direct;
mod error;
mod flows;
mod forward;
mod fragments;
mod full;
mod guard;
mod hops;
mod icmp;
mod maps;
mod reply;
mod rest;
mod stats;
mod tags;
mod tell;
mod tunnel;
mod work;

use aya_ebpf::{macros::xdp, programs::XdpContext};
use slb_common::{
    abi::{FLOW_DIRECT, ROLE_BACKEND, ROLE_VIP, STAGE_ICMP, STAGE_REST, Scratch},
    parse::{self, Family, Packet, Reject},
    verdict::Verdict,
};

use maps::Known;
use work::{Exit, Route, Sent, Work, go_on, leave, stage};

/// Every frame begins here.
#[xdp(frags)]
#[inline(always)]
pub fn slb(ctx: XdpContext) -> u32 {
    let bytes = work::frame(&ctx).len() as u64;
    let outcome = match parse::family(&work::frame(&ctx)) {
        Ok(Family::V4) => v4(&ctx),
        Ok(Family::V6) => v6(&ctx),
        Err(reject) => Err(rejected(reject)),
    };
    leave(&ctx, outcome, bytes)
}

/// Tagged frames, fragments, and frames in several buffers.
#[xdp(frags)]
pub fn slb_rest(ctx: XdpContext) -> u32 {
    stage(&ctx, |scratch| rest::prepare(&ctx, scratch))
}

/// To and from listeners with an access list or limits.
#[xdp(frags)]
pub fn slb_guard(ctx: XdpContext) -> u32 {
    go_on(&ctx, guard::admit)
}

/// What has been prepared, or admitted.
#[xdp(frags)]
pub fn slb_parsed(ctx: XdpContext) -> u32 {
    go_on(&ctx, rest::balance)
}

/// Fragments other than the first.
#[xdp(frags)]
pub fn slb_later(ctx: XdpContext) -> u32 {
    go_on(&ctx, fragments::follow)
}

/// ICMP of both families.
#[xdp(frags)]
pub fn slb_icmp(ctx: XdpContext) -> u32 {
    go_on(&ctx, icmp::message)
}

/// ICMP errors about flows of the other family.
#[xdp(frags)]
pub fn slb_error(ctx: XdpContext) -> u32 {
    go_on(&ctx, error::translate)
}

/// Flows that have no entry and may need one.
#[xdp(frags)]
pub fn slb_flow(ctx: XdpContext) -> u32 {
    go_on(&ctx, begin)
}

/// Flows whose backend more than a schedule chooses.
#[xdp(frags)]
pub fn slb_choose(ctx: XdpContext) -> u32 {
    go_on(&ctx, choose::choose)
}

/// SYNs into a tunnel, and what another program has prepared for one.
#[xdp(frags)]
pub fn slb_tunnel(ctx: XdpContext) -> u32 {
    go_on(&ctx, tunnel::enter)
}

/// Flows whose backend sees a source of ours, whatever family it is of.
#[xdp(frags)]
pub fn slb_full(ctx: XdpContext) -> u32 {
    go_on(&ctx, full::translate)
}

/// Flows whose backend is told who the client is.
#[xdp(frags)]
pub fn slb_tell(ctx: XdpContext) -> u32 {
    go_on(&ctx, tell::tell)
}

/// What the gateway answers itself.
#[xdp(frags)]
pub fn slb_answer(ctx: XdpContext) -> u32 {
    go_on(&ctx, answer::write)
}

/// IPv4: half of each address is constant, and the packet fits into registers. Nothing has to be waited for that
/// is in a register.
#[inline(always)]
fn v4(ctx: &XdpContext) -> Result<Sent, Exit> {
    let Scratch { packet: kept, handover, .. } = maps::scratch().ok_or(Verdict::Inconsistent)?;
    let mut packet = Packet::default();
    if let Err(reject) = parse::packet_of(&work::frame(ctx), Family::V4, &mut packet) {
        if matches!(reject, Reject::Icmp) {
            packet.copy_to(kept);
        }
        return Err(rejected(reject));
    }
    let mut work = Work::begin(ctx, &packet, Some(kept), handover);
    let outcome = balance(&mut work);
    if let Err(Exit::Stage(_)) = outcome {
        work.keep();
    }
    outcome
}

/// IPv6: the addresses alone would take all registers.
#[inline(always)]
fn v6(ctx: &XdpContext) -> Result<Sent, Exit> {
    let Scratch { packet, handover, .. } = maps::scratch().ok_or(Verdict::Inconsistent)?;
    parse::packet_of(&work::frame(ctx), Family::V6, packet).map_err(rejected)?;
    balance(&mut Work::begin(ctx, packet, None, handover))
}

#[inline(always)]
fn balance(work: &mut Work<'_>) -> Result<Sent, Exit> {
    let route = route::<false>(work)?;
    if tunnel::is_short(work, &route) { tunnel::pass(work, &route) } else { work.send(route) }
}

#[inline(always)]
fn begin(work: &mut Work<'_>) -> Result<Sent, Exit> {
    let route = if work.handover.what == FLOW_DIRECT.into() {
        direct::begin(work)
    } else {
        forward::begin(work)
    };
    match route {
        Ok(route) => fragments::lead(work, route),
        Err(exit) => Err(fragments::leave(work, exit)),
    }
}

/// What becomes of a frame that cannot be balanced as it is.
#[inline(always)]
fn rejected(reject: Reject) -> Exit {
    match reject {
        Reject::Icmp => Exit::Stage(STAGE_ICMP),
        Reject::Rest => Exit::Stage(STAGE_REST),
        Reject::To(dst, verdict) if maps::roles(&dst) & ROLE_VIP != 0 => verdict.into(),
        Reject::To(..) | Reject::NotIp => Verdict::NotOurs.into(),
    }
}

/// Where a packet goes. `REST`: it is one of [`rest`].
#[inline(always)]
fn route<const REST: bool>(work: &mut Work<'_>) -> Result<Route, Exit> {
    let Known { from, to, direct_until } = maps::filter(&work.packet.key.src, &work.packet.key.dst);
    let mut route = None;
    // One for all look-ups: stack is scarce.
    let mut at = work.packet.key.destination();
    if to & ROLE_VIP != 0 {
        route = forward::to_vip::<REST>(work, &at, from, direct_until)?;
    }
    if route.is_none() && from & ROLE_BACKEND != 0 {
        at = work.packet.key.source();
        route = reply::from_backend::<REST>(work, &at, direct_until)?;
    }
    if route.is_none() && to & ROLE_BACKEND != 0 {
        at = work.packet.key.destination();
        route = direct::to_backend::<REST>(work, &at)?;
    }
    Ok(route.ok_or(Verdict::NotOurs)?)
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
