//! The listeners of the test: for the maps, and, in its own words, for the oracle.

use std::{collections::HashMap, sync::Arc};

use slb_common::abi::{
    self, Backend, BackendFlags, Limits, ListenerFlags, QuicKey, RevNat, RevNatFlags, Scheduler,
};
use slb_user::state::{Acl, ListenerState, Policy, Schedule, State};

use crate::{
    fixture::{
        FAMILIES, IDLE_JIFFIES, SOURCES, Slb, VIPS, at, backend, by, client_of, endpoint, id,
        key_of, port, vip,
    },
    lab::{FIRST, LAN, LAN_MAC, SECOND, WAN, WAN_MAC, set},
    oracle::{Listener, Mode, Server, Site, Told},
};

/// Clients of this network are on the access list.
pub(super) const DENIED: u32 = 106;
/// Number of that list in the maps.
const LIST: u32 = 7;
/// What a backend's port is beyond its listener's.
const BEHIND: u16 = 8_000;
/// Far more than the test takes, in nanoseconds.
const HOUR: u64 = 3_600_000_000_000;
/// Flows of a limited listener: one, and the burst.
const MOST: usize = 3;

/// What there is to a listener.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rule {
    Plain,
    Guarded,
    Limited,
    Persistent,
    Least,
    Quic,
}

/// Listeners of this test, beside those that all have: by port, with two servers each.
const ROWS: [(u16, u32, Scheduler, Rule); 9] = [
    (601, abi::TCP, Scheduler::HASH, Rule::Guarded),
    (602, abi::UDP, Scheduler::RING, Rule::Guarded),
    (603, abi::TCP, Scheduler::HASH, Rule::Limited),
    (604, abi::UDP, Scheduler::RING, Rule::Limited),
    (605, abi::TCP, Scheduler::RING, Rule::Persistent),
    (606, abi::TCP, Scheduler::LEAST, Rule::Least),
    (607, abi::UDP, Scheduler::QUIC, Rule::Quic),
    (608, abi::UDP, Scheduler::HASH, Rule::Plain),
    (609, abi::TCP, Scheduler::HASH, Rule::Plain),
];

/// Listeners that the oracle has no word for: their backends are not there, or cannot be reached.
const OTHERS: [u16; 5] = [port::SLOW, port::EMPTY, port::NO_BACKEND, port::BROKEN, port::LOST];

/// What the datapath does not keep to yet: a packet from a backend's address and port passes for a reply although no flow
/// leads there.
const TOLERATED: [&str; 3] = [
    "a server's SYN passed for a reply",
    "a datagram to a client that this server does not have",
    "a packet to a server itself was not the kernel's to forward",
];

/// Writes the maps; says to the oracle what they are to mean.
pub(super) fn install(slb: &mut Slb<'_>) -> Site {
    slb.change(|state| {
        // Each interface has its own MAC address, and no other.
        state.macs.clear();
        // And each backend is behind one interface.
        for origin in state.endpoints.values_mut() {
            let hop = state.backends[&origin.backend].hop;
            let ingress = if hop.is_known() { hop.ifindex } else { LAN };
            (origin.ingress, origin.interfaces) = (ingress, set(ingress));
        }
        state.listeners.retain(|at, _| !OTHERS.iter().any(|&port| at.port == u32::from(port)));
        // Those that get no flows, for both families.
        let idle = [id::SLOW, id::HTTP_SECOND, id::HTTP_SICK, id::DNS_SECOND];
        state.endpoints.retain(|_, origin| !idle.contains(&(origin.backend & !1)));
        let list: Acl = FAMILIES
            .into_iter()
            .map(|family| {
                let bits = [96 + 24, 48][family];
                (abi::listed_bits(bits), client_of(DENIED, family, 0).ip().into())
            })
            .collect();
        state.acls.insert(LIST, Arc::new(list));
        for family in FAMILIES {
            for (number, row) in (0..).zip(ROWS) {
                add(state, family, number, row);
            }
            for (id, flag) in [
                (id::FULL, [BackendFlags::PROXY, BackendFlags::OPTION][family]),
                (id::OTHER, BackendFlags::PROXY),
            ] {
                let record = state.backends.get_mut(&(id + family as u32)).expect("a backend");
                record.flags |= flag;
            }
        }
    });
    described()
}

fn add(state: &mut State, family: usize, number: u32, row: (u16, u32, Scheduler, Rule)) {
    let (port, proto, scheduler, rule) = row;
    let listener = 100 + 2 * number + family as u32;
    let ids = [0, 2].map(|second| 240 + 4 * number + second + family as u32);
    let (vip_of_all, vip_port) = key_of(vip(family, port));
    for (index, (id, hop)) in ids.into_iter().zip([FIRST, SECOND]).enumerate() {
        let at = backend(index, family, port + BEHIND);
        let record = Backend {
            addr: at.ip().into(),
            port: at.port().into(),
            flags: BackendFlags::IN_USE | BackendFlags::USABLE,
            idle_jiffies: IDLE_JIFFIES,
            hop,
            listener: listener as u16,
            weight: 100,
            ..Backend::default()
        };
        state.backends.insert(id, record);
        let flags =
            if scheduler == Scheduler::HASH { RevNatFlags::empty() } else { RevNatFlags::TRACKED };
        let ingress = [FIRST, SECOND][index].ifindex;
        let (vip, port, interfaces) = (vip_of_all, vip_port, set(ingress));
        let origin = RevNat { vip, port, backend: id, flags, ingress, interfaces };
        state.endpoints.insert(endpoint(at, proto), origin);
        if rule == Rule::Quic {
            state.quic.insert(QuicKey { listener, server: index as u32 + 1 }, id);
        }
    }
    let policy = match rule {
        Rule::Plain => Policy::default(),
        Rule::Guarded => Policy {
            flags: ListenerFlags::GUARDED | ListenerFlags::DENY,
            acl: LIST,
            ..Policy::default()
        },
        Rule::Limited => {
            let limits = Limits { flow_ns: HOUR, flow_burst: 2 * HOUR, ..Limits::default() };
            state.limits.insert(listener, limits);
            Policy { flags: ListenerFlags::GUARDED | ListenerFlags::LIMITED, ..Policy::default() }
        }
        Rule::Persistent => Policy {
            flags: ListenerFlags::CHOOSES,
            sticky_jiffies: IDLE_JIFFIES,
            ..Policy::default()
        },
        Rule::Least | Rule::Quic => Policy { flags: ListenerFlags::CHOOSES, ..Policy::default() },
    };
    let slots = (0..64).map(|slot| ids[slot % 2]).collect();
    let schedule = Arc::new(Schedule::new(by(scheduler), slots));
    let listener = ListenerState { id: listener, schedule, policy };
    state.listeners.insert(endpoint(vip(family, port), proto), listener);
}

/// The same once more, for the oracle.
fn described() -> Site {
    let mut listeners = Vec::new();
    for family in FAMILIES {
        for (port, proto, scheduler, rule) in ROWS {
            let servers = servers(&[0, 1], family, port + BEHIND);
            let denied = if rule == Rule::Guarded {
                vec![(client_of(DENIED, family, 0).ip(), [24, 48][family])]
            } else {
                Vec::new()
            };
            let quic = HashMap::from([(1, 0), (2, 1)]);
            listeners.push(Listener {
                is_by_hash: scheduler == Scheduler::HASH,
                is_persistent: rule == Rule::Persistent,
                denied,
                most_flows: (rule == Rule::Limited).then_some(MOST),
                quic: if rule == Rule::Quic { quic } else { HashMap::new() },
                ..listener(family, port, proto, Mode::Nat, servers)
            });
        }
        let (same, cross, one) = (family, 1 - family, &[0_usize][..]);
        for (port, proto, mode, servers) in [
            (port::HTTP, abi::TCP, Mode::Nat, servers(one, same, port::HTTP_BACKEND)),
            (port::SHARED, abi::TCP, Mode::Nat, servers(one, same, port::SHARED_BACKEND)),
            (port::TWIN, abi::TCP, Mode::Nat, servers(one, same, port::SHARED_BACKEND)),
            (port::DNS, abi::UDP, Mode::Nat, servers(one, same, port::DNS_BACKEND)),
            (port::DSR, abi::TCP, Mode::Dsr, servers(one, same, port::DSR)),
            (port::IPIP, abi::TCP, Mode::Tunnel, servers(one, same, port::IPIP)),
            (port::GUE, abi::UDP, Mode::Tunnel, servers(one, same, port::GUE)),
            (port::CROSS, abi::TCP, Mode::Tunnel, servers(one, cross, port::CROSS)),
            (port::FULL, abi::TCP, Mode::FullNat, servers(one, same, port::FULL_BACKEND)),
            (port::FULL_UDP, abi::UDP, Mode::FullNat, servers(one, same, port::FULL_UDP_BACKEND)),
            (port::OTHER, abi::TCP, Mode::FullNat, servers(one, cross, port::OTHER_BACKEND)),
            (
                port::OTHER_UDP,
                abi::UDP,
                Mode::FullNat,
                servers(one, cross, port::OTHER_UDP_BACKEND),
            ),
        ] {
            listeners.push(listener(family, port, proto, mode, servers));
        }
        for (port, proto, mode, servers) in [
            (port::RING, abi::TCP, Mode::Nat, servers(&[0, 1], same, port::RING_BACKEND)),
            (port::TURN, abi::TCP, Mode::Nat, servers(one, same, port::TURN_BACKEND)),
            (port::SIP, abi::UDP, Mode::Nat, servers(one, same, port::SIP_BACKEND)),
            (port::DSR_UDP, abi::UDP, Mode::Dsr, servers(one, same, port::DSR_UDP)),
        ] {
            let by_turns = listener(family, port, proto, mode, servers);
            listeners.push(Listener { is_by_hash: false, ..by_turns });
        }
        for listener in listeners.iter_mut().filter(|it| it.at.is_ipv4() == (family == 0)) {
            listener.told = match listener.at.port() {
                port::FULL => [Told::Header, Told::Option][family],
                port::OTHER => Told::Header,
                _ => Told::Nothing,
            };
        }
    }
    Site {
        listeners,
        vips: VIPS.map(|vip| at(vip, 0).ip()).to_vec(),
        sources: SOURCES.as_flattened().iter().map(|source| at(source, 0).ip()).collect(),
        interfaces: vec![(WAN, WAN_MAC), (LAN, LAN_MAC)],
        tolerated: TOLERATED.to_vec(),
    }
}

fn listener(family: usize, port: u16, proto: u32, mode: Mode, servers: Vec<Server>) -> Listener {
    Listener {
        proto: proto as u8,
        at: vip(family, port),
        mode,
        servers,
        is_by_hash: true,
        is_persistent: false,
        denied: Vec::new(),
        most_flows: None,
        quic: HashMap::new(),
        told: Told::Nothing,
    }
}

/// The first server is behind LAN, the second behind WAN.
fn servers(numbers: &[usize], family: usize, port: u16) -> Vec<Server> {
    let server = |&number: &usize| {
        let hop = [FIRST, SECOND][number];
        Server { at: backend(number, family, port), mac: hop.dst_mac, ifindex: hop.ifindex }
    };
    numbers.iter().map(server).collect()
}
