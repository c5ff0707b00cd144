//! The listeners of the target, and the addresses that packets come from.

use std::net::IpAddr;

use slb_common::abi::{
    Address, Backend, BackendFlags, Listener, ListenerFlags, Mode, NextHop, Roles, SLOT_KEEP,
    SLOT_LOOK, Scheduler, Seed, TCP, UDP,
};

pub(crate) const WAN: u32 = 1;
pub(crate) const LAN: u32 = 2;
/// Of each listener, and in its schedule, where they take turns.
pub(crate) const BACKENDS: u32 = 3;
pub(crate) const SLOTS: u32 = 2 * BACKENDS;
/// Number of flows that a limited listener takes.
pub(crate) const MOST_FLOWS: u32 = 4;
/// The list of a guarded listener.
pub(crate) const LIST: u32 = 9;
/// For how long flows, and clients of a persistent listener, are remembered, in jiffies.
pub(crate) const IDLE: u32 = 1_000;

/// Number of a listener, of [`ROWS`].
pub(crate) mod row {
    pub(crate) const PLAIN: usize = 0;
    pub(crate) const GUARDED: usize = 1;
    pub(crate) const LIMITED: usize = 2;
    pub(crate) const PERSISTENT: usize = 3;
    pub(crate) const LEAST: usize = 4;
    pub(crate) const QUIC: usize = 5;
    pub(crate) const CHANGED: usize = 8;
}

/// What there is to a listener.
pub(crate) struct Row {
    pub(crate) proto: u32,
    scheduler: Scheduler,
    flags: ListenerFlags,
    mode: Mode,
    backends: BackendFlags,
    slot: u32,
}

const HASH: Row = Row {
    proto: TCP,
    scheduler: Scheduler::HASH,
    flags: ListenerFlags::empty(),
    mode: Mode::NAT,
    backends: BackendFlags::empty(),
    slot: 0,
};
const LOOK: Row = Row { slot: SLOT_LOOK, ..HASH };
const CHOOSES: Row =
    Row { scheduler: Scheduler::RING, flags: ListenerFlags::CHOOSES, slot: SLOT_KEEP, ..HASH };

/// Each is there for both families.
pub(crate) const ROWS: [Row; 10] = [
    HASH,
    Row { flags: ListenerFlags::GUARDED.union(ListenerFlags::DENY), ..HASH },
    Row {
        proto: UDP,
        scheduler: Scheduler::RING,
        flags: ListenerFlags::GUARDED.union(ListenerFlags::LIMITED),
        slot: SLOT_KEEP,
        ..HASH
    },
    CHOOSES,
    Row { scheduler: Scheduler::LEAST, ..CHOOSES },
    Row { proto: UDP, scheduler: Scheduler::QUIC, ..CHOOSES },
    Row { mode: Mode::FULL, ..LOOK },
    Row { backends: BackendFlags::SHARED, ..LOOK },
    Row { scheduler: Scheduler::SOURCE, ..LOOK },
    Row { mode: Mode::FULL, backends: BackendFlags::PROXY, scheduler: Scheduler::RING, ..LOOK },
];

/// Who may have sent a packet.
pub(crate) struct Source {
    pub(crate) addr: &'static str,
    pub(crate) roles: Roles,
    /// It belongs to no listener, or is the gateway's own.
    pub(crate) is_martian: bool,
    /// It is on the LAN's subnet.
    pub(crate) is_lan: bool,
    pub(crate) is_denied: bool,
}

const fn client(addr: &'static str) -> Source {
    Source { addr, roles: Roles::empty(), is_martian: false, is_lan: false, is_denied: false }
}

const fn martian(addr: &'static str, roles: Roles) -> Source {
    Source { is_martian: true, roles, ..client(addr) }
}

const fn host(addr: &'static str, roles: Roles) -> Source {
    Source { is_lan: true, roles, ..client(addr) }
}

/// Of IPv4 and of IPv6.
pub(crate) const SOURCES: [[Source; 11]; 2] = [
    [
        client("198.51.100.1"),
        client("198.51.100.2"),
        Source { is_denied: true, ..client("198.51.101.7") },
        martian("203.0.113.10", Roles::VIP),
        martian("10.0.0.1", Roles::LOCAL),
        martian("10.0.0.255", Roles::BROADCAST),
        martian("127.0.0.1", Roles::empty()),
        martian("169.254.1.1", Roles::empty()),
        martian("224.0.0.1", Roles::empty()),
        host("10.0.0.77", Roles::empty()),
        host("10.0.0.11", Roles::BACKEND),
    ],
    [
        client("2001:db8:c::1"),
        client("2001:db8:c::2"),
        Source { is_denied: true, ..client("2001:db8:d::7") },
        martian("2001:db8::10", Roles::VIP),
        martian("2001:db8:10::1", Roles::LOCAL),
        martian("::1", Roles::empty()),
        martian("::", Roles::empty()),
        martian("fe80::1", Roles::empty()),
        martian("ff02::1", Roles::empty()),
        host("2001:db8:10::77", Roles::empty()),
        host("2001:db8:10::11", Roles::BACKEND),
    ],
];

/// Of an address in the text above.
pub(crate) fn address(text: &str) -> Address {
    text.parse::<IpAddr>().expect("an address").into()
}

pub(crate) fn vip(family: usize) -> Address {
    address(["203.0.113.10", "2001:db8::10"][family])
}

/// What backends of a full-NAT listener see.
pub(crate) fn own(family: usize) -> Address {
    address(["10.0.0.1", "2001:db8:10::1"][family])
}

/// The port of a listener; that of the number behind the last belongs to none.
pub(crate) const fn port(row: usize) -> u16 {
    80 + row as u16
}

/// Index in the maps.
pub(crate) const fn id(row: usize, family: usize) -> u32 {
    (2 * row + family) as u32
}

pub(crate) fn listener(row: usize, family: usize) -> Listener {
    let Row { scheduler, flags, .. } = ROWS[row];
    let first_chunk = id(row, family) * SLOTS;
    let before = ListenerChange::of(row);
    Listener {
        id: id(row, family),
        scheduler,
        previous_scheduler: Scheduler::HASH,
        first_chunk,
        slots: SLOTS,
        previous_chunk: first_chunk + before.skipped,
        previous_slots: before.slots,
        flags,
        acl: LIST,
        sticky_jiffies: if row == row::PERSISTENT { IDLE } else { 0 },
        seed: Seed::PUBLIC,
        previous_seed: Seed::default(),
        spare: 0,
    }
}

/// The schedule of before.
struct ListenerChange {
    skipped: u32,
    slots: u32,
}

impl ListenerChange {
    const fn of(row: usize) -> Self {
        match row {
            row::CHANGED => Self { skipped: 1, slots: BACKENDS },
            _ => Self { skipped: 0, slots: 0 },
        }
    }
}

/// All schedules, one behind the other.
pub(crate) fn slots() -> Vec<u32> {
    let listeners = ROWS.iter().enumerate().flat_map(|(row, it)| [0, 1].map(|f| (row, f, it)));
    let slots = listeners.flat_map(|(row, family, it)| {
        (0..SLOTS).map(move |n| (id(row, family) * BACKENDS + n % BACKENDS) | it.slot)
    });
    slots.collect()
}

/// All backends: those of a listener are beside each other.
pub(crate) fn backends() -> Vec<Backend> {
    let hop = NextHop { ifindex: LAN, dst_mac: [2, 0, 0, 0, 0, 1], src_mac: [2, 0, 0, 0, 0, 2] };
    let all = ROWS.iter().enumerate().flat_map(|(row, it)| [0, 1].map(|f| (row, f, it)));
    let all = all.flat_map(|(row, family, it)| (0..BACKENDS).map(move |n| (row, family, it, n)));
    let backends = all.map(|(row, family, it, n)| {
        let host = [format!("10.0.0.{}", 11 + n), format!("2001:db8:10::{}", 11 + n)];
        Backend {
            addr: address(&host[family]),
            hop,
            port: 8_000 + row as u32,
            flags: BackendFlags::IN_USE | BackendFlags::USABLE | it.backends,
            idle_jiffies: IDLE,
            listener: id(row, family) as u16,
            weight: 1 + n as u16,
            mode: it.mode,
            source: 1 + family as u16,
            sources: 1,
            ..Backend::default()
        }
    });
    backends.collect()
}
