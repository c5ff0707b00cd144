use std::{path::Path, time::Duration};

use slb_common::abi::{Scheduler, Seed, Traffic};

use super::*;
use crate::{
    config,
    ids::Ids,
    observe::{Installed, ScheduleShares},
    state::{Chooser, Schedule, State},
};

/// TCP on 80, UDP on 53, direct return on 81, and least connections on 82: two backends each.
const FILE: &str = r#"
[gateway]
interfaces = ["wan0"]

[[instance]]
name = "shop"
vips = ["203.0.113.10"]
backend = [{ name = "web-1", address = "10.0.0.1", weight = 30 }, { name = "web-2", address = "10.0.0.2", weight = 10 }]
listener = [
  { protocol = "tcp", port = 80, backend_port = 80, health_check = { enabled = false } },
  { protocol = "udp", port = 53, backend_port = 53, health_check = { enabled = false } },
  { protocol = "tcp", port = 81, group = "direct", health_check = { enabled = false } },
  { protocol = "tcp", port = 82, backend_port = 82, scheduler = "wlc", health_check = { enabled = false } },
]

[[instance.group]]
name = "direct"
forwarding = "dsr"
backend = [{ name = "web-1", address = "10.0.0.1", port = 81 }, { name = "web-2", address = "10.0.0.2", port = 81 }]
"#;

const HASH: Chooser = Chooser { scheduler: Scheduler::HASH, seed: Seed::PUBLIC };

fn snapshot() -> Snapshot {
    let (config, _) = config::parse(Path::new("slb.toml"), FILE).unwrap();
    let ids = Ids::assign(&config, &State::default()).unwrap();
    let mut listeners = Vec::new();
    let mut shares = rustc_hash::FxHashMap::default();
    for listener in &ids.listeners {
        let ids = ids.backends[listener.backends.clone()].iter().map(|backend| backend.id);
        listeners.extend(ids.clone().map(|id| (id, listener.id)));
        let schedule = Schedule::new(HASH, ids.collect());
        shares.insert(listener.id, Arc::new(ScheduleShares::new(Arc::new(schedule))));
    }
    listeners.sort_unstable();
    let snapshot = Snapshot::new(Arc::new(config), Arc::default(), Arc::new(ids));
    let installed = Arc::new(Installed { listeners, shares, ..Installed::default() });
    Snapshot { installed, ..snapshot }
}

/// The first backend of each listener has got three times as much as the second.
fn traffic(snapshot: &Snapshot, factor: u64) -> Vec<Traffic> {
    let ids = snapshot.ids.backends.iter().map(|backend| backend.id as usize);
    let mut traffic = vec![Traffic::default(); ids.max().unwrap() + 1];
    for listener in &snapshot.ids.listeners {
        for (index, part) in listener.backends.clone().zip([3, 1]) {
            let part = part * factor;
            traffic[snapshot.ids.backends[index].id as usize] = Traffic {
                flows: part,
                packets: 10 * part,
                bytes: 1_000 * part,
                reply_packets: 5 * part,
                reply_bytes: 2_000 * part,
            };
        }
    }
    traffic
}

fn listeners(snapshot: &Snapshot, before: Option<u64>, factor: u64) -> Vec<ListenerStatus> {
    let begin = Instant::now();
    let sample = |at, factor| Sample { at, traffic: Arc::new(traffic(snapshot, factor)) };
    let measured = Measured {
        sample: sample(begin + Duration::from_secs(2), factor),
        before: before.map(|factor| sample(begin, factor)),
        verdicts: vec![
            (Verdict::NoBackend, Counter { packets: 2, bytes: 200 }),
            (Verdict::Forwarded, Counter { packets: 9, bytes: 900 }),
        ],
        active: &|_| 0,
        jiffies: Jiffies::per_second(250),
        now: Some(0),
    };
    let mut found = status(snapshot, &measured, Vec::new());
    let drops: Vec<_> = found.drops.iter().map(|drop| (&*drop.verdict, drop.packets)).collect();
    assert_eq!(drops, [("no_backend", 2)], "what was forwarded was not dropped");
    found.instances.remove(0).listeners
}

#[test]
fn share_is_the_actual_one_and_expected_share_that_of_the_schedule() {
    let found = listeners(&snapshot(), None, 100);
    let shares = |listener: &ListenerStatus| -> Vec<_> {
        listener.backends.iter().map(|it| (it.share, it.expected_share)).collect()
    };
    let even = [(Some(0.75), Some(0.5)), (Some(0.25), Some(0.5))];
    assert_eq!(shares(&found[0]), even);
    assert_eq!(shares(&found[1]), even, "of packets");
    // A schedule of wlc has each backend once, whatever its weight.
    assert_eq!(shares(&found[3]), [(Some(0.75), Some(0.75)), (Some(0.25), Some(0.25))]);
}

#[test]
fn what_is_not_known_is_absent() {
    let snapshot = snapshot();
    let found = listeners(&snapshot, None, 100);
    let [web, dns, direct, _] = &found[..] else { panic!("{found:#?}") };
    assert_eq!(
        (web.flows, web.reply_packets, web.reply_bytes),
        (Some(400), Some(2_000), Some(800_000))
    );
    assert_eq!((dns.flows, dns.packets), (None, 4_000), "UDP by hash has no entries to count");
    assert_eq!((direct.flows, direct.reply_packets, direct.reply_bytes), (Some(400), None, None));
    assert_eq!(dns.backends[0].flows, None);
    assert_eq!(direct.backends[0].reply_bytes, None);
    for listener in &found {
        assert_eq!(listener.rates, None, "there is nothing to compare with");
        assert_eq!(listener.backends[0].health_since, None);
        assert_eq!(listener.backends[0].last_probe, None);
    }
    let idle = listeners(&snapshot, None, 0);
    assert_eq!(idle[0].backends[0].share, None, "there was nothing to share");
    let empty = Snapshot { installed: Arc::default(), ..snapshot };
    let unscheduled = listeners(&empty, None, 0);
    assert_eq!(unscheduled[0].backends[0].expected_share, None, "there is no schedule");
}

#[test]
fn rates_are_per_second_between_two_samples() {
    let found = listeners(&snapshot(), Some(100), 120);
    let rates = found[0].rates.unwrap();
    assert_eq!((rates.seconds, rates.flows, rates.packets), (2.0, Some(40.0), 400.0));
    assert_eq!(found[0].backends[0].rates.unwrap().flows, Some(30.0));
    assert_eq!(found[1].rates.unwrap().flows, None, "UDP by hash");
    assert_eq!(found[2].rates.unwrap().reply_packets, None, "direct return");
}
