//! ICMP of both families: who asks whether a VIP is there is answered, and what routers and hosts have to
//! say about a balanced packet reaches who has sent it.

use slb_common::{
    abi::{
        ConnState, FlowKind, Mode, NO_PLACE, NO_SOURCE, NatRewrite, NextHop, PROXY_V2, RevNatFlags,
        Roles, Task,
    },
    decide::{self, ErrorToBackend, Filtered, Side},
    icmp::{self, Quote},
    programs::Program,
    proxy_protocol, rewrite,
    verdict::Verdict,
};

use crate::{
    conntrack,
    ctx::PacketCtx,
    kernel, maps,
    neigh::{self, ClientRoute},
    outcome::{Next, Outcome, sent},
    policy, stats,
};

/// An ICMP message to any address.
#[inline(always)]
pub fn message(pkt: &mut PacketCtx<'_>) -> Outcome {
    if let Some(quote) = icmp::quote(&pkt.frame) {
        return match decide::concerns(pkt, pkt.packet, &quote.packet.key)? {
            Side::Client => Ok(Next::TailCall(Program::IcmpClient)),
            Side::Backend => match to_backend(pkt, &quote) {
                Err(Verdict::NotOurs) => Err(otherwise(pkt)),
                outcome => outcome,
            },
        };
    }
    decide::to_itself(pkt, pkt.packet)?;
    icmp::answer_echo(&mut pkt.frame).ok_or(Verdict::OtherProtocol)?;
    let egress = kernel::ingress(pkt.ctx);
    Ok(Next::Send { verdict: Verdict::Echo, egress })
}

/// An error about what a VIP has sent: its backend is to know.
#[inline(always)]
fn to_backend(pkt: &mut PacketCtx<'_>, quote: &Quote) -> Outcome {
    let quoted = &quote.packet.key;
    let ErrorToBackend { backend, id, flow } = decide::error_to_backend(pkt, pkt.packet, quoted)?;
    // Whom the VIP has sent to.
    let client = quoted.dst;
    stats::forward(id, pkt.bytes);
    match backend.mode {
        Mode::FULL if backend.addr.is_v4() != client.is_v4() => {
            Ok(cross(pkt, flow.place, backend.hop, FlowKind::Original))
        }
        Mode::NAT | Mode::FULL => {
            let kind = FlowKind::Original;
            let sport = backend.port as u16;
            let to = NatRewrite { addr: backend.addr, sport, dport: flow.port, kind };
            let peer = match flow.source {
                NO_SOURCE => client,
                source => maps::source(source).ok_or(Verdict::Inconsistent)?.load(),
            };
            icmp::translate_error(&mut pkt.frame, quote, &to, peer, backend.hop)?;
            Ok(sent(false, backend.hop))
        }
        Mode::DSR => {
            rewrite::rewrite_l2(&mut pkt.frame, pkt.packet, backend.hop)?;
            Ok(Next::Send { verdict: Verdict::Forwarded, egress: backend.hop.ifindex })
        }
        Mode::IPIP | Mode::GUE => {
            (pkt.args.hash, pkt.args.backend) = (conntrack::table_hash(&quoted.reversed()), id);
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
    decide::unrelated(maps::roles(&pkt.packet.key.dst).intersects(Roles::VIP))
}

/// [`decide::error_to_client`] once more: with that, the deepest chain of calls would take 32 bytes more of the stack
/// than any may (`docs/adr/0022-one-decision.md`).
#[inline(always)]
fn to_client(pkt: &mut PacketCtx<'_>, quote: &Quote) -> Outcome {
    let quoted = &quote.packet.key;
    let origin = maps::revnat(&quoted.destination()).ok_or(Verdict::NotOurs)?;
    decide::check_backend(pkt, origin)?;
    decide::check_source(pkt, pkt.packet, Filtered::NOT)?;
    let kind = FlowKind::Reply;
    let mut id = origin.backend;
    let mut to =
        NatRewrite { addr: origin.vip, sport: quoted.sport, dport: origin.port as u16, kind };
    let mut client = pkt.packet.key.dst;
    let mut place = NO_PLACE;
    let reply_key = maps::reply_key().ok_or(Verdict::Inconsistent)?;
    *reply_key = quoted.reversed();
    match conntrack::slow_lookup(reply_key) {
        Some(reply) if conntrack::is_direct(pkt.now, reply) => return Err(Verdict::NotOurs),
        Some(reply) if !reply.is(FlowKind::Bypass) => {
            let flow = conntrack::reverse(reply, reply_key).ok_or(Verdict::NotOurs)?;
            place = reply.peer().load();
            id = flow.backend().load();
            let (sport, dport) = (flow.sport().load(), flow.dport().load());
            to = NatRewrite { addr: flow.dst().load(), sport, dport, kind };
            if flow.source().load() != NO_SOURCE {
                client = flow.src().load();
            }
        }
        _ if origin.flags.intersects(RevNatFlags::SHARED) => return Err(Verdict::NotOurs),
        _ => {}
    }
    let ClientRoute { hop, .. } =
        neigh::client_route(pkt, &to.addr, &client)?.ok_or(Verdict::NotOurs)?;
    decide::check_ttl(pkt, hop)?;
    if origin.flags.intersects(RevNatFlags::LIMITED) {
        policy::police_reply(id, pkt.bytes)?;
    }
    stats::reply(id, pkt.bytes);
    recount(pkt, quote, place);
    if client.is_v4() != quoted.src.is_v4() {
        return Ok(cross(pkt, place, hop, FlowKind::Reply));
    }
    icmp::translate_error(&mut pkt.frame, quote, &to, client, hop)?;
    Ok(sent(true, hop))
}
