//! What a decision has looked at, for `slb explain`.

use super::Martian;
use crate::{
    abi::{Fragment, Listener, RevNat},
    net::FlowKey,
};

/// One look at something, and what was found. A `number` is that of a slot in its schedule, a `slot` its value, and a
/// `backend` an index into `SLB_BACKENDS`.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "fields are named above, or say all that there is")]
pub enum Step<'a> {
    /// The destination.
    Destination { is_vip: bool },
    /// The source cannot have sent this, or not by this interface.
    Martian(Martian),
    /// The VIP has no listener on this port.
    NoListener,
    /// The listener.
    Listener(&'a Listener),
    /// Whether the client is on the listener's access list.
    AccessList { listener: &'a Listener, is_listed: bool },
    /// The slot that the hash chooses, of so many. `is_special`: an entry may say otherwise although it is settled.
    Slot { number: u32, slots: u32, slot: u32, is_special: bool },
    /// A slot of the schedule before.
    Previous { number: u32, slot: u32 },
    /// The slot that the hash chooses for a packet without an entry.
    ByHash { number: u32, slot: u32 },
    /// The same for a datagram that may have a QUIC connection ID, which would choose instead.
    WithoutId { number: u32, slot: u32 },
    /// The next slot in turn, of so many.
    Turn { turn: u32, slots: u32, slot: u32 },
    /// The packet is in the middle of a connection that is not known, and flows are given out in turn.
    Unknown,
    /// The backend that the client is kept with, and whether that takes flows.
    Kept(Option<(u32, bool)>),
    /// A backend that may be chosen for its few flows, how many of those it has, and its weight.
    Candidate { backend: u32, active: u64, weight: u64 },
    /// The slot of the candidate with the fewest flows for its weight.
    Least { slot: u32 },
    /// No backend takes new flows.
    NoBackend,
    /// The backend is drained, and its time is up.
    Closed { backend: u32 },
    /// The backend is told the client's address only as a connection begins.
    TooLate { backend: u32 },
    /// The client is a backend behind the same interface as the backend that was chosen.
    Hairpin { backend: u32, ingress: u32 },
    /// The packet ends here by its TTL or hop limit.
    LastHop,
    /// The packet is an ICMP error about what a VIP has sent: the key of the client's packets.
    ErrorToBackend { key: &'a FlowKey },
    /// The packet is an ICMP error about what a client has sent to a backend: whom that answers for.
    ErrorToClient { origin: &'a RevNat },
    /// The record of the first fragment.
    FirstFragment(Option<&'a Fragment>),
}
