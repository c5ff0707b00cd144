//! The packets that few gateways see many of: tagged, in fragments, or larger than one buffer.

use aya_ebpf::programs::XdpContext;
use slb_common::{
    abi::TailCallArgs,
    packet::Packet,
    parse::{self, FRAGMENT_LATER, Reject},
    programs::Program,
    verdict::Verdict,
};

use crate::{
    ctx, ingress, kernel,
    outcome::{Next, Outcome},
    route::rejected,
    vlan,
};

/// Takes its tags off, and parses it.
#[inline(always)]
pub fn prepare(xdp: &XdpContext, packet: &mut Packet, args: &mut TailCallArgs) -> Outcome {
    args.bytes = kernel::frame_len(xdp);
    args.tags = vlan::take(xdp).ok_or(Verdict::Inconsistent)?;
    if !ingress::is_served(args.tags) {
        return Err(Verdict::NotOurs);
    }
    let len = kernel::frame_len(xdp) as usize;
    match parse::rest(&ctx::frame(xdp), packet, len) {
        Ok(()) => {
            let is_later = packet.fragment == FRAGMENT_LATER;
            Ok(Next::TailCall(if is_later { Program::Fragment } else { Program::Policy }))
        }
        Err(Reject::Rest) => Err(Verdict::NotOurs),
        Err(reject) => rejected(reject),
    }
}
