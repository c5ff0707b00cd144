//! Plans what the maps should hold, from the configuration, health and next hops. Pure: no clock, no sockets.
//!
//! | file | plans |
//! | --- | --- |
//! | `basis` | which listeners have to be planned again |
//! | `schedules` | which backend gets which slot, and how a schedule changes without moving flows |
//! | `listeners` | access list, limits, persistence |
//! | `backends` | the record of a backend |
//! | `origins` | the listener that a backend's replies belong to |
//! | `ingress` | the interfaces that packets come by |

mod backends;
mod basis;
mod ingress;
mod listeners;
mod origins;
mod schedules;
mod sharing;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Instant};

use rustc_hash::{FxHashMap, FxHashSet};
use slb_common::abi::{
    Address, Backend, BackendFlags, Endpoint, Interface, ListenerFlags, Mode, NextHop, RevNatFlags,
    Roles, Seed,
};

pub use ingress::interfaces;

use self::{
    basis::Basis,
    origins::Origins,
    schedules::{Candidates, Schedules},
    sharing::Sharing,
};
use crate::{
    clock::Jiffies,
    health::Health,
    ids::{Ids, IndexedBackend, IndexedListener},
    net::Ingress,
    schedule::Member,
    state::{self, Policy, Schedule, State},
};

/// Plans states, one after the other, and remembers the schedules between them.
#[derive(Debug, Default)]
pub struct Planner {
    schedules: Schedules,
    /// When the first drained backend of a listener has to end its flows, by the listener's id.
    closes: FxHashMap<u32, Instant>,
    sharing: Sharing,
    last: Option<Last>,
}

/// The last plan, as far as the next one can build on it.
#[derive(Debug)]
struct Last {
    basis: Basis,
    origins: Origins,
}

/// How packets leave for a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendRoute {
    /// The neighbour.
    pub hop: NextHop,
    /// Largest packet that can be sent, from its IP header on, in bytes.
    pub mtu: u32,
    /// The source address of packets that this host itself sends there.
    pub source: Option<IpAddr>,
}

/// What the state depends on besides the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// One per element of [`Ids::backends`].
    pub health: &'a [Health],
    /// Backends, by index, that were in use without checks when checking began: they stay in use until their
    /// first probe has ended.
    pub trusted: &'a FxHashSet<u32>,
    /// The way to each backend's address, as far as known.
    pub routes: &'a FxHashMap<IpAddr, BackendRoute>,
    /// Whether XDP is in generic mode on some interface: packets may then be as long as the stack has made
    /// them, and are cut on their way out.
    pub generic: bool,
    /// By index.
    pub interfaces: &'a BTreeMap<u32, Interface>,
    /// What the kernel knows about where packets come from.
    pub ingress: &'a Arc<Ingress>,
    /// Addresses of the gateway itself.
    pub locals: &'a [IpAddr],
    /// Converts timeouts.
    pub jiffies: Jiffies,
    /// What the maps hold.
    pub installed: &'a State,
    /// The present.
    pub now: Instant,
    /// The present in jiffies.
    pub moment: u32,
    /// Backends, by index, of which some connections are being reset.
    pub closing: &'a FxHashSet<u32>,
    /// With what schedules are made.
    pub seed: Seed,
}

impl Planner {
    /// Forgets the schedules of listeners that are not in `ids`.
    pub fn keep(&mut self, ids: &Ids) {
        self.schedules.keep(ids);
    }

    /// What the maps should hold.
    pub fn desired(&mut self, ids: &Arc<Ids>, inputs: Inputs<'_>) -> State {
        self.closes.clear();
        let basis = Basis::new(ids, &inputs);
        let origins = Origins::new(ids, &mut self.sharing, &inputs);
        let state = self.draw(basis, origins, 0..ids.listeners.len(), inputs);
        State { addresses: addresses(ids, &inputs), ..state }
    }

    /// The part of [`Planner::desired`] that may differ from the last plan; all else is as it was. `None`: all of it may.
    ///
    /// [`Inputs::installed`] must be what the last plan has led to, with nothing written since.
    pub fn desired_part(&mut self, ids: &Arc<Ids>, inputs: Inputs<'_>) -> Option<State> {
        let Last { basis: before, origins } = self.last.take()?;
        if self.sharing.due().is_some_and(|due| due <= inputs.now) {
            return None;
        }
        let basis = Basis::new(ids, &inputs);
        let mut changed = basis.changed_since(&before)?;
        for (changed, listener) in changed.iter_mut().zip(&ids.listeners) {
            *changed |= self.closes.contains_key(&listener.id)
                || self.schedules.is_outdated(listener.id, inputs.now);
        }
        let changed = (0..ids.listeners.len()).filter(|&listener| changed[listener]);
        Some(self.draw(basis, origins, changed, inputs))
    }

    /// Plans these listeners, by index.
    fn draw(
        &mut self,
        basis: Basis,
        origins: Origins,
        listeners: impl Iterator<Item = usize>,
        inputs: Inputs<'_>,
    ) -> State {
        let ids = Arc::clone(&basis.ids);
        let mut draft = Draft::new(&ids, inputs, origins);
        let listeners: Vec<_> = listeners.map(|index| &ids.listeners[index]).collect();
        let members: Vec<_> = listeners.iter().map(|it| Members::new(it, &draft)).collect();
        let candidates = listeners.iter().zip(&members);
        let candidates =
            candidates.map(|(listener, members)| self.candidates(listener, members, &inputs));
        let candidates = candidates.collect();
        let schedules = self.schedules.update(candidates, &inputs);
        for ((listener, members), schedule) in listeners.into_iter().zip(&members).zip(schedules) {
            let policy = listeners::policy(listener, &mut draft.state, &inputs);
            draft.add_listener(listener, &schedule, policy);
            let of_replies = OriginFlags {
                tracked: self.schedules.is_tracked(listener.id) || listener.remembers(),
                limited: policy.flags.intersects(ListenerFlags::LIMITED),
            };
            let scheduled = self.schedules.members(listener.id);
            match draft.add_backends(listener, members, scheduled, of_replies) {
                Some(closes) => drop(self.closes.insert(listener.id, closes)),
                None => drop(self.closes.remove(&listener.id)),
            }
        }
        let (state, origins) = draft.finish();
        self.last = Some(Last { basis, origins });
        state
    }

    fn candidates<'a>(
        &mut self,
        listener: &'a IndexedListener,
        members: &Members<'a>,
        inputs: &Inputs<'_>,
    ) -> Candidates<'a> {
        let Members { backends, health, usable, shared, .. } = members;
        let waits = self.schedules.waits(listener, backends, health, inputs);
        Candidates {
            listener,
            backends,
            usable: if waits { vec![false; backends.len()] } else { usable.clone() },
            with_entries: if listener.remembers() {
                backends.iter().map(|backend| backend.id).collect()
            } else {
                shared.clone()
            },
        }
    }

    /// When the state changes without an event from outside.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        let closes = self.closes.values().copied();
        self.schedules.due().into_iter().chain(self.sharing.due()).chain(closes).min()
    }

    /// The schedules some of whose slots a look at the flow table may settle, by the listener's id.
    #[must_use]
    pub fn watched(&self) -> FxHashMap<u32, Arc<Schedule>> {
        self.schedules.watched()
    }

    /// Settles the slots of `schedule` whose flows have no entries: all but those in `pinned`.
    pub fn settle(&mut self, id: u32, schedule: &Arc<Schedule>, pinned: &FxHashSet<usize>) {
        self.schedules.settle(id, schedule, pinned);
    }
}

/// The backends of a listener, and what is decided of each; one element per backend.
struct Members<'a> {
    backends: &'a [IndexedBackend],
    health: &'a [Health],
    /// When its flows are ended, in jiffies.
    closes: Vec<Option<u32>>,
    /// Whether it may get new flows.
    usable: Vec<bool>,
    /// Backends, by index, whose replies only an entry can assign: their address answers for several
    /// listeners, or they see a source address of the gateway.
    shared: FxHashSet<u32>,
}

impl<'a> Members<'a> {
    fn new(listener: &IndexedListener, draft: &Draft<'a>) -> Self {
        let range = || listener.backends.clone();
        let backends = &draft.ids.backends[range()];
        let health = &draft.inputs.health[range()];
        let closes: Vec<_> = backends
            .iter()
            .map(|backend| backends::closes(listener, backend, &draft.inputs))
            .collect();
        let mut usable = backends::usable(listener, backends, health, draft.inputs.trusted);
        for (usable, closes) in usable.iter_mut().zip(&closes) {
            *usable &= !is_closed(*closes, &draft.inputs);
        }
        let shared = backends.iter().zip(draft.origins.are_shared(range()));
        let shared = shared
            .filter(|(backend, is_shared)| **is_shared || listener.mode(backend) == Mode::FULL);
        let shared = shared.map(|(backend, _)| backend.id).collect();
        Self { backends, health, closes, usable, shared }
    }
}

/// Whether the time to end the flows of a backend has come.
fn is_closed(closes: Option<u32>, inputs: &Inputs<'_>) -> bool {
    closes.is_some_and(|closes| closes.wrapping_sub(inputs.moment) as i32 <= 0)
}

/// What the record of replies has to say for all backends of a listener.
#[derive(Clone, Copy)]
struct OriginFlags {
    /// Entries want to know of SYN, FIN and RST.
    tracked: bool,
    /// The listener has a limit of bandwidth or flows.
    limited: bool,
}

/// A state that is being planned.
struct Draft<'a> {
    ids: &'a Ids,
    inputs: Inputs<'a>,
    state: State,
    origins: Origins,
    // Maps are made of these at once, which takes a fraction of the time of single insertions.
    listeners: Vec<(Endpoint, state::ListenerState)>,
    backends: Vec<(u32, Backend)>,
}

impl<'a> Draft<'a> {
    fn new(ids: &'a Ids, inputs: Inputs<'a>, origins: Origins) -> Self {
        Self {
            state: State {
                interfaces: inputs.interfaces.clone(),
                macs: ingress::macs(inputs.ingress),
                subnets: ingress::subnets(inputs.ingress, inputs.interfaces),
                sources: inputs.installed.sources.clone(),
                ..State::default()
            },
            origins,
            listeners: Vec::new(),
            backends: Vec::new(),
            ids,
            inputs,
        }
    }

    fn add_listener(
        &mut self,
        listener: &IndexedListener,
        schedule: &Arc<Schedule>,
        policy: Policy,
    ) {
        for &endpoint in &listener.endpoints {
            let schedule = Arc::clone(schedule);
            self.listeners
                .push((endpoint, state::ListenerState { id: listener.id, schedule, policy }));
        }
    }

    /// `scheduled` are the members of the listener's schedule, in the order of its backends. Gives the time when the
    /// first of them that is drained has to end its flows.
    fn add_backends(
        &mut self,
        listener: &IndexedListener,
        members: &Members<'_>,
        scheduled: &[Member],
        of_replies: OriginFlags,
    ) -> Option<Instant> {
        let mut scheduled = scheduled.iter().peekable();
        for (place, indexed) in members.backends.iter().enumerate() {
            let member = scheduled.next_if(|member| member.id == indexed.id);
            let backend = self.backend(listener, members, place, member);
            let flags = self.origin_flags(indexed, &backend, of_replies);
            self.origins.set(listener.backends.start + place, flags);
            self.state.quic.extend(backends::servers(listener, indexed, &self.inputs));
            self.backends.push((indexed.id, backend));
        }
        let closes = members.closes.iter().flatten();
        let closes = closes.filter(|closes| !is_closed(Some(**closes), &self.inputs));
        let left = closes.map(|closes| closes.wrapping_sub(self.inputs.moment)).min()?;
        Some(self.inputs.now + self.inputs.jiffies.to_duration(left + 1))
    }

    fn backend(
        &mut self,
        listener: &IndexedListener,
        members: &Members<'_>,
        place: usize,
        member: Option<&Member>,
    ) -> Backend {
        let (indexed, inputs) = (&members.backends[place], &self.inputs);
        let (health, usable) = (members.health[place], members.usable[place]);
        let mut backend = backends::backend(listener, indexed, health, usable, inputs);
        (backend.source, backend.sources) =
            backends::sources(&mut self.state.sources, indexed, inputs);
        if members.shared.contains(&indexed.id) {
            backend.flags |= BackendFlags::SHARED;
        }
        if member.is_some_and(|member| member.weight > 0) {
            backend.weight = indexed.weight as u16;
        }
        let closes = members.closes[place];
        backend.closes = closes.unwrap_or(0);
        if is_closed(closes, inputs) {
            backend.flags |= BackendFlags::CLOSED;
        }
        backend
    }

    fn origin_flags(
        &self,
        backend: &IndexedBackend,
        record: &Backend,
        of_replies: OriginFlags,
    ) -> RevNatFlags {
        let is_closing = record.flags.intersects(BackendFlags::CLOSED)
            || self.inputs.closing.contains(&backend.id);
        let is_watched = backend.check.as_ref().is_some_and(|(check, _)| check.passive);
        let flags = [
            (is_closing, RevNatFlags::CLOSING),
            (is_watched, RevNatFlags::WATCHED),
            (of_replies.limited, RevNatFlags::LIMITED),
            (of_replies.tracked, RevNatFlags::TRACKED),
            (record.mode == Mode::FULL, RevNatFlags::SHARED),
        ];
        flags.iter().filter(|(is_set, _)| *is_set).map(|&(_, flag)| flag).collect()
    }

    /// The state, and the origins for the next one.
    fn finish(mut self) -> (State, Origins) {
        let state = State {
            endpoints: self.origins.take_changed(self.ids, &self.inputs),
            listeners: self.listeners.into_iter().collect(),
            backends: self.backends.into_iter().collect(),
            ..self.state
        };
        (state, self.origins)
    }
}

/// All roles of each address.
fn addresses(ids: &Ids, inputs: &Inputs<'_>) -> BTreeMap<Address, Roles> {
    let vips = ids.listeners.iter().flat_map(|listener| &listener.endpoints);
    let vips = vips.map(|endpoint| (endpoint.addr, Roles::VIP));
    let backends = ids.backends.iter().filter(|backend| backend.is_answered_here());
    let backends = backends.map(|backend| (backend.addr.ip().into(), Roles::BACKEND));
    let own = ingress::addresses(inputs);
    let mut addresses: Vec<(Address, Roles)> = vips.chain(backends).chain(own).collect();
    addresses.sort_unstable_by_key(|&(addr, _)| addr);
    let roles = addresses
        .chunk_by(|(a, _), (b, _)| a == b)
        .map(|of| (of[0].0, of.iter().map(|&(_, roles)| roles).collect()));
    roles.collect()
}
