//! The packet path: one XDP program on every interface of the gateway.
//!
//! ```text
//! parse ─► flows::find ───────────────────────────────────────────────┬─► known ─► rewrite ─► count ─► out
//!            └─ no ─► unknown ─┬─ to a VIP: choose ─────┬─► flows::create ─┘
//!                              └─ to a backend: direct ─┘
//! ```
//!
//! Every stage returns the [`Verdict`] of the packets that end there, and [`slb`] counts it: the
//! single exit. `docs/architecture.md` has the picture.

#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the `xdp` macro drops the documentation of what it wraps")]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod choose;
mod direct;
mod flows;
mod hops;
mod maps;
mod stats;

use aya_ebpf::{bindings::xdp_action, macros::xdp, programs::XdpContext};
use slb_common::{
    abi::{
        BACKEND_USABLE, FLOW_DIRECT, FLOW_FORWARD, FLOW_REPLY, Flow, Hop, ROLE_BACKEND, ROLE_VIP,
        Roles, Translation, UDP,
    },
    frame::Frame,
    parse::{self, Packet, Reject},
    rewrite,
    verdict::{Action, Verdict},
};

/// A frame on its way through the stages.
struct Work<'a> {
    ctx: &'a XdpContext,
    frame: Frame<'a>,
    packet: Packet,
    /// Low half of the jiffies.
    now: u32,
}

/// The single entry and the single exit.
#[xdp]
pub fn slb(ctx: XdpContext) -> u32 {
    // SAFETY: the kernel vouches for `data..data_end` while the program runs.
    let frame = unsafe { Frame::from_raw(ctx.data() as *mut u8, ctx.data_end() as *mut u8) };
    let bytes = frame.len() as u64;
    let (verdict, ifindex) = match balance(&ctx, frame) {
        Ok(sent) => sent,
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
    let packet = match parse::packet(&frame) {
        Ok(packet) => packet,
        Err(Reject::To(dst, verdict)) if role(&dst) & ROLE_VIP != 0 => return Err(verdict),
        Err(_) => return Err(Verdict::NotOurs),
    };
    let mut work = Work { ctx, frame, packet, now: flows::now() };
    let mut found = flows::find(&work.packet.key);
    let begins_anew = found.as_ref().is_some_and(|flow| starts_anew(&work, flow));
    if found.is_none() || begins_anew {
        if let Some(verdict) = unknown(&work, begins_anew) {
            return Err(verdict);
        }
        found = flows::find(&work.packet.key);
    }
    let flow = found.ok_or(Verdict::TableFull)?;
    let (to, hop) = known(&work, flow)?;
    rewrite::translate(&mut work.frame, &work.packet, &to, hop)?;
    let verdict = match (to.is_reply(), hop.is_known()) {
        (false, true) => Verdict::Forwarded,
        (true, true) => Verdict::Replied,
        (false, false) => Verdict::ForwardedByKernel,
        (true, false) => Verdict::RepliedByKernel,
    };
    Ok((verdict, hop.ifindex))
}

/// Whether a packet begins a flow anew although an entry for its tuple is there.
///
/// A backend that is not usable keeps its connections, but a SYN is no connection yet and UDP has
/// none: both are better off elsewhere.
#[inline(always)]
fn starts_anew(work: &Work<'_>, flow: &Flow) -> bool {
    let is_syn = work.packet.is_syn();
    if flow.kind != FLOW_FORWARD || !(is_syn || work.packet.key.proto == UDP) {
        return false;
    }
    let backend = maps::backend(flow.backend).copied().unwrap_or_default();
    backend.flags & BACKEND_USABLE == 0
        || flows::is_idle(work.now, &work.packet.key, flow, backend.idle_jiffies)
        || (is_syn && flows::has_ended(&work.packet.key, flow))
}

/// A packet of a known flow: how it is translated, and where it is sent to.
#[inline(always)]
fn known(work: &Work<'_>, flow: &mut Flow) -> Result<(Translation, Hop), Verdict> {
    flows::note(work, flow);
    let hop = match flow.kind {
        FLOW_FORWARD => maps::backend(flow.backend).ok_or(Verdict::Inconsistent)?.hop,
        FLOW_REPLY => hops::to_client(work, flow)?,
        _ => return Err(Verdict::Direct),
    };
    if expires(work, hop) {
        return Err(Verdict::TtlExpired);
    }
    let to = flow.translation();
    let bytes = work.frame.len() as u64;
    if to.is_reply() {
        stats::reply(flow.backend, bytes);
    } else {
        stats::forward(flow.backend, bytes);
    }
    Ok((to, hop))
}

/// A packet that begins a flow, or of none: makes it a known one, or gives its verdict.
///
/// Has a stack frame of its own, off the way of known flows, and returns one register: a larger
/// result would leave a pointer to the caller's stack in r0, which the verifier refuses.
#[inline(never)]
fn unknown(work: &Work<'_>, begins_anew: bool) -> Option<Verdict> {
    begin(work, begins_anew).err()
}

#[inline(always)]
fn begin(work: &Work<'_>, begins_anew: bool) -> Result<(), Verdict> {
    let roles = role(&work.packet.key.dst);
    let is_balanced = roles & ROLE_VIP != 0;
    let id = if is_balanced {
        choose::backend(work)?
    } else if roles & ROLE_BACKEND != 0 {
        direct::beginning(work)?
    } else {
        return Err(Verdict::NotOurs);
    };
    let backend = maps::backend(id).ok_or(Verdict::Inconsistent)?;
    if is_balanced && expires(work, backend.hop) {
        return Err(Verdict::TtlExpired);
    }
    if begins_anew {
        // Not before there is another backend: until then the old flow goes on.
        flows::forget(&work.packet.key);
    }
    let kind = if is_balanced { FLOW_REPLY } else { FLOW_DIRECT };
    flows::create(work, id, backend, kind)?;
    if is_balanced {
        stats::new_flow(id);
    }
    Ok(())
}

/// Whether a packet may not be sent any further. The kernel sees for itself.
#[inline(always)]
fn expires(work: &Work<'_>, hop: Hop) -> bool {
    hop.is_known() && rewrite::expires(&work.frame, &work.packet)
}

/// What an address is to us.
#[inline(always)]
fn role(addr: &slb_common::abi::Address) -> u32 {
    // SAFETY: copied out at once.
    unsafe { maps::SLB_ADDRESSES.get(addr) }.copied().unwrap_or(Roles { roles: 0 }).roles
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
