//! The agent has capabilities in effect only while it makes the calls that need them, and does all its work so.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use slb_lab::{Gateway, topology::VIP_V4};

use crate::support::{
    Lab, NOTICED, edit, output,
    plan::{self, vips},
    wait_until,
};

/// Numbers of capabilities(7): CHOWN, DAC_OVERRIDE, FOWNER, NET_BIND_SERVICE, NET_ADMIN, NET_RAW, PERFMON, BPF. The first
/// four are for an agent of root's only.
const PERMITTED: [u32; 8] = [0, 1, 3, 10, 12, 13, 38, 39];
/// Comes and goes.
const GUEST: &str = "web-2";
const NEW_PORT: u16 = 8_088;
/// Of a user that does not exist.
const OTHER_USER: u32 = 54_321;

/// What `/proc/PID/task/*/status` says of each thread of the agent.
fn threads(gateway: &Gateway) -> Vec<String> {
    let tasks = PathBuf::from(format!("/proc/{}/task", gateway.pid().unwrap()));
    let tasks = fs::read_dir(tasks).unwrap().map(|task| task.unwrap().path().join("status"));
    // A thread may end meanwhile.
    tasks.filter_map(|status| fs::read_to_string(status).ok()).collect()
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim()
}

fn set(status: &str, name: &str) -> u64 {
    u64::from_str_radix(field(status, name), 16).unwrap()
}

/// No thread of the agent has a capability in effect, or could get one that the agent does not need.
fn expect_least_rights(gateway: &Gateway) {
    let permitted = PERMITTED.into_iter().map(|number| 1_u64 << number).sum::<u64>();
    let all = threads(gateway);
    assert!(all.len() >= 4, "the log, the watchdog, two workers: {all:?}");
    for status in all {
        assert_eq!(set(&status, "CapPrm:") & !permitted, 0, "{status}");
        for name in ["CapInh:", "CapBnd:", "CapAmb:"] {
            assert_eq!(set(&status, name), 0, "{name} {status}");
        }
        assert_eq!(field(&status, "NoNewPrivs:"), "1", "{status}");
    }
    wait_until("no thread has a capability in effect", || {
        threads(gateway).iter().all(|status| set(status, "CapEff:") == 0)
    });
}

/// The kernel has refused nothing.
fn expect_no_refusal(gateway: &Gateway) {
    let log = fs::read_to_string(gateway.log()).unwrap();
    for refusal in ["not permitted", "denied", "capabilities"] {
        assert!(!log.contains(refusal), "{log}");
    }
}

fn reload(lab: &Lab) {
    let reloaded = lab.gateway.slb(&["reload"]).unwrap();
    assert!(reloaded.status.success(), "{reloaded:?}");
}

fn expect_served(lab: &Lab, port: u16) {
    for to in vips(port) {
        let outcome = lab.client.http(to, 50, 4).unwrap();
        assert_eq!((outcome.ok(), outcome.failed()), (50, 0), "{to}: {outcome}");
    }
}

#[test]
#[ignore = "needs root"]
fn agent_works_with_no_capability_in_effect_at_rest() {
    let mut lab = Lab::start();
    expect_least_rights(&lab.gateway);

    listener_is_added(&lab);
    lab.server(GUEST, plan::WEB).stop();
    lab.wait_health("tcp", plan::WEB_PORT, GUEST, "unhealthy");
    lab.server(GUEST, plan::WEB).restart().unwrap();
    lab.wait_health("tcp", plan::WEB_PORT, GUEST, "healthy");
    interface_comes_and_comes_back(&lab);
    expect_least_rights(&lab.gateway);

    for _ in 0..2 {
        lab.gateway.terminate().unwrap();
        lab.gateway.start().unwrap();
        lab.wait_all_healthy();
        expect_least_rights(&lab.gateway);
        expect_served(&lab, plan::WEB_PORT);
    }
    vips_are_announced_again(&lab);
    expect_least_rights(&lab.gateway);
    expect_no_refusal(&lab.gateway);
}

fn listener_is_added(lab: &Lab) {
    let file = fs::read_to_string(lab.gateway.config()).unwrap();
    let new = format!(
        "[[instance.listener]]\nprotocol = \"tcp\"\nport = {NEW_PORT}\nbackend_port = {}\n",
        plan::WEB.port()
    );
    fs::write(lab.gateway.config(), file + &new).unwrap();
    reload(lab);
    let healthy = |status: &serde_json::Value| {
        let backends = slb_lab::gateway::backends(status, "tcp", NEW_PORT);
        !backends.is_empty() && backends.iter().all(|backend| backend["health"] == "healthy")
    };
    lab.gateway.wait("the new listener's backends are healthy", NOTICED, healthy).unwrap();
    expect_served(lab, NEW_PORT);
}

/// The kernel drops the IPv6 VIP with the link, and neighbours learn both VIPs again.
fn vips_are_announced_again(lab: &Lab) {
    let problem = format!("VIP {VIP_V4} is not announced");
    let has_problem =
        |status: &serde_json::Value| status["problems"].to_string().contains(&problem);
    lab.topology.gateway.ip("link set wan0 down").unwrap();
    lab.gateway.wait("the VIP is not announced", NOTICED, has_problem).unwrap();
    lab.topology.gateway.ip("link set wan0 up").unwrap();
    lab.gateway.wait("it is", NOTICED, |status| !has_problem(status)).unwrap();
}

fn interface_comes_and_comes_back(lab: &Lab) {
    let gateway = &lab.topology.gateway;
    let has_xdp = || {
        let shown = output(gateway, "ip", &["-json", "link", "show", "dev", "late0"]);
        shown.contains("\"xdp\"")
    };
    gateway.ip("link add late0 type veth peer name late1\nlink set late0 up").unwrap();
    edit(&lab.gateway, "\"lan0\"", "\"lan0\", \"late0\"");
    reload(lab);
    assert!(has_xdp());
    gateway.ip("link del late0").unwrap();
    gateway.ip("link add late0 type veth peer name late1\nlink set late0 up").unwrap();
    wait_until("XDP is attached again", has_xdp);
}

#[test]
#[ignore = "needs root"]
fn agent_of_root_uses_the_files_of_another_user() {
    let mut lab = Lab::start();
    lab.gateway.terminate().unwrap();
    let folder = lab.gateway.config().parent().unwrap().to_owned();
    give_away(&folder);
    fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();

    lab.gateway.start().unwrap();
    lab.wait_all_healthy();
    edit(&lab.gateway, "weight = 20", "weight = 25");
    reload(&lab);
    let weighted = lab.gateway.slb(&["backend", "weight", "lab", GUEST, "30"]).unwrap();
    assert!(weighted.status.success(), "{weighted:?}");

    let file = fs::read_to_string(lab.gateway.config()).unwrap();
    assert!(file.contains("weight = 30"), "{file}");
    assert_eq!(fs::metadata(lab.gateway.config()).unwrap().uid(), OTHER_USER);
    expect_no_refusal(&lab.gateway);
}

/// Gives all that lies below `path` to [`OTHER_USER`].
fn give_away(path: &Path) {
    std::os::unix::fs::lchown(path, Some(OTHER_USER), None).unwrap();
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            give_away(&entry.unwrap().path());
        }
    }
}

/// Starts the agent without a capability.
fn start_without(gateway: &mut Gateway, capability: &str) -> anyhow::Result<()> {
    let log = fs::File::create(gateway.log()).unwrap();
    gateway.start_with(|command| {
        let mut without = Command::new("setpriv");
        without.args(["--bounding-set", &format!("-{capability}")]);
        without.arg(command.get_program()).args(command.get_args());
        without.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        *command = without;
    })
}

#[test]
#[ignore = "needs root"]
fn missing_capability_is_named_with_the_call_that_takes_it() {
    let mut lab = Lab::prepare();
    let error = start_without(&mut lab.gateway, "bpf").unwrap_err().to_string();
    assert!(error.contains("cannot load the eBPF object; it needs"), "{error}");
    assert!(error.contains("CAP_BPF"), "{error}");

    start_without(&mut lab.gateway, "net_raw").unwrap();
    let problem = "to open a raw socket takes CAP_NET_RAW";
    let has_problem = |status: &serde_json::Value| status["problems"].to_string().contains(problem);
    lab.gateway.wait("the problem is named", NOTICED, has_problem).unwrap();
}
