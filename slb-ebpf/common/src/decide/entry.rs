//! What an entry of the flow table says about a client's packet.

use crate::{
    abi::{
        Backend, BackendFlags, ConnState, Flow, FlowKind, Listener, Mode, NO_SOURCE, SLOT_BACKEND,
        Scheduler, UDP, is_over,
    },
    packet::{Packet, TcpFlags},
};

/// What decisions go by of a client's entry: a copy, as others may write the entry meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Remembered {
    /// [`Flow::backend`].
    pub backend: u32,
    /// [`Flow::port`].
    pub port: u16,
    /// [`Flow::source`].
    pub source: u16,
    /// Whether it is of [`FlowKind::Original`].
    pub is_original: bool,
    /// [`Flow::state`].
    pub state: ConnState,
    /// [`Flow::expires`].
    pub expires: u32,
}

impl From<&Flow> for Remembered {
    fn from(flow: &Flow) -> Self {
        Self {
            backend: flow.backend,
            port: flow.port,
            source: flow.source,
            is_original: flow.is(FlowKind::Original),
            state: flow.state(),
            expires: flow.expires,
        }
    }
}

/// What [`super::is_owner`] goes by of the entry at a reply's [`Flow::peer`]: a copy, as above.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// [`Flow::tag`].
    pub tag: u32,
    /// Whether it is of [`FlowKind::Original`].
    pub is_original: bool,
    /// [`Flow::proto`].
    pub proto: u8,
    /// [`Flow::port`].
    pub port: u16,
}

impl From<&Flow> for Peer {
    fn from(flow: &Flow) -> Self {
        let is_original = flow.is(FlowKind::Original);
        Self { tag: flow.tag, is_original, proto: flow.proto, port: flow.port }
    }
}

/// What the flow table says about a client's packet.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// There is none, or one that does not count any more.
    None,
    /// Its backend, and the source port towards it.
    Backend {
        /// Index of the backend.
        id: u32,
        /// The port.
        port: u16,
    },
    /// The backend sees a source address of ours.
    OwnSource,
}

impl Entry {
    /// That of a flow whose entry is [`Judgement::Valid`].
    #[must_use]
    #[inline(always)]
    pub const fn of(flow: &Remembered) -> Self {
        match flow.source {
            NO_SOURCE => Self::Backend { id: flow.backend & SLOT_BACKEND, port: flow.port },
            _ => Self::OwnSource,
        }
    }
}

/// What becomes of a packet by its entry.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// The entry does not count any more.
    Stale,
    /// The agent has ended the flow.
    Closed,
    /// The packet belongs to the flow.
    Valid,
}

/// Whether an entry, whose backend is `backend`, counts for a packet. `now` is in jiffies.
#[must_use]
#[inline(always)]
pub fn judge(
    now: u32,
    packet: &Packet,
    listener: &Listener,
    flow: &Remembered,
    backend: &Backend,
) -> Judgement {
    let fits = match flow.source {
        NO_SOURCE => backend.mode != Mode::FULL,
        // NAT: a backend is its client.
        _ => matches!(backend.mode, Mode::FULL | Mode::NAT),
    };
    // Else the group's forwarding is another one by now.
    if !fits || starts_anew(now, packet, listener, flow, backend) {
        return Judgement::Stale;
    }
    if flow.state.intersects(ConnState::RST_PENDING) && !packet.flags.intersects(TcpFlags::RST) {
        return Judgement::Closed;
    }
    Judgement::Valid
}

/// Whether a packet begins a flow anew although an entry for its tuple is there.
///
/// A backend that is not usable keeps its connections, but a SYN is no connection yet and UDP has
/// none: both are better off elsewhere. But with QUIC, which has, one that is drained or removed keeps them. So does it
/// if the client is proven: anyone may have sent the SYN, and the backend knows whether its connection is there.
#[inline(always)]
fn starts_anew(
    now: u32,
    packet: &Packet,
    listener: &Listener,
    flow: &Remembered,
    backend: &Backend,
) -> bool {
    let is_syn = packet.is_syn();
    if !flow.is_original || !(is_syn || packet.key.proto == UDP) {
        return false;
    }
    let is_proven = is_syn && flow.state.intersects(ConnState::ESTABLISHED);
    let is_out = if is_proven || listener.scheduler == Scheduler::QUIC {
        backend.flags.intersects(BackendFlags::UNHEALTHY | BackendFlags::CLOSED)
    } else {
        !backend.flags.intersects(BackendFlags::USABLE)
    };
    is_out || is_over(now, flow.expires) || is_syn && flow.state.has_ended()
}
