//! Random and damaged frames: the rules that hold for every frame hold for them.

use std::net::SocketAddr;

use etherparse::IpNumber;
use slb_common::{
    abi::{BackendFlags, NextHop},
    verdict::{Action, Verdict},
};

use crate::{
    fixture::{
        FAMILIES, SOURCES, Slb, answer, backend, client, client_of, datagram, id, port, syn, vip,
        with_slb,
    },
    frame::{
        ACK, Extension, FIN, Frame, L3, RST, SYN, Transport, checksums, icmp, seal_v4, tagged,
    },
    lab::{FIRST, LAN, OTHER_ROUTER, ROUTER, SECOND, WAN},
};

/// Unless `SLB_FUZZ_CASES` says so: fewer where the processor is emulated.
const FRAMES: u64 = 220_000;
const SEED: u64 = 0x51b_0001;

/// SplitMix64 (Steele, Lea and Flood, 2014): small, and the same everywhere.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub(crate) fn one_in(&mut self, limit: usize) -> bool {
        self.below(limit) == 0
    }

    pub(crate) fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
}

/// Names the frame that a panic is about.
struct Reporter {
    number: u64,
    input: Vec<u8>,
}

impl Drop for Reporter {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {SEED:#x}, frame {}: {:02x?}", self.number, self.input);
        }
    }
}

#[test]
#[ignore = "needs root"]
fn given_any_bytes_when_they_arrive_then_they_are_counted_once_and_never_spoilt() {
    with_slb(|slb| {
        let corpus = [corpus(), own_sources(slb)].concat();
        let mut random = Random(SEED);
        let mut reporter = Reporter { number: 0, input: Vec::new() };
        let (mut sent, mut sealed) = (0_u64, 0_u64);
        let frames = frames();
        for number in 0..frames {
            let input = frame(&mut random, &corpus);
            reporter = Reporter { number, input: input.clone() };
            let ingress = if random.one_in(3) { LAN } else { WAN };
            let checked = run(slb, ingress, &input);
            sent += u64::from(checked.is_some());
            sealed += u64::from(checked == Some(true));
        }
        drop(reporter);
        let enough = sent > frames / 11 && sealed > frames / 22;
        assert!(enough, "only {sent} of {frames} were sent, {sealed} of them whole");
    });
}

fn frames() -> u64 {
    std::env::var("SLB_FUZZ_CASES")
        .map_or(FRAMES, |frames| frames.parse().expect("SLB_FUZZ_CASES is a number"))
}

/// Runs a frame and asserts what holds for all. If it was sent: whether its checksums were right.
fn run(slb: &mut Slb<'_>, ingress: u32, input: &[u8]) -> Option<bool> {
    let run = slb.run(ingress, input);
    let is_translated =
        matches!(run.verdict, Verdict::ForwardedByKernel | Verdict::RepliedByKernel);
    match run.verdict.action() {
        Action::Drop => return None,
        Action::Pass if !is_translated => {
            assert!(run.bytes == input, "{:?}, but now {:02x?}", run.verdict, run.bytes);
            return None;
        }
        Action::Pass | Action::Transmit => {}
    }
    let (input, output) = (untagged(input), untagged(&run.bytes));
    assert_eq!(input.0, output.0, "tags");
    let (input, output) = (&input.1[..], &output.1[..]);
    if matches!(run.verdict, Verdict::Reset | Verdict::Refused | Verdict::TooBig) {
        let swapped = [&input[6..12], &input[..6]].concat();
        assert_eq!(output[..12], swapped, "the way it came");
        is_computed_anew(output);
        return None;
    }
    if run.verdict == Verdict::Echo {
        let swapped = [&input[6..12], &input[..6]].concat();
        assert_eq!(output[..12], swapped, "the way it came");
        return keeps_checksums(input, output);
    }
    let is_sent = run.verdict.action() == Action::Transmit;
    goes_by_a_known_hop(run.verdict, input, output);
    let unwrapped;
    let output = if is_tunnel(output) {
        unwrapped = unwrap(input, output);
        &unwrapped[..]
    } else {
        output
    };
    let is_v4 = input[12..14] == [0x08, 0x00];
    if output[12..14] != input[12..14] && is_icmp(output) {
        is_computed_anew(output);
        return None;
    }
    if output[12..14] != input[12..14] {
        return crosses_families(input, output, is_sent);
    }
    let ttl = L3 + if is_v4 { 8 } else { 7 };
    assert_eq!(output[ttl], input[ttl] - u8::from(is_sent), "TTL");
    if output.len() == input.len() {
        only_headers_differ(input, output, is_v4, ttl);
    } else {
        let grown = output.len() - input.len();
        assert!(TOLD.contains(&grown), "{grown} bytes more");
        let padding = input.len() - packet_end(input);
        assert_eq!(packet_end(output) + padding, output.len(), "as long as it says");
    }
    keeps_checksums(input, output)
}

/// A packet of the gateway's own, or one that is too different: its checksums do not come from those of the question.
fn is_computed_anew(output: &[u8]) {
    for checksum in checksums(output).expect("a packet") {
        assert!(checksum.holds(), "{checksum:?} in {output:02x?}");
    }
    assert_eq!(output.len(), packet_end(output), "as long as it says");
}

/// The MAC addresses are those of a next hop, or left to the kernel.
fn goes_by_a_known_hop(verdict: Verdict, input: &[u8], output: &[u8]) {
    if verdict.action() == Action::Transmit {
        let hops: &[NextHop] = &[FIRST, SECOND, ROUTER, OTHER_ROUTER];
        let macs = |hop: &NextHop| [hop.dst_mac, hop.src_mac].concat() == output[..12];
        // A neighbour that the kernel has not met gets what it has sent, MAC addresses swapped.
        assert!(
            hops.iter().any(macs) || verdict == Verdict::Replied,
            "sent to {:02x?}",
            &output[..12]
        );
    } else {
        assert_eq!(output[..12], input[..12], "MAC addresses are the kernel's business");
    }
}

/// What holds for a packet that was translated between families. Returns whether its checksums were right.
fn crosses_families(input: &[u8], output: &[u8], is_sent: bool) -> Option<bool> {
    let is_v4 = input[12..14] == [0x08, 0x00];
    let padding = input.len() - packet_end(input);
    assert_eq!(packet_end(output) + padding, output.len(), "as long as it says");
    let ttl = |is_v4: bool| L3 + if is_v4 { 8 } else { 7 };
    assert_eq!(output[ttl(!is_v4)], input[ttl(is_v4)] - u8::from(is_sent), "TTL");
    // IPv6 has one checksum less, which others make up for: all of them count.
    let before = checksums(input)?;
    let is_whole = before.iter().all(|checksum| checksum.holds());
    let after = checksums(output).expect("still a packet");
    assert!(!is_whole || after.iter().all(|checksum| checksum.holds()), "{output:02x?}");
    Some(is_whole)
}

/// How much longer a packet may become for what its backend is told about the client.
const TOLD: [usize; 4] = [8, 20, 28, 52];

fn is_icmp(frame: &[u8]) -> bool {
    let is_v4 = frame[12..14] == [0x08, 0x00];
    frame[L3 + if is_v4 { 9 } else { 6 }] == if is_v4 { 1 } else { 58 }
}

/// Whether a frame is from or to an address that backends see as source.
fn is_own_source(frame: &[u8]) -> bool {
    let family = usize::from(frame[12..14] != [0x08, 0x00]);
    let addresses = [L3 + 12..L3 + 20, L3 + 8..L3 + 40][family].clone();
    SOURCES[family].into_iter().any(|source| {
        let source: std::net::IpAddr = source.parse().expect("an address");
        let bytes = match source {
            std::net::IpAddr::V4(addr) => addr.octets().to_vec(),
            std::net::IpAddr::V6(addr) => addr.octets().to_vec(),
        };
        frame[addresses.clone()].chunks(bytes.len()).any(|part| part == bytes)
    })
}

/// What was right before is right afterwards. `None`: there are none; otherwise whether they were.
fn keeps_checksums(input: &[u8], output: &[u8]) -> Option<bool> {
    let before = checksums(input)?;
    if before.iter().any(|checksum| !checksum.holds()) {
        return Some(false);
    }
    let after = checksums(output).expect("still a packet");
    assert_eq!(before.len(), after.len(), "checksums were added or lost: {output:02x?}");
    for checksum in after {
        assert!(checksum.holds(), "{checksum:?} in {output:02x?}");
    }
    Some(true)
}

/// The tags that are taken off, and the frame without them.
fn untagged(frame: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let mut at = 12;
    while at < 20
        && frame.len() >= at + 6
        && matches!(frame[at..at + 2], [0x81 | 0x91, 0] | [0x88, 0xa8])
    {
        at += 4;
    }
    (frame[12..at].to_vec(), [&frame[..12], &frame[at..]].concat())
}

/// Where the IP packet in a frame ends.
fn packet_end(frame: &[u8]) -> usize {
    let number = |at: usize| usize::from(frame[at]) << 8 | usize::from(frame[at + 1]);
    L3 + if frame[12..14] == [0x08, 0x00] { number(L3 + 2) } else { 40 + number(L3 + 4) }
}

/// Whether a frame is one of [`port::IPIP`] and the like, as they leave.
fn is_tunnel(output: &[u8]) -> bool {
    let is_v4 = output[12..14] == [0x08, 0x00];
    let (l4, proto) = if is_v4 { (L3 + 20, output[L3 + 9]) } else { (L3 + 40, output[L3 + 6]) };
    let is_gue = proto == 17
        && output.len() > l4 + 4
        && output[l4 + 2..l4 + 4] == slb_common::tunnel::GUE_PORT.to_be_bytes();
    matches!(proto, 4 | 41) || is_gue
}

/// The packet that was put into a tunnel, as a frame. Asserts what holds for every tunnel.
fn unwrap(input: &[u8], output: &[u8]) -> Vec<u8> {
    let is_v4 = output[12..14] == [0x08, 0x00];
    let (len, proto) = if is_v4 { (20, output[L3 + 9]) } else { (40, output[L3 + 6]) };
    if is_v4 {
        let mut sealed = output.to_vec();
        seal_v4(&mut sealed);
        assert_eq!(sealed, output, "the outer header's checksum");
    }
    let padding = input.len() - packet_end(input);
    assert_eq!(packet_end(output) + padding, output.len(), "as long as it says");
    let is_gue = proto == 17;
    let head = len + if is_gue { 12 } else { 0 };
    if is_gue {
        let at = L3 + len + 4;
        let stated = usize::from(output[at]) << 8 | usize::from(output[at + 1]);
        assert_eq!(L3 + len + stated, packet_end(output), "as long as it says");
        assert_eq!(output[at + 2..at + 4], [0, 0], "no checksum");
    }
    [&output[..12], &input[12..14], &output[L3 + head..]].concat()
}

/// TTL, IPv4 checksum and one address in the network header, ports and checksum in the transport
/// header: nothing else may differ.
fn only_headers_differ(input: &[u8], output: &[u8], is_v4: bool, ttl: usize) {
    assert_eq!(input.len(), output.len(), "length");
    let (checksum, addresses) = if is_v4 { (10..12, 12..20) } else { (0..0, 8..40) };
    let header = if is_v4 { usize::from(input[L3] & 0x0f) * 4 } else { 40 };
    let in_network =
        |at: usize| at == ttl || checksum.contains(&(at - L3)) || addresses.contains(&(at - L3));
    let others: Vec<usize> = (L3..input.len())
        .filter(|&at| input[at] != output[at])
        .filter(|&at| if at < L3 + header { !in_network(at) } else { false })
        .collect();
    assert!(others.is_empty(), "bytes {others:?} of the network header: {output:02x?}");
    let changed: Vec<usize> =
        (L3 + header..input.len()).filter(|&at| input[at] != output[at]).collect();
    let span = changed.last().map_or(0, |last| last + 1 - changed[0]);
    // An error has the packet that it is about as well. A backend that is told about the client gets, and
    // gives, other numbers.
    let (longest, most) = match (is_icmp(input), is_own_source(input) || is_own_source(output)) {
        (true, _) => (100, 34),
        (false, true) => (62, 14),
        (false, false) => (18, 6),
    };
    assert!(span <= longest && changed.len() <= most, "bytes {changed:?}: {output:02x?}");
}

/// A frame of the corpus after some accidents, or no frame at all.
fn frame(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    if random.one_in(20) {
        let len = L3 + random.below(200);
        let mut bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        bytes[0] &= !1;
        let types: [&[u8]; 3] = [&[0x08, 0x00], &[0x86, 0xdd], &[0x81, 0x00]];
        bytes[12..14].copy_from_slice(types[random.below(3)]);
        return bytes;
    }
    let mut bytes = corpus[random.below(corpus.len())].clone();
    for _ in 0..random.below(5) {
        accident(random, &mut bytes);
    }
    if random.one_in(2) {
        seal(&mut bytes);
    }
    bytes
}

pub(crate) fn accident(random: &mut Random, bytes: &mut Vec<u8>) {
    let at = random.below(bytes.len());
    // Most damage should be where the program reads.
    let at = if random.one_in(2) { at } else { at.min(12 + random.below(70)) };
    match random.below(10) {
        0..3 => bytes[at] ^= 1 << random.below(8),
        3..5 => bytes[at] = random.next() as u8,
        5 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
        6 => bytes.truncate(at.max(L3)),
        7 => bytes.insert(at, random.next() as u8),
        8 if bytes.len() > L3 => drop(bytes.remove(at)),
        _ => bytes.extend((0..random.below(64)).map(|_| 0xee)),
    }
}

/// Makes all checksums right, where etherparse still finds them.
pub(crate) fn seal(bytes: &mut [u8]) {
    let is_v4 = bytes.len() >= L3 + 20 && bytes[12..14] == [0x08, 0x00];
    if is_v4 && bytes.len() >= L3 + usize::from(bytes[L3] & 0x0f) * 4 && bytes[L3] & 0x0f >= 5 {
        seal_v4(bytes);
    }
    for checksum in checksums(bytes).into_iter().flatten() {
        bytes[checksum.at..checksum.at + 2].copy_from_slice(&checksum.right.to_be_bytes());
    }
}

fn corpus() -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for family in FAMILIES {
        let nets = [100, 101, 104, 105, 106];
        for (net, sport) in nets.into_iter().flat_map(|net| (1..4).map(move |port| (net, port))) {
            let from = client_of(net, family, 1_000 * sport);
            for listener in
                [port::HTTP, port::RING, port::SLOW, port::EMPTY, port::TWIN, port::NO_BACKEND]
            {
                let http = syn(from, vip(family, listener));
                frames.extend([ACK, FIN | ACK, RST].map(|flags| http.clone().flags(flags)));
                frames.push(http);
            }
            for backend_port in [port::HTTP_BACKEND, port::RING_BACKEND, port::SLOW_BACKEND] {
                let direct = syn(from, backend(0, family, backend_port));
                frames.extend([ACK, FIN | ACK, RST].map(|flags| answer(&direct).flags(flags)));
                frames.push(direct);
            }
            let dns = datagram(from, vip(family, port::DNS));
            frames.push(answer(&dns.to(backend(0, family, port::DNS_BACKEND))));
            frames.push(Frame { payload: vec![], ..dns.clone() });
            frames.push(Frame { transport: Transport::Udp { checksum: false }, ..dns.clone() });
            frames.push(dns);
            frames
                .extend([port::IPIP, port::CROSS, port::DSR].map(|to| syn(from, vip(family, to))));
            for to in [port::GUE, port::FULL_UDP, port::OTHER_UDP] {
                frames.push(datagram(from, vip(family, to)));
            }
            for to in [port::FULL, port::OTHER] {
                let full = syn(from, vip(family, to));
                frames.extend([full.clone().flags(ACK), full]);
            }
            frames.extend(messages(family, from));
        }
        let http = syn(client(family, 4_000), vip(family, port::HTTP));
        let options = Transport::Tcp { flags: ACK, options: vec![1; 20] };
        frames.push(Frame { transport: options, payload: vec![7; 900], ..http.clone() });
        if family == 0 {
            frames
                .extend([4, 20, 40].map(|len| Frame { v4_options: vec![1; len], ..http.clone() }));
        } else {
            frames.extend(chains().map(|extensions| Frame { extensions, ..http.clone() }));
        }
    }
    let plain: Vec<Vec<u8>> = frames.iter().map(Frame::bytes).collect();
    let tags: [&[(u16, u16)]; 3] =
        [&[(0x8100, 7)], &[(0x88a8, 1), (0x8100, 2)], &[(0x8100, 1), (0x8100, 2), (0x8100, 3)]];
    let with_tags = plain.iter().zip(tags.into_iter().cycle()).step_by(3);
    let with_tags: Vec<_> = with_tags.map(|(frame, tags)| tagged(frame, tags)).collect();
    [plain, with_tags].concat()
}

/// Connections whose backends see a source of ours, and are told who the client is or not: what the client sends,
/// what the backend answers, and errors about both.
fn own_sources(slb: &mut Slb<'_>) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for family in FAMILIES {
        let flag = [BackendFlags::PROXY, BackendFlags::OPTION][family];
        slb.backend(id::FULL + family as u32, |backend| backend.flags |= flag);
        slb.backend(id::OTHER + family as u32, |backend| backend.flags |= BackendFlags::PROXY);
        for (to, at, inside) in [
            (port::FULL, port::FULL_BACKEND, family),
            (port::OTHER, port::OTHER_BACKEND, 1 - family),
            (port::OTHER_UDP, port::OTHER_UDP_BACKEND, 1 - family),
        ] {
            for sport in 20_000..20_010 {
                let from = client(family, sport);
                let at = backend(0, inside, at);
                let open = if to == port::OTHER_UDP {
                    datagram(from, vip(family, to))
                } else {
                    Frame { payload: Vec::new(), ..syn(from, vip(family, to)) }
                };
                let run = slb.run(WAN, &open.bytes());
                let source = super::fixture::sender(&run.bytes, inside);
                let seen = Frame { src: source, dst: at, ..open.clone() };
                let outside = answer(&open);
                for less in [0, 28, 52] {
                    let transport =
                        Transport::Tcp { flags: SYN | ACK, options: vec![2, 4, 5, 180] };
                    let reply = Frame { ack: open.seq + 1 - less, ..answer(&seen) };
                    frames.push(reply.clone().flags(ACK));
                    if matches!(open.transport, Transport::Tcp { .. }) {
                        frames.push(Frame { transport, ..reply });
                    }
                    let data = Frame { seq: open.seq + 1, payload: vec![7; 20], ..open.clone() };
                    frames.extend([ACK, FIN | ACK, RST].map(|flags| data.clone().flags(flags)));
                    let told = Frame { seq: open.seq - less, ..seen.clone() };
                    for kind in [[[3, 4], [3, 3], [11, 0]], [[2, 0], [1, 4], [3, 0]]][inside] {
                        let router = Frame::tcp(backend(2, inside, 0), source);
                        frames.push(icmp(&router, kind, [0, 0, 5, 0], &told.bytes()[L3..]));
                    }
                }
                for kind in [[[3, 4], [3, 3], [11, 0]], [[2, 0], [1, 4], [3, 0]]][family] {
                    let router = Frame::tcp(client(family, 0), outside.src);
                    frames.push(icmp(&router, kind, [0, 0, 5, 0], &outside.bytes()[L3..]));
                }
            }
        }
    }
    frames.iter().map(Frame::bytes).collect()
}

/// ICMP to and about a VIP.
fn messages(family: usize, from: SocketAddr) -> Vec<Frame> {
    let echo = syn(from, vip(family, 0));
    let http = syn(from, vip(family, port::HTTP));
    let inside = http.to(backend(0, family, port::HTTP_BACKEND));
    let outside = answer(&inside).from(http.dst);
    let about = |frame: &Frame, to: SocketAddr| {
        let base = Frame { dst: to, ..echo.clone() };
        icmp(&base, [[3, 4], [2, 0]][family], [0, 0, 5, 0], &frame.bytes()[L3..])
    };
    vec![
        icmp(&echo, [[8, 0], [128, 0]][family], [0, 1, 0, 2], b"an echo"),
        about(&outside, outside.src),
        about(&inside, inside.src).from(inside.dst),
    ]
}

fn chains() -> [Vec<Extension>; 6] {
    let options = Extension::padding(IpNumber::IPV6_DESTINATION_OPTIONS);
    let hop_by_hop = Extension::padding(IpNumber::IPV6_HEADER_HOP_BY_HOP);
    [
        vec![hop_by_hop.clone()],
        vec![hop_by_hop, options.clone(), Extension::routing(0), Extension::Fragment(0, false)],
        vec![Extension::routing(1)],
        vec![Extension::Fragment(0, true)],
        vec![Extension::Fragment(60, false)],
        vec![options; 6],
    ]
}
