//! Each verdict, at least once.

use std::collections::BTreeSet;

use etherparse::{ArpHardwareId, ArpOperation, ArpPacket, EtherType, IpNumber, PacketBuilder};
use slb_common::verdict::Verdict;

use crate::{
    bypass::acknowledging,
    fixture::{
        FAMILIES, Outcome, Slb, answer, at, backend, client, client_of, datagram, forwarded, id,
        port, replied, reset, syn, vip, with_slb,
    },
    frame::{ACK, FIN, Frame, L3, RST, SYN, Transport, seal_v4},
    lab::{FIRST, LAN, ROUTER, WAN, WAN_MAC},
};

/// What no single frame brings about.
const UNREACHABLE: [(Verdict, &str); 2] = [
    (Verdict::TableFull, "needs a full bucket; see `flows.rs`"),
    (Verdict::NoPort, "needs 65 000 flows; see `bypass.rs`"),
];

struct Row {
    case: &'static str,
    ingress: u32,
    input: Vec<u8>,
    expected: Outcome,
}

#[test]
#[ignore = "needs root"]
fn given_a_small_state_when_frames_arrive_then_each_gets_its_verdict() {
    with_slb(|slb| {
        let mut seen: BTreeSet<&str> =
            UNREACHABLE.iter().map(|(verdict, _)| verdict.label()).collect();
        for row in rows() {
            slb.check(row.case, row.ingress, &row.input, &row.expected);
            seen.insert(verdict_of(&row.expected).label());
        }
        for family in FAMILIES {
            no_route(slb, family);
        }
        seen.insert(Verdict::NoRoute.label());

        let missing: Vec<_> = Verdict::ALL
            .iter()
            .filter(|verdict| !seen.contains(verdict.label()))
            .filter(|verdict| !ELSEWHERE.contains(verdict))
            .collect();
        assert!(missing.is_empty(), "no row for {missing:?}");
    });
}

/// Take more than a state and a frame: `respond.rs`, `icmp.rs`, `policy.rs`, `limits.rs` and
/// `proxy_protocol.rs` have them.
const ELSEWHERE: [Verdict; 13] = [
    Verdict::Echo,
    Verdict::TooBig,
    Verdict::Oversize,
    Verdict::NoListenerDropped,
    Verdict::Refused,
    Verdict::Untranslatable,
    Verdict::Denied,
    Verdict::FlowLimit,
    Verdict::BandwidthLimit,
    Verdict::SourceLimit,
    Verdict::Closed,
    Verdict::ClosedDropped,
    Verdict::BeforeClientAddress,
];

const fn verdict_of(outcome: &Outcome) -> Verdict {
    match outcome {
        Outcome::Sent(verdict, ..)
        | Outcome::Translated(verdict, _)
        | Outcome::Answered(verdict, _)
        | Outcome::Bytes(verdict, ..)
        | Outcome::Untouched(verdict) => *verdict,
    }
}

/// Replies that the kernel has no way for.
fn no_route(slb: &mut Slb<'_>, family: usize) {
    for net in [101, 102, 103] {
        let syn = syn(client_of(net, family, 4_000), vip(family, port::HTTP));
        let inside = syn.to(backend(0, family, port::HTTP_BACKEND));
        slb.client_sends("SYN", &syn, &forwarded(inside.clone(), FIRST));
        let case = format!("network {net}, family {family}");
        slb.backend_sends(&case, &answer(&inside), &Outcome::Untouched(Verdict::NoRoute));
    }
}

fn rows() -> Vec<Row> {
    FAMILIES
        .into_iter()
        .flat_map(balanced)
        .chain(FAMILIES.into_iter().flat_map(ended))
        .chain(v4_only())
        .collect()
}

fn from_client(case: &'static str, frame: &Frame, expected: Outcome) -> Row {
    Row { case, ingress: WAN, input: frame.bytes(), expected }
}

fn from_backend(case: &'static str, frame: &Frame, expected: Outcome) -> Row {
    Row { case, ingress: LAN, input: frame.bytes(), expected }
}

fn untouched(case: &'static str, frame: &Frame, verdict: Verdict) -> Row {
    from_client(case, frame, Outcome::Untouched(verdict))
}

/// A segment from a client that is answered with a reset.
fn answered(case: &'static str, frame: &Frame) -> Row {
    from_client(case, frame, reset(frame))
}

/// Frames that are translated. Rows of one flow follow each other.
fn balanced(family: usize) -> Vec<Row> {
    let http = syn(client(family, 1_000), vip(family, port::HTTP));
    let http_inside = http.to(backend(0, family, port::HTTP_BACKEND));
    let http_answer = answer(&http_inside);
    let slow = syn(client(family, 1_000), vip(family, port::SLOW));
    let slow_inside = slow.to(backend(0, family, port::SLOW_BACKEND));
    let far = syn(client_of(106, family, 1_000), vip(family, port::HTTP));
    let far_inside = far.to(backend(0, family, port::HTTP_BACKEND));
    let dns = datagram(client(family, 1_000), vip(family, port::DNS));
    let dns_inside = dns.to(backend(0, family, port::DNS_BACKEND));
    let dns_answer = answer(&dns_inside);
    vec![
        from_client("SYN", &http, forwarded(http_inside.clone(), FIRST)),
        from_client(
            "SYN, cut to the minimum and padded",
            &Frame { payload: vec![], padding: 6, ..http.clone() },
            forwarded(Frame { payload: vec![], padding: 6, ..http_inside.clone() }, FIRST),
        ),
        from_backend("answer", &http_answer, replied(http_answer.from(http.dst), ROUTER)),
        from_client(
            "RST",
            &http.clone().flags(RST),
            forwarded(http_inside.clone().flags(RST), FIRST),
        ),
        from_client("data", &http.clone().flags(ACK), forwarded(http_inside.flags(ACK), FIRST)),
        from_client(
            "SYN, next hop not known",
            &slow,
            Outcome::Translated(Verdict::ForwardedByKernel, slow_inside.clone()),
        ),
        from_client(
            "its TTL is the kernel's business",
            &slow.clone().ttl(1),
            Outcome::Translated(Verdict::ForwardedByKernel, slow_inside.ttl(1)),
        ),
        from_client("SYN from behind MGMT", &far, forwarded(far_inside.clone(), FIRST)),
        from_backend(
            "answer through an interface without XDP",
            &answer(&far_inside),
            Outcome::Translated(Verdict::RepliedByKernel, answer(&far_inside).from(far.dst)),
        ),
        from_client("datagram", &dns, forwarded(dns_inside, FIRST)),
        from_backend("its answer", &dns_answer, replied(dns_answer.from(dns.dst), ROUTER)),
    ]
}

/// Frames that end in the program, or are not its business.
fn ended(family: usize) -> Vec<Row> {
    let http = syn(client(family, 2_000), vip(family, port::HTTP));
    let to_port = |port| syn(client(family, 2_000), vip(family, port));
    let direct = syn(client(family, 2_001), backend(1, family, port::HTTP_BACKEND));
    let icmp = Frame {
        transport: Transport::Other([IpNumber::ICMP, IpNumber::IPV6_ICMP][family]),
        // A question for the time, or nothing that there is.
        payload: vec![13, 0, 0xf2, 0xff, 0, 0, 0, 0],
        ..http.clone()
    };
    let stranger = syn(client(family, 2_000), client(family, 2_001));
    let multicast = [2, 0, 0, 0, 1, 1].map(|byte| byte | 1);
    let mut rows = vec![
        untouched("not ours", &stranger, Verdict::NotOurs),
        untouched("backend, another port", &direct.to(backend(0, family, 22)), Verdict::NotOurs),
        untouched("direct", &direct, Verdict::Bypass),
        from_backend(
            "direct, SYN-ACK",
            &acknowledging(&direct, SYN | ACK),
            Outcome::Untouched(Verdict::Bypass),
        ),
        untouched("direct, mid-connection", &direct.clone().flags(ACK), Verdict::Bypass),
        untouched("no listener", &to_port(9), Verdict::NoListener),
        untouched("TCP to a UDP listener", &to_port(port::DNS), Verdict::NoListener),
        untouched("ICMP to a VIP", &icmp, Verdict::OtherProtocol),
        untouched("ICMP to others", &icmp.to(client(family, 0)), Verdict::NotOurs),
        untouched("no backend", &to_port(port::EMPTY), Verdict::NoBackend),
        answered("ring, ACK", &to_port(port::RING).flags(ACK)),
        answered("ring, SYN and ACK", &to_port(port::RING).flags(SYN | ACK)),
        answered("ring, FIN", &to_port(port::RING).flags(FIN | ACK)),
        untouched("ring, RST", &to_port(port::RING).flags(RST), Verdict::NoFlow),
        untouched("TTL 1", &http.clone().ttl(1), Verdict::TtlExpired),
        untouched("TTL 0", &http.clone().ttl(0), Verdict::TtlExpired),
        untouched("TTL 1, no listener", &to_port(9).ttl(1), Verdict::NoListener),
        untouched("no way to a backend", &to_port(port::LOST), Verdict::NoNeighbour),
        untouched("a listener without a cursor", &to_port(port::BROKEN), Verdict::Inconsistent),
        untouched("a slot without a backend", &to_port(port::NO_BACKEND), Verdict::NoBackend),
        untouched("VIP as source", &http.from(vip(family, 2_000)), Verdict::Martian),
        untouched(
            "multicast Ethernet destination",
            &Frame { dst_mac: multicast, ..http.clone() },
            Verdict::NotOurs,
        ),
        untouched(
            "broadcast Ethernet destination",
            &Frame { dst_mac: [0xff; 6], ..http.clone() },
            Verdict::NotOurs,
        ),
        Row {
            case: "cut",
            ingress: WAN,
            input: http.bytes()[..http.l4() + 7].to_vec(),
            expected: Outcome::Untouched(Verdict::Truncated),
        },
    ];
    let ttl_2 = http.to(backend(0, family, port::HTTP_BACKEND)).ttl(2);
    rows.push(from_client("TTL 2", &http.clone().ttl(2), forwarded(ttl_2, FIRST)));
    let group = at(["224.0.0.1", "ff05::2"][family], 2_000);
    rows.push(untouched("multicast source", &http.from(group), Verdict::Martian));
    rows
}

fn v4_only() -> Vec<Row> {
    let http = syn(client(0, 3_000), vip(0, port::HTTP));
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = http.bytes();
        change(&mut bytes);
        seal_v4(&mut bytes);
        bytes
    };
    let mut bad = http.bytes();
    bad[L3 + 10] ^= 1;
    let rows = [
        ("bad checksum", bad, Verdict::BadChecksum),
        ("last fragment", changed(&|b| b[L3 + 7] |= 1), Verdict::Fragment),
        ("header of 16 bytes", changed(&|b| b[L3] = 0x44), Verdict::Malformed),
        ("ARP", arp(), Verdict::NotOurs),
        ("runt", http.bytes()[..L3].to_vec(), Verdict::NotOurs),
    ];
    rows.map(|(case, input, verdict)| Row {
        case,
        ingress: WAN,
        input,
        expected: Outcome::Untouched(verdict),
    })
    .into()
}

fn arp() -> Vec<u8> {
    let packet = ArpPacket::new(
        ArpHardwareId::ETHERNET,
        EtherType::IPV4,
        ArpOperation::REQUEST,
        &ROUTER.dst_mac,
        &[192, 0, 11, 1],
        &[0; 6],
        &[203, 0, 113, 10],
    )
    .expect("lengths that agree");
    let mut bytes = Vec::new();
    PacketBuilder::ethernet2(ROUTER.dst_mac, WAN_MAC)
        .arp(packet)
        .write(&mut bytes)
        .expect("a vector takes everything");
    bytes
}

/// RFC 1812, section 5.3.7; RFC 3927, section 2.7; RFC 4291, sections 2.5.2, 2.5.3 and 2.5.6.
#[test]
#[ignore = "needs root"]
fn given_a_listener_when_sources_cannot_be_clients_then_their_frames_are_dropped() {
    with_slb(|slb| {
        let sources = [
            (0, "0.0.0.0"),
            (0, "0.1.2.3"),
            (0, "127.0.0.1"),
            (0, "127.255.255.254"),
            (0, "169.254.0.7"),
            (0, "224.0.0.1"),
            (0, "239.255.255.255"),
            (0, "255.255.255.255"),
            (1, "::"),
            (1, "::1"),
            (1, "fe80::7"),
            (1, "ff02::1"),
        ];
        let forwarded: Vec<_> = sources
            .into_iter()
            .filter(|&(family, addr)| {
                let frame = syn(at(addr, 1_000), vip(family, port::HTTP));
                slb.run(WAN, &frame.bytes()).verdict != Verdict::Martian
            })
            .collect();
        assert!(forwarded.is_empty(), "not dropped: {forwarded:?}");
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_frame_of_a_listener_when_it_expires_here_then_no_backend_has_got_it() {
    with_slb(|slb| {
        let expired = syn(client(0, 1_000), vip(0, port::HTTP)).ttl(1);

        slb.client_sends("SYN", &expired, &Outcome::Untouched(Verdict::TtlExpired));

        let traffic = slb.maps.traffic(id::HTTP).unwrap();
        assert_eq!(traffic, slb_common::abi::Traffic::default());
    });
}
