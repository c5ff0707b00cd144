//! The network, which loses and repeats segments, and the backend.

use super::*;

impl World<'_, '_> {
    pub(super) fn run(&mut self, ingress: u32, frame: &Frame) -> (Verdict, Vec<u8>) {
        self.seen.frames += 1;
        let run = self.slb.run(ingress, &frame.bytes());
        (run.verdict, run.bytes)
    }

    pub(super) fn flow(&self) -> Option<Flow> {
        self.slb.flow(&self.syn)
    }

    /// What the backend sees of a flow.
    pub(super) fn source(&self, flow: &Flow) -> SocketAddr {
        let family = usize::from(self.inside.is_ipv6());
        let number = usize::from(flow.source) - 1 - 2 * family;
        crate::fixture::at(crate::fixture::SOURCES[family][number], flow.port)
    }

    pub(super) fn frame_of_backend(&self, answer: &Answer) -> Frame {
        let Answer { to, seq, ack, flags, payload } = answer.clone();
        let transport = Transport::Tcp { flags, options: Vec::new() };
        let frame = Frame::tcp(self.inside, to);
        Frame { src_mac: FIRST.dst_mac, dst_mac: LAN_MAC, seq, ack, transport, payload, ..frame }
    }

    /// Nearly always in order; sometimes one is lost, or comes twice.
    pub(super) fn choose(&mut self, len: usize) -> usize {
        if self.random.one_in(5) { self.random.below(len) } else { 0 }
    }

    pub(super) fn deliver(&mut self) {
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

    pub(super) fn reply(&mut self) {
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

    pub(super) fn settle(&mut self) {
        for _ in 0..20 {
            self.deliver();
            self.reply();
        }
    }

    pub(super) fn backend_speaks(&mut self, flags: u8, len: usize) {
        let number = self.random.below(4);
        let answers = self.receiver.speak(number, flags, &vec![b's'; len]);
        self.answers.extend(answers);
    }

    pub(super) fn backend_changes(&mut self) {
        match self.random.below(4) {
            0 => self.receiver.has_cookies = !self.receiver.has_cookies,
            1 => self.receiver.minute += 1,
            2 => self.receiver.window = self.random.pick(&[0xffff, 1_000, 0]),
            _ => self.receiver.window = 0xffff,
        }
    }

    /// Other flows take the places of those that may lose theirs.
    pub(super) fn evict(&mut self) {
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
