//! Which listener, slot and backend a packet goes to, and which verdict it gets if to none.
//!
//! Written once, over a trait of its look-ups ([`Lookups`]): the packet path looks into its maps, `slb explain` into
//! the same maps from outside and says what it finds on the way ([`Step`]), and tests of the host into maps of their
//! own. What changes a packet is not here, nor what depends on its bytes.
//!
//! ```text
//! to_vip ──► slot settled, or an entry ─────────────────────────► reach ──► delivered
//!    └─────► Begins ──► choose, by_schedule ──► begin ──► remember ─┘
//! concerns ─► error_to_backend, error_to_client       later ─► as the first fragment
//! ```

mod begin;
mod connection;
mod entry;
#[cfg(test)]
mod fixtures;
mod fragment;
mod icmp;
mod policy;
mod rules;
mod schedule;
mod source;
mod step;
#[cfg(test)]
mod tests;

use core::ops::Deref;

pub use begin::{Beginning, Entries, begin};
pub use connection::{
    Connection, PROOF_WINDOW, Rank, Segment, Standing, is_same_prefix, proves, rank,
};
pub use entry::{Entry, Judgement, Peer, Remembered, judge};
pub use fragment::{follows, later, may_be_translated};
pub use icmp::{
    ErrorToBackend, ErrorToClient, Known, Owner, Side, concerns, error_to_backend, error_to_client,
    to_itself, unrelated,
};
pub use policy::{Limit, admit, admit_error, conforms, paid_until};
pub use rules::{
    begins, can_be_reset, delivered, direct_has_ended, fragment_key, is_answered, is_direct,
    is_kept, is_martian, is_open, is_owner, is_until, may_be_encapsulated, proxy_of, source_of,
    unanswered,
};
pub use schedule::{by_schedule, choose, slot};
pub use source::{Martian, check_address, check_backend, check_interfaces, check_source};
pub use step::Step;

use crate::{
    abi::{
        Address, Backend, Endpoint, FlowKey, Fragment, Listener, ListenerFlags, Mode, NO_BACKEND,
        NO_LISTENER_DROP, NO_LISTENER_RESET, NextHop, QuicKey, RevNat, Roles, SLOT_BACKEND,
        SLOT_LOOK, Seed, Sticky,
    },
    hash,
    packet::Packet,
    quic::ConnectionId,
    verdict::Verdict,
};

/// What a decision reads, and what it has to be noted for.
///
/// The packet itself is handed to each function; only what it does not say is asked for here.
pub trait Lookups {
    /// Why a packet goes no further, or why something could not be read.
    type Error: From<Verdict>;
    /// A record of a map: a reference into it, or a copy.
    type Ref<T: 'static>: Deref<Target = T>;
    /// Where a record of `SLB_STICKY` is written again.
    type Kept;

    /// The present: low half of the jiffies.
    fn now(&self) -> u32;
    /// Index of the interface that the packet has come in by.
    fn ingress(&self) -> u32;
    /// The set of that interface ([`crate::abi::Interface::set`]); [`crate::abi::ANY_INTERFACE`]: it has no number.
    ///
    /// # Errors
    ///
    /// The map could not be read.
    fn ingress_set(&self) -> Result<u64, Self::Error>;
    /// Whether the packet's TTL or hop limit lets it go no further than here.
    fn is_last_hop(&self) -> bool;

    /// The slot that [`choose`] has chosen for the packet, or [`crate::abi::NOT_CHOSEN`].
    fn chosen(&self) -> u32;

    /// `SLB_SETTINGS`: [`crate::abi::Settings::no_listener`].
    ///
    /// # Errors
    ///
    /// As for all others: the map could not be read, or contradicts another.
    fn no_listener(&self) -> Result<u32, Self::Error>;
    /// `SLB_ADDRESSES`: what an address is to us.
    ///
    /// # Errors
    ///
    /// As above.
    fn roles(&self, addr: &Address) -> Result<Roles, Self::Error>;
    /// `SLB_SUBNETS`: the interfaces that the subnet of an address is behind; `None`: it is on none.
    ///
    /// # Errors
    ///
    /// As above.
    fn subnet(&self, addr: &Address) -> Result<Option<u64>, Self::Error>;
    /// `SLB_LISTENERS`.
    ///
    /// # Errors
    ///
    /// As above.
    fn listener(&self, to: &Endpoint) -> Result<Option<Self::Ref<Listener>>, Self::Error>;
    /// `SLB_REVNAT`.
    ///
    /// # Errors
    ///
    /// As above.
    fn revnat(&self, from: &Endpoint) -> Result<Option<Self::Ref<RevNat>>, Self::Error>;
    /// `SLB_SLOTS`: the slot of a number of the schedule that begins at `first_chunk`.
    ///
    /// # Errors
    ///
    /// As above.
    fn slot(&self, first_chunk: u32, number: u32) -> Result<u32, Self::Error>;
    /// `SLB_BACKENDS`; `None`: there is none of this index.
    ///
    /// # Errors
    ///
    /// As above.
    fn backend(&self, id: u32) -> Result<Option<Self::Ref<Backend>>, Self::Error>;
    /// [`crate::abi::Filter::bypass_until`].
    fn bypass_until(&self) -> u32;
    /// `SLB_BYPASS`: until when flows of the backend have to be looked for in the flow table, in jiffies, because it
    /// answers a client without a listener; 0: it never has.
    ///
    /// # Errors
    ///
    /// As above.
    fn bypass(&self, backend: u32) -> Result<u32, Self::Error>;

    /// `SLB_RR_CURSORS`: takes a turn of the listener with this id.
    ///
    /// # Errors
    ///
    /// As above.
    fn turn(&mut self, listener: u32) -> Result<u64, Self::Error>;
    /// `SLB_ACTIVE`: how many flows of a backend are active.
    ///
    /// # Errors
    ///
    /// As above.
    fn active(&self, backend: u32) -> Result<u64, Self::Error>;
    /// `SLB_STICKY`: the record of a listener's client, and where it is.
    ///
    /// # Errors
    ///
    /// As above.
    fn kept(
        &mut self,
        listener: &Listener,
        client: &Address,
    ) -> Result<Option<(Sticky, Self::Kept)>, Self::Error>;
    /// Keeps the client with its backend until `expires`, in jiffies.
    fn keep(&mut self, kept: Self::Kept, expires: u32);
    /// Keeps a client that has no record.
    fn stick(&mut self, listener: &Listener, client: &Address, sticky: Sticky);
    /// The QUIC connection ID in the packet.
    fn connection_id(&self, packet: &Packet) -> Option<ConnectionId>;
    /// `SLB_QUIC`: the backend that has issued a connection ID.
    ///
    /// # Errors
    ///
    /// As above.
    fn server(&self, key: QuicKey) -> Result<Option<u32>, Self::Error>;

    /// `SLB_FLOWS`: what the entry of a client's packet says, by [`judge`]. One that is stale is removed, one that is
    /// not has seen another packet.
    ///
    /// # Errors
    ///
    /// [`Verdict::Closed`]; or as above.
    fn entry(&mut self, packet: &Packet, listener: &Listener) -> Result<Entry, Self::Error>;
    /// `SLB_FLOWS`: makes the entries of a flow that begins, and gives the source port towards its backend; `None`:
    /// there is no room.
    ///
    /// # Errors
    ///
    /// [`Verdict::NoPort`]; or as above.
    fn remember(
        &mut self,
        key: &FlowKey,
        backend: u32,
        entries: Entries,
    ) -> Result<Option<u16>, Self::Error>;
    /// `SLB_FLOWS`: whether another flow has the client's port at the backend. `key` is that of the client's packets, `id`
    /// the backend's index.
    ///
    /// # Errors
    ///
    /// As above.
    fn is_taken(&mut self, key: &FlowKey, id: u32, backend: &Backend) -> Result<bool, Self::Error>;
    /// `SLB_FLOWS`: whether packets that may not be this one have an entry.
    ///
    /// # Errors
    ///
    /// As above.
    fn is_known(&self, key: &FlowKey) -> Result<bool, Self::Error>;
    /// `SLB_FLOWS`: the entry of packets that are not this one.
    ///
    /// # Errors
    ///
    /// As above.
    fn known(&self, key: &FlowKey) -> Result<Option<Known>, Self::Error>;
    /// `SLB_FLOWS`: the flow that a backend's answer to `sent` belongs to; `None`: the answer has no entry.
    ///
    /// # Errors
    ///
    /// [`Verdict::NotOurs`]: the flow is none of a listener's, or its client's entry is gone; or as above.
    fn owner(&mut self, sent: &FlowKey) -> Result<Option<Owner>, Self::Error>;
    /// `SLB_FRAGMENTS`: the record that a later fragment may go by, by [`fragment_key`].
    ///
    /// # Errors
    ///
    /// As above.
    fn first_fragment(&mut self, packet: &Packet) -> Result<Option<Fragment>, Self::Error>;

    /// `SLB_ACL`: whether the address is on the list of this number.
    ///
    /// # Errors
    ///
    /// As above.
    fn is_listed(&mut self, acl: u32, addr: &Address) -> Result<bool, Self::Error>;
    /// `SLB_LIMITS`, `SLB_POLICERS` and `SLB_SRC_POLICER`: takes a packet of `source` from what a listener may take.
    ///
    /// # Errors
    ///
    /// [`Verdict::SourceLimit`], [`Verdict::FlowLimit`], [`Verdict::BandwidthLimit`]; or as above.
    fn police(&mut self, listener: u32, source: &Address, limit: Limit) -> Result<(), Self::Error>;
    /// Has a packet to a guarded listener looked at by [`admit`]. `false`: another program does that.
    ///
    /// # Errors
    ///
    /// As [`admit`].
    fn admits(&mut self, packet: &Packet, listener: &Listener) -> Result<bool, Self::Error>;

    /// [`hash::flow`], where code that is called costs less than code that is there once more.
    #[inline(always)]
    fn hash(&self, key: &FlowKey, seed: &Seed) -> u64 {
        hash::flow(key, seed)
    }

    /// Reports a step to `slb explain`. Compiles to nothing in the packet path.
    #[inline(always)]
    fn step(&mut self, _: Step<'_>) {}
}

/// What the filter says of a packet, which may take an address for one of ours, but never the other way round.
#[derive(Clone, Copy, Debug)]
pub struct Filtered {
    /// Roles that the source may have.
    pub from: Roles,
    /// [`crate::abi::Filter::bypass_until`].
    pub bypass_until: u32,
    /// Whether the source may be on a subnet that is not behind the packet's interface.
    pub is_elsewhere: bool,
}

impl Filtered {
    /// Nothing has been asked: all has to be looked up.
    pub const NOT: Self = Self { from: Roles::all(), bypass_until: u32::MAX, is_elsewhere: true };
}

/// Where a packet to a VIP goes.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Course {
    /// Its destination is neither a listener nor a VIP.
    Elsewhere,
    /// [`admit`] has to look at it first.
    Guarded,
    /// To a backend.
    Backend {
        /// Its index.
        id: u32,
        /// Source port towards it.
        port: u16,
        /// [`hash::flow`] of the packet with the listener's seed.
        hash: u64,
        /// Whether a flow begins.
        is_new: bool,
    },
    /// Its entry has a source of ours.
    OwnSource {
        /// [`hash::flow`] of the packet with the listener's seed.
        hash: u64,
    },
    /// It has no entry, and may need one.
    Begins {
        /// [`hash::flow`] of the packet with the listener's seed.
        hash: u64,
        /// Whether [`choose`] comes before [`begin()`].
        chooses: bool,
    },
}

/// A packet whose destination, `to`, may be a VIP.
///
/// # Errors
///
/// A verdict: it goes no further.
#[inline(always)]
pub fn to_vip<L: Lookups>(
    look: &mut L,
    packet: &Packet,
    to: &Endpoint,
    filtered: Filtered,
    is_admitted: bool,
) -> Result<Course, L::Error> {
    let listener = look.listener(to)?;
    if listener.is_none() && !look.roles(&packet.key.dst)?.intersects(Roles::VIP) {
        look.step(Step::Destination { is_vip: false });
        return Ok(Course::Elsewhere);
    }
    look.step(Step::Destination { is_vip: true });
    check_source(look, packet, filtered)?;
    let Some(listener) = listener else {
        look.step(Step::NoListener);
        return Err(no_listener(look.no_listener()?).into());
    };
    look.step(Step::Listener(&listener));
    if !is_admitted
        && listener.flags.intersects(ListenerFlags::GUARDED)
        && !look.admits(packet, &listener)?
    {
        return Ok(Course::Guarded);
    }
    let hash = hash::flow(&packet.key, &listener.seed);
    let mut settled = NO_BACKEND;
    if listener.scheduler.is_by_hash() {
        let choice = hash::choice_by(listener.scheduler, &packet.key, hash, &listener.seed);
        let (number, slot) = slot(look, listener.first_chunk, listener.slots, choice)?;
        let id = slot & SLOT_BACKEND;
        let is_recent = is_recent(look, filtered.bypass_until, id)?;
        // The filter may take a client for a backend, which may need an entry.
        let is_client = !filtered.from.intersects(Roles::BACKEND)
            || !look.roles(&packet.key.src)?.intersects(Roles::BACKEND);
        let slots = listener.slots;
        look.step(Step::Slot { number, slots, slot, is_special: is_recent || !is_client });
        if slot & SLOT_LOOK == 0 && is_client {
            if !is_recent {
                let is_new = packet.is_syn();
                return Ok(Course::Backend { id, port: packet.key.sport, hash, is_new });
            }
            settled = id;
        }
    }
    Ok(match look.entry(packet, &listener)? {
        Entry::Backend { id, port } => Course::Backend { id, port, hash, is_new: false },
        Entry::OwnSource => Course::OwnSource { hash },
        // It has kept its port when it began.
        Entry::None if settled != NO_BACKEND && !begins(packet) => {
            Course::Backend { id: settled, port: packet.key.sport, hash, is_new: false }
        }
        Entry::None => {
            Course::Begins { hash, chooses: listener.flags.intersects(ListenerFlags::CHOOSES) }
        }
    })
}

/// The verdict on a packet to a VIP where there is no listener, by [`crate::abi::Settings::no_listener`].
#[inline(always)]
const fn no_listener(setting: u32) -> Verdict {
    match setting {
        NO_LISTENER_DROP => Verdict::NoListenerDropped,
        NO_LISTENER_RESET => Verdict::Refused,
        _ => Verdict::NoListener,
    }
}

/// Whether a backend has answered a client that talks to it without a listener: then flows through a listener may have
/// got another source port, which their entries say. Nearly always no client talks to any, which `any`,
/// [`crate::abi::Filter::bypass_until`], says.
///
/// # Errors
///
/// The map could not be read.
#[inline(always)]
pub fn is_recent<L: Lookups>(look: &L, any: u32, backend: u32) -> Result<bool, L::Error> {
    Ok(is_until(any, look.now()) && is_until(look.bypass(backend)?, look.now()))
}

/// The backend that was chosen for a packet, if the packet gets there.
///
/// # Errors
///
/// A verdict: it does not.
#[inline(always)]
pub fn reach<L: Lookups>(look: &mut L, id: u32) -> Result<L::Ref<Backend>, L::Error> {
    let Some(backend) = look.backend(id)? else {
        look.step(Step::NoBackend);
        return Err(Verdict::NoBackend.into());
    };
    check_hop(look, &backend)?;
    Ok(backend)
}

/// Whether a packet can be sent to a backend.
///
/// # Errors
///
/// A verdict: it cannot.
#[inline(always)]
pub fn check_hop<L: Lookups>(look: &mut L, backend: &Backend) -> Result<(), L::Error> {
    check_ttl(look, backend.hop)?;
    if backend.mode != Mode::NAT && !backend.hop.is_known() {
        return Err(Verdict::NoNeighbour.into());
    }
    Ok(())
}

/// Whether a packet has a hop left. Without a next hop the kernel checks that.
///
/// # Errors
///
/// [`Verdict::TtlExpired`].
#[inline(always)]
pub fn check_ttl<L: Lookups>(look: &mut L, hop: NextHop) -> Result<(), L::Error> {
    if hop.is_known() && look.is_last_hop() {
        look.step(Step::LastHop);
        return Err(Verdict::TtlExpired.into());
    }
    Ok(())
}
