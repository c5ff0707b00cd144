//! `slb run`.

use std::io::IsTerminal as _;

use anyhow::Context as _;
use sd_notify::NotifyState;
use tracing_subscriber::EnvFilter;

use super::{ConfigFile, Exit, load};
use crate::agent;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    file: ConfigFile,
    /// What to log: error, warn, info, debug or trace, or a filter such as `slb_user::net=debug`.
    #[arg(long, env = "SLB_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Exit> {
    let filter = match EnvFilter::try_new(&arguments.log) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("--log '{}': {error}; write e.g. --log debug", arguments.log);
            return Ok(Exit::Invalid);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let config = match load(&arguments.file.config) {
        Ok(config) => config,
        Err(exit) => return Ok(exit),
    };
    raise_open_files_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(agent::run(config, &arguments.file.config, || {
        notify(NotifyState::Ready);
        tracing::info!("ready");
    }))?;
    notify(NotifyState::Stopping);
    Ok(Exit::Done)
}

/// Tells the service manager, if there is one.
fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "cannot notify the service manager");
    }
}

/// A probe takes a socket, and there may be thousands at once.
fn raise_open_files_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        // slb.service sets both to the same value, and does not allow the call.
        if soft == hard { Ok(()) } else { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) }
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}
