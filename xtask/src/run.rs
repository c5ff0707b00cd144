//! `cargo xtask run`: the lab, with real traffic through the balancer.

use std::{thread, time::Duration};

use anyhow::{Result, bail};
use clap::Args;
use slb_lab::{Lab, Topology, gateway, interrupt, plan};

use crate::{process, setup};
use report::Report;

mod failover;
mod report;
mod shares;

/// Options of `cargo xtask run`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// End when everything has been shown, with exit code 0 only if all of it held
    #[arg(long)]
    once: bool,
    /// New connections (TCP) and exchanges (UDP) per table
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1000..))]
    connections: u32,
}

/// Bound on what the agent notices: a start, a backend that is down, one that is up again.
const NOTICED: Duration = Duration::from_secs(10);

/// Sets up, builds, and shows.
///
/// # Errors
///
/// Something did not work, or something that was shown did not hold.
pub(crate) fn run(options: &Options) -> Result<()> {
    if !process::is_root() {
        bail!(
            "network namespaces and XDP take root: sudo env PATH=\"$PATH\" HOME=\"$HOME\" cargo \
             xtask run"
        );
    }
    setup::ensure(&setup::Options::default())?;
    let slb = process::build_slb()?;
    interrupt::install()?;
    // SAFETY: this program has only one thread so far.
    unsafe { std::env::set_var(gateway::BINARY_VARIABLE, slb) };

    let mut report = Report::default();
    let mut lab = build(&mut report)?;
    shares::show(&lab, &mut report, options.connections)?;
    failover::primary_and_secondary(&mut lab, &mut report)?;
    failover::weighted(&mut lab, &mut report)?;

    let failures = report.close();
    if failures > 0 {
        println!("What became of packets: {}", lab.gateway.status()?["verdicts"]);
    }
    if !options.once {
        explain(&lab);
        while !interrupt::requested() {
            thread::sleep(Duration::from_millis(100));
        }
        println!("\nCleaning up.");
    }
    drop(lab);
    match failures {
        0 => Ok(()),
        1 => bail!("one thing did not hold"),
        n => bail!("{n} things did not hold"),
    }
}

fn build(report: &mut Report) -> Result<Lab> {
    report.step("Building the lab: 2 clients, a gateway, 4 backends, each a network namespace");
    let mut lab = Lab::prepare()?;
    report.seen(
        "clients 192.0.2.0/24 and 2001:db8:1::/64 on wan0, backends 10.0.0.0/24 and \
                 2001:db8:10::/64 on lan0",
    );
    report.seen(&format!("{} servers: HTTP and UDP, on IPv4 and IPv6", lab.servers.len()));

    report.step("Starting slb on the gateway");
    let gateway = &mut lab.gateway;
    report.seen(&format!(
        "{} run --config {}",
        gateway.binary().display(),
        gateway.config().display()
    ));
    gateway.start()?;
    let status = gateway.status()?;
    for interface in status["interfaces"].as_array().into_iter().flatten() {
        report.seen(&format!(
            "{}: XDP {}{}",
            interface["name"].as_str().unwrap_or("?"),
            interface["mode"].as_str().unwrap_or("?"),
            interface["reason"].as_str().map(|why| format!(" ({why})")).unwrap_or_default()
        ));
    }
    let took = lab.wait_all_healthy(NOTICED)?;
    report.seen(&format!("all backends healthy after {} ms", took.as_millis()));
    Ok(lab)
}

/// How to look into the lab while it is up.
fn explain(lab: &Lab) {
    let Topology { clients, gateway, fabric, .. } = &lab.topology;
    let inside = |path: std::path::PathBuf| format!("nsenter --net={}", path.display());
    let on_gateway = inside(gateway.path());
    let slb = format!("{on_gateway} {}", lab.gateway.binary().display());
    let config = lab.gateway.config();
    let config = config.display();
    let [v4, v6] = plan::vips(plan::WEB_PORT);
    let client = clients.first().map(|host| inside(host.netns.path())).unwrap_or_default();
    println!("\nThe lab stays up until Ctrl-C. To look into it, as root in another terminal:");
    let hints = [
        ("what slb says", format!("{slb} status --config {config}")),
        ("its log", format!("tail -f {}", lab.gateway.log().display())),
        ("a request as a client, IPv4", format!("{client} curl -i http://{v4}/")),
        ("a request as a client, IPv6", format!("{client} curl -i 'http://{v6}/'")),
        ("what is attached", format!("{on_gateway} bpftool net list")),
        ("what is pinned", format!("find {}", lab.gateway.pins().display())),
        (
            "a map",
            format!("bpftool map dump pinned {}/<one of those>", lab.gateway.pins().display()),
        ),
        ("a backend dies silently", format!("ip -n {} link set web-2 down", fabric.name())),
        ("and comes back", format!("ip -n {} link set web-2 up", fabric.name())),
    ];
    for (what, command) in hints {
        println!("  {what}:\n      {command}");
    }
}
