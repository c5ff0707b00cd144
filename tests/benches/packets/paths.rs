//! Every path that is measured: a frame, and what becomes of it.

use std::{net::SocketAddr, sync::Arc};

use slb_common::{
    abi::{self, Backend, BackendFlags, RevNat, Roles, Scheduler},
    hash,
    verdict::Verdict,
};
use slb_user::{
    schedule::{Member, maglev},
    state::{ListenerState, Policy, Schedule},
};

use crate::{
    fixture::{
        FAMILIES, IDLE_JIFFIES, Slb, answer, backend, by, client, datagram, endpoint, port, sender,
        syn, vip,
    },
    frame::{ACK, Frame, icmp, tagged},
    lab::{FIRST, LAN, WAN, set},
};

/// Which program is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Slb,
    /// Nothing: what the harness takes.
    Stub,
    /// One look-up in an LRU hash.
    Lru,
    /// A slot, the record of one of so many backends, and its counter.
    Chain {
        backends: u32,
    },
    /// One look-up in the kernel's routes.
    Fib,
    /// Only a redirect.
    Redirect,
    /// Nothing, not even that.
    Sink,
}

/// Whose address and port differ from flow to flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// One path through the datapath.
#[derive(Clone, Debug)]
pub(crate) struct Path {
    pub name: String,
    /// Which table it belongs to.
    pub group: &'static str,
    pub frame: Vec<u8>,
    /// Frames that come before, of every flow.
    pub opening: Vec<Vec<u8>>,
    pub ingress: u32,
    pub flows: u32,
    pub side: Side,
    /// By how much the frame becomes longer.
    pub grown: i32,
    pub target: Target,
    /// What becomes of it; `None`: not ours to say.
    pub verdict: Option<Verdict>,
}

fn path(group: &'static str, name: String, frame: &Frame, verdict: Verdict) -> Path {
    Path {
        name,
        group,
        frame: frame.bytes(),
        opening: Vec::new(),
        ingress: WAN,
        flows: 1,
        side: Side::Source,
        grown: 0,
        target: Target::Slb,
        verdict: Some(verdict),
    }
}

/// A short packet, but longer than what is put back.
fn short(frame: Frame) -> Frame {
    Frame { payload: vec![7; 38], ..frame }
}

/// Backends of a listener.
pub(crate) const BACKENDS: [u32; 3] = [10, 1_000, 10_000];

/// Name of the group of frames that are really sent.
pub(crate) const LIVE: &str = "live";

/// What the costs are compared with.
pub(crate) fn references() -> Vec<Path> {
    let http = short(syn(client(0, 1_024), vip(0, port::HTTP)));
    let reference = |name: &str, target, flows| Path {
        target,
        flows,
        verdict: None,
        ..path("reference", name.to_owned(), &http, Verdict::Forwarded)
    };
    let chains = BACKENDS.into_iter().flat_map(|backends| {
        [1, 1_000].map(|flows| {
            let name = format!("slot, record and counter, {backends} backends, {flows} flows");
            reference(&name, Target::Chain { backends }, flows)
        })
    });
    let others = [
        reference("empty program", Target::Stub, 1),
        reference("one FIB look-up", Target::Fib, 1),
        reference("one LRU look-up, 1 flow", Target::Lru, 1),
        reference("one LRU look-up, 1000 flows", Target::Lru, 1_000),
        reference("one LRU look-up, 100000 flows", Target::Lru, 100_000),
        reference("one LRU look-up, 1000000 flows", Target::Lru, 1_000_000),
    ];
    others.into_iter().chain(chains).collect()
}

/// Mode, family, protocol, and where in its life a flow is.
pub(crate) fn all() -> Vec<Path> {
    let mut paths = Vec::new();
    for family in FAMILIES {
        let ip = ["IPv4", "IPv6"][family];
        let from = client(family, 1_024);
        let tcp = |to| short(syn(from, vip(family, to)));
        let udp = |to| short(datagram(from, vip(family, to)));
        let mut add = |name: &str, frame: &Frame, verdict| {
            paths.push(path("path", format!("{name}, {ip}"), frame, verdict));
            paths.len() - 1
        };
        let forwarded = Verdict::Forwarded;
        add("nat tch TCP established", &tcp(port::HTTP).flags(ACK), forwarded);
        add("nat tch TCP new", &tcp(port::HTTP), forwarded);
        add("nat tch UDP", &udp(port::DNS), forwarded);
        let reply =
            |to, inside| short(answer(&syn(from, vip(family, to)).to(backend(0, family, inside))));
        let tcp_reply =
            add("nat tch TCP reply", &reply(port::HTTP, port::HTTP_BACKEND), Verdict::Replied);
        let udp_inside = datagram(from, backend(0, family, port::DNS_BACKEND));
        let udp_reply = add("nat tch UDP reply", &short(answer(&udp_inside)), Verdict::Replied);
        let wrr = add("nat wrr TCP established", &tcp(port::TURN).flags(ACK), forwarded);
        let wrr_udp = add("nat wrr UDP", &udp(port::SIP), forwarded);
        let wrr_reply =
            add("nat wrr TCP reply", &reply(port::TURN, port::TURN_BACKEND), Verdict::Replied);
        let wrr_new = add("nat wrr TCP new", &tcp(port::TURN), forwarded);
        add("dsr TCP", &tcp(port::DSR).flags(ACK), forwarded);
        let ipip = add("ipip TCP", &tcp(port::IPIP).flags(ACK), forwarded);
        let cross = add("ipip TCP, over the other family", &tcp(port::CROSS).flags(ACK), forwarded);
        let gue = add("gue UDP", &udp(port::GUE), forwarded);
        let stranger = short(syn(from, client(family, 9))).flags(ACK);
        add("passed, not for us", &stranger, Verdict::NotOurs);
        add("passed, no listener", &tcp(9).flags(ACK), Verdict::NoListener);
        add("dropped, no backend", &tcp(port::EMPTY), Verdict::NoBackend);
        let echo = icmp(&tcp(0), [[8, 0], [128, 0]][family], [0, 1, 0, 1], &[7; 56]);
        add("echo", &echo, Verdict::Echo);
        add("answered by a reset", &tcp(port::RING).flags(ACK), Verdict::Reset);
        let vlan = add("nat tch TCP, VLAN", &tcp(port::HTTP).flags(ACK), forwarded);
        for reply in [tcp_reply, udp_reply, wrr_reply] {
            paths[reply].ingress = LAN;
        }
        // What a flow begins with.
        for (at, opening) in [
            (wrr, tcp(port::TURN)),
            (wrr_udp, udp(port::SIP)),
            (wrr_reply, tcp(port::TURN)),
            (tcp_reply, tcp(port::HTTP)),
        ] {
            paths[at].opening = vec![opening.bytes()];
        }
        paths[wrr_new].flows = 4_000_000;
        let outer = |family: usize| [20, 40][family];
        paths[ipip].grown = outer(family);
        paths[cross].grown = outer(1 - family);
        paths[gue].grown = outer(family) + 12;
        paths[vlan].frame = tagged(&paths[vlan].frame, &[(0x8100, 7)]);
    }
    paths
}

/// Frames that are really sent, and what that takes by itself.
pub(crate) fn live() -> Vec<Path> {
    let mut paths = Vec::new();
    let only = |name: &str, target, verdict| Path {
        target,
        verdict: None,
        ..path(LIVE, name.to_owned(), &short(syn(client(0, 1_024), vip(0, port::HTTP))), verdict)
    };
    paths.push(only("drop only", Target::Sink, Verdict::NoBackend));
    paths.push(only("redirect only", Target::Redirect, Verdict::Forwarded));
    for mut path in all() {
        let is_live =
            ["nat tch TCP established", "nat tch UDP,", "nat tch TCP reply", "nat wrr TCP e"];
        let is_live = is_live.into_iter().chain(["dsr", "ipip TCP,", "gue"]);
        if is_live.into_iter().any(|name| path.name.starts_with(name))
            && !path.name.contains("other family")
        {
            path.group = LIVE;
            path.name = format!("{}, live", path.name);
            paths.push(path);
        }
    }
    paths
}

/// Flows whose backend sees a source of ours, in both directions.
pub(crate) fn full(slb: &mut Slb<'_>) -> Vec<Path> {
    let mut paths = Vec::new();
    for family in FAMILIES {
        let ip = ["IPv4", "IPv6"][family];
        for (name, to, crosses) in
            [("full-nat TCP", port::FULL, false), ("between families TCP", port::OTHER, true)]
        {
            let inside = if crosses { 1 - family } else { family };
            let open = short(syn(client(family, 1_024), vip(family, to)));
            let seen = slb.run(WAN, &open.bytes()).bytes;
            let source = sender(&seen, inside);
            let at = if crosses { port::OTHER_BACKEND } else { port::FULL_BACKEND };
            let at = backend(0, inside, at);
            let grown = if crosses { [20, -20][family] } else { 0 };
            let established = path(
                "path",
                format!("{name} established, {ip}"),
                &open.clone().flags(ACK),
                Verdict::Forwarded,
            );
            paths.push(Path { grown, ..established });
            let reply = short(Frame { src: at, dst: source, ..open.clone() }).flags(ACK);
            let reply = path("path", format!("{name} reply, {ip}"), &reply, Verdict::Replied);
            paths.push(Path { grown: -grown, ingress: LAN, ..reply });
        }
    }
    paths
}

/// The same packets of more and more flows.
pub(crate) fn flows(flows: u32) -> Vec<Path> {
    let mut paths = Vec::new();
    for family in FAMILIES {
        let ip = ["IPv4", "IPv6"][family];
        let from = client(family, 1_024);
        let tcp = |to| short(syn(from, vip(family, to)));
        let udp = |to| short(datagram(from, vip(family, to)));
        let outer = [20, 40][family];
        let mut add = |group, name: &str, frame: &Frame, grown| {
            let name = format!("{name}, {ip}, {flows} flows");
            let path = path(group, name, frame, Verdict::Forwarded);
            paths.push(Path { flows, grown, ..path });
            paths.len() - 1
        };
        add("flows", "nat tch TCP established", &tcp(port::HTTP).flags(ACK), 0);
        let wrr = add("flows", "nat wrr TCP established", &tcp(port::TURN).flags(ACK), 0);
        let inside = syn(from, backend(0, family, port::HTTP_BACKEND));
        let reply = add("flows", "nat tch TCP reply", &short(answer(&inside)), 0);
        add("more flows", "nat tch UDP", &udp(port::DNS), 0);
        add("more flows", "dsr TCP", &tcp(port::DSR).flags(ACK), 0);
        add("more flows", "ipip TCP", &tcp(port::IPIP).flags(ACK), outer);
        add("more flows", "gue UDP", &udp(port::GUE), outer + 12);
        paths[wrr].opening = vec![tcp(port::TURN).bytes()];
        paths[reply] = Path {
            ingress: LAN,
            side: Side::Destination,
            verdict: Some(Verdict::Replied),
            ..paths[reply].clone()
        };
    }
    paths
}

/// The same packets, of one flow and of a thousand, with more and more backends.
pub(crate) fn backends(slb: &mut Slb<'_>, count: u32) -> Vec<Path> {
    let to = 20_000 + count.ilog10() as u16;
    let first_id = 1_000 + count;
    let at = |number: u32| {
        let [_, b, c, d] = number.to_be_bytes();
        SocketAddr::from(([10, 1 + b, c, d], 8_000 + count.ilog10() as u16))
    };
    let members: Vec<Member> = (0..count)
        .map(|number| Member {
            id: first_id + number,
            identity: hash::identity(at(number).ip().into(), at(number).port()),
            weight: 100,
        })
        .collect();
    let slots = maglev::table(&members, maglev::size_for(count as usize));
    let schedule = Arc::new(Schedule::new(by(Scheduler::HASH), slots));
    slb.change(|state| {
        for number in 0..count {
            let (id, at) = (first_id + number, at(number));
            let record = Backend {
                addr: at.ip().into(),
                port: at.port().into(),
                flags: BackendFlags::IN_USE | BackendFlags::USABLE,
                idle_jiffies: IDLE_JIFFIES,
                hop: FIRST,
                ..Backend::default()
            };
            state.backends.insert(id, record);
            state.addresses.insert(at.ip().into(), Roles::BACKEND);
            let origin = RevNat {
                vip: vip(0, to).ip().into(),
                port: to.into(),
                backend: id,
                ingress: LAN,
                interfaces: set(LAN),
                ..RevNat::default()
            };
            state.endpoints.insert(endpoint(at, abi::TCP), origin);
        }
        let service =
            ListenerState { id: 100 + count.ilog10(), schedule, policy: Policy::default() };
        state.listeners.insert(endpoint(vip(0, to), abi::TCP), service);
    });
    let first = short(syn(client(0, 1_024), vip(0, to))).flags(ACK);
    [1, 1_000]
        .map(|flows| {
            let name = format!("nat tch TCP established, IPv4, {count} backends, {flows} flows");
            Path { flows, ..path("backends", name, &first, Verdict::Forwarded) }
        })
        .into()
}
