//! A plan of what has changed leads to the writes that a plan of everything leads to.

use proptest::prelude::*;

use super::*;
use crate::{
    config::{Acl, AclMode, HealthCheck, Limits, Protocol},
    ids::fixtures::group,
    plan::{Step, fixtures::apply, plan, plan_part},
};

/// Something that happens: what, to which object, and a number that says how.
type Event = (u8, usize, u8);

/// A gateway whose maps are written by two planners that have to agree: one plans everything each time.
struct Gateway {
    config: Config,
    ids: Arc<Ids>,
    whole: Planner,
    part: Planner,
    health: FxHashMap<u32, Health>,
    trusted: FxHashSet<u32>,
    closing: FxHashSet<u32>,
    routes: FxHashMap<IpAddr, BackendRoute>,
    interfaces: BTreeMap<u32, Interface>,
    ingress: Arc<crate::net::Ingress>,
    locals: Vec<IpAddr>,
    generic: bool,
    installed: State,
    in_line: bool,
    /// How many more writes the maps take.
    takes: usize,
    /// Whether access lists stay for now.
    keeps_lists: bool,
    begin: Instant,
    now: Instant,
    seed: Seed,
    /// How often a part was planned.
    parts: usize,
}

/// Pairs share backends, a group sees sources of the gateway, and each protocol and scheduler has a listener.
fn gateway() -> Config {
    let mut shop = three();
    shop.vips = addresses(&["203.0.113.10", "203.0.113.11", "2001:db8::10"]);
    shop.groups[0].backends[0].addresses = addresses(&["10.0.0.1", "2001:db8::1"]);
    let rr = Listener { scheduler: Scheduler::Wrr, ..listener(82) };
    let udp = Listener { protocol: Protocol::Udp, ..listener(53) };
    shop.listeners = vec![Listener { drain: Some(Duration::from_secs(10)), ..listener(80) }];
    shop.listeners.extend([listener(81), rr, udp]);
    let mut other = instance(["10.0.0.3", "10.0.0.4"].map(backend));
    other.name = "other".to_owned();
    other.vips = addresses(&["203.0.113.20"]);
    other.groups.push(group(["10.0.1.1", "10.0.1.2"].map(backend)));
    other.groups[1].forwarding = Forwarding::FullNat;
    other.listeners.push(Listener { group: 1, ..listener(443) });
    config([shop, other])
}

impl Gateway {
    fn new() -> Self {
        let config = gateway();
        let mut gateway = Self {
            ids: Arc::new(Ids::assign(&config, &State::default()).unwrap()),
            config,
            whole: Planner::default(),
            part: Planner::default(),
            health: FxHashMap::default(),
            trusted: FxHashSet::default(),
            closing: FxHashSet::default(),
            routes: FxHashMap::default(),
            interfaces: BTreeMap::new(),
            ingress: Arc::default(),
            locals: Vec::new(),
            generic: false,
            installed: State::default(),
            in_line: false,
            takes: usize::MAX,
            keeps_lists: false,
            begin: Instant::now(),
            now: Instant::now(),
            seed: Seed::PUBLIC,
            parts: 0,
        };
        gateway.reconcile();
        gateway
    }

    fn happen(&mut self, (what, which, how): Event) {
        let server = self.ids.backends.get(which % self.ids.backends.len().max(1));
        let server = server.map(|server| (server.id, server.addr.ip()));
        // Without a listener there is none.
        let Some((id, address)) = server else { return self.reconcile() };
        match what {
            0..4 => self.edit(|config| change_backend(config, which, how)),
            4 => self.edit(|config| change_listener(config, which, how)),
            5..9 => {
                let health = [Healthy, Unhealthy, Unhealthy, Unknown][usize::from(how % 4)];
                self.health.insert(id, health);
            }
            9 => toggle(&mut self.trusted, id),
            10 => toggle(&mut self.closing, id),
            11 => {
                let hop = NextHop { ifindex: 1 + u32::from(how % 2), ..NextHop::UNRESOLVED };
                let source = Some(addr("10.0.0.254")).filter(|_| how % 3 == 0);
                self.routes.insert(address, BackendRoute { hop, mtu: 1_500, source });
            }
            12 => self.now += Duration::from_secs([0, 2, 11, 901][usize::from(how % 4)]),
            13 => {
                for planner in [&mut self.whole, &mut self.part] {
                    let pinned: FxHashSet<usize> = (0..usize::from(how)).collect();
                    for (id, schedule) in planner.watched() {
                        planner.settle(id, &schedule, &pinned);
                    }
                }
            }
            14 => match how % 3 {
                0 => self.generic = !self.generic,
                1 => drop(
                    self.interfaces
                        .insert(1, Interface { ifindex: 1, redirect: 1, ..Interface::default() }),
                ),
                _ if how % 2 == 0 => self.locals.push(addr(&format!("10.0.0.{how}"))),
                _ => self.seed = Seed::new([how.into(); abi::SEED_WORDS]),
            },
            _ if how % 4 == 0 => self.keeps_lists = true,
            _ => self.takes = usize::from(how / 4),
        }
        self.reconcile();
    }

    fn edit(&mut self, change: impl FnOnce(&mut Config)) {
        change(&mut self.config);
        self.ids = Arc::new(Ids::assign(&self.config, &self.installed).unwrap());
        self.whole.keep(&self.ids);
        self.part.keep(&self.ids);
    }

    /// Brings the maps in line, as the agent does.
    fn reconcile(&mut self) {
        let healths = self.ids.backends.iter().map(|backend| self.health.get(&backend.id));
        let health: Vec<Health> = healths.map(|it| it.copied().unwrap_or(Healthy)).collect();
        let jiffies = Jiffies::per_second(250);
        let inputs = Inputs {
            health: &health,
            trusted: &self.trusted,
            routes: &self.routes,
            generic: self.generic,
            interfaces: &self.interfaces,
            ingress: &self.ingress,
            locals: &self.locals,
            jiffies,
            installed: &self.installed,
            now: self.now,
            moment: jiffies.from_duration(self.now - self.begin),
            closing: &self.closing,
            seed: self.seed,
        };
        let expected = plan(&self.whole.desired(&self.ids, inputs), &self.installed);
        let part = if self.in_line { self.part.desired_part(&self.ids, inputs) } else { None };
        self.parts += usize::from(part.is_some());
        let steps = match part {
            Some(part) => plan_part(&part, &self.installed),
            None => plan(&self.part.desired(&self.ids, inputs), &self.installed),
        };
        assert_eq!(steps, expected);
        assert_eq!(self.part.due(), self.whole.due());

        let is_kept = |step: &Step| self.keeps_lists && matches!(step, Step::RemoveAcl(..));
        self.in_line = steps.len() <= self.takes && !steps.iter().any(is_kept);
        let taken = steps.into_iter().take(self.takes).filter(|step| !is_kept(step));
        taken.for_each(|step| apply(&mut self.installed, step));
        (self.takes, self.keeps_lists) = (usize::MAX, false);
    }
}

fn toggle(set: &mut FxHashSet<u32>, id: u32) {
    if !set.remove(&id) {
        set.insert(id);
    }
}

fn change_backend(config: &mut Config, which: usize, how: u8) {
    let instance = Arc::make_mut(&mut config.instances[which % 2]);
    let groups = instance.groups.len();
    let backends = &mut instance.groups[which / 2 % groups].backends;
    let index = which / 4 % backends.len();
    match how % 8 {
        0 if backends.len() > 1 => drop(backends.remove(index)),
        0 | 1 => {
            let free = (1..).map(|host| format!("10.0.2.{host}"));
            let mut free = free.filter(|name| backends.iter().all(|known| known.name != *name));
            backends.extend(free.next().map(|name| backend(&name)));
        }
        2 => backends[index].drain = !backends[index].drain,
        _ => backends[index].weight = how % 101,
    }
}

fn change_listener(config: &mut Config, which: usize, how: u8) {
    let instance = Arc::make_mut(&mut config.instances[which % 2]);
    let count = instance.listeners.len();
    let listener = &mut instance.listeners[which / 2 % count];
    let sources = |text: &str| Arc::new([text.parse().unwrap()].into());
    match how % 8 {
        0 => listener.enabled = !listener.enabled,
        1 => {
            let schedulers = [Scheduler::Tch, Scheduler::Sch, Scheduler::Rr, Scheduler::Wlc];
            listener.scheduler = schedulers[usize::from(how / 8 % 4)];
        }
        2 => listener.persistence = Some(Duration::from_secs(60)).filter(|_| how >= 128),
        3 => listener.limits = Limits { new_flows: Some(how.into()), ..Limits::default() },
        4 => listener.limits = Limits::default(),
        5 => {
            let list = ["198.51.100.0/24", "192.0.2.0/24"][usize::from(how / 8 % 2)];
            listener.acl = Some(Acl { mode: AclMode::Allow, sources: sources(list) });
        }
        6 => listener.acl = None,
        _ if how >= 128 => listener.health_check = None,
        _ => {
            let check = self::listener(80).health_check;
            listener.health_check = check.map(|check| HealthCheck { passive: how >= 64, ..check });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn given_any_events_when_only_changes_are_planned_then_the_writes_are_those_of_a_whole_plan(
        events in proptest::collection::vec((0_u8..16, any::<usize>(), any::<u8>()), 1..32),
    ) {
        let mut gateway = Gateway::new();
        events.into_iter().for_each(|event| gateway.happen(event));
    }
}

#[test]
fn given_another_weight_or_health_when_planned_then_other_listeners_are_left_alone() {
    let mut gateway = Gateway::new();
    gateway.edit(|config| {
        Arc::make_mut(&mut config.instances[1]).groups[1].backends[0].weight = 7;
    });
    gateway.reconcile();
    let changed = gateway.ids.backends.iter().find(|it| it.addr.ip() == addr("10.0.1.2")).unwrap();
    gateway.health.insert(changed.id, Unhealthy);
    gateway.reconcile();
    assert_eq!(gateway.parts, 2);
}
