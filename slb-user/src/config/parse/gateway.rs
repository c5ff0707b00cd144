//! `[gateway]`.

use std::{
    collections::{BTreeSet, HashSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
};

use super::{
    read::{Field, Keys, List, Raw, Table},
    values,
};
use crate::{
    config::{self, Announce, DEFAULT_PINS, NoListener, TunnelSource, XdpMode},
    seed::SharedSeed,
};

const KEYS: Keys = Keys {
    known: &[
        "interfaces",
        "xdp_mode",
        "region",
        "flows",
        "announce",
        "no_listener",
        "vlans",
        "tunnel_source",
        "seed",
        "api",
        "monitor",
        "pins",
        "http",
    ],
    later: &[],
};

const FLOWS: RangeInclusive<u32> = 1024..=64 * 1024 * 1024;
/// 0 and 4095 name no VLAN (IEEE 802.1Q, table 9-2).
const VLANS: RangeInclusive<u16> = 1..=4094;
const DEFAULT_FLOWS: u32 = 1024 * 1024;
/// As others have 9100 and what follows, and only this host may ask.
const DEFAULT_HTTP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9_470);
pub(super) const DEFAULT_API: &str = "/run/slb/api.sock";
const EXAMPLE_MONITOR: &str = "/run/slb/monitor.sock";
/// `sockaddr_un.sun_path` without its NUL.
const LONGEST_API: usize = 107;
/// Leaves room below `PATH_MAX` for what is pinned there.
const LONGEST_PINS: usize = 255;

/// `[gateway]` as read.
pub(super) struct Gateway {
    interfaces: Option<Vec<String>>,
    xdp_mode: Option<XdpMode>,
    pub(super) region: Field<String>,
    flows: Option<u32>,
    announce: Option<Announce>,
    no_listener: Option<NoListener>,
    vlans: Option<Option<BTreeSet<u16>>>,
    tunnel_source: Option<TunnelSource>,
    seed: Field<SharedSeed>,
    http: Option<Option<SocketAddr>>,
    api: Option<PathBuf>,
    monitor: Field<PathBuf>,
    pins: Option<PathBuf>,
}

pub(super) fn gateway(raw: Raw<'_>) -> Gateway {
    let table = raw.open("gateway".to_owned(), &KEYS);
    Gateway {
        interfaces: interfaces(&table),
        xdp_mode: table.field("xdp_mode", values::choice(XdpMode::WORDS)).or(XdpMode::Auto),
        region: table.field("region", values::name),
        flows: table.field("flows", values::integer(FLOWS)).or(DEFAULT_FLOWS),
        announce: table.field("announce", values::choice(Announce::WORDS)).or(Announce::Arp),
        no_listener: table
            .field("no_listener", values::choice(NoListener::WORDS))
            .or(NoListener::Pass),
        vlans: vlans(&table),
        tunnel_source: tunnel_source(&table),
        seed: table.field("seed", values::seed),
        http: table.field("http", values::http).or(Some(DEFAULT_HTTP)),
        api: table
            .field("api", values::absolute_path(LONGEST_API, DEFAULT_API))
            .or(DEFAULT_API.into()),
        monitor: monitor(&table),
        pins: table.field("pins", values::pins(LONGEST_PINS, DEFAULT_PINS)).or(DEFAULT_PINS.into()),
    }
}

fn interfaces(table: &Table<'_>) -> Option<Vec<String>> {
    const EXAMPLE: &str = "interfaces = [\"eth0\"]";
    let List { items, complete } = match table.list("interfaces", "[\"eth0\"]", values::interface) {
        Field::Absent => {
            table.report_absent("interfaces", EXAMPLE);
            return None;
        }
        Field::Bad => return None,
        Field::Good(found) if found.value.items.is_empty() && found.value.complete => {
            table.mistake(found.at, format_args!("'interfaces' is empty; write {EXAMPLE}"));
            return None;
        }
        Field::Good(found) => found.value,
    };
    let mut seen = HashSet::new();
    for interface in &items {
        if !seen.insert(&interface.value) {
            let message =
                format_args!("interface {:?} is listed twice; write it once", interface.value);
            table.mistake(interface.at, message);
        }
    }
    complete.then(|| items.into_iter().map(|interface| interface.value).collect())
}

/// Two sockets cannot have one path.
fn monitor(table: &Table<'_>) -> Field<PathBuf> {
    let monitor = table.field("monitor", values::absolute_path(LONGEST_API, EXAMPLE_MONITOR));
    let api =
        table.field("api", values::absolute_path(LONGEST_API, DEFAULT_API)).or(DEFAULT_API.into());
    match &monitor {
        Field::Good(found) if Some(&found.value) == api.as_ref() => {
            let message = format_args!(
                "'monitor' is the path of 'api'; write another one, such as {EXAMPLE_MONITOR:?}"
            );
            table.mistake(found.at, message);
            Field::Bad
        }
        _ => monitor,
    }
}

/// The identifiers of VLANs that are served; `None`: all.
fn vlans(table: &Table<'_>) -> Option<Option<BTreeSet<u16>>> {
    let List { items, complete } = match table.list("vlans", "[10, 20]", values::integer(VLANS)) {
        Field::Absent => return Some(None),
        Field::Bad => return None,
        Field::Good(found) => found.value,
    };
    let mut seen = BTreeSet::new();
    for vlan in &items {
        if !seen.insert(vlan.value) {
            let message = format_args!("VLAN {} is listed twice; write it once", vlan.value);
            table.mistake(vlan.at, message);
        }
    }
    complete.then_some(Some(seen))
}

/// One prefix, or one per family.
fn tunnel_source(table: &Table<'_>) -> Option<TunnelSource> {
    let mut source = TunnelSource::default();
    let List { items, complete } = match table.one_or_list("tunnel_source", values::tunnel_source) {
        Field::Absent => return Some(source),
        Field::Bad => return None,
        Field::Good(found) => found.value,
    };
    let (mut v4, mut v6) = (None, None);
    for item in items {
        let (family, is_second) = match item.value {
            IpAddr::V4(addr) => ("IPv4", v4.replace(addr).is_some()),
            IpAddr::V6(addr) => ("IPv6", v6.replace(addr).is_some()),
        };
        if is_second {
            let message = format_args!("a second {family} prefix in 'tunnel_source'; write one");
            table.mistake(item.at, message);
        }
    }
    source.v4 = v4.unwrap_or(source.v4);
    source.v6 = v6.unwrap_or(source.v6);
    complete.then_some(source)
}

impl Gateway {
    /// Nothing if there is a gap.
    pub(super) fn build(self) -> Option<config::Gateway> {
        Some(config::Gateway {
            interfaces: self.interfaces?,
            xdp_mode: self.xdp_mode?,
            region: self.region.optional()?,
            flows: self.flows?,
            announce: self.announce?,
            no_listener: self.no_listener?,
            vlans: self.vlans?,
            tunnel_source: self.tunnel_source?,
            seed: self.seed.optional()?,
            http: self.http?,
            api: self.api?,
            monitor: self.monitor.optional()?,
            pins: self.pins?,
        })
    }
}
