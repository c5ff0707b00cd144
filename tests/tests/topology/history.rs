//! Many changes one after the other, under load: backends that stay lose nothing, and in the end nothing tells that
//! there were any.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    time::Duration,
};

use nix::sys::signal::Signal;
use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};
use serde_json::Value;
use slb_common::abi::{Address, Endpoint, NO_BACKEND, Roles, SLOT_BACKEND, SLOT_KEEP, Scheduler};
use slb_lab::{Load, Sessions};

use crate::support::{
    Lab, NOTICED, answers_more, expect_all_go_on, expect_unscathed,
    maps::Contents,
    plan::{self, vips},
    wait_until,
};

/// New connections per second, of both families together.
const RATE: u32 = 500;
/// How many changes; `SLB_CHANGES` says otherwise.
const CHANGES: usize = 150;

/// One change.
#[derive(Clone, Debug)]
enum Change {
    /// Of a backend that stays.
    Weight { backend: usize, group: bool, weight: u32 },
    /// Of a backend that stays: its connections go on.
    Drain { backend: usize, group: bool, stop: bool },
    /// Of the guests: they come and go.
    Guest { group: bool },
    /// Of the other listeners.
    Listener { port: usize, start: bool },
    /// Of the file, told by a signal.
    Reload { weight: u32 },
    /// Something that must not have an effect.
    Wrong(usize),
}

fn changes() -> impl Strategy<Value = Change> {
    prop_oneof![
        1 => (0..3_usize, any::<bool>(), 1..=100_u32)
            .prop_map(|(backend, group, weight)| Change::Weight { backend, group, weight }),
        1 => (1..3_usize, any::<bool>(), any::<bool>())
            .prop_map(|(backend, group, stop)| Change::Drain { backend, group, stop }),
        1 => any::<bool>().prop_map(|group| Change::Guest { group }),
        1 => (0..2_usize, any::<bool>()).prop_map(|(port, start)| Change::Listener { port, start }),
        1 => (1..=100_u32).prop_map(|weight| Change::Reload { weight }),
        5 => (0..5_usize).prop_map(Change::Wrong),
    ]
}

/// What the maps say, without the numbers that depend on who came first.
struct Meaning {
    /// The backend's address and port of every slot.
    listeners: BTreeMap<Endpoint, (Scheduler, Vec<(Address, u32)>)>,
    addresses: BTreeMap<Address, Roles>,
    /// The VIP and port that a backend answers for.
    endpoints: BTreeMap<Endpoint, (Address, u32)>,
}

fn meaning(lab: &Lab) -> Meaning {
    let contents = Contents::read(&lab.gateway);
    let listeners = contents.listeners.iter().map(|(&at, listener)| {
        let chunks = contents.slots[listener.first_chunk as usize..].iter();
        let slots = chunks.flat_map(|chunk| chunk.slots).take(listener.slots as usize);
        let mut owners: Vec<(Address, u32)> = slots
            .map(|slot| slot & SLOT_BACKEND)
            .filter(|&id| id != NO_BACKEND)
            .map(|id| {
                let backend = contents.backends[id as usize];
                (backend.addr, backend.port)
            })
            .collect();
        if listener.scheduler == Scheduler::RING {
            // A turn is a turn.
            owners.sort_unstable();
        }
        (at, (listener.scheduler, owners))
    });
    Meaning {
        listeners: listeners.collect(),
        addresses: contents.addresses.clone(),
        endpoints: contents
            .endpoints
            .iter()
            .map(|(&at, origin)| (at, (origin.vip, origin.port)))
            .collect(),
    }
}

/// Whether no flow of a schedule by hash gets an entry any more, because its slot is on its way.
fn is_settled(lab: &Lab) -> bool {
    let contents = Contents::read(&lab.gateway);
    contents.listeners.values().all(|listener| {
        let chunks = contents.slots[listener.first_chunk as usize..].iter();
        let mut slots = chunks.flat_map(|chunk| chunk.slots).take(listener.slots as usize);
        listener.scheduler == Scheduler::RING || slots.all(|slot| slot & SLOT_KEEP == 0)
    })
}

/// Whether all backends that are probed are healthy.
fn is_healthy(status: &Value) -> bool {
    let text = status.to_string();
    !["\"unknown\"", "\"unhealthy\""].iter().any(|health| text.contains(health))
}

fn has_orphans(status: &Value) -> bool {
    status.to_string().contains("\"removed\"")
}

/// The backend that comes and goes.
const GUEST: usize = 3;

/// Makes one change; `is_there` says for each group whether [`GUEST`] is in it.
fn carry_out(lab: &Lab, change: Change, is_there: &mut [bool; 2], case: &str) {
    let name = |backend: usize| lab.topology.backends[backend].name.clone();
    let slb = |args: &[&str]| lab.gateway.slb(args).unwrap().status.code();
    match change {
        Change::Weight { backend, group, weight } => {
            let (name, weight) = (name(backend), weight.to_string());
            let mut args = vec!["backend", "weight", "lab", &name, &weight];
            args.extend(if group { &["--group", "api"][..] } else { &[] });
            assert_eq!(slb(&args), Some(0), "{case}");
        }
        Change::Drain { backend, group, stop } => {
            let name = name(backend);
            let mut args = vec!["backend", "drain", "lab", &name];
            args.extend(if group { &["--group", "api"][..] } else { &[] });
            args.extend(if stop { &["--stop"][..] } else { &[] });
            assert_eq!(slb(&args), Some(0), "{case}");
        }
        Change::Guest { group } => {
            let (name, port) = (name(GUEST), plan::API.port().to_string());
            let [v4, v6] = lab.topology.backends[GUEST].addresses().map(|a| a.to_string());
            let at = if group { &["--group", "api"][..] } else { &[] };
            let is_there = &mut is_there[usize::from(group)];
            let mut args = vec!["backend", if *is_there { "remove" } else { "add" }, "lab", &name];
            args.extend(at);
            if !*is_there {
                args.extend(["--address", &v4, &v6, "--weight", "40"]);
                if group {
                    args.extend(["--port", port.as_str()]);
                }
            }
            assert_eq!(slb(&args), Some(0), "{case}");
            *is_there = !*is_there;
        }
        Change::Listener { port, start } => {
            let listener = ["tcp/5432", "udp/5433"][port];
            let verb = if start { "start" } else { "stop" };
            assert_eq!(slb(&["listener", verb, "lab", listener]), Some(0), "{case}");
        }
        Change::Reload { weight } => {
            let path = lab.gateway.config();
            let text = fs::read_to_string(&path).unwrap();
            // That of the first backend in the file.
            let (before, rest) = text.split_once("weight = ").unwrap();
            let (_, rest) = rest.split_once('\n').unwrap();
            fs::write(&path, format!("{before}weight = {weight}\n{rest}")).unwrap();
            lab.gateway.signal(Signal::SIGHUP).unwrap();
        }
        Change::Wrong(which) => {
            let wrong: [&[&str]; 5] = [
                &["backend", "weight", "lab", "web-1", "101"],
                &["backend", "remove", "lab", "nobody"],
                &["backend", "add", "lab", "web-1", "--address", "10.0.0.1"],
                &["listener", "stop", "lab", "tcp/1"],
                &["backend", "drain", "lab", "db-1", "--group", "db"],
            ];
            assert_eq!(slb(wrong[which]), Some(2), "{case}");
        }
    }
}

/// The maps say what they say after a start on the same file. Returns that.
fn expect_as_after_a_start(lab: &mut Lab) -> Meaning {
    let after = meaning(lab);
    lab.gateway.terminate().unwrap();
    assert!(lab.gateway.slb(&["unload"]).unwrap().status.success());
    lab.gateway.start().unwrap();
    lab.gateway.wait("all are healthy", NOTICED, is_healthy).unwrap();
    wait_until("all slots are settled", || is_settled(lab));
    let afresh = meaning(lab);
    let at = |meaning: &Meaning| meaning.listeners.keys().copied().collect::<BTreeSet<_>>();
    assert_eq!(at(&after), at(&afresh));
    for (at, listener) in &after.listeners {
        // Too long to be shown.
        assert!(*listener == afresh.listeners[at], "{at:?}: not the schedule of a fresh start");
    }
    assert_eq!(after.addresses, afresh.addresses);
    assert_eq!(after.endpoints, afresh.endpoints);
    after
}

#[test]
#[ignore = "needs root"]
fn given_load_when_anything_is_changed_again_and_again_then_backends_that_stay_lose_nothing() {
    let mut lab = Lab::prepare();
    // Removed backends are to be forgotten within the test, and slots to settle: none of a shared backend does.
    let text = fs::read_to_string(lab.gateway.config()).unwrap();
    let mut parts: Vec<&str> = text.split("[[instance.listener]]\n").collect();
    parts.retain(|part| !part.contains(&format!("\nport = {}\n", plan::UDP_PORT)));
    assert_eq!(parts.len(), 6, "one of six listeners less");
    let listener = "[[instance.listener]]\nidle_timeout = \"10s\"\n";
    fs::write(lab.gateway.config(), parts.join(listener)).unwrap();
    lab.gateway.start().unwrap();
    lab.gateway.wait("all are healthy", NOTICED, is_healthy).unwrap();
    let count = std::env::var("SLB_CHANGES").map_or(CHANGES, |text| text.parse().unwrap());
    let mut runner = TestRunner::new_with_rng(
        ProptestConfig::default(),
        TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]),
    );
    let to = [vips(plan::WEB_PORT)[0], vips(plan::API_PORT)[1]];
    let loads = to.map(|to| Load::start(&lab.client, to, RATE / 2).unwrap());
    let kept = to.map(|to| Sessions::open(&lab.client, to, 20).unwrap());
    let mut is_there = [true; 2];

    for number in 0..count {
        let change = changes().new_tree(&mut runner).unwrap().current();
        let case = format!("{number}: {change:?}");
        carry_out(&lab, change, &mut is_there, &case);
    }
    loads.iter().for_each(|load| answers_more(load, u64::from(RATE)));
    loads.into_iter().for_each(|load| drop(expect_unscathed(load)));
    expect_all_go_on(kept);

    // When the last flows of removed backends are over.
    let limit = Duration::from_secs(90);
    lab.gateway.wait("no backend is orphaned", limit, |status| !has_orphans(status)).unwrap();
    wait_until("all slots are settled", || is_settled(&lab));
    lab.gateway.wait("all are healthy", NOTICED, is_healthy).unwrap();
    let after = expect_as_after_a_start(&mut lab);
    let guest: IpAddr = lab.topology.backends[GUEST].addresses()[0];
    let is_listed = after.endpoints.keys().any(|at| at.addr == guest.into() && at.port == 8080);
    assert_eq!(is_listed, is_there[0]);
}
