//! What is attacked: listeners of every scheduler and forwarding mode, with servers behind them.

use std::{
    net::SocketAddrV4,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use slb_lab::{Host, Server, Service, Topology, gateway, topology::VIP_V4};
use tempfile::TempDir;

/// A listener, and how it balances.
pub(super) struct Listener {
    pub protocol: &'static str,
    pub port: u16,
    pub forwarding: &'static str,
    pub scheduler: &'static str,
    /// More lines of its configuration.
    pub more: &'static str,
}

const PERSISTENT: &str = "persistence = \"1m\"\n";

/// All of them. A backend's port is its listener's, but where packets keep their destination another.
pub(super) const LISTENERS: [Listener; 11] = [
    listener("tcp", 80, "nat", "tch", ""),
    listener("tcp", 81, "nat", "wrr", ""),
    listener("tcp", 82, "nat", "wlc", ""),
    listener("tcp", 83, "nat", "wrr", PERSISTENT),
    listener("tcp", 84, "full-nat", "tch", ""),
    listener("tcp", 85, "full-nat", "wrr", ""),
    listener("tcp", 86, "ipip", "wrr", ""),
    listener("udp", 53, "nat", "wrr", ""),
    listener("udp", 54, "full-nat", "wrr", ""),
    listener("udp", 55, "gue", "tch", ""),
    listener("udp", 443, "nat", "qch", ""),
];

const fn listener(
    protocol: &'static str,
    port: u16,
    forwarding: &'static str,
    scheduler: &'static str,
    more: &'static str,
) -> Listener {
    Listener { protocol, port, forwarding, scheduler, more }
}

impl Listener {
    /// Where its servers listen.
    fn service(&self) -> Service {
        let port = if self.is_tunnel() { self.port } else { 8_000 + self.port };
        if self.protocol == "tcp" { Service::Http(port) } else { Service::Udp(port) }
    }

    fn is_tunnel(&self) -> bool {
        matches!(self.forwarding, "ipip" | "gue")
    }
}

/// Hosts and servers. The order of the fields is the order in which it ends.
pub(super) struct Site {
    _servers: Vec<Server>,
    pub topology: Topology,
    _pins: Pins,
}

impl Site {
    /// Starts everything but the gateway's agent.
    ///
    /// # Errors
    ///
    /// A namespace cannot be made, or a server does not start.
    pub(super) fn build() -> Result<Self> {
        let topology = Topology::build()?;
        // What is answered to forged addresses goes to the attacker, who is the way to the Internet.
        let attacker = &topology.clients[1];
        topology.gateway.ip(&format!("route add default via {}", attacker.v4))?;
        let pins = Pins::create()?;
        let mut servers = Vec::new();
        for (host, number) in topology.backends.iter().zip(1..) {
            take_tunnels(&topology, host, number, &pins)?;
            for listener in &LISTENERS {
                let mut addresses = vec![host.v4.into()];
                if listener.is_tunnel() {
                    addresses.push(VIP_V4.into());
                }
                let service = listener.service();
                servers.push(Server::start_at(host, service, &host.name, &addresses)?);
            }
        }
        Ok(Self { _servers: servers, topology, _pins: pins })
    }

    /// The configuration, without `[gateway]`.
    pub(super) fn instances(&self) -> String {
        let mut text = format!("[[instance]]\nname = \"bench\"\nvips = [\"{VIP_V4}\"]\n");
        for listener in &LISTENERS {
            let Listener { protocol, port, forwarding, .. } = listener;
            text += &format!(
                "[[instance.group]]\nname = \"{protocol}-{port}\"\nforwarding = \"{forwarding}\"\n"
            );
            for host in &self.topology.backends {
                text += &format!(
                    "[[instance.group.backend]]\nname = \"{}\"\naddress = \"{}\"\nport = {}\n",
                    host.name,
                    host.v4,
                    listener.service().port()
                );
            }
        }
        for Listener { protocol, port, scheduler, more, .. } in &LISTENERS {
            let check =
                if *protocol == "udp" { "send = \"ping\"\nreceive = \"ping\"\n" } else { "" };
            text += &format!(
                "[[instance.listener]]\nprotocol = \"{protocol}\"\nport = {port}\n\
                 group = \"{protocol}-{port}\"\nscheduler = \"{scheduler}\"\n{more}\
                 [instance.listener.health_check]\ninterval = \"1s\"\nhealthy = 1\n{check}"
            );
        }
        text
    }

    /// Where TCP is served, on the backends' own addresses.
    pub(super) fn servers_of_tcp(&self) -> Vec<SocketAddrV4> {
        let of_host = |host: &Host| {
            let host = host.v4;
            let tcp = LISTENERS.iter().filter(|listener| listener.protocol == "tcp");
            tcp.map(move |listener| SocketAddrV4::new(host, listener.service().port()))
        };
        self.topology.backends.iter().flat_map(of_host).collect()
    }
}

/// Where `slb decap` pins, a directory for each backend; unmounted in the end.
struct Pins(TempDir);

impl Pins {
    fn create() -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("slb-backends-").tempdir_in("/run")?;
        mount(Some("bpf"), directory.path(), Some("bpf"), MsFlags::empty(), None::<&str>)
            .context("mounting bpffs")?;
        Ok(Self(directory))
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        if let Err(error) = umount2(self.0.path(), MntFlags::MNT_DETACH) {
            eprintln!("lab: {}: {error}", self.0.path().display());
        }
    }
}

/// Gives a backend the VIP, takes packets to it out of their tunnels, and sends what it answers as the VIP by a line of
/// its own to the clients.
fn take_tunnels(topology: &Topology, host: &Host, number: u8, pins: &Pins) -> Result<()> {
    let port = format!("{}-out", host.name);
    let name = host.netns.name();
    topology.fabric.ip(&format!(
        "link add {port} type veth peer name eth1 netns {name}\nlink set {port} master wan up"
    ))?;
    topology.fabric.offload(&port, "tx", false)?;
    host.netns.offload("eth1", "tx", false)?;
    for (key, value) in
        [("all/arp_ignore", "1"), ("all/arp_announce", "2"), ("eth0/rp_filter", "2")]
    {
        host.netns.sysctl(&format!("ipv4/conf/{key}"), value)?;
    }
    host.netns.ip(&format!(
        "addr add {VIP_V4}/32 dev lo\naddr add 192.0.2.{}/32 dev eth1\nlink set eth1 up\n\
         route add 192.0.2.0/24 dev eth1 table 100\nrule add from {VIP_V4} lookup 100",
        200 + number,
    ))?;
    let mut command = Command::new(gateway::binary()?);
    command.args(["decap", "eth0", "--pins"]).arg(pins.0.path().join(&host.name));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = host.netns.spawn(&mut command)?.wait_with_output()?;
    if !output.status.success() {
        bail!("slb decap: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
