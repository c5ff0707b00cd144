//! How many flows each backend gets.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets};
use slb_lab::{Host, Lab, Outcome, gateway, interrupt, plan};

use super::report::{self, Report};

/// A share may be off by this much, as a part of all.
const TOLERANCE: f64 = 0.01;
/// Exchanges at a time.
const CONCURRENCY: usize = 64;

/// Traffic to one listener, over one address family.
struct Traffic {
    name: &'static str,
    protocol: &'static str,
    port: u16,
    scheduler: &'static str,
    /// Whether the group has the backend of weight 0.
    spare: bool,
}

const TRAFFIC: [Traffic; 3] = [
    Traffic { name: "TCP", protocol: "tcp", port: plan::WEB_PORT, scheduler: "tch", spare: false },
    Traffic { name: "UDP", protocol: "udp", port: plan::UDP_PORT, scheduler: "wrr", spare: false },
    Traffic { name: "TCP", protocol: "tcp", port: plan::API_PORT, scheduler: "wrr", spare: true },
];

/// Sends `count` exchanges to every listener with weights, over IPv4 and IPv6.
pub(super) fn show(lab: &Lab, report: &mut Report, count: u32) -> Result<()> {
    for traffic in TRAFFIC {
        for (vip, family) in plan::vips(traffic.port).into_iter().zip(["IPv4", "IPv6"]) {
            interrupt::check()?;
            one(lab, report, &traffic, vip, family, count)?;
        }
    }
    Ok(())
}

fn one(
    lab: &Lab,
    report: &mut Report,
    traffic: &Traffic,
    to: SocketAddr,
    family: &str,
    count: u32,
) -> Result<()> {
    let Traffic { name, protocol, scheduler, .. } = *traffic;
    let udp = protocol == "udp";
    let what = if udp { "exchanges, each from its own port" } else { "new connections" };
    report.step(&format!("{name} over {family}: {count} {what} to {to} ({scheduler})"));
    let count = usize::try_from(count).context("a count fits into memory")?;
    let outcome = if udp {
        lab.client.udp(to, count, CONCURRENCY)?
    } else {
        lab.client.http(to, count, CONCURRENCY)?
    };
    interrupt::check()?;

    let all_hold = table(lab, report, traffic, to, &outcome)?;
    report.check(all_hold, "every share within 1 percentage point of its weight");
    let failed = outcome.failed();
    report.check(failed == 0, &format!("{failed} failed ({outcome})"));
    Ok(())
}

/// Shows the share of each backend, and returns whether all are as their weights say.
fn table(
    lab: &Lab,
    report: &mut Report,
    traffic: &Traffic,
    to: SocketAddr,
    outcome: &Outcome,
) -> Result<bool> {
    let Traffic { protocol, port, spare, .. } = *traffic;
    let status = lab.gateway.status()?;
    let hosts = &lab.topology.backends;
    let mut rows: Vec<(&str, &Host, u32)> = hosts
        .iter()
        .zip(plan::WEIGHTS)
        .map(|(host, weight)| (host.name.as_str(), host, weight))
        .collect();
    if spare && let Some(host) = hosts.last() {
        rows.push((plan::SPARE, host, 0));
    }
    let total: u32 = plan::WEIGHTS.iter().sum();

    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["backend", "weight", "expected", "actual", "answers", "state", ""]);
    for column in 1..=4 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut all_hold = true;
    for (name, host, weight) in rows {
        let (expected, actual) = (f64::from(weight) / f64::from(total), outcome.share(name));
        // Weight 0 is a promise, not a share.
        let holds = (actual - expected).abs() <= if weight == 0 { 0.0 } else { TOLERANCE };
        all_hold &= holds;
        let address = if to.is_ipv4() { host.v4.into() } else { host.v6.into() };
        let state = gateway::health(&status, protocol, port, name, address).unwrap_or("missing");
        table.add_row([
            name.to_owned(),
            weight.to_string(),
            format!("{:.2} %", expected * 100.0),
            format!("{:.2} %", actual * 100.0),
            outcome.per_backend.get(name).copied().unwrap_or(0).to_string(),
            state.to_owned(),
            report::word(holds).to_owned(),
        ]);
    }
    for line in table.to_string().lines() {
        report.seen(line);
    }
    Ok(all_hold)
}
