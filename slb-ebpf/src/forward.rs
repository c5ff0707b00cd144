//! From clients to VIPs: which backend.
//!
//! With a hash scheduler the slot of a packet's hash says it, and nothing is remembered. Only where
//! the slot says so, or flows are given out in turn, a flow has an entry.

use slb_common::{
    abi::{
        self, BACKEND_CLOSED, BACKEND_OPTION, BACKEND_PROXY, BACKEND_SHARED, BACKEND_UNHEALTHY,
        BACKEND_USABLE, Backend, ConnState, Endpoint, FlowKind, LISTENER_CHOOSES, LISTENER_GUARDED,
        Listener, MODE_FULL, MODE_NAT, NO_BACKEND, NO_LISTENER_DROP, NO_LISTENER_RESET, NO_SOURCE,
        NOT_CHOSEN, NatRewrite, ROLE_BACKEND, ROLE_VIP, SCHEDULER_QUIC, SLOT_BACKEND, SLOT_KEEP,
        SLOT_LOOK, Task, UDP, is_over,
    },
    hash,
    parse::{Packet, TcpFlags},
    programs::Program,
    verdict::Verdict,
};

use crate::{
    bypass,
    conntrack::{self, Entries, Entry},
    ctx::PacketCtx,
    maps, neigh,
    outcome::{Delivery, Stop, respond},
    scheduler, stats,
};

/// A packet whose destination, `to`, may be a VIP; `from` is what its source may be, `bypass_until` until when
/// somebody may be talking to backends directly.
///
/// `None`: it is not for a listener, nor is its destination a VIP.
#[inline(always)]
pub fn to_vip<const REST: bool>(
    pkt: &mut PacketCtx<'_>,
    to: &Endpoint,
    from: u32,
    bypass_until: u32,
) -> Result<Option<Delivery>, Stop> {
    let packet = pkt.packet;
    let listener = maps::listener(to);
    if listener.is_none() && maps::roles(&packet.key.dst) & ROLE_VIP == 0 {
        return Ok(None);
    }
    if is_martian(packet) || from & ROLE_VIP != 0 && maps::roles(&packet.key.src) & ROLE_VIP != 0 {
        return Err(Verdict::Martian.into());
    }
    let Some(listener) = listener else { return no_listener(pkt).map(Some) };
    if !REST && listener.flags & LISTENER_GUARDED != 0 {
        return Err(Stop::TailCall(Program::Policy));
    }
    let hash = hash::flow(&packet.key);
    let mut id = 0;
    let mut port = packet.key.sport;
    let mut is_settled = false;
    if abi::is_by_hash(listener.scheduler) {
        let choice = hash::choice_by(listener.scheduler, &packet.key, hash);
        let slot = scheduler::slot(listener.first_chunk, listener.slots, choice)?;
        id = slot & SLOT_BACKEND;
        is_settled = slot & SLOT_LOOK == 0
            && !bypass::is_recent(bypass_until, id, pkt.now)
            // The filter may take a client for a backend, which may need an entry.
            && (from & ROLE_BACKEND == 0 || maps::roles(&packet.key.src) & ROLE_BACKEND == 0);
    }
    if !is_settled {
        match remembered(pkt, listener, hash) {
            Remembered::Backend { id: found, port: towards } => (id, port) = (found, towards),
            Remembered::No => {
                pkt.args.hash = hash;
                pkt.args.set_task(Task::Pass(FlowKind::Original));
                pkt.args.chosen = NOT_CHOSEN;
                let chooses = listener.flags & LISTENER_CHOOSES != 0;
                return Err(Stop::TailCall(if chooses {
                    Program::Scheduler
                } else {
                    Program::Flow
                }));
            }
            Remembered::Closed => return Err(Stop::TailCall(respond(pkt, Verdict::Closed))),
            Remembered::OwnSource => {
                pkt.args.hash = hash;
                pkt.args.set_task(Task::Pass(FlowKind::Original));
                return Err(Stop::TailCall(Program::FullNat));
            }
        }
    }
    let is_new = is_settled && packet.is_syn();
    let delivery = to_backend::<REST>(pkt, Chosen { id, port, hash, is_new })?;
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
    pkt: &mut PacketCtx<'_>,
    chosen: Chosen,
) -> Result<Delivery, Verdict> {
    let Chosen { id, port, hash, is_new } = chosen;
    let backend = maps::backend(id).ok_or(Verdict::NoBackend)?;
    pkt.check_ttl(backend.hop)?;
    if backend.mode != MODE_NAT && !backend.hop.is_known() {
        return Err(Verdict::NoNeighbour);
    }
    if REST || backend.mode != MODE_NAT {
        (pkt.args.hash, pkt.args.backend) = (hash, id);
    }
    if pkt.packet.is_syn() || pkt.packet.key.proto == UDP {
        neigh::learn_client_neighbour(pkt);
        if is_new {
            stats::new_flow(id);
        }
    }
    stats::forward(id, pkt.bytes);
    let kind = FlowKind::Original;
    let to = NatRewrite { addr: backend.addr, sport: port, dport: backend.port as u16, kind };
    Ok(Delivery { to, hop: backend.hop, mode: backend.mode, mtu: backend.mtu })
}

/// What happens to a packet to a VIP where there is no listener.
#[inline(always)]
fn no_listener(pkt: &mut PacketCtx<'_>) -> Result<Delivery, Stop> {
    match maps::settings().no_listener() {
        NO_LISTENER_DROP => Err(Verdict::NoListenerDropped.into()),
        NO_LISTENER_RESET => Err(Stop::TailCall(respond(pkt, Verdict::Refused))),
        _ => Err(Verdict::NoListener.into()),
    }
}

/// What the flow table says about a packet.
enum Remembered {
    /// No entry, or one that does not count any more.
    No,
    /// Its backend, and the source port towards it.
    Backend { id: u32, port: u16 },
    /// The backend sees a source address of ours: [`crate::full_nat`] translates.
    OwnSource,
    /// The agent has ended the flow.
    Closed,
}

/// Looks for the entry of a flow, and updates it.
#[inline(always)]
fn remembered(pkt: &mut PacketCtx<'_>, listener: &Listener, hash: u64) -> Remembered {
    let Some(flow) = conntrack::lookup(&pkt.packet.key, hash) else { return Remembered::No };
    let (id, source, port) = (flow.backend().load(), flow.source().load(), flow.port().load());
    if !conntrack::is_still(flow, hash) {
        return Remembered::No;
    }
    let Some(backend) = maps::backend(id) else { return Remembered::No };
    let fits = match source {
        NO_SOURCE => backend.mode != MODE_FULL,
        // NAT: a backend is its client.
        _ => matches!(backend.mode, MODE_FULL | MODE_NAT),
    };
    // Else the group's forwarding is another one by now.
    if !fits || starts_anew(pkt, listener, flow, backend) {
        conntrack::delete(flow);
        return Remembered::No;
    }
    if flow.state().load().intersects(ConnState::RST_PENDING)
        && !pkt.packet.flags.intersects(TcpFlags::RST)
    {
        return Remembered::Closed;
    }
    conntrack::update_original(&pkt.view(), flow, backend);
    if source != NO_SOURCE {
        return Remembered::OwnSource;
    }
    Remembered::Backend { id: id & SLOT_BACKEND, port }
}

/// Whether a packet begins a flow anew although an entry for its tuple is there.
///
/// A backend that is not usable keeps its connections, but a SYN is no connection yet and UDP has
/// none: both are better off elsewhere. But with QUIC, which has, one that is drained or removed keeps them.
#[inline(always)]
fn starts_anew(pkt: &PacketCtx<'_>, listener: &Listener, flow: Entry, backend: &Backend) -> bool {
    let is_syn = pkt.packet.is_syn();
    if !flow.is(FlowKind::Original) || !(is_syn || pkt.packet.key.proto == UDP) {
        return false;
    }
    let is_out = if listener.scheduler == SCHEDULER_QUIC {
        backend.flags & (BACKEND_UNHEALTHY | BACKEND_CLOSED) != 0
    } else {
        backend.flags & BACKEND_USABLE == 0
    };
    is_out
        || is_over(pkt.now, flow.expires().load())
        // The client has given up the connection before: it would not begin another.
        || is_syn && flow.state().load().intersects(ConnState::FIN_ORIGINAL | ConnState::RESET | ConnState::RST_PENDING)
}

/// A packet to a VIP without an entry: chooses a backend, and makes the entries that its flow needs.
#[inline(always)]
pub fn begin(pkt: &mut PacketCtx<'_>) -> Result<Delivery, Stop> {
    let key = &pkt.packet.key;
    let hash = pkt.args.hash;
    let listener = maps::listener(&key.destination()).ok_or(Verdict::NoListener)?;
    let begins = pkt.packet.is_syn() || key.proto == UDP;
    let slot = match pkt.args.chosen {
        NOT_CHOSEN => match scheduler::by_schedule(listener, key, hash, begins) {
            Err(Verdict::NoFlow) => {
                return Err(Stop::TailCall(respond(pkt, Verdict::Reset)));
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
    pkt.check_ttl(backend.hop)?;
    if backend.flags & BACKEND_CLOSED != 0 && !begins {
        return Err(Stop::TailCall(respond(pkt, Verdict::Closed)));
    }
    // The backend is told about the client as a connection begins, and knows this one from another port.
    if backend.flags & (BACKEND_PROXY | BACKEND_OPTION) != 0 && !begins {
        return Err(Stop::TailCall(respond(pkt, Verdict::Reset)));
    }
    if backend.mode == MODE_FULL || is_hairpin(pkt, backend) {
        conntrack::create(pkt.now, key, id, Entries::OwnSource)?;
        neigh::learn_client_neighbour(pkt);
        if begins {
            stats::new_flow(id);
        }
        pkt.args.set_task(Task::Pass(FlowKind::Original));
        return Err(Stop::TailCall(Program::FullNat));
    }
    let is_hash = abi::is_by_hash(listener.scheduler) && pkt.args.chosen == NOT_CHOSEN;
    let is_shared =
        backend.flags & BACKEND_SHARED != 0 || bypass::is_recent(maps::bypass_until(), id, pkt.now);
    let port = if slot & SLOT_KEEP != 0 || is_shared {
        let entries = if is_shared { Entries::Both } else { Entries::Forward };
        match conntrack::create(pkt.now, key, id, entries) {
            // By hash the flow finds its backend again, as long as its slot is not changed.
            Err(Verdict::TableFull) if is_hash && backend.flags & BACKEND_SHARED == 0 => key.sport,
            port => port?,
        }
    } else {
        key.sport
    };
    let delivery = to_backend::<true>(pkt, Chosen { id, port, hash, is_new: begins })?;
    Ok(delivery)
}

/// Whether a backend is the client of another, or of itself, on the same side of the gateway: the answer
/// would go there without us, from an address that the client has not asked.
#[inline(always)]
fn is_hairpin(pkt: &PacketCtx<'_>, backend: &Backend) -> bool {
    backend.mode == MODE_NAT
        && backend.hop.ifindex == pkt.ctx.ingress_ifindex() as u32
        && maps::roles(&pkt.packet.key.src) & ROLE_BACKEND != 0
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
