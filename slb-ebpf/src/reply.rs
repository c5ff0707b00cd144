//! From backends to clients: which VIP.
//!
//! A backend's address, port and protocol say it, unless it answers for more than one, or a client
//! talks to it directly: then an entry does.

use slb_common::{
    abi::{
        BackendFlags, ConnState, Endpoint, FlowKey, FlowKind, Mode, NO_PLACE, NO_SOURCE,
        NatRewrite, RevNat, RevNatFlags, Roles, TCP, Task, UDP,
    },
    decide,
    parse::TcpFlags,
    programs::Program,
    verdict::Verdict,
};

use crate::{
    bypass,
    cell::Elements as _,
    conntrack,
    ctx::{self, PacketCtx, PacketView},
    maps,
    neigh::{self, ClientRoute},
    outcome::{Delivery, Stop, respond},
    stats,
};

/// A packet whose source, `from`, may be a backend; `bypass_until` is until when a client may be talking to backends
/// directly. `None`: no listener has a backend at that address and port.
#[inline(always)]
pub fn from_backend<const REST: bool>(
    pkt: &mut PacketCtx<'_>,
    from: &Endpoint,
    bypass_until: u32,
) -> Result<Option<Delivery>, Stop> {
    let key = &pkt.packet.key;
    let Some(origin) = maps::revnat(from) else { return Ok(None) };
    decide::check_backend(pkt, origin)?;
    let kind = FlowKind::Reply;
    if origin.flags.intersects(RARE) {
        if !REST && origin.flags.intersects(RevNatFlags::LIMITED) {
            return Err(Stop::TailCall(Program::Policy));
        }
        if look(&pkt.view(), origin) {
            return Err(Stop::TailCall(respond(pkt, Verdict::Closed)));
        }
    }
    let mut id = origin.backend;
    let mut to = NatRewrite { addr: origin.vip, sport: origin.port as u16, dport: key.dport, kind };
    if origin.flags.intersects(RevNatFlags::SHARED) || bypass::may_concern(pkt, bypass_until, id)? {
        let place = match remember(pkt, origin) {
            Remembered::Direct => return Err(Verdict::Bypass.into()),
            Remembered::Closed => return Err(Stop::TailCall(respond(pkt, Verdict::Closed))),
            Remembered::Open if bypass::decide_open(&pkt.view(), origin) => {
                return Err(Verdict::Bypass.into());
            }
            Remembered::Open => NO_PLACE,
            Remembered::Place(place) => place,
        };
        if let Some(flow) = conntrack::get(place) {
            if flow.source().load() != NO_SOURCE {
                return Err(Stop::TailCall(to_source(pkt, place)));
            }
            id = flow.backend().load();
            if !origin.flags.intersects(RevNatFlags::SHARED) {
                bypass::keep_looking(pkt.now, id);
            }
            let (sport, dport) = (flow.dport().load(), flow.sport().load());
            to = NatRewrite { addr: flow.dst().load(), sport, dport, kind };
        } else if maps::backend(id).is_some_and(|backend| backend.mode == Mode::FULL) {
            // Whose answer it would be, only an entry says.
            return Err(Verdict::NotOurs.into());
        }
    } else if origin.flags.intersects(RevNatFlags::TRACKED)
        && (REST
            || pkt.packet.flags.intersects(conntrack::ENDS)
            || pkt.packet.key.proto == UDP
            || decide::is_until(maps::adopted_until(), pkt.now))
    {
        track(&pkt.view(), origin);
    }
    let Some(ClientRoute { hop, mtu }) = neigh::client_route(pkt, &to.addr, &pkt.packet.key.dst)?
    else {
        // To the gateway itself: to a socket of its own, or to a client that is a backend as well.
        let Remembered::Place(place) = remember(pkt, origin) else {
            return Err(Verdict::NotOurs.into());
        };
        let is_own = conntrack::get(place).is_some_and(|flow| flow.source().load() != NO_SOURCE);
        return if is_own {
            Err(Stop::TailCall(to_source(pkt, place)))
        } else {
            Err(Verdict::NotOurs.into())
        };
    };
    decide::check_ttl(pkt, hop)?;
    stats::reply(id, pkt.bytes);
    if REST {
        pkt.args.backend = id;
    }
    Ok(Some(Delivery { to, hop, mode: Mode::NAT, mtu }))
}

/// An answer to a source address of ours, which stands for the client at `place`.
#[inline(always)]
fn to_source(pkt: &mut PacketCtx<'_>, place: u32) -> Program {
    pkt.args.place = place;
    pkt.args.set_task(Task::Pass(FlowKind::Reply));
    Program::FullNat
}

/// What the flow table says about a reply.
enum Remembered {
    /// It is none to a flow through a listener.
    Direct,
    /// The agent has ended the flow.
    Closed,
    /// It may be: [`bypass::decide_open`].
    Open,
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
            Self::Open => NO_PLACE - 3,
            Self::Place(place) => place,
        }
    }

    #[inline(always)]
    const fn unpack(packed: u32) -> Self {
        const DIRECT: u32 = Remembered::Direct.pack();
        const CLOSED: u32 = Remembered::Closed.pack();
        const OPEN: u32 = Remembered::Open.pack();
        match packed {
            DIRECT => Self::Direct,
            CLOSED => Self::Closed,
            OPEN => Self::Open,
            place => Self::Place(place),
        }
    }
}

/// What few backends have.
const RARE: RevNatFlags =
    RevNatFlags::WATCHED.union(RevNatFlags::CLOSING).union(RevNatFlags::LIMITED);

/// Looks after what is [`RARE`]. Says whether the packet belongs to a connection that the agent has ended.
#[inline(never)]
fn look(view: &PacketView<'_>, origin: &RevNat) -> bool {
    let key = &view.packet.key;
    if key.proto != TCP {
        return false;
    }
    if origin.flags.intersects(RevNatFlags::WATCHED)
        && view.packet.flags.intersects(TcpFlags::SYN | TcpFlags::RST)
    {
        // Of several that have this address and port, an entry says which.
        let reply = conntrack::slow_lookup(key);
        match reply.filter(|reply| reply.is(FlowKind::Reply)) {
            Some(reply) => watch(view, reply.backend().load()),
            None if !origin.flags.intersects(RevNatFlags::SHARED) => watch(view, origin.backend),
            None => {}
        }
    }
    if !origin.flags.intersects(RevNatFlags::CLOSING) || view.packet.flags.intersects(TcpFlags::RST)
    {
        return false;
    }
    // Whose it is, an entry of its own says: `remembered` looks.
    if origin.flags.intersects(RevNatFlags::SHARED) {
        return false;
    }
    let Some((forward, _)) = maps::client_key() else { return false };
    *forward = client_key(key, origin);
    match conntrack::slow_lookup(forward) {
        Some(flow) => flow.state().load().intersects(ConnState::RST_PENDING),
        // Unless it is for the gateway itself, or for a client that talks to the backend directly.
        None => {
            maps::backend(origin.backend)
                .is_some_and(|backend| backend.flags.intersects(BackendFlags::CLOSED))
                && !maps::roles(&key.dst).intersects(Roles::LOCAL)
                && conntrack::slow_lookup(key).is_none()
        }
    }
}

/// Counts an answer to a SYN (RFC 9293, section 3.10.7.1: a reset that answers one has the number 0).
#[inline(always)]
fn watch(view: &PacketView<'_>, backend: u32) {
    let Some(answers) = maps::SLB_PASSIVE_HC.cell(backend) else { return };
    if view.packet.flags.contains(TcpFlags::SYN | TcpFlags::ACK) {
        answers.accepted().add(1);
    } else if ctx::frame(view.ctx)
        .header::<8>(view.packet.l4 as usize)
        .is_some_and(|tcp| tcp.get::<u32>(4) == 0)
    {
        answers.refused().add(1);
    }
}

/// What the client of a packet sends, if its backend answers for one listener only.
#[inline(always)]
fn client_key(key: &FlowKey, origin: &RevNat) -> FlowKey {
    FlowKey {
        src: key.dst,
        dst: origin.vip,
        sport: key.dport,
        dport: origin.port as u16,
        proto: key.proto,
    }
}

/// Looks for the client's entry of a reply by the reply's own, and takes down in both what the reply says.
///
/// Calls one after the other, not one inside the other: here begins the deepest chain of them.
#[inline(always)]
fn remember(pkt: &mut PacketCtx<'_>, origin: &RevNat) -> Remembered {
    let found = Remembered::unpack(remembered(&pkt.view(), origin));
    match found {
        Remembered::Place(NO_PLACE) => {
            if origin.flags.intersects(RevNatFlags::TRACKED) {
                track(&pkt.view(), origin);
            }
            found
        }
        Remembered::Place(place) if is_closed(&pkt.view(), place) => Remembered::Closed,
        _ => found,
    }
}

/// Gives a [`Remembered`], packed; not [`Remembered::Closed`].
#[inline(never)]
fn remembered(view: &PacketView<'_>, origin: &RevNat) -> u32 {
    let key = &view.packet.key;
    let Some(reply) = conntrack::slow_lookup(key) else { return NO_PLACE };
    if reply.is(FlowKind::Bypass) {
        if bypass::is_open(view, reply, origin) {
            return Remembered::Open.pack();
        }
        if bypass::is_answer(view, reply, origin) {
            return Remembered::Direct.pack();
        }
    }
    match conntrack::reverse(reply, key) {
        Some(_) => reply.peer().load(),
        None => NO_PLACE,
    }
}

/// Takes down what a reply says about the flow whose client's entry is at `place`, and whether the agent has ended it.
#[inline(never)]
fn is_closed(view: &PacketView<'_>, place: u32) -> bool {
    conntrack::update_reply(view, place);
    let Some(forward) = conntrack::get(place) else { return false };
    if let Some(reply) = conntrack::reply_of(forward, place) {
        conntrack::follow(reply, forward);
    }
    forward.state().load().intersects(ConnState::RST_PENDING)
        && !view.packet.flags.intersects(TcpFlags::RST)
}

/// Takes down what a reply says about its flow, which has an entry for the client's packets only.
#[inline(never)]
fn track(view: &PacketView<'_>, origin: &RevNat) {
    let forward = client_key(&view.packet.key, origin);
    conntrack::update_reply(view, conntrack::index_of(&forward));
}
