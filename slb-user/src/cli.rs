//! The command `slb`: one file per verb.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

use self::output::{OutputError, print_error, print_help};
use crate::config::{
    self, Config, DEFAULT_PATH, LoadError,
    source::{ConfigSource, FileSource},
};

mod ask;
mod check;
mod decap;
mod distribution;
mod doctor;
mod edit;
mod events;
mod flows;
mod output;
mod reload;
mod run;
mod status;
mod unload;

/// What a command's exit code says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Not done.
    Failed = 1,
    /// Wrong usage or invalid configuration.
    Invalid = 2,
    /// No agent answers.
    NoAgent = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Turns this Linux gateway into a server load balancer for TCP and UDP.
#[derive(Debug, Parser)]
#[command(name = "slb", version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent in the foreground.
    Run(run::Arguments),
    /// Validate a configuration file, and report every mistake in it.
    Check(check::Arguments),
    /// Show what a reload would change, without doing it.
    Plan(reload::PlanArguments),
    /// Reload the configuration; an invalid file changes nothing.
    Reload(ask::Query),
    /// Show instances, listeners, backends, their health, and what became of packets.
    Status(ask::Query),
    /// Count new flows for a while: who should get how many, who does, and why they differ.
    Distribution(distribution::Arguments),
    /// Show the flows that have entries.
    Flows(flows::Arguments),
    /// What would become of a packet now, and why, step by step.
    Explain(flows::ExplainArguments),
    /// What has happened to health, configuration and flows.
    Events(events::Arguments),
    /// Add, remove, re-weight or drain a backend of the running agent, and in its file.
    #[command(subcommand)]
    Backend(edit::Backend),
    /// Start or stop a listener of the running agent, and in its file.
    #[command(subcommand)]
    Listener(edit::Listener),
    /// On a backend behind a tunnel: take packets out of IPIP and GUE by XDP.
    Decap(decap::Arguments),
    /// On a backend: what it needs for its group's forwarding mode, and whether it has it.
    Doctor(doctor::Arguments),
    /// Detach XDP, give up the VIPs and remove everything pinned; stopping the agent does not.
    Unload(unload::Arguments),
}

/// Where the configuration is.
#[derive(Debug, clap::Args)]
struct ConfigFile {
    /// Configuration file.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
}

impl ConfigFile {
    fn source(&self) -> FileSource {
        FileSource::new(&self.config)
    }
}

/// How a shell reports a process that has ended by SIGPIPE, as most commands do whose reader closes the pipe.
const CLOSED_PIPE: u8 = 128 + libc::SIGPIPE as u8;

/// Does what the command line asks for. Answers go to stdout, errors to stderr.
#[must_use]
pub fn main() -> ExitCode {
    let ended = match Cli::try_parse() {
        Ok(cli) => cli.execute(),
        Err(error) if error.use_stderr() => error.exit(),
        Err(help) => print_help(&help).map(|()| Exit::Done).map_err(Into::into),
    };
    match ended {
        Ok(exit) => exit.into(),
        Err(error) if error.downcast_ref().is_some_and(OutputError::is_closed) => {
            ExitCode::from(CLOSED_PIPE)
        }
        Err(error) => {
            print_error(format_args!("slb: {error:#}"));
            Exit::Failed.into()
        }
    }
}

impl Cli {
    fn execute(self) -> anyhow::Result<Exit> {
        match self.command {
            Command::Run(arguments) => Ok(run::run(&arguments)),
            Command::Check(arguments) => check::check(&arguments),
            Command::Plan(arguments) => reload::plan(&arguments),
            Command::Reload(arguments) => reload::reload(&arguments),
            Command::Status(arguments) => status::status(&arguments),
            Command::Backend(command) => edit::backend(command),
            Command::Listener(command) => edit::enable(command),
            Command::Distribution(arguments) => distribution::distribution(&arguments),
            Command::Flows(arguments) => flows::flows(arguments),
            Command::Explain(arguments) => flows::explain(arguments),
            Command::Events(arguments) => events::events(&arguments),
            Command::Decap(arguments) => decap::decap(&arguments),
            Command::Doctor(arguments) => doctor::doctor(&arguments),
            Command::Unload(arguments) => unload::unload(&arguments),
        }
    }
}

/// Reads a configuration; `report` gets its mistakes and warnings.
fn load(source: &dyn ConfigSource, mut report: impl FnMut(&str)) -> Result<Config, Exit> {
    match config::load(source) {
        Ok((config, warnings)) => {
            for warning in warnings {
                report(&format!("warning: {warning}"));
            }
            Ok(config)
        }
        Err(error @ LoadError::Unreadable { .. }) => {
            report(&error.to_string());
            Err(Exit::Invalid)
        }
        Err(LoadError::Invalid(mistakes)) => {
            let count = mistakes.count();
            let plural = if count == 1 { "" } else { "s" };
            report(&format!("{mistakes}\n{count} mistake{plural}; nothing was changed"));
            Err(Exit::Invalid)
        }
    }
}
