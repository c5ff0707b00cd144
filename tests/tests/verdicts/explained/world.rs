//! A random configuration, planned as the agent plans it, with random health and next hops.

use std::{
    fmt::{self, Write as _},
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Instant,
};

use rustc_hash::{FxHashMap, FxHashSet};
use slb_common::abi::{Limits, NextHop, Seed};
use slb_lab::Dice;
use slb_user::{
    clock::Jiffies,
    config::{self, Config},
    health::Health,
    ids::Ids,
    net::Ingress,
    planner::{BackendRoute, Inputs, Planner},
    state::State,
};

use crate::{
    fixture::{SOURCES, Slb, VIPS, at},
    frame::VIRTUAL_MAC,
    lab::{FIRST, LAN, SECOND, WAN, interface},
};

/// VIPs of IPv4 and IPv6 whose backends are of the other family.
pub(super) const CROSSING: [&str; 2] = ["203.0.113.20", "2001:db8:113::20"];
pub(super) const FIRST_PORT: u16 = 1_000;
pub(super) const LISTENERS: u16 = 12;
/// Hosts that backends are on.
pub(super) const HOSTS: usize = 16;

/// A host that backends are on.
pub(super) fn host(number: usize, family: usize) -> IpAddr {
    let number = 20 + number;
    [format!("10.0.0.{number}"), format!("2001:db8:a::{number}")][family].parse().expect("valid")
}

pub(super) struct World {
    planner: Planner,
    ids: Arc<Ids>,
    health: Vec<Health>,
    routes: FxHashMap<IpAddr, BackendRoute>,
    ingress: Arc<Ingress>,
    now: Instant,
    moment: u32,
    jiffies: Jiffies,
}

impl World {
    /// Draws a configuration, and installs it. Each third has the same answer where no listener is.
    pub(super) fn draw(dice: &mut Dice, slb: &mut Slb<'_>, number: usize) -> Self {
        let text = text(dice);
        let config = parse(&text);
        slb.change(|state| *state = State { sources: state.sources.clone(), ..State::default() });
        slb.flows.clear();
        slb.set(|settings| settings.no_listener = number as u32 % 3);
        let ids = Arc::new(Ids::assign(&config, slb.maps.installed()).expect("it fits"));
        let jiffies = Jiffies::from_kernel().expect("a clock");
        let (now, moment) = (Instant::now(), jiffies.now().expect("a clock"));
        let planner = Planner::default();
        let routes = routes(dice);
        let ingress = Arc::new(ingress(dice, &routes));
        let health = Vec::new();
        let mut world = Self { planner, ids, health, routes, ingress, now, moment, jiffies };
        // First all are healthy: no listener waits for its first probes.
        world.health = vec![Health::Healthy; world.ids.backends.len()];
        world.install(slb);
        world.turn(dice, slb);
        world
    }

    /// Time passes, health and next hops change.
    pub(super) fn turn(&mut self, dice: &mut Dice, slb: &mut Slb<'_>) {
        let draw = |_: &Health| match dice.below(8) {
            0 | 1 => Health::Unhealthy,
            2 => Health::Unknown,
            _ => Health::Healthy,
        };
        self.health = self.health.iter().map(draw).collect();
        self.routes = routes(dice);
        self.ingress = Arc::new(ingress(dice, &self.routes));
        // Longer than the shortest drain.
        let later = std::time::Duration::from_secs(11);
        self.now += later;
        self.moment = self.moment.wrapping_add(self.jiffies.from_duration(later));
        self.install(slb);
    }

    fn install(&mut self, slb: &mut Slb<'_>) {
        let locals: Vec<IpAddr> = SOURCES.concat().iter().map(|addr| at(addr, 0).ip()).collect();
        let interfaces = [WAN, LAN].map(|index| (index, interface(index))).into();
        let inputs = Inputs {
            health: &self.health,
            trusted: &FxHashSet::default(),
            routes: &self.routes,
            generic: false,
            interfaces: &interfaces,
            ingress: &self.ingress,
            locals: &locals,
            jiffies: self.jiffies,
            installed: slb.maps.installed(),
            now: self.now,
            moment: self.moment,
            closing: &FxHashSet::default(),
            seed: Seed::PUBLIC,
        };
        let mut desired = self.planner.desired(&self.ids, inputs);
        desired.limits.values_mut().for_each(slow_down);
        slb.change(|state| *state = desired);
    }

    /// A listener, and the family of its VIP.
    pub(super) fn listener(&self, dice: &mut Dice) -> Listener {
        let listener = &self.ids.listeners[dice.below(self.ids.listeners.len())];
        let at = listener.endpoints[dice.below(listener.endpoints.len())];
        Listener { vip: SocketAddr::new(at.addr.into(), at.port as u16), proto: at.proto }
    }

    /// A backend's address and port.
    pub(super) fn target(&self, dice: &mut Dice) -> SocketAddr {
        self.ids.backends[dice.below(self.ids.backends.len())].addr
    }
}

#[derive(Clone, Copy)]
pub(super) struct Listener {
    pub vip: SocketAddr,
    pub proto: u32,
}

/// Keeps the burst, and takes as good as for ever for more: no limit is to end between an explanation and its packet.
fn slow_down(limits: &mut Limits) {
    const HOUR: u64 = 3_600_000_000_000;
    if limits.flow_ns != 0 {
        (limits.flow_ns, limits.flow_burst) = (HOUR, 8 * HOUR);
    }
    if limits.source_ns != 0 {
        (limits.source_ns, limits.source_burst) = (HOUR, 2 * HOUR);
    }
    if limits.byte_ns != 0 {
        // A second each.
        (limits.byte_ns, limits.byte_burst) = (1_000_000_000 << 16, 3_000 * 1_000_000_000);
    }
}

/// The route to each host: most are known.
fn routes(dice: &mut Dice) -> FxHashMap<IpAddr, BackendRoute> {
    let mut routes = FxHashMap::default();
    for number in 0..HOSTS {
        for (family, sources) in SOURCES.iter().enumerate() {
            let hop = match dice.below(10) {
                0 => NextHop::UNRESOLVED,
                1..=5 => FIRST,
                _ => SECOND,
            };
            let source = Some(at(sources[0], 0).ip());
            routes.insert(host(number, family), BackendRoute { hop, mtu: 1_500, source });
        }
    }
    routes
}

/// Where packets come from: those of most backends by where they are sent to. In every other world the backends' subnet
/// is known as that of an interface.
fn ingress(dice: &mut Dice, routes: &FxHashMap<IpAddr, BackendRoute>) -> Ingress {
    let mut ingress = Ingress {
        devices: [WAN, LAN].map(|index| (index, [index].into())).into(),
        macs: [WAN, LAN].map(|index| (index, VIRTUAL_MAC)).into(),
        ..Ingress::default()
    };
    for (&addr, route) in routes {
        let output = if route.hop.is_known() { route.hop.ifindex } else { LAN };
        let outputs = match dice.below(8) {
            0 => vec![],
            1 => vec![WAN, LAN],
            _ => vec![output],
        };
        ingress.backends.insert(addr, outputs);
    }
    if dice.one_in(2) {
        let networks = ["10.0.0.0", "2001:db8:a::"].map(|addr| at(addr, 0).ip());
        ingress.subnets =
            networks.map(|addr| (LAN, addr, if addr.is_ipv4() { 24 } else { 64 })).into();
        ingress.broadcasts = vec![at("10.0.0.255", 0).ip()];
    }
    ingress
}

fn parse(text: &str) -> Config {
    match config::parse(Path::new("random.toml"), text) {
        Ok((config, _)) => config,
        Err(report) => panic!("{report}\n{text}"),
    }
}

fn text(dice: &mut Dice) -> String {
    let mut text = "[gateway]\ninterfaces = [\"wan0\", \"lan0\"]\nannounce = \"none\"\n".to_owned();
    instance(dice, &mut text, "both", &VIPS, &[0, 1]);
    instance(dice, &mut text, "four", &CROSSING[..1], &[1]);
    instance(dice, &mut text, "six", &CROSSING[1..], &[0]);
    text
}

/// An instance whose backends have addresses of these families.
fn instance(dice: &mut Dice, text: &mut String, name: &str, vips: &[&str], families: &[usize]) {
    // `nat` and `full-nat` are most of what there is to decide.
    let modes = ["nat", "nat", "nat", "full-nat", "full-nat", "ipip", "gue", "dsr"];
    let modes = if vips.len() == 1 { &modes[..7] } else { &modes[..] };
    let mut modes: Vec<&str> = (0..LISTENERS).map(|_| dice.pick(modes)).collect();
    // One group is told the client's address in each world.
    modes[0] = "full-nat";
    let others: Vec<usize> = (0..modes.len()).filter(|of| !keeps_port(modes[*of])).collect();
    writeln!(text, "[[instance]]\nname = {name:?}\nvips = {vips:?}").expect("a string");
    for (number, mode) in modes.iter().enumerate() {
        group(dice, text, number, families, mode);
    }
    for (number, mode) in modes.iter().enumerate() {
        // What keeps the listener's port is for one listener.
        let is_own = number == 0 || keeps_port(mode);
        let group = if is_own { number } else { dice.pick(&others) };
        listener(dice, text, FIRST_PORT + number as u16, group);
    }
}

fn keeps_port(mode: &str) -> bool {
    matches!(mode, "dsr" | "ipip" | "gue")
}

fn group(dice: &mut Dice, text: &mut String, number: usize, families: &[usize], mode: &str) {
    let mut line = |args: fmt::Arguments<'_>| text.write_fmt(args).expect("a string");
    line(format_args!("[[instance.group]]\nname = \"g{number}\"\nforwarding = {mode:?}\n"));
    if mode == "full-nat" {
        let told =
            if number == 0 { "proxy-v2" } else { dice.pick(&["none", "proxy-v2", "tcp-option"]) };
        line(format_args!("client_address = {told:?}\n"));
    }
    // Groups with one port share backends.
    let port =
        if keeps_port(mode) { usize::from(FIRST_PORT) + number } else { 2_000 + dice.below(4) };
    let first = dice.below(HOSTS);
    let address = |index: usize| {
        let addrs = families.iter().map(|&family| host((first + index) % HOSTS, family));
        addrs.map(|addr| addr.to_string()).collect::<Vec<_>>()
    };
    if dice.one_in(4) {
        for (index, role) in ["primary", "secondary"].into_iter().enumerate() {
            let address = address(index);
            line(format_args!(
                "{role} = {{ name = \"b{index}\", address = {address:?}, port = {port} }}\n"
            ));
        }
        if dice.one_in(2) {
            line(format_args!("check_secondary = true\n"));
        }
        return;
    }
    for index in 0..=dice.below(4) {
        let (address, weight) = (address(index), dice.pick(&[100, 100, 60, 7, 1, 0]));
        line(format_args!(
            "[[instance.group.backend]]\nname = \"b{index}\"\naddress = {address:?}\n\
             port = {port}\nweight = {weight}\ndrain = {}\n",
            dice.one_in(8)
        ));
    }
}

fn listener(dice: &mut Dice, text: &mut String, port: u16, group: usize) {
    let is_tcp = port == FIRST_PORT || dice.below(3) > 0;
    let protocol = if is_tcp { "tcp" } else { "udp" };
    let schedulers = ["tch", "tch", "sch", "wrr", "rr", "wlc", "wlc", "qch"];
    let scheduler = dice.pick(if is_tcp { &schedulers[..7] } else { &schedulers[..] });
    let mut line = |args: fmt::Arguments<'_>| text.write_fmt(args).expect("a string");
    line(format_args!(
        "[[instance.listener]]\nprotocol = {protocol:?}\nport = {port}\ngroup = \"g{group}\"\n\
         scheduler = {scheduler:?}\n"
    ));
    if dice.one_in(4) {
        line(format_args!("persistence = \"1h\"\n"));
    }
    if dice.one_in(2) {
        line(format_args!("drain = \"10s\"\n"));
    }
    if dice.one_in(4) {
        line(format_args!("all_unhealthy = \"fail-open\"\n"));
    }
    if dice.one_in(4) {
        let mode = dice.pick(&["allow", "deny"]);
        line(format_args!(
            "[instance.listener.acl]\nmode = {mode:?}\n\
             sources = [\"198.51.100.0/24\", \"198.51.102.7\", \"2001:db8:100::/48\", \"10.0.0.0/24\"]\n"
        ));
    }
    match port % 6 {
        0 => line(format_args!("[instance.listener.limits]\nnew_flows = 10\n")),
        1 => line(format_args!("[instance.listener.limits]\nnew_flows_per_source = 10\n")),
        3 => line(format_args!("[instance.listener.limits]\nbandwidth = \"8mbit\"\n")),
        _ => {}
    }
    if dice.one_in(6) {
        line(format_args!("[instance.listener.health_check]\nenabled = false\n"));
    }
}
