//! The packets that few gateways see many of: tagged, in fragments, or larger than one buffer.

use aya_ebpf::{helpers::bpf_xdp_get_buff_len, programs::XdpContext};
use slb_common::{
    abi::{STAGE_GUARD, STAGE_LATER, Scratch},
    parse::{self, FRAGMENT_LATER, Reject},
    verdict::Verdict,
};

use crate::{
    fragments, rejected, route, tags,
    work::{self, Exit, Sent, Work},
};

/// Takes its tags off, and parses it.
#[inline(always)]
pub fn prepare(ctx: &XdpContext, scratch: &mut Scratch) -> Result<Sent, Exit> {
    let Scratch { packet, handover, .. } = scratch;
    // SAFETY: the context is the kernel's.
    handover.bytes = unsafe { bpf_xdp_get_buff_len(ctx.ctx) };
    handover.tags = tags::take(ctx).ok_or(Verdict::Inconsistent)?;
    // SAFETY: the context is the kernel's.
    let len = unsafe { bpf_xdp_get_buff_len(ctx.ctx) } as usize;
    parse::rest(&work::frame(ctx), packet, len).map_err(|reject| match reject {
        Reject::Rest => Verdict::NotOurs.into(),
        reject => rejected(reject),
    })?;
    let is_later = packet.fragment == FRAGMENT_LATER;
    Err(Exit::Stage(if is_later { STAGE_LATER } else { STAGE_GUARD }))
}

/// What the first program does, for these.
#[inline(always)]
pub fn balance(work: &mut Work<'_>) -> Result<Sent, Exit> {
    match route::<true>(work) {
        Ok(route) => fragments::lead(work, route),
        Err(exit) => Err(fragments::leave(work, exit)),
    }
}
