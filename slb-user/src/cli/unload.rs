//! `slb unload`.

use anyhow::Context as _;

use super::{ConfigFile, Exit, load};
use crate::{
    agent::Lock,
    datapath::{self, Pins},
    net::{Announcer, Network},
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    file: ConfigFile,
}

pub(super) fn unload(arguments: &Arguments) -> anyhow::Result<Exit> {
    let gateway = match load(&arguments.file.config) {
        Ok(config) => config.gateway,
        Err(exit) => return Ok(exit),
    };
    let _lock = Lock::take(&gateway.api)?;
    let removed = datapath::unload(&Pins::new(&gateway.pins))?;
    for path in &removed {
        println!("removed {}", path.display());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let withdrawn = runtime.block_on(async {
        let network = Network::open().await?;
        Announcer::new(&network).withdraw_all().await
    })?;
    for vip in &withdrawn {
        println!("gave up {vip}");
    }
    if removed.is_empty() && withdrawn.is_empty() {
        println!("nothing was loaded");
    }
    Ok(Exit::Done)
}
