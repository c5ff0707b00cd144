//! Packets of clients and servers, of which some are true and some are not.

use std::net::SocketAddr;

use crate::{
    fixture::{SOURCES, VIPS, at, backend, client_of},
    fragments::fragments,
    frame::{ACK, FIN, Frame, L3, RST, SYN, Transport, icmp, tagged},
    fuzz::{Random, accident, seal},
    lab::{LAN, ROUTER, WAN},
    oracle::{Listener, Reason, Site, wire},
};

use super::{mac, other, site};

/// Packets that are remembered, which others follow.
const KNOWN: usize = 400;
/// Networks of clients.
const NETWORKS: [u32; 4] = [100, 104, 105, site::DENIED];
/// More than one buffer of the kernel's holds.
pub(super) const LARGE: usize = 5_000;

/// A frame, and where it comes in.
pub(super) struct Sent {
    pub ingress: u32,
    pub bytes: Vec<u8>,
}

/// Where packets come from.
pub(super) struct Traffic {
    site: Site,
    random: Random,
    to_servers: Vec<wire::Packet>,
    to_clients: Vec<wire::Packet>,
    /// What is sent next, ahead of all else.
    queue: Vec<Sent>,
    /// Of the datagram that was last sent in fragments. While the gateway knows one, no host gives its number to another.
    datagram: u16,
}

impl Traffic {
    pub(super) fn new(site: Site, random: Random) -> Self {
        Self {
            site,
            random,
            to_servers: Vec::new(),
            to_clients: Vec::new(),
            queue: Vec::new(),
            datagram: 0,
        }
    }

    /// The next packet.
    pub(super) fn next(&mut self) -> Sent {
        if let Some(sent) = self.queue.pop() {
            return sent;
        }
        let mut sent = match self.random.below(100) {
            0..35 => self.client(),
            35..60 => self.reply(),
            60..72 => self.goes_on(),
            72..80 => self.error(),
            80..86 => self.fragments(),
            86..92 => self.direct(),
            _ => self.stranger(),
        };
        if self.random.one_in(4) {
            self.lie(&mut sent);
        }
        if self.random.one_in(4) {
            for _ in 0..=self.random.below(2) {
                accident(&mut self.random, &mut sent.bytes);
            }
            if self.random.one_in(2) {
                seal(&mut sent.bytes);
            }
        }
        sent
    }

    /// Remembers what was forwarded, as it left: others answer, or go on.
    pub(super) fn learn(&mut self, reason: Reason, output: &[u8]) {
        let known = match reason {
            Reason::ToServer => &mut self.to_servers,
            Reason::ToClient => &mut self.to_clients,
            _ => return,
        };
        if let Some(packet) = wire::frame(output) {
            if known.len() < KNOWN {
                known.push(packet);
            } else {
                known[self.random.below(KNOWN)] = packet;
            }
        }
    }

    fn listener(&mut self) -> Listener {
        self.random.pick(&self.site.listeners)
    }

    fn address(&mut self, is_v4: bool) -> SocketAddr {
        let network = self.random.pick(&NETWORKS);
        client_of(network, usize::from(!is_v4), 1_024 + self.random.below(60) as u16)
    }

    /// Comes from a client.
    fn outside(frame: Frame) -> Sent {
        let frame = Frame { src_mac: ROUTER.dst_mac, dst_mac: mac(WAN), ..frame };
        Sent { ingress: WAN, bytes: frame.bytes() }
    }

    /// A packet of a client to a listener.
    fn client(&mut self) -> Sent {
        let listener = self.listener();
        let from = self.address(listener.at.is_ipv4());
        let mut frame = self.packet(&listener, from);
        if self.random.one_in(60) {
            frame.payload = vec![7; LARGE];
        }
        if matches!(frame.transport, Transport::Tcp { flags: SYN, .. }) && self.random.one_in(3) {
            self.queue.push(Self::impatient(&frame));
        }
        let mut sent = Self::outside(frame);
        if self.random.one_in(20) {
            sent.bytes = tagged(&sent.bytes, &[(0x8100, 7)]);
        }
        sent
    }

    /// Data of a client that has sent a SYN, and does not wait for the answer.
    fn impatient(syn: &Frame) -> Sent {
        let payload = b"GET / HTTP/1.1".to_vec();
        let frame = Frame { seq: syn.seq.wrapping_add(1), payload, ..syn.clone() };
        Self::outside(frame.flags(ACK))
    }

    fn packet(&mut self, listener: &Listener, from: SocketAddr) -> Frame {
        if listener.proto == wire::UDP {
            let mut frame = Frame::udp(from, listener.at);
            if !listener.quic.is_empty() {
                let server = self.random.pick(&[1, 2, 3]);
                let first = self.random.pick(&[0x40, 0x40, 0x40, 0xc0]);
                frame.payload = [&[first, 5, 0, server, 9, 9, 9, 9, 9][..], &[1; 20]].concat();
            }
            return frame;
        }
        let flags = self.random.pick(&[SYN, SYN, SYN, ACK, FIN | ACK, RST, SYN | ACK, 0]);
        let frame = Frame::tcp(from, listener.at).flags(flags);
        let payload = if flags == ACK { b"GET / HTTP/1.1".to_vec() } else { Vec::new() };
        Frame { seq: self.random.next() as u32, payload, ..frame }
    }

    /// The answer to what a server was sent.
    fn reply(&mut self) -> Sent {
        let Some(output) = self.known(true) else { return self.client() };
        let Some((from, to)) = output.ends() else { return self.client() };
        let ingress = self.interface(output.to_mac);
        let (src_mac, dst_mac) = (output.to_mac, mac(ingress));
        let frame = match output.segment() {
            None => Frame { payload: b"an answer".to_vec(), ..Frame::udp(to, from) },
            Some(segment) => {
                let is_syn = segment.flags & SYN != 0;
                let begin = u32::from(is_syn) + segment.payload.len() as u32;
                let flags = match is_syn {
                    true => SYN | ACK,
                    false => self.random.pick(&[ACK, ACK, ACK, FIN | ACK, RST | ACK, SYN]),
                };
                let payload = if is_syn { Vec::new() } else { b"an answer".to_vec() };
                let (seq, ack) = (segment.ack.wrapping_sub(is_syn.into()), segment.seq);
                let ack = ack.wrapping_add(begin);
                Frame { seq, ack, payload, ..Frame::tcp(to, from).flags(flags) }
            }
        };
        Sent { ingress, bytes: Frame { src_mac, dst_mac, ..frame }.bytes() }
    }

    /// What a client sends behind an answer.
    fn goes_on(&mut self) -> Sent {
        let Some(output) = self.known(false) else { return self.client() };
        let (Some((from, to)), Some(segment)) = (output.ends(), output.segment()) else {
            return self.client();
        };
        let heard = segment.payload.len() as u32 + u32::from(segment.flags & SYN != 0);
        let ack = segment.seq.wrapping_add(heard);
        let behind = self.random.pick(&[0, 0, 0, 14, 1_u32.wrapping_neg(), 28_u32.wrapping_neg()]);
        let seq = segment.ack.wrapping_add(behind);
        let flags = self.random.pick(&[ACK, ACK, ACK, FIN | ACK, RST]);
        let payload = self.random.pick(&[b"GET / HTTP/1.1".to_vec(), Vec::new(), vec![b'x'; 60]]);
        let options = self.random.pick(&[vec![], vec![], vec![254, 8, 1, 1, 1, 1, 1, 1]]);
        let transport = Transport::Tcp { flags, options };
        Self::outside(Frame { transport, seq, ack, payload, ..Frame::tcp(to, from) })
    }

    /// An ICMP error about a packet that was forwarded, from either side.
    fn error(&mut self) -> Sent {
        let is_to_server = self.random.one_in(2);
        let Some(output) = self.known(is_to_server) else { return self.client() };
        let Some((from, to)) = output.ends() else { return self.client() };
        let quoted = match output.segment() {
            Some(segment) => Frame { seq: segment.seq, ..Frame::tcp(from, to) }.flags(ACK),
            None => Frame::udp(from, to),
        };
        let family = usize::from(from.is_ipv6());
        let ingress = if is_to_server { self.interface(output.to_mac) } else { WAN };
        let router = if is_to_server {
            backend(2, family, 0)
        } else {
            client_of(self.random.pick(&[100, 104]), family, 0)
        };
        let kinds = [[[3, 4], [3, 3], [11, 0]], [[2, 0], [1, 4], [3, 0]]][family];
        let kind = self.random.pick(&kinds);
        // It should go to whom it quotes.
        let to = match self.random.below(6) {
            0 => at(VIPS[family], 0),
            1 => client_of(100, family, 0),
            _ => from,
        };
        let base = Frame {
            src_mac: output.to_mac,
            dst_mac: mac(ingress),
            ..Frame::tcp(router, SocketAddr::new(to.ip(), 0))
        };
        let bytes = icmp(&base, kind, [0, 0, 5, 0], &quoted.bytes()[L3..]).bytes();
        Sent { ingress, bytes }
    }

    /// A datagram in fragments, of which one may be missing.
    fn fragments(&mut self) -> Sent {
        let listener = self.listener();
        let from = self.address(listener.at.is_ipv4());
        let mut frame = self.packet(&listener, from);
        frame.payload = vec![7; 1_300];
        let frame = Frame { src_mac: ROUTER.dst_mac, dst_mac: mac(WAN), ..frame };
        self.datagram = self.datagram.wrapping_add(1);
        let parts = fragments(&frame, self.datagram);
        let mut parts = parts.into_iter().map(|bytes| Sent { ingress: WAN, bytes });
        let mut first = parts.next();
        self.queue.extend(parts);
        if self.random.one_in(3) {
            first = self.queue.pop();
        }
        first.expect("a fragment")
    }

    /// A packet of a client to a server's own address, and what comes back.
    fn direct(&mut self) -> Sent {
        let listener = self.listener();
        let server = self.random.pick(&listener.servers);
        let from = self.address(server.at.is_ipv4());
        let (from, to, ingress) = if self.random.one_in(2) {
            (from, server.at, WAN)
        } else {
            (server.at, from, server.ifindex)
        };
        let frame = if listener.proto == wire::UDP {
            Frame::udp(from, to)
        } else {
            Frame::tcp(from, to).flags(self.random.pick(&[SYN, ACK, SYN | ACK]))
        };
        let src_mac = if ingress == WAN { ROUTER.dst_mac } else { server.mac };
        let bytes = Frame { src_mac, dst_mac: mac(ingress), ..frame }.bytes();
        Sent { ingress, bytes }
    }

    /// A packet in somebody else's name, from the clients' side.
    fn stranger(&mut self) -> Sent {
        let listener = self.listener();
        let is_v4 = listener.at.is_ipv4();
        let family = usize::from(!is_v4);
        let names: Vec<&str> = [
            &[VIPS[family], SOURCES[family][0]][..],
            [
                &["127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "169.254.1.1"][..],
                &["::1", "::", "ff02::1", "fe80::1"][..],
            ][family],
        ]
        .concat();
        let mut from = at(self.random.pick(&names), 1_024);
        if self.random.one_in(3) {
            from = self.random.pick(&listener.servers).at;
        }
        let to = if self.random.one_in(3) { self.address(from.is_ipv4()) } else { listener.at };
        if from.is_ipv4() != to.is_ipv4() {
            return self.client();
        }
        let frame = if listener.proto == wire::UDP {
            Frame::udp(from, to)
        } else {
            Frame::tcp(from, to).flags(self.random.pick(&[SYN, ACK, SYN | ACK]))
        };
        if self.random.one_in(3) {
            let about = self.address(is_v4);
            let quoted = Frame::tcp(listener.at, about);
            let quoted = &quoted.bytes()[L3..];
            if listener.at.is_ipv4() == from.is_ipv4() {
                let base = Frame::tcp(from, SocketAddr::new(listener.at.ip(), 0));
                let kind = [[3, 3], [1, 4]][family];
                return Self::outside(icmp(&base, kind, [0; 4], quoted));
            }
        }
        Self::outside(frame)
    }

    /// Makes a packet come from elsewhere, or go to another host.
    fn lie(&mut self, sent: &mut Sent) {
        match self.random.below(3) {
            0 => {
                sent.ingress = other(sent.ingress);
                sent.bytes[..6].copy_from_slice(&mac(sent.ingress));
            }
            1 => sent.bytes[..6].copy_from_slice(&[2, 0, 0, 0, 9, self.random.below(4) as u8]),
            // The card is in promiscuous mode, and the frame is another interface's.
            _ => sent.bytes[..6].copy_from_slice(&mac(other(sent.ingress))),
        }
    }

    fn known(&mut self, is_to_server: bool) -> Option<wire::Packet> {
        let known = if is_to_server { &self.to_servers } else { &self.to_clients };
        if known.is_empty() { None } else { Some(self.random.pick(known)) }
    }

    /// Where a server with this MAC address is.
    fn interface(&self, mac: [u8; 6]) -> u32 {
        let mut servers = self.site.listeners.iter().flat_map(|listener| &listener.servers);
        servers.find(|server| server.mac == mac).map_or(LAN, |server| server.ifindex)
    }
}
