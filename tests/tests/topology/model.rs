//! Random changes of the configuration, of the agent and of servers, one after the other, while connections are held.
//!
//! After each change new connections are answered by a backend that may answer, a backend whose server is dead is not
//! healthy, no counter has fallen, and no connection that the changes do not concern has failed.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use serde_json::Value;
use slb_lab::{Client, Dice, Failure, Gateway, Server, Service, Session, Sessions, Topology};

use crate::support::{edit, output, wait_until};

/// A listener's port, and the service behind it: an address and port of a backend that only one VIP leads to is another
/// case than one that several share.
const SERVICES: [(u16, Service); 2] = [(80, Service::Http(8080)), (81, Service::Http(8081))];
const METRICS: &str = "http://127.0.0.1:9470/metrics";
/// So many VIPs of each family.
const VIPS: u8 = 4;
const SCHEDULERS: [&str; 4] = ["tch", "wrr", "rr", "wlc"];
/// How many changes, unless `SLB_STEPS` says so.
const STEPS: usize = 60;
/// Connections of one cohort.
const HELD: usize = 3;
/// So many cohorts are held at once.
const COHORTS: usize = 12;

#[derive(Clone, Debug)]
struct Listener {
    port: u16,
    scheduler: &'static str,
    enabled: bool,
    checked: bool,
}

#[derive(Clone, Debug)]
struct Member {
    host: usize,
    name: String,
    weight: u64,
}

#[derive(Clone, Debug)]
struct Instance {
    name: String,
    vips: Vec<u8>,
    members: Vec<Member>,
    listeners: Vec<Listener>,
}

/// Connections to one VIP and port that were opened at the same time, and what has become of those meanwhile.
struct Cohort {
    vip: u8,
    port: u16,
    sessions: Sessions,
    /// The VIP has moved: they go on or are reset, and do not hang.
    moved: bool,
    /// Their listener is stopped, or their VIP gone: they may end in any way.
    ended: bool,
    /// Hosts whose servers have been stopped.
    dead: BTreeSet<usize>,
}

struct Model {
    dice: Dice,
    topology: Topology,
    /// Of each host, those of [`SERVICES`].
    servers: Vec<[Server; 2]>,
    gateway: Gateway,
    client: Client,
    instances: Vec<Instance>,
    /// The host whose server is stopped.
    dead: Option<usize>,
    cohorts: Vec<Cohort>,
    counters: BTreeMap<String, f64>,
    /// Makes names that were not there before.
    names: u32,
}

fn addresses(vip: u8) -> [IpAddr; 2] {
    let last = 101 + vip;
    let v6 = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x100 + u16::from(last));
    [Ipv4Addr::new(192, 0, 2, last).into(), v6.into()]
}

impl Model {
    fn new(dice: Dice) -> Self {
        let topology = Topology::build().unwrap();
        let servers = topology.backends.iter();
        let servers = servers
            .map(|host| SERVICES.map(|(_, service)| Server::start(host, service).unwrap()))
            .collect();
        let instance = |name: &str, vips: &[u8], hosts: [usize; 2]| Instance {
            name: name.to_owned(),
            vips: vips.to_vec(),
            members: hosts.map(|host| Member { host, name: format!("m{host}"), weight: 50 }).into(),
            listeners: [(80, "tch"), (81, "wrr")]
                .map(|(port, scheduler)| Listener { port, scheduler, enabled: true, checked: true })
                .into(),
        };
        let instances = vec![instance("a", &[0, 1], [0, 1]), instance("b", &[2], [2, 3])];
        let mut model = Self {
            dice,
            gateway: Gateway::new(&topology, "").unwrap(),
            client: Client::new(&topology.clients[0]),
            topology,
            servers,
            instances,
            dead: None,
            cohorts: Vec::new(),
            counters: BTreeMap::new(),
            names: 9,
        };
        model.write();
        model.gateway.start().unwrap();
        model
    }

    fn name(&mut self, of: &str) -> String {
        self.names += 1;
        format!("{of}{}", self.names)
    }

    fn write(&self) {
        let mut text = String::new();
        for Instance { name, vips, members, listeners } in &self.instances {
            let vips: Vec<_> =
                vips.iter().flat_map(|&vip| addresses(vip)).map(|vip| vip.to_string()).collect();
            text += &format!("[[instance]]\nname = {name:?}\nvips = {vips:?}\n");
            for Member { host, name, weight } in members {
                let addresses = self.topology.backends[*host].addresses().map(|it| it.to_string());
                text += &format!(
                    "[[instance.backend]]\nname = {name:?}\naddress = {addresses:?}\n\
                     weight = {weight}\n"
                );
            }
            for Listener { port, scheduler, enabled, checked } in listeners {
                let check = if *checked {
                    "type = \"http\"\npath = \"/healthz\"\ninterval = \"500ms\"\n\
                     timeout = \"400ms\"\nhealthy = 2\nunhealthy = 2\n"
                } else {
                    "enabled = false\n"
                };
                text += &format!(
                    "[[instance.listener]]\nprotocol = \"tcp\"\nport = {port}\nbackend_port = \
                     {}\nscheduler = {scheduler:?}\nenabled = \
                     {enabled}\n[instance.listener.health_check]\n{check}",
                    SERVICES.iter().find(|(of, _)| of == port).unwrap().1.port()
                );
            }
        }
        self.gateway.configure(&text).unwrap();
        edit(&self.gateway, "[gateway]\n", "[gateway]\nhttp = \"127.0.0.1:9470\"\n");
    }

    /// Changes something, and says what; nothing, if it is not possible now.
    fn change(&mut self) -> Option<String> {
        let at = self.dice.below(self.instances.len());
        match self.dice.below(14) {
            0 | 1 => self.move_vip(at),
            2 => self.add_or_remove_vip(at),
            3 | 4 => self.add_or_remove_member(at),
            5 => {
                let (member, weight) = (
                    self.dice.below(self.instances[at].members.len()),
                    self.dice.below(3) as u64 * 40,
                );
                self.instances[at].members[member].weight = weight;
                Some(format!("weight {weight}"))
            }
            6 => {
                self.instances[at].name = self.name("i");
                Some("an instance is renamed".to_owned())
            }
            7 => {
                let (member, name) =
                    (self.dice.below(self.instances[at].members.len()), self.name("m"));
                self.instances[at].members[member].name = name;
                Some("a backend is renamed".to_owned())
            }
            8 => self.start_or_stop_listener(at),
            9 => {
                let (listener, scheduler) = (self.dice.below(2), self.dice.below(SCHEDULERS.len()));
                self.instances[at].listeners[listener].scheduler = SCHEDULERS[scheduler];
                Some(format!("scheduler {}", SCHEDULERS[scheduler]))
            }
            10 => {
                let listener = self.dice.below(2);
                let listener = &mut self.instances[at].listeners[listener];
                listener.checked = !listener.checked;
                Some(format!("checks {}", listener.checked))
            }
            11 => {
                self.instances.reverse();
                self.instances[0].members.reverse();
                self.instances[0].listeners.reverse();
                Some("another order".to_owned())
            }
            12 => self.start_or_stop_server(),
            _ => {
                if self.dice.below(2) == 0 {
                    self.gateway.kill().unwrap();
                } else {
                    self.gateway.terminate().unwrap();
                }
                self.gateway.start().unwrap();
                // What the agent itself counts begins at 0 with it.
                self.counters.retain(|name, _| !name.starts_with("slb_health_"));
                Some("the agent starts again".to_owned())
            }
        }
    }

    fn move_vip(&mut self, from: usize) -> Option<String> {
        if self.instances[from].vips.len() < 2 {
            return None;
        }
        let place = self.dice.below(self.instances[from].vips.len());
        let vip = self.instances[from].vips.remove(place);
        let to = (from + 1) % self.instances.len();
        self.instances[to].vips.push(vip);
        let served = self.served();
        for cohort in self.cohorts.iter_mut().filter(|cohort| cohort.vip == vip) {
            cohort.moved = true;
            // No backend may answer there.
            let is_served =
                |(vip, port, _): &(u8, u16, _)| (*vip, *port) == (cohort.vip, cohort.port);
            cohort.ended |= !served.iter().any(is_served);
        }
        Some(format!("VIP {vip} moves"))
    }

    fn add_or_remove_vip(&mut self, at: usize) -> Option<String> {
        let used: BTreeSet<u8> =
            self.instances.iter().flat_map(|instance| instance.vips.iter().copied()).collect();
        if let Some(free) = (0..VIPS).find(|vip| !used.contains(vip)) {
            self.instances[at].vips.push(free);
            return Some(format!("VIP {free} is added"));
        }
        if self.instances[at].vips.len() < 2 {
            return None;
        }
        let vip = self.instances[at].vips.remove(0);
        let gone = self.cohorts.iter_mut().filter(|cohort| cohort.vip == vip);
        gone.for_each(|cohort| cohort.ended = true);
        Some(format!("VIP {vip} is removed"))
    }

    fn add_or_remove_member(&mut self, at: usize) -> Option<String> {
        let host = self.dice.below(self.topology.backends.len());
        let name = self.name("m");
        let members = &mut self.instances[at].members;
        match members.iter().position(|member| member.host == host) {
            Some(place) if members.len() > 1 => {
                members.remove(place);
                Some(format!("host {host} is removed"))
            }
            Some(_) => None,
            None => {
                members.push(Member { host, name, weight: 50 });
                Some(format!("host {host} is added"))
            }
        }
    }

    fn start_or_stop_listener(&mut self, at: usize) -> Option<String> {
        let listener = self.dice.below(2);
        let Instance { vips, listeners, .. } = &mut self.instances[at];
        let listener = &mut listeners[listener];
        listener.enabled = !listener.enabled;
        if !listener.enabled {
            // Connections to a VIP that has moved away end as well: their backends are this listener's.
            for cohort in self.cohorts.iter_mut().filter(|cohort| cohort.port == listener.port) {
                cohort.ended |= cohort.moved || vips.contains(&cohort.vip);
            }
        }
        Some(format!("port {} enabled: {}", listener.port, listener.enabled))
    }

    fn start_or_stop_server(&mut self) -> Option<String> {
        if let Some(dead) = self.dead.take() {
            self.servers[dead].iter_mut().for_each(|server| server.restart().unwrap());
            return Some(format!("server {dead} is back"));
        }
        let host = self.dice.below(self.servers.len());
        self.servers[host].iter_mut().for_each(Server::stop);
        self.dead = Some(host);
        for cohort in &mut self.cohorts {
            cohort.dead.insert(host);
        }
        Some(format!("server {host} is stopped"))
    }

    /// Where clients may connect to, and who may answer there.
    fn served(&self) -> Vec<(u8, u16, BTreeSet<usize>)> {
        let mut served = Vec::new();
        for Instance { vips, members, listeners, .. } in &self.instances {
            for listener in listeners.iter().filter(|listener| listener.enabled) {
                let weighted = members.iter().filter(|member| member.weight > 0);
                let weighted: BTreeSet<usize> = weighted.map(|member| member.host).collect();
                let dead = self.dead.filter(|dead| weighted.contains(dead));
                // Without checks the dead one gets its share.
                if dead.is_some() && !listener.checked {
                    continue;
                }
                let live: BTreeSet<usize> =
                    weighted.into_iter().filter(|host| Some(*host) != dead).collect();
                if !live.is_empty() {
                    served.extend(vips.iter().map(|&vip| (vip, listener.port, live.clone())));
                }
            }
        }
        served
    }

    /// Each backend that is checked: whether its server runs, and its health.
    fn checked(&self, status: &Value) -> Vec<(bool, String)> {
        let mut checked = Vec::new();
        for instance in &self.instances {
            let shown = status["instances"].as_array().unwrap();
            let shown = shown.iter().find(|shown| shown["name"] == *instance.name).unwrap();
            for listener in instance.listeners.iter().filter(|listener| listener.checked) {
                let shown = shown["listeners"].as_array().unwrap().iter();
                let shown = shown.filter(|shown| shown["port"] == listener.port);
                for backend in shown.flat_map(|shown| shown["backends"].as_array().unwrap()) {
                    let member = instance.members.iter().find(|it| backend["name"] == *it.name);
                    // One that was removed is shown while it has flows.
                    let Some(member) = member else { continue };
                    let lives = Some(member.host) != self.dead;
                    checked.push((lives, backend["health"].as_str().unwrap().to_owned()));
                }
            }
        }
        checked
    }

    fn expect_health(&self, said: &str) {
        let status = self.gateway.status().unwrap();
        let wrong =
            self.checked(&status).into_iter().any(|(lives, health)| !lives && health == "healthy");
        assert!(!wrong, "{said}: a dead backend is healthy:\n{status:#}");
    }

    fn settle(&self) {
        wait_until("every probe has said what it finds", || {
            let checked = self.checked(&self.gateway.status().unwrap());
            checked
                .iter()
                .all(|(lives, health)| health == if *lives { "healthy" } else { "unhealthy" })
        });
    }

    fn expect_traffic(&self, said: &str) {
        for (vip, port, allowed) in self.served() {
            let names: BTreeSet<&str> =
                allowed.iter().map(|host| self.topology.backends[*host].name.as_str()).collect();
            for to in addresses(vip).map(|vip| SocketAddr::from((vip, port))) {
                let outcome = self.client.http(to, 12, 4).unwrap();
                let by = outcome.per_backend.keys().all(|by| names.contains(by.as_str()));
                assert!(outcome.ok() == 12 && by, "{said}: {to} by {names:?}: {outcome}");
            }
        }
    }

    fn expect_counters(&mut self, said: &str) {
        let text = output(&self.topology.gateway, "curl", &["--silent", "--fail", METRICS]);
        let lines =
            text.lines().filter(|line| !line.starts_with('#') && line.contains("listener="));
        let series = lines.filter_map(|line| line.rsplit_once(' ')).filter(|(name, _)| {
            name.split('{').next().is_some_and(|name| name.ends_with("_total"))
        });
        let now: BTreeMap<String, f64> =
            series.map(|(name, value)| (name.to_owned(), value.parse().unwrap())).collect();
        let is_any = self.instances.iter().flat_map(|it| &it.listeners).any(|it| it.enabled);
        assert_eq!(!now.is_empty(), is_any, "{said}");
        for (name, value) in &now {
            let before = self.counters.get(name).copied().unwrap_or_default();
            assert!(*value >= before, "{said}: {name} has fallen from {before} to {value}");
        }
        self.counters = now;
    }

    fn hold(&mut self) {
        let served = self.served();
        if served.is_empty() {
            return;
        }
        let (vip, port, _) = served[self.dice.below(served.len())].clone();
        let to = SocketAddr::from((addresses(vip)[self.dice.below(2)], port));
        let sessions = Sessions::open(&self.client, to, HELD).unwrap();
        let dead = self.dead.into_iter().collect();
        self.cohorts.push(Cohort { vip, port, sessions, moved: false, ended: false, dead });
    }

    fn step(&mut self, step: usize) {
        let Some(said) = self.change() else { return };
        println!("{step}: {said}");
        self.write();
        let reload = self.gateway.slb(&["reload"]).unwrap();
        assert!(reload.status.success(), "{said}: {}", String::from_utf8_lossy(&reload.stderr));
        if !said.starts_with("server") {
            self.expect_health(&said);
        }
        self.settle();
        self.expect_traffic(&said);
        self.expect_counters(&said);
        self.expect_held(&said);
        if step.is_multiple_of(2) {
            self.hold();
        }
    }

    /// Connections that the changes so far do not concern go on; those to a VIP that moves do, or are reset.
    fn expect_held(&mut self, said: &str) {
        let before: Vec<_> = self.cohorts.iter().map(|cohort| cohort.sessions.so_far()).collect();
        wait_until("every connection has an answer more, or has ended", || {
            let pairs = self.cohorts.iter().zip(&before);
            let mut pairs =
                pairs.flat_map(|(cohort, before)| cohort.sessions.so_far().into_iter().zip(before));
            pairs.all(|(now, before)| now.failure.is_some() || now.answered > before.answered)
        });
        for Cohort { vip, port, sessions, moved, ended, dead } in &self.cohorts {
            let is_dead = |session: &Session| {
                dead.iter().any(|&host| self.topology.backends[host].name == session.backend)
            };
            for session in sessions.so_far().iter().filter(|it| !ended && !is_dead(it)) {
                let is_right = match session.failure {
                    None => true,
                    Some(failure) => *moved && failure == Failure::Reset,
                };
                assert!(is_right, "{said}: VIP {vip} port {port}, moved: {moved}: {session:?}");
            }
        }
        self.cohorts.retain(|cohort| !cohort.ended);
        let excess = self.cohorts.len().saturating_sub(COHORTS);
        self.cohorts.drain(..excess);
    }
}

#[test]
#[ignore = "needs root"]
fn given_held_connections_when_anything_changes_at_random_then_only_what_it_concerns_notices() {
    let steps = env::var("SLB_STEPS").map_or(STEPS, |text| text.parse().unwrap());
    let mut model = Model::new(Dice::new(1));
    model.settle();
    for _ in 0..4 {
        model.hold();
    }
    (1..=steps).for_each(|step| model.step(step));
}
