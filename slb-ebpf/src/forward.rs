//! From clients to VIPs: which backend.
//!
//! With a hash scheduler the slot of a packet's hash says it, and nothing is remembered. Only where
//! the slot says so, or flows are given out in turn, a flow has an entry.

use slb_common::{
    abi::{
        self, BACKEND_CLOSED, BACKEND_OPTION, BACKEND_PROXY, BACKEND_SHARED, BACKEND_UNHEALTHY,
        BACKEND_USABLE, Backend, CHUNK_SLOTS, CLOSED, Endpoint, FIN_FORWARD, FLOW_FORWARD, Flow,
        FlowKey, LISTENER_CHOOSES, LISTENER_GUARDED, Listener, MODE_FULL, MODE_NAT, NO_BACKEND,
        NO_LISTENER_DROP, NO_LISTENER_RESET, NO_SOURCE, NOT_CHOSEN, ROLE_BACKEND, ROLE_VIP, RST,
        SCHEDULER_QUIC, SLOT_BACKEND, SLOT_KEEP, SLOT_LOOK, STAGE_CHOOSE, STAGE_FLOW, STAGE_FULL,
        STAGE_GUARD, Translation, UDP,
    },
    hash,
    parse::Packet,
    verdict::Verdict,
};

use crate::{
    atomic, direct,
    flows::{self, Entries},
    hops, maps, stats,
    work::{Exit, Route, Work},
};

/// A packet whose destination, `to`, may be a VIP; `from` is what its source may be, `direct_until` until when
/// somebody may be talking to backends directly.
///
/// `None`: it is not for a listener, nor is its destination a VIP.
#[inline(always)]
pub fn to_vip<const REST: bool>(
    work: &mut Work<'_>,
    to: &Endpoint,
    from: u32,
    direct_until: u32,
) -> Result<Option<Route>, Exit> {
    let packet = work.packet;
    let listener = maps::listener(to);
    if listener.is_none() && maps::roles(&packet.key.dst) & ROLE_VIP == 0 {
        return Ok(None);
    }
    if is_martian(packet) || from & ROLE_VIP != 0 && maps::roles(&packet.key.src) & ROLE_VIP != 0 {
        return Err(Verdict::Martian.into());
    }
    let Some(listener) = listener else { return Err(no_listener(work)) };
    if !REST && listener.flags & LISTENER_GUARDED != 0 {
        return Err(Exit::Stage(STAGE_GUARD));
    }
    let hash = hash::flow(&packet.key);
    let mut id = 0;
    let mut port = packet.key.sport;
    let mut is_settled = false;
    if abi::is_by_hash(listener.scheduler) {
        let choice = hash::choice_by(listener.scheduler, &packet.key, hash);
        let slot = slot(listener.first_chunk, listener.slots, choice)?;
        id = slot & SLOT_BACKEND;
        is_settled = slot & SLOT_LOOK == 0
            && !direct::is_recent(direct_until, id, work.now)
            // The filter may take a client for a backend, which may need an entry.
            && (from & ROLE_BACKEND == 0 || maps::roles(&packet.key.src) & ROLE_BACKEND == 0);
    }
    if !is_settled {
        let found = remembered(work, listener, hash);
        if found == NOT_REMEMBERED {
            (work.handover.hash, work.handover.what) = (hash, FLOW_FORWARD.into());
            work.handover.chosen = NOT_CHOSEN;
            let chooses = listener.flags & LISTENER_CHOOSES != 0;
            return Err(Exit::Stage(if chooses { STAGE_CHOOSE } else { STAGE_FLOW }));
        }
        if found == IS_CLOSED {
            return Err(work.answer(Verdict::Closed));
        }
        if found == OWN_SOURCE {
            (work.handover.hash, work.handover.what) = (hash, FLOW_FORWARD.into());
            return Err(Exit::Stage(STAGE_FULL));
        }
        id = found & SLOT_BACKEND;
        port = (found >> 16) as u16;
    }
    let is_new = is_settled && packet.is_syn();
    arrive::<REST>(work, Chosen { id, port, hash, is_new }).map(Some)
}

/// A backend for a packet.
struct Chosen {
    id: u32,
    /// Source port towards it.
    port: u16,
    hash: u64,
    /// Whether a flow begins.
    is_new: bool,
}

/// How a packet gets to the backend that it was given.
#[inline(always)]
fn arrive<const REST: bool>(work: &mut Work<'_>, chosen: Chosen) -> Result<Route, Exit> {
    let Chosen { id, port, hash, is_new } = chosen;
    let backend = maps::backend(id).ok_or(Verdict::NoBackend)?;
    if work.expires(backend.hop) {
        return Err(Verdict::TtlExpired.into());
    }
    if backend.mode != MODE_NAT && !backend.hop.is_known() {
        return Err(Verdict::NoNeighbour.into());
    }
    if REST || backend.mode != MODE_NAT {
        (work.handover.hash, work.handover.backend) = (hash, id);
    }
    if work.packet.is_syn() || work.packet.key.proto == UDP {
        hops::meet_client(work);
        if is_new {
            stats::new_flow(id);
        }
    }
    stats::forward(id, work.bytes);
    let kind = FLOW_FORWARD.into();
    let to = Translation { addr: backend.addr, sport: port, dport: backend.port as u16, kind };
    Ok(Route { to, hop: backend.hop, mode: backend.mode, mtu: backend.mtu })
}

/// What a packet to a VIP gets where no listener is.
#[inline(always)]
fn no_listener(work: &mut Work<'_>) -> Exit {
    match maps::settings().no_listener {
        NO_LISTENER_DROP => Verdict::NoListenerDropped.into(),
        NO_LISTENER_RESET => work.answer(Verdict::Refused),
        _ => Verdict::NoListener.into(),
    }
}

/// No entry, or one that does not count any more.
const NOT_REMEMBERED: u32 = u32::MAX;
/// The backend sees a source of ours: [`crate::full`] knows more.
const OWN_SOURCE: u32 = NO_BACKEND;
/// The agent has ended it.
const IS_CLOSED: u32 = NO_BACKEND | 1 << 16;

/// The backend of a flow that has an entry, and above that the source port towards it.
#[inline(always)]
fn remembered(work: &mut Work<'_>, listener: &Listener, hash: u64) -> u32 {
    let Some(flow) = flows::find(&work.packet.key, hash) else { return NOT_REMEMBERED };
    let Some(backend) = maps::backend(flow.backend) else { return NOT_REMEMBERED };
    let fits = match flow.source {
        NO_SOURCE => backend.mode != MODE_FULL,
        // NAT: a backend is its client.
        _ => matches!(backend.mode, MODE_FULL | MODE_NAT),
    };
    // Else the group's forwarding is another one by now.
    if !fits || starts_anew(work, listener, flow, backend) {
        flows::forget(flow);
        return NOT_REMEMBERED;
    }
    if flow.state & CLOSED != 0 && work.packet.flags & RST == 0 {
        return IS_CLOSED;
    }
    flows::note_forward(&work.facts(), flow, backend);
    if flow.source != NO_SOURCE {
        return OWN_SOURCE;
    }
    u32::from(flow.port) << 16 | flow.backend & SLOT_BACKEND
}

/// Whether a packet begins a flow anew although an entry for its tuple is there.
///
/// A backend that is not usable keeps its connections, but a SYN is no connection yet and UDP has
/// none: both are better off elsewhere. But with QUIC, which has, one that is drained or removed keeps them.
#[inline(always)]
fn starts_anew(work: &Work<'_>, listener: &Listener, flow: &Flow, backend: &Backend) -> bool {
    let is_syn = work.packet.is_syn();
    if flow.kind != FLOW_FORWARD || !(is_syn || work.packet.key.proto == UDP) {
        return false;
    }
    let is_out = if listener.scheduler == SCHEDULER_QUIC {
        backend.flags & (BACKEND_UNHEALTHY | BACKEND_CLOSED) != 0
    } else {
        backend.flags & BACKEND_USABLE == 0
    };
    is_out
        || flows::is_over(work.now, flow.expires)
        // The client has given up the connection before: it would not begin another.
        || is_syn && flow.state & (FIN_FORWARD | RST | CLOSED) != 0
}

/// A packet to a VIP without an entry: chooses a backend, and makes the entries that its flow needs.
#[inline(always)]
pub fn begin(work: &mut Work<'_>) -> Result<Route, Exit> {
    let key = &work.packet.key;
    let hash = work.handover.hash;
    let listener = maps::listener(&key.destination()).ok_or(Verdict::NoListener)?;
    let begins = work.packet.is_syn() || key.proto == UDP;
    let slot = match work.handover.chosen {
        NOT_CHOSEN => match choose(listener, key, hash, begins) {
            Err(Verdict::NoFlow) => return Err(work.answer(Verdict::Reset)),
            slot => slot?,
        },
        slot => slot,
    };
    let id = slot & SLOT_BACKEND;
    if id == NO_BACKEND {
        return Err(Verdict::NoBackend.into());
    }
    let backend = maps::backend(id).ok_or(Verdict::Inconsistent)?;
    if work.expires(backend.hop) {
        return Err(Verdict::TtlExpired.into());
    }
    if backend.flags & BACKEND_CLOSED != 0 && !begins {
        return Err(work.answer(Verdict::Closed));
    }
    // The backend is told about the client as a connection begins, and knows this one from another port.
    if backend.flags & (BACKEND_PROXY | BACKEND_OPTION) != 0 && !begins {
        return Err(work.answer(Verdict::Reset));
    }
    if backend.mode == MODE_FULL || is_hairpin(work, backend) {
        flows::create(work.now, key, id, Entries::OwnSource)?;
        hops::meet_client(work);
        if begins {
            stats::new_flow(id);
        }
        work.handover.what = FLOW_FORWARD.into();
        return Err(Exit::Stage(STAGE_FULL));
    }
    let is_hash = abi::is_by_hash(listener.scheduler) && work.handover.chosen == NOT_CHOSEN;
    let is_shared = backend.flags & BACKEND_SHARED != 0
        || direct::is_recent(maps::direct_until(), id, work.now);
    let port = if slot & SLOT_KEEP != 0 || is_shared {
        let entries = if is_shared { Entries::Both } else { Entries::Forward };
        match flows::create(work.now, key, id, entries) {
            // By hash the flow finds its backend again, as long as its slot is not changed.
            Err(Verdict::TableFull) if is_hash && backend.flags & BACKEND_SHARED == 0 => key.sport,
            port => port?,
        }
    } else {
        key.sport
    };
    arrive::<true>(work, Chosen { id, port, hash, is_new: begins })
}

/// Whether a backend is the client of another, or of itself, on the same side of the gateway: the answer
/// would go there without us, from an address that the client has not asked.
#[inline(always)]
fn is_hairpin(work: &Work<'_>, backend: &Backend) -> bool {
    backend.mode == MODE_NAT
        && backend.hop.ifindex == work.ctx.ingress_ifindex() as u32
        && maps::roles(&work.packet.key.src) & ROLE_BACKEND != 0
}

/// The slot of a packet without an entry.
///
/// TCP in the middle of a connection goes by the schedule before, if it is older than the last
/// change; otherwise it gets the backend that the hash gives: that is how another gateway has chosen.
/// A scheduler that counts has no such answer.
#[inline(always)]
pub fn choose(listener: &Listener, key: &FlowKey, hash: u64, begins: bool) -> Result<u32, Verdict> {
    if !begins && listener.previous_slots != 0 {
        let choice = hash::choice_by(listener.previous_scheduler, key, hash);
        let previous = slot(listener.previous_chunk, listener.previous_slots, choice)?;
        if previous & SLOT_BACKEND != NO_BACKEND {
            return Ok(previous | SLOT_KEEP);
        }
    }
    if abi::is_by_hash(listener.scheduler) {
        let choice = hash::choice_by(listener.scheduler, key, hash);
        return slot(listener.first_chunk, listener.slots, choice);
    }
    if listener.slots == 0 {
        return Err(Verdict::NoBackend);
    }
    if !begins && listener.slots != 1 {
        return Err(Verdict::NoFlow);
    }
    if listener.scheduler == SCHEDULER_QUIC {
        return slot(listener.first_chunk, listener.slots, hash::choice(hash));
    }
    Ok(at(listener.first_chunk, turn(listener)?)? | SLOT_KEEP)
}

/// The next slot in turn of a listener that has some.
#[inline(always)]
pub fn turn(listener: &Listener) -> Result<u32, Verdict> {
    let cursor = maps::SLB_CURSORS.get_ptr_mut(listener.id).ok_or(Verdict::Inconsistent)?;
    // SAFETY: an element of an array map lives as long as the map and is aligned to 8 bytes.
    let turn = unsafe { atomic::fetch_add(cursor, 1) };
    Ok((turn % u64::from(listener.slots)) as u32)
}

/// The slot that a hash chooses.
#[inline(always)]
pub fn slot(first_chunk: u32, slots: u32, choice: u32) -> Result<u32, Verdict> {
    if slots == 0 {
        return Err(Verdict::NoBackend);
    }
    at(first_chunk, hash::slot(choice, slots))
}

/// The slot of a number.
#[inline(always)]
pub fn at(first_chunk: u32, slot: u32) -> Result<u32, Verdict> {
    let chunk = maps::SLB_SLOTS
        .get(first_chunk.wrapping_add(slot / CHUNK_SLOTS as u32))
        .ok_or(Verdict::Inconsistent)?;
    Ok(chunk.slots[slot as usize % CHUNK_SLOTS])
}

/// Whether the source is no unicast address that a router may forward from: RFC 1812, section 5.3.7;
/// RFC 3927, section 2.7; RFC 4291, sections 2.5.2, 2.5.3, 2.5.6 and 2.7.
#[inline(always)]
pub fn is_martian(packet: &Packet) -> bool {
    let bytes = &packet.key.src.bytes;
    if packet.is_v4() {
        return matches!(bytes[12], 0 | 127 | 224..) || (bytes[12] == 169 && bytes[13] == 254);
    }
    let [high, low] = packet.key.src.halves();
    let is_none_or_loopback = high == 0 && u64::from_be(low) <= 1;
    let is_link_local = bytes[0] == 0xfe && bytes[1] & 0xc0 == 0x80;
    is_none_or_loopback || is_link_local || bytes[0] == 0xff
}
