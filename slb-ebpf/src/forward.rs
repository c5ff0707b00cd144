//! From clients to VIPs: which backend.
//!
//! With a hash scheduler the slot of a packet's hash says it, and nothing is remembered. Only where
//! the slot says so, or flows are given out in turn, a flow has an entry.

use slb_common::{
    abi::{
        self, BACKEND_CLOSED, BACKEND_OPTION, BACKEND_PROXY, BACKEND_SHARED, BACKEND_UNHEALTHY,
        BACKEND_USABLE, Backend, ConnState, Endpoint, FLOW_FORWARD, Flow, LISTENER_CHOOSES,
        LISTENER_GUARDED, Listener, MODE_FULL, MODE_NAT, NO_BACKEND, NO_LISTENER_DROP,
        NO_LISTENER_RESET, NO_SOURCE, NOT_CHOSEN, ROLE_BACKEND, ROLE_VIP, SCHEDULER_QUIC,
        SLOT_BACKEND, SLOT_KEEP, SLOT_LOOK, Translation, UDP, is_over,
    },
    hash,
    parse::{Packet, TcpFlags},
    programs::Program,
    verdict::Verdict,
};

use crate::{
    choose,
    conntrack::{self, Entries},
    ctx::PacketCtx,
    direct, hops, maps,
    outcome::{Delivery, Stop, answer},
    stats,
};

/// A packet whose destination, `to`, may be a VIP; `from` is what its source may be, `direct_until` until when
/// somebody may be talking to backends directly.
///
/// `None`: it is not for a listener, nor is its destination a VIP.
#[inline(always)]
pub fn to_vip<const REST: bool>(
    work: &mut PacketCtx<'_>,
    to: &Endpoint,
    from: u32,
    direct_until: u32,
) -> Result<Option<Delivery>, Stop> {
    let packet = work.packet;
    let listener = maps::listener(to);
    if listener.is_none() && maps::roles(&packet.key.dst) & ROLE_VIP == 0 {
        return Ok(None);
    }
    if is_martian(packet) || from & ROLE_VIP != 0 && maps::roles(&packet.key.src) & ROLE_VIP != 0 {
        return Err(Verdict::Martian.into());
    }
    let Some(listener) = listener else { return no_listener(work).map(Some) };
    if !REST && listener.flags & LISTENER_GUARDED != 0 {
        return Err(Stop::TailCall(Program::Guard));
    }
    let hash = hash::flow(&packet.key);
    let mut id = 0;
    let mut port = packet.key.sport;
    let mut is_settled = false;
    if abi::is_by_hash(listener.scheduler) {
        let choice = hash::choice_by(listener.scheduler, &packet.key, hash);
        let slot = choose::slot(listener.first_chunk, listener.slots, choice)?;
        id = slot & SLOT_BACKEND;
        is_settled = slot & SLOT_LOOK == 0
            && !direct::is_recent(direct_until, id, work.now)
            // The filter may take a client for a backend, which may need an entry.
            && (from & ROLE_BACKEND == 0 || maps::roles(&packet.key.src) & ROLE_BACKEND == 0);
    }
    if !is_settled {
        match remembered(work, listener, hash) {
            Remembered::Backend { id: found, port: towards } => (id, port) = (found, towards),
            Remembered::No => {
                (work.handover.hash, work.handover.what) = (hash, FLOW_FORWARD.into());
                work.handover.chosen = NOT_CHOSEN;
                let chooses = listener.flags & LISTENER_CHOOSES != 0;
                return Err(Stop::TailCall(if chooses { Program::Choose } else { Program::Flow }));
            }
            Remembered::Closed => return Err(Stop::TailCall(answer(work, Verdict::Closed))),
            Remembered::OwnSource => {
                (work.handover.hash, work.handover.what) = (hash, FLOW_FORWARD.into());
                return Err(Stop::TailCall(Program::Full));
            }
        }
    }
    let is_new = is_settled && packet.is_syn();
    let delivery = to_backend::<REST>(work, Chosen { id, port, hash, is_new })?;
    Ok(Some(delivery))
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

/// How a packet gets to the backend that was chosen for it.
#[inline(always)]
fn to_backend<const REST: bool>(
    work: &mut PacketCtx<'_>,
    chosen: Chosen,
) -> Result<Delivery, Verdict> {
    let Chosen { id, port, hash, is_new } = chosen;
    let backend = maps::backend(id).ok_or(Verdict::NoBackend)?;
    work.check_ttl(backend.hop)?;
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
    Ok(Delivery { to, hop: backend.hop, mode: backend.mode, mtu: backend.mtu })
}

/// What happens to a packet to a VIP where there is no listener.
#[inline(always)]
fn no_listener(work: &mut PacketCtx<'_>) -> Result<Delivery, Stop> {
    match maps::settings().no_listener {
        NO_LISTENER_DROP => Err(Verdict::NoListenerDropped.into()),
        NO_LISTENER_RESET => Err(Stop::TailCall(answer(work, Verdict::Refused))),
        _ => Err(Verdict::NoListener.into()),
    }
}

/// What the flow table says about a packet.
enum Remembered {
    /// No entry, or one that does not count any more.
    No,
    /// Its backend, and the source port towards it.
    Backend { id: u32, port: u16 },
    /// The backend sees a source address of ours: [`crate::full`] translates.
    OwnSource,
    /// The agent has ended the flow.
    Closed,
}

/// Looks for the entry of a flow, and updates it.
#[inline(always)]
fn remembered(work: &mut PacketCtx<'_>, listener: &Listener, hash: u64) -> Remembered {
    let Some(flow) = conntrack::find(&work.packet.key, hash) else { return Remembered::No };
    let Some(backend) = maps::backend(flow.backend) else { return Remembered::No };
    let fits = match flow.source {
        NO_SOURCE => backend.mode != MODE_FULL,
        // NAT: a backend is its client.
        _ => matches!(backend.mode, MODE_FULL | MODE_NAT),
    };
    // Else the group's forwarding is another one by now.
    if !fits || starts_anew(work, listener, flow, backend) {
        conntrack::forget(flow);
        return Remembered::No;
    }
    if flow.state.intersects(ConnState::RST_PENDING) && !work.packet.flags.intersects(TcpFlags::RST)
    {
        return Remembered::Closed;
    }
    conntrack::note_forward(&work.view(), flow, backend);
    if flow.source != NO_SOURCE {
        return Remembered::OwnSource;
    }
    Remembered::Backend { id: flow.backend & SLOT_BACKEND, port: flow.port }
}

/// Whether a packet begins a flow anew although an entry for its tuple is there.
///
/// A backend that is not usable keeps its connections, but a SYN is no connection yet and UDP has
/// none: both are better off elsewhere. But with QUIC, which has, one that is drained or removed keeps them.
#[inline(always)]
fn starts_anew(work: &PacketCtx<'_>, listener: &Listener, flow: &Flow, backend: &Backend) -> bool {
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
        || is_over(work.now, flow.expires)
        // The client has given up the connection before: it would not begin another.
        || is_syn && flow.state.intersects(ConnState::FIN_FORWARD | ConnState::RESET | ConnState::RST_PENDING)
}

/// A packet to a VIP without an entry: chooses a backend, and makes the entries that its flow needs.
#[inline(always)]
pub fn begin(work: &mut PacketCtx<'_>) -> Result<Delivery, Stop> {
    let key = &work.packet.key;
    let hash = work.handover.hash;
    let listener = maps::listener(&key.destination()).ok_or(Verdict::NoListener)?;
    let begins = work.packet.is_syn() || key.proto == UDP;
    let slot = match work.handover.chosen {
        NOT_CHOSEN => match choose::by_schedule(listener, key, hash, begins) {
            Err(Verdict::NoFlow) => {
                return Err(Stop::TailCall(answer(work, Verdict::Reset)));
            }
            slot => slot?,
        },
        slot => slot,
    };
    let id = slot & SLOT_BACKEND;
    if id == NO_BACKEND {
        return Err(Verdict::NoBackend.into());
    }
    let backend = maps::backend(id).ok_or(Verdict::Inconsistent)?;
    work.check_ttl(backend.hop)?;
    if backend.flags & BACKEND_CLOSED != 0 && !begins {
        return Err(Stop::TailCall(answer(work, Verdict::Closed)));
    }
    // The backend is told about the client as a connection begins, and knows this one from another port.
    if backend.flags & (BACKEND_PROXY | BACKEND_OPTION) != 0 && !begins {
        return Err(Stop::TailCall(answer(work, Verdict::Reset)));
    }
    if backend.mode == MODE_FULL || is_hairpin(work, backend) {
        conntrack::create(work.now, key, id, Entries::OwnSource)?;
        hops::meet_client(work);
        if begins {
            stats::new_flow(id);
        }
        work.handover.what = FLOW_FORWARD.into();
        return Err(Stop::TailCall(Program::Full));
    }
    let is_hash = abi::is_by_hash(listener.scheduler) && work.handover.chosen == NOT_CHOSEN;
    let is_shared = backend.flags & BACKEND_SHARED != 0
        || direct::is_recent(maps::direct_until(), id, work.now);
    let port = if slot & SLOT_KEEP != 0 || is_shared {
        let entries = if is_shared { Entries::Both } else { Entries::Forward };
        match conntrack::create(work.now, key, id, entries) {
            // By hash the flow finds its backend again, as long as its slot is not changed.
            Err(Verdict::TableFull) if is_hash && backend.flags & BACKEND_SHARED == 0 => key.sport,
            port => port?,
        }
    } else {
        key.sport
    };
    let delivery = to_backend::<true>(work, Chosen { id, port, hash, is_new: begins })?;
    Ok(delivery)
}

/// Whether a backend is the client of another, or of itself, on the same side of the gateway: the answer
/// would go there without us, from an address that the client has not asked.
#[inline(always)]
fn is_hairpin(work: &PacketCtx<'_>, backend: &Backend) -> bool {
    backend.mode == MODE_NAT
        && backend.hop.ifindex == work.ctx.ingress_ifindex() as u32
        && maps::roles(&work.packet.key.src) & ROLE_BACKEND != 0
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
