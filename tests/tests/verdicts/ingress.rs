//! Where packets come from: by which interface, from which source, and in a frame to whom.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use aya::maps::{HashMap, MapData};
use slb_common::{
    abi::{self, Fragment, FragmentKey, ListenerFlags, OwnMac, RevNat, Roles},
    verdict::Verdict,
};
use slb_user::state::State;

use crate::{
    fixture::{
        FAMILIES, Outcome, SOURCES, Slb, VIPS, XDP_PASS, answer, at, backend, client, client_of,
        datagram, endpoint, forwarded, port, replied, syn, vip, with_slb,
    },
    fragments::fragments,
    frame::{ACK, Extension, Frame, L3, SYN, VIRTUAL_MAC, icmp, seal_v4, tagged},
    icmp::quote,
    lab::{FIRST, LAN, LAN_MAC, ROUTER, WAN, WAN_MAC, set},
};

const MARTIAN: Outcome = Outcome::Untouched(Verdict::Martian);
const NOT_OURS: Outcome = Outcome::Untouched(Verdict::NotOurs);

/// Answers of each kind of backend that is reached by [`LAN`].
fn answers(family: usize) -> Vec<Frame> {
    let from = client(family, 1_000);
    let inside = 1 - family;
    let source = |of: usize| at(SOURCES[of][0], 1_024);
    let mut answers = vec![
        answer(&syn(from, backend(0, family, port::HTTP_BACKEND))),
        answer(&syn(from, backend(0, family, port::RING_BACKEND))),
        answer(&syn(from, backend(0, family, port::SHARED_BACKEND))),
        answer(&datagram(from, backend(0, family, port::DNS_BACKEND))),
        answer(&syn(source(family), backend(0, family, port::FULL_BACKEND))),
        answer(&syn(source(inside), backend(0, inside, port::OTHER_BACKEND))),
    ];
    let flags = answers[0].clone().flags(SYN | ACK);
    answers.push(flags);
    answers
}

/// The origins of all backends.
fn origins(slb: &mut Slb<'_>, change: impl Fn(&mut RevNat)) {
    slb.change(|state| state.endpoints.values_mut().for_each(&change));
}

/// An error about a frame, as a router sends it.
fn error(router: IpAddr, about: &Frame) -> Frame {
    let base = Frame::tcp(SocketAddr::new(router, 0), about.src);
    let kind = if router.is_ipv4() { [3, 3] } else { [1, 4] };
    icmp(&base, kind, [0; 4], &quote(about, 100))
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_behind_one_interface_when_answers_come_by_another_then_they_are_martian() {
    with_slb(|slb| {
        for family in FAMILIES {
            for frame in answers(family) {
                let case = format!("{:?} {:?}", frame.src, frame.transport);
                slb.client_sends(&case, &frame, &MARTIAN);
                let verdict = slb.run(LAN, &frame.bytes()).verdict;
                assert_ne!(verdict, Verdict::Martian, "{case}");
                let tags = &[(0x8100, 10)];
                let bytes = tagged(&Frame { dst_mac: WAN_MAC, ..frame }.bytes(), tags);
                assert_eq!(slb.run(WAN, &bytes).verdict, Verdict::Martian, "{case}, tagged");
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_behind_several_interfaces_when_it_answers_then_each_of_them_will_do() {
    with_slb(|slb| {
        origins(slb, |origin| (origin.ingress, origin.interfaces) = (0, set(WAN) | set(LAN)));
        for family in FAMILIES {
            let http = syn(client(family, 1_000), vip(family, port::HTTP));
            let inside = http.to(backend(0, family, port::HTTP_BACKEND));
            slb.client_sends("SYN", &http, &forwarded(inside.clone(), FIRST));
            let expected = replied(answer(&inside).from(http.dst), ROUTER);
            slb.backend_sends("one", &answer(&inside), &expected);
            slb.client_sends("the other", &answer(&inside), &expected);
        }
        origins(slb, |origin| (origin.ingress, origin.interfaces) = (0, 0));
        for family in FAMILIES {
            slb.backend_sends("none", &answers(family)[0], &MARTIAN);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_fragments_of_an_answer_when_one_comes_by_another_interface_then_it_is_martian() {
    with_slb(|slb| {
        for family in FAMILIES {
            let asked = datagram(client(family, 1_000), vip(family, port::DNS));
            let inside = asked.to(backend(0, family, port::DNS_BACKEND));
            let frame = Frame { payload: vec![7; 2_000], ..answer(&inside) };
            let parts = fragments(&frame, 7);
            assert_eq!(slb.run(LAN, &parts[0]).verdict, Verdict::Replied);
            let forged = Frame { dst_mac: WAN_MAC, ..frame.clone() };
            slb.check("forged", WAN, &fragments(&forged, 7)[1], &MARTIAN);
            assert_eq!(slb.run(LAN, &parts[1]).verdict, Verdict::Replied);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_errors_about_what_a_client_has_sent_when_they_come_from_the_other_side_then_they_are_martian()
 {
    with_slb(|slb| {
        for family in FAMILIES {
            let http = syn(client(family, 1_000), vip(family, port::HTTP));
            let inside = http.to(backend(0, family, port::HTTP_BACKEND));
            slb.client_sends("SYN", &http, &forwarded(inside.clone(), FIRST));
            for router in [backend(0, family, 0).ip(), client(family, 0).ip()] {
                slb.client_sends("forged", &error(router, &inside), &MARTIAN);
            }
            let real = error(backend(0, family, 0).ip(), &inside);
            assert_eq!(slb.run(LAN, &real.bytes()).verdict, Verdict::Replied);
            let other = inside.to(backend(0, family, 9));
            slb.client_sends("of no listener", &error(client(family, 0).ip(), &other), &NOT_OURS);
        }
    });
}

/// Behind [`LAN`] are the backends' subnets; those of most clients are behind [`WAN`].
fn with_subnets(slb: &mut Slb<'_>) {
    slb.change(|state| {
        let subnets = [
            (96 + 24, "10.0.0.0", set(LAN)),
            (64, "2001:db8:a::", set(LAN)),
            (96 + 24, "198.51.100.0", set(WAN)),
            (64, "2001:db8:100::", set(WAN)),
            (96 + 28, "198.51.100.240", set(LAN)),
            (96 + 24, "198.51.103.0", set(WAN) | set(LAN)),
            (64, "2001:db8:103::", set(WAN) | set(LAN)),
        ];
        for (bits, addr, interfaces) in subnets {
            state.subnets.insert((bits, at(addr, 0).ip().into()), interfaces);
        }
        for broadcast in ["10.0.0.255", "198.51.100.255"] {
            state.addresses.insert(at(broadcast, 0).ip().into(), Roles::BROADCAST);
        }
    });
}

/// Sources that are martian on the clients' side.
const SPOOFED: [&[&str]; 2] = [
    &[VIPS[0], SOURCES[0][0], "10.0.0.255", "10.0.0.99", "198.51.100.250", "198.51.100.255"],
    &[VIPS[1], SOURCES[1][0], "2001:db8:a::99", "2001:db8:a:0:ffff::1"],
];

#[test]
#[ignore = "needs root"]
fn given_subnets_of_interfaces_when_sources_are_spoofed_then_every_packet_to_a_vip_is_martian() {
    with_slb(|slb| {
        with_subnets(slb);
        for family in FAMILIES {
            let request = [8, 128][family];
            for &source in SPOOFED[family] {
                let from = at(source, 1_000);
                let about = syn(vip(family, port::HTTP), client(family, 1_000));
                let big = datagram(from, vip(family, port::DNS));
                let parts = fragments(&Frame { payload: vec![7; 2_000], ..big }, 9);
                let frames = [
                    syn(from, vip(family, port::HTTP)).bytes(),
                    syn(from, vip(family, port::HTTP)).flags(ACK).bytes(),
                    syn(from, vip(family, port::RING)).bytes(),
                    syn(from, vip(family, 9)).bytes(),
                    datagram(from, vip(family, port::DNS)).bytes(),
                    icmp(&syn(from, vip(family, 0)), [request, 0], [0, 1, 0, 1], b"").bytes(),
                    error(from.ip(), &about).bytes(),
                    parts[0].clone(),
                    parts[1].clone(),
                ];
                for (number, frame) in frames.iter().enumerate() {
                    slb.check(&format!("{source}: {number}"), WAN, frame, &MARTIAN);
                }
                let bytes = tagged(&frames[0], &[(0x8100, 7)]);
                assert_eq!(slb.run(WAN, &bytes).verdict, Verdict::Martian, "{source}, tagged");
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_subnets_of_interfaces_when_clients_are_where_they_may_be_then_they_are_served() {
    with_slb(|slb| {
        with_subnets(slb);
        let rows = [
            (WAN, client(0, 1_000)),
            (WAN, client(1, 1_000)),
            (WAN, at("198.51.100.239", 1_000)),
            (WAN, at("10.0.1.1", 1_000)),
            (WAN, at("240.0.0.1", 1_000)),
            (WAN, at("255.255.255.254", 1_000)),
            (WAN, client_of(103, 0, 1_000)),
            (LAN, client_of(103, 1, 1_000)),
            (LAN, at("10.0.0.99", 1_000)),
            (LAN, at("2001:db8:a::99", 1_000)),
        ];
        for (ingress, from) in rows {
            let family = usize::from(from.is_ipv6());
            let frame = Frame { dst_mac: VIRTUAL_MAC, ..syn(from, vip(family, port::HTTP)) };
            let expected = forwarded(frame.to(backend(0, family, port::HTTP_BACKEND)), FIRST);
            slb.check(&from.to_string(), ingress, &frame.bytes(), &expected);
        }
        for family in FAMILIES {
            let frame = syn(client(family, 1_000), vip(family, port::HTTP));
            slb.backend_sends("from the wrong side", &frame, &MARTIAN);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_subnets_that_go_when_sources_come_from_there_then_they_are_clients_again() {
    with_slb(|slb| {
        with_subnets(slb);
        slb.change(|state| state.subnets.clear());
        for (family, addr) in [(0, "10.0.0.99"), (1, "2001:db8:a::99")] {
            let frame = syn(at(addr, 1_000), vip(family, port::HTTP));
            let expected = forwarded(frame.to(backend(0, family, port::HTTP_BACKEND)), FIRST);
            slb.client_sends(addr, &frame, &expected);
        }
        slb.restart();
        with_subnets(slb);
        let frame = syn(at("10.0.0.99", 1_000), vip(0, port::HTTP));
        slb.client_sends("after a restart", &frame, &MARTIAN);
    });
}

#[test]
#[ignore = "needs root"]
fn given_frames_to_other_hosts_when_they_arrive_then_they_are_not_ours_whatever_they_carry() {
    with_slb(|slb| {
        slb.change(|state| state.macs.clear());
        let foreign = [[2, 0, 0, 0, 0, 0xfe], [2, 0, 0, 0, 1, 9], [0xff; 6], [1, 0, 0x5e, 0, 0, 1]];
        for family in FAMILIES {
            let request = [8, 128][family];
            let from = client(family, 1_000);
            let asked = syn(from, vip(family, port::HTTP));
            let rows = [
                (WAN, asked.clone()),
                (WAN, syn(from, vip(family, 9))),
                (WAN, datagram(from, vip(family, port::DNS))),
                (WAN, icmp(&syn(from, vip(family, 0)), [request, 0], [0; 4], b"")),
                (LAN, answer(&asked.to(backend(0, family, port::HTTP_BACKEND)))),
            ];
            for (ingress, frame) in rows {
                let other = if ingress == WAN { LAN_MAC } else { WAN_MAC };
                for dst_mac in foreign.into_iter().chain([other]) {
                    let bytes = Frame { dst_mac, ..frame.clone() }.bytes();
                    let case = format!("{dst_mac:02x?}");
                    slb.check(&case, ingress, &bytes, &NOT_OURS);
                    slb.check(&case, ingress, &tagged(&bytes, &[(0x8100, 7)]), &NOT_OURS);
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_virtual_macs_when_they_come_and_go_then_frames_to_them_are_ours_meanwhile() {
    with_slb(|slb| {
        slb.change(|state| state.macs.clear());
        let mac = [0, 0, 0x5e, 0, 1, 7];
        let frame = syn(client(0, 1_000), vip(0, port::HTTP));
        let frame = Frame { dst_mac: mac, ..frame };
        let ours = forwarded(frame.to(backend(0, 0, port::HTTP_BACKEND)), FIRST);
        let key = OwnMac { ifindex: WAN, mac, spare: [0; 2] };
        let change = |state: &mut State, is_there: bool| {
            if is_there {
                state.macs.insert(key, 1);
            } else {
                state.macs.remove(&key);
            }
        };
        for is_there in [false, true, false] {
            slb.change(|state| change(state, is_there));
            let expected = if is_there { &ours } else { &NOT_OURS };
            slb.check("virtual", WAN, &frame.bytes(), expected);
            slb.check("on the other side", LAN, &frame.bytes(), &NOT_OURS);
        }
        // The interface's own is another one from now on.
        slb.change(|state| state.interfaces.get_mut(&WAN).expect("it").mac = mac);
        slb.check("own", WAN, &frame.bytes(), &ours);
        let before = Frame { dst_mac: WAN_MAC, ..frame.clone() };
        slb.check("the one before", WAN, &before.bytes(), &NOT_OURS);
        // Nothing is known of it.
        slb.change(|state| {
            state.interfaces.remove(&WAN);
        });
        assert_eq!(slb.run(WAN, &before.bytes()).verdict, Verdict::Forwarded);
    });
}

#[test]
#[ignore = "needs root"]
fn given_vlans_that_are_served_when_tags_are_others_then_frames_are_not_ours() {
    with_slb(|slb| {
        let frame = syn(client(0, 1_000), vip(0, port::HTTP));
        let gets_in = |slb: &mut Slb<'_>, tags: &[(u16, u16)]| {
            let bytes = tagged(&frame.bytes(), tags);
            let run = slb.run(WAN, &bytes);
            if run.verdict == Verdict::NotOurs {
                assert_eq!((run.action, &run.bytes), (XDP_PASS, &bytes), "{tags:?}");
            }
            run.verdict == Verdict::Forwarded
        };
        slb.maps.serve_vlans(Some(&BTreeSet::from([10, 20]))).expect("a write");
        let rows: [(&[(u16, u16)], bool); 9] = [
            (&[], true),
            (&[(0x8100, 10)], true),
            (&[(0x8100, 0xe014)], true),
            (&[(0x8100, 0)], true),
            (&[(0x8100, 30)], false),
            (&[(0x88a8, 4_095)], false),
            (&[(0x88a8, 10), (0x8100, 20)], true),
            (&[(0x88a8, 10), (0x8100, 30)], false),
            (&[(0x88a8, 30), (0x8100, 20)], false),
        ];
        for (tags, expected) in rows {
            assert_eq!(gets_in(slb, tags), expected, "{tags:?}");
        }
        slb.maps.serve_vlans(Some(&BTreeSet::new())).expect("a write");
        assert!(gets_in(slb, &[]) && !gets_in(slb, &[(0x8100, 10)]));
        slb.maps.serve_vlans(None).expect("a write");
        assert!(gets_in(slb, &[(0x8100, 30)]) && gets_in(slb, &[(0x88a8, 30), (0x8100, 4_094)]));
    });
}

#[test]
#[ignore = "needs root"]
fn given_source_routes_and_chains_of_headers_when_they_are_to_a_vip_then_they_end_here() {
    with_slb(|slb| {
        let loose = vec![131, 7, 4, 192, 0, 2, 1, 0];
        let strict = vec![1, 137, 7, 4, 192, 0, 2, 1];
        let headers = |number: u8, count| vec![Extension::padding(number.into()); count];
        for to in [port::HTTP, 9] {
            for setting in [abi::NO_LISTENER_PASS, abi::NO_LISTENER_DROP, abi::NO_LISTENER_RESET] {
                slb.set(|settings| settings.no_listener = setting);
                for options in [&loose, &strict] {
                    let frame = syn(client(0, 1_000), vip(0, to));
                    let frame = Frame { v4_options: options.clone(), ..frame };
                    slb.client_sends("source route", &frame, &MARTIAN);
                    let frame = frame.to(client(0, 7));
                    slb.client_sends("elsewhere", &frame, &NOT_OURS);
                }
                let frame = syn(client(1, 1_000), vip(1, to));
                let routed = Frame { extensions: vec![Extension::routing(2)], ..frame.clone() };
                slb.client_sends("routing header", &routed, &MARTIAN);
                let long = Frame { extensions: headers(60, 7), ..frame };
                slb.client_sends("seven", &long, &Outcome::Untouched(Verdict::Malformed));
            }
        }
        let mut echo = icmp(&syn(client(0, 0), vip(0, 0)), [8, 0], [0; 4], b"");
        echo.v4_options.clone_from(&loose);
        slb.client_sends("echo", &echo, &MARTIAN);
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_first_fragment_without_a_whole_header_when_it_arrives_then_it_is_malformed() {
    with_slb(|slb| {
        for len in [0, 4, 7] {
            let frame = datagram(client(0, 1_000), vip(0, port::DNS));
            let mut bytes = Frame { payload: vec![7; 40], ..frame }.bytes();
            bytes[L3 + 2..L3 + 4].copy_from_slice(&(20 + len as u16).to_be_bytes());
            bytes[L3 + 6] = 0x20;
            seal_v4(&mut bytes);
            slb.check("too short", WAN, &bytes, &Outcome::Untouched(Verdict::Malformed));
        }
    });
}

fn records(slb: &Slb<'_>) -> usize {
    let map: HashMap<MapData, FragmentKey, Fragment> =
        slb.pinned("SLB_FRAGMENTS").try_into().expect("a hash");
    map.keys().count()
}

#[test]
#[ignore = "needs root"]
fn given_first_fragments_when_they_are_of_no_flow_or_of_one_source_then_they_take_little_room() {
    with_slb(|slb| {
        for family in FAMILIES {
            let big = |from, to| Frame { payload: vec![7; 1_200], ..datagram(from, to) };
            for id in 0..50 {
                let foreign = big(client(family, 1_000), client_of(101, family, id));
                let denied = big(at(SOURCES[family][0], 1_000), vip(family, port::DNS));
                let direct = big(client(family, 1_000), backend(2, family, port::DNS_BACKEND));
                for frame in [foreign, denied, direct] {
                    slb.act(WAN, &fragments(&frame, id)[0]);
                }
            }
            assert_eq!(records(slb), family * abi::FRAGMENTS_PER_SOURCE as usize);
            let frame = big(client(family, 1_000), vip(family, port::DNS));
            for id in 0..2_000 {
                slb.act(WAN, &fragments(&frame, id)[0]);
            }
            assert_eq!(records(slb), (family + 1) * abi::FRAGMENTS_PER_SOURCE as usize);
            // The last ones are there, and not taken for those that they have pushed out.
            let later = |id| fragments(&frame, id)[1].clone();
            assert_eq!(slb.run(WAN, &later(1_999)).verdict, Verdict::Forwarded);
            assert_eq!(slb.run(WAN, &later(1_999 - 256)).verdict, Verdict::Fragment);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_access_list_when_errors_are_about_its_flows_then_it_says_which_get_in() {
    with_slb(|slb| {
        for family in FAMILIES {
            let listener = endpoint(vip(family, port::HTTP), abi::TCP);
            let about = |net| syn(vip(family, port::HTTP), client_of(net, family, 1_000));
            let router = client_of(104, family, 0).ip();
            let listed = client_of(101, family, 0).ip();
            let host = if family == 0 { 128 } else { 64 };
            slb.change(|state| {
                let list = [(abi::listed_bits(host), listed.into())];
                state.acls.insert(7, Arc::new(list.into()));
            });
            for mode in [ListenerFlags::ALLOW, ListenerFlags::DENY] {
                slb.change(|state| {
                    let policy = &mut state.listeners.get_mut(&listener).expect("it").policy;
                    (policy.flags, policy.acl) = (ListenerFlags::GUARDED | mode, 7);
                });
                let is_allow = mode == ListenerFlags::ALLOW;
                for (from, net, is_in) in [
                    (router, 101, is_allow),
                    (router, 100, !is_allow),
                    (listed, 101, is_allow),
                    (listed, 100, false),
                ] {
                    let run = slb.run(WAN, &error(from, &about(net)).bytes());
                    let expected = if is_in { Verdict::Forwarded } else { Verdict::Denied };
                    assert_eq!(run.verdict, expected, "{mode:?}: from {from} about {net}");
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_limit_of_bandwidth_when_errors_are_about_its_flows_then_they_are_charged() {
    /// Far more than a test takes, in nanoseconds.
    const HOUR: u64 = 3_600_000_000_000;
    with_slb(|slb| {
        for family in FAMILIES {
            let listener = endpoint(vip(family, port::HTTP), abi::TCP);
            let id = slb.maps.installed().listeners[&listener].id;
            slb.change(|state| {
                let policy = &mut state.listeners.get_mut(&listener).expect("it").policy;
                policy.flags = ListenerFlags::GUARDED | ListenerFlags::LIMITED;
                let (byte_ns, byte_burst) = (HOUR << 16 >> 8, HOUR);
                state.limits.insert(id, abi::Limits { byte_ns, byte_burst, ..Default::default() });
            });
            let about = syn(vip(family, port::HTTP), client(family, 1_000));
            let error = error(client(family, 0).ip(), &about).bytes();
            let verdicts: Vec<_> = (0..20).map(|_| slb.run(WAN, &error).verdict).collect();
            assert_eq!(verdicts[0], Verdict::Forwarded);
            assert_eq!(verdicts[19], Verdict::BandwidthLimit);
            let frame = syn(client(family, 1_000), vip(family, port::HTTP));
            slb.client_sends("flow", &frame, &Outcome::Untouched(Verdict::BandwidthLimit));
        }
    });
}
