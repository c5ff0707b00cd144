//! `cargo xtask setup`: finds or installs what the build and the lab need.
//!
//! What is there is used as it is: in particular, a nightly toolchain is never updated, because
//! other projects build with it. What cannot be installed is not the end: every line is worked
//! through, and the commands that are left to the user are listed last.

use std::thread;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::{process, vm};

pub mod apt;
mod compiler;
pub mod helpers;
mod linker;
pub mod machine;

/// Options of `cargo xtask setup`.
#[derive(Debug, Default, Args)]
pub struct Options {
    /// Where a toolchain comes from if none is found
    #[arg(long, value_enum, default_value_t)]
    from: Origin,
}

/// Where a toolchain comes from if none is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Origin {
    /// rustup, and if that fails the distribution
    #[default]
    Auto,
    /// The distribution's packages only
    Distribution,
}

/// A program that is not Rust's.
#[derive(Clone, Copy)]
struct Tool {
    program: &'static str,
    package: &'static str,
    /// `None`: a nicety; setup succeeds without it.
    needed_by: Option<&'static str>,
}

const TOOLS: [Tool; 5] = [
    Tool { program: "ip", package: "iproute2", needed_by: Some("the lab") },
    Tool { program: "ethtool", package: "ethtool", needed_by: Some("the lab") },
    Tool { program: "bpftool", package: "bpftool", needed_by: None },
    Tool { program: "curl", package: "curl", needed_by: None },
    Tool { program: "ping", package: "iputils-ping", needed_by: Some("the tests") },
];

/// Servers that the tests run themselves. Debian packages them as services.
const SERVERS: [Tool; 2] = [
    Tool { program: "nginx", package: "nginx", needed_by: Some("the tests") },
    Tool { program: "haproxy", package: "haproxy", needed_by: Some("the tests") },
];

/// What other kernels are booted with.
const VM_TOOLS: [Tool; 2] = [
    Tool { program: vm::QEMU, package: "qemu-system-x86", needed_by: None },
    Tool { program: vm::BUSYBOX, package: "busybox-static", needed_by: None },
];

/// [`ensure`], and what only some commands need.
///
/// # Errors
///
/// Those of [`ensure`].
pub fn everything(options: &Options) -> Result<()> {
    // All packages by one call of apt, which takes seconds for each.
    let packages: Vec<_> = [&TOOLS[..], &VM_TOOLS, &machine::TOOLS].concat();
    tools(&packages, apt::install, &mut Vec::new());
    helpers::ensure(&helpers::DENY, &mut Vec::new());
    thread::scope(|scope| {
        // Unpacks packages into a folder of its own, while the linker is built here.
        let machine = scope.spawn(machine::ensure);
        let ensured = ensure(options);
        if let Err(why) = virtual_machines() {
            say("kernels", &format!("none but the running one: {why:#}"));
        }
        match machine.join() {
            Ok(Ok(_)) => {}
            Ok(Err(why)) => {
                say("machine", &format!("none, so the tests of slb.service fail: {why:#}"));
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
        ensured
    })
}

/// Finds or installs what other kernels are booted with.
///
/// # Errors
///
/// Something is missing that could not be installed.
pub fn virtual_machines() -> Result<()> {
    if !cfg!(target_arch = "x86_64") {
        bail!("they are booted on x86-64 only");
    }
    if process::find("apt-get").is_none() {
        bail!("they are Debian's, and come by apt-get");
    }
    tools(&VM_TOOLS, apt::install, &mut Vec::new());
    for tool in VM_TOOLS {
        if process::find(tool.program).is_none() {
            bail!("{} is missing: {}", tool.program, apt::command(&[tool.package]));
        }
    }
    Ok(())
}

/// Prints one line per thing, and installs what is missing.
///
/// # Errors
///
/// Something is missing that could not be installed; what to do about it has been printed.
pub fn ensure(options: &Options) -> Result<()> {
    let mut left = Vec::new();
    let found = compiler::ensure(options.from, &mut left);
    linker::ensure(found, &mut left);
    tools(&TOOLS, apt::install, &mut left);
    tools(&SERVERS, apt::install_without_services, &mut left);
    helpers::ensure(&helpers::NEXTEST, &mut left);
    if left.is_empty() {
        return Ok(());
    }
    println!("\nWhat is left to do:");
    for command in &left {
        println!("    {command}");
    }
    bail!("set-up is not complete; the commands above finish it");
}

/// How packages are installed.
type Install = fn(&[&str]) -> Result<(), String>;

fn tools(tools: &[Tool], install: Install, left: &mut Vec<String>) {
    let (present, missing): (Vec<&Tool>, Vec<&Tool>) =
        tools.iter().partition(|tool| process::find(tool.program).is_some());
    if !present.is_empty() {
        let names: Vec<_> = present.iter().map(|tool| tool.program).collect();
        say("tools", &format!("found: {}", names.join(", ")));
    }
    if missing.is_empty() {
        return;
    }
    let packages: Vec<_> = missing.iter().map(|tool| tool.package).collect();
    let Err(why) = install(&packages) else {
        say("tools", &format!("done: {}", packages.join(", ")));
        return;
    };
    for tool in missing {
        let command = apt::command(&[tool.package]);
        match tool.needed_by {
            Some(user) => {
                say("tools", &format!("{} is missing, {user} needs it: {why}", tool.program));
                left.push(command);
            }
            None => say("tools", &format!("{} is missing, do without: {why}", tool.program)),
        }
    }
}

/// One line of the report.
fn say(thing: &str, what: &str) {
    println!("setup: {thing:<10} {what}");
}
