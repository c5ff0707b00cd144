//! What `slb` says and does when it is told something wrong, and how it goes away.

use std::{fs, process::Command};

use serde_json::Value;
use slb_lab::{Topology, gateway::binary, topology};

use crate::support::{
    Lab, NOTICED,
    foreign::Foreign,
    maps::{names, programs, version},
    output,
    plan::{self, vips},
    wait_until,
};

/// Runs `slb run` on the gateway, for ten seconds at most: it is expected to refuse.
fn run(lab: &Lab) -> (Option<i32>, String) {
    let output = lab
        .topology
        .gateway
        .run(|| {
            Command::new("timeout")
                .args(["--kill-after=2", "10"])
                .arg(lab.gateway.binary())
                .args(["run", "--config"])
                .arg(lab.gateway.config())
                .output()
        })
        .unwrap()
        .unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

fn slb(lab: &Lab, args: &[&str]) -> (Option<i32>, String) {
    let output = lab.gateway.slb(args).unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

fn expect_balanced(lab: &Lab) {
    for to in vips(plan::WEB_PORT) {
        let outcome = lab.client.http(to, 100, 4).unwrap();
        assert_eq!((outcome.ok(), outcome.failed()), (100, 0), "{to}: {outcome}");
        assert_eq!(outcome.per_backend.len(), 4, "{to}: {outcome}");
    }
}

/// The XDP programs that the gateway's kernel reports, by interface.
fn attached(topology: &Topology) -> Vec<(String, u64)> {
    let links: Value =
        serde_json::from_str(&output(&topology.gateway, "ip", &["-j", "-d", "link", "show"]))
            .unwrap();
    links
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|link| {
            let id = link["xdp"]["prog"]["id"].as_u64()?;
            Some((link["ifname"].as_str().unwrap().to_owned(), id))
        })
        .collect()
}

#[test]
#[ignore = "needs the binary"]
fn given_wrong_usage_when_run_then_exit_2_and_a_hint() {
    for args in [&[][..], &["frobnicate"], &["status", "--nonsense"], &["run", "--config"]] {
        let output = Command::new(binary().unwrap()).args(args).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains("--help") || said.contains("Usage: slb"), "{args:?}: {said}");
    }
}

#[test]
#[ignore = "needs root"]
fn given_pins_of_an_earlier_agent_when_a_wrong_file_is_run_then_exit_2_and_all_goes_on_as_it_was() {
    let mut lab = Lab::start();
    lab.gateway.terminate().unwrap();
    let before = programs(&lab.gateway);
    let good = fs::read_to_string(lab.gateway.config()).unwrap();
    lab.edit("weight = 30", "wieght = 30");

    let (code, said) = run(&lab);

    fs::write(lab.gateway.config(), good).unwrap();
    assert_eq!(code, Some(2), "{said}");
    let file = lab.gateway.config();
    assert!(said.contains(&format!("{}:", file.display())), "{said}");
    assert!(said.contains("did you mean 'weight'?"), "{said}");
    assert_eq!(programs(&lab.gateway), before);
    expect_balanced(&lab);
}

#[test]
#[ignore = "needs root"]
fn given_nothing_loaded_when_commands_are_given_then_they_say_so_and_nothing_is_pinned() {
    let lab = Lab::prepare();
    let (code, said) = slb(&lab, &["status"]);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("no agent answers on"), "{said}");

    let good = fs::read_to_string(lab.gateway.config()).unwrap();
    lab.edit("port = 80\n", "port = 80000\n");
    let (code, said) = run(&lab);
    fs::write(lab.gateway.config(), good).unwrap();
    assert_eq!(code, Some(2), "{said}");

    let output = lab.gateway.slb(&["unload"]).unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8(output.stdout).unwrap().contains("nothing was loaded"));
    assert_eq!(names(&lab.gateway.pins()), [""; 0]);
    // The kernel lets go of a link a moment after its pin is gone.
    wait_until("XDP is detached", || attached(&lab.topology).is_empty());
}

#[test]
#[ignore = "needs root"]
fn given_a_running_agent_when_another_or_unload_is_started_then_exit_1_names_it_and_all_goes_on() {
    let lab = Lab::start();
    let before = programs(&lab.gateway);
    let pid = lab.gateway.status().unwrap()["pid"].to_string();
    for (what, (code, said)) in [("run", run(&lab)), ("unload", slb(&lab, &["unload"]))] {
        assert_eq!(code, Some(1), "{what}: {said}");
        assert!(said.contains(&format!("pid {pid}")), "{what}: {said}");
    }
    assert_eq!(lab.gateway.status().unwrap()["pid"].to_string(), pid);
    assert_eq!(programs(&lab.gateway), before);
    expect_balanced(&lab);
}

#[test]
#[ignore = "needs root"]
fn given_a_running_agent_when_asked_for_its_status_then_people_get_a_table() {
    let lab = Lab::start();
    let output = lab.gateway.slb(&["status"]).unwrap();
    assert_eq!(output.status.code(), Some(0));
    let said = String::from_utf8(output.stdout).unwrap();
    let config = lab.gateway.config();
    let words = ["wan0", "lan0", "web-1", "spare", "healthy", "10.0.0.14:8080", "wrr", "(primary)"];
    for word in words.into_iter().chain([config.to_str().unwrap()]) {
        assert!(said.contains(word), "{word} is not in\n{said}");
    }
    assert!(!said.contains("PROBLEM"), "{said}");
}

#[test]
#[ignore = "needs root"]
fn given_an_interface_that_is_not_there_when_run_then_exit_1_names_it() {
    let lab = Lab::prepare();
    lab.edit("\"lan0\"", "\"lan9\"");
    let (code, said) = run(&lab);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("no interface lan9"), "{said}");
}

#[test]
#[ignore = "needs root"]
fn given_pins_of_an_earlier_agent_when_an_interface_is_not_there_then_exit_1_and_all_goes_on_as_it_was()
 {
    let mut lab = Lab::start();
    lab.gateway.terminate().unwrap();
    let before = programs(&lab.gateway);
    let good = fs::read_to_string(lab.gateway.config()).unwrap();
    lab.edit("\"lan0\"", "\"lan9\"");
    lab.edit("weight = 40", "weight = 0");

    let (code, said) = run(&lab);

    fs::write(lab.gateway.config(), good).unwrap();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("no interface lan9"), "{said}");
    assert_eq!(programs(&lab.gateway), before);
    // All four backends, so the other weight is not in effect either.
    expect_balanced(&lab);
}

#[test]
#[ignore = "needs root"]
fn given_another_xdp_mode_when_the_agent_starts_again_then_it_is_attached_in_that() {
    let mut lab = Lab::start();
    for (from, to) in [("[gateway]", "[gateway]\nxdp_mode = \"generic\""), ("generic", "native")] {
        lab.gateway.terminate().unwrap();
        lab.edit(from, to);
        lab.gateway.start().unwrap();

        let wanted = if to == "native" { "native" } else { "generic" };
        let status = lab.gateway.status().unwrap();
        for interface in status["interfaces"].as_array().unwrap() {
            assert_eq!(interface["mode"], wanted, "{interface}");
        }
        lab.wait_all_healthy();
        expect_balanced(&lab);
    }
}

#[test]
#[ignore = "needs root"]
fn given_an_interface_with_a_dot_in_its_name_when_run_and_run_again_then_it_is_balanced_on() {
    let mut lab = Lab::prepare();
    for command in ["link set lan0 down", "link set lan0 name lan.0", "link set lan.0 up"] {
        lab.topology.gateway.ip(command).unwrap();
    }
    // What the kernel forgets with the link.
    lab.topology.gateway.ip("addr replace 2001:db8:10::1/64 dev lan.0 nodad").unwrap();
    lab.edit("\"lan0\"", "\"lan.0\"");
    for _ in 0..2 {
        lab.gateway.start().unwrap();
        lab.wait_all_healthy();
        expect_balanced(&lab);
        lab.gateway.terminate().unwrap();
    }
    assert_eq!(names(&version(&lab.gateway).join("links")), ["lan:0", "wan0"]);
}

#[test]
#[ignore = "needs the binary"]
fn given_a_file_that_is_not_there_when_an_agent_is_asked_then_no_other_agent_is() {
    let gone = tempfile::tempdir().unwrap().path().join("gone.toml");
    for command in ["status", "reload", "events"] {
        let mut slb = Command::new(binary().unwrap());
        let output = slb.args([command, "--config"]).arg(&gone).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{command}: {said}");
        let expected = format!("cannot read {}", gone.display());
        assert!(said.contains(&expected) && said.contains("--api"), "{command}: {said}");
    }
}

#[test]
#[ignore = "needs root"]
fn given_an_interface_that_has_gone_when_other_things_change_then_they_do_and_it_stays_a_problem() {
    const ADD: &str = "link add spare0 up type veth peer name spare1\nlink set spare1 up";
    let mut lab = Lab::prepare();
    lab.topology.gateway.ip(ADD).unwrap();
    let file = fs::read_to_string(lab.gateway.config()).unwrap();
    let named = |name: &str| file.replacen("\"lan0\"", &format!("\"lan0\", \"{name}\""), 1);
    fs::write(lab.gateway.config(), named("spare0")).unwrap();
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();
    lab.topology.gateway.ip("link del spare0").unwrap();
    let is_missing = |status: &Value| status["problems"].to_string().contains("spare0");
    lab.gateway.wait("the interface is missed", NOTICED, is_missing).unwrap();

    let weight = ["backend", "weight", "lab", "web-1", "7"];
    assert_eq!(slb(&lab, &weight).0, Some(0), "{}", slb(&lab, &weight).1);
    assert_eq!(slb(&lab, &["backend", "drain", "lab", "web-2"]).0, Some(0));
    let text = fs::read_to_string(lab.gateway.config()).unwrap();
    assert!(text.contains("weight = 7") && text.contains("drain = true"), "{text}");
    assert_eq!(slb(&lab, &["reload"]).0, Some(0), "nothing else has changed");
    assert!(is_missing(&lab.gateway.status().unwrap()));

    // Another that is not there is a mistake of the change itself.
    fs::write(lab.gateway.config(), text.replacen("\"spare0\"", "\"spare9\"", 1)).unwrap();
    let (code, said) = slb(&lab, &["reload"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("spare9"), "{said}");
    fs::write(lab.gateway.config(), text).unwrap();
    lab.topology.gateway.ip(ADD).unwrap();
    let is_over = |status: &Value| !status["problems"].to_string().contains("spare0");
    lab.gateway.wait("it is back", NOTICED, is_over).unwrap();
}

#[test]
#[ignore = "needs root"]
fn given_another_xdp_program_on_an_interface_when_run_then_it_is_named_and_left_alone() {
    let mut lab = Lab::prepare();
    let foreign = Foreign::load("firewall");
    foreign.attach(&lab.topology.gateway, "lan0");
    let expected = ("lan0".to_owned(), u64::from(foreign.id()));
    assert_eq!(attached(&lab.topology), std::slice::from_ref(&expected));

    let (code, said) = run(&lab);

    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(&format!("an XDP program (id {})", foreign.id())), "{said}");
    assert!(said.contains("lan0"), "{said}");
    assert!(attached(&lab.topology).contains(&expected), "it was not left alone");
    let (code, said) = slb(&lab, &["unload"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(attached(&lab.topology), [expected], "after unload");

    // What the message tells to do, does.
    lab.topology.gateway.ip("link set lan0 xdp off").unwrap();
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();
    expect_balanced(&lab);
}

#[test]
#[ignore = "needs root"]
fn given_a_file_that_became_invalid_when_unloaded_by_paths_then_nothing_is_left_either() {
    let mut lab = Lab::start();
    let api = lab.gateway.config().with_file_name("api.sock");
    let pins = lab.gateway.pins();
    lab.gateway.kill().unwrap();
    let good = fs::read_to_string(lab.gateway.config()).unwrap();
    lab.edit("[gateway]", "[gatewy]");

    let by_file = slb(&lab, &["unload"]);
    let paths = ["unload", "--pins", pins.to_str().unwrap(), "--api", api.to_str().unwrap()];
    let by_paths = slb(&lab, &paths);

    fs::write(lab.gateway.config(), good).unwrap();
    assert_eq!(by_file.0, Some(2), "{}", by_file.1);
    assert_eq!(by_paths.0, Some(0), "{}", by_paths.1);
    // The kernel lets go of a link a moment after its pin is gone.
    wait_until("XDP is detached", || attached(&lab.topology).is_empty());
    assert_eq!(names(&pins), [""; 0]);
}

#[test]
#[ignore = "needs root"]
fn given_a_loaded_balancer_when_unloaded_then_nothing_of_it_is_left() {
    for orderly in [true, false] {
        let mut lab = Lab::start();
        let loaded = programs(&lab.gateway);
        assert_eq!(attached(&lab.topology).len(), topology::INTERFACES.len());
        assert!(version(&lab.gateway).exists());
        if orderly {
            lab.gateway.terminate().unwrap();
        } else {
            lab.gateway.kill().unwrap();
        }

        let (code, said) = slb(&lab, &["unload"]);

        assert_eq!(code, Some(0), "{said}");
        // The kernel lets go of a link a moment after its pin is gone.
        wait_until("XDP is detached", || attached(&lab.topology).is_empty());
        assert_eq!(names(&lab.gateway.pins()), [""; 0]);
        let addresses = output(&lab.topology.gateway, "ip", &["-o", "addr", "show"]);
        for vip in vips(0) {
            assert!(!addresses.contains(&format!(" {}/", vip.ip())), "{addresses}");
        }
        let neighbours = output(&lab.topology.gateway, "ip", &["neigh", "show"]);
        assert!(!neighbours.contains("managed"), "{neighbours}");
        // The kernel frees programs a little later.
        wait_until("the program is gone", || {
            let mut ids = aya::programs::loaded_programs().filter_map(Result::ok);
            !ids.any(|info| loaded.contains(&info.id()))
        });
        // And it comes back as if nothing had been.
        lab.gateway.start().unwrap();
        lab.wait_all_healthy();
        expect_balanced(&lab);
    }
}

#[test]
#[ignore = "needs root"]
fn given_the_socket_when_curl_asks_then_the_api_answers_only_its_owner() {
    let lab = Lab::start();
    let socket = lab.gateway.config().with_file_name("api.sock");
    let curl = |more: &[&str]| {
        let args = ["--silent", "--show-error", "--max-time", "10", "--unix-socket"];
        let args = [&args[..], &[socket.to_str().unwrap()], more].concat();
        output(&lab.topology.gateway, "curl", &args)
    };
    let status: Value = serde_json::from_str(&curl(&["http://slb/v1/status"])).unwrap();
    assert!(plan::all_healthy(&status), "{status:#}");
    let reloaded = curl(&["--request", "POST", "http://slb/v1/reload"]);
    let reloaded: Value = serde_json::from_str(&reloaded).unwrap();
    assert_eq!((&reloaded["generation"], &reloaded["changes"]), (&1.into(), &Value::Array(vec![])));
    let edit = r#"{"edit": "set-weight", "weight": 11,
        "place": {"instance": "lab", "backend": "web-1"}}"#;
    let json = ["--json", edit, "http://slb/v1/edit"];
    let edited: Value = serde_json::from_str(&curl(&json)).unwrap();
    let expected = "~ instance lab, group default, backend web-1: weight 10 -> 11";
    assert_eq!(edited["changes"][0], expected, "{edited:#}");
    let wrong = r#"{"edit": "set-weight", "weight": 1000,
        "place": {"instance": "lab", "backend": "web-1"}}"#;
    let code = ["--output", "/dev/null", "--write-out", "%{http_code}"];
    let refused = [&code[..], &["--json", wrong, "http://slb/v1/edit"]].concat();
    assert_eq!(curl(&refused), "422");
    let status = lab.gateway.status().unwrap();
    assert_eq!(status["reload_failures"], 0, "an edit that is refused is no failed reload");
    assert_eq!(status["problems"], Value::Array(vec![]), "nor a problem");
    let described: Value = serde_json::from_str(&curl(&["http://slb/v1/openapi.json"])).unwrap();
    assert!(described["openapi"].as_str().unwrap().starts_with("3."), "{described:#}");

    use std::os::unix::fs::PermissionsExt as _;
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}
