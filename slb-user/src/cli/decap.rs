//! `slb decap`.

use std::path::PathBuf;

use comfy_table::Table;
use slb_common::abi::Counter;

use super::{
    Exit,
    output::{print_error, print_line},
};
use crate::{
    config::{DEFAULT_PINS, XdpMode},
    datapath::Decap,
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The interface that tunnels come in by; without one, what is attached and what it has done.
    interface: Option<String>,
    /// Detach from the interface.
    #[arg(long, requires = "interface")]
    remove: bool,
    /// How to attach.
    #[arg(long, value_enum, default_value_t = XdpMode::Auto)]
    xdp_mode: XdpMode,
    /// Directory on bpffs.
    #[arg(long, value_name = "DIRECTORY", default_value = DEFAULT_PINS)]
    pins: PathBuf,
}

pub(super) fn decap(arguments: &Arguments) -> anyhow::Result<Exit> {
    let decap = Decap::new(&arguments.pins);
    let Some(interface) = &arguments.interface else { return show(&decap) };
    if arguments.remove {
        if !decap.detach(interface)? {
            print_error(format_args!("{interface}: nothing was attached"));
            return Ok(Exit::Failed);
        }
        print_line(format_args!("{interface}: detached"))?;
        return Ok(Exit::Done);
    }
    let attachment = decap.attach(interface, arguments.xdp_mode)?;
    let reason = attachment.reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
    print_line(format_args!(
        "{interface}: IPIP and GUE are taken off, XDP mode {}{reason}",
        attachment.mode
    ))?;
    Ok(Exit::Done)
}

fn show(decap: &Decap) -> anyhow::Result<Exit> {
    let interfaces = decap.interfaces()?;
    let Some(counters) = decap.counters()?.filter(|_| !interfaces.is_empty()) else {
        print_line("nothing is attached; `slb decap INTERFACE` does that")?;
        return Ok(Exit::Done);
    };
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(["", "packets", "bytes"]);
    let rows =
        [("opened", counters.opened), ("passed", counters.passed), ("dropped", counters.dropped)];
    for (name, Counter { packets, bytes }) in rows {
        table.add_row([name.to_owned(), packets.to_string(), bytes.to_string()]);
    }
    print_line(format_args!("attached to {}\n{table}", interfaces.join(", ")))?;
    Ok(Exit::Done)
}
