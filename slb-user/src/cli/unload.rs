//! `slb unload`.

use std::{collections::HashSet, path::PathBuf};

use anyhow::Context as _;

use super::{
    ConfigFile, Exit, load,
    output::{print, print_error},
};
use crate::{
    agent::Lock,
    config::Config,
    datapath::{self, Pins},
    net::{Announcers, ManagedNeighbours, Network},
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    file: ConfigFile,
    /// Where it is pinned, if there is no valid configuration file to say so.
    #[arg(long, value_name = "DIRECTORY", requires = "api")]
    pins: Option<PathBuf>,
    /// The agent's socket, likewise.
    #[arg(long, value_name = "SOCKET", requires = "pins")]
    api: Option<PathBuf>,
}

pub(super) fn unload(arguments: &Arguments) -> anyhow::Result<Exit> {
    let (pins, api) = match (&arguments.pins, &arguments.api) {
        (Some(pins), Some(api)) => (pins.clone(), api.clone()),
        _ => match load(&arguments.file.source(), |text| print_error(text)) {
            Ok(Config { gateway, .. }) => (gateway.pins, gateway.api),
            Err(exit) => return Ok(exit),
        },
    };
    let _lock = Lock::take(&api)?;
    let _pins_lock = if pins.exists() { Some(Lock::of_directory(&pins)?) } else { None };
    let removed = datapath::unload(&Pins::new(&pins))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let withdrawn = runtime.block_on(async {
        let network = Network::open().await?;
        // The kernel need not keep the backends resolved any more.
        ManagedNeighbours::new(&network).keep(&HashSet::new()).await?;
        Announcers::new(&network).withdraw().await
    })?;
    // Last: the reader may be gone, or the disk full.
    let removed = removed.iter().map(|path| format!("removed {}\n", path.display()));
    let withdrawn = withdrawn.iter().map(|vip| format!("withdrew {vip}\n"));
    let text: String = removed.chain(withdrawn).collect();
    print(if text.is_empty() { "nothing was loaded\n" } else { &text })?;
    Ok(Exit::Done)
}
