//! The decision, on maps of the host.

mod source;

use std::{format, vec};

use super::{fixtures::*, *};
use crate::{
    abi::{
        ANY_INTERFACE, BackendFlags, ConnState, Flow, FlowKind, ListenerFlags, Mode, NO_BACKEND,
        NO_PLACE, NO_SOURCE, RevNatFlags, SLOT_KEEP, Scheduler, TAG_FREE, TCP, UDP,
    },
    packet::{FRAGMENT_LATER, TcpFlags},
};

fn go(maps: &mut Maps, packet: &Packet) -> Result<Course, Verdict> {
    let all = Filtered { bypass_until: NOW, ..Filtered::NOT };
    to_vip(maps, packet, &packet.key.destination(), all, false)
}

fn begun(maps: &mut Maps, packet: &Packet) -> Result<Beginning, Verdict> {
    let hash = hash::flow(&packet.key, &maps.listener.seed);
    begin(maps, packet, hash)
}

/// To a backend that sees the port of [`CLIENT`].
const fn to(id: u32) -> Beginning {
    Beginning::Backend { id, port: 40_000 }
}

#[test]
fn settled_slot_needs_no_entry() {
    let mut maps = maps(Scheduler::HASH, &[0, 1, 2, 3]);
    for sport in 1..200 {
        let at = std::format!("198.51.100.7:{sport}");
        let packet = packet(TCP, TcpFlags::ACK, &at, VIP);
        let hash = hash::flow(&packet.key, &Seed::PUBLIC);
        let id = hash::slot(hash::choice(hash), 4);
        let expected = Course::Backend { id, port: sport, hash, is_new: false };
        assert_eq!(go(&mut maps, &packet), Ok(expected));
    }
}

#[test]
fn slot_that_looks_and_clients_that_may_confuse_the_backend_need_an_entry() {
    let begins = |maps: &mut Maps, packet: &Packet| {
        matches!(go(maps, packet), Ok(Course::Begins { chooses: false, .. }))
    };
    assert!(begins(&mut maps(Scheduler::HASH, &[SLOT_LOOK]), &syn()), "look");
    let from_host = packet(TCP, TcpFlags::SYN, HOST, VIP);
    assert!(begins(&mut maps(Scheduler::HASH, &[0]), &from_host), "a backend is the client");
    for (until, expected) in [(0, false), (NOW - 1, false), (NOW, true), (NOW + 1, true)] {
        let mut maps = maps(Scheduler::HASH, &[0]);
        maps.bypass.insert(0, until);
        assert_eq!(begins(&mut maps, &syn()), expected, "bypass until {until}");
    }
}

#[test]
fn port_that_a_direct_flow_has_takes_entries_and_only_where_one_begins() {
    let mut maps = maps(Scheduler::HASH, &[0]);
    maps.bypass.insert(0, NOW);
    for (is_taken, expected) in [(false, None), (true, Some(Entries::Both))] {
        maps.is_taken = is_taken;
        assert_eq!((begun(&mut maps, &syn()), maps.made), (Ok(to(0)), expected));
    }
    maps.is_full = true;
    assert_eq!(begun(&mut maps, &syn()), Err(Verdict::TableFull), "its own port is another's");
    maps.bypass.clear();
    assert_eq!(begun(&mut maps, &syn()), Ok(to(0)), "nothing is looked for");

    // What began before has kept its port.
    maps.bypass.insert(0, NOW);
    let hash = hash::flow(&ack().key, &Seed::PUBLIC);
    let expected = Course::Backend { id: 0, port: 40_000, hash, is_new: false };
    assert_eq!(go(&mut maps, &ack()), Ok(expected));
}

#[test]
fn vip_without_a_listener_does_as_the_settings_say() {
    let packet = packet(TCP, TcpFlags::SYN, CLIENT, "203.0.113.10:81");
    for (no_listener, expected) in [
        (0, Verdict::NoListener),
        (NO_LISTENER_DROP, Verdict::NoListenerDropped),
        (NO_LISTENER_RESET, Verdict::Refused),
    ] {
        let mut maps = maps(Scheduler::HASH, &[0]);
        maps.no_listener = no_listener;
        assert_eq!(go(&mut maps, &packet), Err(expected));
    }
    let elsewhere = self::packet(TCP, TcpFlags::SYN, CLIENT, "203.0.113.11:81");
    assert_eq!(go(&mut maps(Scheduler::HASH, &[0]), &elsewhere), Ok(Course::Elsewhere));
}

#[test]
fn guarded_listener_is_looked_at_first() {
    let mut maps = maps(Scheduler::HASH, &[0]);
    maps.listener.flags = ListenerFlags::GUARDED | ListenerFlags::ALLOW | ListenerFlags::LIMITED;
    assert_eq!(go(&mut maps, &syn()), Ok(Course::Guarded));
    let listener = maps.listener;
    assert_eq!(admit(&mut maps, &syn(), &listener), Err(Verdict::Denied));
    maps.listed = true;
    assert_eq!(admit(&mut maps, &syn(), &listener), Ok(()));
    maps.exceeded = Some(Limit::Source);
    assert_eq!(admit(&mut maps, &syn(), &listener), Err(Verdict::SourceLimit));
    assert_eq!(admit(&mut maps, &ack(), &listener), Ok(()), "begins no flow");
    maps.exceeded = Some(Limit::Flows);
    assert_eq!(admit(&mut maps, &syn(), &listener), Err(Verdict::FlowLimit));
    assert_eq!(admit(&mut maps, &ack(), &listener), Ok(()), "begins no flow");
    maps.exceeded = Some(Limit::Bytes);
    assert_eq!(admit(&mut maps, &ack(), &listener), Err(Verdict::BandwidthLimit));
}

#[test]
fn meter_lets_one_pass_and_then_as_much_as_the_burst() {
    for (paid, now, burst, expected) in [
        (0, 100, 0, (110, true)),
        (110, 100, 0, (120, false)),
        (110, 100, 10, (120, true)),
        (110, 200, 0, (210, true)),
    ] {
        let until = paid_until(paid, now, 10);
        assert_eq!((until, conforms(until, now, 10, burst)), expected, "{paid} {now} {burst}");
    }
}

/// An entry of the flow of [`syn`].
fn flow(backend: u32, state: ConnState) -> Flow {
    let key = syn().key;
    Flow {
        tag: 2,
        expires: NOW + 10,
        src: key.src,
        dst: key.dst,
        sport: key.sport,
        dport: key.dport,
        backend,
        proto: TCP as u8,
        kind: FlowKind::Original as u8,
        state: state.bits(),
        proxy: 0,
        port: 7,
        source: NO_SOURCE,
        peer: 0,
        sequence: 0,
    }
}

#[test]
fn entry_counts_unless_a_flow_begins_anew() {
    let (empty, ended) = (ConnState::empty(), ConnState::ENDED);
    let (proven, claimed) = (ConnState::ESTABLISHED, ConnState::END_CLAIMED);
    let rst = packet(TCP, TcpFlags::RST, CLIENT, VIP);
    let full = |flow: Flow| Flow { source: 3, ..flow };
    let old = |flow: Flow| Flow { expires: NOW - 1, ..flow };
    const NONE: BackendFlags = BackendFlags::empty();
    use Judgement::{Closed, Stale, Valid};
    for (case, packet, flow, change, expected) in [
        ("a SYN again", syn(), flow(0, empty), NONE, Valid),
        ("of a backend that takes no flows", syn(), flow(0, empty), BackendFlags::USABLE, Stale),
        ("in the middle there", ack(), flow(0, empty), BackendFlags::USABLE, Valid),
        ("a SYN after its end", syn(), flow(0, ended), NONE, Stale),
        ("in the middle after its end", ack(), flow(0, ended), NONE, Valid),
        ("a SYN after an end that is not verified", syn(), flow(0, claimed), NONE, Valid),
        ("a SYN of a proven client", syn(), flow(0, proven), NONE, Valid),
        ("and its backend takes no flows", syn(), flow(0, proven), BackendFlags::USABLE, Valid),
        ("a SYN after too long", syn(), old(flow(0, empty)), NONE, Stale),
        ("in the middle after too long", ack(), old(flow(0, empty)), NONE, Valid),
        ("the agent has ended it", ack(), flow(0, ConnState::RST_PENDING), NONE, Closed),
        ("and its reset comes", rst, flow(0, ConnState::RST_PENDING), NONE, Valid),
        ("a source of ours, by nat", ack(), full(flow(0, empty)), NONE, Valid),
    ] {
        let backend = Backend { flags: USABLE & !change, ..host(1) };
        let listener = Listener { scheduler: Scheduler::RING, ..Listener::default() };
        assert_eq!(
            judge(NOW, &packet, &listener, &Remembered::from(&flow), &backend),
            expected,
            "{case}"
        );
    }
    let backend = Backend { flags: BackendFlags::IN_USE | BackendFlags::UNHEALTHY, ..host(1) };
    let proven = Remembered::from(&flow(0, proven));
    assert_eq!(judge(NOW, &syn(), &Listener::default(), &proven, &backend), Stale, "unhealthy");
    let backend = Backend { mode: Mode::FULL, ..host(1) };
    let stale =
        judge(NOW, &ack(), &Listener::default(), &Remembered::from(&flow(0, empty)), &backend);
    assert_eq!(stale, Stale, "the group is full-nat by now");
    let backend = Backend { mode: Mode::DSR, ..host(1) };
    let stale = judge(
        NOW,
        &ack(),
        &Listener::default(),
        &Remembered::from(&full(flow(0, empty))),
        &backend,
    );
    assert_eq!(stale, Stale, "the group is dsr by now");
    assert_ne!(TAG_FREE, flow(0, empty).tag);
}

#[test]
fn connection_that_is_not_known_goes_by_the_schedule_before() {
    let reset = Err(Verdict::Reset);
    let mut maps = maps(Scheduler::RING, &[0, 1]);
    assert_eq!(begun(&mut maps, &ack()), reset, "in turn");
    maps.listener.previous_slots = 1;
    maps.listener.previous_chunk = PREVIOUS;
    maps.listener.previous_scheduler = Scheduler::HASH;
    maps.previous = vec![2];
    assert_eq!(begun(&mut maps, &ack()), Ok(to(2)));
    assert_eq!(maps.made, Some(Entries::Forward));
    assert_eq!(begun(&mut maps, &syn()), Ok(to(0)), "a SYN");
    maps.previous = vec![NO_BACKEND];
    assert_eq!(begun(&mut maps, &ack()), reset, "no slot before");
    maps.listener.slots = 1;
    assert_eq!(begun(&mut maps, &ack()), Ok(to(0)), "the only one");
}

#[test]
fn connection_goes_by_the_schedule_before_with_the_seed_before() {
    let other = Seed::new([3, 5, 7, 11, 13]);
    let mut maps = maps(Scheduler::HASH, &[0, 1, 2, 3].map(|slot| slot | SLOT_LOOK | SLOT_KEEP));
    maps.listener.seed = other;
    maps.listener.previous_slots = 4;
    maps.listener.previous_chunk = PREVIOUS;
    maps.listener.previous_scheduler = Scheduler::HASH;
    maps.previous = vec![0, 1, 2, 3];
    let mut moved = 0;
    for sport in 40_000..40_064 {
        let client = format!("198.51.100.7:{sport}");
        let of = |seed: &Seed| {
            let key = packet(TCP, TcpFlags::ACK, &client, VIP).key;
            Ok(Beginning::Backend {
                id: hash::slot(hash::choice(hash::flow(&key, seed)), 4),
                port: sport,
            })
        };
        assert_eq!(begun(&mut maps, &packet(TCP, TcpFlags::ACK, &client, VIP)), of(&Seed::PUBLIC));
        assert_eq!(begun(&mut maps, &packet(TCP, TcpFlags::SYN, &client, VIP)), of(&other));
        moved += u32::from(of(&Seed::PUBLIC) != of(&other));
    }
    assert!(moved > 32, "{moved} of 64 connections would have moved");
}

#[test]
fn backend_of_a_flow_that_begins_says_which_entries_it_needs() {
    let from_host = packet(TCP, TcpFlags::SYN, HOST, VIP);
    let (own, both) = (Some(Entries::OwnSource), Some(Entries::Both));
    type Change = fn(&mut Backend);
    let cases: [(_, _, Change, _); 8] = [
        ("settled", syn(), |_| {}, Ok(None)),
        ("shared", syn(), |it| it.flags |= BackendFlags::SHARED, Ok(both)),
        ("full-nat", syn(), |it| it.mode = Mode::FULL, Ok(own)),
        ("hairpin", from_host, |_| {}, Ok(own)),
        ("by dsr there is none", from_host, |it| it.mode = Mode::DSR, Ok(None)),
        ("nor on another side", from_host, |it| it.hop.ifindex = WAN, Ok(None)),
        ("drained", ack(), |it| it.flags |= BackendFlags::CLOSED, Err(Verdict::Closed)),
        ("not told", ack(), |it| it.flags |= BackendFlags::PROXY, Err(Verdict::Reset)),
    ];
    for (case, packet, change, expected) in cases {
        let mut maps = maps(Scheduler::HASH, &[0]);
        change(&mut maps.backends[0]);
        let found = begun(&mut maps, &packet);
        let is_own = matches!(found, Ok(Beginning::OwnSource { id: 0 }));
        assert_eq!(is_own, expected == Ok(own), "{case}");
        assert_eq!(found.map(|_| maps.made), expected, "{case}");
    }
    let mut empty = maps(Scheduler::HASH, &[NO_BACKEND]);
    assert_eq!(begun(&mut empty, &syn()), Err(Verdict::NoBackend));
    let mut chosen = maps(Scheduler::HASH, &[0]);
    chosen.chosen = Some(3 | SLOT_KEEP);
    assert_eq!(begun(&mut chosen, &syn()), Ok(to(3)));
    assert_eq!(chosen.made, Some(Entries::Forward));
}

#[test]
fn flow_that_finds_no_room_goes_without_an_entry_if_the_hash_finds_its_backend_again() {
    type Change = fn(&mut Backend);
    let cases: [(_, _, Option<u32>, Change, _); 5] = [
        ("by hash", Scheduler::HASH, None, |_| {}, Ok(to(0))),
        ("in turn", Scheduler::RING, None, |_| {}, Err(Verdict::TableFull)),
        ("kept", Scheduler::HASH, Some(SLOT_KEEP), |_| {}, Err(Verdict::TableFull)),
        (
            "shared",
            Scheduler::HASH,
            None,
            |it| it.flags |= BackendFlags::SHARED,
            Err(Verdict::TableFull),
        ),
        ("full-nat", Scheduler::HASH, None, |it| it.mode = Mode::FULL, Err(Verdict::TableFull)),
    ];
    for (case, scheduler, chosen, change, expected) in cases {
        let mut maps = maps(scheduler, &[SLOT_LOOK | SLOT_KEEP]);
        (maps.is_full, maps.chosen) = (true, chosen);
        change(&mut maps.backends[0]);
        assert_eq!(begun(&mut maps, &syn()), expected, "{case}");
    }
}

#[test]
fn fewest_flows_for_the_weight_is_chosen() {
    let mut maps = maps(Scheduler::LEAST, &[0, 1, NO_BACKEND, 2]);
    let listener = maps.listener;
    maps.active = [(0, 5), (1, 8), (2, 9)].into();
    maps.backends[1].weight = 2;
    assert_eq!(choose(&mut maps, &syn(), &listener, 0), Ok(1 | SLOT_KEEP));
    maps.active.insert(2, u64::MAX);
    assert_eq!(choose(&mut maps, &syn(), &listener, 0), Ok(2 | SLOT_KEEP), "below 0");
    let none = Listener { slots: 0, ..listener };
    assert_eq!(choose(&mut maps, &syn(), &none, 0), Err(Verdict::NoBackend));
}

#[test]
fn client_stays_with_a_backend_that_is_open() {
    let mut maps = maps(Scheduler::RING, &[1]);
    maps.listener.sticky_jiffies = 50;
    let listener = maps.listener;
    let chosen = |maps: &mut Maps| choose(maps, &syn(), &listener, 0);
    assert_eq!(chosen(&mut maps), Ok(1 | SLOT_KEEP));
    let kept = Sticky { backend: 1, expires: NOW + 50 };
    assert_eq!(maps.sticky, Some(kept));
    maps.sticky = Some(Sticky { backend: 2, expires: NOW });
    assert_eq!(chosen(&mut maps), Ok(2 | SLOT_KEEP));
    assert_eq!(maps.sticky, Some(Sticky { backend: 2, expires: NOW + 50 }), "goes on");
    maps.sticky = Some(Sticky { backend: 2, expires: NOW - 1 });
    assert_eq!(chosen(&mut maps), Ok(1 | SLOT_KEEP), "for too long");
    type Change = fn(&mut Backend);
    let changes: [Change; 4] = [
        |it| it.weight = 0,
        |it| it.flags = BackendFlags::IN_USE,
        |it| it.flags |= BackendFlags::CLOSED,
        |it| it.listener = 9,
    ];
    for change in changes {
        maps.backends[2] = host(3);
        change(&mut maps.backends[2]);
        maps.sticky = Some(Sticky { backend: 2, expires: NOW });
        assert_eq!(chosen(&mut maps), Ok(1 | SLOT_KEEP), "{:?}", maps.backends[2]);
        assert_eq!(maps.sticky, Some(kept));
    }
}

#[test]
fn connection_id_goes_to_who_has_issued_it() {
    let mut maps = maps(Scheduler::QUIC, &[2, 3]);
    let listener = maps.listener;
    let datagram = packet(UDP, TcpFlags::empty(), CLIENT, VIP);
    let slot_of = |id| hash::slot(hash::choice_of_id(id, &listener.seed), 2);
    let id_of = |slot| (0..).find(|id| slot_of(*id) == slot).unwrap();
    for (slot, server, expected) in [(0, None, 2), (1, None, 3), (1, Some(1), 1), (0, Some(5), 2)] {
        maps.connection_id = Some(ConnectionId { id: id_of(slot), server });
        let found = choose(&mut maps, &datagram, &listener, 0);
        assert_eq!(found, Ok(expected | SLOT_KEEP), "{slot} {server:?}");
    }
    maps.backends[1].flags = BackendFlags::empty();
    maps.connection_id = Some(ConnectionId { id: id_of(0), server: Some(1) });
    assert_eq!(choose(&mut maps, &datagram, &listener, 0), Ok(2 | SLOT_KEEP), "it is gone");
}

#[test]
fn last_hop_ends_what_would_be_sent_and_leaves_the_rest_to_the_kernel() {
    let mut maps = maps(Scheduler::HASH, &[0]);
    maps.is_last_hop = true;
    assert_eq!(reach(&mut maps, 0).err(), Some(Verdict::TtlExpired));
    assert_eq!(begun(&mut maps, &syn()), Err(Verdict::TtlExpired));
    maps.backends[0].hop = NextHop::UNRESOLVED;
    assert!(reach(&mut maps, 0).is_ok());
    maps.backends[0].mode = Mode::DSR;
    assert_eq!(reach(&mut maps, 0).err(), Some(Verdict::NoNeighbour), "it has the VIP itself");
    assert_eq!(reach(&mut maps, 99).err(), Some(Verdict::NoBackend));
}

#[test]
fn icmp_message_is_for_whom_it_is_about() {
    let mut maps = maps(Scheduler::HASH, &[0]);
    let icmp = |src, dst| packet(1, TcpFlags::empty(), src, dst);
    let (of_vip, of_client) = (syn().key.reversed(), packet(TCP, TcpFlags::SYN, CLIENT, HOST).key);
    let router = "192.0.2.1:0";
    for (case, packet, quoted, expected) in [
        ("of a VIP", icmp(router, VIP), of_vip, Ok(Side::Backend)),
        ("to another", icmp(router, CLIENT), of_vip, Err(Verdict::NotOurs)),
        ("of a client", icmp(router, CLIENT), of_client, Ok(Side::Client)),
        ("to a VIP", icmp(router, VIP), of_client, Err(Verdict::OtherProtocol)),
    ] {
        assert_eq!(concerns(&mut maps, &packet, &quoted), expected, "{case}");
        let part = Packet { fragment: FRAGMENT_LATER, ..packet };
        let unrelated = unrelated(part.key.dst == address(VIP));
        assert_eq!(concerns(&mut maps, &part, &quoted), Err(unrelated), "{case}");
    }
    for (case, packet, expected) in [
        ("echo", icmp(CLIENT, VIP), Ok(())),
        ("echo elsewhere", icmp(CLIENT, HOST), Err(Verdict::NotOurs)),
        ("echo of a martian", icmp("127.0.0.1:0", VIP), Err(Verdict::Martian)),
        ("echo of a VIP", icmp(VIP, VIP), Err(Verdict::Martian)),
    ] {
        assert_eq!(to_itself(&mut maps, &packet), expected, "{case}");
        let part = Packet { fragment: FRAGMENT_LATER, ..packet };
        let unrelated = unrelated(part.key.dst == address(VIP));
        let unrelated = expected.err().unwrap_or(unrelated);
        assert_eq!(to_itself(&mut maps, &part), Err(unrelated), "{case}");
    }
}

#[test]
fn error_goes_to_the_backend_of_the_flow_or_of_the_schedule() {
    let quoted = syn().key.reversed();
    let router = packet(1, TcpFlags::empty(), "192.0.2.1:0", VIP);
    let found =
        |maps: &mut Maps| error_to_backend(maps, &router, &quoted).map(|it| (it.id, it.flow.port));
    let mut maps = maps(Scheduler::HASH, &[1]);
    assert_eq!(found(&mut maps), Ok((1, 40_000)), "by its slot");
    maps.entry = Some(flow(2, ConnState::empty()));
    assert_eq!(found(&mut maps), Ok((2, 7)), "by its entry");
    maps.backends[2].mode = Mode::FULL;
    assert_eq!(found(&mut maps), Err(Verdict::NotOurs), "without a source of ours");
    maps.entry = None;
    maps.slots = vec![NO_BACKEND];
    assert_eq!(found(&mut maps), Err(Verdict::NotOurs), "no backend");
}

#[test]
fn error_goes_to_the_client_of_the_flow_or_of_the_listener() {
    let quoted = packet(TCP, TcpFlags::SYN, CLIENT, HOST).key;
    let error = packet(1, TcpFlags::empty(), "10.0.0.9:0", CLIENT);
    let mut maps = maps(Scheduler::HASH, &[1]);
    let found = |maps: &mut Maps| error_to_client(maps, &error, &quoted);
    assert_eq!(found(&mut maps).err(), Some(Verdict::NotOurs), "of no listener");
    let vip = address(VIP);
    maps.revnat = Some(RevNat { vip, port: 80, backend: 2, ingress: LAN, ..RevNat::default() });
    let concerned = found(&mut maps).unwrap();
    assert_eq!((concerned.backend, concerned.place), (2, NO_PLACE), "by its backend");
    assert_eq!((concerned.to.addr, concerned.client), (vip, address(CLIENT)));
    assert_eq!((concerned.to.sport, concerned.to.dport), (40_000, 80));
    maps.revnat.as_mut().unwrap().flags = RevNatFlags::SHARED;
    assert_eq!(found(&mut maps).err(), Some(Verdict::NotOurs), "which listener is not known");
    let src = address("192.0.2.9:0");
    maps.entry = Some(Flow { source: 1, src, ..flow(1, ConnState::empty()) });
    let concerned = found(&mut maps).unwrap();
    assert_eq!((concerned.backend, concerned.place, concerned.client), (1, 3, src), "by its entry");
}

#[test]
fn later_fragment_goes_where_the_first_went() {
    let part = Packet { fragment: FRAGMENT_LATER, ..syn() };
    let (from, interfaces) = (part.key.src, ANY_INTERFACE);
    let first = Fragment { hop: KNOWN, expires: NOW, from, interfaces, ..Fragment::default() };
    for (case, fragment, expected) in [
        ("not seen", None, Err(Verdict::Fragment)),
        ("seen", Some(first), Ok(())),
        ("too old", Some(Fragment { expires: NOW - 1, ..first }), Err(Verdict::Fragment)),
        (
            "left to the kernel",
            Some(Fragment { kind: FlowKind::Bypass as u32, ..first }),
            Err(Verdict::NoListener),
        ),
    ] {
        let mut maps = maps(Scheduler::HASH, &[0]);
        maps.fragment = fragment;
        assert_eq!(later(&mut maps, &part).map(|_| ()), expected, "{case}");
        maps.is_last_hop = true;
        let expected = if expected.is_ok() { Err(Verdict::TtlExpired) } else { expected };
        assert_eq!(later(&mut maps, &part).map(|_| ()), expected, "{case}");
    }
}
