//! `cargo xtask test`.

use std::process::Command;

use anyhow::Result;
use slb_tests::gateway::BINARY_VARIABLE;

use crate::{deb, process, setup, verify};

/// Unit tests, those that cross packages or need a kernel, then [`verify`].
///
/// # Errors
///
/// Set-up, the build or a test fails.
pub fn run() -> Result<()> {
    setup::ensure(&setup::Options::default())?;
    let slb = process::build_slb()?;
    let root = process::is_root();

    let mut units = process::cargo(["test", "--workspace", "--no-fail-fast"]);
    units.args(["--exclude", "slb-ebpf", "--exclude", "slb-tests"]);
    let units = process::run(with_ignored(&mut units, root, &[]));

    let mut kernel = process::cargo(["test", "--package", "slb-tests", "--no-fail-fast"]);
    kernel.env(BINARY_VARIABLE, slb);
    match deb::fetch("prometheus") {
        Ok((_, folder)) => drop(kernel.env("SLB_PROMTOOL", folder.join("usr/bin/promtool"))),
        Err(why) => println!("No promtool, unless there is one in the path: {why:#}"),
    }
    if root && let Err(why) = setup::machine::ensure() {
        println!("No machine with systemd, so the tests of slb.service fail: {why:#}");
    }
    // One at a time: they share the processor, and some measure.
    let kernel = process::run(with_ignored(&mut kernel, root, &["--test-threads=1"]));

    if !root {
        println!(
            "Left out: the tests marked `ignored`, which load programs and make network \
             namespaces, and `cargo xtask verify`. They run when this is started as root."
        );
        return units.and(kernel);
    }
    units.and(kernel).and(verify::run(&verify::Options::default()))
}

fn with_ignored<'a>(command: &'a mut Command, root: bool, more: &[&str]) -> &'a mut Command {
    command.arg("--").args(more);
    if root { command.arg("--include-ignored") } else { command }
}
