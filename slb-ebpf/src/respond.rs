//! What the gateway answers itself.
//!
//! No answer is sent more often than what it answers, and none but that to a large packet is much
//! longer, so it is no amplifier. ICMP errors are few per jiffy all the same (RFC 4443, section 2.4 (f)).

use aya_ebpf::helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail};
use slb_common::{
    abi::{ERRORS_PER_JIFFY, TCP},
    decide,
    icmp_error::{self, HEAD_V4, HEAD_V6, Problem},
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
pub fn write(pkt: &mut PacketCtx<'_>) -> Outcome {
    let back = pkt.ctx.ingress_ifindex() as u32;
    let what = Verdict::from_slot(pkt.args.what);
    let written = match what {
        Verdict::Reset | Verdict::Closed => reset(pkt),
        Verdict::Refused if pkt.packet.key.proto == TCP => reset(pkt),
        Verdict::Refused => error(pkt, true),
        Verdict::TooBig => error(pkt, false),
        _ => None,
    };
    match written {
        Some(()) => Ok(Next::Send { verdict: what, egress: back }),
        None => Err(decide::unanswered(what)),
    }
}

#[inline(always)]
fn reset(pkt: &mut PacketCtx<'_>) -> Option<()> {
    if !decide::can_be_reset(pkt.packet) {
        return None;
    }
    let before = pkt.bytes_left();
    let after = reset::write(&mut pkt.frame, pkt.packet)?;
    // SAFETY: the context is the kernel's; nothing of the frame is touched afterwards.
    let cut = unsafe { bpf_xdp_adjust_tail(pkt.ctx.ctx, after as i32 - before as i32) };
    (cut == 0).then_some(())
}

#[inline(always)]
fn error(pkt: &PacketCtx<'_>, is_port: bool) -> Option<()> {
    if !may_complain(pkt.now) {
        return None;
    }
    let is_v4 = pkt.packet.is_v4();
    let (cut, head) = (icmp_error::quoted_len(pkt.packet), if is_v4 { HEAD_V4 } else { HEAD_V6 });
    let mtu = pkt.args.mtu as u16;
    // SAFETY: the context is the kernel's; the frame is asked for afterwards.
    let resized = unsafe {
        bpf_xdp_adjust_tail(pkt.ctx.ctx, cut as i32 - pkt.bytes_left() as i32) == 0
            && bpf_xdp_adjust_head(pkt.ctx.ctx, -(head as i32)) == 0
    };
    if !resized {
        return None;
    }
    let mut frame = ctx::frame(pkt.ctx);
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
