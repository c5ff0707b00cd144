//! `cargo xtask lint`.

use anyhow::{Result, bail};

use crate::{process, setup};

/// Format, clippy for every package, and what `deny.toml` says about dependencies.
///
/// # Errors
///
/// One of the checks fails, or `rustfmt` or `clippy` is missing.
pub fn run() -> Result<()> {
    for (command, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if !process::cargo([command, "--version"]).output()?.status.success() {
            bail!(
                "the toolchain has no {component}; `rustup component add {component}` or the \
                 distribution's package installs it"
            );
        }
    }
    process::run(&mut process::cargo(["fmt", "--all", "--check"]))?;

    // The build script of slb-user makes the eBPF object, which clippy does not need but wants.
    setup::ensure(&setup::Options::default())?;
    let mut host = process::cargo(["clippy", "--workspace", "--exclude", "slb-ebpf"]);
    process::run(host.args(["--all-targets", "--", "-D", "warnings"]))?;
    // The packet path is checked as host code: clippy has no `core` for the BPF target.
    let mut ebpf = process::cargo(["clippy", "--package", "slb-ebpf"]);
    // Without `std` nothing can unwind.
    ebpf.env("CARGO_PROFILE_DEV_PANIC", "abort");
    process::run(ebpf.args(["--", "-D", "warnings"]))?;

    let mut helpers = setup::Report::default();
    setup::helpers::ensure(setup::helpers::LINT, &mut helpers);
    helpers.finish(true)?;
    process::run(&mut process::cargo(["deny", "--workspace", "check", "licenses", "bans"]))
}
