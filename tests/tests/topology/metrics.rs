//! What Prometheus reads, and what it makes of it.

use std::{
    io::Write as _,
    net::IpAddr,
    path::PathBuf,
    process::{Command, Stdio},
};

use slb_lab::{Host, Netns, gateway::backends};

use crate::support::{
    Lab, NOTICED, edit, flows, output,
    plan::{self, vips},
    wait_until,
};

const URL: &str = "http://127.0.0.1:9470/metrics";

fn scrape(netns: &Netns) -> String {
    output(netns, "curl", &["--silent", "--show-error", "--fail", "--max-time", "5", URL])
}

/// The value of a metric with these labels, in any order.
fn value(text: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let of_metric = text.lines().filter_map(|line| line.strip_prefix(name));
    let mut found = of_metric.filter(|line| line.starts_with(['{', ' '])).filter(|line| {
        labels.iter().all(|(key, value)| line.contains(&format!("{key}=\"{value}\"")))
    });
    found.next()?.rsplit(' ').next()?.parse().ok()
}

/// The program that `cargo xtask test` unpacks, or the one that is installed.
fn promtool() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("SLB_PROMTOOL") {
        return Some(path.into());
    }
    let paths = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&paths).map(|folder| folder.join("promtool"));
    found.into_iter().find(|path| path.is_file())
}

/// Runs it, unless there is none.
fn promtool_accepts(args: &[&str], input: &str) {
    let Some(promtool) = promtool() else {
        eprintln!("left out: no promtool; `cargo xtask test` gets it");
        return;
    };
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs");
    let mut command = Command::new(promtool);
    command.args(args).current_dir(docs).stdin(Stdio::piped());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(output.status.success(), "promtool {args:?}: {}", said.concat());
    // `check metrics` says what is not as it should be, and succeeds.
    assert_eq!(said[1], "", "promtool {args:?}");
}

#[test]
#[ignore = "needs root"]
fn given_traffic_when_scraped_then_the_numbers_are_right_and_go_on_after_a_restart() {
    let mut lab = Lab::start();
    let to = vips(plan::WEB_PORT)[0];
    let sent = lab.client.http(to, 400, 4).unwrap();
    assert_eq!((sent.ok(), sent.failed()), (400, 0), "{sent}");
    let netns = std::sync::Arc::clone(&lab.topology.gateway);
    let text = scrape(&netns);
    promtool_accepts(&["check", "metrics"], &text);

    let web = [("instance", "lab"), ("listener", "tcp/80")];
    assert_eq!(value(&text, "slb_listener_flows_total", &web), Some(400.0), "{text}");
    let status = lab.gateway.status().unwrap();
    let mut shares = 0.0;
    for Host { name, v4, .. } in &lab.topology.backends {
        let address = format!("{v4}:{}", plan::WEB.port());
        let labels =
            [&web[..], &[("backend", name.as_str()), ("address", address.as_str())]].concat();
        let count = sent.per_backend.get(name).copied().unwrap_or_default();
        assert_eq!(value(&text, "slb_backend_flows_total", &labels), Some(count as f64), "{name}");
        assert_eq!(flows(&status, "tcp", to, name), count);
        assert_eq!(value(&text, "slb_backend_up", &labels), Some(1.0));
        let took = value(&text, "slb_health_check_duration_seconds", &labels).unwrap();
        assert!((0.0..5.0).contains(&took), "{name}: {took}");
        let out = [&labels[..], &[("direction", "out")]].concat();
        assert!(value(&text, "slb_backend_packets_total", &out).unwrap() >= 2.0 * count as f64);
        shares += value(&text, "slb_backend_share", &labels).unwrap();
    }
    assert!((shares - 1.0).abs() < 1e-9, "{shares}");
    let forwarded = [("verdict", "forwarded")];
    assert!(value(&text, "slb_verdicts_total", &forwarded).unwrap() >= 1_200.0);
    let entries = value(&text, "slb_map_entries", &[("map", "SLB_LISTENERS")]);
    assert_eq!(entries, Some(12.0));

    lab.gateway.kill().unwrap();
    lab.gateway.start().unwrap();
    let after = scrape(&netns);
    assert_eq!(value(&after, "slb_listener_flows_total", &web), Some(400.0), "counted anew");

    // What a removed backend got was the listener's, and is still.
    let [web_2] = [plan::who(lab.host("web-2"))];
    edit(&lab.gateway, &format!("[[instance.backend]]\n{web_2}\nweight = 20\n"), "");
    assert!(lab.gateway.slb(&["reload"]).unwrap().status.success());
    let after = scrape(&netns);
    assert_eq!(value(&after, "slb_listener_flows_total", &web), Some(400.0));
    assert_eq!(value(&after, "slb_config_generation", &[]), Some(2.0));
}

#[test]
#[ignore = "needs root"]
fn given_a_failure_and_a_wrong_file_when_scraped_then_both_are_seen() {
    const DEAD: &str = "web-3";
    let mut lab = Lab::start();
    lab.server(DEAD, plan::WEB).stop();
    lab.wait_health("tcp", plan::WEB_PORT, DEAD, "unhealthy");
    append(&lab, "[[nonsense\n");
    assert_eq!(lab.gateway.slb(&["reload"]).unwrap().status.code(), Some(2));
    let text = scrape(&lab.topology.gateway);
    let address = format!("{}:{}", lab.host(DEAD).v4, plan::WEB.port());
    let labels = [("listener", "tcp/80"), ("backend", DEAD), ("address", address.as_str())];
    assert_eq!(value(&text, "slb_backend_up", &labels), Some(0.0), "{text}");
    assert_eq!(value(&text, "slb_backend_expected_share", &labels), Some(0.0));
    assert_eq!(value(&text, "slb_health_transitions_total", &labels), Some(2.0), "up, down");
    assert_eq!(value(&text, "slb_reload_failures_total", &[]), Some(1.0));
    assert!(value(&text, "slb_problems", &[]).unwrap() >= 1.0);
}

/// Adds to the configuration file.
fn append(lab: &Lab, text: &str) {
    let path = lab.gateway.config();
    let before = std::fs::read_to_string(&path).unwrap();
    std::fs::write(path, before + text).unwrap();
}

#[test]
#[ignore = "needs root"]
fn given_an_address_that_is_taken_when_started_then_it_is_told_and_metrics_come_when_it_is_free() {
    let mut lab = Lab::prepare();
    let taken = lab
        .topology
        .gateway
        .run(|| std::net::TcpListener::bind((IpAddr::from([127, 0, 0, 1]), 9_470)).unwrap());
    lab.gateway.start().unwrap();
    let is_told =
        |status: &serde_json::Value| status["problems"].to_string().contains("127.0.0.1:9470");
    lab.gateway.wait("the problem is told", NOTICED, is_told).unwrap();
    lab.wait_all_healthy();
    drop(taken);
    lab.gateway.wait("it is over", NOTICED, |status| !is_told(status)).unwrap();
    assert!(scrape(&lab.topology.gateway).contains("slb_build_info"));

    // Elsewhere, and then nowhere.
    edit(&lab.gateway, "announce ", "http = \"[::1]:9999\"\nannounce ");
    assert!(lab.gateway.slb(&["reload"]).unwrap().status.success());
    let at = |url: &str| {
        let args = ["--silent", "--max-time", "5", "--globoff", url];
        let curl = || Command::new("curl").args(args).output();
        lab.topology.gateway.run(curl).unwrap().unwrap().status.success()
    };
    assert!(at("http://[::1]:9999/metrics"));
    wait_until("the old one is given up", || !at(URL));
    edit(&lab.gateway, "\"[::1]:9999\"", "\"off\"");
    assert!(lab.gateway.slb(&["reload"]).unwrap().status.success());
    wait_until("it is off", || !at("http://[::1]:9999/metrics"));
    assert!(!backends(&lab.gateway.status().unwrap(), "tcp", plan::WEB_PORT).is_empty());
}

#[test]
#[ignore = "needs promtool"]
fn given_the_alert_rules_when_tested_then_they_fire_when_they_should_and_not_before() {
    promtool_accepts(&["check", "rules", "alerts.yml"], "");
    promtool_accepts(&["test", "rules", "alerts.test.yml"], "");
}
