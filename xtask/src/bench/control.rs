//! What the agent takes for a large configuration: to start with it, and to change one weight in it.

use std::{
    fmt::Write as _,
    fs, io,
    os::unix::net::UnixDatagram,
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use anyhow::{Result, anyhow, bail};
use serde::Serialize;
use slb_lab::{Gateway, Netns, Topology};

const INSTANCES: u32 = 50;
/// Of each instance; each has a group of its own.
const LISTENERS: u32 = 50;
/// Of each group.
const BACKENDS: u32 = 4;
const STARTS: usize = 3;
const RESTARTS: usize = 7;
const CHANGES: usize = 31;
const READS: usize = 15;
const METRICS: &str = "127.0.0.1:9470";

/// What something took.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    /// What.
    pub what: String,
    /// Milliseconds, the median.
    pub median: f64,
    /// The longest of them.
    pub longest: f64,
}

/// Measures them, by a clock outside of the commands.
///
/// # Errors
///
/// The lab does not work.
pub(super) fn measure() -> Result<Vec<Row>> {
    let topology = Topology::build()?;
    let (first, restarts) = one_listener(&topology)?;
    // All behind one neighbour: the kernel's tables do not have room for as many by default.
    topology.gateway.ip(&format!("route add 10.128.0.0/9 via {}", topology.backends[0].v4))?;
    let mut starts = Vec::new();
    for start in 1..STARTS {
        let mut gateway = Gateway::new(&topology, &instances())?;
        starts.push(ready(&mut gateway)?);
        eprintln!("start {start} of {STARTS}");
    }
    let mut gateway = Gateway::new(&topology, &instances())?;
    let file = fs::read_to_string(gateway.config())?;
    let with_metrics = file.replacen("[gateway]\n", &format!("[gateway]\nhttp = {METRICS:?}\n"), 1);
    fs::write(gateway.config(), with_metrics)?;
    starts.push(ready(&mut gateway)?);
    let statuses = (0..READS).map(|_| milliseconds(|| status(&gateway)));
    let statuses = statuses.collect::<Result<_>>()?;
    let scrapes = (0..READS).map(|_| milliseconds(|| scrape(&topology.gateway)));
    let scrapes = scrapes.collect::<Result<_>>()?;
    // The agent reads the file ahead of the first edit; that is not what is measured.
    weight(&gateway, 0)?;
    let changes = (1..=CHANGES).map(|change| milliseconds(|| weight(&gateway, change)));
    let changes = changes.collect::<Result<_>>()?;
    let edits = (1..=CHANGES).map(|change| edit(&gateway, change)).collect::<Result<_>>()?;
    let large = restarted(&mut gateway)?;
    let backends = INSTANCES * LISTENERS * BACKENDS;
    Ok(vec![
        row("first start with one listener, until it is ready", first),
        row("restart with one listener, the programs being pinned", restarts),
        row(&format!("first start with {backends} backends, until it is ready"), starts),
        row("restart there, the programs being pinned", large),
        row("another weight there by the API, from the request to its answer", edits),
        row("`slb backend weight` there, from its start to its end", changes),
        row("`slb status` there, from its start to its end", statuses),
        row("a scrape of its metrics there, by curl", scrapes),
    ])
}

/// First starts with one listener and two backends that are checked, and starts after that.
fn one_listener(topology: &Topology) -> Result<(Vec<f64>, Vec<f64>)> {
    let [first, second] = [&topology.backends[0].v4, &topology.backends[1].v4];
    let instances = format!(
        "[[instance]]\nname = \"shop\"\nvips = [\"203.0.113.10\"]\nbackend = [\n  \
         {{ name = \"web-1\", address = \"{first}\" }},\n  \
         {{ name = \"web-2\", address = \"{second}\" }},\n]\n\
         listener = [{{ protocol = \"tcp\", port = 80, backend_port = 8080 }}]\n"
    );
    let (mut starts, mut restarts) = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let mut gateway = Gateway::new(topology, &instances)?;
        starts.push(ready(&mut gateway)?);
        restarts.extend(restarted(&mut gateway)?);
    }
    Ok((starts, restarts))
}

/// Stops the agent and starts it again, some times.
fn restarted(gateway: &mut Gateway) -> Result<Vec<f64>> {
    let restart = |gateway: &mut Gateway| {
        gateway.terminate()?;
        ready(gateway)
    };
    (0..RESTARTS).map(|_| restart(gateway)).collect()
}

/// Starts an agent, and gives the time until it tells the service manager that it is ready: its maps are in line, and
/// it follows the health of its backends.
fn ready(gateway: &mut Gateway) -> Result<f64> {
    let scratch = tempfile::tempdir()?;
    let path = scratch.path().join("notify");
    let socket = UnixDatagram::bind(&path)?;
    let told = thread::spawn(move || {
        let mut message = [0; 4_096];
        loop {
            let length = socket.recv(&mut message)?;
            if message[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1") {
                return io::Result::Ok(Instant::now());
            }
        }
    });
    let began = Instant::now();
    gateway.start_with(|command| {
        command.env("NOTIFY_SOCKET", &path).stdout(Stdio::null()).stderr(Stdio::null());
    })?;
    let at = told.join().map_err(|_| anyhow!("the thread that waits for it panicked"))??;
    Ok((at - began).as_secs_f64() * 1_000.0)
}

fn row(what: &str, mut times: Vec<f64>) -> Row {
    times.sort_by(f64::total_cmp);
    let (median, longest) = (times[times.len() / 2], times[times.len() - 1]);
    Row { what: what.to_owned(), median, longest }
}

fn milliseconds(run: impl FnOnce() -> Result<()>) -> Result<f64> {
    let began = Instant::now();
    run()?;
    Ok(began.elapsed().as_secs_f64() * 1_000.0)
}

fn status(gateway: &Gateway) -> Result<()> {
    let output = gateway.slb(&["status"])?;
    if !output.status.success() {
        bail!("slb status: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn scrape(netns: &Netns) -> Result<()> {
    let url = format!("http://{METRICS}/metrics");
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--fail", &url]).stdout(Stdio::null());
    if !netns.spawn(&mut curl)?.wait()?.success() {
        bail!("curl {url}");
    }
    Ok(())
}

/// Another weight for a backend in the middle; the command ends when the maps hold it.
fn weight(gateway: &Gateway, change: usize) -> Result<()> {
    let weight = (1 + change % 2).to_string();
    let output = gateway.slb(&["backend", "weight", "i25", "b2", &weight, "--group", "g25"])?;
    if !output.status.success() {
        bail!("slb backend weight: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The same by the API; milliseconds, without the time that curl takes to start.
fn edit(gateway: &Gateway, change: usize) -> Result<f64> {
    let place = r#""place": {"instance": "i25", "group": "g25", "backend": "b2"}"#;
    let body = format!(r#"{{"edit": "set-weight", {place}, "weight": {}}}"#, 1 + change % 2);
    let socket = gateway.config().with_file_name("api.sock");
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--fail", "--unix-socket"]).arg(socket);
    curl.args(["--json", &body, "--output", "/dev/null", "--write-out", "%{time_total}"]);
    let output = curl.arg("http://slb/v1/edit").output()?;
    if !output.status.success() {
        bail!("curl: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).parse::<f64>()? * 1_000.0)
}

/// Backends that are not checked, each with an address of its own.
fn instances() -> String {
    let mut text = String::new();
    let mut number = 0_u32;
    let mut line = |args: std::fmt::Arguments<'_>| {
        // To memory: cannot fail.
        let _ = writeln!(text, "{args}");
    };
    for instance in 0..INSTANCES {
        line(format_args!(
            "[[instance]]\nname = \"i{instance}\"\nvips = [\"203.0.113.{}\"]",
            1 + instance
        ));
        for group in 0..LISTENERS {
            line(format_args!("\n  [[instance.group]]\n  name = \"g{group}\""));
            for backend in 0..BACKENDS {
                let [_, _, high, low] = number.to_be_bytes();
                number += 1;
                line(format_args!(
                    "    [[instance.group.backend]]\n    name = \"b{backend}\"\n    \
                     address = \"10.200.{high}.{low}\"\n    port = 8080\n    weight = 100"
                ));
            }
        }
        for listener in 0..LISTENERS {
            line(format_args!(
                "\n  [[instance.listener]]\n  protocol = \"tcp\"\n  port = {}\n  \
                 scheduler = \"tch\"\n  group = \"g{listener}\"\n  \
                 health_check = {{ enabled = false }}",
                1_000 + listener
            ));
        }
    }
    text
}
