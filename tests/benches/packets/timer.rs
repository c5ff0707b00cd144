//! Runs a frame through the datapath many times, and says what one time takes.

use std::time::Instant;

use aya::{
    Ebpf, TestRun as _, TestRunAttrs, TestRunOptions,
    maps::{Array, MapData, ProgramArray},
    programs::{ProgramFd, Xdp, XdpMode, xdp::XdpLinkId},
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use slb_common::{
    bench::{HEADER_BYTES, REDIRECT, Template},
    checksum::fold,
};
use slb_user::{datapath::PRELUDE, schedule::maglev};

use super::paths::{LIVE, Path, Side, Target};
use crate::{fixture::Slb, lab::LAN};

/// Source ports per address: what clients use of them.
const PORTS: u32 = 16_384;
/// Packets per round: enough that the clock does not matter, too few for a time slice.
const REPEAT: u32 = 20_000;
/// The same of live frames, and how many of them a driver would be given at once.
const LIVE_REPEAT: u32 = 1_000_000;
const BATCH: u32 = 64;

/// Where live frames end.
const SINK: &str = "sink";

/// Everything on one CPU, so that there is one cache and one set of per-CPU maps.
pub(crate) fn pin() {
    let mut cpus = CpuSet::new();
    let last = std::thread::available_parallelism().map_or(1, usize::from) - 1;
    cpus.set(last).and_then(|()| sched_setaffinity(Pid::from_raw(0), &cpus)).expect("a CPU");
}

/// The program before the programs.
pub(crate) struct Timer {
    prelude: Ebpf,
    template: Array<MapData, Template>,
    target: ProgramArray<MapData>,
    /// The other ends of the interfaces drop what arrives, if it does.
    _sinks: Vec<XdpLinkId>,
    /// Nanoseconds of one `bpf_xdp_adjust_head`.
    adjust: f64,
}

impl Timer {
    pub(crate) fn open(slb: &Slb<'_>) -> Self {
        let mut prelude = Ebpf::load(PRELUDE).expect("the prelude");
        for name in ["prelude", "stub", "lru", "chain", "fib", REDIRECT, SINK] {
            program(&mut prelude, name).load().expect("a program");
        }
        let sinks = slb.netns.run(|| {
            let sink = program(&mut prelude, SINK);
            let ends = ["wan0-peer", "lan0-peer"];
            ends.map(|end| sink.attach(end, XdpMode::Driver).expect("native XDP")).into()
        });
        let _sinks = sinks.expect("the namespace");
        let template = prelude.take_map("TEMPLATE").expect("a map").try_into().expect("an array");
        let target = prelude.take_map("TARGET").expect("a map").try_into().expect("programs");
        Self { prelude, template, target, _sinks, adjust: 0.0 }
    }

    /// Opens the connections of a path, and sees to it that its packets end as they should.
    pub(crate) fn warm(&mut self, slb: &mut Slb<'_>, path: &Path) {
        for opening in &path.opening {
            self.aim(slb, Target::Slb);
            self.put(opening, path, 0);
            self.run(path.ingress, opening, path.flows);
        }
        slb.recount();
        if let (Target::Slb, Some(verdict)) = (path.target, path.verdict) {
            let found = slb.run(path.ingress, &path.frame).verdict;
            assert_eq!(found, verdict, "{}", path.name);
        }
    }

    /// Nanoseconds per packet, without what the harness takes; of live frames with that.
    pub(crate) fn time(&mut self, slb: &mut Slb<'_>, path: &Path) -> f64 {
        if path.group == LIVE {
            return self.time_live(slb, path);
        }
        let repeat = REPEAT.max(path.flows.min(200_000));
        let mut run = |timer: &mut Self, target, grown| {
            timer.aim(slb, target);
            timer.put(&path.frame, path, grown);
            timer.run(path.ingress, &path.frame, repeat)
        };
        let stub = run(self, Target::Stub, path.grown);
        let gross = run(self, path.target, path.grown);
        if path.grown == 0 {
            return gross - stub;
        }
        // The stub has grown the frame as well: that is the program's own business.
        let still = run(self, Target::Stub, 0);
        self.adjust = (stub - still) / 2.0;
        gross - stub + self.adjust
    }

    /// From memory that becomes a frame to the end of another interface.
    fn time_live(&mut self, slb: &mut Slb<'_>, path: &Path) -> f64 {
        self.aim(slb, path.target);
        // The kernel moves the head back itself, but not what was written.
        self.put(&path.frame, path, 0);
        let len = u32::try_from(path.frame.len()).expect("a short frame");
        let context = [0, len, 0, path.ingress, 0, 0].map(u32::to_ne_bytes).concat();
        let options = TestRunOptions {
            data_in: Some(&path.frame),
            ctx_in: Some(&context),
            repeat: LIVE_REPEAT,
            attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
            ..TestRunOptions::default()
        };
        let prelude = program(&mut self.prelude, "prelude");
        // The kernel's own clock stands still while others run: among them, who receives the frames.
        let began = Instant::now();
        prelude.test_run(options).expect("a run");
        began.elapsed().as_nanos() as f64 / f64::from(LIVE_REPEAT)
    }

    fn aim(&mut self, slb: &mut Slb<'_>, target: Target) {
        let fd = match target {
            Target::Slb => fd(&slb.program),
            Target::Stub => fd(program(&mut self.prelude, "stub")),
            Target::Lru => fd(program(&mut self.prelude, "lru")),
            Target::Chain { .. } => fd(program(&mut self.prelude, "chain")),
            Target::Fib => fd(program(&mut self.prelude, "fib")),
            Target::Redirect => fd(program(&mut self.prelude, REDIRECT)),
            Target::Sink => fd(program(&mut self.prelude, SINK)),
        };
        self.target.set(0, &fd, 0).expect("a program");
    }

    fn put(&mut self, frame: &[u8], path: &Path, grown: i32) {
        let (flows, side) = (path.flows, path.side);
        let (slots, backends) = match path.target {
            Target::Chain { backends } => (maglev::size_for(backends as usize), backends),
            _ => (0, 0),
        };
        let before = self.template.get(&0, 0).ok();
        let mut words = [0; HEADER_BYTES / 8];
        for (word, bytes) in words.iter_mut().zip(frame.chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().expect("8 bytes"));
        }
        let is_v4 = frame[12..14] == [0x08, 0x00];
        let (addr_at, port_at) = match (is_v4, side) {
            (true, Side::Source) => (26, 34),
            (true, Side::Destination) => (30, 36),
            (false, Side::Source) => (34, 54),
            (false, Side::Destination) => (50, 56),
        };
        let sum = frame[14..34]
            .chunks_exact(2)
            .enumerate()
            .filter(|(at, _)| {
                !is_v4 || ![5, (addr_at - 14) / 2, (addr_at - 14) / 2 + 1].contains(at)
            })
            .map(|(_, word)| u64::from(u16::from_ne_bytes([word[0], word[1]])))
            .sum();
        let addr = frame[addr_at..addr_at + 4].try_into().expect("4 bytes");
        let template = Template {
            words,
            len: frame.len() as u32,
            grown,
            has_run: 0,
            is_v4: is_v4.into(),
            flows,
            // Flows go on where the last round has left them, if these are the same.
            next: before.filter(|before| before.flows == flows).map_or(0, |before| before.next),
            ports: PORTS,
            first_port: 1_024,
            first_addr: u32::from_be_bytes(addr),
            addr_at: addr_at as u32,
            port_at: port_at as u32,
            ifindex: LAN,
            slots: slots as u32,
            backends,
            spare: 0,
            sum: fold(sum).into(),
        };
        self.template.set(0, template, 0).expect("a template");
    }

    fn run(&mut self, ingress: u32, frame: &[u8], repeat: u32) -> f64 {
        let len = u32::try_from(frame.len()).expect("a short frame");
        let context = [0, len, 0, ingress, 0, 0].map(u32::to_ne_bytes).concat();
        let mut output = vec![0; frame.len() + 128];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut output),
            ctx_in: Some(&context),
            repeat,
            ..TestRunOptions::default()
        };
        let result = program(&mut self.prelude, "prelude").test_run(options).expect("a run");
        assert_ne!(result.return_value, 0, "the frame could not be put back: {frame:02x?}");
        result.duration.as_nanos() as f64
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut Xdp {
    ebpf.program_mut(name).expect("a program").try_into().expect("XDP")
}

fn fd(program: &Xdp) -> ProgramFd {
    program.fd().expect("loaded").try_clone().expect("a descriptor")
}
