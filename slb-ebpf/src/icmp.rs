//! ICMP of both families: who asks whether a VIP is there is answered, and what routers and hosts have to
//! say about a balanced packet reaches who has sent it.

use slb_common::{
    abi::{
        ConnState, FLOW_DIRECT, FLOW_FORWARD, FLOW_REPLY, Hop, Keys, MODE_DSR, MODE_FULL, MODE_GUE,
        MODE_IPIP, MODE_NAT, NO_BACKEND, NO_PLACE, NO_SOURCE, ORIGIN_SHARED, ROLE_VIP,
        SLOT_BACKEND, TOLD_HEADER, Translation,
    },
    client_address,
    icmp::{self, Quote},
    parse::FRAGMENT_NONE,
    programs::Program,
    rewrite,
    verdict::Verdict,
};

use crate::{
    choose, conntrack,
    ctx::PacketCtx,
    forward,
    hops::{self, Way},
    maps,
    outcome::{Next, Outcome, sent},
    stats,
};

/// An ICMP message to anybody.
#[inline(always)]
pub fn message(work: &mut PacketCtx<'_>) -> Outcome {
    let is_vip = maps::roles(&work.packet.key.dst) & ROLE_VIP != 0;
    let otherwise = if is_vip { Verdict::OtherProtocol } else { Verdict::NotOurs };
    if work.packet.fragment != FRAGMENT_NONE {
        return Err(otherwise);
    }
    if let Some(quote) = icmp::quote(&work.frame) {
        return match about(work, &quote) {
            Err(Verdict::NotOurs) => Err(otherwise),
            outcome => outcome,
        };
    }
    if !is_vip {
        return Err(Verdict::NotOurs);
    }
    if forward::is_martian(work.packet) || maps::roles(&work.packet.key.src) & ROLE_VIP != 0 {
        return Err(Verdict::Martian);
    }
    icmp::answer_echo(&mut work.frame).ok_or(Verdict::OtherProtocol)?;
    let egress = work.ctx.ingress_ifindex() as u32;
    Ok(Next::Send { verdict: Verdict::Echo, egress })
}

/// An error about a packet. [`Verdict::NotOurs`]: it was none of a listener's.
#[inline(always)]
fn about(work: &mut PacketCtx<'_>, quote: &Quote) -> Outcome {
    let quoted = &quote.packet.key;
    if maps::roles(&quoted.src) & ROLE_VIP != 0 {
        return if work.packet.key.dst.same(quoted.src) {
            to_backend(work, quote)
        } else {
            Err(Verdict::NotOurs)
        };
    }
    if work.packet.key.dst.same(quoted.src) {
        return Ok(Next::TailCall(Program::IcmpClient));
    }
    Err(Verdict::NotOurs)
}

/// Somebody could not deliver what a VIP has sent: its backend wants to know.
#[inline(always)]
fn to_backend(work: &mut PacketCtx<'_>, quote: &Quote) -> Outcome {
    let key = quote.packet.key.reversed();
    let listener = maps::listener(&key.destination()).ok_or(Verdict::NotOurs)?;
    let hash = conntrack::hash(&key);
    let (mut id, mut port, mut source) = (NO_BACKEND, key.sport, NO_SOURCE);
    let place = conntrack::position(&key);
    if let Some(flow) = conntrack::at(place) {
        (id, port, source) = (flow.backend, flow.port, flow.source);
    } else if let Ok(slot) = choose::by_schedule(listener, &key, hash, false) {
        id = slot & SLOT_BACKEND;
    }
    if id == NO_BACKEND {
        return Err(Verdict::NotOurs);
    }
    let backend = maps::backend(id).ok_or(Verdict::Inconsistent)?;
    work.check_ttl(backend.hop)?;
    if backend.mode != MODE_NAT && !backend.hop.is_known() {
        return Err(Verdict::NoNeighbour);
    }
    match backend.mode {
        MODE_FULL if source == NO_SOURCE => Err(Verdict::NotOurs),
        MODE_FULL if backend.addr.is_v4() != key.src.is_v4() => {
            stats::forward(id, work.bytes);
            Ok(cross(work, place, backend.hop, FLOW_FORWARD))
        }
        MODE_NAT | MODE_FULL => {
            stats::forward(id, work.bytes);
            let kind = FLOW_FORWARD.into();
            let sport = backend.port as u16;
            let to = Translation { addr: backend.addr, sport, dport: port, kind };
            let peer = match source {
                NO_SOURCE => key.src,
                _ => *maps::source(source).ok_or(Verdict::Inconsistent)?,
            };
            icmp::translate_error(&mut work.frame, quote, &to, peer, backend.hop)?;
            Ok(sent(false, backend.hop))
        }
        MODE_DSR => {
            stats::forward(id, work.bytes);
            rewrite::pass_on(&mut work.frame, work.packet, backend.hop)?;
            Ok(Next::Send { verdict: Verdict::Forwarded, egress: backend.hop.ifindex })
        }
        MODE_IPIP | MODE_GUE => {
            stats::forward(id, work.bytes);
            (work.handover.hash, work.handover.backend) = (hash, id);
            Ok(Next::TailCall(Program::Tunnel))
        }
        _ => Err(Verdict::Inconsistent),
    }
}

/// Has the error made into one of the other family, about the flow at `place`.
#[inline(always)]
fn cross(work: &mut PacketCtx<'_>, place: u32, hop: Hop, kind: u8) -> Next {
    work.handover.place = place;
    (work.handover.hop, work.handover.what) = (hop, kind.into());
    Next::TailCall(Program::Error)
}

/// Takes out of an error what the backend was told about the client, whose entry is at `place`.
#[inline(never)]
fn recount(work: &mut PacketCtx<'_>, quote: &Quote, place: u32) {
    let Some(flow) = conntrack::at(place) else { return };
    if flow.state.intersects(ConnState::PROXY_PENDING) {
        let is_header = flow.told == TOLD_HEADER;
        let len = client_address::len(is_header, flow.src.is_v4());
        let first = is_header.then_some(flow.sequence);
        let _ = icmp::recount(&mut work.frame, quote, first, len);
    }
}

/// A backend, or a router on the way there, could not take what a client has sent to a VIP.
#[inline(always)]
pub fn for_client(work: &mut PacketCtx<'_>) -> Outcome {
    let quote = icmp::quote(&work.frame).ok_or(Verdict::Inconsistent)?;
    match to_client(work, &quote) {
        Err(Verdict::NotOurs) => Err(otherwise(work)),
        outcome => outcome,
    }
}

/// The verdict on a message that is about no flow of a listener.
#[inline(always)]
fn otherwise(work: &PacketCtx<'_>) -> Verdict {
    let is_vip = maps::roles(&work.packet.key.dst) & ROLE_VIP != 0;
    if is_vip { Verdict::OtherProtocol } else { Verdict::NotOurs }
}

#[inline(always)]
fn to_client(work: &mut PacketCtx<'_>, quote: &Quote) -> Outcome {
    let quoted = &quote.packet.key;
    let origin = maps::origin(&quoted.destination()).ok_or(Verdict::NotOurs)?;
    let kind = FLOW_REPLY.into();
    let mut id = origin.backend;
    let mut to =
        Translation { addr: origin.vip, sport: quoted.sport, dport: origin.port as u16, kind };
    let Keys { reply: reply_key, .. } = maps::keys().ok_or(Verdict::Inconsistent)?;
    *reply_key = quoted.reversed();
    let mut client = work.packet.key.dst;
    let mut place = NO_PLACE;
    match conntrack::seek(reply_key) {
        Some(reply) if reply.kind == FLOW_DIRECT => return Err(Verdict::NotOurs),
        Some(reply) => {
            let flow = conntrack::peer(reply, reply_key).ok_or(Verdict::NotOurs)?;
            place = reply.peer;
            id = flow.backend;
            to = Translation { addr: flow.dst, sport: flow.sport, dport: flow.dport, kind };
            if flow.source != NO_SOURCE {
                client = flow.src;
            }
        }
        None if origin.flags & ORIGIN_SHARED != 0 => return Err(Verdict::NotOurs),
        None => {}
    }
    let Way { hop, .. } = hops::to_client(work, &to.addr, &client)?.ok_or(Verdict::NotOurs)?;
    work.check_ttl(hop)?;
    stats::reply(id, work.bytes);
    recount(work, quote, place);
    if client.is_v4() != quoted.src.is_v4() {
        return Ok(cross(work, place, hop, FLOW_REPLY));
    }
    icmp::translate_error(&mut work.frame, quote, &to, client, hop)?;
    Ok(sent(true, hop))
}
