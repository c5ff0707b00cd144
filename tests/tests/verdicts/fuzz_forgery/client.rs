//! The hostile client.

use super::*;

impl World<'_, '_> {
    pub(super) fn client_opens(&mut self, flags: u8, options: &[u8], payload: &[u8]) {
        let seq = self.first.wrapping_sub(1);
        self.client_says("SYN", flags, seq, 0, 0, options, payload);
    }

    pub(super) fn client_sends(&mut self, flags: u8, seq: u32, ack: u32, payload: &[u8]) {
        let stamp = [&[1, 1, 8, 10][..], &[7; 8]].concat();
        self.client_says("client", flags, seq, ack, 0, &stamp, payload);
    }

    /// A SYN, of the kinds that there should not be as well.
    pub(super) fn client_opens_anyhow(&mut self) {
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
    pub(super) fn client_goes_on(&mut self) {
        let seq = self.first.wrapping_add(self.random.pick(&[0, 0, 0, 40, u32::MAX]));
        let payload = if seq == self.first { self.random.pick(&[&b""[..], b"data"]) } else { b"" };
        let flags = ACK | self.random.pick(&[0, 0, 0, FIN]);
        let flags = if seq == self.first.wrapping_sub(1) { ACK } else { flags };
        self.client_sends(flags, seq, self.own.wrapping_add(self.heard), payload);
    }

    /// Any segment near the beginning of the connection.
    pub(super) fn client_lies(&mut self) {
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
    pub(super) fn client_lies_by_a_cookie(&mut self) {
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

    pub(super) fn options(&mut self) -> Vec<u8> {
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
    pub(super) fn client_says(
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
                if is_told { 2 } else { usize::from(state.intersects(ConnState::ANSWERED)) };
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
    pub(super) fn has_not_moved_on(&self, before: Option<Flow>) {
        let Some(after) = self.flow() else { return };
        let same = before.filter(|before| before.port == after.port);
        let before = same.map_or(ConnState::PROXY_PENDING, |flow| flow.state());
        let has = |state: ConnState, flag| state.intersects(flag);
        let is_accepted = has(after.state(), ConnState::ANSWERED);
        assert!(!is_accepted || has(before, ConnState::ANSWERED), "accepted by a client's segment");
        let is_pending = has(after.state(), ConnState::PROXY_PENDING);
        assert!(is_pending || !has(before, ConnState::PROXY_PENDING), "told by a client's segment");
    }
}
