//! `cargo xtask test`.

use std::{path::Path, process::Command};

use anyhow::Result;
use clap::Args;
use slb_lab::{gateway::BINARY_VARIABLE, workers};

use crate::{deb, fuzz, process, setup, times::Times, verify};

/// Options of `cargo xtask test`.
#[derive(Debug, Default, Args)]
pub(crate) struct Options {
    /// Only the tests of the host's code and of single packets: what to run after each change
    #[arg(long)]
    quick: bool,
    /// Only tests whose names contain one of these
    #[arg(value_name = "NAME")]
    names: Vec<String>,
}

/// Tests that run beside each other, as nextest's filters have them.
struct Suite {
    name: &'static str,
    filter: &'static str,
}

/// Units, the lab itself, and single packets.
const QUICK: Suite =
    Suite { name: "host and verdict tests", filter: "not (binary(topology) or binary(systemd))" };
/// What runs the agent.
const AGENT: Suite =
    Suite { name: "topology and systemd tests", filter: "binary(topology) or binary(systemd)" };

/// For how long each fuzz target runs, in seconds.
const FUZZ: u32 = 3;

/// Tests of the host's code, those that need a kernel, the fuzz targets for a moment, then [`verify`]; a table says how
/// long each took.
///
/// # Errors
///
/// Set-up, the build or a test fails.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut times = Times::start();
    let result = parts(options, &mut times);
    times.print();
    result
}

fn parts(options: &Options, times: &mut Times) -> Result<()> {
    times.part("set-up", || setup::ensure(&setup::Options::default()))?;
    let root = process::is_root();
    let slb = (!options.quick).then(|| times.part("build slb", process::build_slb)).transpose()?;
    times.part("build tests", || process::run(nextest().arg("--no-run")))?;

    let workers = Workers;
    let mut result = times.part(QUICK.name, || QUICK.run(options, root, None));
    drop(workers);
    if let Some(slb) = &slb {
        let machine =
            || setup::machine::ensure(&setup::Options::default(), &mut setup::Report::default());
        if root && let Err(why) = machine() {
            println!("No machine with systemd, so the tests of slb.service fail: {why:#}");
        }
        let agent = times.part(AGENT.name, || AGENT.run(options, root, Some(slb)));
        result = result.and(agent);
    }
    let is_all = !options.quick && options.names.is_empty();
    if is_all {
        result = result.and(times.part("fuzz targets", || fuzz::briefly(FUZZ)));
    }
    if !root {
        println!(
            "Left out: the tests marked `ignored`, which load programs and make network \
             namespaces, and `cargo xtask verify`. They run when this is started as root."
        );
        return result;
    }
    if is_all {
        result = result.and(times.part("verify", || verify::run(&verify::Options::default())));
    }
    result
}

impl Suite {
    fn run(&self, options: &Options, root: bool, slb: Option<&Path>) -> Result<()> {
        let mut command = nextest();
        command.args(["--filterset", self.filter]);
        if root {
            command.args(["--run-ignored", "all"]);
        }
        if !options.names.is_empty() {
            command.arg("--no-tests=pass").args(&options.names);
        }
        if let Some(slb) = slb {
            command.env(BINARY_VARIABLE, slb);
            match deb::fetch("prometheus") {
                Ok((_, folder)) => {
                    command.env("SLB_PROMTOOL", folder.join("usr/bin/promtool"));
                }
                Err(why) => println!("No promtool, unless there is one in the path: {why:#}"),
            }
        }
        process::run(&mut command)
    }
}

/// Of the workspace's default members.
fn nextest() -> Command {
    process::cargo(["nextest", "run"])
}

/// Removes the datapaths that the verdict tests share, when they have run.
struct Workers;

impl Drop for Workers {
    fn drop(&mut self) {
        if process::is_root()
            && let Err(why) = workers::remove_stale()
        {
            println!("Left: {why:#}");
        }
    }
}
