//! Random packets of all kinds, with the questions that describe them.

use std::net::{IpAddr, SocketAddr};

use slb_common::abi::{ConnState, TCP};
use slb_lab::Dice;
use slb_user::datapath::{Kind, Part, Question};

use super::{
    compare::{Arrived, Sample},
    world::{CROSSING, FIRST_PORT, HOSTS, LISTENERS, Listener, World, host},
};
use crate::{
    fixture::{Slb, VIPS, at, client_of, datagram, syn},
    fragments::fragments,
    frame::{ACK, FIN, Frame, RST, SYN, VIRTUAL_MAC, icmp, tagged},
    icmp::quote,
    lab::{FIRST, LAN, LAN_MAC, WAN},
};

/// Flows that have been sent, of which later packets are.
#[derive(Default)]
pub(super) struct Packets {
    flows: Vec<Flow>,
    fragment_id: u16,
}

/// A flow that has got to a backend by translation.
#[derive(Clone, Copy)]
struct Flow {
    client: SocketAddr,
    listener: Listener,
    ingress: u32,
    /// What the backend sees.
    inside: Arrived,
}

/// Sources that are no client's, everywhere or where they are on a subnet of another interface.
const MARTIANS: [[&str; 6]; 2] = [
    ["127.0.0.1", "0.1.2.3", "169.254.1.7", "255.255.255.255", "10.0.0.255", "10.0.0.99"],
    ["::1", "fe80::7", "ff02::7", "::", "2001:db8:a::101", "2001:db8:a::99"],
];
/// The most flows that later packets are drawn from.
const REMEMBERED: usize = 200;

impl Packets {
    /// The next packets: one, or a few that belong together.
    pub(super) fn draw(
        &mut self,
        dice: &mut Dice,
        slb: &mut Slb<'_>,
        world: &World,
    ) -> Vec<Sample> {
        if dice.one_in(6)
            && let Some(flow) = self.disturb(dice, slb)
        {
            return vec![again(flow)];
        }
        match dice.below(20) {
            0 => vec![echo(dice)],
            1 => vec![self.error_to_backend(dice, world)],
            2 => vec![self.error_to_client(dice, world)],
            3 => vec![martian(dice, world)],
            6 => vec![from_backend(dice, world)],
            4 | 5 => self.fragments(dice, world),
            _ => vec![self.transport(dice, world)],
        }
    }

    /// Remembers where a flow went.
    pub(super) fn note(&mut self, sample: &Sample, arrived: Option<Arrived>) {
        let Question { kind: Kind::Transport, part: Part::Whole, src, dst, proto, .. } =
            sample.question
        else {
            return;
        };
        // Neither encapsulated nor as it was.
        let Some(inside) = arrived.filter(|inside| inside.to != dst && inside.to.port() != 0)
        else {
            return;
        };
        if self.flows.len() == REMEMBERED {
            self.flows.swap_remove(usize::from(src.port()) % REMEMBERED);
        }
        let listener = Listener { vip: dst, proto };
        self.flows.push(Flow { client: src, listener, ingress: sample.ingress, inside });
    }

    /// Begins with other flows, but not with the fragments that have been seen.
    pub(super) fn forget_flows(&mut self) {
        self.flows.clear();
    }

    fn flow(&self, dice: &mut Dice) -> Option<Flow> {
        (!self.flows.is_empty()).then(|| self.flows[dice.below(self.flows.len())])
    }

    /// What changes the state of a flow without a question: its backend answers, the client ends it, or the agent does.
    /// Gives a flow that is to begin once more.
    fn disturb(&self, dice: &mut Dice, slb: &mut Slb<'_>) -> Option<Flow> {
        let flow = self.flow(dice)?;
        let is_tcp = flow.listener.proto == TCP;
        let sent = first(flow.client, flow.listener);
        match dice.below(4) {
            0 if is_tcp => {
                let has_entry = slb.flow(&sent).is_some();
                if has_entry {
                    slb.tamper(&sent, |entry| entry.state |= ConnState::RST_PENDING.bits());
                }
            }
            1 if is_tcp => {
                let flags = dice.pick(&[FIN | ACK, RST]);
                slb.run(flow.ingress, &sent.flags(flags).bytes());
                return Some(flow);
            }
            _ => {
                let Arrived { from, to } = flow.inside;
                let reply = first(to, Listener { vip: from, ..flow.listener });
                let reply =
                    Frame { ack: sent.seq + 1, src_mac: FIRST.dst_mac, dst_mac: LAN_MAC, ..reply };
                let flags = dice.pick(&[SYN | ACK, ACK, ACK, RST | ACK]);
                slb.run(LAN, &reply.flags(flags).bytes());
            }
        }
        None
    }

    /// A client's packet, of a flow that is there or of a new one.
    fn client(&self, dice: &mut Dice, world: &World) -> (SocketAddr, Listener, u32) {
        if dice.one_in(2)
            && let Some(Flow { client, listener, ingress, .. }) = self.flow(dice)
        {
            return (client, listener, ingress);
        }
        let mut listener = world.listener(dice);
        let family = usize::from(listener.vip.is_ipv6());
        if dice.one_in(20) {
            // Where none is, or one of the other protocol.
            let port = FIRST_PORT + dice.below(usize::from(LISTENERS) + 4) as u16;
            listener.vip.set_port(port);
        }
        // Few, so that many packets are of flows that are there.
        let port = 30_000 + dice.below(60) as u16;
        if dice.one_in(6) {
            let addr = host(dice.below(HOSTS), family);
            return (SocketAddr::new(addr, port), listener, dice.pick(&[LAN, WAN]));
        }
        (client_of(100 + dice.below(4) as u32, family, port), listener, WAN)
    }

    fn transport(&self, dice: &mut Dice, world: &World) -> Sample {
        let (client, listener, ingress) = self.client(dice, world);
        let (question, frame) = packet(dice, client, listener, ingress);
        let ttl = if dice.one_in(12) { dice.pick(&[0, 1, 2]) } else { 64 };
        let question = Question { ttl, ..question };
        let mut bytes = frame.ttl(ttl).bytes();
        if dice.one_in(12) {
            bytes = tagged(&bytes, &[(0x8100, 7)]);
        }
        Sample { question, ingress, bytes }
    }

    /// A packet in fragments, or in other ones than those that have been seen.
    fn fragments(&mut self, dice: &mut Dice, world: &World) -> Vec<Sample> {
        let (client, listener, ingress) = self.client(dice, world);
        let (question, frame) = packet(dice, client, listener, ingress);
        let ttl = if dice.one_in(6) { 1 } else { 64 };
        self.fragment_id = self.fragment_id.wrapping_add(1);
        // For QUIC it is a long header without a connection ID.
        let mut payload = vec![0; 1_400];
        payload[0] = 0x80;
        let frame = Frame { payload, ..frame };
        let id = self.fragment_id;
        let of = |number: usize, ttl: u8| {
            let part = if number == 0 { Part::First } else { Part::Later(Some(u32::from(id))) };
            let bytes = fragments(&frame.clone().ttl(ttl), id).swap_remove(number);
            Sample { question: Question { part, ttl, ..question }, ingress, bytes }
        };
        if dice.one_in(5) {
            return vec![of(1, ttl)];
        }
        vec![of(0, 64), of(1, ttl), of(2, 64)]
    }

    /// An error about what a VIP has sent to a client.
    fn error_to_backend(&self, dice: &mut Dice, world: &World) -> Sample {
        let (client, listener, _) = self.client(dice, world);
        let about = first(listener.vip, Listener { vip: client, ..listener });
        // From the client's host: the question does not say which router it is, and an access list may have that.
        error(dice, listener.proto, &about, client.ip(), WAN)
    }

    /// An error about what a client has sent to a backend, through a listener or not.
    fn error_to_client(&self, dice: &mut Dice, world: &World) -> Sample {
        let inside = match self.flow(dice) {
            Some(flow) if !dice.one_in(8) => (flow.inside, flow.listener.proto),
            _ => {
                let to = world.target(dice);
                let family = usize::from(to.is_ipv6());
                let from = client_of(100, family, 30_000 + dice.below(60) as u16);
                (Arrived { from, to }, world.listener(dice).proto)
            }
        };
        let (Arrived { from, to }, proto) = inside;
        let about = first(from, Listener { vip: to, proto });
        let router = host(0, usize::from(to.is_ipv6()));
        let ingress = if dice.one_in(4) { WAN } else { LAN };
        error(dice, proto, &about, router, ingress)
    }
}

/// The first packet of a flow.
fn first(client: SocketAddr, listener: Listener) -> Frame {
    if listener.proto == TCP {
        // Without data, which a backend that is told the client's address does not take.
        Frame { payload: Vec::new(), dst_mac: VIRTUAL_MAC, ..syn(client, listener.vip) }
    } else {
        Frame { dst_mac: VIRTUAL_MAC, ..datagram(client, listener.vip) }
    }
}

/// The first packet of a flow once more.
fn again(flow: Flow) -> Sample {
    let Flow { client, listener, ingress, .. } = flow;
    let question = Question { ingress, ..Question::new(listener.proto, client, listener.vip) };
    Sample { question, ingress, bytes: first(client, listener).bytes() }
}

/// A packet of a flow, and its question.
fn packet(
    dice: &mut Dice,
    client: SocketAddr,
    listener: Listener,
    ingress: u32,
) -> (Question, Frame) {
    let is_established = listener.proto == TCP && dice.below(3) > 0;
    let frame = first(client, listener);
    let frame = if is_established { frame.flags(ACK) } else { frame };
    let question = Question::new(listener.proto, client, listener.vip);
    (Question { is_established, ingress, ..question }, frame)
}

/// From a backend's address and port, by the interface that leads to it or by another.
fn from_backend(dice: &mut Dice, world: &World) -> Sample {
    let from = world.target(dice);
    let family = usize::from(from.is_ipv6());
    let to = client_of(100, family, 30_000 + dice.below(60) as u16);
    let (ingress, proto) = (dice.pick(&[LAN, WAN]), world.listener(dice).proto);
    let question = Question { ingress, is_established: true, ..Question::new(proto, from, to) };
    let frame = first(from, Listener { vip: to, proto }).flags(ACK);
    Sample { question, ingress, bytes: frame.bytes() }
}

/// To a listener, from an address that is no client's.
fn martian(dice: &mut Dice, world: &World) -> Sample {
    let listener = world.listener(dice);
    let family = usize::from(listener.vip.is_ipv6());
    let is_vip = dice.one_in(3);
    let addr = if is_vip { VIPS[family] } else { dice.pick(&MARTIANS[family]) };
    let (question, frame) = packet(dice, at(addr, 9), listener, WAN);
    Sample { question, ingress: WAN, bytes: frame.bytes() }
}

/// An error from a router about a frame, on its way to who has sent that.
fn error(dice: &mut Dice, proto: u32, about: &Frame, router: IpAddr, ingress: u32) -> Sample {
    // Both have words in the other family.
    let kinds = if about.src.is_ipv4() { [[3, 3], [11, 0]] } else { [[1, 4], [3, 0]] };
    let ttl = if dice.one_in(6) { 1 } else { 64 };
    let base = Frame { ttl, ..Frame::tcp(SocketAddr::new(router, 0), about.src) };
    let frame = icmp(&base, dice.pick(&kinds), [0; 4], &quote(about, 500));
    let kind = Kind::Error;
    let question = Question { kind, ttl, ingress, ..Question::new(proto, about.src, about.dst) };
    Sample { question, ingress, bytes: frame.bytes() }
}

/// To a VIP, or elsewhere.
fn echo(dice: &mut Dice) -> Sample {
    let family = dice.below(2);
    let to = dice.pick(&[VIPS[family], CROSSING[family], ["10.0.0.20", "2001:db8:a::20"][family]]);
    let from = if dice.one_in(4) {
        at(dice.pick(&MARTIANS[family]), 0)
    } else {
        client_of(100, family, 0)
    };
    let base = Frame { payload: Vec::new(), ..syn(from, at(to, 0)) };
    let kind = if family == 0 { 8 } else { 128 };
    let bytes = icmp(&base, [kind, 0], [0, 1, 0, 1], b"echo").bytes();
    let question = Question::new(TCP, base.src, base.dst);
    let question = Question { kind: Kind::Echo, ingress: WAN, ..question };
    Sample { question, ingress: WAN, bytes }
}
