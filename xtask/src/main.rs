//! Everything a developer runs: `cargo xtask setup | run | test | verify | bench | fuzz | lint | docs`.

#![expect(clippy::print_stdout, reason = "commands for a terminal")]

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

mod bench;
mod deb;
mod docs;
mod fuzz;
mod lint;
mod process;
mod run;
mod setup;
mod test;
mod times;
mod toolchain;
mod verify;
mod vm;

/// Developer's commands of slb.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Finds or installs what the build and the lab need; the other commands begin with it
    Setup(setup::Options),
    /// Balances real traffic in network namespaces of this host, and shows what comes of it
    Run(run::Options),
    /// Runs all tests; as root also those that need a kernel
    Test(test::Options),
    /// Checks what the packet path costs, and that it works on every supported kernel
    Verify(verify::Options),
    /// Measures what a packet costs on every path, and what clients get, against other balancers
    Bench(bench::Options),
    /// Feeds what reads bytes from anywhere, and shows that the packet fuzz test finds mistakes
    Fuzz(fuzz::Options),
    /// Checks format, code, documentation, spelling, dependencies, and the subjects of new commits
    Lint,
    /// Writes the tables of `docs/reference` from the code
    Docs,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    extend_path();
    let result = match arguments.command {
        Task::Setup(options) => setup::everything(&options),
        Task::Run(options) => run::run(&options),
        Task::Test(options) => test::run(&options),
        Task::Verify(options) => verify::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Lint => lint::run(),
        Task::Docs => docs::run(true),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cargo xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Adds the directories where what [`setup`] installs ends up; a shell may have left them out.
fn extend_path() {
    let present = std::env::var_os("PATH").unwrap_or_default();
    let mut path: Vec<PathBuf> = std::env::split_paths(&present).collect();
    path.extend(process::cargo_home().map(|home| home.join("bin")));
    path.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let extended: OsString = std::env::join_paths(path).unwrap_or(present);
    // SAFETY: `main` has started no thread yet.
    unsafe { std::env::set_var("PATH", extended) };
}
