//! A connection of a hostile client, which tries to get to a server under another address.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use ppp::v2::{Builder, Command, Protocol, Version};

use super::raw::{ACK, FIN, PSH, Parts, RST, RawClient, SYN};

/// More than an answer takes on a loaded machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(5);
/// How often a SYN is sent within that.
const TRIES: u32 = 50;
/// Addresses for documentation (RFC 5737, RFC 3849), which the client claims to have.
const FORGED_V4: &str = "203.0.113.66:6666";
const FORGED_V6: &str = "[2001:db8:bad::66]:6666";
/// As most systems have them: a segment size, and that nothing follows.
pub(crate) const SYN_OPTIONS: [u8; 4] = [2, 4, 0x05, 0xb4];

/// A connection of the hostile client.
pub(crate) struct Attack<'a> {
    raw: &'a RawClient,
    pub from: SocketAddr,
    pub to: SocketAddr,
    /// Number of the SYN.
    isn: u32,
    /// Numbers of all SYNs that have been sent for this connection.
    syns: Vec<u32>,
    /// Number of the client's first byte, as the SYN-ACK has it.
    first: u32,
    /// Number of the server's first byte.
    server_first: u32,
    /// How much has come from the server, and whether it has closed.
    received: (i64, bool),
    /// Sequence number of a reset that ends an old connection of the server with the same ports.
    stray: Option<u32>,
    /// Length of the header that the gateway inserts.
    pub len: i64,
    /// A header of the same length, for another client.
    pub forged: Vec<u8>,
    /// A header of version 1, which is text, for the same client.
    pub forged_text: Vec<u8>,
    /// Its path has the true address and port.
    pub request: Vec<u8>,
    /// What answers have as `x-backend`.
    pub answer: String,
    pub case: String,
}

/// The address and port that the client claims to have.
pub(crate) fn forged(is_v4: bool) -> SocketAddr {
    if is_v4 { FORGED_V4 } else { FORGED_V6 }.parse().unwrap()
}

/// What a proxy answers to a client that it takes for `client` and that has connected to `to`.
pub(crate) fn known_as(client: SocketAddr, to: SocketAddr) -> String {
    format!("{} {} {} {}", client.ip(), client.port(), to.ip(), to.port())
}

impl<'a> Attack<'a> {
    /// From a port of its own.
    pub(crate) fn new(raw: &'a RawClient, to: SocketAddr, name: &str) -> Self {
        let from = raw.source(to);
        let forged = forged(to.is_ipv4());
        let family = if to.is_ipv4() { "TCP4" } else { "TCP6" };
        let forged_text = format!(
            "PROXY {family} {} {} {} {}\r\n",
            forged.ip(),
            to.ip(),
            forged.port(),
            to.port()
        );
        let forged =
            Builder::with_addresses(Version::Two | Command::Proxy, Protocol::Stream, (forged, to));
        let forged = forged.build().unwrap();
        let path = format!("/{}/{}", from.ip(), from.port());
        Self {
            raw,
            answer: known_as(from, to),
            from,
            to,
            // It wraps within the request.
            isn: 0xffff_fff0,
            syns: Vec::new(),
            first: 0,
            server_first: 0,
            received: (0, false),
            stray: None,
            len: forged.len() as i64,
            forged,
            forged_text: forged_text.into_bytes(),
            request: format!("GET {path} HTTP/1.1\r\nhost: lab\r\n\r\n").into_bytes(),
            case: format!("{name}, {from} to {to}"),
        }
    }

    /// The forged header, and a request behind it.
    pub(crate) fn forged_request(&self) -> Vec<u8> {
        [&self.forged[..], &self.request].concat()
    }

    /// An ordinary one.
    pub(crate) fn syn(&mut self) {
        self.syn_with(0, SYN, &SYN_OPTIONS, b"");
    }

    /// A SYN whose number is higher by `offset`.
    pub(crate) fn syn_with(&mut self, offset: i64, flags: u8, options: &[u8], payload: &[u8]) {
        let isn = self.isn.wrapping_add(offset as u32);
        self.syns.push(isn);
        let parts = Parts { flags, options, payload, ..Parts::default() };
        self.raw.send(self.from, self.to, (isn, 0), parts);
        if self.first == 0 {
            // As long as there is no SYN-ACK.
            self.first = isn.wrapping_add(1);
        }
    }

    /// Waits for the SYN-ACK to one of the SYNs. Like every client, it sends the last SYN again, and resets an old
    /// connection that the server still has with the same ports.
    pub(crate) fn is_accepted(&mut self) {
        for _ in 0..TRIES {
            if self.accepted_within(LIMIT / TRIES) {
                return;
            }
            if let Some(number) = self.stray.take() {
                self.raw.send(self.from, self.to, (number, 0), Parts::of(RST));
            }
            let isn = *self.syns.last().unwrap();
            let parts = Parts { options: &SYN_OPTIONS, ..Parts::of(SYN) };
            self.raw.send(self.from, self.to, (isn, 0), parts);
        }
        panic!("no SYN-ACK: {}", self.case);
    }

    fn accepted_within(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while let Some(segment) = self.raw.receive(self.from, self.to, deadline) {
            if segment.flags & (SYN | ACK) == ACK {
                self.stray = Some(segment.acknowledgement);
            }
            let isn = segment.acknowledgement.wrapping_sub(1);
            if segment.flags & (SYN | ACK) == SYN | ACK && self.syns.contains(&isn) {
                let has_cookie = segment.options().iter().any(|option| option[0] == 34);
                assert!(!has_cookie, "a cookie of TCP Fast Open: {}", self.case);
                self.first = segment.acknowledgement;
                self.server_first = segment.sequence.wrapping_add(1);
                self.received = (0, false);
                return true;
            }
        }
        false
    }

    /// SYN and SYN-ACK.
    pub(crate) fn open(&mut self) {
        self.syn();
        self.is_accepted();
    }

    /// Another connection from the same port; the number of its SYN is higher by `offset`.
    pub(crate) fn open_again(&mut self, offset: i64) {
        self.isn = self.isn.wrapping_add(offset as u32);
        self.syns.clear();
        self.open();
    }

    /// Sends another SYN, whose number is higher by `offset`, waits a moment for an answer, and goes on as if there were
    /// none.
    pub(crate) fn syn_aside(&mut self, offset: i64) {
        let before = (self.first, self.server_first, self.received);
        self.syn_with(offset, SYN, &SYN_OPTIONS, b"");
        self.accepted_within(LIMIT / TRIES);
        (self.first, self.server_first, self.received) = before;
    }

    /// The TCP option with the true address, and with the forged one.
    pub(crate) fn options(&self) -> [Vec<u8>; 2] {
        [self.from, forged(self.from.is_ipv4())].map(|client| {
            let address = match client.ip() {
                IpAddr::V4(address) => address.octets().to_vec(),
                IpAddr::V6(address) => address.octets().to_vec(),
            };
            let len = 4 + address.len() as u8;
            [&[254, len][..], &client.port().to_be_bytes(), &address].concat()
        })
    }

    /// A segment; `at` counts from the client's first byte.
    pub(crate) fn send(&self, flags: u8, at: i64, payload: &[u8]) {
        self.send_with(at, 0, Parts { flags, payload, ..Parts::default() });
    }

    /// The same; `ack` counts from the server's first byte.
    pub(crate) fn send_with(&self, at: i64, ack: i64, parts: Parts<'_>) {
        let sequence = self.first.wrapping_add(at as u32);
        let acknowledgement = self.server_first.wrapping_add(ack as u32);
        self.raw.send(self.from, self.to, (sequence, acknowledgement), parts);
    }

    /// Sends a request as an honest client does, and is answered under the true address.
    pub(crate) fn is_known(&mut self) {
        self.send(ACK, 0, b"");
        self.send(ACK | PSH, 0, &self.request);
        self.is_answered();
    }

    /// Waits for the answer to a request.
    pub(crate) fn is_answered(&mut self) {
        let deadline = Instant::now() + LIMIT;
        while !self.is_answer(deadline).unwrap_or_else(|| panic!("no answer: {}", self.case)) {}
    }

    /// Waits until the server closes.
    pub(crate) fn is_closed(&mut self) {
        let deadline = Instant::now() + LIMIT;
        while !self.received.1 {
            assert!(self.is_answer(deadline).is_some(), "the server does not close: {}", self.case);
        }
    }

    /// How many bytes have come from the server.
    pub(crate) fn received(&self) -> i64 {
        self.received.0
    }

    /// Whether the next segment is an answer; it must have the true address. `None`: no segment before `deadline`.
    fn is_answer(&mut self, deadline: Instant) -> Option<bool> {
        let segment = self.raw.receive(self.from, self.to, deadline)?;
        let begin = segment.sequence.wrapping_sub(self.server_first);
        let end = i64::from(begin.cast_signed()) + segment.payload.len() as i64;
        self.received.0 = self.received.0.max(end);
        self.received.1 |= segment.flags & FIN != 0;
        let text = String::from_utf8_lossy(&segment.payload).to_ascii_lowercase();
        let name = text.lines().find_map(|line| line.strip_prefix("x-backend: "));
        if let Some(name) = name {
            assert_eq!(name, self.answer, "{}", self.case);
        }
        Some(name.is_some())
    }

    /// Resets the connection, after one request.
    pub(crate) fn reset(&self) {
        self.send(RST, self.request.len() as i64, b"");
    }

    /// Checks what has been answered so far, and resets the connection.
    pub(crate) fn end(mut self) {
        self.reset();
        while self.is_answer(Instant::now()).is_some() {}
    }
}
