//! Hostile clients of groups that tell backends the client's address: whatever they send, and however the
//! network and the backend behave, the backend reads the true address.
//!
//! [`Receiver`] is the backend, and panics when it is deceived. The client knows all that it has been sent, and more:
//! the port that the backend sees, which is kept from it in truth.

use std::net::SocketAddr;

use slb_common::{
    abi::{BACKEND_OPTION, BACKEND_PROXY, ConnState, Flow, FlowKey},
    verdict::Verdict,
};

use crate::{
    fixture::{FAMILIES, Slb, backend, client, id, port, syn, vip, with_slb},
    frame::{ACK, FIN, Frame, PSH, RST, SYN, Transport, URG},
    fuzz::Random,
    lab::{FIRST, LAN, LAN_MAC, WAN},
    receiver::{Answer, Reached, Receiver, Segment, Told},
    tell::{header, option},
};

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
        for (flag, share) in [(BACKEND_PROXY, 3), (BACKEND_OPTION, 4)] {
            for id in FAMILIES.iter().flat_map(|n| [id::FULL, id::OTHER].map(|id| id + *n as u32)) {
                slb.backend(id, |backend| {
                    backend.flags &= !(BACKEND_PROXY | BACKEND_OPTION);
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
                let mut world = World::new(slb, seed, flag == BACKEND_PROXY, &mut seen);
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

    // The client.

    fn client_opens(&mut self, flags: u8, options: &[u8], payload: &[u8]) {
        let seq = self.first.wrapping_sub(1);
        self.client_says("SYN", flags, seq, 0, 0, options, payload);
    }

    fn client_sends(&mut self, flags: u8, seq: u32, ack: u32, payload: &[u8]) {
        let stamp = [&[1, 1, 8, 10][..], &[7; 8]].concat();
        self.client_says("client", flags, seq, ack, 0, &stamp, payload);
    }

    /// A SYN, of the kinds that there should not be as well.
    fn client_opens_anyhow(&mut self) {
        let any = self.random.next() as u32;
        let more = [0, self.len, self.len.wrapping_neg(), 1, u32::MAX, 1_000, any];
        let by = if self.random.one_in(2) { 0 } else { self.random.pick(&more) };
        let before = self.first;
        self.first = before.wrapping_add(by);
        let flags = SYN | self.random.pick(&[0, 0, 0, 0, 0, ACK, FIN, RST, PSH, URG]);
        let payload = self.random.pick(&[&b""[..], b"", b"", b"", b"early"]);
        let options = self.options();
        self.client_opens(flags, &options, payload);
        if self.random.one_in(2) {
            self.first = before;
        }
    }

    /// What an ordinary client would send now.
    fn client_goes_on(&mut self) {
        let seq = self.first.wrapping_add(self.random.pick(&[0, 0, 0, 40, u32::MAX]));
        let payload = if seq == self.first { self.random.pick(&[&b""[..], b"data"]) } else { b"" };
        let flags = ACK | self.random.pick(&[0, 0, 0, FIN]);
        let flags = if seq == self.first.wrapping_sub(1) { ACK } else { flags };
        self.client_sends(flags, seq, self.own.wrapping_add(self.heard), payload);
    }

    /// Any segment near the beginning of the connection.
    fn client_lies(&mut self) {
        let len = if self.len == 0 { 28 } else { self.len };
        let before = len.wrapping_neg();
        let any = self.random.next() as u32;
        let near = 1 + self.random.below(len as usize) as u32;
        let far = self.random.pick(&[1_000, 65_535, 65_536, 1 << 20, 1 << 31, any]);
        let from = [
            0,
            0,
            before,
            before.wrapping_sub(1),
            before.wrapping_add(near),
            near,
            1,
            u32::MAX,
            len,
            far,
        ];
        let seq = self.first.wrapping_add(self.random.pick(&from));
        let jump = self.random.pick(&[1, u32::MAX, len, 1 << 20, any]);
        let answers =
            [self.own, self.own, self.own.wrapping_add(self.heard), self.own.wrapping_add(jump)];
        let ack = self.random.pick(&answers);
        let flags = self.random.pick(&[
            ACK,
            ACK,
            ACK,
            ACK | PSH,
            ACK | FIN,
            ACK | URG,
            RST,
            RST | ACK,
            0,
            FIN,
            ACK | URG | FIN,
        ]);
        let urgent =
            if self.random.one_in(4) { self.random.pick(&[1, 2, len as u16, 0xffff]) } else { 0 };
        let size = self.random.pick(&[
            0,
            0,
            1,
            near as usize,
            len as usize,
            len as usize + 9,
            3 * len as usize,
        ]);
        let options = self.options();
        self.client_says("lies", flags, seq, ack, urgent, &options, &vec![0xee; size]);
    }

    /// Numbers that go together as those of a SYN cookie do.
    fn client_lies_by_a_cookie(&mut self) {
        let len = self.len;
        let any = self.random.next() as u32;
        let by = [0, 1, 2, 3, len.wrapping_sub(1), len, len + 1, len + 40, 1_000, any];
        let by = self.random.pick(&by);
        let seq = self.first.wrapping_sub(len).wrapping_add(by);
        let off = self.random.pick(&[0, 0, 0, 1, 2, 3, u32::MAX, u32::MAX - 1, u32::MAX - 2]);
        let ack = self.own.wrapping_add(by).wrapping_add(off);
        let payload = self.random.pick(&[&[][..], &[0xee; 60]]);
        self.client_says("cookie", ACK, seq, ack, 0, &[], payload);
    }

    fn options(&mut self) -> Vec<u8> {
        let foreign = [254, 8, 1, 2, 3, 4, 5, 6];
        let mut options = match self.random.below(7) {
            0 => foreign.to_vec(),
            1 => [&foreign[..], &[1; 32]].concat(),
            2 => [&[1; 32][..], &foreign].concat(),
            3 => [&[2, 4, 5, 180, 34, 10, 1, 2, 3, 4, 5, 6, 7, 8][..], &[254, 6, 0xf9, 0x89, 0, 0]]
                .concat(),
            4 => [&[8, 10][..], &[9; 8], &[254, 22], &[9; 20]].concat(),
            5 => [&[5, 34][..], &[9; 32], &[254, 0]].concat(),
            _ => Vec::new(),
        };
        options.resize(options.len().next_multiple_of(4), 0);
        options
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of a segment")]
    fn client_says(
        &mut self,
        what: &'static str,
        flags: u8,
        seq: u32,
        ack: u32,
        urgent: u16,
        options: &[u8],
        payload: &[u8],
    ) {
        let transport = Transport::Tcp { flags, options: options.to_vec() };
        let frame =
            Frame { seq, ack, urgent, transport, payload: payload.to_vec(), ..self.syn.clone() };
        let before = self.flow();
        let (verdict, bytes) = self.run(WAN, &frame);
        self.note(what, seq, ack, flags, payload.len(), verdict.label());
        if verdict == Verdict::BeforeClientAddress {
            let state = before.map_or(ConnState::PROXY_PENDING, |flow| flow.state());
            let is_told = !state.intersects(ConnState::PROXY_PENDING);
            let which =
                if is_told { 2 } else { usize::from(state.intersects(ConnState::ACCEPTED)) };
            self.seen.dropped[which] += 1;
        }
        self.seen.removed += u64::from(before.is_some() && self.flow().is_none());
        self.has_not_moved_on(before);
        if verdict != Verdict::Forwarded {
            return;
        }
        let segment = Segment::read(&bytes);
        let is_ahead = seq != self.first && flags & (SYN | RST) == 0;
        self.seen.ahead += u64::from(
            before.is_some_and(|flow| flow.state().intersects(ConnState::PROXY_PENDING))
                && is_ahead,
        );
        let by = [segment.ack.wrapping_sub(ack), segment.seq.wrapping_sub(seq)];
        self.seen.shifted += u64::from(matches!(by, [0, 7] | [0xffff_fff9, 0]) && flags & ACK != 0);
        self.flying.push(segment);
    }

    /// No segment from outside tells the datapath that a backend has accepted a connection, or knows its client.
    fn has_not_moved_on(&self, before: Option<Flow>) {
        let Some(after) = self.flow() else { return };
        let same = before.filter(|before| before.port == after.port);
        let before = same.map_or(ConnState::PROXY_PENDING, |flow| flow.state());
        let has = |state: ConnState, flag| state.intersects(flag);
        let is_accepted = has(after.state(), ConnState::ACCEPTED);
        assert!(!is_accepted || has(before, ConnState::ACCEPTED), "accepted by a client's segment");
        let is_pending = has(after.state(), ConnState::PROXY_PENDING);
        assert!(is_pending || !has(before, ConnState::PROXY_PENDING), "told by a client's segment");
    }

    // The network, and the backend.

    fn run(&mut self, ingress: u32, frame: &Frame) -> (Verdict, Vec<u8>) {
        self.seen.frames += 1;
        let run = self.slb.run(ingress, &frame.bytes());
        (run.verdict, run.bytes)
    }

    fn flow(&self) -> Option<Flow> {
        self.slb.flow(&self.syn)
    }

    /// What the backend sees of a flow.
    fn source(&self, flow: &Flow) -> SocketAddr {
        let family = usize::from(self.inside.is_ipv6());
        let number = usize::from(flow.source) - 1 - 2 * family;
        crate::fixture::at(crate::fixture::SOURCES[family][number], flow.port)
    }

    fn frame_of_backend(&self, answer: &Answer) -> Frame {
        let Answer { to, seq, ack, flags, payload } = answer.clone();
        let transport = Transport::Tcp { flags, options: Vec::new() };
        let frame = Frame::tcp(self.inside, to);
        Frame { src_mac: FIRST.dst_mac, dst_mac: LAN_MAC, seq, ack, transport, payload, ..frame }
    }

    /// Nearly always in order; sometimes one is lost, or comes twice.
    fn choose(&mut self, len: usize) -> usize {
        if self.random.one_in(5) { self.random.below(len) } else { 0 }
    }

    fn deliver(&mut self) {
        if self.flying.is_empty() {
            return;
        }
        let number = self.choose(self.flying.len());
        let segment = self.flying.remove(number);
        if self.random.one_in(20) {
            return;
        }
        let iss = self.random.next() as u32;
        self.note("arrives", segment.seq, segment.ack, segment.flags, segment.payload.len(), "");
        let answers = self.receiver.take(&segment, iss);
        self.answers.extend(answers);
        self.past.push(segment);
    }

    fn reply(&mut self) {
        if self.answers.is_empty() {
            return;
        }
        let number = self.choose(self.answers.len());
        let answer = self.answers.remove(number);
        if self.random.one_in(20) {
            return;
        }
        let frame = self.frame_of_backend(&answer);
        let before = self.flow();
        let (verdict, bytes) = self.run(LAN, &frame);
        self.note(
            "answers",
            answer.ack,
            answer.seq,
            answer.flags,
            answer.payload.len(),
            verdict.label(),
        );
        let after = self.flow();
        self.seen.removed += u64::from(before.is_some() && after.is_none());
        let is_told = |flow: &Flow| !flow.state().intersects(ConnState::PROXY_PENDING);
        if before.is_some_and(|flow| !is_told(&flow)) && after.is_some_and(|flow| is_told(&flow)) {
            self.seen.told += 1;
            assert!(self.receiver.is_informed(&answer.to), "told, but the backend does not know");
        }
        match verdict {
            Verdict::Replied => {
                let heard = Segment::read(&bytes);
                if heard.flags & (SYN | ACK | RST) == SYN | ACK {
                    (self.first, self.own, self.heard) = (heard.ack, heard.seq.wrapping_add(1), 0);
                } else {
                    let upto =
                        heard.seq.wrapping_sub(self.own).wrapping_add(heard.payload.len() as u32);
                    self.heard = if upto < 1 << 20 { self.heard.max(upto) } else { self.heard };
                }
            }
            // The gateway has no such connection.
            Verdict::NotOurs if self.random.one_in(2) => self.flying.push(Segment {
                source: answer.to,
                seq: answer.ack,
                ack: 0,
                flags: RST,
                urgent: 0,
                options: Vec::new(),
                payload: Vec::new(),
            }),
            _ => {}
        }
    }

    fn settle(&mut self) {
        for _ in 0..20 {
            self.deliver();
            self.reply();
        }
    }

    fn backend_speaks(&mut self, flags: u8, len: usize) {
        let number = self.random.below(4);
        let answers = self.receiver.speak(number, flags, &vec![b's'; len]);
        self.answers.extend(answers);
    }

    fn backend_changes(&mut self) {
        match self.random.below(4) {
            0 => self.receiver.has_cookies = !self.receiver.has_cookies,
            1 => self.receiver.minute += 1,
            2 => self.receiver.window = self.random.pick(&[0xffff, 1_000, 0]),
            _ => self.receiver.window = 0xffff,
        }
    }

    /// Other flows take the places of those that may lose theirs.
    fn evict(&mut self) {
        let Some(flow) = self.flow() else { return };
        if flow.state().intersects(ConnState::ESTABLISHED) && !flow.state().has_ended() {
            return;
        }
        let source = self.source(&flow);
        let reply = FlowKey {
            src: self.inside.ip().into(),
            dst: source.ip().into(),
            sport: self.inside.port(),
            dport: source.port(),
            proto: slb_common::abi::TCP,
        };
        let is_reply = self.random.one_in(2);
        self.note("evicted", 0, 0, 0, 0, if is_reply { "reply" } else { "forward" });
        if !is_reply {
            self.slb.flows.remove(&self.syn.key());
        } else if self.slb.flows.get(&reply).is_some() {
            self.slb.flows.remove(&reply);
        }
    }
}
