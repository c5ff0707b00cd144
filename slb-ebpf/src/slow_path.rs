//! The packets that few gateways see many of: tagged, in fragments, or larger than one buffer.

use aya_ebpf::{helpers::bpf_xdp_get_buff_len, programs::XdpContext};
use slb_common::{
    abi::Scratch,
    parse::{self, FRAGMENT_LATER, Reject},
    programs::Program,
    verdict::Verdict,
};

use crate::{
    ctx,
    outcome::{Next, Outcome},
    route::rejected,
    vlan,
};

/// Takes its tags off, and parses it.
#[inline(always)]
pub fn prepare(xdp: &XdpContext, scratch: &mut Scratch) -> Outcome {
    let Scratch { packet, args, .. } = scratch;
    // SAFETY: the context is the kernel's.
    args.bytes = unsafe { bpf_xdp_get_buff_len(xdp.ctx) };
    args.tags = vlan::take(xdp).ok_or(Verdict::Inconsistent)?;
    // SAFETY: the context is the kernel's.
    let len = unsafe { bpf_xdp_get_buff_len(xdp.ctx) } as usize;
    match parse::rest(&ctx::frame(xdp), packet, len) {
        Ok(()) => {
            let is_later = packet.fragment == FRAGMENT_LATER;
            Ok(Next::TailCall(if is_later { Program::Fragment } else { Program::Policy }))
        }
        Err(Reject::Rest) => Err(Verdict::NotOurs),
        Err(reject) => rejected(reject),
    }
}
