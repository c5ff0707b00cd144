//! ICMP of both families: echo to a VIP, and errors about flows.

use std::net::{IpAddr, SocketAddr};

use slb_common::{abi::NextHop, verdict::Verdict};

use crate::{
    fixture::{
        FAMILIES, Outcome, Slb, answer, backend, client, datagram, forwarded, port, replied, syn,
        vip, with_slb,
    },
    frame::{ACK, Frame, L3, icmp},
    lab::{FIRST, LAN_MAC, ROUTER, SECOND, WAN_MAC},
};

/// Types of an echo request and its reply, by family.
const ECHO: [[u8; 2]; 2] = [[8, 0], [128, 129]];
/// Type and code of errors, by family: unreachable port, too big, time exceeded.
const ERRORS: [[[u8; 2]; 3]; 2] = [[[3, 3], [3, 4], [11, 0]], [[1, 4], [2, 0], [3, 0]]];

/// The first part of a frame's packet, as an error quotes it.
pub(crate) fn quote(frame: &Frame, len: usize) -> Vec<u8> {
    let packet = &frame.bytes()[L3..];
    packet[..len.min(packet.len())].to_vec()
}

/// An error about `about`, from `from` to whom that says it is from, on the clients' side.
fn error(from: SocketAddr, about: &Frame, kind: [u8; 2], quoted: usize) -> Frame {
    let base = Frame { src_mac: ROUTER.dst_mac, dst_mac: WAN_MAC, ..Frame::tcp(from, about.src) };
    icmp(&base, kind, [0, 0, 5, 120], &quote(about, quoted))
}

/// The same, on the backends' side.
fn error_inside(from: SocketAddr, about: &Frame, kind: [u8; 2], quoted: usize) -> Frame {
    Frame { src_mac: FIRST.dst_mac, dst_mac: LAN_MAC, ..error(from, about, kind, quoted) }
}

#[test]
#[ignore = "needs root"]
fn given_an_echo_request_to_a_vip_when_it_arrives_then_the_reply_goes_back_the_way_it_came() {
    with_slb(|slb| {
        for family in FAMILIES {
            let [request, reply] = ECHO[family];
            for rest in [&b""[..], b"odd", &[0; 56], &[0xff; 1_400]] {
                let asked = syn(client(family, 0), vip(family, 0));
                let echo = icmp(&asked, [request, 0], [0x12, 0x34, 0, 1], rest);
                let back = Frame {
                    src: echo.dst,
                    dst: echo.src,
                    src_mac: echo.dst_mac,
                    dst_mac: echo.src_mac,
                    ttl: 64,
                    ..echo.clone()
                };
                let answered = icmp(&back, [reply, 0], [0x12, 0x34, 0, 1], rest);
                slb.client_sends("echo", &echo, &Outcome::Answered(Verdict::Echo, answered));
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_icmp_without_a_flow_when_it_arrives_then_it_is_the_kernels() {
    with_slb(|slb| {
        for family in FAMILIES {
            let [request, reply] = ECHO[family];
            let to = |dst| syn(client(family, 0), dst);
            let head = [0, 0, 0, 1];
            let other = client(family, 1);
            let stranger = syn(client(family, 9), client(family, 10)).flags(ACK);
            let cases = [
                (icmp(&to(other), [request, 0], head, b"x"), Verdict::NotOurs),
                (icmp(&to(vip(family, 0)), [reply, 0], head, b"x"), Verdict::OtherProtocol),
                (error(other, &stranger, ERRORS[family][0], 100), Verdict::NotOurs),
                (
                    error(other, &syn(vip(family, 9), client(family, 9)), ERRORS[family][0], 100),
                    Verdict::OtherProtocol,
                ),
            ];
            for (frame, verdict) in cases {
                slb.client_sends("no flow's", &frame, &Outcome::Untouched(verdict));
            }
            let martian = ["127.0.0.1", "::1"][family].parse().expect("an address");
            let echo = icmp(&to(vip(family, 0)), [request, 0], head, b"x");
            let echo = icmp(&echo.from(SocketAddr::new(martian, 0)), [request, 0], head, b"x");
            slb.client_sends("martian", &echo, &Outcome::Untouched(Verdict::Martian));
        }
    });
}

/// A flow, what its backend sends and gets, and what the client sends and gets.
struct Talk {
    forward: Frame,
    inside: Frame,
    reply: Frame,
    reply_outside: Frame,
}

fn talk(slb: &mut Slb<'_>, forward: Frame, inside: SocketAddr, source: IpAddr, sport: u16) -> Talk {
    let inside = Frame { src: SocketAddr::new(source, sport), ..forward.clone().to(inside) };
    let reply = answer(&inside);
    let reply_outside = Frame { src: forward.dst, dst: forward.src, ..reply.clone() };
    slb.client_sends("a flow", &forward, &forwarded(inside.clone(), FIRST));
    slb.backend_sends("its reply", &reply, &replied(reply_outside.clone(), ROUTER));
    Talk { forward, inside, reply, reply_outside }
}

fn talks(slb: &mut Slb<'_>, family: usize) -> Vec<Talk> {
    let from = client(family, 1_000);
    let http = syn(from, vip(family, port::HTTP));
    let dns = datagram(from, vip(family, port::DNS));
    let turn = syn(from, vip(family, port::TURN));
    let mut talks = vec![
        talk(slb, http, backend(0, family, port::HTTP_BACKEND), from.ip(), 1_000),
        talk(slb, dns, backend(0, family, port::DNS_BACKEND), from.ip(), 1_000),
        talk(slb, turn, backend(0, family, port::TURN_BACKEND), from.ip(), 1_000),
    ];
    // Two listeners with one backend: the second gets another source port.
    let shared = syn(from, vip(family, port::SHARED));
    talks.push(talk(slb, shared, backend(0, family, port::SHARED_BACKEND), from.ip(), 1_000));
    let twin = syn(from, vip(family, port::TWIN));
    let run = slb.run(crate::lab::WAN, &twin.bytes());
    let l4 = twin.l4();
    let sport = u16::from_be_bytes([run.bytes[l4], run.bytes[l4 + 1]]);
    assert_ne!(sport, 1_000, "the port is taken");
    talks.push(talk(slb, twin, backend(0, family, port::SHARED_BACKEND), from.ip(), sport));
    // One whose backend sees a source of ours.
    let full = syn(from, vip(family, port::FULL));
    let run = slb.run(crate::lab::WAN, &full.bytes());
    let source = super::fixture::sender(&run.bytes, family);
    let inside = backend(0, family, port::FULL_BACKEND);
    talks.push(talk(slb, full, inside, source.ip(), source.port()));
    talks
}

#[test]
#[ignore = "needs root"]
fn given_a_flow_when_its_replies_cannot_be_delivered_then_its_backend_is_told_in_its_own_words() {
    with_slb(|slb| {
        for family in FAMILIES {
            for Talk { reply, reply_outside, .. } in talks(slb, family) {
                for kind in ERRORS[family] {
                    for quoted in [28 + 20 * family, 40 + 20 * family, 500] {
                        let who = [client(family, 0), super::fixture::client_of(104, family, 0)];
                        for from in who {
                            let told = error(from, &reply_outside, kind, quoted);
                            // The quote is the packet as the client's side has got it.
                            let inner = quote(&reply, quoted);
                            let base = Frame { dst: reply.src, ..told.clone() };
                            let expected = icmp(&base, kind, [0, 0, 5, 120], &inner);
                            slb.client_sends("an error", &told, &forwarded(expected, FIRST));
                        }
                    }
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_flow_when_its_packets_cannot_be_delivered_then_the_client_is_told_in_its_own_words() {
    with_slb(|slb| {
        for family in FAMILIES {
            for Talk { forward, inside, .. } in talks(slb, family) {
                for kind in ERRORS[family] {
                    for quoted in [28 + 20 * family, 40 + 20 * family, 500] {
                        let router = backend(2, family, 0);
                        // The backend itself, which is the VIP to the client, and a router before it.
                        for (from, outside) in [(inside.dst, forward.dst), (router, router)] {
                            let told = error_inside(from, &inside, kind, quoted);
                            let told = Frame { dst: inside.src, ..told };
                            let inner = quote(&forward, quoted);
                            let base = Frame { src: outside, dst: forward.src, ..told.clone() };
                            let expected = icmp(&base, kind, [0, 0, 5, 120], &inner);
                            slb.backend_sends("an error", &told, &replied(expected, ROUTER));
                        }
                    }
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_slot_on_its_way_when_an_error_comes_then_it_goes_to_the_backend_that_has_the_flow() {
    with_slb(|slb| {
        let from = client(0, 1_000);
        let http = syn(from, vip(0, port::HTTP));
        let inside = http.to(backend(0, 0, port::HTTP_BACKEND));
        slb.client_sends("settled", &http, &forwarded(inside.clone(), FIRST));
        slb.move_to(vip(0, port::HTTP), &[super::fixture::id::HTTP_SECOND]);
        let reply = answer(&inside);
        let outside = reply.from(http.dst);
        let told = error(from, &outside, [11, 0], 500);
        let expected = icmp(&told.to(reply.src), [11, 0], [0, 0, 5, 120], &quote(&reply, 500));
        slb.client_sends("an old flow", &told, &forwarded(expected, FIRST));

        let other = syn(client(0, 2_000), vip(0, port::HTTP));
        let inside = other.to(backend(1, 0, port::HTTP_BACKEND));
        slb.client_sends("a new flow", &other, &forwarded(inside.clone(), SECOND));
        let reply = answer(&inside);
        let outside = reply.from(other.dst);
        let told = error(client(0, 2_000), &outside, [11, 0], 500);
        let expected = icmp(&told.to(reply.src), [11, 0], [0, 0, 5, 120], &quote(&reply, 500));
        slb.client_sends("its error", &told, &forwarded(expected, SECOND));
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_with_the_vip_when_an_error_comes_then_it_gets_that_as_it_is() {
    with_slb(|slb| {
        for family in FAMILIES {
            let outside = answer(&syn(client(family, 1_000), vip(family, port::DSR)));
            let told = error(client(family, 0), &outside, ERRORS[family][1], 500);
            slb.client_sends("an error", &told, &forwarded(told.clone(), FIRST));
        }
    });
}

/// What an error says, and in the words of the other family: kind and second word of the header. `None`: there
/// are none.
type Words = ([u8; 2], [u8; 4], Option<([u8; 2], [u8; 4])>);

/// RFC 7915, section 4.2, of errors over IPv4.
const TO_V6: [Words; 16] = [
    ([3, 0], [0; 4], Some(([1, 0], [0; 4]))),
    ([3, 1], [0; 4], Some(([1, 0], [0; 4]))),
    ([3, 2], [0; 4], Some(([4, 1], [0, 0, 0, 6]))),
    ([3, 3], [0; 4], Some(([1, 4], [0; 4]))),
    ([3, 4], [0, 0, 0x05, 0x78], Some(([2, 0], [0, 0, 0x05, 0x8c]))),
    ([3, 4], [0, 0, 0, 0], Some(([2, 0], [0, 0, 0x05, 0]))),
    ([3, 5], [0; 4], Some(([1, 0], [0; 4]))),
    ([3, 9], [0; 4], Some(([1, 1], [0; 4]))),
    ([3, 13], [0; 4], Some(([1, 1], [0; 4]))),
    ([3, 14], [0; 4], None),
    ([11, 0], [0; 4], Some(([3, 0], [0; 4]))),
    ([11, 1], [0; 4], Some(([3, 1], [0; 4]))),
    ([12, 0], [9, 0, 0, 0], Some(([4, 0], [0, 0, 0, 6]))),
    ([12, 2], [17, 0, 0, 0], Some(([4, 0], [0, 0, 0, 24]))),
    ([12, 0], [4, 0, 0, 0], None),
    ([12, 1], [0; 4], None),
];

/// Section 5.2, of errors over IPv6.
const TO_V4: [Words; 13] = [
    ([1, 0], [0; 4], Some(([3, 1], [0; 4]))),
    ([1, 1], [0; 4], Some(([3, 10], [0; 4]))),
    ([1, 3], [0; 4], Some(([3, 1], [0; 4]))),
    ([1, 4], [0; 4], Some(([3, 3], [0; 4]))),
    ([1, 5], [0; 4], None),
    ([2, 0], [0, 0, 0x05, 0x78], Some(([3, 4], [0, 0, 0x05, 0x64]))),
    ([3, 0], [0; 4], Some(([11, 0], [0; 4]))),
    ([3, 1], [0; 4], Some(([11, 1], [0; 4]))),
    ([4, 0], [0, 0, 0, 7], Some(([12, 0], [8, 0, 0, 0]))),
    ([4, 0], [0, 0, 0, 24], Some(([12, 0], [16, 0, 0, 0]))),
    ([4, 0], [0, 0, 0, 3], None),
    ([4, 1], [0, 0, 0, 6], Some(([3, 2], [0; 4]))),
    ([4, 2], [0; 4], None),
];

/// A frame's packet as it is quoted to the other family: eight bytes of its transport, and of its header only what
/// both families have.
fn quoted_anew(frame: &Frame) -> Vec<u8> {
    let mut bytes = frame.bytes();
    if frame.src.is_ipv4() {
        bytes[L3 + 1] = 0;
        crate::full_nat::may_be_fragmented(&mut bytes);
    } else {
        bytes[L3..L3 + 4].copy_from_slice(&[0x60, 0, 0, 0]);
    }
    let head = if frame.src.is_ipv4() { 20 } else { 40 };
    bytes[L3..][..head + 8].to_vec()
}

/// An error that was made anew, about `about`, on its way by `hop`.
fn anew(about: &Frame, kind: [u8; 2], head: [u8; 4], hop: NextHop) -> Vec<u8> {
    let base = Frame {
        src_mac: hop.src_mac,
        dst_mac: hop.dst_mac,
        ..Frame::tcp(SocketAddr::new(about.dst.ip(), 0), about.src)
    };
    let mut bytes = icmp(&base, kind, head, &quoted_anew(about)).bytes();
    if about.src.is_ipv4() {
        bytes[L3 + 1] = 0xc0;
        crate::full_nat::may_be_fragmented(&mut bytes);
    } else {
        bytes[L3..L3 + 4].copy_from_slice(&[0x6c, 0, 0, 0]);
    }
    bytes
}

#[test]
#[ignore = "needs root"]
fn given_a_flow_between_families_when_an_error_comes_then_its_owner_reads_it_in_its_own() {
    with_slb(|slb| {
        for family in FAMILIES {
            let words = |family: usize| if family == 0 { &TO_V6[..] } else { &TO_V4[..] };
            for (to, at, is_tcp) in [
                (port::OTHER, port::OTHER_BACKEND, true),
                (port::OTHER_UDP, port::OTHER_UDP_BACKEND, false),
            ] {
                let from = client(family, 1_000);
                let forward = if is_tcp {
                    syn(from, vip(family, to))
                } else {
                    datagram(from, vip(family, to))
                };
                let run = slb.run(crate::lab::WAN, &forward.bytes());
                let inside = backend(0, 1 - family, at);
                let source = super::fixture::sender(&run.bytes, 1 - family);
                // What goes to the backend has a hop less to go, and so has what is quoted of it.
                let sent = Frame { src: source, dst: inside, ttl: 63, ..forward.clone() };
                let seen = forward.clone().ttl(63);
                for &(kind, head, expected) in words(1 - family) {
                    for quoted in [28 + 20 * (1 - family), 500] {
                        let router = Frame {
                            src_mac: FIRST.dst_mac,
                            dst_mac: LAN_MAC,
                            ..Frame::tcp(backend(2, 1 - family, 0), source)
                        };
                        let told = icmp(&router, kind, head, &quote(&sent, quoted));
                        let case = format!("to the client of family {family}, {kind:?} {head:?}");
                        match expected {
                            None => {
                                let expected = Outcome::Untouched(Verdict::Untranslatable);
                                slb.backend_sends(&case, &told, &expected);
                            }
                            Some((kind, head)) => {
                                let run = slb.run(crate::lab::LAN, &told.bytes());
                                assert_eq!(run.verdict, Verdict::Replied, "{case}");
                                assert_eq!(run.bytes, anew(&seen, kind, head, ROUTER), "{case}");
                            }
                        }
                    }
                }

                let outside = Frame { src: forward.dst, dst: forward.src, ..answer(&forward) };
                let reply = Frame { src: inside, dst: source, ..outside.clone() };
                for &(kind, head, expected) in words(family) {
                    let told =
                        error(super::fixture::client_of(104, family, 0), &outside, kind, 500);
                    let told = icmp(&told, kind, head, &quote(&outside, 500));
                    let case = format!("to the backend of {family}, {kind:?} {head:?}");
                    match expected {
                        None => {
                            let expected = Outcome::Untouched(Verdict::Untranslatable);
                            slb.client_sends(&case, &told, &expected);
                        }
                        Some((kind, head)) => {
                            let run = slb.run(crate::lab::WAN, &told.bytes());
                            assert_eq!(run.verdict, Verdict::Forwarded, "{case}");
                            assert_eq!(run.bytes, anew(&reply, kind, head, FIRST), "{case}");
                        }
                    }
                }
                let less = error(client(family, 0), &outside, words(family)[0].0, 27 + 20 * family);
                let expected = Outcome::Untouched(Verdict::Untranslatable);
                slb.client_sends("less is quoted", &less, &expected);
            }
        }
    });
}
