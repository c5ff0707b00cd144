//! Backends that have the VIP and answer by themselves: what `slb doctor` says is all that they need.

use std::{
    net::IpAddr,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use slb_lab::{Client, Gateway, Host, Server, Service, Topology, topology};
use tempfile::TempDir;

use crate::support::{make_generic, wait_healthy};

const HTTP: Service = Service::Http(80);
const UDP: Service = Service::Udp(53);

fn vips() -> [IpAddr; 2] {
    [topology::VIP_V4.into(), topology::VIP_V6.into()]
}

/// Where backends pin, each in a directory of its own; unmounted in the end.
struct Pins(TempDir);

impl Pins {
    fn create() -> Self {
        let directory =
            tempfile::Builder::new().prefix("slb-backends-").tempdir_in("/run").unwrap();
        mount(Some("bpf"), directory.path(), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        Self(directory)
    }

    fn of(&self, host: &Host) -> PathBuf {
        self.0.path().join(&host.name)
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        umount2(self.0.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

/// Gives a backend a line of its own to the clients, as it would have to the Internet.
fn line(topology: &Topology, host: &Host, number: u8) {
    let port = format!("{}-out", host.name);
    let name = host.netns.name();
    let fabric = &topology.fabric;
    fabric.ip(&format!("link add {port} type veth peer name eth1 netns {name}\n")).unwrap();
    fabric.ip(&format!("link set {port} master wan up")).unwrap();
    fabric.offload(&port, "tx", false).unwrap();
    host.netns.offload("eth1", "tx", false).unwrap();
    host.netns
        .ip(&format!(
            "addr add 192.0.2.{}/24 dev eth1\naddr add 2001:db8:1::{:x}/64 dev eth1 nodad\n\
             link set eth1 up\nlink set lo up",
            200 + number,
            0x200 + u16::from(number),
        ))
        .unwrap();
}

fn in_host(host: &Host, command: &mut Command) -> Output {
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    host.netns.spawn(command).unwrap().wait_with_output().unwrap()
}

/// What `slb doctor` says on a backend, and whether it is content.
fn doctor(gateway: &Gateway, pins: &Pins, host: &Host, mode: &str) -> (Vec<Value>, bool) {
    let mut command = Command::new(gateway.binary());
    command.args(["doctor", "--backend", mode, "--json", "--pins"]);
    command.arg(pins.of(host));
    for vip in vips() {
        command.arg("--vip").arg(vip.to_string());
    }
    let output = in_host(host, &mut command);
    let needs: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    (needs.as_array().unwrap().clone(), output.status.success())
}

/// Makes the backend what the mode asks for, by the commands that it is given.
fn cure(gateway: &Gateway, pins: &Pins, host: &Host, mode: &str) {
    let (needs, is_well) = doctor(gateway, pins, host, mode);
    assert!(!is_well, "{}, {mode}: well already: {needs:?}", host.name);
    for need in needs.iter().filter(|need| need["holds"] != true) {
        let command = need["commands"][0].as_str().unwrap();
        let slb = gateway.binary().display().to_string();
        let command = match command.strip_prefix("slb ") {
            Some(rest) => format!("{slb} {rest}"),
            None => command.to_owned(),
        };
        let output = in_host(host, Command::new("sh").args(["-c", &command]));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {command}: {said}", host.name);
    }
    let (needs, is_well) = doctor(gateway, pins, host, mode);
    assert!(is_well, "{}, {mode}: {needs:#?}", host.name);
}

fn instances(topology: &Topology, mode: &str) -> String {
    let [v4, v6] = vips();
    let mut text = format!("[[instance]]\nname = \"lab\"\nvips = [\"{v4}\", \"{v6}\"]\n");
    for (group, port) in [("web", 80), ("dns", 53)] {
        text += &format!("[[instance.group]]\nname = \"{group}\"\nforwarding = \"{mode}\"\n");
        for host in &topology.backends {
            text += &format!(
                "[[instance.group.backend]]\nname = \"{}\"\naddress = [\"{}\", \"{}\"]\n\
                 port = {port}\n",
                host.name, host.v4, host.v6,
            );
        }
    }
    for (group, protocol, port) in [("web", "tcp", 80), ("dns", "udp", 53)] {
        text += &format!(
            "[[instance.listener]]\nprotocol = \"{protocol}\"\nport = {port}\ngroup = \"{group}\"\n"
        );
    }
    text
}

fn serves(mode: &str, is_generic: bool) {
    let topology = Topology::build().unwrap();
    let mut gateway = Gateway::new(&topology, &instances(&topology, mode)).unwrap();
    if is_generic {
        make_generic(&gateway);
    }
    let pins = Pins::create();
    let mut servers = Vec::new();
    for (host, number) in topology.backends.iter().zip(1..) {
        line(&topology, host, number);
        cure(&gateway, &pins, host, mode);
        let addresses = [host.addresses(), vips()].concat();
        for service in [HTTP, UDP] {
            servers.push(Server::start_at(host, service, &host.name, &addresses).unwrap());
        }
    }
    // Last: datagrams stay with whom they were given to first.
    gateway.start().unwrap();
    wait_healthy(&gateway, &[("tcp", 80), ("udp", 53)], 8);
    let client = Client::new(&topology.clients[0]);
    for vip in vips() {
        let tcp = client.http((vip, 80).into(), 400, 8).unwrap();
        let udp = client.udp((vip, 53).into(), 400, 8).unwrap();
        for outcome in [tcp, udp] {
            assert_eq!(outcome.ok(), 400, "{mode}, {vip}: {outcome}");
            assert_eq!(outcome.per_backend.len(), 4, "{mode}, {vip}: {outcome}");
        }
        // Longer than a segment, both ways.
        let size = 2_000_000;
        let download = client.download((vip, 80).into(), size).unwrap();
        drop(download);
    }
    let verdicts = &gateway.status().unwrap()["verdicts"];
    assert_eq!(count(verdicts, "replied"), 0, "they answer by themselves: {verdicts}");
    assert!(count(verdicts, "forwarded") > 3_000, "{verdicts}");
    for host in &topology.backends {
        let output = in_host(
            host,
            Command::new(gateway.binary())
                .args(["decap", "eth0", "--remove", "--pins"])
                .arg(pins.of(host)),
        );
        assert_eq!(output.status.success(), mode != "dsr", "{}", host.name);
    }
    drop(servers);
}

fn count(verdicts: &Value, name: &str) -> u64 {
    verdicts[name]["packets"].as_u64().unwrap_or_default()
}

#[test]
#[ignore = "needs root"]
fn given_direct_return_when_backends_are_as_the_doctor_says_then_clients_are_served() {
    serves("dsr", false);
}

#[test]
#[ignore = "needs root"]
fn given_ip_in_ip_when_backends_are_as_the_doctor_says_then_clients_are_served() {
    serves("ipip", false);
}

#[test]
#[ignore = "needs root"]
fn given_gue_when_backends_are_as_the_doctor_says_then_clients_are_served() {
    serves("gue", false);
}

#[test]
#[ignore = "needs root"]
fn given_generic_mode_when_backends_answer_by_themselves_then_clients_are_served() {
    for mode in ["dsr", "ipip", "gue"] {
        serves(mode, true);
    }
}
