//! ICMP of both families: who asks whether a VIP is there is answered, and what routers and hosts have to
//! say about a balanced packet reaches who has sent it.

use slb_common::{
    abi::{
        ConnState, FlowKind, MODE_DSR, MODE_FULL, MODE_GUE, MODE_IPIP, MODE_NAT, NO_BACKEND,
        NO_PLACE, NO_SOURCE, NatRewrite, NextHop, PROXY_V2, REVNAT_SHARED, ROLE_VIP, SLOT_BACKEND,
        Task,
    },
    icmp::{self, Quote},
    parse::FRAGMENT_NONE,
    programs::Program,
    proxy_protocol, rewrite,
    verdict::Verdict,
};

use crate::{
    conntrack,
    ctx::PacketCtx,
    forward, maps,
    neigh::{self, ClientRoute},
    outcome::{Next, Outcome, sent},
    scheduler, stats,
};

/// An ICMP message to anybody.
#[inline(always)]
pub fn message(pkt: &mut PacketCtx<'_>) -> Outcome {
    let is_vip = maps::roles(&pkt.packet.key.dst) & ROLE_VIP != 0;
    let otherwise = if is_vip { Verdict::OtherProtocol } else { Verdict::NotOurs };
    if pkt.packet.fragment != FRAGMENT_NONE {
        return Err(otherwise);
    }
    if let Some(quote) = icmp::quote(&pkt.frame) {
        return match about(pkt, &quote) {
            Err(Verdict::NotOurs) => Err(otherwise),
            outcome => outcome,
        };
    }
    if !is_vip {
        return Err(Verdict::NotOurs);
    }
    if forward::is_martian(pkt.packet) || maps::roles(&pkt.packet.key.src) & ROLE_VIP != 0 {
        return Err(Verdict::Martian);
    }
    icmp::answer_echo(&mut pkt.frame).ok_or(Verdict::OtherProtocol)?;
    let egress = pkt.ctx.ingress_ifindex() as u32;
    Ok(Next::Send { verdict: Verdict::Echo, egress })
}

/// An error about a packet. [`Verdict::NotOurs`]: it was none of a listener's.
#[inline(always)]
fn about(pkt: &mut PacketCtx<'_>, quote: &Quote) -> Outcome {
    let quoted = &quote.packet.key;
    if maps::roles(&quoted.src) & ROLE_VIP != 0 {
        return if pkt.packet.key.dst.same(quoted.src) {
            to_backend(pkt, quote)
        } else {
            Err(Verdict::NotOurs)
        };
    }
    if pkt.packet.key.dst.same(quoted.src) {
        return Ok(Next::TailCall(Program::IcmpClient));
    }
    Err(Verdict::NotOurs)
}

/// Somebody could not deliver what a VIP has sent: its backend wants to know.
#[inline(always)]
fn to_backend(pkt: &mut PacketCtx<'_>, quote: &Quote) -> Outcome {
    let key = quote.packet.key.reversed();
    let listener = maps::listener(&key.destination()).ok_or(Verdict::NotOurs)?;
    let hash = conntrack::flow_hash(&key);
    let (mut id, mut port, mut source) = (NO_BACKEND, key.sport, NO_SOURCE);
    let place = conntrack::index_of(&key);
    if let Some(flow) = conntrack::get(place) {
        (id, port, source) = (flow.backend().load(), flow.port().load(), flow.source().load());
    } else if let Ok(slot) = scheduler::by_schedule(listener, &key, hash, false) {
        id = slot & SLOT_BACKEND;
    }
    if id == NO_BACKEND {
        return Err(Verdict::NotOurs);
    }
    let backend = maps::backend(id).ok_or(Verdict::Inconsistent)?;
    pkt.check_ttl(backend.hop)?;
    if backend.mode != MODE_NAT && !backend.hop.is_known() {
        return Err(Verdict::NoNeighbour);
    }
    match backend.mode {
        MODE_FULL if source == NO_SOURCE => Err(Verdict::NotOurs),
        MODE_FULL if backend.addr.is_v4() != key.src.is_v4() => {
            stats::forward(id, pkt.bytes);
            Ok(cross(pkt, place, backend.hop, FlowKind::Original))
        }
        MODE_NAT | MODE_FULL => {
            stats::forward(id, pkt.bytes);
            let kind = FlowKind::Original;
            let sport = backend.port as u16;
            let to = NatRewrite { addr: backend.addr, sport, dport: port, kind };
            let peer = match source {
                NO_SOURCE => key.src,
                _ => maps::source(source).ok_or(Verdict::Inconsistent)?.load(),
            };
            icmp::translate_error(&mut pkt.frame, quote, &to, peer, backend.hop)?;
            Ok(sent(false, backend.hop))
        }
        MODE_DSR => {
            stats::forward(id, pkt.bytes);
            rewrite::rewrite_l2(&mut pkt.frame, pkt.packet, backend.hop)?;
            Ok(Next::Send { verdict: Verdict::Forwarded, egress: backend.hop.ifindex })
        }
        MODE_IPIP | MODE_GUE => {
            stats::forward(id, pkt.bytes);
            (pkt.args.hash, pkt.args.backend) = (hash, id);
            Ok(Next::TailCall(Program::Tunnel))
        }
        _ => Err(Verdict::Inconsistent),
    }
}

/// Has the error made into one of the other family, about the flow at `place`.
#[inline(always)]
fn cross(pkt: &mut PacketCtx<'_>, place: u32, hop: NextHop, kind: FlowKind) -> Next {
    pkt.args.place = place;
    pkt.args.hop = hop;
    pkt.args.set_task(Task::Pass(kind));
    Next::TailCall(Program::IcmpNat64)
}

/// Takes out of an error what the backend was told about the client, whose entry is at `place`.
#[inline(never)]
fn recount(pkt: &mut PacketCtx<'_>, quote: &Quote, place: u32) {
    let Some(flow) = conntrack::get(place) else { return };
    if flow.state().load().intersects(ConnState::PROXY_PENDING) {
        let is_header = flow.proxy().load() == PROXY_V2;
        let len = proxy_protocol::len(is_header, flow.src().load().is_v4());
        let first = is_header.then_some(flow.sequence().load());
        let _ = icmp::recount(&mut pkt.frame, quote, first, len);
    }
}

/// A backend, or a router on the way there, could not take what a client has sent to a VIP.
#[inline(always)]
pub fn for_client(pkt: &mut PacketCtx<'_>) -> Outcome {
    let quote = icmp::quote(&pkt.frame).ok_or(Verdict::Inconsistent)?;
    match to_client(pkt, &quote) {
        Err(Verdict::NotOurs) => Err(otherwise(pkt)),
        outcome => outcome,
    }
}

/// The verdict on a message that is about no flow of a listener.
#[inline(always)]
fn otherwise(pkt: &PacketCtx<'_>) -> Verdict {
    let is_vip = maps::roles(&pkt.packet.key.dst) & ROLE_VIP != 0;
    if is_vip { Verdict::OtherProtocol } else { Verdict::NotOurs }
}

#[inline(always)]
fn to_client(pkt: &mut PacketCtx<'_>, quote: &Quote) -> Outcome {
    let quoted = &quote.packet.key;
    let origin = maps::revnat(&quoted.destination()).ok_or(Verdict::NotOurs)?;
    let kind = FlowKind::Reply;
    let mut id = origin.backend;
    let mut to =
        NatRewrite { addr: origin.vip, sport: quoted.sport, dport: origin.port as u16, kind };
    let reply_key = maps::reply_key().ok_or(Verdict::Inconsistent)?;
    *reply_key = quoted.reversed();
    let mut client = pkt.packet.key.dst;
    let mut place = NO_PLACE;
    match conntrack::slow_lookup(reply_key) {
        Some(reply) if reply.is(FlowKind::Bypass) => return Err(Verdict::NotOurs),
        Some(reply) => {
            let flow = conntrack::reverse(reply, reply_key).ok_or(Verdict::NotOurs)?;
            place = reply.peer().load();
            id = flow.backend().load();
            let (sport, dport) = (flow.sport().load(), flow.dport().load());
            to = NatRewrite { addr: flow.dst().load(), sport, dport, kind };
            if flow.source().load() != NO_SOURCE {
                client = flow.src().load();
            }
        }
        None if origin.flags & REVNAT_SHARED != 0 => return Err(Verdict::NotOurs),
        None => {}
    }
    let ClientRoute { hop, .. } =
        neigh::client_route(pkt, &to.addr, &client)?.ok_or(Verdict::NotOurs)?;
    pkt.check_ttl(hop)?;
    stats::reply(id, pkt.bytes);
    recount(pkt, quote, place);
    if client.is_v4() != quoted.src.is_v4() {
        return Ok(cross(pkt, place, hop, FlowKind::Reply));
    }
    icmp::translate_error(&mut pkt.frame, quote, &to, client, hop)?;
    Ok(sent(true, hop))
}
