//! Says of each frame that was let through whether it should have been.
//!
//! Nothing here is `slb`'s: neither how frames are read, nor what is configured, nor what has to come of it. So a mistake
//! in the datapath's idea of what is legitimate is not made here as well, but for those that two authors make.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
};

use truth::Stream;
use wire::{ACK, Packet, Part, RST, SYN, Segment, TCP, UDP};

mod truth;
pub(crate) mod wire;

/// How packets get to the servers of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Nat,
    FullNat,
    Dsr,
    Tunnel,
}

/// What the servers of a listener are told about the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Nothing,
    Header,
    Option,
}

/// A server, as the gateway reaches it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Server {
    pub at: SocketAddr,
    pub mac: [u8; 6],
    pub ifindex: u32,
}

/// A listener: what an operator would say about it.
#[derive(Clone, Debug)]
pub(crate) struct Listener {
    pub proto: u8,
    pub at: SocketAddr,
    pub mode: Mode,
    pub servers: Vec<Server>,
    /// Whether a flow's addresses and ports alone say which server it has.
    pub is_by_hash: bool,
    /// Whether a client stays with its server.
    pub is_persistent: bool,
    /// Networks whose clients do not get in.
    pub denied: Vec<(IpAddr, u8)>,
    /// How many flows may begin, in all the time of the test.
    pub most_flows: Option<usize>,
    /// Servers by the server ID in a QUIC connection ID.
    pub quic: HashMap<u16, usize>,
    pub told: Told,
}

/// The gateway.
#[derive(Clone, Debug, Default)]
pub(crate) struct Site {
    pub listeners: Vec<Listener>,
    pub vips: Vec<IpAddr>,
    /// Addresses that backends see as source.
    pub sources: Vec<IpAddr>,
    /// Interfaces and their MAC addresses.
    pub interfaces: Vec<(u32, [u8; 6])>,
    /// What is counted, and not said to be wrong: the datapath does not keep to it yet.
    pub tolerated: Vec<&'static str>,
}

/// What became of a frame: XDP's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Drop = 1,
    Pass = 2,
    Transmit = 3,
    Redirect = 4,
}

/// How a frame that was let through is justified; to see that a test has all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Reason {
    Dropped,
    Untouched,
    ToServer,
    ToClient,
    Answer,
    Error,
    Fragment,
}

/// A flow, by the number of its listener and the client.
type Flow = (usize, SocketAddr);

/// What was let through so far.
pub(crate) struct Oracle {
    site: Site,
    /// Number of the server of each flow, from its last beginning.
    flows: HashMap<Flow, usize>,
    /// Of persistent listeners.
    clients: HashMap<(usize, IpAddr), usize>,
    /// How many flows have begun.
    begun: HashMap<usize, usize>,
    /// First fragments, and where they went.
    fragments: HashMap<(IpAddr, IpAddr, u8, u32), (IpAddr, IpAddr)>,
    /// What servers were sent that are told about clients.
    streams: HashMap<(SocketAddr, SocketAddr), Stream>,
    /// How often what is tolerated has happened.
    pub tolerated: RefCell<BTreeMap<&'static str, u64>>,
}

type Judgement = Result<Reason, String>;

impl Oracle {
    pub(crate) fn new(site: Site) -> Self {
        Self {
            site,
            flows: HashMap::new(),
            clients: HashMap::new(),
            begun: HashMap::new(),
            fragments: HashMap::new(),
            streams: HashMap::new(),
            tolerated: RefCell::default(),
        }
    }

    /// Listeners to whose servers nothing has been sent.
    pub(crate) fn unserved(&self) -> Vec<SocketAddr> {
        let is_served = |number| self.flows.keys().any(|&(listener, _)| listener == number);
        let listeners = self.site.listeners.iter().enumerate();
        listeners.filter(|(number, _)| !is_served(*number)).map(|(_, it)| it.at).collect()
    }

    fn check(&self, holds: bool, what: &'static str) -> Result<(), String> {
        if holds {
            return Ok(());
        }
        if !self.site.tolerated.contains(&what) {
            return Err(what.to_owned());
        }
        *self.tolerated.borrow_mut().entry(what).or_default() += 1;
        Ok(())
    }

    /// Says why a frame that came in through `ingress` was rightly treated as it was, or what is wrong with that.
    pub(crate) fn judge(
        &mut self,
        ingress: u32,
        input: &[u8],
        fate: Fate,
        output: &[u8],
    ) -> Judgement {
        if fate == Fate::Drop {
            return Ok(Reason::Dropped);
        }
        let packet = wire::frame(input);
        if fate == Fate::Pass && input == output {
            return self.untouched(ingress, packet.as_ref());
        }
        let packet = packet.ok_or("no packet, but it was sent")?;
        let out = wire::frame(output).ok_or("no packet was made of it")?;
        self.check(packet.tags == out.tags, "it left with other tags")?;
        self.check(self.is_ours(ingress, &packet), "the frame is to another host's MAC address")?;
        self.check(!wire::is_nobody(packet.src), "it is from an address that no host has")?;
        let is_back = out.dst == packet.src && out.to_mac == packet.from_mac;
        if is_back && self.is_answer(&packet, &out) {
            return self.answered(&packet);
        }
        if packet.part == Part::Later {
            return self.later(&packet, &out);
        }
        let judged = if let Some(number) = self.listener(&packet) {
            self.forwarded(number, &packet, &out)
        } else if packet.quoted().is_some() {
            self.error(ingress, &packet, &out)
        } else {
            self.replied(ingress, &packet, &out)
        };
        if judged.is_ok() && packet.part == Part::First {
            let key = (packet.src, packet.dst, packet.proto, packet.id);
            self.fragments.insert(key, (out.src, out.dst));
        }
        judged
    }

    fn is_ours(&self, ingress: u32, packet: &Packet) -> bool {
        self.site.interfaces.contains(&(ingress, packet.to_mac))
    }

    /// Number of the listener that a packet is addressed to.
    fn listener(&self, packet: &Packet) -> Option<usize> {
        let (_, to) = packet.ends()?;
        let mut all = self.site.listeners.iter();
        all.position(|listener| listener.proto == packet.proto && listener.at == to)
    }

    /// The kernel may have what is not the listeners', and what is theirs of no client that is denied.
    fn untouched(&self, ingress: u32, packet: Option<&Packet>) -> Judgement {
        if let Some(packet) = packet
            && self.is_ours(ingress, packet)
            && let Some(number) = self.listener(packet)
        {
            let is_let_in = self.site.listeners[number].admits(packet.src);
            self.check(is_let_in, "the kernel was given what a denied client has sent")?;
        }
        Ok(Reason::Untouched)
    }

    /// Whether it is a packet that the gateway makes itself: an echo, a reset, or an ICMP error.
    fn is_answer(&self, packet: &Packet, out: &Packet) -> bool {
        let is_reset = || {
            out.segment()
                .is_some_and(|segment| segment.flags & RST != 0 && segment.payload.is_empty())
                && out.ends().map(|(from, to)| (to, from)) == packet.ends()
        };
        let is_echo = || out.src == packet.dst && matches!(out.l4.first(), Some(0 | 129));
        match out.proto {
            TCP => is_reset(),
            wire::ICMP | wire::ICMPV6 => is_echo() || out.quoted().is_some(),
            _ => false,
        }
    }

    fn answered(&self, packet: &Packet) -> Judgement {
        if let Some(number) = self.listener(packet) {
            self.check(
                self.site.listeners[number].admits(packet.src),
                "a denied client got an answer",
            )?;
        }
        self.check(!self.site.vips.contains(&packet.src), "a VIP's own address got an answer")?;
        Ok(Reason::Answer)
    }

    /// From a client to a listener.
    fn forwarded(&mut self, number: usize, packet: &Packet, out: &Packet) -> Judgement {
        let listener = &self.site.listeners[number];
        let (client, at) = packet.ends().ok_or("it has no ports")?;
        self.check(listener.admits(packet.src), "a denied client's packet was forwarded")?;
        self.check(!wire::is_nobody(packet.src), "it is from an address that no client has")?;
        self.check(!self.site.vips.contains(&packet.src), "it is from a VIP")?;
        self.check(
            !self.site.sources.contains(&packet.src),
            "it is from an address of the gateway",
        )?;
        let server = self.server(number, out)?;
        let inside = match listener.mode {
            Mode::Tunnel => out.inner().ok_or("it is in no tunnel")?,
            _ => out.clone(),
        };
        let (from, to) = inside.ends().ok_or("no ports were left")?;
        match listener.mode {
            Mode::Dsr | Mode::Tunnel => {
                self.check((from, to) == (client, at), "its ends changed")?;
            }
            Mode::Nat => self.check(from.ip() == client.ip(), "the client's address changed")?,
            Mode::FullNat => {
                self.check(
                    self.site.sources.contains(&from.ip()),
                    "its source is not the gateway's",
                )?;
            }
        }
        if listener.told == Told::Nothing || packet.proto != TCP {
            self.check(packet.payload() == inside.payload(), "what it carries changed")?;
            if let (Some(before), Some(after)) = (packet.segment(), inside.segment()) {
                let numbers = |it: &Segment| (it.seq, it.ack, it.flags);
                self.check(numbers(&before) == numbers(&after), "its numbers or flags changed")?;
            }
        } else if let Some(segment) = inside.segment() {
            let told = listener.told;
            let stream = self.streams.entry((from, to)).or_default();
            stream.check(told, client, at, &segment)?;
        }
        self.follows(number, client, server, packet)?;
        Ok(Reason::ToServer)
    }

    /// The server that a packet was sent to.
    fn server(&self, number: usize, out: &Packet) -> Result<usize, String> {
        let listener = &self.site.listeners[number];
        let found = listener.servers.iter().position(|server| match listener.mode {
            Mode::Nat | Mode::FullNat => out.ends().is_some_and(|(_, to)| to == server.at),
            Mode::Dsr => out.to_mac == server.mac,
            Mode::Tunnel => out.dst == server.at.ip(),
        });
        found.ok_or_else(|| format!("{} has no such server", listener.at))
    }

    /// What a listener promises about which server a flow has.
    fn follows(
        &mut self,
        number: usize,
        client: SocketAddr,
        server: usize,
        packet: &Packet,
    ) -> Result<(), String> {
        let listener = &self.site.listeners[number];
        let begins = packet.segment().is_none_or(|it| it.flags & (SYN | ACK) == SYN);
        let known = self.flows.get(&(number, client)).copied();
        let has_moved = known.is_some_and(|known| known != server);
        // A datagram may begin a flow; a SYN may begin another connection.
        let may_move = packet.proto == TCP && begins && !listener.is_by_hash;
        self.check(!has_moved || may_move, "its flow has another server")?;
        // Where there is one server only, a connection that is not known is its.
        if !listener.is_by_hash && listener.servers.len() > 1 {
            self.check(begins || known.is_some(), "it is in the middle of no flow")?;
        }
        if listener.is_persistent {
            let kept = *self.clients.entry((number, client.ip())).or_insert(server);
            self.check(kept == server, "its client has another server")?;
        }
        if known.is_none()
            && let Some(named) = quic_server(packet).and_then(|id| listener.quic.get(&id))
        {
            self.check(*named == server, "its connection ID names another server")?;
        }
        if let Some(most) = listener.most_flows {
            let is_new = if packet.proto == TCP { begins } else { known.is_none() };
            let begun = self.begun.entry(number).or_default();
            *begun += usize::from(is_new);
            let begun = *begun;
            self.check(begun <= most, "more flows have begun than may")?;
        }
        self.flows.insert((number, client), server);
        Ok(())
    }

    /// From a server to a client.
    fn replied(&mut self, ingress: u32, packet: &Packet, out: &Packet) -> Judgement {
        let (server_at, to) = packet.ends().ok_or("neither TCP nor UDP, and no error")?;
        let (from, client) = out.ends().ok_or("no ports were left")?;
        let mut servers = self.site.listeners.iter().flat_map(|listener| &listener.servers);
        if client == to && servers.any(|server| server.at == to) {
            self.check(false, "a packet to a server itself was not the kernel's to forward")?;
            return Ok(Reason::Untouched);
        }
        let found = self.site.listeners.iter().enumerate().find_map(|(number, listener)| {
            let is_it = listener.at == from && listener.proto == packet.proto;
            let servers = &mut listener.servers.iter();
            let server = servers.position(|server| is_it && server.at == server_at)?;
            matches!(listener.mode, Mode::Nat | Mode::FullNat).then_some((number, server))
        });
        let (number, server) = found.ok_or("neither to a listener nor from a server")?;
        let listener = &self.site.listeners[number];
        let known = self.flows.get(&(number, client)).copied();
        let segment = packet.segment();
        let is_syn = segment.as_ref().is_some_and(|it| it.flags & (SYN | ACK) == SYN);
        self.check(!is_syn, "a server's SYN passed for a reply")?;
        let is_from_there = listener.servers[server].ifindex == ingress;
        self.check(is_from_there, "a reply from where no server is")?;
        match listener.mode {
            Mode::FullNat => {
                self.check(self.site.sources.contains(&to.ip()), "a reply to no address of ours")?;
                self.check(
                    known == Some(server),
                    "a reply to a client of another server, or of none",
                )?;
            }
            _ => {
                self.check(to.ip() == client.ip(), "another client's address")?;
                self.check(
                    packet.proto != UDP || known == Some(server),
                    "a datagram to a client that this server does not have",
                )?;
            }
        }
        if listener.told == Told::Nothing || packet.proto != TCP {
            self.check(packet.payload() == out.payload(), "what it carries changed")?;
        } else if let Some(segment) = segment {
            self.streams.entry((to, server_at)).or_default().answered(&segment);
        }
        Ok(Reason::ToClient)
    }

    /// An ICMP error: about what a VIP has sent, or about what a server was sent.
    fn error(&self, ingress: u32, packet: &Packet, out: &Packet) -> Judgement {
        let quoted = packet.quoted().ok_or("no error")?;
        let (from, to) = quoted.ends().ok_or("it quotes no ports")?;
        self.check(!self.site.vips.contains(&packet.src), "an error from a VIP")?;
        let is_of = |listener: &&Listener| listener.proto == quoted.proto;
        if let Some(number) =
            self.site.listeners.iter().position(|listener| is_of(&listener) && listener.at == from)
        {
            let listener = &self.site.listeners[number];
            self.check(listener.admits(to.ip()), "an error about a denied client's flow")?;
            self.check(packet.dst == from.ip(), "an error to another than whom it quotes")?;
            self.check(
                listener
                    .servers
                    .iter()
                    .any(|server| out.to_mac == server.mac || out.dst == server.at.ip()),
                "an error to no server of the listener",
            )?;
            return Ok(Reason::Error);
        }
        let servers =
            self.site.listeners.iter().filter(is_of).flat_map(|listener| &listener.servers);
        let mut servers = servers.filter(|server| server.at == to);
        let server = servers.next().ok_or("an error about no flow of a listener")?;
        self.check(server.ifindex == ingress, "an error from where no server is")?;
        self.check(packet.dst == from.ip(), "an error to another than whom it quotes")?;
        Ok(Reason::Error)
    }

    /// A fragment other than the first goes where that went.
    fn later(&self, packet: &Packet, out: &Packet) -> Judgement {
        let key = (packet.src, packet.dst, packet.proto, packet.id);
        let first = self.fragments.get(&key).ok_or("a fragment whose first was not forwarded")?;
        self.check(*first == (out.src, out.dst), "a fragment that leaves the first")?;
        Ok(Reason::Fragment)
    }
}

impl Listener {
    fn admits(&self, client: IpAddr) -> bool {
        !self.denied.iter().any(|&(network, bits)| contains(network, bits, client))
    }
}

fn contains(network: IpAddr, bits: u8, address: IpAddr) -> bool {
    let (network, address, width) = match (network, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            (u128::from(network.to_bits()), u128::from(address.to_bits()), 32)
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => (network.to_bits(), address.to_bits(), 128),
        _ => return false,
    };
    (network ^ address).checked_shr(width - u32::from(bits)).unwrap_or(0) == 0
}

/// The server ID in a QUIC short header (draft-ietf-quic-load-balancers, configuration 0).
fn quic_server(packet: &Packet) -> Option<u16> {
    let payload = packet.payload().filter(|_| packet.proto == UDP)?;
    let is_long = payload.first()? & 0x80 != 0;
    let id = payload.get(1..9).filter(|id| !is_long && id[0] >> 5 == 0)?;
    Some(u16::from_be_bytes([id[1], id[2]]))
}

#[test]
fn given_the_oracle_when_its_sources_are_read_then_they_use_nothing_of_the_datapath() {
    let sources = [
        include_str!("oracle.rs"),
        include_str!("oracle/truth.rs"),
        include_str!("oracle/wire.rs"),
    ];
    for source in sources {
        let used = source.lines().filter(|line| line.trim_start().starts_with("use "));
        let foreign: Vec<_> =
            used.filter(|line| line.contains("slb_") || line.contains("crate::")).collect();
        assert!(foreign.is_empty(), "{foreign:?}");
    }
}
