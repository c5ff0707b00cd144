//! The command `slb`: one file per verb.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::config::{self, Config, DEFAULT_PATH, LoadError};

mod ask;
mod check;
mod decap;
mod distribution;
mod doctor;
mod edit;
mod events;
mod flows;
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
    /// Have the running agent go by its file as it is now; a wrong file changes nothing.
    Reload(ask::Asking),
    /// Show instances, listeners, backends, their health, and what became of packets.
    Status(ask::Asking),
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

impl Cli {
    /// Does what was asked for. Answers go to stdout, errors to stderr.
    ///
    /// # Errors
    ///
    /// Whatever went wrong, for people; the exit code is then [`Exit::Failed`].
    pub fn execute(self) -> anyhow::Result<Exit> {
        match self.command {
            Command::Run(arguments) => run::run(&arguments),
            Command::Check(arguments) => Ok(check::check(&arguments)),
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

/// Reads a file, or says on stderr what is wrong with it.
fn load(path: &std::path::Path) -> Result<Config, Exit> {
    match config::load(path) {
        Ok((_, (config, warnings))) => {
            for warning in warnings {
                eprintln!("warning: {warning}");
            }
            Ok(config)
        }
        Err(error @ LoadError::Unreadable { .. }) => {
            eprintln!("{error}");
            Err(Exit::Invalid)
        }
        Err(LoadError::Invalid(report)) => {
            eprintln!("{report}");
            let mistakes = report.mistakes().len();
            eprintln!(
                "{mistakes} mistake{}; nothing was changed",
                if mistakes == 1 { "" } else { "s" }
            );
            Err(Exit::Invalid)
        }
    }
}
