//! What the gateway answers itself: packets that are too big, and ports without a listener.

use slb_common::{
    abi::{ERRORS_PER_JIFFY, NO_LISTENER_DROP, NO_LISTENER_RESET},
    verdict::Verdict,
};

use crate::{
    fixture::{
        FAMILIES, Outcome, Run, Slb, XDP_TX, answer, backend, client, datagram, forwarded, id,
        port, syn, vip, with_slb,
    },
    frame::{ACK, Frame, L3, RST, Transport, icmp, seal_v4},
    lab::{FIRST, LAN, WAN},
};

/// The message that answers `frame`: what it says, and how much of the frame it quotes.
fn told(frame: &Frame, kind: [u8; 2], mtu: u16) -> Vec<u8> {
    let family = usize::from(frame.src.is_ipv6());
    let max = [548, 1_232][family];
    let packet = &frame.bytes()[L3..];
    let quote = &packet[..packet.len().min(max) / 4 * 4];
    let [high, low] = mtu.to_be_bytes();
    let base = Frame {
        src: frame.dst,
        dst: frame.src,
        src_mac: frame.dst_mac,
        dst_mac: frame.src_mac,
        ttl: 64,
        v4_options: Vec::new(),
        ..frame.clone()
    };
    let mut bytes = icmp(&base, kind, [0, 0, high, low], quote).bytes();
    // Internetwork control, without identification.
    if family == 0 {
        bytes[L3 + 1] = 0xc0;
        bytes[L3 + 4..L3 + 6].fill(0);
        seal_v4(&mut bytes);
    } else {
        bytes[L3..L3 + 4].copy_from_slice(&[0x6c, 0, 0, 0]);
    }
    bytes
}

const TOO_BIG: [[u8; 2]; 2] = [[3, 4], [2, 0]];
const UNREACHABLE_PORT: [[u8; 2]; 2] = [[3, 3], [1, 4]];

#[test]
#[ignore = "needs root"]
fn given_a_packet_above_the_mtu_of_its_way_when_it_may_not_be_fragmented_then_its_sender_is_told() {
    with_slb(|slb| {
        for family in FAMILIES {
            let from = client(family, 1_000);
            for (to, id) in [
                (port::HTTP, id::HTTP),
                (port::DSR, id::DSR),
                (port::IPIP, id::IPIP),
                (port::TURN, id::TURN),
            ] {
                let open = syn(from, vip(family, to));
                slb.run(WAN, &open.bytes());
                let mtu = 1_300;
                slb.backend(id + family as u32, |backend| backend.mtu = mtu);
                let headers = [40, 60][family];
                for (more, is_too_big) in [(0, false), (1, true), (200, true), (7_000, true)] {
                    let payload = vec![7; mtu as usize - headers + more];
                    let frame = Frame { payload, ..open.clone().flags(ACK) };
                    let run = slb.run(WAN, &frame.bytes());
                    if is_too_big {
                        assert_eq!(run.verdict, Verdict::TooBig, "{to}: {more} too many");
                        let expected = told(&frame, TOO_BIG[family], mtu as u16);
                        assert_eq!(run.bytes, expected, "{to}: {more} too many");
                    } else {
                        assert_eq!(run.verdict, Verdict::Forwarded, "{to}: as many as fit");
                    }
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_reply_above_the_mtu_of_its_way_when_it_may_not_be_fragmented_then_the_backend_is_told() {
    with_slb(|slb| {
        for family in FAMILIES {
            slb.netns.ip("link set wan0 mtu 1300\n").expect("an MTU");
            let http = syn(client(family, 1_000), vip(family, port::HTTP));
            let inside = http.to(backend(0, family, port::HTTP_BACKEND));
            slb.client_sends("a flow", &http, &forwarded(inside.clone(), FIRST));
            let reply = Frame { payload: vec![7; 1_350], ..answer(&inside) };
            let run = slb.run(LAN, &reply.bytes());
            assert_eq!(run.verdict, Verdict::TooBig);
            assert_eq!(run.bytes, told(&reply, TOO_BIG[family], 1_300));
        }
    });
}

/// The same frame with the bit of IPv4 that forbids fragments gone.
fn may_be_fragmented(frame: &Frame) -> Vec<u8> {
    let mut bytes = frame.bytes();
    bytes[L3 + 6] &= !0x40;
    seal_v4(&mut bytes);
    bytes
}

#[test]
#[ignore = "needs root"]
fn given_a_packet_above_the_mtu_when_it_may_be_fragmented_then_the_kernel_does_or_it_is_dropped() {
    with_slb(|slb| {
        let payload = vec![7; 1_350];
        let from = client(0, 1_000);
        for id in [id::DNS, id::DSR_UDP, id::GUE] {
            slb.backend(id, |backend| backend.mtu = 1_300);
        }
        let dns = Frame { payload: payload.clone(), ..datagram(from, vip(0, port::DNS)) };
        let translated = may_be_fragmented(&dns.to(backend(0, 0, port::DNS_BACKEND)));
        let run = slb.run(WAN, &may_be_fragmented(&dns));
        assert_eq!((run.verdict, run.bytes), (Verdict::ForwardedByKernel, translated));
        for to in [port::DSR_UDP, port::GUE] {
            let frame = Frame { payload: payload.clone(), ..datagram(from, vip(0, to)) };
            let bytes = may_be_fragmented(&frame);
            slb.check("one hop", WAN, &bytes, &Outcome::Untouched(Verdict::Oversize));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_way_whose_mtu_is_not_known_when_a_packet_is_large_then_it_is_sent() {
    with_slb(|slb| {
        for family in FAMILIES {
            let http = syn(client(family, 1_000), vip(family, port::HTTP)).flags(ACK);
            let large = Frame { payload: vec![7; 3_000], ..http };
            let inside = large.to(backend(0, family, port::HTTP_BACKEND));
            slb.client_sends("large", &large, &forwarded(inside, FIRST));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_no_listener_when_the_policy_is_to_drop_then_what_comes_is_dropped() {
    with_slb(|slb| {
        slb.set(|settings| settings.no_listener = NO_LISTENER_DROP);
        for family in FAMILIES {
            let from = client(family, 1_000);
            let expected = Outcome::Untouched(Verdict::NoListenerDropped);
            slb.client_sends("TCP", &syn(from, vip(family, 9)), &expected);
            slb.client_sends("UDP", &datagram(from, vip(family, 9)), &expected);
            let other = syn(from, client(family, 2));
            slb.client_sends("others", &other, &Outcome::Untouched(Verdict::NotOurs));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_no_listener_when_the_policy_is_to_reset_then_what_comes_is_refused() {
    with_slb(|slb| {
        slb.set(|settings| settings.no_listener = NO_LISTENER_RESET);
        for family in FAMILIES {
            let from = client(family, 1_000);
            for flags in [ACK, crate::frame::SYN] {
                let frame = syn(from, vip(family, 9)).flags(flags);
                let Run { verdict, bytes, .. } = slb.run(WAN, &frame.bytes());
                assert_eq!(verdict, Verdict::Refused);
                assert_eq!(bytes, refusal(&frame, flags).bytes(), "flags {flags:#x}");
            }
            let frame = syn(from, vip(family, 9)).flags(RST);
            let expected = Outcome::Untouched(Verdict::NoListenerDropped);
            slb.client_sends("a reset", &frame, &expected);
            for len in [0, 3, 1_000, 1_400] {
                let frame = Frame { payload: vec![7; len], ..datagram(from, vip(family, 9)) };
                let Run { verdict, bytes, .. } = slb.run(WAN, &frame.bytes());
                assert_eq!(verdict, Verdict::Refused);
                assert_eq!(bytes, told(&frame, UNREACHABLE_PORT[family], 0), "{len} bytes");
            }
        }
    });
}

/// RFC 9293, section 3.10.7.1.
fn refusal(frame: &Frame, flags: u8) -> Frame {
    let is_syn = flags != ACK;
    let end = frame.seq + frame.payload.len() as u32 + u32::from(is_syn);
    Frame {
        src: frame.dst,
        dst: frame.src,
        src_mac: frame.dst_mac,
        dst_mac: frame.src_mac,
        ttl: 64,
        transport: Transport::Tcp {
            flags: if is_syn { RST | ACK } else { RST },
            options: Vec::new(),
        },
        seq: if is_syn { 0 } else { frame.ack },
        ack: end,
        window: 0,
        payload: Vec::new(),
        ..frame.clone()
    }
}

#[test]
#[ignore = "needs root"]
fn given_many_packets_at_once_when_they_are_refused_by_icmp_then_few_are_told() {
    with_slb(|slb| {
        slb.set(|settings| settings.no_listener = NO_LISTENER_RESET);
        let frame = datagram(client(0, 1_000), vip(0, 9)).bytes();
        // Jiffies go by meanwhile, on a slow machine one per run: only a run that has its jiffy to the
        // end says something.
        let told_when = |slb: &mut Slb<'_>, before: u32| {
            loop {
                slb.set_errors(0, 0);
                slb.act(WAN, &frame);
                let now = slb.errors().into_iter().find(|(_, errors)| *errors != 0);
                let (jiffy, _) = now.expect("an error");
                slb.set_errors(jiffy, before);
                let is_told = slb.act(WAN, &frame) == XDP_TX;
                if slb.errors().contains(&(jiffy, before + 1)) {
                    return is_told;
                }
            }
        };
        assert!(told_when(slb, 0), "the first is told");
        assert!(told_when(slb, ERRORS_PER_JIFFY - 1), "so is the last of a jiffy's share");
        assert!(!told_when(slb, ERRORS_PER_JIFFY), "the next is not");
        assert!(!told_when(slb, 100 * ERRORS_PER_JIFFY), "nor are those after it");
    });
}
