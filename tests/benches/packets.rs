//! What a packet costs, path by path: `cargo xtask bench` runs this and writes the tables.
//!
//! The datapath is the real one, with the state that a test or the agent would write; frames run through
//! it by `BPF_PROG_TEST_RUN`, behind a program that puts each back to what it was
//! (`slb-ebpf/src/bin/prelude.rs`). What that costs on its own is measured in turn with it and taken off.
//! Rounds of all paths are interleaved, so that other work of the machine disturbs all of them alike.

#![expect(clippy::print_stdout, reason = "a program that prints its results")]

#[path = "../tests/verdicts/fixture.rs"]
#[allow(dead_code, reason = "shared with the verdict tests")]
mod fixture;
#[path = "../tests/verdicts/frame.rs"]
#[allow(dead_code, reason = "shared with the verdict tests")]
mod frame;
#[path = "../tests/verdicts/lab.rs"]
#[allow(dead_code, reason = "shared with the verdict tests")]
mod lab;
#[path = "packets/paths.rs"]
mod paths;
#[path = "packets/timer.rs"]
mod timer;
#[path = "../tests/verdicts/worker.rs"]
#[allow(dead_code, reason = "shared with the verdict tests")]
mod worker;

use std::{collections::BTreeMap, path::PathBuf};

use serde_json::json;
use slb_common::verdict::Verdict;
use slb_user::datapath::Capacities;

use paths::{BACKENDS, Path, Target};
use timer::Timer;

/// Flows that take turns.
const FLOWS: [u32; 4] = [1, 1_000, 100_000, 1_000_000];

/// What was measured of one path: nanoseconds per packet, without the harness.
type Times = BTreeMap<String, Vec<f64>>;

fn main() {
    let mut rounds = 15;
    let mut out = None;
    let mut hold = None;
    let mut only = String::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().expect("a value");
        match argument.as_str() {
            "--rounds" => rounds = value().parse().expect("--rounds takes a number"),
            // Pins the program there, and waits: for another tool to time it.
            "--hold" => hold = Some(PathBuf::from(value())),
            // Of the others only those whose names have this in them.
            "--only" => only = value(),
            "--out" => out = Some(PathBuf::from(value())),
            // `cargo bench` adds it.
            "--bench" => {}
            other => panic!("{other}: no such option"),
        }
    }
    timer::pin();
    let mut times = Times::new();
    // The flow table of a default gateway, and slots for ten thousand backends.
    fixture::with_capacities(Capacities { flows: 1_048_576, chunks: 4_096 }, |slb| {
        let mut timer = Timer::open(slb);
        let mut measured = paths::references();
        measured.extend(paths::all());
        measured.extend(paths::full(slb));
        measured.extend(paths::live());
        measured.extend(FLOWS.into_iter().flat_map(paths::flows));
        measured.extend(BACKENDS.into_iter().flat_map(|backends| paths::backends(slb, backends)));
        measured.retain(|path| path.target != Target::Slb || path.name.contains(&only));
        for path in &measured {
            timer.warm(slb, path);
        }
        if let Some(pin) = &hold {
            slb.program.pin(pin).expect("a pin");
            println!("{} in {}", pin.display(), slb.netns.path().display());
            std::io::stdin().read_line(&mut String::new()).expect("a line");
            std::fs::remove_file(pin).expect("the pin");
            return;
        }
        for round in 0..rounds {
            for path in &measured {
                let nanoseconds = timer.time(slb, path);
                times.entry(path.name.clone()).or_default().push(nanoseconds);
            }
            eprintln!("round {} of {rounds}", round + 1);
        }
        let text = render(&measured, &times);
        match &out {
            Some(out) => std::fs::write(out, text).expect("the results"),
            None => println!("{text}"),
        }
    });
}

fn render(measured: &[Path], times: &Times) -> String {
    let rows: Vec<_> = measured
        .iter()
        .map(|path| {
            let mut sorted = times[&path.name].clone();
            sorted.sort_by(f64::total_cmp);
            json!({
                "name": path.name,
                "group": path.group,
                "flows": path.flows,
                "verdict": path.verdict.map(Verdict::label),
                "median": sorted[sorted.len() / 2],
                "p10": sorted[sorted.len() / 10],
                "rounds": times[&path.name],
            })
        })
        .collect();
    serde_json::to_string_pretty(&rows).expect("plain values")
}
