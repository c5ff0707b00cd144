//! A loaded datapath with a small configuration, and what a test may ask of it.

use std::{net::SocketAddr, path::Path, sync::Arc};

use aya::{
    TestRun as _, TestRunOptions, TestRunResult,
    maps::{Array, Map, MapData, PerCpuArray, PerCpuValues},
    programs::Xdp,
    util::nr_cpus,
};
use slb_common::{
    abi::{
        self, ABI_VERSION, Address, BACKEND_IN_USE, BACKEND_SHARED, BACKEND_USABLE, Backend,
        Bucket, Counter, Endpoint, Flow, FlowKey, Interface, NextHop, REVNAT_SHARED,
        REVNAT_TRACKED, ROLE_BACKEND, ROLE_LOCAL, ROLE_VIP, RevNat, Roles, SCHEDULER_HASH,
        SCHEDULER_RING, SLOT_KEEP, SLOT_LOOK, Scratch, Settings, TAG_FREE, TAG_LOCKED,
    },
    hash,
    verdict::{Action, Verdict},
};
use slb_lab::Netns;
use slb_user::{
    clock::Jiffies,
    datapath::{Capacities, FlowTable, Maps, Pins},
    plan::plan,
    state::{Policy, Schedule, ListenerState, State},
};

use crate::{
    frame::{Frame, L3, RST, Transport},
    lab::{self, FIRST, LAN, LAN_MAC, ROUTER, SECOND, WAN, WAN_MAC},
    worker::Worker,
};

/// `XDP_DROP` and the rest, as `linux/bpf.h` numbers them.
pub const XDP_DROP: u32 = 1;
pub const XDP_PASS: u32 = 2;
pub const XDP_TX: u32 = 3;
pub const XDP_REDIRECT: u32 = 4;

/// The virtual addresses.
pub const VIPS: [&str; 2] = ["203.0.113.10", "2001:db8:113::10"];
/// What the sources of tunnels begin with.
pub const TUNNELS: [&str; 2] = ["172.16.0.0", "2001:db8:7:7::"];
/// What backends see as source, if that is replaced: two addresses each.
pub const SOURCES: [[&str; 2]; 2] =
    [["10.0.0.101", "10.0.0.102"], ["2001:db8:a::101", "2001:db8:a::102"]];
/// First backend's and second backend's addresses.
pub const BACKENDS: [[&str; 2]; 3] = [
    ["10.0.0.11", "2001:db8:a::11"],
    ["10.0.0.12", "2001:db8:a::12"],
    ["10.0.0.13", "2001:db8:a::13"],
];

/// Listeners: what they are, by their port. Each is there for both families.
pub mod port {
    /// TCP by hash, to the first backend at [`HTTP_BACKEND`]; the second stands ready.
    pub const HTTP: u16 = 80;
    pub const HTTP_BACKEND: u16 = 8080;
    /// TCP in turn, to both backends at [`RING_BACKEND`].
    pub const RING: u16 = 81;
    pub const RING_BACKEND: u16 = 8081;
    /// TCP by hash, to a backend whose next hop is not known.
    pub const SLOW: u16 = 82;
    pub const SLOW_BACKEND: u16 = 8082;
    /// TCP without a backend.
    pub const EMPTY: u16 = 83;
    /// TCP by hash, to the first backend at [`SHARED_BACKEND`].
    pub const SHARED: u16 = 84;
    /// The same, and to the same port.
    pub const TWIN: u16 = 86;
    pub const SHARED_BACKEND: u16 = 8084;
    /// TCP by hash, with a slot that is nobody's.
    pub const NOBODY: u16 = 85;
    /// TCP in turn, with a number that no listener can have.
    pub const BROKEN: u16 = 88;
    /// TCP in turn, to the first backend at [`TURN_BACKEND`].
    pub const TURN: u16 = 87;
    pub const TURN_BACKEND: u16 = 8087;
    /// UDP in turn, to the first backend at [`SIP_BACKEND`].
    pub const SIP: u16 = 5060;
    pub const SIP_BACKEND: u16 = 5061;
    /// TCP by hash, to the first backend, which answers by itself.
    pub const DSR: u16 = 89;
    /// The same, but the way to it is not known.
    pub const LOST: u16 = 90;
    /// UDP in turn, to the first backend, which answers by itself.
    pub const DSR_UDP: u16 = 91;
    /// TCP by hash, to the first backend at [`FULL_BACKEND`], from an address of the gateway.
    pub const FULL: u16 = 95;
    pub const FULL_BACKEND: u16 = 8095;
    /// The same by UDP.
    pub const FULL_UDP: u16 = 96;
    pub const FULL_UDP_BACKEND: u16 = 8096;
    /// TCP by hash, to the first backend at [`OTHER_BACKEND`], at its address of the other family.
    pub const OTHER: u16 = 97;
    pub const OTHER_BACKEND: u16 = 8097;
    /// The same by UDP.
    pub const OTHER_UDP: u16 = 98;
    pub const OTHER_UDP_BACKEND: u16 = 8098;
    /// TCP by hash, to the first backend in IPIP.
    pub const IPIP: u16 = 92;
    /// UDP by hash, to the first backend in GUE.
    pub const GUE: u16 = 93;
    /// TCP by hash, to the first backend in IPIP over the other family.
    pub const CROSS: u16 = 94;
    /// UDP by hash, to the first backend at [`DNS_BACKEND`]; the second stands ready.
    pub const DNS: u16 = 53;
    pub const DNS_BACKEND: u16 = 5353;
}

/// Indices into `SLB_BACKENDS`, for IPv4; one more is the same for IPv6.
pub mod id {
    use slb_common::abi;

    pub const HTTP: u32 = 10;
    pub const HTTP_SECOND: u32 = 20;
    pub const HTTP_SICK: u32 = 30;
    pub const RING: u32 = 40;
    pub const RING_SECOND: u32 = 50;
    pub const SLOW: u32 = 60;
    pub const SHARED: u32 = 70;
    pub const TWIN: u32 = 100;
    pub const TURN: u32 = 110;
    pub const SIP: u32 = 120;
    pub const DSR: u32 = 130;
    pub const LOST: u32 = 140;
    pub const DSR_UDP: u32 = 150;
    pub const FULL: u32 = 190;
    pub const FULL_UDP: u32 = 200;
    pub const OTHER: u32 = 210;
    pub const OTHER_UDP: u32 = 220;
    pub const IPIP: u32 = 160;
    pub const GUE: u32 = 170;
    pub const CROSS: u32 = 180;
    pub const DNS: u32 = 80;
    pub const DNS_SECOND: u32 = 90;
    pub const NONE: u32 = abi::NO_BACKEND;
}

/// More than any test takes.
pub const IDLE_JIFFIES: u32 = 10_000_000;

/// Both families.
pub const FAMILIES: [usize; 2] = [0, 1];

pub fn at(addr: &str, port: u16) -> SocketAddr {
    SocketAddr::new(addr.parse().expect("an address"), port)
}

pub fn vip(family: usize, port: u16) -> SocketAddr {
    at(VIPS[family], port)
}

pub fn backend(number: usize, family: usize, port: u16) -> SocketAddr {
    at(BACKENDS[number][family], port)
}

/// A client of the network `net`, see [`lab::gateway`].
pub fn client_of(net: u32, family: usize, port: u16) -> SocketAddr {
    let addr = if family == 0 { format!("198.51.{net}.7") } else { format!("2001:db8:{net}::7") };
    at(&addr, port)
}

/// A client behind [`ROUTER`].
pub fn client(family: usize, port: u16) -> SocketAddr {
    client_of(100, family, port)
}

pub fn endpoint(at: SocketAddr, proto: u32) -> Endpoint {
    Endpoint { addr: Address::from(at.ip()), port: at.port().into(), proto }
}

/// A client's SYN as it comes from [`ROUTER`].
pub fn syn(src: SocketAddr, dst: SocketAddr) -> Frame {
    Frame { src_mac: ROUTER.dst_mac, dst_mac: WAN_MAC, ..Frame::tcp(src, dst) }
}

/// A client's datagram as it comes from [`ROUTER`].
pub fn datagram(src: SocketAddr, dst: SocketAddr) -> Frame {
    Frame { src_mac: ROUTER.dst_mac, dst_mac: WAN_MAC, ..Frame::udp(src, dst) }
}

/// What a backend answers to `frame`, which it has got.
pub fn answer(frame: &Frame) -> Frame {
    let (src, dst) = (frame.dst, frame.src);
    let payload = b"an answer".to_vec();
    Frame { src_mac: FIRST.dst_mac, dst_mac: LAN_MAC, ttl: 63, src, dst, payload, ..frame.clone() }
        .flags(crate::frame::ACK)
}

/// The reset that answers a segment with an acknowledgement number, on its way back.
pub fn reset(frame: &Frame) -> Outcome {
    Outcome::Answered(
        Verdict::Reset,
        Frame {
            src_mac: frame.dst_mac,
            dst_mac: frame.src_mac,
            src: frame.dst,
            dst: frame.src,
            ttl: 64,
            transport: Transport::Tcp { flags: RST, options: Vec::new() },
            seq: frame.ack,
            window: 0,
            payload: Vec::new(),
            padding: 0,
            ..frame.clone()
        },
    )
}

/// What becomes of a frame.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Sent through the hop, with its MAC addresses and one hop less to go.
    Sent(Verdict, Frame, NextHop),
    /// Translated, and left to the kernel.
    Translated(Verdict, Frame),
    /// Not a byte of it changed.
    Untouched(Verdict),
    /// Answered with this frame, the way it came.
    Answered(Verdict, Frame),
    /// Sent through an interface, byte for byte.
    Bytes(Verdict, u32, Vec<u8>),
}

/// Source address and port of a frame that was sent.
pub fn sender(bytes: &[u8], family: usize) -> SocketAddr {
    let (addr, l4) = if family == 0 { (12..16, 20) } else { (8..24, 40) };
    let bytes = &bytes[L3..];
    let port = u16::from_be_bytes([bytes[l4], bytes[l4 + 1]]);
    if family == 0 {
        (<[u8; 4]>::try_from(&bytes[addr]).expect("4 bytes"), port).into()
    } else {
        (<[u8; 16]>::try_from(&bytes[addr]).expect("16 bytes"), port).into()
    }
}

pub fn forwarded(frame: Frame, hop: NextHop) -> Outcome {
    Outcome::Sent(Verdict::Forwarded, frame, hop)
}

pub fn replied(frame: Frame, hop: NextHop) -> Outcome {
    Outcome::Sent(Verdict::Replied, frame, hop)
}

/// One run of the program.
#[derive(Clone, Debug)]
pub struct Run {
    pub verdict: Verdict,
    pub action: u32,
    /// The frame afterwards.
    pub bytes: Vec<u8>,
}

/// The loaded datapath.
pub struct Slb<'a> {
    pub maps: Maps,
    pub table: FlowTable,
    /// What a frame comes to first.
    pub program: Xdp,
    /// `SLB_FLOWS`.
    pub flows: Flows,
    pub netns: &'a Netns,
    scratch: PerCpuArray<MapData, Scratch>,
    /// `SLB_VERDICTS` after the last run.
    counters: Vec<(Verdict, Counter)>,
    worker: Worker,
    capacities: Capacities,
}

/// The flow table.
pub struct Flows(Array<MapData, Bucket>);

fn pinned(pins: &Path, name: &str) -> Map {
    let path = pins.join(format!("v{ABI_VERSION}/maps/{name}"));
    MapData::from_pin(path).and_then(Map::from_map_data).expect("a map")
}

impl Flows {
    fn open(pins: &Path) -> Self {
        Self(pinned(pins, "SLB_FLOWS").try_into().expect("an array"))
    }

    /// Where a key's entries are.
    fn bucket(&self, key: &FlowKey) -> (u32, Bucket) {
        let index = hash::bucket(key, self.0.len());
        (index, self.0.get(&index, 0).expect("a bucket"))
    }

    pub fn get(&self, key: &FlowKey) -> Option<Flow> {
        let (_, bucket) = self.bucket(key);
        bucket.flows.into_iter().find(|flow| flow.tag > TAG_LOCKED && flow.is_of(key))
    }

    /// Changes an entry behind the program's back.
    pub fn change(&mut self, key: &FlowKey, change: impl FnOnce(&mut Flow)) {
        let (index, mut bucket) = self.bucket(key);
        let mut flows = bucket.flows.iter_mut();
        change(flows.find(|flow| flow.tag > TAG_LOCKED && flow.is_of(key)).expect("an entry"));
        self.0.set(index, bucket, 0).expect("a bucket");
    }

    /// Makes an entry behind the program's back.
    pub fn insert(&mut self, key: &FlowKey, flow: Flow) {
        let (index, mut bucket) = self.bucket(key);
        let place = bucket.flows.iter_mut().find(|flow| flow.tag == TAG_FREE).expect("room");
        let FlowKey { src, dst, sport, dport, .. } = *key;
        *place = Flow { tag: abi::tag(hash::flow(key)), src, dst, sport, dport, ..flow };
        self.0.set(index, bucket, 0).expect("a bucket");
    }

    pub fn remove(&mut self, key: &FlowKey) {
        self.change(key, |flow| flow.tag = TAG_FREE);
    }

    /// How many entries there are.
    pub fn count(&self) -> usize {
        let buckets = self.0.iter().map(|bucket| bucket.expect("a bucket"));
        buckets.flat_map(|bucket| bucket.flows).filter(|flow| flow.tag > TAG_LOCKED).count()
    }

    pub fn clear(&mut self) {
        for index in 0..self.0.len() {
            let mut bucket = self.0.get(&index, 0).expect("a bucket");
            if bucket.flows.iter().any(|flow| flow.tag != TAG_FREE) {
                bucket.flows.iter_mut().for_each(|flow| flow.tag = TAG_FREE);
                self.0.set(index, bucket, 0).expect("a bucket");
            }
        }
    }
}

/// Runs `test` on a datapath that is as after loading, in a namespace of its own.
pub fn with_slb(test: impl FnOnce(&mut Slb<'_>) + Send) {
    with_capacity(4_096, test);
}

/// The same, with room for so many flows.
pub fn with_capacity(flows: u32, test: impl FnOnce(&mut Slb<'_>) + Send) {
    with_capacities(Capacities { flows, chunks: 96 }, test);
}

/// The same, with room for so much.
pub fn with_capacities(capacities: Capacities, test: impl FnOnce(&mut Slb<'_>) + Send) {
    let netns = lab::gateway();
    netns.run(|| test(&mut Slb::open(&netns, capacities))).expect("the namespace");
}

impl<'a> Slb<'a> {
    fn open(netns: &'a Netns, capacities: Capacities) -> Self {
        let worker = Worker::take(capacities);
        let path = worker.pins();
        let pins = Pins::new(&path);
        let maps = Maps::open(&pins).expect("the maps");
        let mut slb = Self {
            flows: Flows::open(&path),
            scratch: pinned(&path, "SLB_SCRATCH").try_into().expect("an array"),
            counters: maps.verdicts().expect("counters"),
            maps,
            table: FlowTable::open(&pins).expect("the flow table"),
            program: worker.program(),
            netns,
            worker,
            capacities,
        };
        slb.change(|state| *state = small());
        slb.set(|settings| {
            settings.tunnel_v4 = at(TUNNELS[0], 0).ip().into();
            settings.tunnel_v6 = at(TUNNELS[1], 0).ip().into();
        });
        slb
    }

    /// Goes on from the pinned maps, as an agent that is started again.
    pub fn restart(&mut self) {
        self.worker.load(self.capacities);
        self.program = self.worker.program();
        self.maps = Maps::open(&self.pins()).expect("the maps");
    }

    /// Where everything is pinned.
    pub fn pins(&self) -> Pins {
        Pins::new(&self.worker.pins())
    }

    /// A map, by its name.
    pub fn pinned(&self, name: &str) -> Map {
        pinned(&self.worker.pins(), name)
    }

    /// The present in jiffies.
    pub fn now(&self) -> u32 {
        Jiffies::from_kernel().and_then(Jiffies::now).expect("a clock")
    }

    /// Installs another state, as the agent would.
    pub fn change(&mut self, change: impl FnOnce(&mut State)) {
        let mut desired = self.maps.installed().clone();
        change(&mut desired);
        for step in plan(&desired, self.maps.installed()) {
            self.maps.apply(step).expect("a write");
        }
    }

    /// A listener goes by these slots from now on, and by `previous` where that is to be; the
    /// scheduler stays.
    pub fn publish(
        &mut self,
        listener: SocketAddr,
        proto: u32,
        slots: Vec<u32>,
        previous: Vec<u32>,
    ) {
        let looks = slots.iter().any(|slot| slot & SLOT_LOOK != 0);
        self.change(|state| {
            let service = state.listeners.get_mut(&endpoint(listener, proto)).expect("a listener");
            let scheduler = service.schedule.scheduler;
            service.schedule = Arc::new(Schedule { previous, ..Schedule::new(scheduler, slots) });
            for origin in state.endpoints.values_mut() {
                let is_ours = (origin.vip, origin.port) == key_of(listener);
                if is_ours && scheduler == SCHEDULER_HASH {
                    origin.flags &= !REVNAT_TRACKED;
                    origin.flags |= if looks { REVNAT_TRACKED } else { 0 };
                }
            }
        });
    }

    /// New flows to a listener go to these backends from now on, as if it had always been so.
    pub fn schedule(&mut self, listener: SocketAddr, proto: u32, slots: Vec<u32>) {
        self.publish(listener, proto, slots, Vec::new());
    }

    /// New connections to a listener go to these backends from now on, and old ones stay.
    pub fn move_to(&mut self, listener: SocketAddr, slots: &[u32]) {
        let key = endpoint(listener, abi::TCP);
        let before = self.maps.installed().listeners[&key].schedule.slots.clone();
        let slots = slots.iter().map(|slot| slot | SLOT_LOOK | SLOT_KEEP).collect();
        self.publish(listener, abi::TCP, slots, before);
    }

    /// Changes the settings.
    pub fn set(&mut self, change: impl FnOnce(&mut Settings)) {
        self.maps.set(change).expect("a write");
    }

    pub fn backend(&mut self, id: u32, change: impl FnOnce(&mut Backend)) {
        self.change(|state| change(state.backends.get_mut(&id).expect("a backend")));
    }

    /// Runs the program on a frame that came through the interface `ingress`.
    pub fn run(&mut self, ingress: u32, input: &[u8]) -> Run {
        // Room for what a tunnel or an error adds.
        let mut output = vec![0; input.len() + 128];
        let len = u32::try_from(input.len()).expect("a short frame");
        self.forget_errors();
        let result = self.test_run(ingress, input, &mut output);
        output.truncate(result.data_size_out as usize);

        let verdict = self.moved(u64::from(len));
        let is_as_long = match (verdict, verdict.action()) {
            // Made anew, or put into a tunnel, or of no use to anybody.
            (Verdict::Reset | Verdict::Closed | Verdict::Refused | Verdict::TooBig, _)
            | (_, Action::Drop) => true,
            // Or of another family, or an error that was made anew for that.
            (
                Verdict::Forwarded
                | Verdict::Replied
                | Verdict::ForwardedByKernel
                | Verdict::RepliedByKernel,
                _,
            ) => result.data_size_out + 40 >= len || matches!(result.data_size_out, 70 | 110),
            _ => result.data_size_out == len,
        };
        assert!(is_as_long, "{verdict:?} gave {} bytes: {input:02x?}", output.len());
        let action = result.return_value;
        let agrees = match verdict.action() {
            Action::Transmit => matches!(action, XDP_TX | XDP_REDIRECT),
            Action::Pass => action == XDP_PASS,
            Action::Drop => action == XDP_DROP,
        };
        assert!(agrees, "{verdict:?}, but XDP action {action}: {input:02x?}");
        Run { verdict, action, bytes: output }
    }

    /// Runs the program on a frame, and looks at nothing but its XDP action.
    pub fn act(&mut self, ingress: u32, input: &[u8]) -> u32 {
        let mut output = vec![0; input.len() + 128];
        let action = self.test_run(ingress, input, &mut output).return_value;
        self.recount();
        action
    }

    /// What has been counted up to now was not by [`Slb::run`].
    pub fn recount(&mut self) {
        self.counters = self.maps.verdicts().expect("counters");
    }

    /// ICMP errors are few per jiffy: no run is to suffer from those before.
    fn forget_errors(&mut self) {
        self.set_errors(0, 0);
    }

    /// Makes every CPU believe that it has sent `errors` ICMP errors in a jiffy.
    pub fn set_errors(&mut self, errors_at: u32, errors: u32) {
        let cpus = nr_cpus().expect("the number of CPUs");
        let scratch = Scratch { errors_at, errors, ..Scratch::default() };
        let values = PerCpuValues::try_from(vec![scratch; cpus]).expect("as many");
        self.scratch.set(0, values, 0).expect("a write");
    }

    /// The last jiffy of each CPU in which it was to send ICMP errors, and how many.
    pub fn errors(&self) -> Vec<(u32, u32)> {
        let values = self.scratch.get(&0, 0).expect("a read");
        values.iter().map(|scratch| (scratch.errors_at, scratch.errors)).collect()
    }

    fn test_run(&mut self, ingress: u32, input: &[u8], output: &mut [u8]) -> TestRunResult {
        // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress.
        let len = u32::try_from(input.len()).expect("a short frame");
        let context = [0, len, 0, ingress, 0, 0].map(u32::to_ne_bytes).concat();
        let options = TestRunOptions {
            data_in: Some(input),
            data_out: Some(output),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        self.program.test_run(options).expect("a run")
    }

    /// The one verdict that has counted one frame of `len` bytes since the last call.
    fn moved(&mut self, len: u64) -> Verdict {
        let now = self.maps.verdicts().expect("counters");
        let before = std::mem::replace(&mut self.counters, now);
        let moved: Vec<_> = self.counters.iter().zip(&before).filter(|(a, b)| a != b).collect();
        let &[(&(verdict, now), &(_, before))] = moved.as_slice() else {
            panic!("not one counter moved: {moved:?}");
        };
        let counted = (now.packets - before.packets, now.bytes - before.bytes);
        assert_eq!(counted, (1, len), "{verdict:?}");
        verdict
    }

    /// Runs a frame and compares all that can be seen of it.
    pub fn check(&mut self, case: &str, ingress: u32, input: &[u8], expected: &Outcome) {
        let run = self.run(ingress, input);
        let (verdict, action, bytes) = match expected {
            Outcome::Sent(verdict, frame, hop) => {
                let action = if hop.ifindex == ingress { XDP_TX } else { XDP_REDIRECT };
                (*verdict, action, frame.clone().sent(*hop).bytes())
            }
            Outcome::Translated(verdict, frame) => (*verdict, XDP_PASS, frame.bytes()),
            Outcome::Answered(verdict, frame) => (*verdict, XDP_TX, frame.bytes()),
            Outcome::Bytes(verdict, ifindex, bytes) => {
                let action = if *ifindex == ingress { XDP_TX } else { XDP_REDIRECT };
                (*verdict, action, bytes.clone())
            }
            Outcome::Untouched(verdict) => {
                let is_passed = verdict.action() == Action::Pass;
                (*verdict, if is_passed { XDP_PASS } else { XDP_DROP }, input.to_vec())
            }
        };
        assert_eq!((run.verdict, run.action), (verdict, action), "{case}: {input:02x?}");
        assert_eq!(hex(&run.bytes), hex(&bytes), "{case}");
    }

    /// A frame from the clients' side.
    pub fn client_sends(&mut self, case: &str, frame: &Frame, expected: &Outcome) {
        self.check(case, WAN, &frame.bytes(), expected);
    }

    /// A frame from the backends' side.
    pub fn backend_sends(&mut self, case: &str, frame: &Frame, expected: &Outcome) {
        self.check(case, LAN, &frame.bytes(), expected);
    }

    /// The entry of a frame in the flow table.
    pub fn flow(&self, frame: &Frame) -> Option<Flow> {
        self.flows.get(&frame.key())
    }

    /// Changes the entry of a frame behind the program's back.
    pub fn tamper(&mut self, frame: &Frame, change: impl FnOnce(&mut Flow)) {
        self.flows.change(&frame.key(), change);
    }

    /// Makes it so long since a frame's entry was last used.
    pub fn age(&mut self, frame: &Frame, jiffies: u32) {
        self.tamper(frame, |flow| flow.expires = flow.expires.wrapping_sub(jiffies));
    }
}

/// Readable in a failed assertion.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

/// What an [`RevNat`] of this listener says.
fn key_of(listener: SocketAddr) -> (Address, u32) {
    (listener.ip().into(), listener.port().into())
}

/// The state of [`port`] and [`id`].
fn small() -> State {
    let mut state = State::default();
    for index in [WAN, LAN] {
        state.interfaces.insert(index, Interface { redirect: 1 });
    }
    for family in FAMILIES {
        state.addresses.insert(vip(family, 0).ip().into(), Roles { roles: ROLE_VIP });
        for number in 0..BACKENDS.len() {
            let addr = backend(number, family, 0).ip().into();
            state.addresses.insert(addr, Roles { roles: ROLE_BACKEND });
        }
        backends(&mut state, family);
        full_backends(&mut state, family);
        for (number, source) in (1..).zip(SOURCES[family]) {
            let index = 2 * family as u32 + number;
            let source = at(source, 0).ip().into();
            state.sources.insert(index, source);
            state.addresses.insert(source, Roles { roles: ROLE_LOCAL });
        }
        direct_backends(&mut state, family);
        listeners(&mut state, family);
    }
    state
}

fn backends(state: &mut State, family: usize) {
    let (tcp, udp, usable) = (abi::TCP, abi::UDP, BACKEND_IN_USE | BACKEND_USABLE);
    let (shared, tracked) = (usable | BACKEND_SHARED, REVNAT_TRACKED);
    let rows = [
        (id::HTTP, 0, port::HTTP_BACKEND, tcp, usable, FIRST, port::HTTP, 0),
        (id::HTTP_SECOND, 1, port::HTTP_BACKEND, tcp, usable, SECOND, port::HTTP, 0),
        (id::HTTP_SICK, 2, port::HTTP_BACKEND, tcp, BACKEND_IN_USE, FIRST, port::HTTP, 0),
        (id::RING, 0, port::RING_BACKEND, tcp, usable, FIRST, port::RING, tracked),
        (id::RING_SECOND, 1, port::RING_BACKEND, tcp, usable, SECOND, port::RING, tracked),
        (id::TURN, 0, port::TURN_BACKEND, tcp, usable, FIRST, port::TURN, tracked),
        (id::SIP, 0, port::SIP_BACKEND, udp, usable, FIRST, port::SIP, tracked),
        (id::SLOW, 0, port::SLOW_BACKEND, tcp, usable, NextHop::UNRESOLVED, port::SLOW, 0),
        (id::TWIN, 0, port::SHARED_BACKEND, tcp, shared, FIRST, port::TWIN, REVNAT_SHARED),
        (id::SHARED, 0, port::SHARED_BACKEND, tcp, shared, FIRST, port::SHARED, REVNAT_SHARED),
        (id::DNS, 0, port::DNS_BACKEND, udp, usable, FIRST, port::DNS, 0),
        (id::DNS_SECOND, 1, port::DNS_BACKEND, udp, usable, SECOND, port::DNS, 0),
    ];
    for (id, number, port, proto, flags, hop, listener, origin) in rows {
        let (id, at) = (id + family as u32, backend(number, family, port));
        let record = Backend {
            addr: at.ip().into(),
            port: port.into(),
            flags,
            idle_jiffies: IDLE_JIFFIES,
            hop,
            ..Backend::default()
        };
        state.backends.insert(id, record);
        let (vip, port) = key_of(vip(family, listener));
        let origin = RevNat { vip, port, backend: id, flags: origin, spare: 0 };
        state.endpoints.insert(endpoint(at, proto), origin);
    }
}

/// Backends that see a source of ours.
fn full_backends(state: &mut State, family: usize) {
    let rows = [
        (id::FULL, port::FULL, port::FULL_BACKEND, abi::TCP, family),
        (id::FULL_UDP, port::FULL_UDP, port::FULL_UDP_BACKEND, abi::UDP, family),
        (id::OTHER, port::OTHER, port::OTHER_BACKEND, abi::TCP, 1 - family),
        (id::OTHER_UDP, port::OTHER_UDP, port::OTHER_UDP_BACKEND, abi::UDP, 1 - family),
    ];
    for (id, listener, port, proto, inside) in rows {
        let (id, at) = (id + family as u32, backend(0, inside, port));
        let record = Backend {
            addr: at.ip().into(),
            port: port.into(),
            flags: BACKEND_IN_USE | BACKEND_USABLE | BACKEND_SHARED,
            idle_jiffies: IDLE_JIFFIES,
            hop: FIRST,
            mode: abi::MODE_FULL,
            source: 1 + 2 * inside as u16,
            sources: 2,
            ..Backend::default()
        };
        state.backends.insert(id, record);
        let (vip, port) = key_of(vip(family, listener));
        let origin = RevNat { vip, port, backend: id, flags: REVNAT_SHARED, spare: 0 };
        state.endpoints.insert(endpoint(at, proto), origin);
    }
}

/// Backends that answer by themselves.
fn direct_backends(state: &mut State, family: usize) {
    let rows = [
        (id::DSR, port::DSR, FIRST, family, abi::MODE_DSR),
        (id::LOST, port::LOST, NextHop::UNRESOLVED, family, abi::MODE_DSR),
        (id::DSR_UDP, port::DSR_UDP, FIRST, family, abi::MODE_DSR),
        (id::IPIP, port::IPIP, FIRST, family, abi::MODE_IPIP),
        (id::GUE, port::GUE, FIRST, family, abi::MODE_GUE),
        (id::CROSS, port::CROSS, FIRST, 1 - family, abi::MODE_IPIP),
    ];
    for (id, port, hop, inside, mode) in rows {
        let record = Backend {
            addr: backend(0, inside, port).ip().into(),
            port: port.into(),
            flags: BACKEND_IN_USE | BACKEND_USABLE,
            idle_jiffies: IDLE_JIFFIES,
            hop,
            mode,
            ..Backend::default()
        };
        state.backends.insert(id + family as u32, record);
    }
}

fn listeners(state: &mut State, family: usize) {
    let always = SLOT_LOOK | SLOT_KEEP;
    let rows = [
        (port::HTTP, abi::TCP, SCHEDULER_HASH, vec![id::HTTP]),
        (port::RING, abi::TCP, SCHEDULER_RING, vec![id::RING, id::RING_SECOND]),
        (port::SLOW, abi::TCP, SCHEDULER_HASH, vec![id::SLOW]),
        (port::EMPTY, abi::TCP, SCHEDULER_HASH, vec![]),
        (port::SHARED, abi::TCP, SCHEDULER_HASH, vec![id::SHARED | always]),
        (port::TWIN, abi::TCP, SCHEDULER_HASH, vec![id::TWIN | always]),
        (port::NOBODY, abi::TCP, SCHEDULER_HASH, vec![id::NONE]),
        (port::DNS, abi::UDP, SCHEDULER_HASH, vec![id::DNS]),
        (port::TURN, abi::TCP, SCHEDULER_RING, vec![id::TURN]),
        (port::BROKEN, abi::TCP, SCHEDULER_RING, vec![id::TURN]),
        (port::DSR, abi::TCP, SCHEDULER_HASH, vec![id::DSR]),
        (port::LOST, abi::TCP, SCHEDULER_HASH, vec![id::LOST]),
        (port::DSR_UDP, abi::UDP, SCHEDULER_RING, vec![id::DSR_UDP]),
        (port::FULL, abi::TCP, SCHEDULER_HASH, vec![id::FULL | always]),
        (port::FULL_UDP, abi::UDP, SCHEDULER_HASH, vec![id::FULL_UDP | always]),
        (port::OTHER, abi::TCP, SCHEDULER_HASH, vec![id::OTHER | always]),
        (port::OTHER_UDP, abi::UDP, SCHEDULER_HASH, vec![id::OTHER_UDP | always]),
        (port::IPIP, abi::TCP, SCHEDULER_HASH, vec![id::IPIP]),
        (port::GUE, abi::UDP, SCHEDULER_HASH, vec![id::GUE]),
        (port::CROSS, abi::TCP, SCHEDULER_HASH, vec![id::CROSS]),
        (port::SIP, abi::UDP, SCHEDULER_RING, vec![id::SIP]),
    ];
    for (listener, (port, proto, scheduler, slots)) in (0..).zip(rows) {
        let number = |id| if id == id::NONE { id } else { id + family as u32 };
        let slots = slots.into_iter().map(number).collect();
        let schedule = Arc::new(Schedule::new(scheduler, slots));
        let id = if port == port::BROKEN { u32::MAX } else { 2 * listener + family as u32 };
        let service = ListenerState { id, schedule, policy: Policy::default() };
        state.listeners.insert(endpoint(vip(family, port), proto), service);
    }
}
