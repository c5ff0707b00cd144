//! (Layout, health, next hops) → what the maps should hold. Pure.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use slb_common::abi::{
    self, ACL_ALLOW, ACL_DENY, Address, BACKEND_CLOSED, BACKEND_HEALTHY, BACKEND_IN_USE,
    BACKEND_OPTION, BACKEND_PROXY, BACKEND_SHARED, BACKEND_UNHEALTHY, BACKEND_USABLE, Backend,
    Endpoint, Hop, Interface, LISTENER_CHOOSES, LISTENER_GUARDED, LISTENER_LIMITED, Limits,
    MAX_SOURCES, MODE_DSR, MODE_FULL, MODE_GUE, MODE_IPIP, MODE_NAT, NO_BACKEND, NO_SOURCE,
    ORIGIN_CLOSING, ORIGIN_LIMITED, ORIGIN_SHARED, ORIGIN_TRACKED, ORIGIN_WATCHED, Origin, QuicKey,
    ROLE_BACKEND, ROLE_LOCAL, ROLE_VIP, Roles, SLOT_BACKEND,
};
use slb_common::tunnel;

use crate::{
    clock::Jiffies,
    config::{AclMode, AllUnhealthy, ClientAddress, Forwarding, Scheduler},
    health::Health,
    layout::{Layout, Role, Service, Target},
    schedule::{
        Member, maglev, ring,
        transition::{Terms, Transition},
    },
    state::{self, Acl, Policy, Schedule, State},
};

/// Slots of a round-robin schedule at most: any weights of 655 backends exactly.
const RING_LIMIT: usize = 65_536;

/// How long a schedule that nobody has flows of yet waits for the first probes: what is given out
/// before the last of them would only have to move again.
const FIRST_PROBES: Duration = Duration::from_secs(1);

/// Computes states, and remembers the schedules: a table of a thousand backends takes milliseconds,
/// a change concerns few of them, and how a schedule has come about decides how it goes on.
#[derive(Debug, Default)]
pub struct Planner {
    schedules: HashMap<u32, Planned>,
    /// Services that wait for first probes, and until when.
    waiting: HashMap<u32, Instant>,
    /// When the first backend that is drained has to end its flows.
    closes: Option<Instant>,
}

/// The schedule of a service.
#[derive(Debug)]
struct Planned {
    /// [`abi::SCHEDULER_HASH`] or another.
    scheduler: u16,
    members: Vec<Member>,
    /// Backends that the configuration names, usable or not.
    of: usize,
    shared: HashSet<u32>,
    wanted: Vec<u32>,
    way: Way,
    published: Arc<Schedule>,
}

/// How a schedule changes.
#[derive(Debug)]
enum Way {
    /// Slot by slot.
    Hash(Transition),
    /// At once, because every flow has an entry, except for those of a schedule by hash before it:
    /// connections without an entry go by that until then.
    Ring { previous_scheduler: u16, previous: Vec<u32>, until: Instant },
}

/// How a packet leaves for a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextWay {
    /// The neighbour.
    pub hop: Hop,
    /// Largest packet that can be sent, from its IP header on, in bytes.
    pub mtu: u32,
    /// The source that packets of this host's own have.
    pub source: Option<IpAddr>,
}

/// What the state depends on besides the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Circumstances<'a> {
    /// One per target of the layout.
    pub health: &'a [Health],
    /// Backends, by index, that were in use without checks when checking began: they stay in use until their
    /// first probe has ended.
    pub trusted: &'a HashSet<u32>,
    /// The way to each backend's address, as far as known.
    pub ways: &'a HashMap<IpAddr, NextWay>,
    /// Whether XDP is in generic mode somewhere: packets may then be as long as the stack has made
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
    /// The same in jiffies.
    pub moment: u32,
    /// Backends, by index, of which some connections are being reset.
    pub closing: &'a HashSet<u32>,
}

/// One for whom a backend's address and port answer.
struct Owner {
    at: Endpoint,
    vip: Endpoint,
    /// Index into [`Layout::targets`].
    target: usize,
}

impl Planner {
    /// Forgets the schedules of services that are not in `layout`.
    pub fn keep(&mut self, layout: &Layout) {
        let ids: HashSet<u32> = layout.services.iter().map(|service| service.id).collect();
        self.schedules.retain(|id, _| ids.contains(id));
        self.waiting.retain(|id, _| ids.contains(id));
    }

    /// What the maps should hold.
    pub fn desired(&mut self, layout: &Layout, now: Circumstances<'_>) -> State {
        let mut state = State {
            interfaces: now.interfaces.clone(),
            sources: now.installed.sources.clone(),
            ..State::default()
        };
        // Maps are made of these at once, which takes a fraction of what one insertion after the other does.
        let mut addresses: Vec<(Address, u32)> =
            now.locals.iter().map(|&local| (local.into(), ROLE_LOCAL)).collect();
        let mut backends = Vec::with_capacity(layout.targets.len());
        let mut listeners = Vec::with_capacity(layout.services.len());
        let mut first_closes = None::<Instant>;
        let owners = owners(layout);
        let is_shared = shared(&owners, layout.targets.len());
        let mut origin_flags = vec![0; layout.targets.len()];
        for service in &layout.services {
            let targets = &layout.targets[service.targets.clone()];
            let health = &now.health[service.targets.clone()];
            let closes: Vec<Option<u32>> =
                targets.iter().map(|target| closes(service, target, &now)).collect();
            let is_closed = |closes: &Option<u32>| {
                closes.is_some_and(|closes| closes.wrapping_sub(now.moment) as i32 <= 0)
            };
            let mut usable = usable(service, targets, health, now.trusted);
            // One whose time is up has nothing more to keep.
            for (usable, closes) in usable.iter_mut().zip(&closes) {
                *usable &= !is_closed(closes);
            }
            // Whose source is replaced, only an entry says.
            let shared = targets.iter().zip(&is_shared[service.targets.clone()]);
            let shared = shared
                .filter(|&(target, &is_shared)| is_shared || service.mode(target) == MODE_FULL);
            let shared: HashSet<u32> = shared.map(|(target, _)| target.id).collect();
            let nobody = vec![false; targets.len()];
            let waits = self.waits(service, targets, health, &now);
            let candidates = if waits { &nobody } else { &usable };
            // Whose flows have entries in any case.
            let kept = if service.remembers() {
                targets.iter().map(|target| target.id).collect()
            } else {
                shared.clone()
            };
            let schedule = self.schedule(service, targets, candidates, &kept, &now);
            let is_tracked = self.is_tracked(service.id) || service.remembers();
            let policy = policy(service, &mut state, &now);
            for &endpoint in &service.endpoints {
                let schedule = Arc::clone(&schedule);
                let service = state::Service { id: service.id, schedule, policy };
                listeners.push((endpoint, service));
                addresses.push((endpoint.addr, ROLE_VIP));
            }
            // In the order of the targets.
            let mut members = self.members(service.id).iter().peekable();
            let origin_flags = &mut origin_flags[service.targets.clone()];
            for ((((target, &health), &usable), closes), origin_flags) in
                targets.iter().zip(health).zip(&usable).zip(&closes).zip(origin_flags)
            {
                let mut backend = backend(service, target, health, usable, &now);
                (backend.source, backend.sources) = sources(&mut state.sources, target, &now);
                if shared.contains(&target.id) {
                    backend.flags |= BACKEND_SHARED;
                }
                let member = members.next_if(|member| member.id == target.id);
                if member.is_some_and(|member| member.weight > 0) {
                    backend.weight = target.weight as u16;
                }
                backend.closes = closes.unwrap_or(0);
                if is_closed(closes) {
                    backend.flags |= BACKEND_CLOSED;
                } else if let Some(closes) = closes {
                    let left = closes.wrapping_sub(now.moment);
                    let closes = now.now + now.jiffies.to_duration(left + 1);
                    first_closes = Some(first_closes.map_or(closes, |first| first.min(closes)));
                }
                let is_closing =
                    backend.flags & BACKEND_CLOSED != 0 || now.closing.contains(&target.id);
                let is_watched = target.check.as_ref().is_some_and(|(check, _)| check.passive);
                *origin_flags = if is_closing { ORIGIN_CLOSING } else { 0 }
                    | if is_watched { ORIGIN_WATCHED } else { 0 }
                    | if policy.flags & LISTENER_LIMITED != 0 { ORIGIN_LIMITED } else { 0 }
                    | if is_tracked { ORIGIN_TRACKED } else { 0 }
                    | if backend.mode == MODE_FULL { ORIGIN_SHARED } else { 0 };
                state.quic.extend(servers(service, target, &now));
                backends.push((target.id, backend));
                if target.is_answered_here() {
                    addresses.push((backend.addr, ROLE_BACKEND));
                }
            }
        }
        self.closes = first_closes;
        state.listeners = listeners.into_iter().collect();
        state.backends = backends.into_iter().collect();
        state.addresses = roles(addresses);
        let origins = owners.chunk_by(|a, b| a.at == b.at);
        let origins = origins.map(|owners| origin(owners, layout, &origin_flags, now.installed));
        state.endpoints = origins.collect();
        state
    }

    /// Who gets new flows of a service.
    fn members(&self, id: u32) -> &[Member] {
        self.schedules.get(&id).map_or(&[], |planned| &planned.members)
    }

    /// When something changes by itself.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        let due = |planned: &Planned| match &planned.way {
            Way::Hash(transition) => transition.due(),
            Way::Ring { previous, until, .. } => (!previous.is_empty()).then_some(*until),
        };
        let schedules = self.schedules.values().filter_map(due);
        schedules.chain(self.waiting.values().copied()).chain(self.closes).min()
    }

    /// Whether a service is to have no backends yet.
    fn waits(
        &mut self,
        service: &Service,
        targets: &[Target],
        health: &[Health],
        now: &Circumstances<'_>,
    ) -> bool {
        let is_new = !self.schedules.contains_key(&service.id)
            && !service.endpoints.iter().any(|at| now.installed.listeners.contains_key(at));
        if is_new && abi::is_by_hash(scheduler(service, targets)) {
            self.waiting.insert(service.id, now.now + FIRST_PROBES);
        }
        let Some(until) = self.waiting.get(&service.id) else { return false };
        let is_out = |(target, health): (&Target, &Health)| {
            target.check.is_some() && *health == Health::Unknown
        };
        // A primary is taken for healthy until its probes say otherwise.
        let has_primary = targets.iter().any(|target| target.role == Role::Primary);
        let waits = !has_primary && *until > now.now && targets.iter().zip(health).any(is_out);
        if !waits {
            self.waiting.remove(&service.id);
        }
        waits
    }

    /// The schedules some of whose slots a look at the flow table may settle, by the listener's id.
    #[must_use]
    pub fn watched(&self) -> HashMap<u32, Arc<Schedule>> {
        let is_watched = |planned: &&Planned| match &planned.way {
            Way::Hash(transition) => transition.is_watched(),
            Way::Ring { .. } => false,
        };
        let watched = self.schedules.iter().filter(|(_, planned)| is_watched(planned));
        watched.map(|(&id, planned)| (id, Arc::clone(&planned.published))).collect()
    }

    /// Settles the slots of `schedule` whose flows have no entries: all but those in `pinned`.
    pub fn settle(&mut self, id: u32, schedule: &Arc<Schedule>, pinned: &HashSet<usize>) {
        let Some(planned) = self.schedules.get_mut(&id) else { return };
        // Another one by now: the look was in vain.
        if !Arc::ptr_eq(&planned.published, schedule) {
            return;
        }
        if let Way::Hash(transition) = &mut planned.way {
            transition.settle(pinned);
            let published = transition.schedule(&planned.shared);
            // The same pointer as in the maps, if nothing was settled.
            if *planned.published != published {
                planned.published = Arc::new(published);
            }
        }
    }

    /// Whether flows of the listener may have entries that want to know of SYN, FIN and RST.
    fn is_tracked(&self, id: u32) -> bool {
        self.schedules.get(&id).is_some_and(|planned| match &planned.way {
            Way::Hash(transition) => !transition.is_settled(),
            Way::Ring { .. } => true,
        })
    }

    fn schedule(
        &mut self,
        service: &Service,
        targets: &[Target],
        usable: &[bool],
        shared: &HashSet<u32>,
        now: &Circumstances<'_>,
    ) -> Arc<Schedule> {
        let candidates: Vec<&Target> = targets
            .iter()
            .zip(usable)
            .filter_map(|(target, usable)| usable.then_some(target))
            .collect();
        let primary =
            candidates.iter().position(|target| target.role == Role::Primary && target.weight > 0);
        let chosen = match primary {
            Some(primary) => &candidates[primary..=primary],
            None => &candidates[..],
        };
        let member = |target: &&Target| Member {
            id: target.id,
            identity: target.identity,
            weight: match service.scheduler {
                Scheduler::Rr | Scheduler::Wlc => target.weight.min(1),
                _ => target.weight,
            },
        };
        let members: Vec<Member> = chosen.iter().map(member).collect();
        let terms = Terms {
            connections: service.endpoints[0].proto == abi::TCP,
            idle: service.idle_timeout,
            now: now.now,
        };
        let scheduler = scheduler(service, targets);
        let before = self.schedules.remove(&service.id);
        let is_same = before.as_ref().is_some_and(|before| {
            before.scheduler == scheduler
                && before.members == members
                && before.of == named(targets)
                && before.shared == *shared
        });
        let planned = match before {
            Some(before) if is_same && !before.is_due(now.now) => before,
            before => {
                let wanted = match &before {
                    Some(before) if is_same => before.wanted.clone(),
                    _ => wanted(service, targets, &members),
                };
                let unshared: HashSet<u32> = before
                    .iter()
                    .flat_map(|before| before.shared.difference(shared).copied())
                    .collect();
                let is_usable = |id| candidates.iter().any(|target| target.id == id);
                let from = before.map(|before| before.way).or_else(|| {
                    let installed = service.endpoints.iter();
                    let mut installed = installed.filter_map(|at| now.installed.listeners.get(at));
                    let installed = installed.find(|installed| installed.id == service.id)?;
                    Some(Way::restored(&installed.schedule, terms))
                });
                let way = if abi::is_by_hash(scheduler) {
                    Way::hash(from, (scheduler, &wanted), is_usable, &unshared, terms)
                } else {
                    Way::ring(from, terms)
                };
                let published = way.schedule((scheduler, &wanted), shared);
                // If it is the one in the maps, by the same pointer: nobody has to compare them again.
                let mut installed =
                    service.endpoints.iter().filter_map(|at| now.installed.listeners.get(at));
                let known = installed.find(|installed| *installed.schedule == published);
                let published = match known {
                    Some(known) => Arc::clone(&known.schedule),
                    None => Arc::new(published),
                };
                Planned {
                    scheduler,
                    members,
                    of: named(targets),
                    shared: shared.clone(),
                    wanted,
                    way,
                    published,
                }
            }
        };
        let published = Arc::clone(&planned.published);
        self.schedules.insert(service.id, planned);
        published
    }
}

impl Planned {
    fn is_due(&self, now: Instant) -> bool {
        match &self.way {
            Way::Hash(transition) => transition.due().is_some_and(|due| due <= now),
            Way::Ring { previous, until, .. } => !previous.is_empty() && *until <= now,
        }
    }
}

impl Way {
    /// As an earlier agent has left it.
    fn restored(schedule: &Schedule, terms: Terms) -> Self {
        if abi::is_by_hash(schedule.scheduler) {
            return Self::Hash(Transition::restored(schedule, terms));
        }
        let previous = schedule.previous.iter().map(|slot| slot & SLOT_BACKEND).collect();
        let previous_scheduler = schedule.previous_scheduler;
        Self::Ring { previous_scheduler, previous, until: terms.now + terms.idle }
    }

    fn hash(
        from: Option<Self>,
        (scheduler, wanted): (u16, &[u32]),
        is_usable: impl Fn(u32) -> bool,
        unshared: &HashSet<u32>,
        terms: Terms,
    ) -> Self {
        let mut transition = match from {
            None => Transition::new(scheduler, wanted.to_vec()),
            Some(Self::Hash(transition)) => transition,
            Some(Self::Ring { .. }) => Transition::watched(scheduler, wanted.to_vec()),
        };
        transition.watch(unshared);
        transition.advance(terms);
        transition.aim(scheduler, wanted, is_usable, terms);
        Self::Hash(transition)
    }

    fn ring(from: Option<Self>, terms: Terms) -> Self {
        match from {
            Some(ring @ Self::Ring { until, .. }) if until > terms.now => ring,
            Some(Self::Hash(transition)) => Self::Ring {
                previous_scheduler: transition.scheduler(),
                previous: transition.owners().to_vec(),
                until: terms.now + terms.idle,
            },
            _ => Self::Ring {
                previous_scheduler: abi::SCHEDULER_HASH,
                previous: Vec::new(),
                until: terms.now,
            },
        }
    }

    fn schedule(&self, (scheduler, wanted): (u16, &[u32]), shared: &HashSet<u32>) -> Schedule {
        match self {
            Self::Hash(transition) => transition.schedule(shared),
            Self::Ring { previous_scheduler, previous, .. } => Schedule {
                scheduler,
                previous_scheduler: *previous_scheduler,
                slots: wanted.to_vec(),
                previous: previous.clone(),
            },
        }
    }
}

/// How many backends the configuration names.
fn named(targets: &[Target]) -> usize {
    targets.iter().filter(|target| !target.is_departed()).count()
}

/// Whether one backend gets all new flows.
fn is_single(targets: &[Target]) -> bool {
    named(targets) == 1 || targets.iter().any(|target| target.role == Role::Primary)
}

/// What chooses among the slots. Datagrams of a pair do not go by hash: they would stay with the
/// secondary for an idle timeout after the primary has come back.
fn scheduler(service: &Service, targets: &[Target]) -> u16 {
    let is_pair = targets.iter().any(|target| target.role == Role::Primary);
    match service.scheduler {
        _ if is_pair && service.endpoints[0].proto == abi::UDP => abi::SCHEDULER_RING,
        Scheduler::Tch => abi::SCHEDULER_HASH,
        Scheduler::Sch => abi::SCHEDULER_SOURCE,
        Scheduler::Wrr | Scheduler::Rr => abi::SCHEDULER_RING,
        Scheduler::Wlc => abi::SCHEDULER_LEAST,
        Scheduler::Qch => abi::SCHEDULER_QUIC,
    }
}

/// Who is to get new flows, slot by slot.
fn wanted(service: &Service, targets: &[Target], members: &[Member]) -> Vec<u32> {
    if is_single(targets) {
        // Nothing to choose.
        let only = members.iter().find(|member| member.weight > 0);
        return vec![only.map_or(NO_BACKEND, |member| member.id)];
    }
    match service.scheduler {
        Scheduler::Tch | Scheduler::Sch | Scheduler::Qch => {
            // As large for the healthy ones as for all, so that a failure moves as little as it can.
            let size = maglev::size_for(named(targets));
            let table = maglev::table(members, size);
            if table.is_empty() { vec![NO_BACKEND; size] } else { table }
        }
        Scheduler::Wrr | Scheduler::Rr | Scheduler::Wlc => ring::ring(members, RING_LIMIT),
    }
}

/// For whom each backend's address and port answer: those of one side by side, as the layout has them.
fn owners(layout: &Layout) -> Vec<Owner> {
    let mut owners = Vec::with_capacity(layout.targets.len());
    for service in &layout.services {
        for target in service.targets.clone() {
            let backend = &layout.targets[target];
            if backend.is_answered_here() {
                let at = service.origin(backend);
                owners.extend(service.endpoints.iter().map(|&vip| Owner { at, vip, target }));
            }
        }
    }
    owners.sort_by_key(|owner| owner.at);
    owners
}

/// Which targets have an address and port that answers for others as well.
fn shared(owners: &[Owner], targets: usize) -> Vec<bool> {
    let mut shared = vec![false; targets];
    for owners in owners.chunk_by(|a, b| a.at == b.at).filter(|owners| owners.len() > 1) {
        for owner in owners {
            shared[owner.target] = true;
        }
    }
    shared
}

/// For whom an address and port answers, of all its owners; `flags` are each target's.
fn origin(
    owners: &[Owner],
    layout: &Layout,
    flags: &[u32],
    installed: &State,
) -> (Endpoint, Origin) {
    let before = installed.endpoints.get(&owners[0].at);
    let is_before = |owner: &&Owner| {
        before.is_some_and(|origin| (origin.vip, origin.port) == (owner.vip.addr, owner.vip.port))
    };
    // Whoever was there first has flows without entries.
    let Owner { at, vip, target } = owners.iter().find(is_before).unwrap_or(&owners[0]);
    let of_all = ORIGIN_CLOSING | ORIGIN_WATCHED | ORIGIN_LIMITED;
    let of_others = owners.iter().fold(0, |all, owner| all | flags[owner.target] & of_all);
    let shared = if owners.len() > 1 { ORIGIN_SHARED } else { 0 };
    let flags = flags[*target] | of_others | shared;
    let backend = layout.targets[*target].id;
    (*at, Origin { vip: vip.addr, port: vip.port, backend, flags, spare: 0 })
}

/// What each address is.
fn roles(mut addresses: Vec<(Address, u32)>) -> BTreeMap<Address, Roles> {
    addresses.sort_unstable();
    let roles = addresses.chunk_by(|(a, _), (b, _)| a == b).map(|of| {
        let roles = of.iter().fold(0, |all, (_, role)| all | role);
        (of[0].0, Roles { roles })
    });
    roles.collect()
}

impl Target {
    /// Whether its answers come through the gateway.
    fn is_answered_here(&self) -> bool {
        !self.forwarding.is_direct_return()
    }
}

impl Service {
    /// Whether all of its flows have entries, whatever the scheduler: a client's next flow has to find its
    /// backend, and a datagram has nothing else that says whether it begins a flow.
    fn remembers(&self) -> bool {
        let is_udp = self.endpoints[0].proto == abi::UDP;
        self.persistence.is_some() || is_udp && self.limits.new_flows.is_some()
    }

    /// How packets reach a target: between families by another source.
    fn mode(&self, target: &Target) -> u32 {
        let crosses = self.endpoints[0].addr.is_v4() != target.addr.is_ipv4();
        match target.forwarding {
            Forwarding::Nat if crosses => MODE_FULL,
            Forwarding::Nat => MODE_NAT,
            Forwarding::FullNat => MODE_FULL,
            Forwarding::Dsr => MODE_DSR,
            Forwarding::Ipip => MODE_IPIP,
            Forwarding::Gue => MODE_GUE,
        }
    }

    /// What answers of a target come from.
    fn origin(&self, target: &Target) -> Endpoint {
        let (addr, port) = (target.addr.ip().into(), target.addr.port().into());
        Endpoint { addr, port, proto: self.endpoints[0].proto }
    }
}

/// Which targets may get new flows.
fn usable(
    service: &Service,
    targets: &[Target],
    health: &[Health],
    trusted: &HashSet<u32>,
) -> Vec<bool> {
    let healthy: Vec<bool> = targets
        .iter()
        .zip(health)
        .map(|(target, &health)| match (target.role, health) {
            _ if target.is_departed() => false,
            _ if target.check.is_none() => true,
            // The secondary is for when the primary has failed, not for when nobody has looked yet.
            (Role::Primary, health) => health != Health::Unhealthy,
            (_, Health::Unknown) => trusted.contains(&target.id),
            (_, health) => health == Health::Healthy,
        })
        .collect();
    let mut candidates = targets.iter().zip(&healthy).filter(|(target, _)| target.weight > 0);
    if service.all_unhealthy == AllUnhealthy::FailOpen && !candidates.any(|(_, healthy)| *healthy) {
        return targets.iter().map(|target| !target.is_departed()).collect();
    }
    healthy
}

/// What a listener has besides its schedule; lists and limits are put into `state`.
fn policy(service: &Service, state: &mut State, now: &Circumstances<'_>) -> Policy {
    let mut policy = Policy::default();
    if let Some((mode, list)) = &service.acl {
        policy.flags |= LISTENER_GUARDED;
        policy.flags |= match mode {
            AclMode::Allow => ACL_ALLOW,
            AclMode::Deny => ACL_DENY,
        };
        policy.acl = number(list, &mut state.acls, &now.installed.acls);
    }
    if let Some(limits) = limits(service) {
        policy.flags |= LISTENER_GUARDED | LISTENER_LIMITED;
        state.limits.insert(service.id, limits);
    }
    if let Some(persistence) = service.persistence {
        policy.sticky_jiffies = now.jiffies.from_duration(persistence);
    }
    if service.persistence.is_some() || matches!(service.scheduler, Scheduler::Wlc | Scheduler::Qch)
    {
        policy.flags |= LISTENER_CHOOSES;
    }
    policy
}

/// The number of an access list: that of the same list, or one that no list has.
fn number(
    list: &Arc<Acl>,
    wanted: &mut BTreeMap<u32, Arc<Acl>>,
    installed: &BTreeMap<u32, Arc<Acl>>,
) -> u32 {
    let is_it = |(_, known): &(&u32, &Arc<Acl>)| Arc::ptr_eq(known, list) || *known == list;
    // An empty one has no entries that could tell its number.
    if list.is_empty() {
        return 0;
    }
    let known = wanted.iter().find(is_it).or_else(|| installed.iter().find(is_it));
    let number = known.map(|(number, _)| *number);
    let mut free = (1..).filter(|it| !wanted.contains_key(it) && !installed.contains_key(it));
    let number = number.or_else(|| free.next()).unwrap_or_default();
    wanted.entry(number).or_insert_with(|| Arc::clone(list));
    number
}

/// How far a listener may be ahead of its limits: a tenth of a second's worth.
const BURST_NS: u64 = 100_000_000;
const SECOND_NS: u64 = 1_000_000_000;

fn limits(service: &Service) -> Option<Limits> {
    let crate::config::Limits { new_flows, bandwidth } = service.limits;
    let flow_ns = new_flows.map(|flows| SECOND_NS / u64::from(flows));
    let byte_ns = bandwidth.map(|bits| ((8 * SECOND_NS) << 16) / bits);
    (new_flows.is_some() || bandwidth.is_some()).then(|| Limits {
        flow_ns: flow_ns.unwrap_or(0),
        flow_burst: flow_ns.map_or(0, |_| BURST_NS),
        byte_ns: byte_ns.unwrap_or(0),
        byte_burst: byte_ns.map_or(0, |_| BURST_NS),
    })
}

/// When the flows of a target are ended, in jiffies; `None`: not at all.
fn closes(service: &Service, target: &Target, now: &Circumstances<'_>) -> Option<u32> {
    let drain = service.drain.filter(|_| target.drains)?;
    let known = now.installed.backends.get(&target.id).filter(|known| {
        known.flags & BACKEND_IN_USE != 0 && u32::from(known.listener) == service.id
    });
    // 0 has a meaning of its own; a tick more does not matter.
    let since_now = now.moment.wrapping_add(now.jiffies.from_duration(drain)) | 1;
    Some(known.map(|known| known.closes).filter(|closes| *closes != 0).unwrap_or(since_now))
}

/// The entries of a target in `SLB_QUIC`. One that the configuration does not name any more keeps its own.
fn servers(service: &Service, target: &Target, now: &Circumstances<'_>) -> Vec<(QuicKey, u32)> {
    if service.scheduler != Scheduler::Qch {
        return Vec::new();
    }
    let key = |server| QuicKey { listener: service.id, server };
    if !target.is_departed() {
        let server = target.server_id.map(u32::from);
        return server.map(|server| (key(server), target.id)).into_iter().collect();
    }
    let range = key(0)..=key(u32::MAX);
    let known = now.installed.quic.range(range).filter(|(_, backend)| **backend == target.id);
    known.map(|(&key, &backend)| (key, backend)).collect()
}

/// How a target is told who the client is.
const fn told(target: &Target) -> u32 {
    match target.client_address {
        ClientAddress::None => 0,
        ClientAddress::ProxyV2 => BACKEND_PROXY,
        ClientAddress::TcpOption => BACKEND_OPTION,
    }
}

/// What is left of an MTU for the packets that go to a target.
fn inner_mtu(target: &Target, mtu: u32) -> u32 {
    let overhead = match target.forwarding {
        Forwarding::Nat | Forwarding::FullNat | Forwarding::Dsr => 0,
        Forwarding::Ipip => tunnel::overhead(target.addr.is_ipv4(), false),
        Forwarding::Gue => tunnel::overhead(target.addr.is_ipv4(), true),
    };
    mtu.saturating_sub(overhead as u32)
}

/// Where the addresses are that packets to a target may be given as a source: the first index, and how
/// many. What is not there yet is added.
fn sources(
    known: &mut BTreeMap<u32, Address>,
    target: &Target,
    now: &Circumstances<'_>,
) -> (u16, u16) {
    if target.forwarding.is_direct_return() {
        return (NO_SOURCE, 0);
    }
    let own = now.ways.get(&target.addr.ip()).and_then(|way| way.source);
    let wanted: Vec<Address> = match target.sources.as_slice() {
        [] => own.into_iter().map(Address::from).collect(),
        sources => sources.iter().map(|&source| source.into()).collect(),
    };
    let count = wanted.len() as u32;
    if count == 0 {
        return (NO_SOURCE, 0);
    }
    let is_at =
        |first: &u32| (*first..).zip(&wanted).all(|(at, addr)| known.get(&at) == Some(addr));
    let free = known.last_key_value().map_or(u32::from(NO_SOURCE), |(last, _)| *last) + 1;
    let first = (u32::from(NO_SOURCE) + 1..free).find(is_at).unwrap_or(free);
    if (first + count) as usize > MAX_SOURCES {
        return (NO_SOURCE, 0);
    }
    known.extend((first..).zip(wanted));
    (first as u16, count as u16)
}

fn backend(
    service: &Service,
    target: &Target,
    health: Health,
    usable: bool,
    now: &Circumstances<'_>,
) -> Backend {
    let health = match health {
        _ if target.check.is_none() => 0,
        Health::Unknown => 0,
        Health::Healthy => BACKEND_HEALTHY,
        Health::Unhealthy => BACKEND_UNHEALTHY,
    };
    let way = now.ways.get(&target.addr.ip());
    let way = way.filter(|way| now.interfaces.contains_key(&way.hop.ifindex));
    Backend {
        addr: target.addr.ip().into(),
        port: target.addr.port().into(),
        flags: BACKEND_IN_USE | health | told(target) | if usable { BACKEND_USABLE } else { 0 },
        idle_jiffies: now.jiffies.from_duration(service.idle_timeout),
        listener: service.id as u16,
        hop: way.map_or(Hop::KERNEL, |way| way.hop),
        mtu: way.filter(|_| !now.generic).map_or(0, |way| inner_mtu(target, way.mtu)),
        mode: service.mode(target),
        ..Backend::default()
    }
}

#[cfg(test)]
mod tests;
