//! What is changed by hand under a running agent.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use serde_json::Value;

use slb_lab::{Load, topology};

use crate::support::{
    AT_ONCE, Lab, answers_more, expect_unscathed,
    maps::{Contents, first_chunk, links, programs, version, zero_first},
    output,
    plan::{self, vips},
    wait_until,
};

/// Within this time what was changed is put right.
const PUT_RIGHT: Duration = Duration::from_secs(10);
/// The agent compares all maps every five seconds.
const ROUNDS: Duration = Duration::from_secs(16);

/// Runs `bpftool map` on a map.
fn bpftool(lab: &Lab, command: &str, name: &str, more: &[&str]) -> String {
    let path = version(&lab.gateway).join("maps").join(name);
    let args = [&["-j", "map", command, "pinned", path.to_str().unwrap()], more].concat();
    output(&lab.topology.gateway, "bpftool", &args)
}

/// The elements of a map, by their keys, as `bpftool` shows bytes.
fn elements(lab: &Lab, name: &str) -> BTreeMap<Vec<String>, Vec<String>> {
    let dump: Vec<Value> = serde_json::from_str(&bpftool(lab, "dump", name, &[])).unwrap();
    let bytes = |value: &Value| -> Vec<String> {
        let bytes = value.as_array().into_iter().flatten();
        bytes.map(|byte| byte.as_str().unwrap().to_owned()).collect()
    };
    dump.iter().map(|element| (bytes(&element["key"]), bytes(&element["value"]))).collect()
}

fn is_used((_, value): &(&Vec<String>, &Vec<String>)) -> bool {
    value.iter().any(|byte| byte != "0x00")
}

/// Removes one of the elements of a hash map.
fn delete(lab: &Lab, name: &str) {
    let (key, _) = elements(lab, name).pop_first().unwrap();
    let key: Vec<&str> = key.iter().map(String::as_str).collect();
    bpftool(lab, "delete", name, &[&["key"], &key[..]].concat());
}

/// Overwrites the first element that is in use with zeros.
fn zero(lab: &Lab, name: &str) {
    let elements = elements(lab, name);
    let (key, _) = elements.iter().find(is_used).unwrap();
    zero_element(lab, name, key);
}

/// The same in `SLB_SLOTS`, where former schedules are left.
fn zero_slots(lab: &Lab, name: &str) {
    let chunk = first_chunk(&lab.gateway).to_le_bytes();
    zero_element(lab, name, &chunk.map(|byte| format!("{byte:#04x}")));
}

fn zero_element(lab: &Lab, name: &str, key: &[String]) {
    let value = &elements(lab, name)[key];
    let key: Vec<&str> = key.iter().map(String::as_str).collect();
    let value = vec!["0x00"; value.len()];
    bpftool(lab, "update", name, &[&["key"], &key[..], &["value"], &value[..]].concat());
}

/// Adds an element with a key that no other has.
fn add(lab: &Lab, name: &str) {
    let (mut key, mut value) = elements(lab, name).pop_first().unwrap();
    // The length of a prefix stays.
    key[4..].fill("0x5b".to_owned());
    let key: Vec<&str> = key.iter().map(String::as_str).collect();
    value[0] = "0x01".to_owned();
    let value: Vec<&str> = value.iter().map(String::as_str).collect();
    bpftool(lab, "update", name, &[&["key"], &key[..], &["value"], &value[..]].concat());
}

fn repairs(status: &Value, kind: &str) -> u64 {
    status["repairs"][kind].as_u64().unwrap()
}

fn has_problem(status: &Value, name: &str, subject: &str) -> bool {
    let problems = status["problems"].as_array().unwrap();
    problems.iter().any(|problem| problem["name"] == name && problem["subject"] == subject)
}

fn events(lab: &Lab) -> String {
    String::from_utf8(lab.gateway.slb(&["events"]).unwrap().stdout).unwrap()
}

fn expect_balanced(lab: &Lab) {
    for to in vips(plan::WEB_PORT) {
        let outcome = lab.client.http(to, 40, 4).unwrap();
        assert_eq!((outcome.ok(), outcome.failed()), (40, 0), "{to}: {outcome}");
    }
}

/// How a map is changed: what the event says of it, and the change.
type Change<'a> = (&'a str, &'a str, fn(&Lab, &str));

/// Makes these changes, and expects the maps to be as before, and each change to be told of.
fn expect_repaired(lab: &Lab, changes: &[Change<'_>]) {
    let contents = || {
        let names = changes.iter().map(|(name, ..)| *name);
        let elements: Vec<_> = names.map(|name| (name, elements(lab, name))).collect();
        (Contents::read(&lab.gateway), elements)
    };
    let before = contents();
    let (status, known) = (lab.gateway.status().unwrap(), events(lab).lines().count());
    for (name, _, change) in changes {
        change(lab, name);
    }
    wait_until("an event names each of them", || {
        let events = events(lab);
        changes.iter().all(|(name, how, _)| {
            let mut new = events.lines().skip(known).filter(|line| line.contains("  datapath  "));
            new.any(|line| line.contains(&format!("{name}: ")) && line.contains(how))
        })
    });
    let is_counted =
        |now: &Value| repairs(now, "maps") >= repairs(&status, "maps") + changes.len() as u64;
    lab.gateway.wait("they are counted", Duration::ZERO, is_counted).unwrap();
    let after = contents();
    assert_eq!(after.0.differences(&before.0), [""; 0]);
    for ((name, before), (_, after)) in before.1.iter().zip(&after.1) {
        assert!(before == after, "{name}");
    }
}

#[test]
#[ignore = "needs root"]
fn given_maps_changed_by_hand_when_audited_then_they_are_as_before_and_an_event_names_the_element()
{
    let lab = Lab::start();
    expect_repaired(
        &lab,
        &[
            ("SLB_LISTENERS", "removed", delete),
            ("SLB_REVNAT", "removed", delete),
            ("SLB_ADDRESSES", "removed", delete),
            ("SLB_INTERFACES", "removed", delete),
            ("SLB_SUBNETS", "removed", delete),
            ("SLB_BACKENDS", "backend ", zero),
            ("SLB_INGRESS", "removed", zero),
            ("SLB_SETTINGS", "the settings", zero),
            ("SLB_SLOTS", "overwritten", zero_slots),
        ],
    );
    expect_repaired(
        &lab,
        &[
            ("SLB_LISTENERS", "overwritten", zero),
            ("SLB_REVNAT", "overwritten", zero),
            ("SLB_ADDRESSES", "overwritten", zero),
            ("SLB_INTERFACES", "overwritten", zero),
        ],
    );
    expect_repaired(
        &lab,
        &[
            ("SLB_LISTENERS", "added", add),
            ("SLB_ADDRESSES", "added", add),
            ("SLB_SUBNETS", "added", add),
        ],
    );
    expect_balanced(&lab);
    lab.gateway
        .wait("no problem is left", 2 * PUT_RIGHT, |status| {
            let problems = status["problems"].as_array().unwrap();
            problems.iter().all(|problem| problem["name"] != "maps_changed")
        })
        .unwrap();
}

#[test]
#[ignore = "needs root"]
fn given_the_large_maps_zeroed_when_audited_then_packets_are_balanced_again() {
    let lab = Lab::start();
    for name in ["SLB_FILTER", "SLB_LISTENER_INDEX", "SLB_REVNAT_INDEX"] {
        zero_first(&lab.gateway, name);
        let is_told = |status: &Value| has_problem(status, "maps_changed", name);
        lab.gateway.wait(name, PUT_RIGHT, is_told).unwrap();
        expect_balanced(&lab);
    }
}

fn expect_event(lab: &Lab, wanted: &[&str]) {
    wait_until(&format!("an event says {wanted:?}"), || {
        let events = events(lab);
        let mut events = events.lines().filter(|line| line.contains("  datapath  "));
        events.any(|line| wanted.iter().all(|text| line.contains(text)))
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_link_that_is_detached_by_hand_when_noticed_then_xdp_is_attached_again_at_once() {
    let lab = Lab::start();
    let before = programs(&lab.gateway);
    for (link, interface) in links(&lab.gateway).iter().zip(topology::INTERFACES) {
        let known = repairs(&lab.gateway.status().unwrap(), "links");
        let attached = is_attached(&lab, interface);
        assert!(attached, "{interface}");
        let args = ["link", "detach", "pinned", link.to_str().unwrap()];
        output(&lab.topology.gateway, "bpftool", &args);

        let is_told = |status: &Value| {
            repairs(status, "links") > known && has_problem(status, "xdp_detached", interface)
        };
        lab.gateway.wait("XDP is attached again", AT_ONCE, is_told).unwrap();
        assert!(is_attached(&lab, interface), "{interface}");
        expect_event(&lab, &[interface, "detached"]);
    }
    assert_eq!(programs(&lab.gateway), before);
    expect_balanced(&lab);
}

fn is_attached(lab: &Lab, interface: &str) -> bool {
    let shown = output(&lab.topology.gateway, "ip", &["link", "show", interface]);
    shown.contains("prog/xdp id")
}

#[test]
#[ignore = "needs root"]
fn given_all_pins_removed_when_noticed_then_they_are_there_again_and_packets_never_miss_them() {
    let lab = Lab::start();
    let before = pinned(&lab);
    let (programs_before, contents) = (programs(&lab.gateway), Contents::read(&lab.gateway));
    let load = Load::start(&lab.client, vips(plan::WEB_PORT)[0], 200).unwrap();
    answers_more(&load, 50);

    fs::remove_dir_all(version(&lab.gateway)).unwrap();

    let is_told = |status: &Value| {
        let problems = status["problems"].as_array().unwrap();
        repairs(status, "pins") >= before.len() as u64
            && problems.iter().any(|problem| problem["name"] == "pins_removed")
    };
    lab.gateway.wait("the pins are there again", PUT_RIGHT, is_told).unwrap();
    assert_eq!(pinned(&lab), before);
    assert_eq!(programs(&lab.gateway), programs_before);
    assert_eq!(Contents::read(&lab.gateway).differences(&contents), [""; 0]);
    expect_event(&lab, &["pinned again"]);
    answers_more(&load, 50);
    expect_unscathed(load);
}

#[test]
#[ignore = "needs root"]
fn given_pins_that_were_removed_and_made_again_when_the_agent_dies_then_the_next_goes_on() {
    let mut lab = Lab::start();
    let before = pinned(&lab);
    for pin in before.iter().step_by(3) {
        fs::remove_file(pin).unwrap();
    }
    fs::remove_file(&links(&lab.gateway)[0]).unwrap_or_default();
    wait_until("the pins are there again", || pinned(&lab) == before);
    lab.gateway.kill().unwrap();
    expect_balanced(&lab);
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();
    expect_balanced(&lab);
}

/// All pins.
fn pinned(lab: &Lab) -> Vec<PathBuf> {
    let directories = ["links", "maps", "progs"].map(|name| version(&lab.gateway).join(name));
    let pins = directories.into_iter().flat_map(|directory| {
        let entries = fs::read_dir(directory).into_iter().flatten();
        entries.map(|entry| entry.unwrap().path())
    });
    let mut pins: Vec<_> = pins.collect();
    pins.sort();
    pins
}

#[test]
#[ignore = "needs root"]
fn given_a_program_removed_from_the_tail_calls_when_audited_then_all_are_loaded_again() {
    let lab = Lab::start();
    let slots = elements(&lab, "SLB_PROGRAMS").len();
    bpftool(&lab, "delete", "SLB_PROGRAMS", &["key", "0", "0", "0", "0"]);
    let is_told = |status: &Value| has_problem(status, "maps_changed", "SLB_PROGRAMS");
    lab.gateway.wait("the programs are found missing", PUT_RIGHT, is_told).unwrap();
    let is_repaired = |status: &Value| repairs(status, "maps") > 0;
    // To load them takes the longer the more others do.
    lab.gateway.wait("the programs are back", 3 * PUT_RIGHT, is_repaired).unwrap();
    assert_eq!(elements(&lab, "SLB_PROGRAMS").len(), slots);
    expect_balanced(&lab);
}

#[test]
#[ignore = "needs root"]
fn given_weights_that_change_all_the_time_when_audited_then_nothing_counts_as_changed_by_hand() {
    let lab = Lab::start();
    let is_over = AtomicBool::new(false);
    let changes = thread::scope(|scope| {
        let changes = scope.spawn(|| {
            let mut changes = 0;
            while !is_over.load(Ordering::Relaxed) {
                let weight = (changes % 50 + 1).to_string();
                for name in ["web-1", "web-2"] {
                    let args = ["backend", "weight", "lab", name, &weight];
                    assert!(lab.gateway.slb(&args).unwrap().status.success());
                }
                changes += 1;
            }
            changes
        });
        thread::sleep(ROUNDS);
        is_over.store(true, Ordering::Relaxed);
        changes.join().unwrap()
    });
    assert!(changes > 20, "{changes}");
    let status = lab.gateway.status().unwrap();
    assert_eq!(status["repairs"], serde_json::json!({"maps": 0, "links": 0, "pins": 0}));
    let events = events(&lab);
    assert!(!events.contains("  datapath  "), "{events}");
    wait_until("no problem", || {
        let status = lab.gateway.status().unwrap();
        status["problems"].as_array().unwrap().is_empty()
    });
}
