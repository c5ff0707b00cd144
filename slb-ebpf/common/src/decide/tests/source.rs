//! Where packets may come from.

use std::format;

use super::*;
use crate::abi::ANY_INTERFACE;

/// The sets of the interfaces that packets here come by, and of another.
const HERE: u64 = 1 << LAN;
const ELSEWHERE: u64 = 1 << WAN;

#[test]
fn address_that_no_router_forwards_from_is_martian() {
    for (addr, expected) in [
        ("0.1.2.3", true),
        ("127.0.0.1", true),
        ("169.254.1.1", true),
        ("224.0.0.1", true),
        ("239.255.255.255", true),
        ("255.255.255.255", true),
        ("240.0.0.1", false),
        ("255.255.255.254", false),
        ("223.255.255.255", false),
        ("::", true),
        ("::1", true),
        ("fe80::1", true),
        ("febf::1", true),
        ("ff02::1", true),
        ("::2", false),
        ("fec0::1", false),
        ("2001:db8::7", false),
    ] {
        let addr: std::net::IpAddr = addr.parse().unwrap();
        assert_eq!(is_martian(&addr.into(), addr.is_ipv4()), expected, "{addr}");
    }
}

#[test]
fn source_is_martian_where_it_cannot_be_a_clients() {
    let mut maps = maps(Scheduler::HASH, &[0]);
    let from = |src: &str| packet(TCP, TcpFlags::SYN, src, VIP);
    for src in ["127.0.0.1:9", "203.0.113.10:9", OWN, BROADCAST] {
        assert_eq!(go(&mut maps, &from(src)), Err(Verdict::Martian), "{src}");
    }
    for (subnet, expected) in [
        (None, true),
        (Some(HERE), true),
        (Some(HERE | ELSEWHERE), true),
        (Some(ELSEWHERE), false),
        (Some(0), false),
    ] {
        maps.subnet = subnet;
        assert_eq!(go(&mut maps, &syn()).is_ok(), expected, "{subnet:?}");
    }
}

#[test]
fn martian_is_no_less_one_for_what_the_vip_would_say() {
    let mut maps = maps(Scheduler::HASH, &[0]);
    maps.listener.flags = ListenerFlags::GUARDED;
    for to in [VIP, "203.0.113.10:81"] {
        let packet = packet(TCP, TcpFlags::SYN, OWN, to);
        assert_eq!(go(&mut maps, &packet), Err(Verdict::Martian), "{to}");
    }
}

#[test]
fn what_the_filter_excludes_is_not_looked_up() {
    let mut maps = maps(Scheduler::HASH, &[0]);
    maps.subnet = Some(0);
    let filtered = Filtered { from: Roles::empty(), bypass_until: 0, is_elsewhere: false };
    assert_eq!(check_source(&mut maps, &syn(), filtered), Ok(()));
    let own = packet(TCP, TcpFlags::SYN, OWN, VIP);
    assert_eq!(check_source(&mut maps, &own, filtered), Ok(()));
}

#[test]
fn backends_packets_come_by_its_interfaces_alone() {
    let mut maps = maps(Scheduler::HASH, &[0]);
    for (ingress, interfaces, expected) in [
        (LAN, HERE, Ok(())),
        (0, HERE | ELSEWHERE, Ok(())),
        (0, ANY_INTERFACE, Ok(())),
        (WAN, ELSEWHERE, Err(Verdict::Martian)),
        (0, ELSEWHERE, Err(Verdict::Martian)),
        (0, 0, Err(Verdict::Martian)),
    ] {
        let origin = RevNat { ingress, interfaces, ..RevNat::default() };
        let case = format!("{ingress} {interfaces:#x}");
        assert_eq!(check_backend(&mut maps, &origin), expected, "{case}");
    }
}

#[test]
fn error_to_a_client_comes_from_where_the_backend_is() {
    let quoted = packet(TCP, TcpFlags::SYN, CLIENT, HOST).key;
    let from = |src| packet(1, TcpFlags::empty(), src, CLIENT);
    let origin = |interfaces| RevNat { backend: 1, interfaces, ..RevNat::default() };
    let mut maps = maps(Scheduler::HASH, &[1]);
    maps.revnat = Some(origin(ELSEWHERE));
    let found = error_to_client(&mut maps, &from(HOST), &quoted);
    assert_eq!(found.err(), Some(Verdict::Martian), "from the other side");
    maps.revnat = Some(origin(HERE));
    let found = error_to_client(&mut maps, &from(OWN), &quoted);
    assert_eq!(found.err(), Some(Verdict::Martian), "from the gateway itself");
    assert!(error_to_client(&mut maps, &from(HOST), &quoted).is_ok());
    maps.revnat = Some(RevNat { flags: RevNatFlags::LIMITED, ..origin(HERE) });
    maps.exceeded = Some(Limit::Replies);
    let found = error_to_client(&mut maps, &from(HOST), &quoted);
    assert_eq!(found.err(), Some(Verdict::BandwidthLimit));
}

#[test]
fn error_to_a_backend_obeys_the_rules_of_its_flow() {
    let quoted = syn().key.reversed();
    let router = packet(1, TcpFlags::empty(), "192.0.2.1:0", VIP);
    let found = |maps: &mut Maps| error_to_backend(maps, &router, &quoted).map(|it| it.id);
    let mut maps = maps(Scheduler::HASH, &[1]);
    maps.subnet = Some(ELSEWHERE);
    assert_eq!(found(&mut maps), Err(Verdict::Martian), "its client is elsewhere");
    maps.subnet = None;
    for (mode, listed, expected) in [
        (ListenerFlags::ALLOW, true, Ok(1)),
        (ListenerFlags::ALLOW, false, Err(Verdict::Denied)),
        (ListenerFlags::DENY, true, Err(Verdict::Denied)),
        (ListenerFlags::DENY, false, Ok(1)),
    ] {
        maps.listener.flags = ListenerFlags::GUARDED | mode;
        maps.listed = listed;
        assert_eq!(found(&mut maps), expected, "{mode:?}, listed {listed}");
    }
    maps.listener.flags = ListenerFlags::GUARDED | ListenerFlags::LIMITED;
    maps.exceeded = Some(Limit::Bytes);
    assert_eq!(found(&mut maps), Err(Verdict::BandwidthLimit));
}

#[test]
fn later_fragment_obeys_the_rules_of_the_first() {
    let part = Packet { fragment: FRAGMENT_LATER, fragment_id: 7, ..syn() };
    let reply = Packet { key: syn().key.reversed(), ..part };
    let of = |packet: &Packet, interfaces| Fragment {
        hop: KNOWN,
        expires: NOW,
        id: 7,
        from: packet.key.src,
        interfaces,
        ..Fragment::default()
    };
    let mut maps = maps(Scheduler::HASH, &[0]);
    maps.fragment = Some(of(&part, ANY_INTERFACE));
    maps.subnet = Some(ELSEWHERE);
    assert_eq!(later(&mut maps, &part).err(), Some(Verdict::Martian), "of a client elsewhere");
    maps.fragment = Some(of(&reply, ELSEWHERE));
    assert_eq!(later(&mut maps, &reply).err(), Some(Verdict::Martian), "of a backend elsewhere");
    maps.fragment = Some(of(&reply, HERE));
    assert!(later(&mut maps, &reply).is_ok());
    let other = Packet { fragment_id: 8, ..reply };
    assert_eq!(later(&mut maps, &other).err(), Some(Verdict::NotOurs), "of another packet");
}

#[test]
fn source_has_few_records_of_fragments() {
    let records = |packets: &mut dyn Iterator<Item = Packet>| {
        let keys = packets.map(|packet| fragment_key(&packet));
        keys.map(|key| (key.src, key.number)).collect::<std::collections::BTreeSet<_>>().len()
    };
    let v4 = syn();
    // As they stand in a header.
    let in_turn = (0..256_u16).map(|id| Packet { fragment_id: id.to_be().into(), ..v4 });
    assert_eq!(records(&mut in_turn.clone()), 256, "in turn");
    let all = (0..=u16::MAX).map(|id| Packet { fragment_id: id.into(), ..v4 });
    assert_eq!(records(&mut all.into_iter()), 256);
    let v6 = packet(UDP, TcpFlags::empty(), "[2001:db8::7]:9", "[2001:db8::1]:80");
    let site = (0..=u16::MAX).map(|host| {
        let mut packet = Packet { fragment_id: u32::from(host) << 8, ..v6 };
        packet.key.src.bytes[14..].copy_from_slice(&host.to_be_bytes());
        packet
    });
    assert!(records(&mut site.into_iter()) <= 256, "a site");
}
