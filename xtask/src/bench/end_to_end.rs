//! The same clients and servers, through one balancer after the other.
//!
//! `wrk` asks for a small page, on connections that it keeps or makes anew, and `iperf3` sends as much as
//! goes through. Servers are nginx, one per backend.

use std::{
    fs,
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Serialize;
use slb_lab::{Gateway, Host, Netns, Topology, topology::VIP_V4};

use crate::process;

const HTTP: u16 = 8080;
const IPERF: u16 = 5201;
const SECONDS: u32 = 4;
/// Connections of `wrk` at a time.
const CONNECTIONS: u32 = 32;
/// Bound on what takes a moment.
const STARTED: Duration = Duration::from_secs(15);

/// What clients got through one balancer.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    /// Which.
    pub through: String,
    /// One TCP stream.
    pub gigabits: f64,
    /// Requests on connections that are kept.
    pub kept: Load,
    /// Requests on connections of their own.
    pub closed: Load,
}

/// What `wrk` says.
#[derive(Debug, Serialize)]
pub(super) struct Load {
    /// Requests.
    pub per_second: f64,
    /// Microseconds that half of them took at most.
    pub p50: f64,
    /// Microseconds that 99 of 100 took at most.
    pub p99: f64,
}

/// A process that ends with this.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // SIGTERM: nginx has to end its workers. It may have ended by itself.
        if let Ok(pid) = i32::try_from(self.0.id())
            && matches!(self.0.try_wait(), Ok(None))
        {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.0.wait();
    }
}

/// Measures every balancer that is there.
///
/// # Errors
///
/// `wrk`, `iperf3` or nginx is missing, or the lab does not work.
pub(super) fn measure() -> Result<Vec<Row>> {
    for tool in ["wrk", "iperf3", "nginx"] {
        if process::find(tool).is_none() {
            bail!("{tool} is missing: apt-get install wrk iperf3 nginx haproxy nftables");
        }
    }
    let scratch = tempfile::tempdir()?;
    let topology = Topology::build()?;
    let mut servers = Vec::new();
    for host in &topology.backends {
        servers.push(nginx(host, scratch.path())?);
        servers.push(spawn(&host.netns, Command::new("iperf3").args(["-s", "-p", "5201"]))?);
    }
    let mut rows = Vec::new();
    let direct = topology.backends[0].v4.to_string();
    rows.push(row("plain routing", &topology, &direct)?);

    topology.gateway.ip(&format!("addr add {VIP_V4}/32 dev wan0"))?;
    let vip = VIP_V4.to_string();
    for (name, start) in [
        ("nftables DNAT", nft as fn(&Topology, &Path) -> Result<Option<Process>>),
        ("HAProxy, TCP", haproxy),
        ("nginx stream", nginx_stream),
    ] {
        match start(&topology, scratch.path()) {
            Ok(balancer) => {
                rows.push(row(name, &topology, &vip)?);
                drop(balancer);
            }
            Err(why) => println!("{name}: left out: {why:#}"),
        }
    }
    // What nftables has set up would be in the way.
    let _ = in_gateway(&topology, "nft", &["flush", "ruleset"]);
    topology.gateway.ip(&format!("addr del {VIP_V4}/32 dev wan0"))?;

    for forwarding in ["nat", "full-nat"] {
        let mut gateway = Gateway::new(&topology, &instances(&topology, forwarding))?;
        gateway.start()?;
        gateway.wait("all backends healthy", STARTED, |status| {
            let found = slb_lab::gateway::backends(status, "tcp", HTTP);
            found.len() == topology.backends.len()
                && found.iter().all(|backend| backend["health"] == "healthy")
        })?;
        rows.push(row(&format!("slb, {forwarding}"), &topology, &vip)?);
    }
    drop(servers);
    Ok(rows)
}

fn instances(topology: &Topology, forwarding: &str) -> String {
    let mut text = format!("[[instance]]\nname = \"bench\"\nvips = [\"{VIP_V4}\"]\n");
    for (name, port, hosts) in
        [("web", HTTP, &topology.backends[..]), ("iperf", IPERF, &topology.backends[..1])]
    {
        text += &format!("[[instance.group]]\nname = \"{name}\"\nforwarding = \"{forwarding}\"\n");
        for host in hosts {
            text += &format!(
                "[[instance.group.backend]]\nname = \"{}\"\naddress = \"{}\"\nport = {port}\n",
                host.name, host.v4
            );
        }
    }
    for (group, port) in [("web", HTTP), ("iperf", IPERF)] {
        text += &format!(
            "[[instance.listener]]\nprotocol = \"tcp\"\nport = {port}\ngroup = \"{group}\"\n\
             health_check = {{ enabled = {} }}\n",
            group == "web"
        );
    }
    text
}

fn row(through: &str, topology: &Topology, to: &str) -> Result<Row> {
    println!("measuring {through}");
    let client = &topology.clients[0];
    let url = format!("http://{to}:{HTTP}/");
    // Neighbours and connections warm up.
    wrk(client, &url, 1, &[])?;
    let kept = wrk(client, &url, SECONDS, &[])?;
    let closed = wrk(client, &url, SECONDS, &["-H", "Connection: close"])?;
    let (port, seconds) = (IPERF.to_string(), SECONDS.to_string());
    let said = in_host(
        client,
        Command::new("iperf3").args(["-J", "-c", to, "-p", &port, "-t", &seconds]),
    )?;
    let said: serde_json::Value = serde_json::from_str(&said).context("iperf3's answer")?;
    let bits = said["end"]["sum_received"]["bits_per_second"].as_f64();
    let gigabits = bits.context("iperf3 received nothing")? / 1e9;
    Ok(Row { through: through.to_owned(), gigabits, kept, closed })
}

fn wrk(client: &Host, url: &str, seconds: u32, more: &[&str]) -> Result<Load> {
    let (duration, connections) = (format!("{seconds}s"), CONNECTIONS.to_string());
    let said = in_host(
        client,
        Command::new("wrk")
            .args(["-t", "1", "-c", &connections, "-d", &duration, "--latency"])
            .args(more)
            .arg(url),
    )?;
    let field =
        |name: &str| said.lines().find_map(|line| line.trim().strip_prefix(name)).map(str::trim);
    let time = |name: &str| field(name).and_then(microseconds).context("wrk tells no latency");
    let per_second = field("Requests/sec:").and_then(|text| text.parse().ok());
    Ok(Load {
        per_second: per_second.with_context(|| format!("wrk: {said}"))?,
        p50: time("50%")?,
        p99: time("99%")?,
    })
}

/// `1.23ms` and the like.
fn microseconds(text: &str) -> Option<f64> {
    let units = [("us", 1.0), ("ms", 1e3), ("s", 1e6)];
    units.into_iter().find_map(|(unit, factor)| {
        text.strip_suffix(unit)?.parse::<f64>().ok().map(|value| value * factor)
    })
}

fn in_host(host: &Host, command: &mut Command) -> Result<String> {
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let text = process::text(command);
    let output = host.netns.spawn(command)?.wait_with_output()?;
    if !output.status.success() {
        bail!("{text}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn in_gateway(topology: &Topology, program: &str, args: &[&str]) -> Result<()> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stderr(Stdio::piped());
    let output = topology.gateway.spawn(&mut command)?.wait_with_output()?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn spawn(netns: &Netns, command: &mut Command) -> Result<Process> {
    let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    netns.spawn(command).map(Process)
}

/// Waits until a server listens.
fn listening(netns: &Netns, addr: String) -> Result<()> {
    netns.run(|| {
        let deadline = Instant::now() + STARTED;
        while TcpStream::connect(&addr).is_err() {
            if Instant::now() > deadline {
                bail!("no server listens at {addr}");
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    })?
}

fn nginx(host: &Host, scratch: &Path) -> Result<Process> {
    let directory = scratch.join(&host.name);
    fs::create_dir(&directory)?;
    let at = directory.display();
    let config = format!(
        "daemon off;\nworker_processes 1;\npid {at}/pid;\nerror_log {at}/error.log;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log off; keepalive_requests 1000000; client_body_temp_path {at};\n\
         proxy_temp_path {at}; fastcgi_temp_path {at}; uwsgi_temp_path {at}; scgi_temp_path {at};\n\
         server {{ listen {}:{HTTP} backlog=4096; return 200 \"{}\\n\"; }} }}\n",
        host.v4, host.name
    );
    let file = directory.join("nginx.conf");
    fs::write(&file, config)?;
    let server = spawn(&host.netns, Command::new("nginx").arg("-c").arg(&file))?;
    listening(&host.netns, format!("{}:{HTTP}", host.v4))?;
    Ok(server)
}

fn nft(topology: &Topology, scratch: &Path) -> Result<Option<Process>> {
    let hosts: Vec<String> = topology
        .backends
        .iter()
        .enumerate()
        .map(|(n, host)| format!("{n} : {}", host.v4))
        .collect();
    let rules = format!(
        "table ip bench {{\nchain in {{\ntype nat hook prerouting priority -100;\n\
         ip daddr {VIP_V4} tcp dport {IPERF} dnat to {}\n\
         ip daddr {VIP_V4} tcp dport {HTTP} dnat to jhash ip saddr . tcp sport mod {} map {{ {} }}\n\
         }}\n}}\n",
        topology.backends[0].v4,
        hosts.len(),
        hosts.join(", ")
    );
    let file = scratch.join("rules.nft");
    fs::write(&file, rules)?;
    in_gateway(topology, "nft", &["-f", &file.display().to_string()])?;
    Ok(None)
}

fn haproxy(topology: &Topology, scratch: &Path) -> Result<Option<Process>> {
    let _ = in_gateway(topology, "nft", &["flush", "ruleset"]);
    let mut config =
        "global\n nbthread 2\n maxconn 5000\ndefaults\n mode tcp\n timeout connect 5s\n \
                      timeout client 60s\n timeout server 60s\n"
            .to_owned();
    for (port, hosts) in [(HTTP, &topology.backends[..]), (IPERF, &topology.backends[..1])] {
        config += &format!("listen p{port}\n bind {VIP_V4}:{port}\n balance roundrobin\n");
        for host in hosts {
            config += &format!(" server {} {}:{port}\n", host.name, host.v4);
        }
    }
    let file = scratch.join("haproxy.cfg");
    fs::write(&file, config)?;
    let balancer =
        spawn(&topology.gateway, Command::new("haproxy").arg("-db").arg("-f").arg(&file))?;
    listening(&topology.gateway, format!("{VIP_V4}:{HTTP}"))?;
    Ok(Some(balancer))
}

fn nginx_stream(topology: &Topology, scratch: &Path) -> Result<Option<Process>> {
    let directory = scratch.join("stream");
    fs::create_dir(&directory)?;
    let at = directory.display();
    let module = "/usr/lib/nginx/modules/ngx_stream_module.so";
    let load =
        if Path::new(module).exists() { format!("load_module {module};\n") } else { String::new() };
    let mut streams = String::new();
    for (port, hosts) in [(HTTP, &topology.backends[..]), (IPERF, &topology.backends[..1])] {
        let servers: String =
            hosts.iter().map(|host| format!("server {}:{port}; ", host.v4)).collect();
        streams += &format!(
            "upstream p{port} {{ {servers} }}\n\
             server {{ listen {VIP_V4}:{port} backlog=4096; proxy_pass p{port}; }}\n"
        );
    }
    let config = format!(
        "{load}daemon off;\nworker_processes 2;\npid {at}/pid;\nerror_log {at}/error.log;\n\
         events {{ worker_connections 16384; }}\nstream {{ {streams} }}\n"
    );
    let file = directory.join("nginx.conf");
    fs::write(&file, config)?;
    let balancer = spawn(&topology.gateway, Command::new("nginx").arg("-c").arg(&file))?;
    listening(&topology.gateway, format!("{VIP_V4}:{HTTP}"))?;
    Ok(Some(balancer))
}
