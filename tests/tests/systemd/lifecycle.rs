//! Start, reload, edit, hang, restart, upgrade, stop.

use std::fs;

use slb_lab::topology::INTERFACES;
use slb_user::datapath::OBJECT;

use crate::site::{BINARY, CONFIG, Site, expect_no_failure, goes_on, vips, wait_until};

#[test]
#[ignore = "needs root"]
fn unit_is_active_when_traffic_is_balanced() {
    let site = Site::install();

    // `Type=notify`: it returns when the agent has said that it is ready.
    site.done(&["systemctl", "start", "slb"]);
    assert_eq!(site.property("ActiveState"), "active");
    assert_eq!(site.property("StatusErrno"), "0");
    site.wait_all_healthy();

    for outcome in site.expect_traffic() {
        assert_eq!(outcome.per_backend.len(), site.topology.backends.len(), "{outcome}");
    }
    let journal = site.journal();
    assert!(journal.contains("ready"), "{journal}");
    assert!(!journal.contains("Operation not permitted"), "{journal}");
}

#[test]
#[ignore = "needs root"]
fn reload_applies_the_file_and_refuses_a_wrong_one() {
    let site = Site::start();
    let before = site.read_config();

    let one = before.replace("weight = 10", "weight = 0").replacen("weight = 0", "weight = 10", 1);
    site.configure(&one);
    site.done(&["systemctl", "reload", "slb"]);
    for outcome in site.expect_traffic() {
        assert_eq!(outcome.per_backend.keys().collect::<Vec<_>>(), ["web-1"], "{outcome}");
    }

    site.configure(&before.replace("weight", "wieght"));
    site.fails(&["systemctl", "reload", "slb"]);
    assert_eq!(site.property("ActiveState"), "active");
    assert!(site.journal().contains("did you mean 'weight'?"), "{}", site.journal());
    for outcome in site.expect_traffic() {
        assert_eq!(outcome.per_backend.keys().collect::<Vec<_>>(), ["web-1"], "{outcome}");
    }
    assert_eq!(site.property("NRestarts"), "0");
}

#[test]
#[ignore = "needs root"]
fn commands_change_the_file_and_the_agent_with_any_owner_of_the_file() {
    let site = Site::start();
    for (weight, owner, mode) in
        [(20, "slb:slb", "640"), (30, "root:slb", "640"), (40, "root:root", "644")]
    {
        site.done(&["chown", owner, CONFIG]);
        site.done(&["chmod", mode, CONFIG]);

        site.done(&[BINARY, "backend", "weight", "shop", "web-2", &weight.to_string()]);

        assert_eq!(site.weight("web-2"), weight, "{owner}");
        assert!(site.read_config().contains(&format!("weight = {weight}\n")), "{owner}");
        assert_eq!(site.done(&["stat", "-c", "%a", CONFIG]).trim(), mode, "{owner}");
    }
}

#[test]
#[ignore = "needs root"]
fn watchdog_restarts_an_agent_that_hangs() {
    let site = Site::start();
    let hung = site.property("MainPID");
    let load = site.load();

    site.done(&["systemctl", "kill", "--kill-whom=main", "--signal=STOP", "slb"]);
    wait_until("the agent is restarted", || site.property("NRestarts") == "1");
    wait_until("the unit is active", || site.property("ActiveState") == "active");

    assert_ne!(site.property("MainPID"), hung);
    assert!(site.journal().contains("Watchdog timeout"), "{}", site.journal());
    site.wait_all_healthy();
    expect_no_failure(load);
}

#[test]
#[ignore = "needs root"]
fn restart_and_upgrade_fail_no_connection() {
    let site = Site::start();
    let load = site.load();

    for _ in 0..3 {
        site.done(&["systemctl", "restart", "slb"]);
        goes_on(&load);
    }
    assert!(!site.journal().contains("replaced the XDP program"), "{}", site.journal());

    let binary = fs::read(site.machine.path(BINARY)).unwrap();
    site.replace_binary(&another_build(binary));
    site.done(&["systemctl", "restart", "slb"]);
    goes_on(&load);
    assert!(site.journal().contains("replaced the XDP program"), "{}", site.journal());

    site.wait_all_healthy();
    expect_no_failure(load);
}

#[test]
#[ignore = "needs root"]
fn stop_leaves_the_datapath_and_unload_removes_it() {
    let site = Site::start();

    site.done(&["systemctl", "stop", "slb"]);
    assert_eq!(site.property("ActiveState"), "inactive");
    assert_eq!(site.property("Result"), "success");
    site.expect_traffic();

    let removed = site.done(&[BINARY, "unload"]);
    assert!(removed.contains("withdrew 192.0.2.100"), "{removed}");
    let [v4, _] = vips();
    // The kernel takes the program off when it frees the links, soon after their pins are gone.
    wait_until("nothing answers", || site.client.http(v4, 1, 1).unwrap().ok() == 0);

    site.done(&["systemctl", "start", "slb"]);
    site.wait_all_healthy();
    site.expect_traffic();
}

#[test]
#[ignore = "needs root"]
fn another_layout_is_named_and_unload_makes_room() {
    let site = Site::start();
    site.done(&["systemctl", "stop", "slb"]);
    let pins = site.machine.path("/sys/fs/bpf/slb");
    let own = fs::read_dir(&pins).unwrap().next().unwrap().unwrap().path();
    fs::rename(own, pins.join("v1")).unwrap();

    site.fails(&["systemctl", "start", "slb"]);
    assert!(site.journal().contains("another layout of its maps"), "{}", site.journal());
    site.expect_traffic();

    site.done(&["systemctl", "stop", "slb"]);
    site.done(&[BINARY, "unload"]);
    site.done(&["systemctl", "start", "slb"]);
    site.wait_all_healthy();
    site.expect_traffic();
}

#[test]
#[ignore = "needs root"]
fn wrong_configuration_fails_once() {
    let site = Site::install();
    site.configure("[[nonsense");

    site.fails(&["systemctl", "start", "slb"]);

    // With a restart pending it would be `activating`.
    assert_eq!(site.property("ActiveState"), "failed");
    assert_eq!(site.property("NRestarts"), "0");
    assert!(site.journal().contains("slb.toml:1:"), "{}", site.journal());
}

#[test]
#[ignore = "needs root"]
fn interface_that_comes_late_is_waited_for() {
    let site = Site::install();
    let [wan, lan] = INTERFACES;
    site.configure(&site.config(&[wan, lan, "lan1"]));

    site.fails(&["systemctl", "start", "slb"]);
    assert_eq!(site.property("ActiveState"), "activating");
    assert!(site.journal().contains("lan1"), "{}", site.journal());
    site.topology
        .gateway
        .ip("link add lan1 type veth peer name lan1-peer\nlink set lan1 up")
        .unwrap();

    wait_until("the unit is active", || site.property("ActiveState") == "active");
    site.wait_all_healthy();
    site.expect_traffic();
}

/// A binary that loads another program, which does the same.
fn another_build(mut binary: Vec<u8>) -> Vec<u8> {
    let at = binary.windows(OBJECT.len()).position(|part| part == OBJECT);
    let at = at.expect("the binary and this test contain the same object");
    let object = slb_lab::ebpf::another_build(OBJECT).unwrap();
    binary[at..at + object.len()].copy_from_slice(&object);
    binary
}
