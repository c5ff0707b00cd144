//! Honest, hostile and damaged packets of many flows: the [`oracle`](crate::oracle) says of each that gets through
//! whether it may.

use std::collections::BTreeMap;

use crate::{
    fixture::with_capacity,
    fuzz::Random,
    lab::{LAN, LAN_MAC, WAN, WAN_MAC},
    oracle::{Fate, Oracle, Reason},
};

mod site;
mod traffic;

use traffic::{Sent, Traffic};

/// Unless `SLB_FUZZ_CASES` says so.
const FRAMES: u64 = 40_000;
/// Unless `SLB_FUZZ_SEED` says so.
const SEED: u64 = 0x51b_0003;
/// More flows than the frames begin: an entry that gives way to another would look like a mistake.
const FLOWS: u32 = 65_536;
/// Room for the trace of a report.
const TRACE: usize = 12;

fn number(name: &str, otherwise: u64) -> u64 {
    let Ok(text) = std::env::var(name) else { return otherwise };
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.unwrap_or_else(|_| panic!("{name} is a number"))
}

#[test]
#[ignore = "needs root"]
fn given_any_traffic_when_it_gets_through_then_it_is_legitimate() {
    let (frames, seed) = (number("SLB_FUZZ_CASES", FRAMES), number("SLB_FUZZ_SEED", SEED));
    with_capacity(FLOWS, |slb| {
        let site = site::install(slb);
        let mut traffic = Traffic::new(site.clone(), Random(seed));
        let mut oracle = Oracle::new(site);
        let mut seen = BTreeMap::<Reason, u64>::new();
        let mut large = 0;
        let mut trace: Vec<String> = Vec::new();
        for number in 0..frames {
            let Sent { ingress, bytes } = traffic.next();
            let run = slb.run(ingress, &bytes);
            let fate = match run.action {
                1 => Fate::Drop,
                2 => Fate::Pass,
                3 => Fate::Transmit,
                4 => Fate::Redirect,
                action => panic!("XDP action {action}: {bytes:02x?}"),
            };
            if trace.len() == TRACE {
                trace.remove(0);
            }
            let shown = &bytes[..bytes.len().min(120)];
            trace.push(format!("{ingress} {:?} {shown:02x?}", run.verdict));
            match oracle.judge(ingress, &bytes, fate, &run.bytes) {
                Ok(reason) => {
                    *seen.entry(reason).or_default() += 1;
                    let is_sent = matches!(reason, Reason::ToServer | Reason::ToClient);
                    large += u64::from(is_sent && bytes.len() >= traffic::LARGE);
                    traffic.learn(reason, &run.bytes);
                }
                Err(wrong) => {
                    let shown = &run.bytes[..run.bytes.len().min(120)];
                    panic!(
                        "seed {seed:#x}, frame {number}: {wrong}\nthe last frames, and what became of them:\n{}\n\
                         it left as\n{shown:02x?}",
                        trace.join("\n")
                    );
                }
            }
        }
        eprintln!("{seen:?}, tolerated: {:?}", oracle.tolerated.borrow());
        assert_eq!(oracle.unserved(), [], "listeners that got nothing");
        assert!(large > frames / 1_000, "only {large} frames of several buffers were sent");
        // It is of no use if little gets through.
        for (reason, part) in [
            (Reason::ToServer, 5),
            (Reason::ToClient, 20),
            (Reason::Answer, 100),
            (Reason::Error, 200),
            (Reason::Fragment, 1_000),
        ] {
            let count = seen.get(&reason).copied().unwrap_or_default();
            assert!(count > frames / part, "only {count} of {frames} were {reason:?}: {seen:?}");
        }
    });
}

/// MAC address of an interface.
fn mac(ifindex: u32) -> [u8; 6] {
    if ifindex == LAN { LAN_MAC } else { WAN_MAC }
}

/// The other interface.
fn other(ifindex: u32) -> u32 {
    if ifindex == LAN { WAN } else { LAN }
}
