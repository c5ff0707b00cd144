//! `cargo xtask bench`: what a packet costs, and what clients get.
//!
//! `docs/performance.md` says how it is measured, and what it does not show.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};
use slb_lab::gateway;

use crate::{process, setup};

mod attack;
mod control;
mod end_to_end;
mod plot;
mod table;

/// Options of `cargo xtask bench`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Rounds, over which medians are taken
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only single packets
    #[arg(long)]
    packets: bool,
    /// Only clients through the lab, against other balancers that are installed
    #[arg(long)]
    end_to_end: bool,
    /// Only the agent, with a large configuration
    #[arg(long)]
    control: bool,
    #[command(flatten)]
    attack: attack::AttackOptions,
    /// Where the results go; by default `bench` in the target directory
    #[arg(long, value_name = "DIRECTORY")]
    out: Option<PathBuf>,
}

/// What was measured of one path.
#[derive(Debug, Deserialize)]
struct Row {
    name: String,
    group: String,
    flows: u32,
    verdict: Option<String>,
    /// Nanoseconds per packet, without the harness.
    median: f64,
    p10: f64,
    /// The same, round by round.
    rounds: Vec<f64>,
}

/// Measures, and writes JSON, tables and a plot.
///
/// # Errors
///
/// Not root, or something does not work.
pub(crate) fn run(options: &Options) -> Result<()> {
    if !process::is_root() {
        bail!("network namespaces and XDP take root");
    }
    setup::ensure(&setup::Options::default())?;
    let out = match &options.out {
        Some(out) => out.clone(),
        None => process::target()?.join("bench"),
    };
    fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    let is_attack = options.attack.attack.is_some();
    let is_all = !options.packets && !options.end_to_end && !options.control && !is_attack;
    if is_all || options.packets {
        packets(options, &out)?;
    }
    let takes_agent = is_all || options.end_to_end || options.control || is_attack;
    if takes_agent && std::env::var_os(gateway::BINARY_VARIABLE).is_none() {
        let slb = process::build_slb()?;
        // SAFETY: this program has only one thread so far.
        unsafe { std::env::set_var(gateway::BINARY_VARIABLE, slb) };
    }
    if is_all || options.control {
        let rows = control::measure()?;
        publish(&out, "control", &table::control(&rows), &rows)?;
    }
    if is_all || options.end_to_end {
        let rows = end_to_end::measure()?;
        publish(&out, "end-to-end", &table::end_to_end(&rows), &rows)?;
    }
    if is_attack {
        let rows = attack::measure(&options.attack)?;
        publish(&out, "attacks", &table::attacks(&rows), &rows)?;
    }
    println!("\nresults: {}", out.display());
    Ok(())
}

fn packets(options: &Options, out: &Path) -> Result<()> {
    let json = out.join("packets.json");
    let rounds = options.rounds.to_string();
    let mut command = process::cargo(["bench", "--package", "slb-tests", "--bench", "packets"]);
    process::run(command.args(["--", "--rounds", &rounds, "--out"]).arg(&json))?;
    let text = fs::read_to_string(&json).with_context(|| json.display().to_string())?;
    let rows: Vec<Row> = serde_json::from_str(&text)?;
    let table = table::packets(&rows);
    print!("\n{table}");
    write(&out.join("packets.md"), &table)?;
    let table = table::live(&rows);
    print!("\n{table}");
    write(&out.join("live.md"), &table)?;
    plot::flows(&rows, &out.join("flows.svg"))
}

/// Prints a table, and writes it beside what it was made of.
fn publish(out: &Path, name: &str, table: &str, rows: &impl Serialize) -> Result<()> {
    print!("\n{table}");
    write(&out.join(name).with_extension("md"), table)?;
    write(&out.join(name).with_extension("json"), &serde_json::to_string_pretty(rows)?)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| path.display().to_string())
}
