//! The packet path: one XDP program on every interface of the gateway.
//!
//! ```text
//! parse ─┬─ to a VIP ──────► forward ─┐
//!        ├─ from a backend ► reply ───┼─► rewrite ─► count ─► out
//!        └─ to a backend ──► direct ──┘
//! ```
//!
//! Every stage returns the [`Verdict`] of the packets that end there, and [`slb`] counts it: the
//! single exit. `docs/architecture.md` has the picture.

#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the `xdp` macro drops the documentation of what it wraps")]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod answer;
mod atomic;
mod direct;
mod flows;
mod forward;
mod hops;
mod maps;
mod reply;
mod stats;

use aya_ebpf::{bindings::xdp_action, macros::xdp, programs::XdpContext};
use slb_common::{
    abi::{Hop, MODE_DSR, ROLE_BACKEND, ROLE_VIP, Translation},
    frame::Frame,
    parse::{self, Packet, Reject},
    rewrite,
    verdict::{Action, Verdict},
};

/// A frame on its way through the stages.
struct Work<'a> {
    ctx: &'a XdpContext,
    frame: Frame<'a>,
    packet: &'a mut Packet,
    /// Low half of the jiffies.
    now: u32,
}

/// What a stage makes of its packets.
struct Route {
    to: Translation,
    hop: Hop,
    /// [`slb_common::abi::MODE_NAT`] or another.
    mode: u32,
}

/// The single entry and the single exit.
#[xdp]
pub fn slb(ctx: XdpContext) -> u32 {
    // SAFETY: the kernel vouches for `data..data_end` while the program runs.
    let frame = unsafe { Frame::from_raw(ctx.data() as *mut u8, ctx.data_end() as *mut u8) };
    let bytes = frame.len() as u64;
    let (verdict, ifindex) = match balance(&ctx, frame) {
        Ok(sent) => sent,
        Err(Verdict::NoFlow) => (answer::reset(&ctx), ctx.ingress_ifindex() as u32),
        Err(verdict) => (verdict, 0),
    };
    stats::count(verdict, bytes);
    #[cfg(feature = "trace")]
    aya_log_ebpf::info!(&ctx, "{} bytes: {}", bytes, verdict.label());
    match verdict.action() {
        Action::Pass => xdp_action::XDP_PASS,
        Action::Drop => xdp_action::XDP_DROP,
        Action::Transmit => hops::transmit(&ctx, ifindex),
    }
}

/// The stages. Gives the verdict on a packet that was translated, and the interface that it leaves
/// through; an `Err` is the verdict on any other.
#[inline(always)]
fn balance(ctx: &XdpContext, frame: Frame<'_>) -> Result<(Verdict, u32), Verdict> {
    let packet = maps::packet().ok_or(Verdict::Inconsistent)?;
    let mut work = Work { ctx, frame, packet, now: flows::now() };
    match parse::packet(&work.frame, work.packet) {
        Ok(()) => {}
        Err(Reject::To(dst, verdict)) if maps::roles(&dst) & ROLE_VIP != 0 => return Err(verdict),
        Err(_) => return Err(Verdict::NotOurs),
    }
    let (from, to) = maps::filter(&work.packet.key.src, &work.packet.key.dst);
    let mut route = None;
    // One for all look-ups: stack is scarce.
    let mut at = work.packet.key.destination();
    if to & ROLE_VIP != 0 {
        route = forward::to_vip(&work, &at, from)?;
    }
    if route.is_none() && from & ROLE_BACKEND != 0 {
        at = work.packet.key.source();
        route = reply::from_backend(&work, &at)?;
    }
    if route.is_none() && to & ROLE_BACKEND != 0 {
        at = work.packet.key.destination();
        route = direct::to_backend(&work, &at)?;
    }
    let Route { to, hop, mode } = route.ok_or(Verdict::NotOurs)?;
    if mode == MODE_DSR {
        rewrite::pass_on(&mut work.frame, work.packet, hop)?;
        return Ok((Verdict::Forwarded, hop.ifindex));
    }
    rewrite::translate(&mut work.frame, work.packet, &to, hop)?;
    let verdict = match (to.is_reply(), hop.is_known()) {
        (false, true) => Verdict::Forwarded,
        (true, true) => Verdict::Replied,
        (false, false) => Verdict::ForwardedByKernel,
        (true, false) => Verdict::RepliedByKernel,
    };
    Ok((verdict, hop.ifindex))
}

impl Work<'_> {
    /// Whether the packet may not be sent any further. The kernel sees for itself.
    #[inline(always)]
    fn expires(&self, hop: Hop) -> bool {
        hop.is_known() && rewrite::expires(&self.frame, self.packet)
    }
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
