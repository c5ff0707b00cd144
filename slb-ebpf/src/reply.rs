//! From backends to clients: which VIP.
//!
//! A backend's address, port and protocol say it, unless it answers for more than one, or somebody
//! talks to it directly: then an entry does.

use slb_common::{
    abi::{
        BACKEND_CLOSED, CLOSED, Endpoint, FIN_REPLY, FLOW_DIRECT, FLOW_REPLY, FlowKey, Keys,
        MODE_FULL, MODE_NAT, NO_PLACE, NO_SOURCE, ORIGIN_CLOSING, ORIGIN_LIMITED, ORIGIN_SHARED,
        ORIGIN_TRACKED, ORIGIN_WATCHED, Origin, ROLE_LOCAL, STAGE_FULL, STAGE_GUARD, TCP,
        Translation,
    },
    parse::{ACK, FIN, RST, SYN},
    verdict::Verdict,
};

use crate::{
    direct, flows,
    hops::{self, Way},
    maps, stats,
    work::{self, Exit, Facts, Route, Work},
};

/// A packet whose source, `from`, may be a backend; `direct_until` is until when somebody may be talking to backends
/// directly. `None`: nobody balances to that address and port.
#[inline(always)]
pub fn from_backend<const REST: bool>(
    work: &mut Work<'_>,
    from: &Endpoint,
    direct_until: u32,
) -> Result<Option<Route>, Exit> {
    let key = &work.packet.key;
    let Some(origin) = maps::origin(from) else { return Ok(None) };
    let kind = FLOW_REPLY.into();
    if origin.flags & RARE != 0 {
        if !REST && origin.flags & ORIGIN_LIMITED != 0 {
            return Err(Exit::Stage(STAGE_GUARD));
        }
        if look(&work.facts(), origin) {
            return Err(work.answer(Verdict::Closed));
        }
    }
    let mut id = origin.backend;
    let mut to =
        Translation { addr: origin.vip, sport: origin.port as u16, dport: key.dport, kind };
    if origin.flags & ORIGIN_SHARED != 0 || direct::is_recent(direct_until, id, work.now) {
        let place = remembered(&work.facts());
        if place == DIRECT {
            return Err(Verdict::Direct.into());
        }
        if place == IS_CLOSED {
            return Err(work.answer(Verdict::Closed));
        }
        if let Some(flow) = flows::at(place) {
            if flow.source != NO_SOURCE {
                return Err(to_source(work, place));
            }
            id = flow.backend;
            to = Translation { addr: flow.dst, sport: flow.dport, dport: flow.sport, kind };
        } else if maps::backend(id).is_some_and(|backend| backend.mode == MODE_FULL) {
            // Whose answer it would be, only an entry says.
            return Err(Verdict::NotOurs.into());
        }
    } else if origin.flags & ORIGIN_TRACKED != 0 && work.packet.flags & (SYN | FIN | RST) != 0 {
        track(&work.facts(), origin);
    }
    let Some(Way { hop, mtu }) = hops::to_client(work, &to.addr, &work.packet.key.dst)? else {
        // To the gateway itself: for its own ears, or for a client that is a backend as well.
        let place = remembered(&work.facts());
        let is_own = flows::at(place).is_some_and(|flow| flow.source != NO_SOURCE);
        return Err(if is_own { to_source(work, place) } else { Verdict::NotOurs.into() });
    };
    if work.expires(hop) {
        return Err(Verdict::TtlExpired.into());
    }
    stats::reply(id, work.bytes);
    if REST {
        work.handover.backend = id;
    }
    Ok(Some(Route { to, hop, mode: MODE_NAT, mtu }))
}

/// An answer to a source of ours, which the client at `place` stands behind.
#[inline(always)]
fn to_source(work: &mut Work<'_>, place: u32) -> Exit {
    (work.handover.place, work.handover.what) = (place, FLOW_REPLY.into());
    Exit::Stage(STAGE_FULL)
}

/// In place of a place: it is no reply to a flow through a listener.
const DIRECT: u32 = NO_PLACE - 1;
/// In place of a place: the agent has ended it.
const IS_CLOSED: u32 = NO_PLACE - 2;

/// What few backends have.
const RARE: u32 = ORIGIN_WATCHED | ORIGIN_CLOSING | ORIGIN_LIMITED;

/// Looks after what is [`RARE`]. Says whether the packet belongs to a connection that the agent has ended.
#[inline(never)]
fn look(facts: &Facts<'_>, origin: &Origin) -> bool {
    let key = &facts.packet.key;
    if key.proto != TCP {
        return false;
    }
    if origin.flags & ORIGIN_WATCHED != 0 && facts.packet.flags & (SYN | RST) != 0 {
        // Of several that have this address and port, an entry says which.
        let reply = flows::seek(key).filter(|reply| reply.kind == FLOW_REPLY);
        match reply {
            Some(reply) => watch(facts, reply.backend),
            None if origin.flags & ORIGIN_SHARED == 0 => watch(facts, origin.backend),
            None => {}
        }
    }
    if origin.flags & ORIGIN_CLOSING == 0 || facts.packet.flags & RST != 0 {
        return false;
    }
    // Whose it is, an entry of its own says: `remembered` looks.
    if origin.flags & ORIGIN_SHARED != 0 {
        return false;
    }
    let Some(Keys { forward, .. }) = maps::keys() else { return false };
    *forward = client_key(key, origin);
    match flows::seek(forward) {
        Some(flow) => flow.state & CLOSED != 0,
        // Unless it is for the gateway itself, or for somebody who talks to the backend directly.
        None => {
            maps::backend(origin.backend).is_some_and(|backend| backend.flags & BACKEND_CLOSED != 0)
                && maps::roles(&key.dst) & ROLE_LOCAL == 0
                && flows::seek(key).is_none()
        }
    }
}

/// Counts an answer to a SYN (RFC 9293, section 3.10.7.1: a reset that answers one has the number 0).
#[inline(always)]
fn watch(facts: &Facts<'_>, backend: u32) {
    let Some(answers) = maps::SLB_ANSWERS.get_ptr_mut(backend) else { return };
    // SAFETY: this CPU's own copy, and a program is not interrupted by another on its CPU.
    let answers = unsafe { &mut *answers };
    if facts.packet.flags & (SYN | ACK) == SYN | ACK {
        answers.accepted += 1;
    } else if work::frame(facts.ctx)
        .header::<8>(facts.packet.l4 as usize)
        .is_some_and(|tcp| tcp.get::<u32>(4) == 0)
    {
        answers.refused += 1;
    }
}

/// What the client of a packet sends, if its backend answers for one listener only.
#[inline(always)]
fn client_key(key: &FlowKey, origin: &Origin) -> FlowKey {
    FlowKey {
        src: key.dst,
        dst: origin.vip,
        sport: key.dport,
        dport: origin.port as u16,
        proto: key.proto,
    }
}

/// The place of the client's entry of a reply, by the reply's own.
#[inline(never)]
fn remembered(facts: &Facts<'_>) -> u32 {
    let key = &facts.packet.key;
    let Some(reply) = flows::seek(key) else { return NO_PLACE };
    if reply.kind == FLOW_DIRECT {
        flows::note_direct(facts, reply, FIN_REPLY);
        return DIRECT;
    }
    let place = reply.peer;
    let Some(forward) = flows::peer(reply, key) else { return NO_PLACE };
    flows::note_reply(facts, forward);
    flows::keep_with(reply, forward);
    if forward.state & CLOSED != 0 && facts.packet.flags & RST == 0 {
        return IS_CLOSED;
    }
    place
}

/// Takes down what a reply says about its flow, which has an entry for the client's packets only.
#[inline(never)]
fn track(facts: &Facts<'_>, origin: &Origin) {
    let forward = client_key(&facts.packet.key, origin);
    if let Some(flow) = flows::seek(&forward) {
        flows::note_reply(facts, flow);
    }
}
