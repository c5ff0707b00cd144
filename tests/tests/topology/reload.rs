//! Another configuration for a running agent; packets do not notice more of it than they have to.

use std::{
    fs,
    process::{Command, Output},
    time::Duration,
};

use nix::sys::signal::Signal;
use serde_json::Value;
use slb_lab::{Load, Sessions, gateway::backends, topology};

use crate::support::{
    Lab, answers_more, edit, expect_all_go_on, expect_unscathed, flows,
    maps::{Contents, names, programs, version},
    output,
    plan::{self, vips, who},
    wait_until,
};

/// New connections per second.
const RATE: u32 = 500;
/// Answers that show that the load goes on: a second of it.
const GOES_ON: u64 = 500;
/// Comes and goes.
const GUEST: &str = "web-2";

/// What `slb reload` prints.
fn reload(lab: &Lab) -> Vec<String> {
    let output = lab.gateway.slb(&["reload"]).unwrap();
    expect(output, 0).0.lines().map(str::to_owned).collect()
}

/// What is on stdout and stderr.
fn expect(output: Output, code: i32) -> (String, String) {
    let [said, complained] =
        [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert_eq!(output.status.code(), Some(code), "{said}{complained}");
    (said, complained)
}

fn plan_of(lab: &Lab) -> Output {
    let mut command = Command::new(lab.gateway.binary());
    command.arg("plan").arg(lab.gateway.config());
    lab.topology.gateway.run(|| command.output()).unwrap().unwrap()
}

/// The interfaces that XDP is on.
fn links(lab: &Lab) -> Vec<String> {
    names(&version(&lab.gateway).join("links"))
}

fn generation(lab: &Lab) -> u64 {
    lab.gateway.status().unwrap()["generation"].as_u64().unwrap()
}

/// [`GUEST`] in the default group and in `api`, as the file has it.
fn guest(lab: &Lab) -> [String; 2] {
    let (who, port) = (who(lab.host(GUEST)), plan::API.port());
    [
        format!("[[instance.backend]]\n{who}\nweight = 20\n"),
        format!("[[instance.group.backend]]\n{who}\nport = {port}\nweight = 20\n"),
    ]
}

fn roles(status: &Value, port: u16, name: &str) -> Vec<String> {
    let found = backends(status, "tcp", port);
    let named = found.into_iter().filter(|backend| backend["name"] == name);
    named.map(|backend| backend["role"].as_str().unwrap_or_default().to_owned()).collect()
}

#[test]
#[ignore = "needs root"]
fn given_traffic_when_a_backend_is_removed_reweighted_and_added_then_nothing_is_lost() {
    let lab = Lab::start();
    let file = fs::read_to_string(lab.gateway.config()).unwrap();
    let ports = [plan::WEB_PORT, plan::API_PORT];
    let to = ports.map(|port| vips(port)[0]);
    let kept: Vec<Sessions> = ports
        .into_iter()
        .flat_map(vips)
        .map(|to| Sessions::open(&lab.client, to, 20).unwrap())
        .collect();
    let guests = |kept: &[Sessions]| {
        let sessions = kept.iter().flat_map(Sessions::so_far);
        sessions.filter(|session| session.backend == GUEST).map(|session| session.answered).sum()
    };
    let loads = to.map(|to| Load::start(&lab.client, to, RATE / 2).unwrap());
    loads.iter().for_each(|load| answers_more(load, GOES_ON / 2));
    let before: u64 = guests(&kept);
    assert!(before > 0, "no session is with {GUEST}");

    for part in guest(&lab) {
        edit(&lab.gateway, &part, "");
    }
    assert_eq!(
        reload(&lab),
        [
            "- instance lab, group api, backend web-2",
            "- instance lab, group default, backend web-2",
            "2 changes; generation 2"
        ]
    );
    let status = lab.gateway.status().unwrap();
    let given = to.map(|to| flows(&status, "tcp", to, &lab.host(GUEST).v4.to_string()));
    loads.iter().for_each(|load| answers_more(load, GOES_ON));
    let status = lab.gateway.status().unwrap();
    for ((port, to), given) in ports.into_iter().zip(to).zip(given) {
        let address = lab.host(GUEST).v4.to_string();
        assert_eq!(roles(&status, port, &address), ["removed"], "{status:#}");
        assert_eq!(flows(&status, "tcp", to, &address), given, "new flows to the removed");
    }
    wait_until("flows of the removed go on", || guests(&kept) > before + 100);

    // Back, and with another weight.
    let heavy = file.replace("weight = 20", "weight = 25");
    fs::write(lab.gateway.config(), heavy).unwrap();
    assert_eq!(
        reload(&lab),
        [
            "+ instance lab, group api, backend web-2",
            "+ instance lab, group default, backend web-2",
            "2 changes; generation 3"
        ]
    );
    lab.wait_all_healthy();
    loads.iter().for_each(|load| answers_more(load, GOES_ON));
    fs::write(lab.gateway.config(), file).unwrap();
    assert_eq!(reload(&lab).len(), 3);
    loads.iter().for_each(|load| answers_more(load, GOES_ON));
    let status = lab.gateway.status().unwrap();
    for (port, to) in ports.into_iter().zip(to) {
        assert_eq!(roles(&status, port, GUEST), ["member", "member"], "{status:#}");
        assert!(flows(&status, "tcp", to, GUEST) > 0, "{status:#}");
    }

    for load in loads {
        expect_unscathed(load);
    }
    expect_all_go_on(kept);
}

#[test]
#[ignore = "needs root"]
fn given_traffic_when_the_scheduler_changes_then_new_flows_go_by_it_and_old_ones_stay() {
    let lab = Lab::start();
    let web = format!("port = {}\nbackend_port", plan::WEB_PORT);
    let file = fs::read_to_string(lab.gateway.config()).unwrap();
    let to = vips(plan::WEB_PORT);
    let mut kept = Vec::new();
    let loads = to.map(|to| Load::start(&lab.client, to, RATE / 2).unwrap());
    for (generation, scheduler) in (2..).zip(["sch", "rr", "tch", "wrr", "sch", "tch"]) {
        kept.extend(to.map(|to| Sessions::open(&lab.client, to, 10).unwrap()));
        let text = file.replace(&web, &format!("scheduler = \"{scheduler}\"\n{web}"));
        fs::write(lab.gateway.config(), text).unwrap();
        assert_eq!(reload(&lab).last().unwrap(), &format!("1 change; generation {generation}"));
        for to in to {
            let outcome = lab.client.http(to, 400, 4).unwrap();
            assert_eq!((outcome.ok(), outcome.failed()), (400, 0), "{scheduler} {to}: {outcome}");
            let backends = outcome.per_backend.len();
            assert_eq!(backends, if scheduler == "sch" { 1 } else { 4 }, "{scheduler}: {outcome}");
            if scheduler == "rr" {
                let shares = outcome.per_backend.keys().map(|backend| outcome.share(backend));
                let mut others = shares.filter(|share| (share - 0.25).abs() > 0.1);
                assert_eq!(others.next(), None, "{outcome}");
            }
        }
        loads.iter().for_each(|load| answers_more(load, GOES_ON / 5));
    }
    loads.into_iter().for_each(|load| drop(expect_unscathed(load)));
    expect_all_go_on(kept);
}

#[test]
#[ignore = "needs root"]
fn given_traffic_when_the_seed_changes_then_flows_spread_anew_and_old_ones_stay() {
    let lab = Lab::start();
    let web = format!("port = {}\nbackend_port", plan::WEB_PORT);
    let file = fs::read_to_string(lab.gateway.config()).unwrap();
    let to = vips(plan::WEB_PORT);
    let mut kept = Vec::new();
    let loads = to.map(|to| Load::start(&lab.client, to, RATE / 2).unwrap());
    let all = [("tch", "the first of two texts"), ("tch", "the second of two texts"), ("sch", "")];
    let mut generation = 1;
    for (scheduler, seed) in all.into_iter().chain([("sch", all[0].1), ("sch", all[1].1)]) {
        kept.extend(to.map(|to| Sessions::open(&lab.client, to, 20).unwrap()));
        let text = file.replace(&web, &format!("scheduler = \"{scheduler}\"\n{web}"));
        let named = format!("[gateway]\nseed = {seed:?}");
        let named = if seed.is_empty() { "[gateway]" } else { &named };
        fs::write(lab.gateway.config(), text.replacen("[gateway]", named, 1)).unwrap();
        generation += 1;
        let changes = reload(&lab);
        assert!(!changes.concat().contains("of two texts"), "the secret is shown: {changes:?}");
        assert!(changes.last().unwrap().ends_with(&format!("generation {generation}")));
        for to in to {
            let outcome = lab.client.http(to, 200, 4).unwrap();
            assert_eq!((outcome.ok(), outcome.failed()), (200, 0), "{scheduler} {seed}: {outcome}");
        }
        loads.iter().for_each(|load| answers_more(load, GOES_ON / 5));
    }
    loads.into_iter().for_each(|load| drop(expect_unscathed(load)));
    expect_all_go_on(kept);
}

#[test]
#[ignore = "needs root"]
fn given_a_removed_backend_when_its_last_flow_is_over_then_it_is_forgotten() {
    let lab = Lab::prepare();
    let mut lab = lab;
    let web = format!("port = {}\nbackend_port", plan::WEB_PORT);
    edit(&lab.gateway, &web, &format!("idle_timeout = \"10s\"\n{web}"));
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();
    let to = vips(plan::WEB_PORT)[0];
    let kept = Sessions::open(&lab.client, to, 40).unwrap();
    let address = lab.host(GUEST).v4.to_string();
    assert!(kept.so_far().iter().any(|session| session.backend == GUEST));
    let [part, _] = guest(&lab);
    edit(&lab.gateway, &part, "");
    reload(&lab);

    // Longer than the idle timeout: sessions alone keep it.
    let is_there = |status: &Value| !roles(status, plan::WEB_PORT, &address).is_empty();
    let limit = Duration::from_secs(60);
    let other = lab.host(GUEST).v6.to_string();
    let is_other = |status: &Value| !roles(status, plan::WEB_PORT, &other).is_empty();
    lab.gateway.wait("no flow of IPv6 is left", limit, |status| !is_other(status)).unwrap();
    assert!(is_there(&lab.gateway.status().unwrap()), "forgotten before its flows");
    for session in kept.stop().unwrap() {
        assert_eq!(session.failure, None, "{session:?}");
    }
    lab.gateway.wait("no flow of IPv4 is left", limit, |status| !is_there(status)).unwrap();
    let addr = slb_common::abi::Address::from(lab.host(GUEST).addresses()[0]);
    let web = Contents::read(&lab.gateway).endpoints.into_keys();
    let web = web.filter(|at| at.addr == addr && at.port == u32::from(plan::WEB.port()));
    assert_eq!(web.count(), 0, "its answers are translated still");
}

#[test]
#[ignore = "needs root"]
fn given_a_wrong_file_when_reloaded_then_every_mistake_is_told_and_nothing_changes() {
    let lab = Lab::start();
    let (before, file) =
        (Contents::read(&lab.gateway), fs::read_to_string(lab.gateway.config()).unwrap());
    let [load] = [vips(plan::WEB_PORT)[0]].map(|to| Load::start(&lab.client, to, RATE).unwrap());
    let wrong = file.replace("scheduler = \"wrr\"", "schedule = \"wrr\"").replacen(
        "weight = 40",
        "weight = 400",
        1,
    );
    fs::write(lab.gateway.config(), wrong).unwrap();
    let (_, said) = expect(lab.gateway.slb(&["reload"]).unwrap(), 2);
    for mistake in ["schedule", "400", "nothing was changed"] {
        assert!(said.contains(mistake), "it does not say {mistake}: {said}");
    }
    lab.gateway.signal(Signal::SIGHUP).unwrap();
    let is_told = |status: &Value| status["problems"].to_string().contains("reload was refused");
    lab.gateway.wait("the refusal is a problem", crate::support::NOTICED, is_told).unwrap();
    expect(plan_of(&lab), 2);
    fs::remove_file(lab.gateway.config()).unwrap();
    let socket = lab.gateway.config().with_file_name("api.sock");
    let args = ["reload", "--api", socket.to_str().unwrap()];
    let (_, said) = expect(lab.gateway.slb(&args).unwrap(), 2);
    assert!(said.contains("cannot read"), "{said}");

    assert_eq!(Contents::read(&lab.gateway).differences(&before), [""; 0]);
    answers_more(&load, GOES_ON);
    expect_unscathed(load);
    fs::write(lab.gateway.config(), file).unwrap();
    assert_eq!(reload(&lab), ["no changes; generation 1"]);
    assert!(!is_told(&lab.gateway.status().unwrap()), "the refusal is told for ever");
}

#[test]
#[ignore = "needs root"]
fn given_the_same_file_when_reloaded_then_nothing_is_written() {
    let lab = Lab::start();
    let (before, running) = (Contents::read(&lab.gateway), programs(&lab.gateway));
    let path = lab.gateway.config();
    let file = fs::read_to_string(&path).unwrap();
    fs::write(path, format!("# The same.\n{file}\n")).unwrap();
    let (said, _) = expect(plan_of(&lab), 0);
    assert_eq!(said, "no changes; nothing was done\n");
    assert_eq!(reload(&lab), ["no changes; generation 1"]);
    assert_eq!(Contents::read(&lab.gateway).differences(&before), [""; 0]);
    assert_eq!(programs(&lab.gateway), running);
}

#[test]
#[ignore = "needs root"]
fn given_another_listener_and_vip_when_planned_then_nothing_is_done_until_it_is_reloaded() {
    let lab = Lab::start();
    const VIP: &str = "203.0.113.77";
    let [v4, v6] = [topology::VIP_V4.to_string(), topology::VIP_V6.to_string()];
    let one = format!("vips = [\"{v4}\", \"{v6}\"]");
    let before = fs::read_to_string(lab.gateway.config()).unwrap();
    let more = format!(
        "{}\n[[instance.listener]]\nprotocol = \"tcp\"\nport = 8000\nbackend_port = {}\n",
        before.replace(&one, &format!("vips = [\"{v4}\", \"{v6}\", \"{VIP}\"]")),
        plan::WEB.port()
    );
    fs::write(lab.gateway.config(), more).unwrap();
    let installed = Contents::read(&lab.gateway);
    let (planned, _) = expect(plan_of(&lab), 0);
    let [vip, listener, end] = planned.lines().collect::<Vec<_>>()[..] else { panic!("{planned}") };
    assert_eq!(vip, format!("~ instance lab: vips [{v4}, {v6}] -> [{v4}, {v6}, {VIP}]"));
    assert_eq!(listener, "+ instance lab, listener tcp/8000");
    assert_eq!(end, "2 changes; nothing was done");
    assert_eq!(Contents::read(&lab.gateway).differences(&installed), [""; 0]);
    assert_eq!(generation(&lab), 1);

    assert_eq!(reload(&lab), [vip, listener, "2 changes; generation 2"]);
    let is_up = |status: &Value| {
        let found = backends(status, "tcp", 8000);
        found.len() == 8 && found.iter().all(|backend| backend["health"] == "healthy")
    };
    lab.gateway.wait("the new listener is up", crate::support::NOTICED, is_up).unwrap();
    let vip: std::net::IpAddr = VIP.parse().unwrap();
    for port in [8000, plan::WEB_PORT, plan::API_PORT] {
        // The new VIP is reached by its announcement, as the old ones are.
        let outcome = lab.client.http((vip, port).into(), 50, 4).unwrap();
        assert_eq!((outcome.ok(), outcome.failed()), (50, 0), "{port}: {outcome}");
    }
    let held = || output(&lab.topology.gateway, "ip", &["-4", "addr", "show"]).contains(VIP);
    assert!(held());

    fs::write(lab.gateway.config(), before).unwrap();
    assert_eq!(reload(&lab).last().unwrap(), "2 changes; generation 3");
    wait_until("the VIP is given up", || !held());
    assert!(backends(&lab.gateway.status().unwrap(), "tcp", 8000).is_empty());
    let outcome = lab.client.http(vips(plan::WEB_PORT)[0], 50, 4).unwrap();
    assert_eq!((outcome.ok(), outcome.failed()), (50, 0), "{outcome}");
}

#[test]
#[ignore = "needs root"]
fn given_commands_when_the_agent_is_changed_then_its_file_is_too_and_nothing_else_in_it() {
    let lab = Lab::start();
    let path = lab.gateway.config();
    let file = format!("# Ours.\n{}", fs::read_to_string(&path).unwrap());
    fs::write(&path, &file).unwrap();
    let load = Load::start(&lab.client, vips(plan::WEB_PORT)[0], RATE).unwrap();
    let slb = |args: &[&str]| {
        let (said, _) = expect(lab.gateway.slb(args).unwrap(), 0);
        said.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let at = "~ instance lab, group api, backend web-2: weight";
    assert_eq!(
        slb(&["backend", "weight", "lab", GUEST, "25", "--group", "api"]),
        [format!("{at} 20 -> 25"), "1 change; generation 2".to_owned()]
    );
    let [web, api] = guest(&lab);
    let heavy = api.replace("weight = 20", "weight = 25");
    assert_eq!(fs::read_to_string(&path).unwrap(), file.replace(&api, &heavy));

    assert_eq!(
        slb(&["backend", "remove", "lab", GUEST]),
        ["- instance lab, group default, backend web-2", "1 change; generation 3"]
    );
    let less = file.replace(&api, &heavy).replace(&web, "");
    assert_eq!(fs::read_to_string(&path).unwrap(), less);
    answers_more(&load, GOES_ON);

    let [v4, v6] = lab.host(GUEST).addresses().map(|address| address.to_string());
    let add = ["backend", "add", "lab", GUEST, "--address", &v4, &v6, "--weight", "20"];
    assert_eq!(
        slb(&add),
        ["+ instance lab, group default, backend web-2", "1 change; generation 4"]
    );
    lab.wait_all_healthy();
    slb(&["listener", "stop", "lab", "udp/5353"]);
    assert_eq!(lab.client.udp(vips(plan::UDP_PORT)[0], 1, 1).unwrap().ok(), 0);
    slb(&["listener", "start", "lab", "udp/5353"]);
    assert_eq!(slb(&["listener", "start", "lab", "udp/5353"]), ["no changes; generation 6"]);
    lab.wait_all_healthy();
    assert_eq!(lab.client.udp(vips(plan::UDP_PORT)[0], 9, 1).unwrap().ok(), 9);
    answers_more(&load, GOES_ON);

    // What is wrong changes neither.
    let (before, maps) = (fs::read_to_string(&path).unwrap(), Contents::read(&lab.gateway));
    let wrong: [(&[&str], i32, &str); 6] = [
        (&["backend", "weight", "lab", GUEST, "101"], 2, "from 0 to 100"),
        (&["backend", "weight", "lab", "web-9", "1"], 2, "there is web-1, "),
        (&["backend", "weight", "la", GUEST, "1"], 2, "there is lab"),
        (&["backend", "add", "lab", GUEST, "--address", "10.9.9.9"], 2, "web-2"),
        (&["backend", "add", "lab", "x", "--address", "nonsense"], 2, "nonsense"),
        (&["listener", "stop", "lab", "tcp"], 2, "tcp/80"),
    ];
    for (args, code, expected) in wrong {
        let (_, said) = expect(lab.gateway.slb(args).unwrap(), code);
        assert!(said.contains(expected), "{args:?}: {said}");
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), before);
    assert_eq!(Contents::read(&lab.gateway).differences(&maps), [""; 0]);
    assert_eq!(generation(&lab), 6);
    expect_unscathed(load);

    // Nothing is left over.
    let folder = path.parent().unwrap();
    let left = |name: &String| name.starts_with(".tmp");
    assert_eq!(names(folder).iter().filter(|name| left(name)).count(), 0);
}

#[test]
#[ignore = "needs root"]
fn given_a_stopped_listener_when_reloaded_then_its_port_is_free_and_the_others_go_on() {
    let lab = Lab::start();
    let load = Load::start(&lab.client, vips(plan::API_PORT)[0], RATE).unwrap();
    let web = format!("port = {}\nbackend_port", plan::WEB_PORT);
    edit(&lab.gateway, &web, &format!("enabled = false\n{web}"));
    let line = "~ instance lab, listener tcp/80: enabled true -> false";
    assert_eq!(reload(&lab), [line, "1 change; generation 2"]);
    let outcome = lab.client.http(vips(plan::WEB_PORT)[0], 5, 1).unwrap();
    assert_eq!(outcome.ok(), 0, "{outcome}");
    edit(&lab.gateway, "enabled = false\n", "");
    reload(&lab);
    lab.wait_all_healthy();
    let outcome = lab.client.http(vips(plan::WEB_PORT)[0], 50, 4).unwrap();
    assert_eq!((outcome.ok(), outcome.failed()), (50, 0), "{outcome}");
    answers_more(&load, GOES_ON);
    expect_unscathed(load);
}

#[test]
#[ignore = "needs root"]
fn given_what_a_running_agent_cannot_do_when_reloaded_then_it_says_so_and_nothing_changes() {
    let lab = Lab::start();
    let file = fs::read_to_string(lab.gateway.config()).unwrap();
    let before = Contents::read(&lab.gateway);
    let socket = lab.gateway.config().with_file_name("api.sock");
    let socket = socket.to_str().unwrap();
    let cases = [
        (socket.to_owned(), "/run/other.sock".to_owned(), "gateway.api cannot change"),
        ("\"lan0\"".to_owned(), "\"nope0\"".to_owned(), "nope0"),
    ];
    for (from, to, expected) in cases {
        fs::write(lab.gateway.config(), file.replace(&from, &to)).unwrap();
        let output = lab.gateway.slb(&["reload", "--api", socket]).unwrap();
        let (_, said) = expect(output, 1);
        assert!(said.contains(expected) && said.contains("nothing was changed"), "{said}");
        assert_eq!(generation_at(&lab, socket), 1);
    }
    fs::write(lab.gateway.config(), &file).unwrap();
    assert_eq!(Contents::read(&lab.gateway).differences(&before), [""; 0]);
    assert_eq!(links(&lab), ["lan0", "wan0"]);
    lab.wait_all_healthy();
    let outcome = lab.client.http(vips(plan::WEB_PORT)[0], 50, 4).unwrap();
    assert_eq!((outcome.ok(), outcome.failed()), (50, 0), "{outcome}");
}

fn generation_at(lab: &Lab, socket: &str) -> u64 {
    let output = lab.gateway.slb(&["status", "--json", "--api", socket]).unwrap();
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    status["generation"].as_u64().unwrap()
}

#[test]
#[ignore = "needs root"]
fn given_other_interfaces_when_reloaded_then_xdp_is_there_and_nowhere_else() {
    let lab = Lab::start();
    let both = fs::read_to_string(lab.gateway.config()).unwrap();
    let mode = |lab: &Lab| lab.gateway.status().unwrap()["interfaces"][0]["mode"].clone();
    assert_eq!(mode(&lab), "native");
    edit(&lab.gateway, "announce ", "xdp_mode = \"generic\"\nannounce ");
    assert_eq!(reload(&lab)[0], "~ gateway: xdp_mode auto -> generic");
    assert_eq!(mode(&lab), "generic");
    edit(&lab.gateway, "\"generic\"", "\"native\"");
    reload(&lab);
    assert_eq!(mode(&lab), "native");
    edit(&lab.gateway, "xdp_mode = \"native\"\n", "");
    edit(&lab.gateway, "\"wan0\", \"lan0\"", "\"wan0\"");
    reload(&lab);
    assert_eq!(links(&lab), ["wan0"]);
    fs::write(lab.gateway.config(), both).unwrap();
    reload(&lab);
    assert_eq!(links(&lab), ["lan0", "wan0"]);
    lab.wait_all_healthy();
    let outcome = lab.client.http(vips(plan::WEB_PORT)[0], 50, 4).unwrap();
    assert_eq!((outcome.ok(), outcome.failed()), (50, 0), "{outcome}");
}
