//! What the packet path would do with a packet now, and why: its steps, taken with the values that are in the maps.
//!
//! The code is that of `slb-ebpf` (`forward.rs`, `policy.rs`, `scheduler.rs`) once more, for one packet and in words; what
//! is computed is shared with it in `slb-common`. A test runs both on ten thousand flows.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    ptr::NonNull,
    sync::atomic::{AtomicU32, Ordering},
};

use aya::maps::{Array, HashMap, LpmTrie, MapData, MapError, lpm_trie::Key};
use slb_common::{
    abi::{
        self, ACL_ALLOW, ACL_DENY, Address, BACKEND_CLOSED, BACKEND_IN_USE, BACKEND_OPTION,
        BACKEND_PROXY, BACKEND_SHARED, BACKEND_UNHEALTHY, BACKEND_USABLE, Backend, CHUNK_SLOTS,
        Chunk, ConnState, Endpoint, FLOW_ORIGINAL, Filter, Flow, FlowKey, LEAST_CANDIDATES,
        LISTENER_CHOOSES, LISTENER_GUARDED, LISTENER_LIMITED, Limits, Listed, Listener, MODE_DSR,
        MODE_FULL, MODE_GUE, MODE_IPIP, MODE_NAT, NO_BACKEND, NO_LISTENER_DROP, NO_LISTENER_RESET,
        NO_SOURCE, Policers, ROLE_BACKEND, ROLE_VIP, RevNat, Roles, SCHEDULER_HASH,
        SCHEDULER_LEAST, SCHEDULER_QUIC, SCHEDULER_SOURCE, SLOT_BACKEND, SLOT_KEEP, SLOT_LOOK,
        Settings, Sticky, StickyKey, TCP, UDP,
    },
    hash,
    verdict::Verdict,
};

use super::{FlowTable, Pins, TableError, maps::open, memory::Memory};

/// A packet that nobody has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// [`TCP`] or [`UDP`].
    pub proto: u32,
    /// Who sends it.
    pub src: SocketAddr,
    /// To whom.
    pub dst: SocketAddr,
    /// TCP: whether it is in the middle of a connection, and not its first.
    pub is_established: bool,
    /// The interface that it comes in by; 0: if a backend sends it, the one towards that backend, otherwise one that no
    /// backend is behind.
    pub ingress: u32,
}

/// What would become of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Explanation {
    /// In the order of the packet path.
    pub steps: Vec<Step>,
    /// How it ends.
    pub verdict: Option<Verdict>,
    /// Index of the backend that gets it.
    pub backend: Option<u32>,
    /// Where it is sent to.
    pub to: Option<SocketAddr>,
    /// Who the backend takes for the sender; `None` if that is not decided before.
    pub from: Option<SocketAddr>,
}

/// One look at something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// At what.
    pub what: &'static str,
    /// What was there.
    pub found: String,
}

/// Opens the maps, and explains.
pub struct Explainer {
    listeners: HashMap<MapData, Endpoint, Listener>,
    slots: Array<MapData, Chunk>,
    cursors: Array<MapData, u64>,
    backends: Array<MapData, Backend>,
    records: Memory<Backend>,
    addresses: HashMap<MapData, Address, Roles>,
    endpoints: HashMap<MapData, Endpoint, RevNat>,
    settings: Array<MapData, Settings>,
    filter: Memory<Filter>,
    direct: Array<MapData, u32>,
    sources: Array<MapData, Address>,
    acls: LpmTrie<MapData, Listed, u32>,
    sticky: HashMap<MapData, StickyKey, Sticky>,
    limits: Array<MapData, Limits>,
    meters: Array<MapData, Policers>,
    table: FlowTable,
}

impl Explainer {
    /// Opens the pinned maps.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn open(pins: &Pins) -> Result<Self, TableError> {
        Ok(Self {
            listeners: open(pins, "SLB_LISTENERS")?,
            slots: open(pins, "SLB_SLOTS")?,
            cursors: open(pins, "SLB_RR_CURSORS")?,
            backends: open(pins, "SLB_BACKENDS")?,
            records: Memory::open(pins, "SLB_BACKENDS")?,
            addresses: open(pins, "SLB_ADDRESSES")?,
            endpoints: open(pins, "SLB_REVNAT")?,
            settings: open(pins, "SLB_SETTINGS")?,
            filter: Memory::open(pins, "SLB_FILTER")?,
            direct: open(pins, "SLB_BYPASS")?,
            sources: open(pins, "SLB_SOURCES")?,
            acls: open(pins, "SLB_ACL")?,
            sticky: open(pins, "SLB_STICKY")?,
            limits: open(pins, "SLB_LIMITS")?,
            meters: open(pins, "SLB_POLICERS")?,
            table: FlowTable::open(pins)?,
        })
    }

    /// What would become of a packet. `moment` is the present in jiffies.
    ///
    /// # Errors
    ///
    /// A map cannot be read.
    pub fn explain(&self, question: &Question, moment: u32) -> Result<Explanation, MapError> {
        let key = FlowKey {
            src: question.src.ip().into(),
            dst: question.dst.ip().into(),
            sport: question.src.port(),
            dport: question.dst.port(),
            proto: question.proto,
        };
        let begins = question.proto == UDP || !question.is_established;
        let mut way = Way {
            maps: self,
            key,
            hash: hash::flow(&key),
            begins,
            is_syn: question.proto == TCP && begins,
            ingress: question.ingress,
            now: moment,
            forgotten: None,
            told: Explanation::default(),
        };
        let verdict = match way.go() {
            Ok(verdict) => verdict,
            Err(End::Verdict(verdict)) => verdict,
            Err(End::Map(error)) => return Err(error),
        };
        way.told.verdict = Some(verdict);
        Ok(way.told)
    }
}

/// Why a packet goes no further.
enum End {
    Verdict(Verdict),
    Map(MapError),
}

impl From<Verdict> for End {
    fn from(verdict: Verdict) -> Self {
        Self::Verdict(verdict)
    }
}

impl From<MapError> for End {
    fn from(error: MapError) -> Self {
        Self::Map(error)
    }
}

/// A packet on its way.
struct Way<'a> {
    maps: &'a Explainer,
    key: FlowKey,
    hash: u64,
    begins: bool,
    is_syn: bool,
    ingress: u32,
    now: u32,
    /// Whose entry is given up on the way.
    forgotten: Option<u32>,
    told: Explanation,
}

impl Way<'_> {
    fn say(&mut self, what: &'static str, found: impl Into<String>) {
        self.told.steps.push(Step { what, found: found.into() });
    }

    fn go(&mut self) -> Result<Verdict, End> {
        let at = self.key.destination();
        let vip = self.roles(self.key.dst)? & ROLE_VIP != 0;
        self.say("address", if vip { "a VIP" } else { "no VIP" });
        let listener = absent(self.maps.listeners.get(&at, 0))?;
        if listener.is_none() && !vip {
            return self.elsewhere();
        }
        let src = self.roles(self.key.src)?;
        if is_martian(self.key.src) || src & ROLE_VIP != 0 {
            self.say("source", "no client's: not an address that a router forwards from, or a VIP");
            return Err(Verdict::Martian.into());
        }
        let Some(listener) = listener else {
            self.say("listener", "none on this port");
            return Ok(match self.settings()?.no_listener {
                NO_LISTENER_DROP => Verdict::NoListenerDropped,
                NO_LISTENER_RESET => Verdict::Refused,
                _ => Verdict::NoListener,
            });
        };
        self.say("listener", format!("number {}, scheduler {}", listener.id, scheduler(&listener)));
        if listener.flags & LISTENER_GUARDED != 0 {
            self.admit(&listener)?;
        }
        if abi::is_by_hash(listener.scheduler) {
            let (number, slot) = self.choice(&listener, listener.scheduler)?;
            let backend = slot & SLOT_BACKEND;
            let settled = slot & SLOT_LOOK == 0;
            let others = self.is_recent(backend)? || src & ROLE_BACKEND != 0;
            let looks = if !settled {
                "its flows may have entries"
            } else if others {
                "settled, but somebody talks to the backend directly, or is one: looks for an entry"
            } else {
                "settled: needs no entry"
            };
            self.say("slot", format!("{number} of {}: {}; {looks}", listener.slots, name(backend)));
            if settled && !others {
                return self.arrive(backend, self.key.sport);
            }
        }
        if let Some(flow) = self.entry(&listener)? {
            return self.remembered(&flow);
        }
        self.begin(&listener, src)
    }

    /// To an address that is no VIP.
    fn elsewhere(&mut self) -> Result<Verdict, End> {
        if absent(self.maps.endpoints.get(&self.key.destination(), 0))?.is_some() {
            self.say("backend", "the address and port of one: passed as it is");
            return Ok(Verdict::Bypass);
        }
        self.say("backend", "nobody balances to that address and port");
        Ok(Verdict::NotOurs)
    }

    /// `policy.rs`.
    fn admit(&mut self, listener: &Listener) -> Result<(), End> {
        if listener.flags & (ACL_ALLOW | ACL_DENY) != 0 {
            let bits = abi::listed_bits(u128::BITS);
            let key = Key::new(bits, abi::listed(listener.acl, self.key.src));
            let is_listed = absent(self.maps.acls.get(&key, 0))?.is_some();
            let allows = listener.flags & ACL_ALLOW != 0;
            let list = if allows { "allows" } else { "denies" };
            let found = if is_listed { "is on it" } else { "is not on it" };
            self.say("access list", format!("number {}, {list}: the client {found}", listener.acl));
            if is_listed != allows {
                return Err(Verdict::Denied.into());
            }
        }
        if listener.flags & LISTENER_LIMITED == 0 {
            return Ok(());
        }
        let limits = self.maps.limits.get(&listener.id, 0)?;
        let meters = self.maps.meters.get(&listener.id, 0)?;
        let now = monotonic().map_err(MapError::from)?;
        let fits = |paid: u64, cost: u64, burst: u64| paid.max(now) + cost - now <= burst + cost;
        let begins = self.is_syn
            || self.key.proto == UDP && self.table().find(&self.key, self.buckets()?).is_none();
        if begins && limits.flow_ns != 0 {
            let passes = fits(meters.flows, limits.flow_ns, limits.flow_burst);
            let rate = 1_000_000_000 / limits.flow_ns;
            self.say("limit", format!("{rate} new flows a second: {}", outcome(passes)));
            if !passes {
                return Err(Verdict::FlowLimit.into());
            }
        }
        if let Some(bits) = (8_000_000_000_u64 << 16).checked_div(limits.byte_ns) {
            let passes = fits(meters.forward, 0, limits.byte_burst);
            self.say("limit", format!("{bits} bits a second: {}", outcome(passes)));
            if !passes {
                return Err(Verdict::BandwidthLimit.into());
            }
        }
        Ok(())
    }

    /// Number and value of the slot that a hash chooses.
    fn choice(&self, listener: &Listener, by: u16) -> Result<(u32, u32), End> {
        if listener.slots == 0 {
            return Err(Verdict::NoBackend.into());
        }
        let choice = hash::choice_by(by, &self.key, self.hash);
        let number = hash::slot(choice, listener.slots);
        Ok((number, self.slot(listener.first_chunk, number)?))
    }

    fn slot(&self, first_chunk: u32, number: u32) -> Result<u32, End> {
        let chunk = self.maps.slots.get(&(first_chunk + number / CHUNK_SLOTS as u32), 0)?;
        Ok(chunk.slots[number as usize % CHUNK_SLOTS])
    }

    fn entry(&mut self, listener: &Listener) -> Result<Option<Flow>, End> {
        let Some(flow) = self.table().find(&self.key, self.buckets()?) else {
            self.say("flow table", "no entry");
            return Ok(None);
        };
        let backend = self.maps.backends.get(&flow.backend, 0)?;
        let fits = match flow.source {
            NO_SOURCE => backend.mode != MODE_FULL,
            _ => matches!(backend.mode, MODE_FULL | MODE_NAT),
        };
        let is_out = if listener.scheduler == SCHEDULER_QUIC {
            backend.flags & (BACKEND_UNHEALTHY | BACKEND_CLOSED) != 0
        } else {
            backend.flags & BACKEND_USABLE == 0
        };
        let begins_anew = flow.kind == FLOW_ORIGINAL
            && self.begins
            && (is_out
                || abi::age(self.now, flow.expires) > 0
                || self.is_syn
                    && flow.state().intersects(
                        ConnState::FIN_ORIGINAL | ConnState::RESET | ConnState::RST_PENDING,
                    ));
        if !fits || begins_anew {
            let text = format!("an entry for {} that does not count any more", name(flow.backend));
            self.say("flow table", text);
            self.forgotten = (!flow.state().has_ended()).then_some(flow.backend);
            return Ok(None);
        }
        Ok(Some(flow))
    }

    fn remembered(&mut self, flow: &Flow) -> Result<Verdict, End> {
        let state = match flow.state() {
            state if state.intersects(ConnState::RST_PENDING) => "ended by the agent",
            state if state.has_ended() => "ended",
            state if state.intersects(ConnState::ESTABLISHED) => "established",
            _ => "opening",
        };
        self.say("flow table", format!("an entry, {state}: {}", name(flow.backend)));
        if flow.state().intersects(ConnState::RST_PENDING) {
            return Ok(Verdict::Closed);
        }
        if flow.source != NO_SOURCE {
            return self.full(flow.backend, Some(flow));
        }
        self.arrive(flow.backend, flow.port)
    }

    /// `forward::begin`, and `scheduler.rs` before it.
    fn begin(&mut self, listener: &Listener, src: u32) -> Result<Verdict, End> {
        let slot = if self.begins && listener.flags & LISTENER_CHOOSES != 0 {
            self.choose(listener)?
        } else {
            self.by_schedule(listener)?
        };
        let id = slot & SLOT_BACKEND;
        if id == NO_BACKEND {
            self.say("backend", "none takes new flows");
            return Err(Verdict::NoBackend.into());
        }
        let backend = self.maps.backends.get(&id, 0)?;
        if backend.flags & BACKEND_CLOSED != 0 && !self.begins {
            self.say("backend", format!("{}, drained: its time is up", name(id)));
            return Ok(Verdict::Closed);
        }
        if backend.flags & (BACKEND_PROXY | BACKEND_OPTION) != 0 && !self.begins {
            self.say(
                "backend",
                format!("{} is told the client's address only as a connection begins", name(id)),
            );
            return Ok(Verdict::Reset);
        }
        if backend.mode == MODE_FULL {
            return self.full(id, None);
        }
        if backend.mode == MODE_NAT && src & ROLE_BACKEND != 0 {
            let ingress = self.ingress();
            if ingress != 0 && backend.hop.ifindex == ingress {
                let text = format!(
                    "a backend, behind interface {ingress} like {}: sees an address of the gateway",
                    name(id)
                );
                self.say("source", text);
                return self.full(id, None);
            }
        }
        let is_hash = abi::is_by_hash(listener.scheduler)
            && !(self.begins && listener.flags & LISTENER_CHOOSES != 0);
        let is_shared = backend.flags & BACKEND_SHARED != 0 || self.is_recent(id)?;
        if slot & SLOT_KEEP == 0 && !is_shared {
            return self.arrive(id, self.key.sport);
        }
        if self.table().is_full(&self.key, self.buckets()?, self.now) {
            self.say("flow table", "no room in its bucket");
            if !is_hash || backend.flags & BACKEND_SHARED != 0 {
                return Err(Verdict::TableFull.into());
            }
        } else {
            self.say("flow table", "gets an entry");
        }
        if is_shared {
            let text = "the backend serves others as well: another port if the client's is taken";
            self.say("source", text);
            let verdict = self.arrive(id, self.key.sport)?;
            self.told.from = None;
            return Ok(verdict);
        }
        self.arrive(id, self.key.sport)
    }

    /// `scheduler::by_schedule`.
    fn by_schedule(&mut self, listener: &Listener) -> Result<u32, End> {
        if !self.begins && listener.previous_slots != 0 {
            let by = listener.previous_scheduler;
            let number =
                hash::slot(hash::choice_by(by, &self.key, self.hash), listener.previous_slots);
            let slot = self.slot(listener.previous_chunk, number)?;
            if slot & SLOT_BACKEND != NO_BACKEND {
                let text =
                    format!("slot {number} of the schedule before: {}", name(slot & SLOT_BACKEND));
                self.say("schedule", text);
                return Ok(slot | SLOT_KEEP);
            }
        }
        if abi::is_by_hash(listener.scheduler) {
            let (number, slot) = self.choice(listener, listener.scheduler)?;
            self.say("schedule", format!("slot {number}: {}", name(slot & SLOT_BACKEND)));
            return Ok(slot);
        }
        if listener.slots == 0 {
            return Err(Verdict::NoBackend.into());
        }
        if !self.begins && listener.slots != 1 {
            self.say(
                "schedule",
                "in turn, which says nothing about a connection that is not known",
            );
            return Err(Verdict::Reset.into());
        }
        if listener.scheduler == SCHEDULER_QUIC {
            let (number, slot) = self.choice(listener, SCHEDULER_HASH)?;
            let text = format!(
                "slot {number}: {}; a QUIC packet goes by its connection ID instead",
                name(slot & SLOT_BACKEND)
            );
            self.say("schedule", text);
            return Ok(slot);
        }
        let turn = self.turn(listener)?;
        let slot = self.slot(listener.first_chunk, turn)?;
        self.say(
            "schedule",
            format!("turn {turn} of {}: {}", listener.slots, name(slot & SLOT_BACKEND)),
        );
        Ok(slot | SLOT_KEEP)
    }

    fn turn(&self, listener: &Listener) -> Result<u32, End> {
        let turn = self.maps.cursors.get(&listener.id, 0)?;
        Ok((turn % u64::from(listener.slots)) as u32)
    }

    /// `scheduler.rs`.
    fn choose(&mut self, listener: &Listener) -> Result<u32, End> {
        if listener.sticky_jiffies != 0 {
            let key = StickyKey { client: self.key.src, listener: listener.id, spare: 0 };
            let known = absent(self.maps.sticky.get(&key, 0))?;
            if let Some(sticky) = known.filter(|sticky| abi::age(self.now, sticky.expires) == 0) {
                let backend = self.maps.backends.get(&sticky.backend, 0)?;
                const OPEN: u32 = BACKEND_IN_USE | BACKEND_USABLE;
                let is_open = u32::from(backend.listener) == listener.id
                    && backend.flags & (OPEN | BACKEND_CLOSED) == OPEN
                    && backend.weight != 0;
                let found =
                    if is_open { "where the client stays" } else { "which is not usable any more" };
                self.say("persistence", format!("{}, {found}", name(sticky.backend)));
                if is_open {
                    return Ok(sticky.backend | SLOT_KEEP);
                }
            } else {
                self.say("persistence", "the client has none");
            }
        }
        if listener.scheduler != SCHEDULER_LEAST {
            let slot = self.by_schedule(listener)?;
            return Ok(if listener.sticky_jiffies != 0 || listener.scheduler == SCHEDULER_QUIC {
                slot | SLOT_KEEP
            } else {
                slot
            });
        }
        if listener.slots == 0 {
            return Err(Verdict::NoBackend.into());
        }
        let turn = self.turn(listener)?;
        let mut found: Option<(u32, u64, u64)> = None;
        let mut seen = Vec::new();
        for step in 0..LEAST_CANDIDATES.min(listener.slots) {
            let slot = self.slot(listener.first_chunk, turn.wrapping_add(step) % listener.slots)?;
            let id = slot & SLOT_BACKEND;
            if id == NO_BACKEND {
                continue;
            }
            let weight = u64::from(self.maps.backends.get(&id, 0)?.weight);
            let forgotten = u64::from(self.forgotten == Some(id));
            let active = self.table().active(id).saturating_sub(forgotten);
            seen.push(format!("{} has {active} for weight {weight}", name(id)));
            let flows = active + 1;
            let is_less = |&(_, least, of): &(u32, u64, u64)| flows * of < least * weight;
            if found.as_ref().is_none_or(is_less) {
                found = Some((slot | SLOT_KEEP, flows, weight));
            }
        }
        let (slot, ..) = found.ok_or(Verdict::NoBackend)?;
        self.say(
            "schedule",
            format!("{}: {} is least loaded", seen.join(", "), name(slot & SLOT_BACKEND)),
        );
        Ok(slot)
    }

    /// How it gets there.
    fn arrive(&mut self, id: u32, port: u16) -> Result<Verdict, End> {
        if id as usize >= abi::MAX_BACKENDS {
            self.say("backend", "none takes new flows");
            return Err(Verdict::NoBackend.into());
        }
        let backend = self.maps.backends.get(&id, 0)?;
        let how = match backend.mode {
            MODE_DSR => "as it is (dsr)",
            MODE_IPIP => "in ipip",
            MODE_GUE => "in gue",
            _ => "by nat",
        };
        let (to, is_known) = (addr(&backend), backend.hop.is_known());
        let hop = if is_known {
            format!("interface {}", backend.hop.ifindex)
        } else {
            "not known".to_owned()
        };
        self.say("backend", format!("{} at {to}, {how}; next hop: {hop}", name(id)));
        if backend.mode != MODE_NAT && !is_known {
            return Err(Verdict::NoNeighbour.into());
        }
        (self.told.backend, self.told.to) = (Some(id), Some(to));
        self.told.from = Some(SocketAddr::new(self.key.src.into(), port));
        Ok(if is_known { Verdict::Forwarded } else { Verdict::ForwardedByKernel })
    }

    /// `full_nat.rs`.
    fn full(&mut self, id: u32, flow: Option<&Flow>) -> Result<Verdict, End> {
        let backend = self.maps.backends.get(&id, 0)?;
        let to = addr(&backend);
        self.say("backend", format!("{} at {to}, by full-nat", name(id)));
        let source = match flow {
            Some(flow) => flow.source,
            None if backend.sources == 0 => return Err(Verdict::NoPort.into()),
            None => backend.source + hash::slot(self.hash as u32, backend.sources.into()) as u16,
        };
        let source = IpAddr::from(self.maps.sources.get(&source.into(), 0)?);
        match flow {
            Some(flow) => self.say("source", format!("{source} port {}", flow.port)),
            None => self.say("source", format!("{source}, and a port that is free")),
        }
        if !backend.hop.is_known() {
            return Err(Verdict::NoNeighbour.into());
        }
        (self.told.backend, self.told.to) = (Some(id), Some(to));
        self.told.from = flow.map(|flow| SocketAddr::new(source, flow.port));
        Ok(Verdict::Forwarded)
    }

    /// The interface that the packet comes in by, if its source is a backend's address.
    fn ingress(&self) -> u32 {
        if self.ingress != 0 {
            return self.ingress;
        }
        let records = (0..self.maps.records.len()).filter_map(|id| self.maps.records.element(id));
        let hop_of = |record: NonNull<Backend>| {
            let record = record.as_ptr();
            // SAFETY: in the mapping, which lives as long as the map. The agent may write to it meanwhile: the words are
            // read one by one, and any bytes are a valid address.
            let (addr, ifindex) = unsafe {
                (
                    (&raw const (*record).addr).read_volatile(),
                    (&raw const (*record).hop.ifindex).read_volatile(),
                )
            };
            (addr == self.key.src && ifindex != 0).then_some(ifindex)
        };
        records.into_iter().find_map(hop_of).unwrap_or(0)
    }

    fn roles(&self, addr: Address) -> Result<u32, MapError> {
        Ok(absent(self.maps.addresses.get(&addr, 0))?.unwrap_or_default().roles)
    }

    fn settings(&self) -> Result<Settings, MapError> {
        self.maps.settings.get(&0, 0)
    }

    fn buckets(&self) -> Result<u32, MapError> {
        Ok(self.settings()?.buckets)
    }

    const fn table(&self) -> &FlowTable {
        &self.maps.table
    }

    /// Whether somebody may be talking to a backend directly.
    fn is_recent(&self, backend: u32) -> Result<bool, MapError> {
        let is_until = |until: u32| until != 0 && abi::age(self.now, until) == 0;
        if backend as usize >= abi::MAX_BACKENDS {
            return Ok(false);
        }
        let filter = self.maps.filter.first().as_ptr();
        // SAFETY: a word of the mapping, which lives as long as the map and is accessed by atomics only.
        let any = unsafe { AtomicU32::from_ptr(&raw mut (*filter).bypass_until) };
        Ok(is_until(any.load(Ordering::Relaxed)) && is_until(self.maps.direct.get(&backend, 0)?))
    }
}

/// What is not there is an answer, too.
fn absent<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The clock of the meters, in nanoseconds.
fn monotonic() -> io::Result<u64> {
    let clock = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    Ok(std::time::Duration::from(clock).as_nanos() as u64)
}

fn scheduler(listener: &Listener) -> &'static str {
    match listener.scheduler {
        SCHEDULER_HASH => "by hash of the 4-tuple",
        SCHEDULER_SOURCE => "by hash of the source",
        SCHEDULER_LEAST => "fewest flows",
        SCHEDULER_QUIC => "by QUIC connection ID",
        _ => "in turn",
    }
}

const fn outcome(passes: bool) -> &'static str {
    if passes { "not reached" } else { "exceeded" }
}

/// What steps call a backend; the API puts its name there.
#[must_use]
pub fn name(backend: u32) -> String {
    if backend == NO_BACKEND { "nobody".to_owned() } else { format!("#{backend}") }
}

fn addr(backend: &Backend) -> SocketAddr {
    SocketAddr::new(backend.addr.into(), backend.port as u16)
}

/// `forward::is_martian`.
fn is_martian(src: Address) -> bool {
    match IpAddr::from(src) {
        IpAddr::V4(v4) => {
            let [first, second, ..] = v4.octets();
            matches!(first, 0 | 127 | 224..) || (first == 169 && second == 254)
        }
        IpAddr::V6(v6) => {
            v6.is_unspecified()
                || v6.is_loopback()
                || v6.is_multicast()
                || v6.is_unicast_link_local()
        }
    }
}
