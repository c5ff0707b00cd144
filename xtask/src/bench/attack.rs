//! Honest clients while somebody attacks: how many get through, and what a packet costs meanwhile.
//!
//! One gateway has listeners of every scheduler and forwarding mode. For each attack it starts afresh; clients hold
//! connections, make new ones, and then the attack begins.

use std::{
    collections::BTreeSet,
    fs,
    net::{SocketAddr, SocketAddrV4},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use aya::{
    programs::{ProgramInfo, loaded_programs},
    sys::{Stats, enable_stats},
};
use serde::Serialize;
use slb_lab::{
    Client, Gateway, Host, Load, Netns, Outcome, Sessions,
    attack::{Attack, Flood, Target, device, frame::Macs},
    interrupt,
    topology::{INTERFACES, VIP_V4},
};

use self::site::{LISTENERS, Listener, Site};
use crate::process;

mod site;

/// Connections that clients hold, over all TCP listeners.
const HELD: usize = 200;
/// New connections and datagrams per second, over all listeners.
const NEW: u32 = 300;
/// Between an answer on a held connection and the next request.
const PACE: Duration = Duration::from_millis(500);
/// Capacity of the flow table: so few that each attack fills it within seconds.
const FLOWS: u32 = 65_536;
/// Clients alone, before the attack.
const BEFORE: Duration = Duration::from_secs(2);
const STARTED: Duration = Duration::from_secs(30);

/// Options of `cargo xtask bench --attack`.
#[derive(Debug, clap::Args)]
pub(crate) struct AttackOptions {
    /// Only clients under attack, by all attacks or those that are named; "mix" is all at once
    #[arg(long, value_name = "NAME", num_args = 0..)]
    pub attack: Option<Vec<String>>,
    /// How long each attack goes on
    #[arg(long, value_name = "SECONDS", default_value_t = 10, requires = "attack",
        value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Packets of an attack per second
    #[arg(long, value_name = "PACKETS", default_value_t = 50_000, requires = "attack",
        value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
}

/// What became of honest clients under one attack.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    /// What the attacker sent.
    pub attack: String,
    /// Packets per second of it.
    pub rate: f64,
    /// New connections and datagrams that were tried.
    pub new: u64,
    /// The part of them that was answered, 0 to 1.
    pub answered: f64,
    /// The listener with the smallest part, and that part.
    pub worst: (String, f64),
    /// Held connections, and how many of them broke.
    pub held: usize,
    pub lost: usize,
    /// Nanoseconds of the program per packet, of all packets, with the kernel's accounting.
    pub nanoseconds: f64,
}

/// Measures without an attack, and then under each.
///
/// # Errors
///
/// A name is wrong, or the lab does not work.
pub(super) fn measure(options: &AttackOptions) -> Result<Vec<Row>> {
    interrupt::install()?;
    let names = options.attack.as_deref().unwrap_or_default();
    let mut scenes = vec![Scene { name: "none", says: "none", attacks: Vec::new() }];
    scenes.extend(Attack::ALL.into_iter().map(|attack| {
        let (name, says) = attack.texts();
        Scene { name, says, attacks: vec![attack] }
    }));
    scenes.push(Scene { name: "mix", says: "all of them at once", attacks: Attack::ALL.to_vec() });
    if let Some(wrong) = names.iter().find(|name| scenes.iter().all(|scene| scene.name != **name)) {
        let known: Vec<_> = scenes.iter().map(|scene| scene.name).collect();
        bail!("there is no attack {wrong:?}; there are {}", known.join(", "));
    }
    scenes.retain(|scene| {
        let is_wanted = names.is_empty() || names.iter().any(|name| name == scene.name);
        is_wanted || scene.attacks.is_empty()
    });
    // While this is open, the kernel counts how often programs run, and for how long.
    let _statistics = enable_stats(Stats::RunTime).context("the kernel's run-time statistics")?;
    let site = Site::build()?;
    let mut rows = Vec::new();
    for scene in &scenes {
        interrupt::check()?;
        println!("attack: {}", scene.says);
        rows.push(row(&site, scene, options)?);
    }
    Ok(rows)
}

/// What an attacker sends: nothing, of one kind, or of all kinds.
struct Scene {
    /// By which it is chosen.
    name: &'static str,
    /// In words.
    says: &'static str,
    attacks: Vec<Attack>,
}

fn row(site: &Site, scene: &Scene, options: &AttackOptions) -> Result<Row> {
    let topology = &site.topology;
    let mut gateway = Gateway::new(topology, &site.instances())?;
    shrink(&gateway)?;
    gateway.start()?;
    gateway.wait("all backends healthy", STARTED, |status| {
        LISTENERS.iter().all(|listener| {
            let found = slb_lab::gateway::backends(status, listener.protocol, listener.port);
            found.len() == topology.backends.len()
                && found.iter().all(|backend| backend["health"] == "healthy")
        })
    })?;
    let client = Client::new(&topology.clients[0]);
    let held = hold(&client)?;
    let loads = begin(&client)?;
    wait(BEFORE)?;

    let each = options.rate / scene.attacks.len().max(1) as u32;
    let start = |attack: &Attack| {
        let target = target(site, &topology.clients[1], &held)?;
        Flood::start(&topology.clients[1], *attack, target, each)
    };
    let floods: Vec<Flood> = scene.attacks.iter().map(start).collect::<Result<_>>()?;
    let programs = programs(&topology.gateway)?;
    let before = run_time(&programs)?;
    wait(Duration::from_secs(options.seconds))?;
    let after = run_time(&programs)?;
    let rate = floods.iter().map(Flood::rate).fold(0.0, |sum, rate| sum + rate);
    // What clients have begun ends under attack, too.
    let outcomes: Vec<(&Listener, Outcome)> = loads
        .into_iter()
        .map(|(listener, load)| Ok((listener, load.stop()?)))
        .collect::<Result<_>>()?;
    let mut lost = 0;
    let mut sessions = 0;
    for (listener, held) in held {
        let held = held.stop()?;
        sessions += held.len();
        let failures: Vec<_> = held.iter().filter_map(|session| session.failure).collect();
        if let Some(first) = failures.first() {
            println!("  {listener}: {} of {} held lost, {first:?}", failures.len(), held.len());
        }
        lost += failures.len();
    }
    floods.into_iter().try_for_each(Flood::stop)?;

    let part =
        |outcome: &Outcome| outcome.ok() as f64 / (outcome.ok() + outcome.failed()).max(1) as f64;
    for (listener, outcome) in &outcomes {
        println!("  {listener}: {outcome}");
    }
    let worst = outcomes.iter().map(|(listener, outcome)| (listener.to_string(), part(outcome)));
    let worst = worst.min_by(|a, b| a.1.total_cmp(&b.1)).context("there are listeners")?;
    let ok: u64 = outcomes.iter().map(|(_, outcome)| outcome.ok()).sum();
    let new = ok + outcomes.iter().map(|(_, outcome)| outcome.failed()).sum::<u64>();
    Ok(Row {
        attack: scene.says.to_owned(),
        rate,
        new,
        answered: ok as f64 / new.max(1) as f64,
        worst,
        held: sessions,
        lost,
        nanoseconds: after.0.saturating_sub(before.0).as_nanos() as f64
            / (after.1 - before.1).max(1) as f64,
    })
}

/// Gives the flow table room for [`FLOWS`] flows.
fn shrink(gateway: &Gateway) -> Result<()> {
    let is_size = |line: &&str| line.trim_start().starts_with("flows");
    let text = fs::read_to_string(gateway.config())?;
    let before = text.lines().find(is_size).context("the lab writes the size of the flow table")?;
    fs::write(gateway.config(), text.replacen(before, &format!("flows = {FLOWS}"), 1))?;
    Ok(())
}

/// Waits, or ends with the signal that ends this program.
fn wait(time: Duration) -> Result<()> {
    let deadline = Instant::now() + time;
    while Instant::now() < deadline {
        interrupt::check()?;
        thread::sleep(deadline.saturating_duration_since(Instant::now()).min(POLL));
    }
    Ok(())
}

/// Between two looks for a signal.
const POLL: Duration = Duration::from_millis(100);

/// Connections that go on, at every TCP listener.
fn hold(client: &Client) -> Result<Vec<(&'static Listener, Sessions)>> {
    let tcp: Vec<_> = LISTENERS.iter().filter(|listener| listener.is_tcp()).collect();
    let open = |listener: &'static Listener| {
        let count = HELD.div_ceil(tcp.len());
        let sessions = Sessions::open_with_pace(client, listener.at().into(), count, PACE);
        Ok((listener, sessions.with_context(|| listener.to_string())?))
    };
    tcp.iter().copied().map(open).collect()
}

/// New connections, at every listener.
fn begin(client: &Client) -> Result<Vec<(&'static Listener, Load)>> {
    let rate = NEW / LISTENERS.len() as u32;
    let start = |listener: &'static Listener| {
        let to = listener.at().into();
        let load = if listener.is_tcp() {
            Load::start(client, to, rate)?
        } else {
            Load::start_datagrams(client, to, rate)?
        };
        Ok((listener, load))
    };
    LISTENERS.iter().map(start).collect()
}

fn target(site: &Site, attacker: &Host, held: &[(&Listener, Sessions)]) -> Result<Target> {
    let macs = Macs {
        to: device(&site.topology.gateway, INTERFACES[0])?.1,
        from: device(&attacker.netns, "eth0")?.1,
    };
    let listeners = |is_tcp| {
        let of_kind = LISTENERS.iter().filter(move |listener| listener.is_tcp() == is_tcp);
        of_kind.map(Listener::at).collect()
    };
    let held = held.iter().flat_map(|(listener, sessions)| {
        let to = listener.at();
        sessions.so_far().into_iter().filter_map(move |session| match session.client {
            SocketAddr::V4(client) => Some((client, to)),
            SocketAddr::V6(_) => None,
        })
    });
    Ok(Target {
        macs,
        tcp: listeners(true),
        udp: listeners(false),
        backends: site.servers_of_tcp(),
        held: held.collect(),
    })
}

/// The programs on the gateway's interfaces, by their numbers.
fn programs(gateway: &Netns) -> Result<BTreeSet<u64>> {
    let mut ids = BTreeSet::new();
    for interface in INTERFACES {
        let args = ["-n", gateway.name(), "-j", "link", "show", "dev", interface];
        let said = process::output("ip", &args).context("ip link")?;
        let said: serde_json::Value = serde_json::from_str(&said)?;
        let id = said[0]["xdp"]["prog"]["id"].as_u64();
        ids.insert(id.with_context(|| format!("no program on {interface}: {said}"))?);
    }
    Ok(ids)
}

/// For how long programs have run, with those that they call, and how often.
fn run_time(ids: &BTreeSet<u64>) -> Result<(Duration, u64)> {
    let all: Vec<ProgramInfo> = loaded_programs().collect::<Result<_, _>>()?;
    let found = all.iter().filter(|program| ids.contains(&program.id().into()));
    Ok(found.fold((Duration::ZERO, 0), |(time, count), program| {
        (time + program.run_time(), count + program.run_count())
    }))
}

impl std::fmt::Display for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Listener { protocol, forwarding, scheduler, more, .. } = self;
        let persistent = if more.is_empty() { "" } else { ", persistent" };
        write!(f, "{protocol} {forwarding} {scheduler}{persistent}")
    }
}

impl Listener {
    fn is_tcp(&self) -> bool {
        self.protocol == "tcp"
    }

    fn at(&self) -> SocketAddrV4 {
        SocketAddrV4::new(VIP_V4, self.port)
    }
}
