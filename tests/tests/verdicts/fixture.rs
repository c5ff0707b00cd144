//! A loaded datapath with a small configuration, and what a test may ask of it.

use std::{net::SocketAddr, path::Path, sync::Arc};

use aya::{
    TestRun as _, TestRunOptions,
    maps::{HashMap, Map, MapData},
};
use nix::mount::{MntFlags, umount2};
use slb_common::{
    abi::{
        self, ABI_VERSION, Address, BACKEND_IN_USE, BACKEND_USABLE, Backend, Counter,
        DirectEndpoint, Endpoint, Flow, FlowKey, Hop, Interface, ROLE_BACKEND, ROLE_VIP, Roles,
        SCHEDULER_HASH, SCHEDULER_RING,
    },
    verdict::{Action, Verdict},
};
use slb_tests::Netns;
use slb_user::{
    datapath::{Capacities, Loaded, Pins},
    plan::plan,
    state::{Schedule, Service, State},
};
use tempfile::TempDir;

use crate::{
    frame::Frame,
    lab::{self, FIRST, LAN, LAN_MAC, ROUTER, SECOND, WAN, WAN_MAC},
};

/// `XDP_DROP` and the rest, as `linux/bpf.h` numbers them.
pub const XDP_DROP: u32 = 1;
pub const XDP_PASS: u32 = 2;
pub const XDP_TX: u32 = 3;
pub const XDP_REDIRECT: u32 = 4;

/// The virtual addresses.
pub const VIPS: [&str; 2] = ["203.0.113.10", "2001:db8:113::10"];
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
    /// TCP to the same address and port as [`HTTP`].
    pub const TWIN: u16 = 84;
    /// TCP, with a schedule that names no backend.
    pub const BROKEN: u16 = 85;
    /// UDP by hash, to the first backend at [`DNS_BACKEND`]; the second stands ready.
    pub const DNS: u16 = 53;
    pub const DNS_BACKEND: u16 = 5353;
}

/// Indices into `SLB_BACKENDS`, for IPv4; one more is the same for IPv6.
pub mod id {
    pub const HTTP: u32 = 10;
    pub const HTTP_SECOND: u32 = 20;
    pub const HTTP_SICK: u32 = 30;
    pub const RING: u32 = 40;
    pub const RING_SECOND: u32 = 50;
    pub const SLOW: u32 = 60;
    pub const TWIN: u32 = 70;
    pub const DNS: u32 = 80;
    pub const DNS_SECOND: u32 = 90;
    pub const NONE: u32 = u32::MAX;
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

/// What becomes of a frame.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Sent through the hop, with its MAC addresses and one hop less to go.
    Sent(Verdict, Frame, Hop),
    /// Translated, and left to the kernel.
    Translated(Verdict, Frame),
    /// Not a byte of it changed.
    Untouched(Verdict),
}

pub fn forwarded(frame: Frame, hop: Hop) -> Outcome {
    Outcome::Sent(Verdict::Forwarded, frame, hop)
}

pub fn replied(frame: Frame, hop: Hop) -> Outcome {
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
    pub loaded: Loaded,
    /// `SLB_FLOWS`.
    pub flows: HashMap<MapData, FlowKey, Flow>,
    pub netns: &'a Netns,
    /// `SLB_VERDICTS` after the last run.
    counters: Vec<(Verdict, Counter)>,
    _pins: PinDirectory,
}

/// Runs `test` on a fresh datapath, in a namespace of its own.
pub fn with_slb(test: impl FnOnce(&mut Slb<'_>) + Send) {
    with_capacity(4_096, test);
}

/// The same, with so many entries in the flow table.
pub fn with_capacity(flow_entries: u32, test: impl FnOnce(&mut Slb<'_>) + Send) {
    let netns = lab::gateway();
    netns.run(|| test(&mut Slb::open(&netns, flow_entries))).expect("the namespace");
}

impl<'a> Slb<'a> {
    fn open(netns: &'a Netns, flow_entries: u32) -> Self {
        let pins = PinDirectory::create();
        let capacities = Capacities { flow_entries, chunks: 64 };
        let loaded = Loaded::open(Pins::new(pins.path()), capacities).expect("the datapath");
        let path = pins.path().join(format!("v{ABI_VERSION}/maps/SLB_FLOWS"));
        let flows = MapData::from_pin(path).and_then(Map::from_map_data).expect("the flow table");
        let mut slb = Self {
            flows: flows.try_into().expect("a hash map"),
            counters: loaded.maps.verdicts().expect("counters"),
            loaded,
            netns,
            _pins: pins,
        };
        slb.change(|state| *state = small());
        slb
    }

    /// Installs another state, as the agent would.
    pub fn change(&mut self, change: impl FnOnce(&mut State)) {
        let mut desired = self.loaded.maps.installed().clone();
        change(&mut desired);
        for step in plan(&desired, self.loaded.maps.installed()) {
            self.loaded.maps.apply(step).expect("a write");
        }
    }

    /// New flows to a listener go to these backends from now on; the scheduler stays.
    pub fn schedule(&mut self, listener: SocketAddr, proto: u32, slots: Vec<u32>) {
        self.change(|state| {
            let service = state.listeners.get_mut(&endpoint(listener, proto)).expect("a listener");
            let scheduler = service.schedule.scheduler;
            service.schedule = Arc::new(Schedule { scheduler, slots });
        });
    }

    pub fn backend(&mut self, id: u32, change: impl FnOnce(&mut Backend)) {
        self.change(|state| change(state.backends.get_mut(&id).expect("a backend")));
    }

    /// Runs the program on a frame that came through the interface `ingress`.
    pub fn run(&mut self, ingress: u32, input: &[u8]) -> Run {
        let mut output = vec![0; input.len()];
        // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress.
        let len = u32::try_from(input.len()).expect("a short frame");
        let context = [0, len, 0, ingress, 0, 0].map(u32::to_ne_bytes).concat();
        let options = TestRunOptions {
            data_in: Some(input),
            data_out: Some(&mut output),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        let program = self.loaded.program().expect("the program");
        let result = program.test_run(options).expect("a run");
        assert_eq!(result.data_size_out, len, "the frame's length: {input:02x?}");

        let verdict = self.moved(u64::from(len));
        let action = result.return_value;
        let agrees = match verdict.action() {
            Action::Transmit => matches!(action, XDP_TX | XDP_REDIRECT),
            Action::Pass => action == XDP_PASS,
            Action::Drop => action == XDP_DROP,
        };
        assert!(agrees, "{verdict:?}, but XDP action {action}: {input:02x?}");
        Run { verdict, action, bytes: output }
    }

    /// The one verdict that has counted one frame of `len` bytes since the last call.
    fn moved(&mut self, len: u64) -> Verdict {
        let now = self.loaded.maps.verdicts().expect("counters");
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
        self.flows.get(&frame.key(), 0).ok()
    }

    /// Changes the entry of a frame behind the program's back.
    pub fn tamper(&mut self, frame: &Frame, change: impl FnOnce(&mut Flow)) {
        let mut flow = self.flow(frame).expect("an entry");
        change(&mut flow);
        self.flows.insert(frame.key(), flow, 0).expect("an entry");
    }

    /// Makes it so long since a frame's entry was last used.
    pub fn age(&mut self, frame: &Frame, jiffies: u32) {
        self.tamper(frame, |flow| flow.last_seen = flow.last_seen.wrapping_sub(jiffies));
    }

    /// Makes the program forget every flow.
    pub fn forget_flows(&mut self) {
        let keys: Vec<_> = self.flows.keys().map(|key| key.expect("a key")).collect();
        for key in keys {
            self.flows.remove(&key).expect("an entry");
        }
    }
}

/// Readable in a failed assertion.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
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
        listeners(&mut state, family);
    }
    state
}

fn backends(state: &mut State, family: usize) {
    let (tcp, udp, usable) = (abi::TCP, abi::UDP, BACKEND_IN_USE | BACKEND_USABLE);
    let rows = [
        (id::TWIN, 0, port::HTTP_BACKEND, tcp, usable, FIRST),
        (id::HTTP, 0, port::HTTP_BACKEND, tcp, usable, FIRST),
        (id::HTTP_SECOND, 1, port::HTTP_BACKEND, tcp, usable, SECOND),
        (id::HTTP_SICK, 2, port::HTTP_BACKEND, tcp, BACKEND_IN_USE, FIRST),
        (id::RING, 0, port::RING_BACKEND, tcp, usable, FIRST),
        (id::RING_SECOND, 1, port::RING_BACKEND, tcp, usable, SECOND),
        (id::SLOW, 0, port::SLOW_BACKEND, tcp, usable, Hop::KERNEL),
        (id::DNS, 0, port::DNS_BACKEND, udp, usable, FIRST),
        (id::DNS_SECOND, 1, port::DNS_BACKEND, udp, usable, SECOND),
    ];
    for (id, number, port, proto, flags, hop) in rows {
        let (id, at) = (id + family as u32, backend(number, family, port));
        let record = Backend {
            addr: at.ip().into(),
            port: port.into(),
            flags,
            idle_jiffies: IDLE_JIFFIES,
            listener: 0,
            hop,
        };
        state.backends.insert(id, record);
        state.endpoints.insert(endpoint(at, proto), DirectEndpoint { backend: id });
    }
}

fn listeners(state: &mut State, family: usize) {
    let rows = [
        (port::HTTP, abi::TCP, SCHEDULER_HASH, vec![id::HTTP]),
        (port::RING, abi::TCP, SCHEDULER_RING, vec![id::RING, id::RING_SECOND]),
        (port::SLOW, abi::TCP, SCHEDULER_HASH, vec![id::SLOW]),
        (port::EMPTY, abi::TCP, SCHEDULER_HASH, vec![]),
        (port::TWIN, abi::TCP, SCHEDULER_HASH, vec![id::TWIN]),
        (port::BROKEN, abi::TCP, SCHEDULER_HASH, vec![id::NONE - 1]),
        (port::DNS, abi::UDP, SCHEDULER_HASH, vec![id::DNS]),
    ];
    for (listener, (port, proto, scheduler, slots)) in (0..).zip(rows) {
        let slots = slots.into_iter().map(|id| id + family as u32).collect();
        let schedule = Arc::new(Schedule { scheduler, slots });
        let service = Service { id: 2 * listener + family as u32, schedule };
        state.listeners.insert(endpoint(vip(family, port), proto), service);
    }
}

/// A directory for pins; dropping it unmounts what the loader has mounted there.
struct PinDirectory(TempDir);

impl PinDirectory {
    fn create() -> Self {
        let directory = tempfile::Builder::new().prefix("slb-verdicts-").tempdir_in("/run");
        Self(directory.expect("root"))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for PinDirectory {
    fn drop(&mut self) {
        if let Err(error) = umount2(self.path(), MntFlags::MNT_DETACH) {
            eprintln!("unmounting {}: {error}", self.path().display());
        }
    }
}
