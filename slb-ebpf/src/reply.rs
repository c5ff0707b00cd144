//! From backends to clients: which VIP.
//!
//! A backend's address, port and protocol say it, unless it answers for more than one, or somebody
//! talks to it directly: then an entry does.

use slb_common::{
    abi::{
        BACKEND_CLOSED, ConnState, Endpoint, FLOW_DIRECT, FLOW_REPLY, FlowKey, Keys, MODE_FULL,
        MODE_NAT, NO_PLACE, NO_SOURCE, ORIGIN_CLOSING, ORIGIN_LIMITED, ORIGIN_SHARED,
        ORIGIN_TRACKED, ORIGIN_WATCHED, Origin, ROLE_LOCAL, TCP, Translation,
    },
    parse::TcpFlags,
    programs::Program,
    verdict::Verdict,
};

use crate::{
    conntrack,
    ctx::{self, PacketCtx, PacketView},
    direct,
    hops::{self, Way},
    maps,
    outcome::{Delivery, Stop, answer},
    stats,
};

/// A packet whose source, `from`, may be a backend; `direct_until` is until when somebody may be talking to backends
/// directly. `None`: nobody balances to that address and port.
#[inline(always)]
pub fn from_backend<const REST: bool>(
    work: &mut PacketCtx<'_>,
    from: &Endpoint,
    direct_until: u32,
) -> Result<Option<Delivery>, Stop> {
    let key = &work.packet.key;
    let Some(origin) = maps::origin(from) else { return Ok(None) };
    let kind = FLOW_REPLY.into();
    if origin.flags & RARE != 0 {
        if !REST && origin.flags & ORIGIN_LIMITED != 0 {
            return Err(Stop::TailCall(Program::Guard));
        }
        if look(&work.view(), origin) {
            return Err(Stop::TailCall(answer(work, Verdict::Closed)));
        }
    }
    let mut id = origin.backend;
    let mut to =
        Translation { addr: origin.vip, sport: origin.port as u16, dport: key.dport, kind };
    if origin.flags & ORIGIN_SHARED != 0 || direct::is_recent(direct_until, id, work.now) {
        let place = match Remembered::unpack(remembered(&work.view())) {
            Remembered::Direct => return Err(Verdict::Direct.into()),
            Remembered::Closed => return Err(Stop::TailCall(answer(work, Verdict::Closed))),
            Remembered::Place(place) => place,
        };
        if let Some(flow) = conntrack::at(place) {
            if flow.source != NO_SOURCE {
                return Err(Stop::TailCall(to_source(work, place)));
            }
            id = flow.backend;
            to = Translation { addr: flow.dst, sport: flow.dport, dport: flow.sport, kind };
        } else if maps::backend(id).is_some_and(|backend| backend.mode == MODE_FULL) {
            // Whose answer it would be, only an entry says.
            return Err(Verdict::NotOurs.into());
        }
    } else if origin.flags & ORIGIN_TRACKED != 0
        && work.packet.flags.intersects(TcpFlags::SYN | TcpFlags::FIN | TcpFlags::RST)
    {
        track(&work.view(), origin);
    }
    let Some(Way { hop, mtu }) = hops::to_client(work, &to.addr, &work.packet.key.dst)? else {
        // To the gateway itself: to a socket of its own, or to a client that is a backend as well.
        let Remembered::Place(place) = Remembered::unpack(remembered(&work.view())) else {
            return Err(Verdict::NotOurs.into());
        };
        let is_own = conntrack::at(place).is_some_and(|flow| flow.source != NO_SOURCE);
        return if is_own {
            Err(Stop::TailCall(to_source(work, place)))
        } else {
            Err(Verdict::NotOurs.into())
        };
    };
    work.check_ttl(hop)?;
    stats::reply(id, work.bytes);
    if REST {
        work.handover.backend = id;
    }
    Ok(Some(Delivery { to, hop, mode: MODE_NAT, mtu }))
}

/// An answer to a source address of ours, which stands for the client at `place`.
#[inline(always)]
fn to_source(work: &mut PacketCtx<'_>, place: u32) -> Program {
    (work.handover.place, work.handover.what) = (place, FLOW_REPLY.into());
    Program::Full
}

/// What the flow table says about a reply.
enum Remembered {
    /// It is none to a flow through a listener.
    Direct,
    /// The agent has ended the flow.
    Closed,
    /// Place of the client's entry, or [`NO_PLACE`].
    Place(u32),
}

impl Remembered {
    /// Into one register: functions that are called have no other.
    #[inline(always)]
    const fn pack(self) -> u32 {
        match self {
            Self::Direct => NO_PLACE - 1,
            Self::Closed => NO_PLACE - 2,
            Self::Place(place) => place,
        }
    }

    #[inline(always)]
    const fn unpack(packed: u32) -> Self {
        const DIRECT: u32 = Remembered::Direct.pack();
        const CLOSED: u32 = Remembered::Closed.pack();
        match packed {
            DIRECT => Self::Direct,
            CLOSED => Self::Closed,
            place => Self::Place(place),
        }
    }
}

/// What few backends have.
const RARE: u32 = ORIGIN_WATCHED | ORIGIN_CLOSING | ORIGIN_LIMITED;

/// Looks after what is [`RARE`]. Says whether the packet belongs to a connection that the agent has ended.
#[inline(never)]
fn look(facts: &PacketView<'_>, origin: &Origin) -> bool {
    let key = &facts.packet.key;
    if key.proto != TCP {
        return false;
    }
    if origin.flags & ORIGIN_WATCHED != 0
        && facts.packet.flags.intersects(TcpFlags::SYN | TcpFlags::RST)
    {
        // Of several that have this address and port, an entry says which.
        let reply = conntrack::seek(key).filter(|reply| reply.kind == FLOW_REPLY);
        match reply {
            Some(reply) => watch(facts, reply.backend),
            None if origin.flags & ORIGIN_SHARED == 0 => watch(facts, origin.backend),
            None => {}
        }
    }
    if origin.flags & ORIGIN_CLOSING == 0 || facts.packet.flags.intersects(TcpFlags::RST) {
        return false;
    }
    // Whose it is, an entry of its own says: `remembered` looks.
    if origin.flags & ORIGIN_SHARED != 0 {
        return false;
    }
    let Some(Keys { forward, .. }) = maps::keys() else { return false };
    *forward = client_key(key, origin);
    match conntrack::seek(forward) {
        Some(flow) => flow.state.intersects(ConnState::RST_PENDING),
        // Unless it is for the gateway itself, or for somebody who talks to the backend directly.
        None => {
            maps::backend(origin.backend).is_some_and(|backend| backend.flags & BACKEND_CLOSED != 0)
                && maps::roles(&key.dst) & ROLE_LOCAL == 0
                && conntrack::seek(key).is_none()
        }
    }
}

/// Counts an answer to a SYN (RFC 9293, section 3.10.7.1: a reset that answers one has the number 0).
#[inline(always)]
fn watch(facts: &PacketView<'_>, backend: u32) {
    let Some(answers) = maps::SLB_ANSWERS.get_ptr_mut(backend) else { return };
    // SAFETY: this CPU's own copy, and a program is not interrupted by another on its CPU.
    let answers = unsafe { &mut *answers };
    if facts.packet.flags.contains(TcpFlags::SYN | TcpFlags::ACK) {
        answers.accepted += 1;
    } else if ctx::frame(facts.ctx)
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

/// Looks for the client's entry of a reply by the reply's own, and updates both. Gives a [`Remembered`], packed.
#[inline(never)]
fn remembered(facts: &PacketView<'_>) -> u32 {
    let key = &facts.packet.key;
    let Some(reply) = conntrack::seek(key) else { return Remembered::Place(NO_PLACE).pack() };
    if reply.kind == FLOW_DIRECT {
        conntrack::note_direct(facts, reply, ConnState::FIN_REPLY);
        return Remembered::Direct.pack();
    }
    let place = reply.peer;
    let Some(forward) = conntrack::peer(reply, key) else {
        return Remembered::Place(NO_PLACE).pack();
    };
    conntrack::note_reply(facts, forward);
    conntrack::keep_with(reply, forward);
    if forward.state.intersects(ConnState::RST_PENDING)
        && !facts.packet.flags.intersects(TcpFlags::RST)
    {
        return Remembered::Closed.pack();
    }
    Remembered::Place(place).pack()
}

/// Takes down what a reply says about its flow, which has an entry for the client's packets only.
#[inline(never)]
fn track(facts: &PacketView<'_>, origin: &Origin) {
    let forward = client_key(&facts.packet.key, origin);
    if let Some(flow) = conntrack::seek(&forward) {
        conntrack::note_reply(facts, flow);
    }
}
