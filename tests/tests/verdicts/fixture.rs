//! A loaded datapath with a small configuration, and what a test may ask of it.

use std::{net::SocketAddr, path::Path, sync::Arc};

use aya::{
    TestRun as _, TestRunOptions, TestRunResult,
    maps::{Map, MapData, PerCpuArray, PerCpuValues},
    programs::Xdp,
    util::nr_cpus,
};
use slb_common::{
    abi::{
        self, ABI_VERSION, Backend, Counter, Flow, NextHop, RevNatFlags, SLOT_KEEP, SLOT_LOOK,
        Scheduler, Scratch, Settings,
    },
    verdict::{Action, Verdict},
};
use slb_lab::Netns;
use slb_user::{
    clock::Jiffies,
    datapath::{Capacities, Explainer, FlowTable, Maps, Pins},
    plan::plan,
    state::{Schedule, State},
};

use crate::{
    frame::{Frame, L3, RST, Transport, seal_v4},
    lab::{self, FIRST, LAN, LAN_MAC, ROUTER, WAN, WAN_MAC},
    worker::Worker,
};

use self::state::small;
pub(crate) use self::{flow_table::Flows, names::*};

#[path = "fixture/flow_table.rs"]
mod flow_table;
#[path = "fixture/names.rs"]
mod names;
#[path = "fixture/state.rs"]
mod state;

/// `XDP_DROP` and the rest, as `linux/bpf.h` numbers them.
pub(crate) const XDP_DROP: u32 = 1;
pub(crate) const XDP_PASS: u32 = 2;
pub(crate) const XDP_TX: u32 = 3;
pub(crate) const XDP_REDIRECT: u32 = 4;
/// A frame that is no longer is in one buffer of the kernel's.
const BUFFER: u64 = 3_000;

/// A client's SYN as it comes from [`ROUTER`].
pub(crate) fn syn(src: SocketAddr, dst: SocketAddr) -> Frame {
    Frame { src_mac: ROUTER.dst_mac, dst_mac: WAN_MAC, ..Frame::tcp(src, dst) }
}

/// A client's datagram as it comes from [`ROUTER`].
pub(crate) fn datagram(src: SocketAddr, dst: SocketAddr) -> Frame {
    Frame { src_mac: ROUTER.dst_mac, dst_mac: WAN_MAC, ..Frame::udp(src, dst) }
}

/// What a backend answers to `frame`, which it has got.
pub(crate) fn answer(frame: &Frame) -> Frame {
    let (src, dst) = (frame.dst, frame.src);
    let payload = b"an answer".to_vec();
    Frame { src_mac: FIRST.dst_mac, dst_mac: LAN_MAC, ttl: 63, src, dst, payload, ..frame.clone() }
        .flags(crate::frame::ACK)
}

/// The reset that answers a segment with an acknowledgement number, on its way back.
pub(crate) fn reset(frame: &Frame) -> Outcome {
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
pub(crate) enum Outcome {
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
pub(crate) fn sender(bytes: &[u8], family: usize) -> SocketAddr {
    let (addr, l4) = if family == 0 { (12..16, 20) } else { (8..24, 40) };
    let bytes = &bytes[L3..];
    let port = u16::from_be_bytes([bytes[l4], bytes[l4 + 1]]);
    if family == 0 {
        (<[u8; 4]>::try_from(&bytes[addr]).expect("4 bytes"), port).into()
    } else {
        (<[u8; 16]>::try_from(&bytes[addr]).expect("16 bytes"), port).into()
    }
}

pub(crate) fn forwarded(frame: Frame, hop: NextHop) -> Outcome {
    Outcome::Sent(Verdict::Forwarded, frame, hop)
}

pub(crate) fn replied(frame: Frame, hop: NextHop) -> Outcome {
    Outcome::Sent(Verdict::Replied, frame, hop)
}

/// One run of the program.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub verdict: Verdict,
    pub action: u32,
    /// The frame afterwards.
    pub bytes: Vec<u8>,
}

/// The loaded datapath.
pub(crate) struct Slb<'a> {
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

fn pinned(pins: &Path, name: &str) -> Map {
    let path = pins.join(format!("v{ABI_VERSION}/maps/{name}"));
    MapData::from_pin(path).and_then(Map::from_map_data).expect("a map")
}

/// Runs `test` on a datapath that is as after loading, in a namespace of its own.
pub(crate) fn with_slb(test: impl FnOnce(&mut Slb<'_>) + Send) {
    with_capacity(4_096, test);
}

/// The same, with room for so many flows.
pub(crate) fn with_capacity(flows: u32, test: impl FnOnce(&mut Slb<'_>) + Send) {
    with_capacities(Capacities { flows, chunks: 96 }, test);
}

/// The same, with room for so much.
pub(crate) fn with_capacities(capacities: Capacities, test: impl FnOnce(&mut Slb<'_>) + Send) {
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
    pub(crate) fn restart(&mut self) {
        self.worker.load(self.capacities);
        self.program = self.worker.program();
        self.maps = Maps::open(&self.pins()).expect("the maps");
    }

    /// Where everything is pinned.
    pub(crate) fn pins(&self) -> Pins {
        Pins::new(&self.worker.pins())
    }

    /// What explains flows by the maps.
    pub(crate) fn explainer(&self) -> Explainer {
        let table = FlowTable::open(&self.pins()).expect("the flow table");
        Explainer::open(&self.pins(), table).expect("the maps")
    }

    /// A map, by its name.
    pub(crate) fn pinned(&self, name: &str) -> Map {
        pinned(&self.worker.pins(), name)
    }

    /// The present in jiffies.
    pub(crate) fn now(&self) -> u32 {
        Jiffies::from_kernel().and_then(Jiffies::now).expect("a clock")
    }

    /// Installs another state, as the agent would.
    pub(crate) fn change(&mut self, change: impl FnOnce(&mut State)) {
        let mut desired = self.maps.installed().clone();
        change(&mut desired);
        for step in plan(&desired, self.maps.installed()) {
            self.maps.apply(step).expect("a write");
        }
    }

    /// A listener goes by these slots from now on, and by `previous` where that is to be; the
    /// scheduler stays.
    pub(crate) fn publish(
        &mut self,
        listener: SocketAddr,
        proto: u32,
        slots: Vec<u32>,
        previous: Vec<u32>,
    ) {
        let looks = slots.iter().any(|slot| slot & SLOT_LOOK != 0);
        self.change(|state| {
            let service = state.listeners.get_mut(&endpoint(listener, proto)).expect("a listener");
            let by = service.schedule.by;
            service.schedule = Arc::new(Schedule { previous, ..Schedule::new(by, slots) });
            for origin in state.endpoints.values_mut() {
                let is_ours = (origin.vip, origin.port) == key_of(listener);
                if is_ours && by.scheduler == Scheduler::HASH {
                    origin.flags.set(RevNatFlags::TRACKED, looks);
                }
            }
        });
    }

    /// New flows to a listener go to these backends from now on, as if it had always been so.
    pub(crate) fn schedule(&mut self, listener: SocketAddr, proto: u32, slots: Vec<u32>) {
        self.publish(listener, proto, slots, Vec::new());
    }

    /// New connections to a listener go to these backends from now on, and old ones stay.
    pub(crate) fn move_to(&mut self, listener: SocketAddr, slots: &[u32]) {
        let key = endpoint(listener, abi::TCP);
        let before = self.maps.installed().listeners[&key].schedule.slots.clone();
        let slots = slots.iter().map(|slot| slot | SLOT_LOOK | SLOT_KEEP).collect();
        self.publish(listener, abi::TCP, slots, before);
    }

    /// Changes the settings.
    pub(crate) fn set(&mut self, change: impl FnOnce(&mut Settings)) {
        self.maps.set(change).expect("a write");
    }

    pub(crate) fn backend(&mut self, id: u32, change: impl FnOnce(&mut Backend)) {
        self.change(|state| change(state.backends.get_mut(&id).expect("a backend")));
    }

    /// Runs the program on a frame that came through the interface `ingress`.
    pub(crate) fn run(&mut self, ingress: u32, input: &[u8]) -> Run {
        // Room for what a tunnel or an error adds.
        let mut output = vec![0; input.len() + 128];
        let len = u32::try_from(input.len()).expect("a short frame");
        self.forget_errors();
        let result = self.test_run(ingress, input, &mut output);
        output.truncate(result.data_size_out as usize);

        forget_identification(input, &mut output);
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
    pub(crate) fn act(&mut self, ingress: u32, input: &[u8]) -> u32 {
        let mut output = vec![0; input.len() + 128];
        let action = self.test_run(ingress, input, &mut output).return_value;
        self.recount();
        action
    }

    /// What has been counted up to now was not by [`Slb::run`].
    pub(crate) fn recount(&mut self) {
        self.counters = self.maps.verdicts().expect("counters");
    }

    /// ICMP errors are few per jiffy: no run is to suffer from those before.
    fn forget_errors(&mut self) {
        self.set_errors(0, 0);
    }

    /// Makes every CPU believe that it has sent `errors` ICMP errors in a jiffy.
    pub(crate) fn set_errors(&mut self, errors_at: u32, errors: u32) {
        let cpus = nr_cpus().expect("the number of CPUs");
        let scratch = Scratch { errors_at, errors, ..Scratch::default() };
        let values = PerCpuValues::try_from(vec![scratch; cpus]).expect("as many");
        self.scratch.set(0, values, 0).expect("a write");
    }

    /// The last jiffy of each CPU in which it was to send ICMP errors, and how many.
    pub(crate) fn errors(&self) -> Vec<(u32, u32)> {
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
        // Of a frame in several buffers that is none of ours, the program looks at the first buffer only.
        let is_in_part = len > BUFFER && verdict == Verdict::NotOurs && counted.1 < len;
        assert!(counted == (1, len) || is_in_part, "{verdict:?}: {counted:?} of {len} bytes");
        verdict
    }

    /// Runs a frame and compares all that can be seen of it.
    pub(crate) fn check(&mut self, case: &str, ingress: u32, input: &[u8], expected: &Outcome) {
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
    pub(crate) fn client_sends(&mut self, case: &str, frame: &Frame, expected: &Outcome) {
        let frame = Frame { dst_mac: WAN_MAC, ..frame.clone() };
        self.check(case, WAN, &frame.bytes(), expected);
    }

    /// A frame from the backends' side.
    pub(crate) fn backend_sends(&mut self, case: &str, frame: &Frame, expected: &Outcome) {
        let frame = Frame { dst_mac: LAN_MAC, ..frame.clone() };
        self.check(case, LAN, &frame.bytes(), expected);
    }

    /// The entry of a frame in the flow table.
    pub(crate) fn flow(&self, frame: &Frame) -> Option<Flow> {
        self.flows.get(&frame.key())
    }

    /// Changes the entry of a frame behind the program's back.
    pub(crate) fn tamper(&mut self, frame: &Frame, change: impl FnOnce(&mut Flow)) {
        self.flows.change(&frame.key(), change);
    }

    /// Makes it so long since a frame's entry was last used.
    pub(crate) fn age(&mut self, frame: &Frame, jiffies: u32) {
        self.tamper(frame, |flow| flow.expires = flow.expires.wrapping_sub(jiffies));
    }
}

/// Makes the identification 0 that a packet has got which was one of IPv6 before: it is random.
fn forget_identification(input: &[u8], output: &mut Vec<u8>) {
    /// A tag of 802.1Q.
    const TAG: [u8; 2] = [0x81, 0];
    let tags = output.len() > 18 && output[12..14] == TAG;
    let at = if tags { 16 } else { 12 };
    let crosses = input.len() > at + 2
        && output.len() > at + 22
        && input[at..at + 2] == [0x86, 0xdd]
        && output[at..at + 2] == [0x08, 0x00];
    if crosses && output[at + 8] & 0x40 == 0 {
        let tag: Vec<u8> = if tags { output.drain(12..16).collect() } else { Vec::new() };
        output[L3 + 4..L3 + 6].fill(0);
        seal_v4(output);
        output.splice(12..12, tag);
    }
}

/// Readable in a failed assertion.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}
