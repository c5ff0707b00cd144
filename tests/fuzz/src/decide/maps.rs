//! The maps, in memory.

use std::{
    collections::{self, hash_map::DefaultHasher},
    hash::BuildHasherDefault,
};

use slb_common::{
    abi::{
        Address, Backend, BackendFlags, ConnState, Endpoint, FLOW_ORIGINAL, Flow, FlowKey,
        Fragment, FragmentKey, Listener, Mode, NO_PLACE, NO_SOURCE, NOT_CHOSEN, QuicKey, RevNat,
        RevNatFlags, Roles, Sticky,
    },
    decide::{self, Entries, Entry, Judgement, Known, Limit, Lookups, Owner, Remembered},
    packet::Packet,
    quic::ConnectionId,
    verdict::Verdict,
};

use super::site::{self, BACKENDS, LAN, LIST, MOST_FLOWS, ROWS, SOURCES, Source, row};

/// In the same order in each run, as libFuzzer runs an input again.
pub(crate) type HashMap<K, V> = collections::HashMap<K, V, BuildHasherDefault<DefaultHasher>>;

/// All that a decision looks up.
pub(crate) struct Maps {
    pub(crate) now: u32,
    pub(crate) ingress: u32,
    pub(crate) is_last_hop: bool,
    pub(crate) chosen: u32,
    pub(crate) no_listener: u32,
    pub(crate) backends: Vec<Backend>,
    slots: Vec<u32>,
    sources: Vec<(Address, &'static Source)>,
    cursors: HashMap<u32, u64>,
    pub(crate) flows: HashMap<FlowKey, Flow>,
    /// Whether there is no room for another flow.
    pub(crate) is_full: bool,
    /// Whether another flow has each client's port at the backends.
    pub(crate) is_taken: bool,
    /// Until when backends talk to clients without a listener.
    pub(crate) bypass_until: u32,
    pub(crate) sticky: HashMap<(u32, Address), Sticky>,
    pub(crate) connection_id: Option<ConnectionId>,
    pub(crate) fragments: HashMap<FragmentKey, Fragment>,
    taken: HashMap<u32, u32>,
}

impl Maps {
    pub(crate) fn new() -> Self {
        Self {
            now: 1_000,
            ingress: site::WAN,
            is_last_hop: false,
            chosen: NOT_CHOSEN,
            no_listener: 0,
            backends: site::backends(),
            slots: site::slots(),
            sources: SOURCES.iter().flatten().map(|it| (site::address(it.addr), it)).collect(),
            cursors: HashMap::default(),
            flows: HashMap::default(),
            is_full: false,
            is_taken: false,
            bypass_until: 0,
            sticky: HashMap::default(),
            connection_id: None,
            fragments: HashMap::default(),
            taken: HashMap::default(),
        }
    }

    pub(crate) fn source(&self, addr: &Address) -> Option<&'static Source> {
        self.sources.iter().find(|(it, _)| it == addr).map(|&(_, source)| source)
    }

    /// How many flows of a backend are active.
    pub(crate) fn flows_of(&self, id: u32) -> u64 {
        let active = self.flows.values().filter(|flow| flow.backend == id);
        active.filter(|flow| flow.state().is_active()).count() as u64
    }
}

impl Lookups for Maps {
    type Error = Verdict;
    type Ref<T: 'static> = Box<T>;
    type Kept = (u32, Address);

    fn now(&self) -> u32 {
        self.now
    }

    fn ingress(&self) -> u32 {
        self.ingress
    }

    fn ingress_set(&self) -> Result<u64, Verdict> {
        Ok(1 << self.ingress)
    }

    fn is_last_hop(&self) -> bool {
        self.is_last_hop
    }

    fn chosen(&self) -> u32 {
        self.chosen
    }

    fn no_listener(&self) -> Result<u32, Verdict> {
        Ok(self.no_listener)
    }

    fn roles(&self, addr: &Address) -> Result<Roles, Verdict> {
        let is_backend = self.backends.iter().any(|backend| backend.addr == *addr);
        let roles = self.source(addr).map_or(Roles::empty(), |source| source.roles);
        Ok(if is_backend { roles | Roles::BACKEND } else { roles })
    }

    fn subnet(&self, addr: &Address) -> Result<Option<u64>, Verdict> {
        let own = site::own(usize::from(!addr.is_v4()));
        let bytes = if addr.is_v4() { 15 } else { 6 };
        Ok((addr.bytes[..bytes] == own.bytes[..bytes]).then_some(1 << LAN))
    }

    fn listener(&self, to: &Endpoint) -> Result<Option<Box<Listener>>, Verdict> {
        let family = usize::from(!to.addr.is_v4());
        let row = (to.port as usize).wrapping_sub(usize::from(site::port(0)));
        let is_there = to.addr == site::vip(family)
            && ROWS.get(row).is_some_and(|listener| listener.proto == to.proto);
        Ok(is_there.then(|| Box::new(site::listener(row, family))))
    }

    fn revnat(&self, from: &Endpoint) -> Result<Option<Box<RevNat>>, Verdict> {
        let is_it = |it: &&Backend| it.addr == from.addr && it.port == from.port;
        let Some(backend) = self.backends.iter().find(is_it) else { return Ok(None) };
        let (row, family) = (backend.listener as usize / 2, backend.listener as usize % 2);
        let is_shared =
            backend.flags.intersects(BackendFlags::SHARED) || backend.mode == Mode::FULL;
        let mut flags = RevNatFlags::empty();
        flags.set(RevNatFlags::SHARED, is_shared);
        flags.set(RevNatFlags::LIMITED, row == row::LIMITED);
        let vip = site::vip(family);
        let first = u32::from(backend.listener) * BACKENDS;
        let backend = (first..).find(|&id| self.backends[id as usize].addr == from.addr);
        let (port, backend) = (site::port(row).into(), backend.unwrap_or(first));
        let origin = RevNat { vip, port, backend, flags, ingress: LAN, interfaces: 1 << LAN };
        Ok((ROWS[row].proto == from.proto).then(|| Box::new(origin)))
    }

    fn slot(&self, first_chunk: u32, number: u32) -> Result<u32, Verdict> {
        self.slots.get((first_chunk + number) as usize).copied().ok_or(Verdict::Inconsistent)
    }

    fn backend(&self, id: u32) -> Result<Option<Box<Backend>>, Verdict> {
        Ok(self.backends.get(id as usize).copied().map(Box::new))
    }

    fn bypass_until(&self) -> u32 {
        self.bypass_until
    }

    fn bypass(&self, _: u32) -> Result<u32, Verdict> {
        Ok(self.bypass_until)
    }

    fn turn(&mut self, listener: u32) -> Result<u64, Verdict> {
        let cursor = self.cursors.entry(listener).or_default();
        *cursor += 1;
        Ok(*cursor - 1)
    }

    fn active(&self, backend: u32) -> Result<u64, Verdict> {
        Ok(self.flows_of(backend))
    }

    fn kept(
        &mut self,
        listener: &Listener,
        client: &Address,
    ) -> Result<Option<(Sticky, Self::Kept)>, Verdict> {
        let key = (listener.id, *client);
        Ok(self.sticky.get(&key).map(|sticky| (*sticky, key)))
    }

    fn keep(&mut self, kept: Self::Kept, expires: u32) {
        if let Some(sticky) = self.sticky.get_mut(&kept) {
            sticky.expires = expires;
        }
    }

    fn stick(&mut self, listener: &Listener, client: &Address, sticky: Sticky) {
        self.sticky.insert((listener.id, *client), sticky);
    }

    fn connection_id(&self, _: &Packet) -> Option<ConnectionId> {
        self.connection_id
    }

    /// Servers are numbered from 1 as the listener's backends are.
    fn server(&self, key: QuicKey) -> Result<Option<u32>, Verdict> {
        let is_there = (1..=BACKENDS).contains(&key.server);
        Ok(is_there.then(|| key.listener * BACKENDS + key.server - 1))
    }

    fn entry(&mut self, packet: &Packet, listener: &Listener) -> Result<Entry, Verdict> {
        let Some(flow) = self.flows.get_mut(&packet.key) else { return Ok(Entry::None) };
        let remembered = Remembered::from(&*flow);
        let backend = &self.backends[flow.backend as usize];
        match decide::judge(self.now, packet, listener, &remembered, backend) {
            Judgement::Stale => {
                self.flows.remove(&packet.key);
                Ok(Entry::None)
            }
            Judgement::Closed => Err(Verdict::Closed),
            Judgement::Valid => {
                flow.expires = self.now.wrapping_add(backend.idle_jiffies);
                Ok(Entry::of(&remembered))
            }
        }
    }

    fn remember(
        &mut self,
        key: &FlowKey,
        backend: u32,
        entries: Entries,
    ) -> Result<Option<u16>, Verdict> {
        if self.is_full {
            return Ok(None);
        }
        let is_own = entries == Entries::OwnSource;
        let flow = Flow {
            tag: 2,
            expires: self.now.wrapping_add(self.backends[backend as usize].idle_jiffies),
            src: key.src,
            dst: key.dst,
            sport: key.sport,
            dport: key.dport,
            backend,
            proto: key.proto as u8,
            kind: FLOW_ORIGINAL,
            state: ConnState::empty().bits(),
            proxy: decide::proxy_of(key.proto, &self.backends[backend as usize]),
            port: if entries == Entries::Forward { key.sport } else { !key.sport },
            source: if is_own { 1 } else { NO_SOURCE },
            peer: NO_PLACE,
            sequence: 0,
        };
        self.flows.insert(*key, flow);
        Ok(Some(flow.port))
    }

    fn is_taken(&mut self, _: &FlowKey, _: u32, _: &Backend) -> Result<bool, Verdict> {
        Ok(self.is_taken)
    }

    fn is_known(&self, key: &FlowKey) -> Result<bool, Verdict> {
        Ok(self.flows.contains_key(key))
    }

    fn known(&self, key: &FlowKey) -> Result<Option<Known>, Verdict> {
        let known = |flow: &Flow| {
            let Flow { backend, port, source, .. } = *flow;
            Known { place: 0, backend, port, source }
        };
        Ok(self.flows.get(key).map(known))
    }

    fn owner(&mut self, sent: &FlowKey) -> Result<Option<Owner>, Verdict> {
        let own = site::own(usize::from(!sent.dst.is_v4()));
        let is_it = |flow: &&Flow| {
            let backend = &self.backends[flow.backend as usize];
            let from = if flow.source == NO_SOURCE { flow.src } else { own };
            let to = (backend.addr, backend.port, u32::from(flow.proto));
            (from, flow.port) == (sent.src, sent.sport)
                && to == (sent.dst, u32::from(sent.dport), sent.proto)
        };
        let owner = |flow: &Flow| {
            let Flow { backend, source, .. } = *flow;
            Owner { place: 3, key: flow.key(), backend, source }
        };
        Ok(self.flows.values().find(is_it).map(owner))
    }

    fn first_fragment(&mut self, packet: &Packet) -> Result<Option<Fragment>, Verdict> {
        Ok(self.fragments.get(&decide::fragment_key(packet)).copied())
    }

    fn is_listed(&mut self, acl: u32, addr: &Address) -> Result<bool, Verdict> {
        Ok(acl == LIST && self.source(addr).is_some_and(|source| source.is_denied))
    }

    fn police(&mut self, listener: u32, _: &Address, limit: Limit) -> Result<(), Verdict> {
        if limit != Limit::Flows {
            return Ok(());
        }
        let taken = self.taken.entry(listener).or_default();
        if *taken == MOST_FLOWS {
            return Err(Verdict::FlowLimit);
        }
        *taken += 1;
        Ok(())
    }

    fn admits(&mut self, _: &Packet, _: &Listener) -> Result<bool, Verdict> {
        Ok(false)
    }
}
