//! A backend's TCP, as far as it decides what its application reads first and whom it takes for the client.
//!
//! It shares no code with the datapath, and keeps what it gets by sequence number. It panics when a segment that
//! it accepts could make the application read anything but the header in the header's place (or, for the option,
//! when a segment names a client that is not the true one).

use std::{
    collections::{HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    net::SocketAddr,
};

use etherparse::{SlicedPacket, TransportSlice};

use crate::{
    fixture::sender,
    frame::{ACK, FIN, RST, SYN, URG, checksums},
};

/// How a group's backends are told who the client is, and in which bytes.
#[derive(Clone, Debug)]
pub(crate) enum Told {
    /// By a header before the client's first byte.
    Header(Vec<u8>),
    /// By a TCP option.
    Option(Vec<u8>),
}

/// A segment that reached the backend.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub source: SocketAddr,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub urgent: u16,
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Segment {
    /// Reads a frame. Panics if it is no TCP segment, or one of its checksums is wrong.
    pub(crate) fn read(bytes: &[u8]) -> Self {
        let packet = SlicedPacket::from_ethernet(bytes).expect("a frame");
        let Some(TransportSlice::Tcp(tcp)) = packet.transport else {
            panic!("not TCP: {bytes:02x?}")
        };
        let found = checksums(bytes).expect("TCP");
        assert!(found.iter().all(|checksum| checksum.holds()), "a wrong checksum: {bytes:02x?}");
        let family = usize::from(bytes[12..14] != [0x08, 0x00]);
        Self {
            source: sender(bytes, family),
            seq: tcp.sequence_number(),
            ack: tcp.acknowledgment_number(),
            flags: tcp.slice()[13],
            urgent: tcp.urgent_pointer(),
            options: tcp.options().to_vec(),
            payload: tcp.payload().to_vec(),
        }
    }

    const fn has(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }
}

/// What the backend sends to `to`.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub to: SocketAddr,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub payload: Vec<u8>,
}

/// A connection, or one that is about to be (SYN-RECEIVED in RFC 9293).
#[derive(Clone, Debug)]
struct Connection {
    is_established: bool,
    /// Number of the first byte of either side.
    first: u32,
    own: u32,
    /// What was received, as ranges of offsets from the first byte, in order and apart from each other.
    received: Vec<(i64, i64)>,
    /// Offset of the peer's FIN.
    end: Option<i64>,
    /// How many bytes were sent, with the FIN.
    sent: u32,
}

impl Connection {
    fn new(first: u32, own: u32) -> Self {
        Self { is_established: false, first, own, received: Vec::new(), end: None, sent: 0 }
    }

    /// Offset of the byte that the backend waits for.
    fn next(&self) -> i64 {
        match self.received.first() {
            Some(&(0, end)) => end,
            _ => 0,
        }
    }

    fn receive(&mut self, start: i64, end: i64) {
        self.received.push((start, end));
        self.received.sort_unstable();
        let mut joined: Vec<(i64, i64)> = Vec::new();
        for &(start, end) in &self.received {
            match joined.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => joined.push((start, end)),
            }
        }
        self.received = joined;
    }

    fn answer(&self, to: SocketAddr, flags: u8) -> Answer {
        let next = self.next();
        let fin = u32::from(self.end == Some(next));
        let ack = self.first.wrapping_add(next as u32).wrapping_add(fin);
        Answer { to, seq: self.own.wrapping_add(self.sent), ack, flags, payload: Vec::new() }
    }
}

/// How often something has happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reached {
    /// Handshakes that were completed, of these those with SYN cookies, and of the others those whose first
    /// segment to come was not the client's first.
    pub established: u64,
    pub by_cookie: u64,
    pub out_of_order: u64,
    /// Headers that were received as a whole, and connections that went on for some bytes behind it.
    pub headers: u64,
    pub streams: u64,
    /// Segments with the true option.
    pub options: u64,
    /// Connections that were forgotten although the other side believes in them.
    pub forgotten: u64,
}

impl Reached {
    pub(crate) fn add(&mut self, other: &Self) {
        self.established += other.established;
        self.by_cookie += other.by_cookie;
        self.out_of_order += other.out_of_order;
        self.headers += other.headers;
        self.streams += other.streams;
        self.options += other.options;
        self.forgotten += other.forgotten;
    }
}

/// The backend.
pub(crate) struct Receiver {
    told: Told,
    /// It answers SYNs with cookies (as Linux does with `tcp_syncookies` and a full queue).
    pub has_cookies: bool,
    /// Minutes, for cookies: good in the minute in which they are made and the next.
    pub minute: u32,
    /// Bytes that it takes ahead of the next one.
    pub window: i64,
    /// A SYN in the window of a connection that is not established gets a reset. Else only the connection
    /// is forgotten: RFC 9293, section 3.10.7.4, allows for both.
    pub resets: bool,
    secret: u64,
    connections: HashMap<SocketAddr, Connection>,
    /// Sources behind which a whole header has been read.
    informed: HashSet<SocketAddr>,
    pub reached: Reached,
}

impl Receiver {
    pub(crate) fn new(told: Told, secret: u64) -> Self {
        Self {
            told,
            has_cookies: false,
            minute: 0,
            window: 0xffff,
            resets: false,
            secret,
            connections: HashMap::new(),
            informed: HashSet::new(),
            reached: Reached::default(),
        }
    }

    /// Whether a connection from `source` has ever shown all of what its backend is to be told.
    pub(crate) fn is_informed(&self, source: &SocketAddr) -> bool {
        self.informed.contains(source)
    }

    fn header(&self) -> &[u8] {
        match &self.told {
            Told::Header(header) => header,
            Told::Option(_) => &[],
        }
    }

    /// Takes a segment. `iss`: what the connection is to count from if it begins one.
    pub(crate) fn take(&mut self, segment: &Segment, iss: u32) -> Vec<Answer> {
        self.look_at_options(segment);
        let to = segment.source;
        if segment.has(SYN) {
            let others = segment.flags & (ACK | FIN | RST);
            assert!(others == 0 && segment.payload.is_empty(), "no plain SYN: {segment:?}");
        }
        let Some(connection) = self.connections.get(&to).cloned() else {
            return self.listen(segment, iss);
        };
        let start = i64::from(segment.seq.wrapping_sub(connection.first) as i32);
        let len = segment.payload.len() as i64 + i64::from(segment.has(FIN) || segment.has(SYN));
        let next = connection.next();
        let fits = |offset: i64| offset >= next && offset < next + self.window.max(1);
        let is_acceptable = fits(start) || len > 0 && fits(start + len - 1);
        let challenge = || vec![connection.answer(to, ACK)];
        if !connection.is_established {
            if segment.has(SYN) && start == -1 {
                let again = connection.answer(to, SYN | ACK);
                return vec![Answer { seq: connection.own.wrapping_sub(1), ..again }];
            }
            if !is_acceptable {
                return if segment.has(RST) { vec![] } else { challenge() };
            }
            if segment.has(RST | SYN) {
                self.connections.remove(&to);
                let is_reset = segment.has(SYN) && self.resets;
                let reset = Answer { ack: segment.seq.wrapping_add(1), ..reset(segment) };
                return if is_reset { vec![reset] } else { vec![] };
            }
            if !segment.has(ACK) {
                return vec![];
            }
            if segment.ack != connection.own {
                return vec![reset(segment)];
            }
            self.reached.out_of_order += u64::from(start > 0);
            self.establish(segment, connection);
            return self.read(segment);
        }
        if !is_acceptable {
            return if segment.has(RST) { vec![] } else { challenge() };
        }
        if segment.has(RST) {
            if start != next {
                return challenge();
            }
            self.connections.remove(&to);
            return vec![];
        }
        if segment.has(SYN) {
            return challenge();
        }
        let unsent = segment.ack.wrapping_sub(connection.own.wrapping_add(connection.sent)) as i32;
        if !segment.has(ACK) || unsent > 0 {
            return if segment.has(ACK) { challenge() } else { vec![] };
        }
        self.read(segment)
    }

    /// Without a connection.
    fn listen(&mut self, segment: &Segment, iss: u32) -> Vec<Answer> {
        let to = segment.source;
        if segment.has(RST) {
            return vec![];
        }
        if segment.has(SYN) {
            let first = segment.seq.wrapping_add(1);
            let seq = if self.has_cookies {
                let segment_size = iss % 4;
                self.cookie(to, self.minute, segment_size).wrapping_add(segment.seq)
            } else {
                self.connections.insert(to, Connection::new(first, iss.wrapping_add(1)));
                iss
            };
            return vec![Answer { to, seq, ack: first, flags: SYN | ACK, payload: Vec::new() }];
        }
        if !segment.has(ACK) || !self.has_cookies || !self.is_cookie(segment) {
            return vec![reset(segment)];
        }
        // Nothing but the segment says where the stream begins.
        assert!(
            segment.payload.starts_with(self.header()),
            "a cookie brings up a connection that does not begin with the header: {segment:?}"
        );
        self.reached.by_cookie += 1;
        // No stack begins with a window that has no room for the header. With a state the first bytes may come in pieces;
        // here they may not, as the datapath may have seen all of them acknowledged by an earlier connection.
        self.window = self.window.max(self.header().len() as i64);
        self.establish(segment, Connection::new(segment.seq, segment.ack));
        self.read(segment)
    }

    /// What a cookie is more than the number of the SYN, as Linux makes it
    /// (`secure_tcp_syn_cookie` in `net/ipv4/syncookies.c`).
    fn cookie(&self, source: SocketAddr, minute: u32, segment_size: u32) -> u32 {
        let low = self.hash(source, minute + 1).wrapping_add(segment_size) & 0x00ff_ffff;
        self.hash(source, 0).wrapping_add(minute << 24).wrapping_add(low)
    }

    fn is_cookie(&self, segment: &Segment) -> bool {
        let found = segment.ack.wrapping_sub(segment.seq);
        let minutes = [Some(self.minute), self.minute.checked_sub(1)];
        let mut good =
            minutes.into_iter().flatten().flat_map(|minute| (0..4).map(move |n| (minute, n)));
        good.any(|(minute, size)| self.cookie(segment.source, minute, size) == found)
    }

    fn hash(&self, source: SocketAddr, salt: u32) -> u32 {
        let mut hasher = DefaultHasher::new();
        (self.secret, source, salt).hash(&mut hasher);
        hasher.finish() as u32
    }

    fn establish(&mut self, segment: &Segment, mut connection: Connection) {
        if let Told::Option(option) = &self.told {
            let says = options(&segment.options).into_iter().any(|found| found == *option);
            assert!(says || self.has_cookies, "the handshake ends without the option: {segment:?}");
            if says {
                self.informed.insert(segment.source);
            }
        }
        connection.is_established = true;
        self.reached.established += 1;
        self.connections.insert(segment.source, connection);
    }

    /// Takes what is in a segment that is acceptable.
    fn read(&mut self, segment: &Segment) -> Vec<Answer> {
        let to = segment.source;
        let header = self.header().to_vec();
        let len = header.len() as i64;
        let connection = self.connections.get_mut(&to).expect("a connection");
        let next = connection.next();
        let start = i64::from(segment.seq.wrapping_sub(connection.first) as i32);
        let end = start + segment.payload.len() as i64;
        if next < len {
            let is_urgent = segment.has(URG) || segment.urgent != 0;
            assert!(!is_urgent, "urgent data before the header is read: {segment:?}");
        }
        for (offset, byte) in (start..).zip(&segment.payload) {
            if offset >= next && offset < len {
                let expected = header[offset as usize];
                assert_eq!(*byte, expected, "byte {offset} of the stream: {segment:?}");
            }
        }
        let taken = (start.max(next), end.min(next + self.window));
        if taken.0 < taken.1 {
            connection.receive(taken.0, taken.1);
        }
        if segment.has(FIN) && end >= next && end < next + self.window.max(1) {
            assert!(end >= len, "a FIN at byte {end}, before the end of the header: {segment:?}");
            connection.end = Some(end);
        }
        let now = connection.next();
        if next < len && now >= len {
            self.reached.headers += 1;
        }
        if next <= len && now > len {
            self.reached.streams += 1;
        }
        if now >= len && len > 0 {
            self.informed.insert(to);
        }
        let is_news =
            segment.payload.len() as i64 + i64::from(segment.has(FIN)) > 0 || start != next;
        if is_news { vec![connection.answer(to, ACK)] } else { vec![] }
    }

    /// No option of the client's may name a client, or ask for TCP Fast Open.
    fn look_at_options(&mut self, segment: &Segment) {
        let found = options(&segment.options);
        let told = match &self.told {
            Told::Option(option) => Some(option),
            // Options pass: they are not read there.
            Told::Header(_) => None,
        };
        for option in found {
            let is_told = told == Some(&option);
            self.reached.options += u64::from(is_told);
            let is_checked = told.is_some() || segment.has(SYN);
            let is_bad = matches!(option[0], 254 | 34) && is_checked;
            assert!(
                !is_bad || is_told && !segment.has(SYN),
                "an option of the client's: {segment:?}"
            );
        }
    }

    /// The application sends `payload`, closes or resets one of its connections.
    pub(crate) fn speak(&mut self, number: usize, flags: u8, payload: &[u8]) -> Vec<Answer> {
        let mut known: Vec<_> =
            self.connections.iter().filter(|(_, it)| it.is_established).collect();
        known.sort_unstable_by_key(|(source, _)| **source);
        if known.is_empty() {
            return vec![];
        }
        let to = *known[number % known.len()].0;
        let connection = self.connections.get_mut(&to).expect("it is there");
        let answer = Answer { payload: payload.to_vec(), ..connection.answer(to, flags | ACK) };
        connection.sent += payload.len() as u32 + u32::from(flags & FIN != 0);
        if flags & RST != 0 {
            self.connections.remove(&to);
        }
        vec![answer]
    }

    /// A SYN-ACK is sent again, of all that are not acknowledged.
    pub(crate) fn repeat(&self) -> Vec<Answer> {
        let open = self.connections.iter().filter(|(_, it)| !it.is_established);
        let mut answers: Vec<_> = open
            .map(|(to, it)| Answer { seq: it.own.wrapping_sub(1), ..it.answer(*to, SYN | ACK) })
            .collect();
        answers.sort_unstable_by_key(|answer| answer.to);
        answers
    }

    /// Forgets all connections, and says nothing.
    pub(crate) fn forget(&mut self) {
        self.reached.forgotten +=
            self.connections.values().filter(|it| it.is_established).count() as u64;
        self.connections.clear();
    }
}

/// RFC 9293, section 3.10.7.1.
fn reset(segment: &Segment) -> Answer {
    let seq = if segment.has(ACK) { segment.ack } else { 0 };
    Answer { to: segment.source, seq, ack: segment.seq, flags: RST | ACK, payload: Vec::new() }
}

/// The options of a segment but for padding, as the TOA modules read them.
fn options(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    while let [kind, rest @ ..] = bytes {
        match (kind, rest) {
            (0, _) => break,
            (1, _) => bytes = rest,
            (_, [len, ..]) if *len >= 2 && usize::from(*len) <= bytes.len() => {
                let (option, rest) = bytes.split_at((*len).into());
                found.push(option.to_vec());
                bytes = rest;
            }
            _ => break,
        }
    }
    found
}
