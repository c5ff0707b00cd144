//! Plans what the maps should hold, from the configuration, health and next hops. Pure: no clock, no sockets.
//!
//! | file | plans |
//! | --- | --- |
//! | `schedules` | which backend gets which slot, and how a schedule changes without moving flows |
//! | `listeners` | access list, limits, persistence |
//! | `backends` | the record of a backend |
//! | `origins` | the listener that a backend's replies belong to |

mod backends;
mod listeners;
mod origins;
mod schedules;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Instant,
};

use slb_common::abi::{
    Address, BACKEND_CLOSED, BACKEND_SHARED, Backend, Endpoint, Interface, LISTENER_LIMITED, Mode,
    NextHop, REVNAT_CLOSING, REVNAT_LIMITED, REVNAT_SHARED, REVNAT_TRACKED, REVNAT_WATCHED,
    ROLE_BACKEND, ROLE_LOCAL, ROLE_VIP, Roles,
};

use self::{
    origins::Owner,
    schedules::{Candidates, Schedules},
};
use crate::{
    clock::Jiffies,
    health::Health,
    layout::{Layout, Service, Target},
    schedule::Member,
    state::{self, Policy, Schedule, State},
};

/// Plans states, one after the other, and remembers the schedules between them.
#[derive(Debug, Default)]
pub struct Planner {
    schedules: Schedules,
    /// When the first drained backend has to end its flows.
    closes: Option<Instant>,
}

/// How packets leave for a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextWay {
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
    /// One per target of the layout.
    pub health: &'a [Health],
    /// Backends, by index, that were in use without checks when checking began: they stay in use until their
    /// first probe has ended.
    pub trusted: &'a HashSet<u32>,
    /// The way to each backend's address, as far as known.
    pub ways: &'a HashMap<IpAddr, NextWay>,
    /// Whether XDP is in generic mode on some interface: packets may then be as long as the stack has made
    /// them, and are cut on their way out.
    pub generic: bool,
    /// By index.
    pub interfaces: &'a BTreeMap<u32, Interface>,
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
    pub closing: &'a HashSet<u32>,
}

impl Planner {
    /// Forgets the schedules of services that are not in `layout`.
    pub fn keep(&mut self, layout: &Layout) {
        self.schedules.keep(layout);
    }

    /// What the maps should hold.
    pub fn desired(&mut self, layout: &Layout, inputs: Inputs<'_>) -> State {
        let mut draft = Draft::new(layout, inputs);
        for service in &layout.services {
            let members = Members::new(service, &draft);
            let schedule = self.schedule(service, &members, &inputs);
            let policy = listeners::policy(service, &mut draft.state, &inputs);
            draft.add_listener(service, &schedule, policy);
            let of_replies = OriginFlags {
                tracked: self.schedules.is_tracked(service.id) || service.remembers(),
                limited: policy.flags & LISTENER_LIMITED != 0,
            };
            draft.add_backends(service, &members, self.schedules.members(service.id), of_replies);
        }
        self.closes = draft.first_closes;
        draft.finish()
    }

    fn schedule(
        &mut self,
        service: &Service,
        members: &Members<'_>,
        inputs: &Inputs<'_>,
    ) -> Arc<Schedule> {
        let Members { targets, health, usable, shared, .. } = members;
        let none = vec![false; targets.len()];
        let waits = self.schedules.waits(service, targets, health, inputs);
        let candidates = Candidates {
            targets,
            usable: if waits { &none } else { usable },
            with_entries: if service.remembers() {
                targets.iter().map(|target| target.id).collect()
            } else {
                shared.clone()
            },
        };
        self.schedules.update(service, &candidates, inputs)
    }

    /// When the state changes without an event from outside.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.schedules.due().into_iter().chain(self.closes).min()
    }

    /// The schedules some of whose slots a look at the flow table may settle, by the listener's id.
    #[must_use]
    pub fn watched(&self) -> HashMap<u32, Arc<Schedule>> {
        self.schedules.watched()
    }

    /// Settles the slots of `schedule` whose flows have no entries: all but those in `pinned`.
    pub fn settle(&mut self, id: u32, schedule: &Arc<Schedule>, pinned: &HashSet<usize>) {
        self.schedules.settle(id, schedule, pinned);
    }
}

/// The backends of a service, and what is decided of each; one element per target.
struct Members<'a> {
    targets: &'a [Target],
    health: &'a [Health],
    /// When its flows are ended, in jiffies.
    closes: Vec<Option<u32>>,
    /// Whether it may get new flows.
    usable: Vec<bool>,
    /// Backends, by index, whose replies only an entry can assign: their address answers for several
    /// listeners, or they see a source address of the gateway.
    shared: HashSet<u32>,
}

impl<'a> Members<'a> {
    fn new(service: &Service, draft: &Draft<'a>) -> Self {
        let range = || service.targets.clone();
        let targets = &draft.layout.targets[range()];
        let health = &draft.inputs.health[range()];
        let closes: Vec<_> =
            targets.iter().map(|target| backends::closes(service, target, &draft.inputs)).collect();
        let mut usable = backends::usable(service, targets, health, draft.inputs.trusted);
        for (usable, closes) in usable.iter_mut().zip(&closes) {
            *usable &= !is_closed(*closes, &draft.inputs);
        }
        let shared = targets.iter().zip(&draft.is_shared[range()]);
        let shared =
            shared.filter(|(target, is_shared)| **is_shared || service.mode(target) == Mode::Full);
        let shared = shared.map(|(target, _)| target.id).collect();
        Self { targets, health, closes, usable, shared }
    }
}

/// Whether the time to end the flows of a backend has come.
fn is_closed(closes: Option<u32>, inputs: &Inputs<'_>) -> bool {
    closes.is_some_and(|closes| closes.wrapping_sub(inputs.moment) as i32 <= 0)
}

/// What the record of replies has to say for all backends of a service.
#[derive(Clone, Copy)]
struct OriginFlags {
    /// Entries want to know of SYN, FIN and RST.
    tracked: bool,
    /// The listener has a limit of bandwidth or flows.
    limited: bool,
}

/// A state that is being planned.
struct Draft<'a> {
    layout: &'a Layout,
    inputs: Inputs<'a>,
    state: State,
    owners: Vec<Owner>,
    /// One per target: whether its address and port answer for other listeners as well.
    is_shared: Vec<bool>,
    /// One per target: what its record of replies says.
    origin_flags: Vec<u32>,
    // Maps are made of these at once, which takes a fraction of the time of single insertions.
    addresses: Vec<(Address, u32)>,
    listeners: Vec<(Endpoint, state::Service)>,
    backends: Vec<(u32, Backend)>,
    first_closes: Option<Instant>,
}

impl<'a> Draft<'a> {
    fn new(layout: &'a Layout, inputs: Inputs<'a>) -> Self {
        let owners = origins::owners(layout);
        Self {
            state: State {
                interfaces: inputs.interfaces.clone(),
                sources: inputs.installed.sources.clone(),
                ..State::default()
            },
            is_shared: origins::shared(&owners, layout.targets.len()),
            owners,
            origin_flags: vec![0; layout.targets.len()],
            addresses: inputs.locals.iter().map(|&local| (local.into(), ROLE_LOCAL)).collect(),
            listeners: Vec::with_capacity(layout.services.len()),
            backends: Vec::with_capacity(layout.targets.len()),
            first_closes: None,
            layout,
            inputs,
        }
    }

    fn add_listener(&mut self, service: &Service, schedule: &Arc<Schedule>, policy: Policy) {
        for &endpoint in &service.endpoints {
            let schedule = Arc::clone(schedule);
            self.listeners.push((endpoint, state::Service { id: service.id, schedule, policy }));
            self.addresses.push((endpoint.addr, ROLE_VIP));
        }
    }

    /// `scheduled` are the members of the service's schedule, in the order of its targets.
    fn add_backends(
        &mut self,
        service: &Service,
        members: &Members<'_>,
        scheduled: &[Member],
        of_replies: OriginFlags,
    ) {
        let mut scheduled = scheduled.iter().peekable();
        for (place, target) in members.targets.iter().enumerate() {
            let member = scheduled.next_if(|member| member.id == target.id);
            let backend = self.backend(service, members, place, member);
            self.origin_flags[service.targets.start + place] =
                self.origin_flags(target, &backend, of_replies);
            self.state.quic.extend(backends::servers(service, target, &self.inputs));
            if target.is_answered_here() {
                self.addresses.push((backend.addr, ROLE_BACKEND));
            }
            self.backends.push((target.id, backend));
        }
    }

    fn backend(
        &mut self,
        service: &Service,
        members: &Members<'_>,
        place: usize,
        member: Option<&Member>,
    ) -> Backend {
        let (target, inputs) = (&members.targets[place], &self.inputs);
        let (health, usable) = (members.health[place], members.usable[place]);
        let mut backend = backends::backend(service, target, health, usable, inputs);
        (backend.source, backend.sources) =
            backends::sources(&mut self.state.sources, target, inputs);
        if members.shared.contains(&target.id) {
            backend.flags |= BACKEND_SHARED;
        }
        if member.is_some_and(|member| member.weight > 0) {
            backend.weight = target.weight as u16;
        }
        let closes = members.closes[place];
        backend.closes = closes.unwrap_or(0);
        if is_closed(closes, inputs) {
            backend.flags |= BACKEND_CLOSED;
        } else if let Some(closes) = closes {
            let left = closes.wrapping_sub(inputs.moment);
            let at = inputs.now + inputs.jiffies.to_duration(left + 1);
            self.first_closes = Some(self.first_closes.map_or(at, |first| first.min(at)));
        }
        backend
    }

    fn origin_flags(&self, target: &Target, backend: &Backend, of_replies: OriginFlags) -> u32 {
        let is_closing =
            backend.flags & BACKEND_CLOSED != 0 || self.inputs.closing.contains(&target.id);
        let is_watched = target.check.as_ref().is_some_and(|(check, _)| check.passive);
        let flags = [
            (is_closing, REVNAT_CLOSING),
            (is_watched, REVNAT_WATCHED),
            (of_replies.limited, REVNAT_LIMITED),
            (of_replies.tracked, REVNAT_TRACKED),
            (backend.mode() == Some(Mode::Full), REVNAT_SHARED),
        ];
        flags.iter().filter(|(is_set, _)| *is_set).fold(0, |all, (_, flag)| all | flag)
    }

    fn finish(self) -> State {
        let owners = self.owners.chunk_by(|a, b| a.at == b.at);
        let origins = owners.map(|owners| {
            origins::origin(owners, self.layout, &self.origin_flags, self.inputs.installed)
        });
        State {
            endpoints: origins.collect(),
            listeners: self.listeners.into_iter().collect(),
            backends: self.backends.into_iter().collect(),
            addresses: roles(self.addresses),
            ..self.state
        }
    }
}

/// All roles of each address.
fn roles(mut addresses: Vec<(Address, u32)>) -> BTreeMap<Address, Roles> {
    addresses.sort_unstable();
    let roles = addresses.chunk_by(|(a, _), (b, _)| a == b).map(|of| {
        let roles = of.iter().fold(0, |all, (_, role)| all | role);
        (of[0].0, Roles { roles })
    });
    roles.collect()
}
