//! What the gateway answers itself.
//!
//! No answer is sent more often than what it answers, and none but that to a large packet is much
//! longer, so it is no amplifier. ICMP errors are few per jiffy all the same (RFC 4443, section 2.4 (f)).

use slb_common::{
    abi::{ERRORS_PER_JIFFY, TCP},
    decide,
    icmp_error::{self, HEAD_V4, HEAD_V6, Problem},
    reset,
    verdict::Verdict,
};

use crate::{
    ctx::PacketCtx,
    kernel, maps,
    outcome::{Next, Outcome},
};

/// Makes the packet into the answer that another program has asked for.
#[inline(always)]
pub fn write(pkt: &mut PacketCtx<'_>) -> Outcome {
    let back = kernel::ingress(pkt.ctx);
    let asked = pkt.args.answer();
    let written = match asked {
        Verdict::Reset | Verdict::Closed => reset(pkt),
        Verdict::Refused if pkt.packet.key.proto == TCP => reset(pkt),
        Verdict::Refused => error(pkt, true),
        Verdict::TooBig => error(pkt, false),
        _ => None,
    };
    match written {
        Some(()) => Ok(Next::Send { verdict: asked, egress: back }),
        None => Err(decide::unanswered(asked)),
    }
}

#[inline(always)]
fn reset(pkt: &mut PacketCtx<'_>) -> Option<()> {
    if !decide::can_be_reset(pkt.packet) {
        return None;
    }
    let before = pkt.bytes_left();
    let after = reset::write(&mut pkt.frame, pkt.packet)?;
    pkt.adjust_tail(after as i32 - before as i32)
}

#[inline(always)]
fn error(pkt: &mut PacketCtx<'_>, is_port: bool) -> Option<()> {
    if !may_complain(pkt.now) {
        return None;
    }
    let is_v4 = pkt.packet.is_v4();
    let (cut, head) = (icmp_error::quoted_len(pkt.packet), if is_v4 { HEAD_V4 } else { HEAD_V6 });
    let mtu = pkt.args.mtu as u16;
    pkt.adjust_tail(cut as i32 - pkt.bytes_left() as i32)?;
    pkt.adjust_head(-(head as i32))?;
    let problem = if is_port { Problem::PortUnreachable } else { Problem::TooBig(mtu) };
    icmp_error::write(&mut pkt.frame, is_v4, problem)
}

/// Whether this CPU has not sent its share of errors in this jiffy.
#[inline(always)]
fn may_complain(now: u32) -> bool {
    let Some((sent_at, sent)) = maps::sent_errors() else { return false };
    if *sent_at != now {
        (*sent_at, *sent) = (now, 0);
    }
    *sent = sent.wrapping_add(1);
    *sent <= ERRORS_PER_JIFFY
}
