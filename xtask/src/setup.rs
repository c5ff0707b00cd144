//! `cargo xtask setup`: finds or installs what the build and the lab need.
//!
//! What is there is used as it is: packages are not upgraded, and a nightly toolchain is never updated,
//! because other projects use them. When something cannot be installed, set-up goes on with the rest; a
//! summary at the end lists the commands that are left to the user.

use std::thread;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::{process, vm};

pub(crate) mod apt;
mod compiler;
pub(crate) mod helpers;
mod linker;
pub(crate) mod machine;
mod report;
mod services;
mod survey;

pub(crate) use report::Report;

/// Options of `cargo xtask setup`.
#[derive(Debug, Default, Args)]
pub(crate) struct Options {
    /// Where a toolchain comes from if none is found
    #[arg(long, value_enum, default_value_t)]
    from: Origin,
    /// Only list what would be installed, and how large it is
    #[arg(long)]
    dry_run: bool,
    /// Also install packages that need newer versions of what is installed
    #[arg(long)]
    allow_upgrades: bool,
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

const TOOLS: [Tool; 7] = [
    Tool { program: "ip", package: "iproute2", needed_by: Some("the lab") },
    Tool { program: "ethtool", package: "ethtool", needed_by: Some("the lab") },
    Tool { program: "c++", package: "g++", needed_by: Some("the fuzz targets") },
    Tool { program: "bpftool", package: "bpftool", needed_by: None },
    Tool { program: "curl", package: "curl", needed_by: None },
    Tool { program: "ping", package: "iputils-ping", needed_by: Some("the tests") },
    Tool { program: "nft", package: "nftables", needed_by: Some("the tests") },
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

/// Does what [`ensure`] does, and installs what only some commands need. With `--dry-run`: lists it.
///
/// # Errors
///
/// Those of [`ensure`].
pub(crate) fn everything(options: &Options) -> Result<()> {
    if options.dry_run {
        survey::print(options);
        return Ok(());
    }
    if compiler::needs_packages(options.from) && process::is_root() && apt::is_here() {
        // For the version of LLVM below.
        apt::refresh();
    }
    // All packages by one call of apt, which takes seconds for each. What it refuses is reported below.
    let packages = missing_packages(options);
    let packages: Vec<_> = packages.iter().map(String::as_str).collect();
    if !packages.is_empty() {
        let _ = apt::install(&packages, options.allow_upgrades);
    }
    let report = thread::scope(|scope| {
        // Unpacks packages into a folder of its own, while the linker is built here.
        let machine = scope.spawn(|| {
            let mut report = Report::default();
            if let Err(why) = machine::ensure(options, &mut report) {
                report.without("machine", format!("the tests of slb.service fail: {why:#}"));
            }
            report
        });
        let mut report = Report::default();
        need(options, &mut report);
        helpers::ensure(helpers::LINT, &mut report);
        match virtual_machines() {
            Ok(()) => report.found("kernels", "can be booted"),
            Err(why) => report.without("kernels", format!("only the running one: {why:#}")),
        }
        report.append(machine.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        report
    });
    report.finish(false)
}

/// All helpers.
fn helpers() -> impl Iterator<Item = &'static helpers::Helper> {
    [&helpers::NEXTEST].into_iter().chain(helpers::LINT)
}

/// The distribution's packages that are missing, as far as is known before one is installed.
fn missing_packages(options: &Options) -> Vec<String> {
    let tools = [&TOOLS[..], &SERVERS, &VM_TOOLS, &machine::TOOLS].concat();
    let missing = tools.iter().filter(|tool| process::find(tool.program).is_none());
    let mut packages: Vec<_> = missing.map(|tool| tool.package.to_owned()).collect();
    let mut llvm = compiler::usable().and_then(compiler::llvm);
    if compiler::needs_packages(options.from) {
        packages.extend(compiler::PACKAGES.map(str::to_owned));
        // The compiler says which LLVM it has, by the library that it depends on.
        let plan = apt::plan(&compiler::PACKAGES).unwrap_or_default();
        let mut versions = plan.new.iter().filter_map(|name| name.strip_prefix("libllvm"));
        llvm = versions.find_map(|version| version.parse().ok());
    }
    packages.extend(llvm.and_then(linker::package));
    packages
}

/// Finds or installs what other kernels are booted with.
///
/// # Errors
///
/// Something is missing that could not be installed.
pub(crate) fn virtual_machines() -> Result<()> {
    if !cfg!(target_arch = "x86_64") {
        bail!("they are booted on x86-64 only");
    }
    if !apt::is_here() {
        bail!("they are Debian's, and come by apt-get");
    }
    tools(&VM_TOOLS, &Options::default(), &mut Report::default());
    for tool in VM_TOOLS {
        if process::find(tool.program).is_none() {
            bail!("{} is missing: {}", tool.program, apt::advice(&[tool.package]));
        }
    }
    Ok(())
}

/// Finds or installs what the build, the lab and the tests need, and prints what is new or missing.
///
/// # Errors
///
/// Something is missing that could not be installed; what to do about it has been printed.
pub(crate) fn ensure(options: &Options) -> Result<()> {
    let mut report = Report::default();
    need(options, &mut report);
    report.finish(true)
}

fn need(options: &Options, report: &mut Report) {
    let found = compiler::ensure(options, report);
    linker::ensure(found, options, report);
    tools(&[&TOOLS[..], &SERVERS].concat(), options, report);
    helpers::ensure([&helpers::NEXTEST], report);
}

fn tools(tools: &[Tool], options: &Options, report: &mut Report) {
    const THING: &str = "tools";
    let (present, missing): (Vec<&Tool>, Vec<&Tool>) =
        tools.iter().partition(|tool| process::find(tool.program).is_some());
    let names = |tools: &[&Tool]| {
        let names: Vec<_> = tools.iter().map(|tool| tool.program).collect();
        names.join(", ")
    };
    if !present.is_empty() {
        report.found(THING, names(&present));
    }
    if missing.is_empty() {
        return;
    }
    let packages: Vec<_> = missing.iter().map(|tool| tool.package).collect();
    let why = apt::install(&packages, options.allow_upgrades).err().unwrap_or_default();
    let (installed, missing): (Vec<&Tool>, Vec<&Tool>) =
        missing.into_iter().partition(|tool| process::find(tool.program).is_some());
    if !installed.is_empty() {
        report.installed(THING, names(&installed));
    }
    for tool in missing {
        match tool.needed_by {
            Some(user) => report.missing(
                THING,
                format!("{}, which {user} needs: {why}", tool.program),
                [apt::advice(&[tool.package])],
            ),
            None => report.without(THING, format!("{}: {why}", tool.program)),
        }
    }
}
