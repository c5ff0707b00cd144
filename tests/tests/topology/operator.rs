//! What operators of cloud load balancers expect of a listener and of a backend's life.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::Output,
    time::{Duration, Instant},
};

use serde_json::Value;
use slb_lab::{Load, gateway::backends};

use crate::support::{
    Lab, answers_more, edit, expect_unscathed, output,
    plan::{self, vips},
    wait_until,
};

/// Longer than any deadline here, and what the agent may be late.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection of a client that stays.
struct Held {
    stream: TcpStream,
    backend: String,
}

impl Held {
    /// Opens one, and learns who answers.
    fn open(lab: &Lab, to: SocketAddr) -> Self {
        let stream = lab.topology.clients[0].netns.run(|| TcpStream::connect(to)).unwrap().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut held = Self { stream, backend: String::new() };
        held.backend = held.ask().unwrap();
        held
    }

    /// Who answers a request.
    fn ask(&mut self) -> io::Result<String> {
        self.stream.write_all(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")?;
        let (mut bytes, mut buffer) = (Vec::new(), [0; 4_096]);
        loop {
            let text = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let value = |name: &str| {
                    let line = head.lines().find_map(|line| line.strip_prefix(name));
                    line.map(|value| value.trim().to_owned()).unwrap()
                };
                if body.len() >= value("content-length:").parse().unwrap() {
                    return Ok(value("x-backend:"));
                }
            }
            match self.stream.read(&mut buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => bytes.extend(&buffer[..n]),
            }
        }
    }

    /// Waits, without a word, until the connection is over.
    fn end(mut self) -> io::ErrorKind {
        match self.stream.read(&mut [0; 64]) {
            Ok(0) => io::ErrorKind::UnexpectedEof,
            Ok(_) => panic!("no client has asked"),
            Err(error) => error.kind(),
        }
    }
}

/// Connections until each of `names` has `count`.
fn hold(lab: &Lab, to: SocketAddr, names: &[&str], count: usize) -> Vec<Held> {
    let mut held: Vec<Held> = Vec::new();
    let has = |held: &[Held], name: &str| held.iter().filter(|it| it.backend == name).count();
    while names.iter().any(|name| has(&held, name) < count) {
        held.push(Held::open(lab, to));
        assert!(held.len() < 500, "not all of {names:?} are given connections");
    }
    held
}

/// What a command says that succeeds.
fn expect(output: Output) -> String {
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{complained}");
    said
}

fn slb(lab: &Lab, args: &[&str]) -> String {
    expect(lab.gateway.slb(args).unwrap())
}

/// What `slb status` has of a backend at its IPv4 address.
fn backend(lab: &Lab, port: u16, name: &str) -> Value {
    let status = lab.gateway.status().unwrap();
    let found = backends(&status, "tcp", port).into_iter().find(|backend| {
        backend["name"] == name && !backend["endpoint"].as_str().unwrap().starts_with('[')
    });
    found.unwrap_or_else(|| panic!("no {name} in {status:#}")).clone()
}

fn verdict(lab: &Lab, name: &str) -> u64 {
    lab.gateway.status().unwrap()["verdicts"][name]["packets"].as_u64().unwrap_or(0)
}

/// Connections that the kernel of a backend has on a port; those of health checks come and go.
fn connections(lab: &Lab, name: &str, port: u16) -> Vec<String> {
    let filter = format!("( sport = :{port} )");
    let text = output(&lab.host(name).netns, "ss", &["-Htn", "state", "established", &filter]);
    text.lines().map(str::to_owned).collect()
}

#[test]
#[ignore = "needs root"]
fn given_a_drained_backend_and_idle_connections_when_their_time_is_up_then_both_sides_are_reset() {
    let mut lab = Lab::prepare();
    edit(&lab.gateway, "port = 80\n", "port = 80\ndrain = \"10s\"\n");
    edit(&lab.gateway, "port = 81\n", "port = 81\nidle_timeout = \"10s\"\n");
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();

    let names = ["web-1", "web-2", "web-3", "web-4"];
    let mut web = hold(&lab, vips(plan::WEB_PORT)[0], &names, 2);
    web.extend(hold(&lab, vips(plan::WEB_PORT)[1], &names, 1));
    let idle = hold(&lab, vips(plan::API_PORT)[0], &["web-1", "web-4"], 1);
    let began = Instant::now();

    let said = slb(&lab, &["backend", "drain", "lab", "web-2"]);
    assert!(said.contains("web-2: drain false -> true"), "{said}");
    let status = backend(&lab, plan::WEB_PORT, "web-2");
    assert_eq!((&status["drains"], &status["active"]), (&true.into(), &false.into()), "{status}");
    let left = status["closes_in_seconds"].as_f64().unwrap();
    assert!((5.0..=11.0).contains(&left), "{status}");
    // No new ones, and the old ones go on, which is when they get entries.
    for held in &mut web {
        assert_eq!(held.ask().unwrap(), held.backend);
    }
    let given = web.iter().filter(|held| held.backend == "web-2").count();
    let counted = |lab: &Lab| {
        let status = lab.gateway.status().unwrap();
        let all = backends(&status, "tcp", plan::WEB_PORT).into_iter();
        let counts = all.filter(|it| it["name"] == "web-2").map(|it| it["active_flows"].as_u64());
        counts.map(Option::unwrap).sum::<u64>()
    };
    assert_eq!(counted(&lab), given as u64, "how many are left is shown");
    let new: Vec<Held> = (0..50).map(|_| Held::open(&lab, vips(plan::WEB_PORT)[0])).collect();
    assert!(new.iter().all(|held| held.backend != "web-2"));

    let (drained, mut others): (Vec<Held>, Vec<Held>) =
        web.into_iter().partition(|held| held.backend == "web-2");
    for held in drained {
        assert_eq!(held.end(), io::ErrorKind::ConnectionReset, "the client's side");
    }
    assert!(began.elapsed() >= Duration::from_secs(8), "not before the deadline");
    wait_until("the backend's side", || connections(&lab, "web-2", 8080).is_empty());
    for held in &mut others {
        assert_eq!(held.ask().unwrap(), held.backend, "no other backend's");
    }
    assert_eq!(counted(&lab), 0);

    for held in idle {
        assert_eq!(held.end(), io::ErrorKind::ConnectionReset, "the client's side");
    }
    for name in ["web-1", "web-4"] {
        wait_until("the backend's side", || connections(&lab, name, 8081).is_empty());
    }
    assert!(verdict(&lab, "closed") > 0);
    let events = slb(&lab, &["events"]);
    assert!(events.contains("web-2: drain false -> true"), "{events}");
    assert!(events.contains("connections were idle for too long"), "{events}");

    slb(&lab, &["backend", "drain", "lab", "web-2", "--stop"]);
    wait_until("it is back", || Held::open(&lab, vips(plan::WEB_PORT)[0]).backend == "web-2");
}

#[test]
#[ignore = "needs root"]
fn given_passive_checks_when_clients_are_refused_then_backends_are_probed_at_once() {
    let mut lab = Lab::prepare();
    // The next probe is far away.
    edit(&lab.gateway, "interval = \"500ms\"", "interval = \"50s\"");
    edit(&lab.gateway, "path = \"/healthz\"\n", "path = \"/healthz\"\npassive = true\n");
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();
    let load = Load::start(&lab.client, vips(plan::WEB_PORT)[0], 200).unwrap();
    answers_more(&load, 50);

    lab.server("web-4", plan::WEB).stop();
    wait_until("web-4 is out", || backend(&lab, plan::WEB_PORT, "web-4")["health"] == "unhealthy");
    let status = backend(&lab, plan::WEB_PORT, "web-4");
    let reason = status["reason"].as_str().unwrap();
    let expected = "connection refused; probed early, as it refused the last ";
    assert!(reason.starts_with(expected), "{status}");
    // The same backend of another listener is another matter.
    assert_eq!(backend(&lab, plan::API_PORT, "web-4")["health"], "healthy");
    answers_more(&load, 100);
    let _ = load.stop();
}

#[test]
#[ignore = "needs root"]
fn given_persistence_an_access_list_and_limits_when_reloaded_then_each_does_what_it_says() {
    let lab = Lab::start();
    let to = vips(plan::API_PORT);
    let before = lab.gateway.config();
    let plain = std::fs::read_to_string(&before).unwrap();
    let with = |text: &str| {
        std::fs::write(&before, plain.replace("port = 81\n", &format!("port = 81\n{text}")))
            .unwrap();
        slb(&lab, &["reload"]);
    };

    // Round robin, but a client stays where it is.
    with("persistence = \"10m\"\n");
    for to in to {
        let first = Held::open(&lab, to).backend;
        for _ in 0..20 {
            assert_eq!(Held::open(&lab, to).backend, first);
        }
        // Another weight does not matter, a weight of 0 does.
        slb(&lab, &["backend", "weight", "lab", &first, "1", "--group", "api"]);
        assert_eq!(Held::open(&lab, to).backend, first);
        slb(&lab, &["backend", "weight", "lab", &first, "0", "--group", "api"]);
        let second = Held::open(&lab, to).backend;
        assert_ne!(second, first);
        assert_eq!(Held::open(&lab, to).backend, second);
    }

    let sources = lab.topology.clients[0].addresses().map(|address| address.to_string());
    with(&format!("acl = {{ mode = \"deny\", sources = {sources:?} }}\n"));
    let client = &lab.topology.clients[0].netns;
    let attempt =
        |to: SocketAddr| TcpStream::connect_timeout(&to, Duration::from_millis(500)).is_ok();
    for to in to {
        assert!(!client.run(|| attempt(to)).unwrap(), "denied");
        let other = &lab.topology.clients[1].netns;
        assert!(other.run(|| attempt(to)).unwrap(), "another client");
        assert!(client.run(|| attempt(SocketAddr::new(to.ip(), plan::WEB_PORT))).unwrap());
    }
    assert!(verdict(&lab, "denied") > 0);
    with(&format!("acl = {{ mode = \"allow\", sources = {sources:?} }}\n"));
    for to in to {
        assert!(client.run(|| attempt(to)).unwrap(), "allowed");
        let other = &lab.topology.clients[1].netns;
        assert!(!other.run(|| attempt(to)).unwrap(), "another client");
    }

    with("limits = { new_flows = 50 }\n");
    let load = Load::start(&lab.client, to[0], 400).unwrap();
    wait_until("more begin than may", || verdict(&lab, "flow_limit") > 200);
    let _ = load.stop();
    with("limits = { bandwidth = \"8mbit\" }\n");
    let download = lab.client.download(to[0], 4_000_000).unwrap();
    // A tenth of a second's worth is ahead, and TCP needs a while to find its rate.
    let rate = download.bytes as f64 * 8.0 / download.elapsed.as_secs_f64();
    assert!(rate < 9_000_000.0, "{rate} bits per second");
    assert!(verdict(&lab, "bandwidth_limit") > 0);

    with("");
    let load = Load::start(&lab.client, to[0], 400).unwrap();
    answers_more(&load, 400);
    expect_unscathed(load);
}

#[test]
#[ignore = "needs root"]
fn given_flows_when_asked_about_then_they_are_listed_and_explained() {
    let lab = Lab::start();
    let held: Vec<Held> = (0..8).map(|_| Held::open(&lab, vips(plan::API_PORT)[0])).collect();
    let listed: Value = serde_json::from_str(&slb(&lab, &["flows", "--json"])).unwrap();
    for held in &held {
        let client = held.stream.local_addr().unwrap();
        let is_it = |flow: &&Value| flow["client"] == client.to_string();
        let flow = listed["flows"].as_array().unwrap().iter().find(is_it).unwrap();
        assert_eq!(
            (&flow["backend"], &flow["state"]),
            (&held.backend.as_str().into(), &"established".into())
        );
        assert_eq!(flow["listener"], "lab tcp/81");

        let (src, dst) = (client.to_string(), vips(plan::API_PORT)[0].to_string());
        let args = ["explain", "tcp", &src, &dst, "--established", "--json"];
        let explained: Value = serde_json::from_str(&slb(&lab, &args)).unwrap();
        assert_eq!(explained["verdict"], "forwarded", "{explained:#}");
        assert_eq!(explained["backend"], held.backend.as_str(), "{explained:#}");
    }
    let of_one = slb(&lab, &["flows", "--listener", "tcp/81", "--backend", &held[0].backend]);
    let count = held.iter().filter(|it| it.backend == held[0].backend).count();
    assert!(of_one.contains(&format!("{count} flows have an entry")), "{of_one}");

    // One that has not begun, through a listener whose flows need no entries.
    for to in vips(plan::WEB_PORT) {
        let next = Held::open(&lab, to);
        let client = next.stream.local_addr().unwrap();
        let said = slb(&lab, &["explain", "tcp", &client.to_string(), &to.to_string()]);
        assert!(said.contains(&format!("forwarded: to {}, ", next.backend)), "{said}");
        assert!(said.contains("settled: needs no entry"), "{said}");
    }
    let output = lab.gateway.slb(&["explain", "sctp", "192.0.2.1:1", "192.0.2.2:2"]).unwrap();
    assert_eq!(output.status.code(), Some(2));
}
