//! `slb run`.

use std::{io, sync::Arc};

use anyhow::Context as _;
use sd_notify::NotifyState;
use tracing_subscriber::EnvFilter;

use super::{ConfigFile, Exit, load};
use crate::{
    agent,
    config::{Config, source::FileSource},
    datapath::{BpffsError, Pins},
    descriptors,
    log::{self, Log},
    rights,
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    file: ConfigFile,
    /// What to log: error, warn, info, debug or trace, or a filter such as `slb_user::net=debug`.
    #[arg(long, env = "SLB_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
}

/// What is done before the process gives up its rights, and before there is anything to log to.
struct Start {
    source: Arc<FileSource>,
    /// What the configuration is, and the place of the pins that it names.
    config: Result<(Config, Result<Pins, BpffsError>), Exit>,
    /// Mistakes and warnings of the configuration.
    said: Vec<String>,
}

impl Start {
    /// Reads the configuration and mounts bpffs, which an unconfined root can do.
    fn new(file: &ConfigFile) -> Self {
        let source = Arc::new(file.source());
        let mut said = Vec::new();
        let config = load(&*source, |text| said.push(text.to_owned()));
        let config = config.map(|config| {
            let pins = Pins::mount(&config.gateway.pins);
            (config, pins)
        });
        Self { source, config, said }
    }
}

/// Everything that it says goes through the log: a reader of stderr that stalls must not hold it up.
pub(super) fn run(arguments: &Arguments) -> Exit {
    let start = Start::new(&arguments.file);
    // While there is one thread: those that it makes get what it has now.
    let confined = rights::confine();
    let log = Log::start();
    let exit = run_agent(&arguments.log, start, confined, &log).unwrap_or_else(|error| {
        log.print(&format!("slb: {error:#}"));
        Exit::Failed
    });
    log::flush();
    exit
}

fn run_agent(
    filter: &str,
    start: Start,
    confined: io::Result<()>,
    log: &Log,
) -> anyhow::Result<Exit> {
    match EnvFilter::try_new(filter) {
        Ok(filter) => log.install(filter),
        Err(error) => {
            log.print(&format!("--log '{filter}': {error}; write e.g. --log debug"));
            return Ok(Exit::Invalid);
        }
    }
    let Start { source, config, said } = start;
    said.iter().for_each(|text| log.print(text));
    let (config, pins) = match config {
        Ok(config) => config,
        Err(exit) => return Ok(exit),
    };
    if let Err(error) = confined {
        tracing::warn!(
            %error,
            "cannot give up the rights that are not needed; a SystemCallFilter= has to allow capset"
        );
    }
    let pins = pins?;
    if let Err(error) = descriptors::raise_limit() {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let ended = runtime.block_on(agent::run(config, pins, source, || {
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
