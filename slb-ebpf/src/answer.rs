//! What the gateway answers itself.
//!
//! No answer is sent more often than what it answers, and none but that to a large packet is much
//! longer, so it is no amplifier. ICMP errors are few per jiffy all the same (RFC 4443, section 2.4 (f)).

use aya_ebpf::helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail};
use slb_common::{
    abi::{ERRORS_PER_JIFFY, TCP},
    icmp_error::{self, HEAD_V4, HEAD_V6, Problem},
    parse::FRAGMENT_NONE,
    reset,
    verdict::Verdict,
};

use crate::{
    ctx::{self, PacketCtx},
    maps,
    outcome::{Next, Outcome},
};

/// Makes the packet into the answer that another program has asked for.
#[inline(always)]
pub fn write(work: &mut PacketCtx<'_>) -> Outcome {
    let back = work.ctx.ingress_ifindex() as u32;
    let what = Verdict::from_slot(work.handover.what);
    let (written, otherwise) = match what {
        Verdict::Reset => (reset(work), Verdict::NoFlow),
        Verdict::Closed => (reset(work), Verdict::ClosedDropped),
        Verdict::Refused if work.packet.key.proto == TCP => {
            (reset(work), Verdict::NoListenerDropped)
        }
        Verdict::Refused => (error(work, true), Verdict::NoListenerDropped),
        Verdict::TooBig => (error(work, false), Verdict::Oversize),
        _ => (None, Verdict::Inconsistent),
    };
    match written {
        Some(()) => Ok(Next::Send { verdict: what, egress: back }),
        None => Err(otherwise),
    }
}

#[inline(always)]
fn reset(work: &mut PacketCtx<'_>) -> Option<()> {
    if work.packet.fragment != FRAGMENT_NONE {
        return None;
    }
    let before = work.bytes_left();
    let after = reset::write(&mut work.frame, work.packet)?;
    // SAFETY: the context is the kernel's; nothing of the frame is touched afterwards.
    let cut = unsafe { bpf_xdp_adjust_tail(work.ctx.ctx, after as i32 - before as i32) };
    (cut == 0).then_some(())
}

#[inline(always)]
fn error(work: &PacketCtx<'_>, is_port: bool) -> Option<()> {
    if !may_complain(work.now) {
        return None;
    }
    let is_v4 = work.packet.is_v4();
    let (cut, head) = (icmp_error::quoted_len(work.packet), if is_v4 { HEAD_V4 } else { HEAD_V6 });
    let mtu = work.handover.mtu as u16;
    // SAFETY: the context is the kernel's; the frame is asked for afterwards.
    let resized = unsafe {
        bpf_xdp_adjust_tail(work.ctx.ctx, cut as i32 - work.bytes_left() as i32) == 0
            && bpf_xdp_adjust_head(work.ctx.ctx, -(head as i32)) == 0
    };
    if !resized {
        return None;
    }
    let mut frame = ctx::frame(work.ctx);
    let problem = if is_port { Problem::PortUnreachable } else { Problem::TooBig(mtu) };
    icmp_error::write(&mut frame, is_v4, problem)
}

/// Whether this CPU has not sent its share of errors in this jiffy.
#[inline(always)]
fn may_complain(now: u32) -> bool {
    let Some(scratch) = maps::scratch() else { return false };
    if scratch.errors_at != now {
        (scratch.errors_at, scratch.errors) = (now, 0);
    }
    scratch.errors = scratch.errors.wrapping_add(1);
    scratch.errors <= ERRORS_PER_JIFFY
}
