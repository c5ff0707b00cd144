//! The order in which a packet is looked at: as one to a VIP, from a backend, to a backend.

use slb_common::{
    abi::Roles, decide::Filtered, parse::Reject, programs::Program, verdict::Verdict,
};

use crate::{
    bypass,
    ctx::PacketCtx,
    forward, fragments, kernel,
    maps::{self, Known},
    outcome::{Delivery, Next, Outcome, Stop, deliver},
    reply, tunnel,
};

/// The first program's part.
#[inline(always)]
pub fn first(pkt: &mut PacketCtx<'_>) -> Outcome {
    match route::<false>(pkt) {
        Ok(delivery) if tunnel::is_short(pkt, &delivery) => tunnel::pass(pkt, &delivery),
        Ok(delivery) => deliver(pkt, delivery),
        Err(Stop::TailCall(program)) => Ok(Next::TailCall(program)),
        Err(Stop::End(verdict)) => Err(verdict),
    }
}

/// The same for a packet that `slb_slow_path` has parsed or `slb_policy` admitted.
#[inline(always)]
pub fn parsed(pkt: &mut PacketCtx<'_>) -> Outcome {
    let decision = route::<true>(pkt);
    fragments::lead(pkt, decision)
}

/// The first packet of a flow that may need an entry.
#[inline(always)]
pub fn flow(pkt: &mut PacketCtx<'_>) -> Outcome {
    let decision = forward::begin(pkt);
    fragments::lead(pkt, decision)
}

/// What happens to a frame that was not parsed as TCP or UDP in one piece.
#[inline(always)]
pub fn rejected(reject: Reject) -> Outcome {
    match reject {
        Reject::Icmp => Ok(Next::TailCall(Program::Icmp)),
        Reject::Rest => Ok(Next::TailCall(Program::SlowPath)),
        Reject::To(dst, verdict) if maps::roles(&dst).intersects(Roles::VIP) => Err(verdict),
        Reject::To(..) | Reject::NotIp => Err(Verdict::NotOurs),
    }
}

/// What the filter says of a packet to a VIP.
#[inline(always)]
pub fn filtered(pkt: &PacketCtx<'_>, known: &Known) -> Filtered {
    let ifindex = kernel::ingress(pkt.ctx);
    let is_elsewhere = known.may_be_elsewhere(ifindex, &pkt.packet.key.src, pkt.packet.is_v4());
    Filtered { from: known.from, bypass_until: known.bypass_until, is_elsewhere }
}

/// Where a packet goes. `REST`: it has been through `slb_policy`.
#[inline(always)]
fn route<const REST: bool>(pkt: &mut PacketCtx<'_>) -> Result<Delivery, Stop> {
    let known = maps::filter(&pkt.packet.key.src, &pkt.packet.key.dst);
    let Known { from, to, bypass_until, .. } = known;
    let mut delivery = None;
    // One for all look-ups: stack is scarce.
    let mut at = pkt.packet.key.destination();
    if to.intersects(Roles::VIP) {
        let filtered = filtered(pkt, &known);
        delivery = forward::to_vip::<REST>(pkt, &at, filtered)?;
    }
    if delivery.is_none() && from.intersects(Roles::BACKEND) {
        at = pkt.packet.key.source();
        // Read once more: less has to be kept on the stack meanwhile.
        let bypass_until = if REST { maps::bypass_until() } else { bypass_until };
        delivery = reply::from_backend::<REST>(pkt, &at, bypass_until)?;
    }
    if delivery.is_none() && to.intersects(Roles::BACKEND) {
        at = pkt.packet.key.destination();
        return Err(bypass::to_backend(pkt, &at).into());
    }
    Ok(delivery.ok_or(Verdict::NotOurs)?)
}
