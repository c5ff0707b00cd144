//! Clients that talk to a backend's address and port themselves, through the gateway.
//!
//! Such packets are left alone. But what the backend answers looks like an answer to a flow through a
//! listener, so it is remembered as [`FlowKind::Bypass`]. And a backend cannot tell such a connection from
//! one of the same client port through a listener: the one that begins second gets another source port.

use slb_common::{
    abi::{
        ConnState, Endpoint, FlowKey, FlowKind, Mode, NO_PLACE, NatRewrite, RevNat, Task, UDP,
        is_over,
    },
    decide::{self, Entries},
    programs::Program,
    verdict::Verdict,
};

use crate::{
    cell::Elements as _,
    conntrack,
    ctx::{PacketCtx, PacketView},
    maps,
    outcome::{Delivery, Stop},
    stats,
};

/// A packet whose destination, `to`, may be a backend. `None`: no listener has a backend at that address and port.
#[inline(always)]
pub fn to_backend<const REST: bool>(
    pkt: &mut PacketCtx<'_>,
    to: &Endpoint,
) -> Result<Option<Delivery>, Stop> {
    let Some(origin) = maps::revnat(to) else { return Ok(None) };
    match Remembered::unpack(pass(&pkt.view(), origin)) {
        Remembered::Begins => {
            pkt.args.set_task(Task::Pass(FlowKind::Bypass));
            Err(Stop::TailCall(Program::Flow))
        }
        Remembered::Place(place) => {
            note(&pkt.view(), place);
            translated::<REST>(pkt, place).map(Some)
        }
    }
}

/// A packet with which a direct flow begins.
#[inline(always)]
pub fn begin(pkt: &mut PacketCtx<'_>) -> Result<Delivery, Stop> {
    let key = &pkt.packet.key;
    let origin = maps::revnat(&key.destination()).ok_or(Verdict::NotOurs)?;
    let place = remember(pkt.now, key, origin.backend);
    translated::<true>(pkt, place)
}

/// How a packet gets to the backend if its flow has to be translated: that of the entry at `place`.
#[inline(always)]
fn translated<const REST: bool>(pkt: &mut PacketCtx<'_>, place: u32) -> Result<Delivery, Stop> {
    let flow = conntrack::get(place).ok_or(Verdict::Bypass)?;
    let id = flow.backend().load();
    let backend = maps::backend(id).ok_or(Verdict::Inconsistent)?;
    decide::check_ttl(pkt, backend.hop)?;
    stats::forward(id, pkt.arrived_bytes::<REST>());
    if REST {
        pkt.args.backend = id;
    }
    let to = NatRewrite {
        addr: backend.addr,
        sport: flow.port().load(),
        dport: backend.port as u16,
        kind: FlowKind::Original,
    };
    let delivery = Delivery { to, hop: backend.hop, mode: Mode::NAT, mtu: backend.mtu };
    Ok(delivery)
}

/// What the flow table says about a packet to a backend.
enum Remembered {
    /// A flow begins with it.
    Begins,
    /// Place of the entry by which it is translated, or [`NO_PLACE`]: it is not.
    Place(u32),
}

impl Remembered {
    /// Into one register: functions that are called have no other.
    #[inline(always)]
    const fn pack(self) -> u32 {
        match self {
            Self::Begins => NO_PLACE - 1,
            Self::Place(place) => place,
        }
    }

    #[inline(always)]
    const fn unpack(packed: u32) -> Self {
        const BEGINS: u32 = Remembered::Begins.pack();
        match packed {
            BEGINS => Self::Begins,
            place => Self::Place(place),
        }
    }
}

/// Remembers a direct flow that begins. Gives the place of its entry if it has to be translated.
#[inline(always)]
fn remember(now: u32, key: &FlowKey, id: u32) -> u32 {
    let Some(reply) = maps::reply_key() else { return NO_PLACE };
    *reply = key.reversed();
    if !conntrack::is_taken(now, reply, key) && !conntrack::may_be_balanced(now, reply, id) {
        conntrack::insert_bypass(now, reply, id);
        return NO_PLACE;
    }
    // Not translated is no reason not to pass it.
    if conntrack::create(now, key, id, Entries::Both).is_err() {
        return NO_PLACE;
    }
    conntrack::index_of(key)
}

/// Keeps what is remembered of a direct flow. Gives a [`Remembered`], packed.
#[inline(never)]
fn pass(view: &PacketView<'_>, origin: &RevNat) -> u32 {
    let Some(backend) = maps::backend(origin.backend) else {
        return Remembered::Place(NO_PLACE).pack();
    };
    let remembered = remembered(view);
    let begins = view.packet.is_syn() || view.packet.key.proto == UDP;
    if matches!(remembered, Remembered::Begins) && !begins {
        return Remembered::Place(NO_PLACE).pack();
    }
    mark(view.now, origin.backend, backend.idle_jiffies);
    remembered.pack()
}

/// Updates the entry by which a packet is translated, if it is. Not in [`pass`]: the deepest chain of calls begins
/// here.
#[inline(never)]
fn note(view: &PacketView<'_>, place: u32) {
    if let Some(flow) = conntrack::get(place)
        && let Some(backend) = maps::backend(flow.backend().load())
    {
        conntrack::update_original(view, flow, backend);
    }
}

/// Looks for the entry of a packet to a backend, and updates that of a flow that is passed as it is.
#[inline(always)]
fn remembered(view: &PacketView<'_>) -> Remembered {
    let key = &view.packet.key;
    let is_syn = view.packet.is_syn();
    let place = conntrack::index_of(key);
    if let Some(flow) = conntrack::get(place) {
        let ended = ConnState::FIN_ORIGINAL | ConnState::RESET | ConnState::RST_PENDING;
        let is_new = is_syn && flow.state().load().intersects(ended);
        if flow.is(FlowKind::Original) && !is_new {
            return Remembered::Place(place);
        }
        conntrack::delete(flow);
    }
    let Some(reply) = maps::reply_key() else { return Remembered::Place(NO_PLACE) };
    *reply = key.reversed();
    match conntrack::slow_lookup(reply) {
        Some(known) if known.is(FlowKind::Bypass) => {
            if is_syn {
                known.state().store(ConnState::empty());
            }
            conntrack::update_bypass(view, known, ConnState::FIN_ORIGINAL);
            Remembered::Place(NO_PLACE)
        }
        _ => Remembered::Begins,
    }
}

/// Flows of a backend have entries for as long as a client talks to it directly.
#[inline(never)]
fn mark(now: u32, id: u32, idle: u32) {
    // 0 has a meaning of its own; a tick more does not matter.
    let own = now.wrapping_add(idle) | 1;
    if let Some(until) = maps::SLB_BYPASS.cell(id) {
        // Two CPUs that write at the same time write much the same.
        until.store(own);
    }
    if let Some(filter) = maps::SLB_FILTER.cell(0) {
        // Timeouts differ: the last of all counts.
        let any = filter.bypass_until().load();
        if any == 0 || is_over(own, any) {
            filter.bypass_until().store(own);
        }
    }
}
