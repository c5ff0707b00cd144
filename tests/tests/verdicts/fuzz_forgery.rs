//! Hostile clients of groups that tell backends the client's address: with everything that they send, and with every behaviour of the
//! network and the backend behave, the backend reads the true address.
//!
//! [`Receiver`] is the backend, and panics when it is deceived. The client knows all that it has been sent, and more:
//! the port that the backend sees, which is kept from it in truth.

use std::net::SocketAddr;

use slb_common::{
    abi::{BackendFlags, ConnState, Flow, FlowKey},
    verdict::Verdict,
};

use crate::{
    connection::{header, option},
    fixture::{FAMILIES, Slb, backend, client, id, port, syn, vip, with_slb},
    frame::{ACK, FIN, Frame, PSH, RST, SYN, Transport, URG},
    fuzz::Random,
    lab::{FIRST, LAN, LAN_MAC, WAN},
    receiver::{Answer, Reached, Receiver, Segment, Told},
};

mod client;
mod network;

/// Unless `SLB_FUZZ_CASES` says so.
const FRAMES: u64 = 120_000;
/// That of the first connection. With `SLB_FUZZ_SEED` there is one connection, from that seed.
const SEED: u64 = 0x51b_0002;
/// Connections between which the flow table is not cleared.
const CONNECTIONS: u64 = 500;

/// A number of the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    Some(parsed.unwrap_or_else(|_| panic!("{name} is a number")))
}

/// What has happened to the datapath in all connections.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    frames: u64,
    /// Flows whose backend has been told.
    told: u64,
    /// Client's segments that were dropped, by what the flow was then.
    dropped: [u64; 3],
    /// Client's segments that were sent to a backend that may not know yet, not from the first byte on.
    ahead: u64,
    /// Segments that would answer a SYN cookie with the numbers that the client gave them.
    shifted: u64,
    /// Entries that were removed by a segment.
    removed: u64,
}

#[test]
#[ignore = "needs root"]
fn given_hostile_clients_when_backends_are_told_who_they_are_then_none_passes_for_another() {
    let frames = number("SLB_FUZZ_CASES").unwrap_or(FRAMES);
    let only = number("SLB_FUZZ_SEED");
    with_slb(|slb| {
        let (mut seen, mut reached) = (Seen::default(), Reached::default());
        for (flag, share) in [(BackendFlags::PROXY, 3), (BackendFlags::OPTION, 4)] {
            for id in FAMILIES.iter().flat_map(|n| [id::FULL, id::OTHER].map(|id| id + *n as u32)) {
                slb.backend(id, |backend| {
                    backend.flags &= !(BackendFlags::PROXY | BackendFlags::OPTION);
                    backend.flags |= flag;
                });
            }
            slb.flows.clear();
            for number in 0.. {
                if seen.frames > frames * share / 4 || only.is_some() && number != 0 {
                    break;
                }
                if number % CONNECTIONS == CONNECTIONS - 1 {
                    slb.flows.clear();
                }
                let seed = only.unwrap_or(SEED.wrapping_add(number));
                let mut world = World::new(slb, seed, flag == BackendFlags::PROXY, &mut seen);
                world.live();
                reached.add(&world.receiver.reached);
            }
        }
        // It is of no use if the connections do not get far.
        let Seen { frames, told, dropped: [offered, accepted, late], ahead, shifted, removed } =
            seen;
        let Reached { established, by_cookie, out_of_order, headers, streams, options, forgotten } =
            reached;
        for (what, count, share) in [
            ("told", told, 200),
            ("dropped before the SYN-ACK", offered, 200),
            ("dropped behind it", accepted, 200),
            ("dropped when told", late, 400),
            ("ahead of the first byte", ahead, 200),
            ("shifted segments", shifted, 400),
            ("removed entries", removed, 1_000),
            ("connections", established, 100),
            ("connections by a cookie", by_cookie, 200),
            ("connections whose first segment is late", out_of_order, 1_000),
            ("headers", headers, 200),
            ("streams", streams, 200),
            ("options", options, 50),
            ("forgotten connections", forgotten, 400),
        ] {
            let enough = only.is_some() || count > frames / share;
            assert!(enough, "{what}: only {count}: {seen:?}, {reached:?}");
        }
    });
}

/// Step of a connection, for a report.
#[derive(Clone, Copy, Debug)]
#[expect(dead_code, reason = "printed when a test fails")]
struct Step {
    what: &'static str,
    /// From the client's first byte, as it counts, and from the backend's.
    seq: i32,
    ack: i32,
    flags: u8,
    len: usize,
    result: &'static str,
}

/// One connection, or what a client makes of it.
struct World<'a, 's> {
    slb: &'a mut Slb<'s>,
    seed: u64,
    random: Random,
    receiver: Receiver,
    /// Length of the header; 0: an option.
    len: u32,
    /// A SYN of the client's.
    syn: Frame,
    inside: SocketAddr,
    /// On their way to the backend, and those that have got there.
    flying: Vec<Segment>,
    past: Vec<Segment>,
    /// On their way to the gateway.
    answers: Vec<Answer>,
    /// What the client counts from, and what it takes the backend to count from.
    first: u32,
    own: u32,
    /// How much of the backend's it has got.
    heard: u32,
    seen: &'a mut Seen,
    steps: Vec<Step>,
}

impl Drop for World<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for step in &self.steps {
                eprintln!("{step:?}");
            }
            eprintln!(
                "SLB_FUZZ_SEED={:#x}, {} {} to {}, header of {} bytes",
                self.seed, self.syn.src, self.syn.dst, self.inside, self.len
            );
        }
    }
}

impl<'a, 's> World<'a, 's> {
    fn new(slb: &'a mut Slb<'s>, seed: u64, is_header: bool, seen: &'a mut Seen) -> Self {
        let mut random = Random(seed);
        let family = random.below(2);
        let (to, inside) = if random.one_in(3) {
            (port::OTHER, backend(0, 1 - family, port::OTHER_BACKEND))
        } else {
            (port::FULL, backend(0, family, port::FULL_BACKEND))
        };
        let from = client(family, 1_024 + (seed % 60_000) as u16);
        let any = random.next() as u32;
        let first = random.pick(&[any, 0, 5, 28, 0x7fff_fff0, 0xffff_fff0]);
        let syn = Frame { payload: Vec::new(), ..syn(from, vip(family, to)) };
        let header = header(&syn);
        let len = if is_header { header.len() as u32 } else { 0 };
        let told = if is_header { Told::Header(header) } else { Told::Option(option(from)) };
        let mut receiver = Receiver::new(told, random.next());
        receiver.has_cookies = random.one_in(2);
        receiver.resets = random.one_in(2);
        receiver.window = random.pick(&[0xffff, 0xffff, 0xffff, 1_000, 20, 1]);
        let own = random.next() as u32;
        Self {
            slb,
            seed,
            random,
            receiver,
            len,
            syn,
            inside,
            flying: Vec::new(),
            past: Vec::new(),
            answers: Vec::new(),
            first,
            own,
            heard: 0,
            seen,
            steps: Vec::new(),
        }
    }

    /// The beginning of a real connection, up to some point, and then anything.
    fn live(&mut self) {
        let stage = self.random.below(6);
        if stage > 0 {
            self.client_opens(SYN, &[], b"");
            self.settle();
        }
        if stage > 1 {
            if self.random.one_in(2) {
                let ahead = self.first.wrapping_add(1 + self.random.below(90) as u32);
                self.client_sends(ACK, ahead, self.own, b"ahead");
            }
            if self.random.one_in(2) {
                self.settle();
            }
            self.client_sends(ACK, self.first, self.own, b"");
        }
        if stage > 2 {
            self.settle();
            self.client_sends(ACK | PSH, self.first, self.own, &[b'd'; 40]);
        }
        if stage > 3 {
            self.settle();
            self.backend_speaks(0, 28);
            self.settle();
        }
        for _ in 0..20 + self.random.below(40) {
            self.step();
        }
        self.settle();
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..24 => self.client_lies(),
            24..32 => self.client_lies_by_a_cookie(),
            32..40 => self.client_opens_anyhow(),
            40..48 => self.client_goes_on(),
            48..64 => self.deliver(),
            64..80 => self.reply(),
            80..85 => {
                let flags = self.random.pick(&[0, 0, 0, FIN, RST]);
                let len = self.random.pick(&[0, 1, 28, 52, 100]);
                self.backend_speaks(flags, len);
            }
            85..88 => {
                let answers = self.receiver.repeat();
                self.answers.extend(answers);
            }
            88..90 => {
                self.note("forgets", 0, 0, 0, 0, "");
                self.receiver.forget();
            }
            90..93 => self.backend_changes(),
            93..95 => self.evict(),
            _ => {
                if !self.past.is_empty() {
                    let segment = self.random.pick(&self.past);
                    self.flying.push(segment);
                }
            }
        }
    }

    fn note(
        &mut self,
        what: &'static str,
        seq: u32,
        ack: u32,
        flags: u8,
        len: usize,
        result: &'static str,
    ) {
        let seq = seq.wrapping_sub(self.first) as i32;
        let ack = ack.wrapping_sub(self.own) as i32;
        self.steps.push(Step { what, seq, ack, flags, len, result });
    }
}
