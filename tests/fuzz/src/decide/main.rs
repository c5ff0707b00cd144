//! What becomes of packets, one after the other: the decision on maps in memory, with listeners of every kind.
//!
//! An input is a row of events, of eight bytes each. What a packet gets is compared with what the target itself knows:
//! of who may have sent it, of the flows that have begun, and of the rules of the listener.

#![no_main]

use libfuzzer_sys::fuzz_target;
use slb_common::{
    abi::{
        ANY_INTERFACE, Address, Backend, BackendFlags, ConnState, Flow, FlowKey, FlowKind,
        Fragment, Listener, Mode, NO_BACKEND, NOT_CHOSEN, Sticky, TCP,
    },
    decide::{self, Beginning, Course, Filtered, Lookups as _, Side},
    packet::{FRAGMENT_FIRST, FRAGMENT_LATER, FRAGMENT_NONE, Packet, TcpFlags},
    quic::ConnectionId,
    verdict::Verdict,
};

mod maps;
mod site;

use maps::{HashMap, Maps};
use site::{BACKENDS, LAN, MOST_FLOWS, ROWS, SOURCES, WAN, row};

/// Bits of [`Event::how`].
const IS_V6: u8 = 1;
const BY_LAN: u8 = 2;
const IS_FIRST: u8 = 4;
const LAST_HOP: u8 = 8;

struct Event {
    kind: u8,
    row: usize,
    family: usize,
    source: usize,
    port: u16,
    flags: TcpFlags,
    how: u8,
    argument: u16,
}

impl From<&[u8; 8]> for Event {
    fn from(&[kind, row, source, port, flags, how, high, low]: &[u8; 8]) -> Self {
        Self {
            kind: kind & 7,
            row: usize::from(row) % (ROWS.len() + 1),
            family: usize::from(how & IS_V6),
            source: usize::from(source) % SOURCES[0].len(),
            port: 40_000 + u16::from(port & 7),
            flags: TcpFlags::from_bits_retain(flags),
            how,
            argument: u16::from_be_bytes([high, low]),
        }
    }
}

impl Event {
    /// The key of the client's packet.
    fn key(&self) -> FlowKey {
        let source = &SOURCES[self.family][self.source];
        FlowKey {
            src: site::address(source.addr),
            dst: site::vip(self.family),
            sport: self.port,
            dport: site::port(self.row),
            proto: ROWS.get(self.row).map_or(TCP, |row| row.proto),
        }
    }

    fn packet(&self) -> Packet {
        let key = self.key();
        Packet {
            key,
            flags: if key.proto == TCP { self.flags } else { TcpFlags::empty() },
            v4: (self.family == 0).into(),
            fragment: if self.how & IS_FIRST == 0 { FRAGMENT_NONE } else { FRAGMENT_FIRST },
            // All of them have their records in the same place.
            fragment_id: u32::from(self.argument & 3) * 257,
            ..Packet::default()
        }
    }
}

/// Where a packet of a client goes.
#[derive(Clone, Copy)]
struct Sent {
    id: u32,
    has_own_source: bool,
}

/// What the target knows, beside the maps.
struct Run {
    maps: Maps,
    /// How many flows of the limited listeners have begun.
    begun: HashMap<u32, u32>,
    /// The first fragments that were forwarded: addresses, and number.
    firsts: Vec<(Address, Address, u32)>,
}

/// The course of a client's packet, as the programs take it one after the other.
fn course(maps: &mut Maps, packet: &Packet) -> Result<Sent, Verdict> {
    let to = packet.key.destination();
    let filtered = Filtered { bypass_until: maps.bypass_until, ..Filtered::NOT };
    let mut course = decide::to_vip(maps, packet, &to, filtered, false)?;
    if course == Course::Guarded {
        let listener = maps.listener(&to)?.ok_or(Verdict::Inconsistent)?;
        decide::admit(maps, packet, &listener)?;
        course = decide::to_vip(maps, packet, &to, filtered, true)?;
        assert_ne!(course, Course::Guarded, "it was admitted");
    }
    let (id, has_own_source) = match course {
        Course::Elsewhere | Course::Guarded => return Err(Verdict::NotOurs),
        Course::Backend { id, .. } => (id, false),
        Course::OwnSource { .. } => (maps.flows[&packet.key].backend, true),
        Course::Begins { hash, chooses } => {
            if chooses && decide::begins(packet) {
                let listener = maps.listener(&to)?.ok_or(Verdict::Inconsistent)?;
                maps.chosen = decide::choose(maps, packet, &listener, hash)?;
            }
            match decide::begin(maps, packet, hash)? {
                Beginning::Backend { id, .. } => (id, false),
                Beginning::OwnSource { id } => (id, true),
            }
        }
    };
    decide::reach(maps, id)?;
    Ok(Sent { id, has_own_source })
}

impl Run {
    fn backend(&self, id: u32) -> &Backend {
        &self.maps.backends[id as usize]
    }

    /// Whether an address may send to a listener, by the interface.
    fn check_source(&self, addr: &Address, row: usize) {
        let source = self.maps.source(addr).expect("it is one of the list");
        assert!(!source.is_martian, "from {}", source.addr);
        assert!(!source.is_lan || self.maps.ingress == LAN, "{} is not there", source.addr);
        assert!(!(source.is_denied && row == row::GUARDED), "{} is denied", source.addr);
    }

    fn client(&mut self, event: &Event) {
        let packet = event.packet();
        let named = event.argument >> 8;
        let id = |it: u16| ConnectionId { id: event.argument.into(), server: Some(it.into()) };
        self.maps.connection_id = (named != 0).then(|| id(named & 3));
        let before = self.maps.flows.get(&packet.key).copied();
        let kept = self.maps.sticky.get(&(site::id(event.row, event.family), packet.key.src));
        let (kept, loads) = (kept.copied(), self.loads(event));
        let outcome = course(&mut self.maps, &packet);
        self.maps.chosen = NOT_CHOSEN;
        let Ok(sent) = outcome else { return };
        assert!(event.row < ROWS.len(), "nothing listens there");
        assert!(event.how & LAST_HOP == 0, "it had no hop left");
        self.check_source(&packet.key.src, event.row);
        self.check_backend(event, &packet, sent);
        let is_known = before.is_some();
        match before {
            Some(flow) if packet.key.proto == TCP && !packet.is_syn() => {
                assert_eq!(sent.id, flow.backend, "its flow has another backend");
            }
            None if decide::begins(&packet) => self.check_begun(event, &packet, sent, kept, &loads),
            _ => {}
        }
        if !is_known && event.row == row::LIMITED {
            let begun = self.begun.entry(site::id(event.row, event.family)).or_default();
            *begun += 1;
            assert!(*begun <= MOST_FLOWS, "more flows than may begin");
        }
        if packet.fragment == FRAGMENT_FIRST {
            self.note_first(&packet, sent);
        }
    }

    /// Flows, with the one that begins, and weight of each backend of the listener.
    fn loads(&self, event: &Event) -> Vec<(u64, u64)> {
        if event.row != row::LEAST {
            return Vec::new();
        }
        let first = site::id(event.row, event.family) * BACKENDS;
        let load = |id: u32| (self.maps.flows_of(id) + 1, self.backend(id).weight.into());
        (first..first + BACKENDS).map(load).collect()
    }

    fn check_backend(&self, event: &Event, packet: &Packet, sent: Sent) {
        let backend = self.backend(sent.id);
        let listener = u32::from(backend.listener);
        assert_eq!(listener, site::id(event.row, event.family), "another listener's backend");
        let is_host = self.maps.roles(&packet.key.src).is_ok_and(|it| !it.is_empty());
        let is_full = backend.mode == Mode::FULL;
        assert!(is_full || is_host || !sent.has_own_source, "the backend sees another address");
        assert!(!is_full || sent.has_own_source, "the backend sees the client's address");
    }

    /// A flow that begins, by the rules of its listener.
    fn check_begun(
        &self,
        event: &Event,
        packet: &Packet,
        sent: Sent,
        kept: Option<Sticky>,
        loads: &[(u64, u64)],
    ) {
        let listener: Listener = site::listener(event.row, event.family);
        let first = listener.id * BACKENDS;
        match event.row {
            row::PERSISTENT => {
                let is_open = |it: &Sticky| decide::is_open(&listener, self.backend(it.backend));
                let is_kept = |it: &Sticky| it.expires.wrapping_sub(self.maps.now) as i32 >= 0;
                if let Some(kept) = kept.filter(|it| is_kept(it) && is_open(it)) {
                    assert_eq!(sent.id, kept.backend, "the client was kept with another");
                }
            }
            row::LEAST => {
                let (flows, weight) = loads[(sent.id - first) as usize];
                let is_least = |&(other, its): &(u64, u64)| flows * its <= other * weight;
                assert!(loads.iter().all(is_least), "another backend has fewer flows: {loads:?}");
            }
            row::QUIC => {
                const OUT: BackendFlags = BackendFlags::CLOSED.union(BackendFlags::UNHEALTHY);
                let server = self.maps.connection_id.and_then(|id| id.server);
                let named =
                    server.filter(|it| (1..=BACKENDS).contains(it)).map(|it| first + it - 1);
                if let Some(named) = named.filter(|&id| !self.backend(id).flags.intersects(OUT)) {
                    assert_eq!(sent.id, named, "the connection ID names another");
                }
            }
            // Its addresses and ports alone say where it goes.
            row::PLAIN | row::GUARDED if !sent.has_own_source => {
                let mut others = Maps::new();
                others.ingress = self.maps.ingress;
                let again = course(&mut others, packet).map(|again| again.id);
                assert_eq!(again, Ok(sent.id), "it depends on more than the packet");
            }
            _ => {}
        }
    }

    fn note_first(&mut self, packet: &Packet, sent: Sent) {
        let fragment = Fragment {
            src: packet.key.src,
            dst: self.backend(sent.id).addr,
            hop: self.backend(sent.id).hop,
            hash: 0,
            backend: sent.id,
            mode: self.backend(sent.id).mode,
            kind: FlowKind::Original as u32,
            mtu: 0,
            expires: self.maps.now.wrapping_add(30),
            id: packet.fragment_id,
            from: packet.key.src,
            interfaces: ANY_INTERFACE,
        };
        self.maps.fragments.insert(decide::fragment_key(packet), fragment);
        self.firsts.push((packet.key.src, packet.key.dst, packet.fragment_id));
    }

    /// A fragment without ports.
    fn later(&mut self, event: &Event) {
        let mut packet = event.packet();
        (packet.fragment, packet.key.sport, packet.key.dport) = (FRAGMENT_LATER, 0, 0);
        if decide::later(&mut self.maps, &packet).is_ok() {
            let is_it = |(src, dst, id): &(Address, Address, u32)| {
                (*src, *dst, *id) == (packet.key.src, packet.key.dst, packet.fragment_id)
            };
            assert!(self.firsts.iter().any(is_it), "its first was not forwarded");
        }
    }

    /// An ICMP error about what a VIP has sent to a client, of which a router or the client says so.
    fn error_to_backend(&mut self, event: &Event) {
        let mut client = event.key();
        let packet = Packet { fragment: FRAGMENT_NONE, ..event.packet() };
        let about = &SOURCES[event.family][usize::from(event.argument) % SOURCES[0].len()];
        client.src = site::address(about.addr);
        let quoted = client.reversed();
        let outcome = match decide::concerns(&mut self.maps, &packet, &quoted) {
            Ok(Side::Backend) => {
                let error = decide::error_to_backend(&mut self.maps, &packet, &quoted);
                error.map(|error| error.id)
            }
            Ok(Side::Client) => panic!("its destination is a VIP"),
            Err(verdict) => Err(verdict),
        };
        let Ok(id) = outcome else { return };
        assert_ne!(id, NO_BACKEND);
        self.check_source(&packet.key.src, event.row);
        self.check_source(&client.src, event.row);
        let listener = u32::from(self.backend(id).listener);
        assert_eq!(listener, site::id(event.row, event.family), "another listener's backend");
    }

    /// An ICMP error about what a backend was sent, from the way there.
    fn error_to_client(&mut self, event: &Event) {
        let id = u32::from(event.argument) % (ROWS.len() as u32 * 2 * BACKENDS);
        let backend = *self.backend(id);
        let row = usize::from(backend.listener) / 2;
        let family = usize::from(backend.listener) % 2;
        let client = site::address(SOURCES[family][event.source].addr);
        let is_own = event.how & IS_FIRST != 0;
        let src = if is_own { site::own(family) } else { client };
        let sport = if event.flags.intersects(TcpFlags::FIN) { !event.port } else { event.port };
        let (dst, dport) = (backend.addr, backend.port as u16);
        let quoted = FlowKey { src, dst, sport, dport, proto: ROWS[row].proto };
        let key = FlowKey { src: dst, dst: src, sport: 0, dport: 0, proto: 1 };
        let packet = Packet { key, v4: (family == 0).into(), ..Packet::default() };
        if decide::concerns(&mut self.maps, &packet, &quoted) != Ok(Side::Client) {
            return;
        }
        let Ok(error) = decide::error_to_client(&mut self.maps, &packet, &quoted) else { return };
        assert_eq!(self.maps.ingress, LAN, "no backend is there");
        assert_eq!(error.to.addr, site::vip(family), "the client knows the VIP");
        let is_full = backend.mode == Mode::FULL;
        let is_shared = is_full || backend.flags.intersects(BackendFlags::SHARED);
        let is_its = |flow: &Flow| flow.backend == id && flow.port == sport;
        let has_flow = self.maps.flows.values().any(is_its);
        assert!(has_flow || !is_shared, "about a flow that is not there");
    }

    /// The flow has gone on, by packets that are not looked at here.
    fn state(&mut self, event: &Event) {
        if let Some(flow) = self.maps.flows.get_mut(&event.key()) {
            flow.state = ConnState::from_bits_retain(event.argument as u8).bits();
        }
    }

    /// Time passes, and the agent changes what is in the maps.
    fn change(&mut self, event: &Event) {
        match event.source {
            0..4 => self.maps.now = self.maps.now.wrapping_add(event.argument.into()),
            4 => self.maps.is_full = event.argument & 1 != 0,
            5 => self.maps.is_taken = event.argument & 1 != 0,
            6 => self.maps.bypass_until = self.maps.now.wrapping_add(event.argument.into()),
            7 => self.maps.no_listener = event.argument.into(),
            _ => {
                let id =
                    (site::id(event.row.min(ROWS.len() - 1), event.family) * BACKENDS) as usize;
                let backend = &mut self.maps.backends[id + usize::from(event.port) % 3];
                const CHANGED: BackendFlags =
                    BackendFlags::USABLE.union(BackendFlags::UNHEALTHY).union(BackendFlags::CLOSED);
                let flags = BackendFlags::from_bits_retain(event.flags.bits().into()) & CHANGED;
                backend.flags = backend.flags & !CHANGED | flags;
                backend.weight = event.argument & 3;
            }
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut run = Run { maps: Maps::new(), begun: HashMap::default(), firsts: Vec::new() };
    let (events, _) = bytes.as_chunks::<8>();
    for event in events.iter().map(Event::from) {
        run.maps.ingress = if event.how & BY_LAN == 0 { WAN } else { LAN };
        run.maps.is_last_hop = event.how & LAST_HOP != 0;
        match event.kind {
            0..=2 => run.client(&event),
            3 => run.error_to_backend(&event),
            4 => run.error_to_client(&event),
            5 => run.later(&event),
            6 => run.state(&event),
            _ => run.change(&event),
        }
    }
});
