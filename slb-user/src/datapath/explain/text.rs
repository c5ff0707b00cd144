//! The steps of an explanation in words.

use std::net::{IpAddr, SocketAddr};

use slb_common::{
    abi::{
        Backend, ConnState, Flow, FlowKind, Fragment, Listener, ListenerFlags, Mode, NO_BACKEND,
        RevNat, RevNatFlags, SLOT_BACKEND, SLOT_LOOK, Scheduler,
    },
    decide::{Martian, Step},
};

/// How steps write a backend; the API puts its name there.
#[must_use]
pub(super) fn name(backend: u32) -> String {
    if backend == NO_BACKEND { "no backend".to_owned() } else { format!("#{backend}") }
}

/// The backend of a slot.
pub(super) fn of_slot(slot: u32) -> String {
    name(slot & SLOT_BACKEND)
}

/// How loaded a backend is that may be chosen.
pub(super) fn candidate(backend: u32, active: u64, weight: u64) -> String {
    format!("{} has {active} for weight {weight}", name(backend))
}

/// At what a step looks, and what it finds.
pub(super) fn step(step: &Step<'_>) -> (&'static str, String) {
    match *step {
        Step::Destination { is_vip } => {
            ("address", if is_vip { "a VIP" } else { "no VIP" }.to_owned())
        }
        Step::Martian(why) => ("source", martian(why).to_owned()),
        Step::NoListener => ("listener", "none on this port".to_owned()),
        Step::Listener(listener) => {
            ("listener", format!("number {}, scheduler {}", listener.id, scheduler(listener)))
        }
        Step::AccessList { listener, is_listed } => ("access list", list(listener, is_listed)),
        Step::Slot { number, slots, slot, is_special } => {
            let looks = match (slot & SLOT_LOOK != 0, is_special) {
                (true, _) => "its flows may have entries",
                (false, true) => {
                    "settled, but a client talks to the backend directly, or is one: looks for an entry"
                }
                (false, false) => "settled: needs no entry",
            };
            ("slot", format!("{number} of {slots}: {}; {looks}", of_slot(slot)))
        }
        Step::NoBackend => ("backend", "none takes new flows".to_owned()),
        Step::Closed { backend } => {
            ("backend", format!("{}, drained: its time is up", name(backend)))
        }
        Step::TooLate { backend } => {
            let text = "is told the client's address only as a connection begins";
            ("backend", format!("{} {text}", name(backend)))
        }
        Step::Hairpin { backend, ingress } => {
            let backend = name(backend);
            let text = "sees an address of the gateway";
            ("source", format!("a backend, behind interface {ingress} like {backend}: {text}"))
        }
        Step::LastHop => ("TTL", "lets it go no further than here".to_owned()),
        Step::ErrorToBackend { key } => {
            let client = SocketAddr::new(key.src.into(), key.sport);
            ("error", format!("about what a VIP has sent to {client}: goes to the backend"))
        }
        Step::ErrorToClient { origin } => ("error", error_to_client(origin)),
        Step::FirstFragment(first) => ("fragments", fragment(first)),
        _ => schedule(step),
    }
}

const fn martian(why: Martian) -> &'static str {
    match why {
        Martian::Address => "no address that a router forwards from",
        Martian::Own => "a VIP, another address of the gateway, or a subnet's broadcast address",
        Martian::Subnet => "its subnet is behind another interface",
        Martian::Backend => "what comes from the backend does not come by this interface",
    }
}

/// The same for a step of the choice of a slot.
fn schedule(step: &Step<'_>) -> (&'static str, String) {
    match *step {
        Step::Previous { number, slot } => {
            ("schedule", format!("slot {number} of the schedule before: {}", of_slot(slot)))
        }
        Step::ByHash { number, slot } => ("schedule", format!("slot {number}: {}", of_slot(slot))),
        Step::WithoutId { number, slot } => {
            let backend = of_slot(slot);
            let text = "a QUIC packet goes by its connection ID instead";
            ("schedule", format!("slot {number}: {backend}; {text}"))
        }
        Step::Turn { turn, slots, slot } => {
            ("schedule", format!("turn {turn} of {slots}: {}", of_slot(slot)))
        }
        Step::Unknown => {
            let text = "in turn, which says nothing about a connection that is not known";
            ("schedule", text.to_owned())
        }
        Step::Kept(None) => ("persistence", "the client has none".to_owned()),
        Step::Kept(Some((backend, is_open))) => {
            let found =
                if is_open { "where the client stays" } else { "which is not usable any more" };
            ("persistence", format!("{}, {found}", name(backend)))
        }
        Step::Candidate { backend, active, weight } => {
            ("schedule", candidate(backend, active, weight))
        }
        Step::Least { slot } => ("schedule", of_slot(slot)),
        _ => ("schedule", String::new()),
    }
}

fn list(listener: &Listener, is_listed: bool) -> String {
    let list = if listener.flags.intersects(ListenerFlags::ALLOW) { "allows" } else { "denies" };
    let found = if is_listed { "is on it" } else { "is not on it" };
    format!("number {}, {list}: the client {found}", listener.acl)
}

fn error_to_client(origin: &RevNat) -> String {
    let vip = SocketAddr::new(origin.vip.into(), origin.port as u16);
    let answers = if origin.flags.intersects(RevNatFlags::SHARED) {
        "answers for several listeners: the flow's entry says for which".to_owned()
    } else {
        format!("answers for {vip}")
    };
    format!("about what a client has sent to {}, which {answers}", name(origin.backend))
}

fn fragment(first: Option<&Fragment>) -> String {
    let Some(first) = first else {
        return "the first of this packet has not been seen, or too long ago".to_owned();
    };
    if first.kind == FlowKind::Bypass as u32 {
        return "the first of this packet was left to the kernel".to_owned();
    }
    let end = if first.kind == FlowKind::Reply as u32 { first.src } else { first.dst };
    let side = if first.kind == FlowKind::Reply as u32 { "from" } else { "to" };
    format!("the first of this packet went {side} {}", IpAddr::from(end))
}

/// The entry of a flow that goes on.
pub(super) fn entry(flow: &Flow) -> String {
    let state = match flow.state() {
        state if state.intersects(ConnState::RST_PENDING) => "ended by the agent",
        state if state.has_ended() => "ended",
        state if state.intersects(ConnState::END_CLAIMED) => "said to have ended",
        state if state.intersects(ConnState::ESTABLISHED) => "established",
        state if state.intersects(ConnState::AGED) => "not proven, but in use",
        _ => "opening",
    };
    format!("an entry, {state}: {}", name(flow.backend))
}

/// Where a backend is, and how packets get there.
pub(super) fn backend(id: u32, backend: &Backend) -> String {
    let how = match backend.mode {
        Mode::DSR => "as it is (dsr)",
        Mode::IPIP => "in ipip",
        Mode::GUE => "in gue",
        Mode::FULL => "by full-nat",
        _ => "by nat",
    };
    let at = SocketAddr::new(backend.addr.into(), backend.port as u16);
    let hop = if backend.hop.is_known() {
        format!("interface {}", backend.hop.ifindex)
    } else {
        "not known".to_owned()
    };
    format!("{} at {at}, {how}; next hop: {hop}", name(id))
}

fn scheduler(listener: &Listener) -> &'static str {
    match listener.scheduler {
        Scheduler::HASH => "by hash of the 4-tuple",
        Scheduler::SOURCE => "by hash of the source",
        Scheduler::LEAST => "fewest flows",
        Scheduler::QUIC => "by QUIC connection ID",
        _ => "in turn",
    }
}
