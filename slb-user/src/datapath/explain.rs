//! What the packet path would do with a packet now, and why: its decision ([`slb_common::decide`]), taken on the values
//! that are in the maps. Here is only what that leaves to those who deliver the packet.

mod lookups;
mod question;
mod text;

use std::net::{IpAddr, SocketAddr};

use aya::maps::{Array, HashMap, LpmTrie, MapData, MapError};
use slb_common::{
    abi::{
        self, Address, Backend, Chunk, ClientNextHop, ConnState, Endpoint, Filter, Flow, FlowKey,
        FlowKind, Fragment, FragmentKey, Interface, Limits, Listed, Listener, Mode, NEXT_HOP_LOCAL,
        NOT_CHOSEN, NextHop, PROXY_NONE, PROXY_V2, Policers, RevNat, RevNatFlags, Roles, Settings,
        SourcePolicer, Sticky, StickyKey, Subnet, TCP,
    },
    decide::{
        self, Beginning, Course, ErrorToBackend, ErrorToClient, Filtered, Limit, Lookups as _, Side,
    },
    hash,
    packet::{FRAGMENT_LATER, Packet},
    verdict::Verdict,
};

use super::{FlowTable, Pins, TableError, maps::open, memory::Memory};
pub use question::{Kind, Part, Question};
use text::name;

/// What would become of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Explanation {
    /// In the order of the packet path.
    pub steps: Vec<Step>,
    /// How it ends; `None`: that depends on what the question does not say, or on what the kernel is asked for.
    pub verdict: Option<Verdict>,
    /// Index of the backend that gets it.
    pub backend: Option<u32>,
    /// Where it is sent to.
    pub to: Option<SocketAddr>,
    /// Source address and port that the backend sees; `None` if they are not decided before.
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
    interfaces: HashMap<MapData, u32, Interface>,
    subnets: LpmTrie<MapData, Subnet, u64>,
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
    source_meters: Array<MapData, SourcePolicer>,
    fragments: HashMap<MapData, FragmentKey, Fragment>,
    next_hops: Array<MapData, ClientNextHop>,
    table: FlowTable,
}

impl Explainer {
    /// Opens the pinned maps, besides `table`.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn open(pins: &Pins, table: FlowTable) -> Result<Self, TableError> {
        Ok(Self {
            listeners: open(pins, "SLB_LISTENERS")?,
            slots: open(pins, "SLB_SLOTS")?,
            cursors: open(pins, "SLB_RR_CURSORS")?,
            interfaces: open(pins, "SLB_INTERFACES")?,
            subnets: open(pins, "SLB_SUBNETS")?,
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
            source_meters: open(pins, "SLB_SRC_POLICER")?,
            fragments: open(pins, "SLB_FRAGMENTS")?,
            next_hops: open(pins, "SLB_NEXT_HOPS")?,
            table,
        })
    }

    /// What would become of a packet. `moment` is the present in jiffies.
    ///
    /// # Errors
    ///
    /// A map cannot be read.
    pub fn explain(&self, question: &Question, moment: u32) -> Result<Explanation, MapError> {
        let packet = question.packet();
        let mut path = Path {
            maps: self,
            question,
            now: moment,
            found: None,
            chosen: NOT_CHOSEN,
            is_drawn: false,
            forgotten: None,
            candidates: Vec::new(),
            told: Explanation::default(),
        };
        let outcome = match question.kind {
            Kind::Error => path.error(&packet),
            Kind::Echo => path.echo(&packet),
            Kind::Transport if packet.fragment == FRAGMENT_LATER => path.later(&packet),
            Kind::Transport => path.transport(&packet),
        };
        path.told.verdict = match outcome {
            Ok(verdict) => Some(verdict),
            Err(End::Verdict(verdict)) => Some(answered(verdict, &packet)),
            Err(End::Unknown) => None,
            Err(End::Map(error)) => return Err(error),
        };
        Ok(path.told)
    }
}

/// The verdict on a packet that the gateway may have to answer.
fn answered(verdict: Verdict, packet: &Packet) -> Verdict {
    let is_reset = match verdict {
        Verdict::Refused => packet.key.proto == TCP,
        verdict => decide::is_answered(verdict),
    };
    if is_reset && !decide::can_be_reset(packet) { decide::unanswered(verdict) } else { verdict }
}

/// Why a packet goes no further.
enum End {
    Verdict(Verdict),
    /// That cannot be told.
    Unknown,
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
struct Path<'a> {
    maps: &'a Explainer,
    question: &'a Question,
    now: u32,
    /// Its entry.
    found: Option<Flow>,
    /// The slot that is chosen by more than the schedule.
    chosen: u32,
    /// Whether the backend may see another port than the client's, which is drawn.
    is_drawn: bool,
    /// The backend whose entry is removed on the way.
    forgotten: Option<u32>,
    /// How loaded the backends are that may be chosen.
    candidates: Vec<String>,
    told: Explanation,
}

impl Path<'_> {
    fn say(&mut self, what: &'static str, found: impl Into<String>) {
        self.told.steps.push(Step { what, found: found.into() });
    }

    /// TCP or UDP, with its ports.
    fn transport(&mut self, packet: &Packet) -> Result<Verdict, End> {
        let filtered = Filtered { bypass_until: self.bypass_until(), ..Filtered::NOT };
        match decide::to_vip(self, packet, &packet.key.destination(), filtered, false)? {
            Course::Elsewhere => self.elsewhere(packet),
            Course::Guarded => Err(Verdict::Inconsistent.into()),
            Course::Backend { id, port, .. } => self.deliver(packet, id, port),
            Course::OwnSource { .. } => match self.found {
                Some(flow) => self.full_nat(packet, flow.backend, Some(&flow)),
                None => Err(Verdict::Inconsistent.into()),
            },
            Course::Begins { hash, chooses } => self.begin(packet, hash, chooses),
        }
    }

    /// To an address that is no VIP.
    fn elsewhere(&mut self, packet: &Packet) -> Result<Verdict, End> {
        if let Some(origin) = self.endpoint(&packet.key.source())? {
            let vip = SocketAddr::new(origin.vip.into(), origin.port as u16);
            let backend = name(origin.backend);
            let of = if origin.flags.intersects(RevNatFlags::SHARED) {
                "for one, as its entry says"
            } else {
                "for it"
            };
            self.say("backend", format!("sent by {backend}, which answers {of}: {vip}"));
            decide::check_backend(self, &origin)?;
            return Err(End::Unknown);
        }
        if self.endpoint(&packet.key.destination())?.is_some() {
            self.say("backend", "the address and port of one: passed as it is");
            return Ok(Verdict::Bypass);
        }
        self.say("backend", "no listener balances to that address and port");
        Ok(Verdict::NotOurs)
    }

    /// What has no entry.
    fn begin(&mut self, packet: &Packet, hash: u64, chooses: bool) -> Result<Verdict, End> {
        let key = &packet.key;
        if chooses && decide::begins(packet) {
            let listener = self.maps.listeners.get(&key.destination(), 0)?;
            self.chosen = decide::choose(self, packet, &listener, hash)?;
        }
        match decide::begin(self, packet, hash)? {
            Beginning::Backend { id, port } => self.deliver(packet, id, port),
            Beginning::OwnSource { id } => self.full_nat(packet, id, None),
        }
    }

    /// To a backend that sees the client's address, and this port.
    fn deliver(&mut self, packet: &Packet, id: u32, port: u16) -> Result<Verdict, End> {
        self.say_backend(id)?;
        let backend = decide::reach(self, id)?;
        if backend.mode == Mode::FULL {
            // A slot that does not look for the entry that it would need.
            return Err(Verdict::NoNeighbour.into());
        }
        (self.told.backend, self.told.to) = (Some(id), Some(addr(&backend)));
        if !self.is_drawn {
            self.told.from = Some(SocketAddr::new(packet.key.src.into(), port));
        }
        Ok(decide::delivered(false, backend.hop.is_known()))
    }

    /// To a backend that sees an address of the gateway: that of its entry, or of the one that it gets.
    fn full_nat(&mut self, packet: &Packet, id: u32, flow: Option<&Flow>) -> Result<Verdict, End> {
        let key = &packet.key;
        let backend = self.maps.backends.get(&id, 0)?;
        self.say_backend(id)?;
        let (source, proxy) = match flow {
            Some(flow) => (flow.source, flow.proxy),
            None => {
                let source =
                    decide::source_of(&backend, self.table_hash(key)?).ok_or(Verdict::NoPort)?;
                (source, decide::proxy_of(key.proto, &backend))
            }
        };
        let source = IpAddr::from(self.maps.sources.get(&source.into(), 0)?);
        match flow {
            Some(flow) => self.say("source", format!("{source} port {}", flow.port)),
            None => self.say("source", format!("{source}, and a port that is free")),
        }
        if !backend.hop.is_known() {
            return Err(Verdict::NoNeighbour.into());
        }
        decide::check_ttl(self, backend.hop)?;
        let is_pending = flow.is_none_or(|flow| flow.state().intersects(ConnState::PROXY_PENDING));
        let is_told = proxy != PROXY_NONE && (is_pending || packet.is_syn());
        let is_cross = backend.addr.is_v4() != packet.is_v4();
        if !decide::may_be_translated(packet, is_told.into(), is_cross) {
            return Err(Verdict::Untranslatable.into());
        }
        if is_told && proxy == PROXY_V2 && !packet.is_syn() {
            self.say("proxy protocol", "the backend has not acknowledged the header yet");
            if flow.is_none_or(|flow| !flow.state().intersects(ConnState::ANSWERED)) {
                return Err(Verdict::BeforeClientAddress.into());
            }
            // By the segment's numbers.
            return Err(End::Unknown);
        }
        (self.told.backend, self.told.to) = (Some(id), Some(addr(&backend)));
        self.told.from = flow.map(|flow| SocketAddr::new(source, flow.port));
        Ok(Verdict::Forwarded)
    }

    /// A fragment without ports.
    fn later(&mut self, packet: &Packet) -> Result<Verdict, End> {
        if self.question.part == Part::Later(None) {
            let is_vip = self.roles(&packet.key.dst)?.intersects(Roles::VIP);
            self.say("fragments", "one whose first has not been seen, without --fragment-id");
            return Ok(if is_vip { Verdict::Fragment } else { Verdict::NotOurs });
        }
        let first = decide::later(self, packet)?;
        let is_reply = first.kind != FlowKind::Original as u32;
        if let Some(backend) = self.backend(first.backend)?
            && !is_reply
        {
            self.police(backend.listener.into(), &packet.key.src, Limit::Bytes)?;
            let is_direct = matches!(first.mode, Mode::NAT | Mode::DSR);
            if !is_direct && !decide::may_be_encapsulated(&backend) {
                return Err(Verdict::NoNeighbour.into());
            }
            (self.told.backend, self.told.to) = (Some(first.backend), Some(addr(&backend)));
        }
        Ok(decide::delivered(is_reply, first.hop.is_known()))
    }

    /// An ICMP error.
    fn error(&mut self, packet: &Packet) -> Result<Verdict, End> {
        let quoted = self.question.key();
        let outcome = match decide::concerns(self, packet, &quoted)? {
            Side::Backend => self.error_to_backend(packet, &quoted),
            Side::Client => self.error_to_client(packet, &quoted),
        };
        if let Err(End::Verdict(Verdict::NotOurs)) = outcome {
            self.say("flow", "none of a listener's");
            let roles = self.roles(&packet.key.dst)?;
            return Err(decide::unrelated(roles.intersects(Roles::VIP)).into());
        }
        outcome
    }

    fn error_to_backend(&mut self, packet: &Packet, quoted: &FlowKey) -> Result<Verdict, End> {
        let ErrorToBackend { backend, id, .. } = decide::error_to_backend(self, packet, quoted)?;
        self.say_backend(id)?;
        (self.told.backend, self.told.to) = (Some(id), Some(addr(&backend)));
        Ok(decide::delivered(false, backend.hop.is_known()))
    }

    fn error_to_client(&mut self, packet: &Packet, quoted: &FlowKey) -> Result<Verdict, End> {
        let ErrorToClient { to, client, .. } = decide::error_to_client(self, packet, quoted)?;
        let hop = self.route(&to.addr, &client)?.ok_or(Verdict::NotOurs)?;
        decide::check_ttl(self, hop)?;
        self.told.to = Some(SocketAddr::new(client.into(), to.sport));
        Ok(decide::delivered(true, hop.is_known()))
    }

    /// An ICMP echo request.
    fn echo(&mut self, packet: &Packet) -> Result<Verdict, End> {
        decide::to_itself(self, packet)?;
        self.say("echo", "answered by the gateway");
        Ok(Verdict::Echo)
    }

    /// The way from a VIP to a client, as far as the packet path knows it; `None`: the client is the gateway itself.
    fn route(&mut self, vip: &Address, client: &Address) -> Result<Option<NextHop>, End> {
        let index = (hash::address(*client) ^ hash::address(*vip)) % abi::MAX_NEXT_HOPS;
        let known = self.maps.next_hops.get(&(index as u32), 0)?;
        let is_known = known.addr == *client
            && known.vip == *vip
            && known.epoch == self.maps.settings.get(&0, 0)?.route_epoch;
        if is_known {
            return Ok((known.flags & NEXT_HOP_LOCAL == 0).then_some(known.hop));
        }
        if self.roles(client)?.intersects(Roles::LOCAL | Roles::VIP) {
            return Ok(None);
        }
        let client = IpAddr::from(*client);
        self.say("route", format!("to {client}: the kernel is asked when the packet is there"));
        Err(End::Unknown)
    }

    fn say_backend(&mut self, id: u32) -> Result<(), End> {
        if let Some(backend) = self.backend(id)? {
            self.say("backend", text::backend(id, &backend));
        }
        Ok(())
    }
}

fn addr(backend: &Backend) -> SocketAddr {
    SocketAddr::new(backend.addr.into(), backend.port as u16)
}
