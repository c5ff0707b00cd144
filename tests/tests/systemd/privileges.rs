//! Who the agent is, and what it may do.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::site::{BINARY, Site, UNIT, expect_no_failure, goes_on, wait_until};

const PINS: &str = "/sys/fs/bpf/slb";
/// Of ten: what `systemd-analyze security` may find at most.
const EXPOSURE: f64 = 2.2;

#[test]
#[ignore = "needs root"]
fn agent_is_not_root_and_owns_its_pins_and_socket() {
    let site = Site::start();
    let uid = uid(&site);
    assert_ne!(uid, 0);

    let pid = site.property("MainPID");
    let status = fs::read_to_string(site.machine.path(&format!("/proc/{pid}/status"))).unwrap();
    let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
    assert_eq!(field("Uid:"), [uid; 4].map(|uid| uid.to_string()).join("\t"));
    // CAP_NET_ADMIN, CAP_NET_RAW, CAP_PERFMON, CAP_BPF.
    let capabilities = [12, 13, 38, 39].into_iter().map(|bit| 1_u64 << bit).sum::<u64>();
    let sets = ["CapPrm:", "CapBnd:"].map(|set| (set, capabilities));
    for (set, expected) in sets.into_iter().chain([("CapInh:", 0), ("CapAmb:", 0)]) {
        assert_eq!(u64::from_str_radix(field(set), 16).unwrap(), expected, "{set}");
    }
    assert_eq!(field("NoNewPrivs:"), "1");
    // Each thread has them in effect only during the calls that need them.
    let tasks = site.machine.path(&format!("/proc/{pid}/task"));
    wait_until("no thread has a capability in effect", || {
        fs::read_dir(&tasks).unwrap().all(|task| {
            let status = fs::read_to_string(task.unwrap().path().join("status"));
            // A thread that has ended has none.
            status.map_or(true, |status| status.contains("CapEff:\t0000000000000000"))
        })
    });

    let pins = files(&site.machine.path(PINS));
    assert!(pins.len() > 20, "{pins:?}");
    for path in pins.into_iter().chain([site.machine.path("/run/slb/api.sock")]) {
        assert_eq!(fs::metadata(&path).unwrap().uid(), uid, "{}", path.display());
    }
}

#[test]
#[ignore = "needs root"]
fn exposure_is_at_most_what_is_documented() {
    let site = Site::start();
    let loaded = site.done(&["systemd-analyze", "security", "--no-pager", "slb.service"]);
    let offline = ["systemd-analyze", "security", "--no-pager", "--offline=true", UNIT];
    for report in [loaded, site.done(&offline)] {
        let exposure = report.lines().find_map(|line| {
            let (_, found) = line.split_once("Overall exposure level for slb.service: ")?;
            found.split(' ').next()?.parse::<f64>().ok()
        });
        assert!(exposure.is_some_and(|exposure| exposure <= EXPOSURE), "{report}");
    }
}

#[test]
#[ignore = "needs root"]
fn pins_of_an_agent_that_ran_as_root_are_taken_over() {
    let site = Site::install();
    let by_root = ["systemd-run", "--unit=by-root", "--property=Type=notify", BINARY, "run"];
    site.done(&by_root);
    site.wait_all_healthy();
    let before = files(&site.machine.path(PINS));
    for path in &before {
        assert_eq!(fs::metadata(path).unwrap().uid(), 0, "{}", path.display());
    }
    let load = site.load();

    site.done(&["systemctl", "stop", "by-root"]);
    site.done(&["systemctl", "start", "slb"]);
    goes_on(&load);

    assert_eq!(files(&site.machine.path(PINS)), before);
    for path in before {
        assert_eq!(fs::metadata(&path).unwrap().uid(), uid(&site), "{}", path.display());
    }
    // The program is still the one that root loaded: the pins were really used.
    assert!(!site.journal().contains("replaced the XDP program"), "{}", site.journal());
    expect_no_failure(load);
}

/// The user that the unit says.
fn uid(site: &Site) -> u32 {
    site.done(&["id", "-u", &site.property("User")]).trim().parse().unwrap()
}

/// All files below a directory, in order.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}
