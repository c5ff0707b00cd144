//! Maps of the host, with one listener, and packets to it.

use std::{
    boxed::Box,
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    vec::Vec,
};

use super::*;
use crate::{
    abi::{BackendFlags, Flow, NOT_CHOSEN, Scheduler, TCP},
    packet::TcpFlags,
};

pub(super) const NOW: u32 = 1_000;
pub(super) const WAN: u32 = 1;
pub(super) const LAN: u32 = 2;
pub(super) const VIP: &str = "203.0.113.10:80";
pub(super) const CLIENT: &str = "198.51.100.7:40000";
pub(super) const HOST: &str = "10.0.0.11:40000";
pub(super) const OWN: &str = "10.0.0.1:40000";
pub(super) const BROADCAST: &str = "10.0.0.255:40000";
pub(super) const USABLE: BackendFlags = BackendFlags::IN_USE.union(BackendFlags::USABLE);
pub(super) const KNOWN: NextHop = NextHop { ifindex: LAN, ..NextHop::UNRESOLVED };

/// The maps, with one listener at [`VIP`] whose backends are numbered from 0.
#[derive(Default)]
pub(super) struct Maps {
    pub(super) listener: Listener,
    pub(super) backends: Vec<Backend>,
    pub(super) slots: Vec<u32>,
    pub(super) previous: Vec<u32>,
    pub(super) turn: u64,
    /// In place of [`NOT_CHOSEN`].
    pub(super) chosen: Option<u32>,
    pub(super) active: BTreeMap<u32, u64>,
    pub(super) bypass: BTreeMap<u32, u32>,
    /// Whether another flow has the client's port.
    pub(super) is_taken: bool,
    pub(super) sticky: Option<Sticky>,
    pub(super) entry: Option<Flow>,
    /// The entries that were made.
    pub(super) made: Option<Entries>,
    pub(super) is_full: bool,
    pub(super) revnat: Option<RevNat>,
    pub(super) fragment: Option<Fragment>,
    pub(super) listed: bool,
    pub(super) exceeded: Option<Limit>,
    pub(super) no_listener: u32,
    pub(super) is_last_hop: bool,
    pub(super) connection_id: Option<ConnectionId>,
    /// The interfaces that the subnet of [`CLIENT`] is behind.
    pub(super) subnet: Option<u64>,
}

/// Where the slots of the schedule before begin.
pub(super) const PREVIOUS: u32 = 7;

impl Lookups for Maps {
    type Error = Verdict;
    type Ref<T: 'static> = Box<T>;
    type Kept = ();

    fn now(&self) -> u32 {
        NOW
    }

    fn ingress(&self) -> u32 {
        LAN
    }

    fn ingress_set(&self) -> Result<u64, Verdict> {
        Ok(1 << LAN)
    }

    fn is_last_hop(&self) -> bool {
        self.is_last_hop
    }

    fn chosen(&self) -> u32 {
        self.chosen.unwrap_or(NOT_CHOSEN)
    }

    fn no_listener(&self) -> Result<u32, Verdict> {
        Ok(self.no_listener)
    }

    fn roles(&self, addr: &Address) -> Result<Roles, Verdict> {
        let is = |at: &str| *addr == address(at);
        Ok(if is(VIP) {
            Roles::VIP
        } else if is(HOST) {
            Roles::BACKEND
        } else if is(OWN) {
            Roles::LOCAL
        } else if is(BROADCAST) {
            Roles::BROADCAST
        } else {
            Roles::empty()
        })
    }

    fn subnet(&self, addr: &Address) -> Result<Option<u64>, Verdict> {
        Ok(self.subnet.filter(|_| *addr == address(CLIENT)))
    }

    fn listener(&self, to: &Endpoint) -> Result<Option<Box<Listener>>, Verdict> {
        let is_there = to.addr == address(VIP) && to.port == 80;
        Ok(is_there.then(|| Box::new(self.listener)))
    }

    fn revnat(&self, _: &Endpoint) -> Result<Option<Box<RevNat>>, Verdict> {
        Ok(self.revnat.map(Box::new))
    }

    fn slot(&self, first_chunk: u32, number: u32) -> Result<u32, Verdict> {
        let slots = if first_chunk == PREVIOUS { &self.previous } else { &self.slots };
        slots.get(number as usize).copied().ok_or(Verdict::Inconsistent)
    }

    fn backend(&self, id: u32) -> Result<Option<Box<Backend>>, Verdict> {
        Ok(self.backends.get(id as usize).copied().map(Box::new))
    }

    fn bypass_until(&self) -> u32 {
        NOW
    }

    fn bypass(&self, backend: u32) -> Result<u32, Verdict> {
        Ok(self.bypass.get(&backend).copied().unwrap_or_default())
    }

    fn turn(&mut self, _: u32) -> Result<u64, Verdict> {
        self.turn += 1;
        Ok(self.turn - 1)
    }

    fn active(&self, backend: u32) -> Result<u64, Verdict> {
        Ok(self.active.get(&backend).copied().unwrap_or_default())
    }

    fn kept(&mut self, _: &Listener, _: &Address) -> Result<Option<(Sticky, ())>, Verdict> {
        Ok(self.sticky.map(|sticky| (sticky, ())))
    }

    fn keep(&mut self, (): (), expires: u32) {
        self.sticky = self.sticky.map(|sticky| Sticky { expires, ..sticky });
    }

    fn stick(&mut self, _: &Listener, _: &Address, sticky: Sticky) {
        self.sticky = Some(sticky);
    }

    fn connection_id(&self, _: &Packet) -> Option<ConnectionId> {
        self.connection_id
    }

    fn server(&self, key: QuicKey) -> Result<Option<u32>, Verdict> {
        Ok((key.server < 2).then_some(key.server))
    }

    fn entry(&mut self, packet: &Packet, listener: &Listener) -> Result<Entry, Verdict> {
        let Some(flow) = self.entry else { return Ok(Entry::None) };
        let flow = Remembered::from(&flow);
        match judge(NOW, packet, listener, &flow, &self.backends[flow.backend as usize]) {
            Judgement::Stale => Ok(Entry::None),
            Judgement::Closed => Err(Verdict::Closed),
            Judgement::Valid => Ok(Entry::of(&flow)),
        }
    }

    fn remember(
        &mut self,
        key: &FlowKey,
        _: u32,
        entries: Entries,
    ) -> Result<Option<u16>, Verdict> {
        self.made = Some(entries);
        Ok((!self.is_full).then_some(key.sport))
    }

    fn is_taken(&mut self, _: &FlowKey, _: u32, _: &Backend) -> Result<bool, Verdict> {
        Ok(self.is_taken)
    }

    fn is_known(&self, _: &FlowKey) -> Result<bool, Verdict> {
        Ok(self.entry.is_some())
    }

    fn known(&self, _: &FlowKey) -> Result<Option<Known>, Verdict> {
        let known = |flow: Flow| {
            let Flow { backend, port, source, .. } = flow;
            Known { place: 0, backend, port, source }
        };
        Ok(self.entry.map(known))
    }

    fn owner(&mut self, _: &FlowKey) -> Result<Option<Owner>, Verdict> {
        let owner = |flow: Flow| {
            let Flow { backend, source, .. } = flow;
            Owner { place: 3, key: flow.key(), backend, source }
        };
        Ok(self.entry.map(owner))
    }

    fn first_fragment(&mut self, _: &Packet) -> Result<Option<Fragment>, Verdict> {
        Ok(self.fragment)
    }

    fn is_listed(&mut self, _: u32, _: &Address) -> Result<bool, Verdict> {
        Ok(self.listed)
    }

    fn police(&mut self, _: u32, _: &Address, limit: Limit) -> Result<(), Verdict> {
        match limit {
            _ if self.exceeded != Some(limit) => Ok(()),
            Limit::Source => Err(Verdict::SourceLimit),
            Limit::Flows => Err(Verdict::FlowLimit),
            Limit::Bytes | Limit::Replies => Err(Verdict::BandwidthLimit),
        }
    }

    fn admits(&mut self, _: &Packet, _: &Listener) -> Result<bool, Verdict> {
        Ok(false)
    }
}

pub(super) fn address(at: &str) -> Address {
    at.parse::<SocketAddr>().unwrap().ip().into()
}

pub(super) fn packet(proto: u32, flags: TcpFlags, src: &str, dst: &str) -> Packet {
    let (src, dst): (SocketAddr, SocketAddr) = (src.parse().unwrap(), dst.parse().unwrap());
    let key = FlowKey {
        src: src.ip().into(),
        dst: dst.ip().into(),
        sport: src.port(),
        dport: dst.port(),
        proto,
    };
    Packet { key, flags, v4: src.is_ipv4().into(), ..Packet::default() }
}

pub(super) fn syn() -> Packet {
    packet(TCP, TcpFlags::SYN, CLIENT, VIP)
}

pub(super) fn ack() -> Packet {
    packet(TCP, TcpFlags::ACK, CLIENT, VIP)
}

pub(super) fn host(number: u8) -> Backend {
    let addr = IpAddr::from([10, 0, 0, number]).into();
    Backend { addr, port: 8_080, hop: KNOWN, flags: USABLE, weight: 1, ..Backend::default() }
}

pub(super) fn maps(scheduler: Scheduler, slots: &[u32]) -> Maps {
    let listener = Listener {
        id: 0,
        scheduler,
        slots: slots.len() as u32,
        seed: Seed::PUBLIC,
        previous_seed: Seed::PUBLIC,
        ..Listener::default()
    };
    Maps {
        listener,
        slots: slots.to_vec(),
        backends: (1..=4).map(host).collect(),
        ..Maps::default()
    }
}
