//! The order in which a packet is looked at: as one to a VIP, from a backend, to a backend.

use slb_common::{
    abi::{FLOW_DIRECT, ROLE_BACKEND, ROLE_VIP},
    parse::Reject,
    programs::Program,
    verdict::Verdict,
};

use crate::{
    ctx::PacketCtx,
    direct, forward, fragments,
    maps::{self, Known},
    outcome::{Delivery, Next, Outcome, Stop, deliver},
    reply, tunnel,
};

/// The first program's part.
#[inline(always)]
pub fn first(work: &mut PacketCtx<'_>) -> Outcome {
    match route::<false>(work) {
        Ok(delivery) if tunnel::is_short(work, &delivery) => tunnel::pass(work, &delivery),
        Ok(delivery) => deliver(work, delivery),
        Err(Stop::TailCall(program)) => Ok(Next::TailCall(program)),
        Err(Stop::End(verdict)) => Err(verdict),
    }
}

/// The same for a packet that `slb_rest` has parsed or `slb_guard` admitted.
#[inline(always)]
pub fn parsed(work: &mut PacketCtx<'_>) -> Outcome {
    let decision = route::<true>(work);
    fragments::lead(work, decision)
}

/// The first packet of a flow that may need an entry.
#[inline(always)]
pub fn flow(work: &mut PacketCtx<'_>) -> Outcome {
    let decision = if work.handover.what == FLOW_DIRECT.into() {
        direct::begin(work)
    } else {
        forward::begin(work)
    };
    fragments::lead(work, decision)
}

/// What happens to a frame that was not parsed as TCP or UDP in one piece.
#[inline(always)]
pub fn rejected(reject: Reject) -> Outcome {
    match reject {
        Reject::Icmp => Ok(Next::TailCall(Program::Icmp)),
        Reject::Rest => Ok(Next::TailCall(Program::Rest)),
        Reject::To(dst, verdict) if maps::roles(&dst) & ROLE_VIP != 0 => Err(verdict),
        Reject::To(..) | Reject::NotIp => Err(Verdict::NotOurs),
    }
}

/// Where a packet goes. `REST`: it has been through `slb_guard`.
#[inline(always)]
fn route<const REST: bool>(work: &mut PacketCtx<'_>) -> Result<Delivery, Stop> {
    let Known { from, to, direct_until } = maps::filter(&work.packet.key.src, &work.packet.key.dst);
    let mut delivery = None;
    // One for all look-ups: stack is scarce.
    let mut at = work.packet.key.destination();
    if to & ROLE_VIP != 0 {
        delivery = forward::to_vip::<REST>(work, &at, from, direct_until)?;
    }
    if delivery.is_none() && from & ROLE_BACKEND != 0 {
        at = work.packet.key.source();
        delivery = reply::from_backend::<REST>(work, &at, direct_until)?;
    }
    if delivery.is_none() && to & ROLE_BACKEND != 0 {
        at = work.packet.key.destination();
        delivery = direct::to_backend::<REST>(work, &at)?;
    }
    Ok(delivery.ok_or(Verdict::NotOurs)?)
}
