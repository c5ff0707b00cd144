//! `slb doctor`.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::ValueEnum;
use serde::Serialize;
use slb_common::tunnel;

use super::{
    Exit,
    output::{print, print_error, print_json},
};
use crate::{
    config::DEFAULT_PINS,
    datapath::Decap,
    net::{Network, NextHop},
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// What a backend of a group with this forwarding mode needs: run it there, and it says what is missing.
    #[arg(long, value_enum, value_name = "MODE")]
    backend: Mode,
    /// The instance's VIPs.
    #[arg(long = "vip", value_name = "ADDRESS")]
    vips: Vec<IpAddr>,
    /// The gateway's address, as this backend sees it.
    #[arg(long, value_name = "ADDRESS")]
    gateway: Option<IpAddr>,
    /// The interface that packets come in by; by default that of the way to the gateway, or to the
    /// Internet.
    #[arg(long)]
    interface: Option<String>,
    /// Directory on bpffs of `slb decap`.
    #[arg(long, value_name = "DIRECTORY", default_value = DEFAULT_PINS)]
    pins: PathBuf,
    /// For programs.
    #[arg(long)]
    json: bool,
}

/// A forwarding mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Address and port are rewritten.
    Nat,
    /// The source is as well.
    FullNat,
    /// The MAC address is.
    Dsr,
    /// IP in IP.
    Ipip,
    /// Generic UDP encapsulation.
    Gue,
}

/// Something that a backend needs.
#[derive(Debug, Serialize)]
struct Need {
    /// What, in words.
    what: String,
    /// Whether it is so here; `None`: cannot be told from here.
    holds: Option<bool>,
    /// What makes it so.
    commands: Vec<String>,
}

impl Need {
    fn new(what: impl Into<String>, holds: Option<bool>, command: impl Into<String>) -> Self {
        Self { what: what.into(), holds, commands: vec![command.into()] }
    }
}

pub(super) fn doctor(arguments: &Arguments) -> anyhow::Result<Exit> {
    let is_translated = matches!(arguments.backend, Mode::Nat | Mode::FullNat);
    if !is_translated && arguments.vips.is_empty() {
        print_error(
            "with this mode a backend has the VIPs as well; write --vip ADDRESS for each of them",
        );
        return Ok(Exit::Invalid);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let needs = runtime.block_on(needs(arguments))?;
    if arguments.json {
        print_json(&needs)?;
    } else {
        let mut text = String::new();
        for Need { what, holds, commands } in &needs {
            let mark = match holds {
                Some(true) => "ok     ",
                Some(false) => "MISSING",
                None => "?      ",
            };
            text += &format!("{mark} {what}\n");
            if *holds != Some(true) {
                for command in commands {
                    text += &format!("            {command}\n");
                }
            }
        }
        print(text)?;
    }
    let is_well = needs.iter().all(|need| need.holds != Some(false));
    Ok(if is_well { Exit::Done } else { Exit::Failed })
}

/// Addresses that only the default route leads to: of networks for documentation (RFC 5737, RFC 9637).
const INTERNET: [&str; 2] = ["203.0.113.1", "3fff::1"];

async fn needs(arguments: &Arguments) -> anyhow::Result<Vec<Need>> {
    let network = Network::open().await?;
    let interface = match &arguments.interface {
        Some(name) => Some(name.clone()),
        None => towards(&network, arguments.gateway).await?,
    };
    let interface = interface.unwrap_or_else(|| "eth0".to_owned());
    let mut needs = Vec::new();
    if arguments.backend == Mode::FullNat {
        let what = "it answers the gateway, which it has a route to: nothing else is needed";
        return Ok(vec![Need { what: what.to_owned(), holds: Some(true), commands: Vec::new() }]);
    }
    if arguments.backend == Mode::Nat {
        needs.push(default_route(&network, arguments.gateway).await?);
        return Ok(needs);
    }
    let here = network.addresses().await?.into_iter().map(|held| held.address);
    let here: Vec<_> = here.collect();
    needs.extend(held_vips(&arguments.vips, &here));
    let is_gue = match arguments.backend {
        Mode::Nat | Mode::FullNat | Mode::Dsr => return Ok(needs),
        Mode::Ipip => false,
        Mode::Gue => true,
    };
    let pins = match arguments.pins.to_str() {
        Some(DEFAULT_PINS) | None => String::new(),
        Some(pins) => format!(" --pins {pins}"),
    };
    let attached = Decap::new(&arguments.pins).interfaces()?.contains(&interface);
    needs.push(Need::new(
        format!("packets that come in by {interface} are taken out of their tunnel"),
        Some(attached),
        format!("slb decap {interface}{pins}"),
    ));
    if arguments.vips.iter().any(IpAddr::is_ipv4) {
        needs.push(sysctl(
            "clients' addresses are believed, by whichever route the kernel reaches them",
            &interface,
            "rp_filter",
            2,
            |level| level != 1,
        ));
    }
    for is_v4 in [true, false] {
        if arguments.vips.iter().any(|vip| vip.is_ipv4() == is_v4) {
            needs.push(segments(&network, &interface, is_v4, is_gue).await?);
        }
    }
    Ok(needs)
}

/// A backend has the VIPs as well, and does not announce them.
fn held_vips(vips: &[IpAddr], here: &[IpAddr]) -> Vec<Need> {
    let mut needs = Vec::new();
    for vip in vips {
        let (len, option) = if vip.is_ipv4() { (32, "") } else { (128, " nodad") };
        needs.push(Need::new(
            format!("{vip} is an address of this host, so that it takes the packets"),
            Some(here.contains(vip)),
            format!("ip address add {vip}/{len} dev lo{option}"),
        ));
    }
    if vips.iter().any(IpAddr::is_ipv4) {
        needs.push(sysctl(
            "it does not answer ARP for the VIP: that is the gateway's",
            EVERY,
            "arp_ignore",
            1,
            |level| level >= 1,
        ));
        needs.push(sysctl(
            "it does not ask by ARP as the VIP",
            EVERY,
            "arp_announce",
            2,
            |level| level == 2,
        ));
    }
    needs
}

/// The interface towards the gateway or the Internet.
async fn towards(network: &Network, gateway: Option<IpAddr>) -> anyhow::Result<Option<String>> {
    let internet = INTERNET.iter().filter_map(|addr| addr.parse().ok());
    for addr in gateway.into_iter().chain(internet) {
        if let Some((index, _)) = network.resolve(addr).await?.neighbour() {
            return Ok(network.interface_by_index(index).map(|found| found.name));
        }
    }
    Ok(None)
}

async fn default_route(network: &Network, gateway: Option<IpAddr>) -> anyhow::Result<Need> {
    let what = "replies go back through the gateway, which makes the VIP their source again";
    let Some(gateway) = gateway else {
        let command =
            "ip route replace default via GATEWAY; with --gateway ADDRESS this is checked";
        return Ok(Need::new(what, None, command));
    };
    let internet = INTERNET[usize::from(gateway.is_ipv6())].parse().context("an address")?;
    let hop = network.resolve(internet).await?;
    let holds = hop.neighbour().is_some_and(|(_, neighbour)| neighbour == gateway);
    let option = if gateway.is_ipv4() { "" } else { "-6 " };
    Ok(Need::new(what, Some(holds), format!("ip {option}route replace default via {gateway}")))
}

/// In place of an interface.
const EVERY: &str = "all";

/// A setting of the kernel for IPv4, of which the larger of two counts.
fn sysctl(
    what: &str,
    interface: &str,
    name: &str,
    wanted: u32,
    suits: impl Fn(u32) -> bool,
) -> Need {
    let value = |scope: &str| {
        let path = Path::new("/proc/sys/net/ipv4/conf").join(scope).join(name);
        fs::read_to_string(path).ok()?.trim().parse::<u32>().ok()
    };
    let level = value("all").into_iter().chain(value(interface)).max();
    Need::new(
        what,
        level.map(suits),
        format!("sysctl -w net.ipv4.conf.{interface}.{name}={wanted}"),
    )
}

/// What goes through the tunnel is as long as the backend lets clients make it.
async fn segments(
    network: &Network,
    interface: &str,
    is_v4: bool,
    is_gue: bool,
) -> anyhow::Result<Need> {
    let mtu = network.interface(interface).map_or(1_500, |found| found.mtu);
    let headers = if is_v4 { 40 } else { 60 };
    // Over IPv6, which takes more: whether it is, only the gateway's file says.
    let overhead = tunnel::overhead(false, is_gue) as u32;
    let most = mtu.saturating_sub(overhead + headers);
    let internet: IpAddr = INTERNET[usize::from(!is_v4)].parse().context("an address")?;
    let stated = network.advertised_mss(internet).await?;
    let holds = stated.is_some_and(|stated| stated <= most);
    let (option, family) = if is_v4 { ("", "IPv4") } else { ("-6 ", "IPv6") };
    let via = match network.resolve(internet).await? {
        NextHop::Resolved { neighbour, .. } | NextHop::Unresolved { neighbour, .. }
            if neighbour != internet =>
        {
            format!("via {neighbour} ")
        }
        _ => "via ROUTER ".to_owned(),
    };
    let mut need = Need::new(
        format!(
            "{family} clients are told to send segments of at most {most} bytes, which fit through the tunnel"
        ),
        Some(holds),
        format!("ip {option}route replace default {via}dev {interface} advmss {most}"),
    );
    need.commands.push(format!(
        "or, on every link from the gateway to here: ip link set {interface} mtu {}",
        mtu + overhead
    ));
    Ok(need)
}
