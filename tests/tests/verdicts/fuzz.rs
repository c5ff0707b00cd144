//! Frames that nobody sends on purpose: whatever arrives, the rules of every frame hold.

use etherparse::IpNumber;
use slb_common::{
    abi::Hop,
    verdict::{Action, Verdict},
};

use crate::{
    fixture::{
        FAMILIES, Slb, answer, backend, client, client_of, datagram, port, syn, vip, with_slb,
    },
    frame::{ACK, Extension, FIN, Frame, L3, RST, Transport, checksums, seal_v4},
    lab::{FIRST, LAN, OTHER_ROUTER, ROUTER, SECOND, WAN},
};

/// Unless `SLB_FUZZ_CASES` says so: fewer where the processor is emulated.
const FRAMES: u64 = 220_000;
const SEED: u64 = 0x51b_0001;

/// SplitMix64 (Steele, Lea and Flood, 2014): small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn one_in(&mut self, limit: usize) -> bool {
        self.below(limit) == 0
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
        let corpus = corpus();
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
    let is_sent = run.verdict.action() == Action::Transmit;
    if !is_sent && !is_translated {
        assert!(run.bytes == input, "{:?}, but now {:02x?}", run.verdict, run.bytes);
        return None;
    }
    if run.verdict == Verdict::Reset {
        let swapped = [&input[6..12], &input[..6]].concat();
        assert_eq!(run.bytes[..12], swapped, "the way it came");
        // It is made anew, whatever the checksum of the segment was.
        for checksum in checksums(&run.bytes).expect("a packet") {
            assert!(checksum.holds(), "{checksum:?} in {:02x?}", run.bytes);
        }
        return None;
    }
    if is_sent {
        let hops: &[Hop] = &[FIRST, SECOND, ROUTER, OTHER_ROUTER];
        let macs = |hop: &Hop| [hop.dst_mac, hop.src_mac].concat() == run.bytes[..12];
        // A neighbour that the kernel has not met gets what it has sent, MAC addresses swapped.
        assert!(
            hops.iter().any(macs) || run.verdict == Verdict::Replied,
            "sent to {:02x?}",
            &run.bytes[..12]
        );
    } else {
        assert_eq!(run.bytes[..12], input[..12], "MAC addresses are the kernel's business");
    }
    let is_v4 = input[12..14] == [0x08, 0x00];
    let ttl = L3 + if is_v4 { 8 } else { 7 };
    assert_eq!(run.bytes[ttl], input[ttl] - u8::from(is_sent), "TTL");
    only_headers_differ(input, &run.bytes, is_v4, ttl);

    let before = checksums(input)?;
    if before.iter().any(|checksum| !checksum.holds()) {
        return Some(false);
    }
    let after = checksums(&run.bytes).expect("still a packet");
    assert_eq!(before.len(), after.len(), "checksums were added or lost: {:02x?}", run.bytes);
    for checksum in after {
        assert!(checksum.holds(), "{checksum:?} in {:02x?}", run.bytes);
    }
    Some(true)
}

/// TTL, IPv4 checksum and one address in the network header, ports and checksum in the transport
/// header: nothing else may differ.
fn only_headers_differ(input: &[u8], output: &[u8], is_v4: bool, ttl: usize) {
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
    assert!(span <= 18 && changed.len() <= 6, "bytes {changed:?}: {output:02x?}");
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

fn accident(random: &mut Random, bytes: &mut Vec<u8>) {
    let at = random.below(bytes.len());
    // Most accidents are to happen where somebody looks.
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
fn seal(bytes: &mut [u8]) {
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
                [port::HTTP, port::RING, port::SLOW, port::EMPTY, port::TWIN, port::NOBODY]
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
    frames.iter().map(Frame::bytes).collect()
}

fn chains() -> [Vec<Extension>; 5] {
    let options = Extension::padding(IpNumber::IPV6_DESTINATION_OPTIONS);
    let hop_by_hop = Extension::padding(IpNumber::IPV6_HEADER_HOP_BY_HOP);
    [
        vec![hop_by_hop.clone()],
        vec![hop_by_hop, options.clone(), Extension::routing(0), Extension::Fragment(0, false)],
        vec![Extension::routing(1)],
        vec![Extension::Fragment(0, true)],
        vec![options; 6],
    ]
}
