//! `slb run`.

use std::sync::Arc;

use anyhow::Context as _;
use sd_notify::NotifyState;
use tracing_subscriber::EnvFilter;

use super::{ConfigFile, Exit, load};
use crate::{
    agent, descriptors,
    log::{self, Log},
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    file: ConfigFile,
    /// What to log: error, warn, info, debug or trace, or a filter such as `slb_user::net=debug`.
    #[arg(long, env = "SLB_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
}

/// Everything that it says goes through the log: a reader of stderr that stalls must not hold it up.
pub(super) fn run(arguments: &Arguments) -> Exit {
    let log = Log::start();
    let exit = run_agent(arguments, &log).unwrap_or_else(|error| {
        log.print(&format!("slb: {error:#}"));
        Exit::Failed
    });
    log::flush();
    exit
}

fn run_agent(arguments: &Arguments, log: &Log) -> anyhow::Result<Exit> {
    match EnvFilter::try_new(&arguments.log) {
        Ok(filter) => log.install(filter),
        Err(error) => {
            log.print(&format!("--log '{}': {error}; write e.g. --log debug", arguments.log));
            return Ok(Exit::Invalid);
        }
    }
    let source = Arc::new(arguments.file.source());
    let config = match load(&*source, |text| log.print(text)) {
        Ok(config) => config,
        Err(exit) => return Ok(exit),
    };
    if let Err(error) = descriptors::raise_limit() {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let ended = runtime.block_on(agent::run(config, source, || {
        notify(NotifyState::Ready);
        tracing::info!("ready");
    }));
    notify(NotifyState::Stopping);
    // A thread may hang in a read of a file: the process ends all the same.
    runtime.shutdown_background();
    ended?;
    Ok(Exit::Done)
}

/// Tells the service manager, if there is one.
fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "cannot notify the service manager");
    }
}
