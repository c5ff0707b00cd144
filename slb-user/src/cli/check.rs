//! `slb check`.

use std::path::PathBuf;

use super::{Exit, load};
use crate::config::DEFAULT_PATH;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Configuration file.
    #[arg(value_name = "FILE", default_value = DEFAULT_PATH)]
    file: PathBuf,
}

pub(super) fn check(arguments: &Arguments) -> Exit {
    match load(&arguments.file) {
        Ok(config) => {
            let listeners: usize =
                config.instances.iter().map(|instance| instance.listeners.len()).sum();
            let backends: usize = config
                .instances
                .iter()
                .flat_map(|instance| &instance.groups)
                .map(|group| group.backends.len())
                .sum();
            let instances = config.instances.len();
            let file = arguments.file.display();
            println!(
                "{file}: valid; instances: {instances}, listeners: {listeners}, backends: {backends}"
            );
            Exit::Done
        }
        Err(exit) => exit,
    }
}
