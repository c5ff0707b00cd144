//! `slb check`.

use std::{collections::BTreeMap, path::PathBuf};

use super::{
    Exit, load,
    output::{print, print_error},
};
use crate::{
    config::{Config, DEFAULT_PATH, source::FileSource},
    health::Windows,
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Configuration file.
    #[arg(value_name = "FILE", default_value = DEFAULT_PATH)]
    file: PathBuf,
}

/// How long health checks take to find out, and the listeners that have those.
fn windows(config: &Config) -> BTreeMap<String, Vec<String>> {
    let mut windows = BTreeMap::<_, Vec<String>>::new();
    for instance in &config.instances {
        for listener in &instance.listeners {
            let Some(check) = &listener.health_check else { continue };
            let passive =
                if check.passive { "; probed at once if clients are refused" } else { "" };
            let name = format!("{} {}/{}", instance.name, listener.protocol, listener.port);
            windows.entry(format!("{}{passive}", Windows::of(check))).or_default().push(name);
        }
    }
    windows
}

/// The first of many names.
fn some(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

pub(super) fn check(arguments: &Arguments) -> anyhow::Result<Exit> {
    match load(&FileSource::new(&arguments.file), |text| print_error(text)) {
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
            let mut text = format!(
                "{file}: valid; instances: {instances}, listeners: {listeners}, backends: {backends}\n"
            );
            for (windows, listeners) in windows(&config) {
                text += &format!("{}: {windows}\n", some(&listeners));
            }
            print(text)?;
            Ok(Exit::Done)
        }
        Err(exit) => Ok(exit),
    }
}
