//! The modules above against the kernel, each test in network namespaces of its own.
//!
//! A namespace belongs to a thread and ends with it, so nothing is left behind, whatever happens.

use std::{
    collections::HashSet,
    future::Future,
    net::IpAddr,
    process::Command,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::*;
use crate::config::Announce;

const BOUND: Duration = Duration::from_secs(10);
const PEER_MAC: Mac = [2, 0, 0, 0, 0, 0x22];
const OWN_MAC: Mac = [2, 0, 0, 0, 0, 0x11];

/// Runs `test` in a new namespace that has `wan0`, `lan0` and a [`Peer`] at the other ends.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce(Arc<Peer>) -> F + Send + 'static) {
    thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("needs root");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let peer = Arc::new(Peer::start());
        ip("link set lo up");
        // Else link-local addresses, and the routes with them, appear a second or two later.
        std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").expect("a sysctl");
        for (name, mac, addresses) in [
            ("wan", "02:00:00:00:00:11", ["203.0.113.1/24", "2001:db8:113::1/64"]),
            ("lan", "02:00:00:00:00:12", ["10.0.0.1/24", "2001:db8:10::1/64"]),
        ] {
            ip(&format!("link add {name}0 address {mac} type veth peer name {name}1"));
            ip(&format!("link set {name}1 netns {}", peer.tid));
            ip(&format!("link set {name}0 up"));
            for address in addresses {
                ip(&format!("addr add {address} dev {name}0 nodad"));
            }
        }
        peer.ip("link set wan1 address 02:00:00:00:00:22 up");
        peer.ip("link set lan1 address 02:00:00:00:00:32 up");
        peer.ip("addr add 203.0.113.2/24 dev wan1");
        peer.ip("addr add 2001:db8:113::2/64 dev wan1 nodad");
        runtime.block_on(test(Arc::clone(&peer)));
    })
    .join()
    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

fn ip(arguments: &str) {
    run(Command::new("ip").args(arguments.split_whitespace()));
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A thread that does nothing but keep a namespace.
struct Peer {
    tid: i32,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    fn start() -> Self {
        let (tell, told) = mpsc::channel();
        let (stop, stopped) = mpsc::channel::<()>();
        let thread = thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("needs root");
            tell.send(nix::unistd::gettid().as_raw()).unwrap();
            let _ = stopped.recv();
        });
        let tid = told.recv().unwrap();
        Self { tid, stop: Some(stop), thread: Some(thread) }
    }

    fn ip(&self, arguments: &str) {
        let pid = std::process::id();
        let namespace = format!("--net=/proc/{pid}/task/{}/ns/net", self.tid);
        run(Command::new("nsenter").arg(namespace).arg("ip").args(arguments.split_whitespace()));
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The agent spawns tasks that do these; this only has to compile.
#[expect(dead_code, reason = "checked by the compiler, never called")]
fn work_can_be_spawned(
    network: &Network,
    managed: &mut ManagedNeighbours,
    announcer: &mut Announcers,
) {
    fn spawnable<T: Send>(_: T) {}
    spawnable(Network::open());
    spawnable(network.changed());
    spawnable(network.resolve_all(&[]));
    spawnable(managed.keep(&HashSet::new()));
    spawnable(announcer.announce(Announce::Arp, &[], &[]));
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn index(network: &Network, name: &str) -> u32 {
    network.interface(name).unwrap().index
}

fn both(network: &Network) -> [Interface; 2] {
    ["wan0", "lan0"].map(|name| network.interface(name).unwrap())
}

/// Waits, from event to event, until the next hop of `address` is as wanted.
async fn until(network: &Network, address: &str, wanted: impl Fn(&NextHop) -> bool) -> NextHop {
    let mut last = None;
    let search = async {
        loop {
            let hop = network.resolve(addr(address)).await.unwrap();
            if wanted(&hop) {
                return hop;
            }
            last = Some(hop);
            network.changed().await;
        }
    };
    tokio::time::timeout(BOUND, search).await.unwrap_or_else(|_| panic!("{address} stays {last:?}"))
}

/// Everything that has happened so far, including what is on its way.
async fn settle(network: &Network) {
    // Whoever sees this interface has seen all events before it.
    ip("link add marker0 type veth peer name marker1");
    while network.interface("marker0").is_none() {
        tokio::time::timeout(BOUND, network.changed()).await.expect("no event");
    }
    ip("link del marker0");
    while network.interface("marker0").is_some() {
        tokio::time::timeout(BOUND, network.changed()).await.expect("no event");
    }
    // What came in one burst with it is told in one change, by now or within the debounce.
    while tokio::time::timeout(Duration::from_millis(50), network.changed()).await.is_ok() {}
}

fn mac_of(hop: &NextHop) -> Option<Mac> {
    match hop {
        NextHop::Resolved { dst_mac, .. } => Some(*dst_mac),
        _ => None,
    }
}

fn neighbours() -> String {
    run(Command::new("ip").args(["-d", "neigh", "show", "nud", "all"]))
}

#[test]
#[ignore = "needs root"]
fn given_routes_and_neighbours_when_resolved_then_next_hops_are_the_kernels() {
    in_namespace(|_peer| async {
        ip("neigh add 203.0.113.2 dev wan0 lladdr 02:00:00:00:00:22");
        ip("neigh add 2001:db8:113::2 dev wan0 lladdr 02:00:00:00:00:22");
        ip("route add 198.51.100.0/24 via 203.0.113.2 mtu 1400");
        ip("route add 192.0.2.0/25 via inet6 2001:db8:113::2");
        ip("route add 2001:db8:99::/48 via 2001:db8:113::2");
        ip("route add blackhole 192.0.2.128/25");
        ip("route add prohibit 100.64.0.0/24");
        ip("route add unreachable 2001:db8:66::/48");
        ip("route add 100.64.1.0/24 dev lo");
        ip("rule add to 172.16.0.0/16 lookup 100");
        ip("route add 172.16.0.0/16 via 203.0.113.2 table 100");
        let network = Network::open().await.unwrap();
        let wan = index(&network, "wan0");
        let resolved = |neighbour: &str, mtu| NextHop::Resolved {
            ifindex: wan,
            neighbour: addr(neighbour),
            dst_mac: PEER_MAC,
            src_mac: OWN_MAC,
            mtu,
            source: None,
        };
        let own = network.addresses().await.unwrap();
        let (v4, v6) = ("203.0.113.2", "2001:db8:113::2");
        let lan = index(&network, "lan0");
        let cases = [
            ("203.0.113.2", resolved(v4, 1500)),
            ("2001:db8:113::2", resolved(v6, 1500)),
            ("198.51.100.7", resolved(v4, 1400)),
            ("192.0.2.5", resolved(v6, 1500)),
            ("2001:db8:99::7", resolved(v6, 1500)),
            ("172.16.3.4", resolved(v4, 1500)),
            ("10.0.0.9", NextHop::Unresolved { ifindex: lan, neighbour: addr("10.0.0.9") }),
            ("10.0.0.1", NextHop::Local),
            ("2001:db8:10::1", NextHop::Local),
            ("192.0.2.200", NextHop::Unreachable(Unreachable::Blackhole)),
            ("100.64.0.1", NextHop::Unreachable(Unreachable::Prohibited)),
            ("2001:db8:66::1", NextHop::Unreachable(Unreachable::Rejected)),
            ("100.64.1.1", NextHop::Unreachable(Unreachable::NotEthernet)),
            ("8.8.8.8", NextHop::Unreachable(Unreachable::NoRoute)),
            ("2a00::1", NextHop::Unreachable(Unreachable::NoRoute)),
            ("203.0.113.255", NextHop::Unreachable(Unreachable::NotUnicast)),
        ];

        let hops = network.resolve_all(&cases.clone().map(|(case, _)| addr(case))).await.unwrap();

        for (case, expected) in cases {
            let mut found = hops[&addr(case)].clone();
            if let NextHop::Resolved { source, .. } = &mut found {
                // Not the source for another family's neighbour.
                let source = source.take().unwrap();
                assert!(own.contains(&source), "{case} from {source}");
                assert_eq!(source.is_ipv4(), addr(case).is_ipv4(), "{case} from {source}");
            }
            assert_eq!(found, expected, "{case}");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_resolved_next_hop_when_its_mac_changes_or_fails_then_the_agent_hears_of_it() {
    in_namespace(|_peer| async {
        ip("neigh add 10.0.0.9 dev lan0 lladdr 02:00:00:00:00:91 nud reachable");
        let network = Network::open().await.unwrap();
        until(&network, "10.0.0.9", |hop| mac_of(hop) == Some([2, 0, 0, 0, 0, 0x91])).await;
        settle(&network).await;

        ip("neigh change 10.0.0.9 dev lan0 lladdr 02:00:00:00:00:92 nud reachable");

        let change = tokio::time::timeout(BOUND, network.changed()).await.unwrap();
        assert!(change.neighbours && change.moved && !change.routes, "{change:?}");
        until(&network, "10.0.0.9", |hop| mac_of(hop) == Some([2, 0, 0, 0, 0, 0x92])).await;
        ip("neigh del 10.0.0.9 dev lan0");
        until(&network, "10.0.0.9", |hop| matches!(hop, NextHop::Unresolved { .. })).await;
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_reachable_neighbour_when_it_turns_stale_then_nothing_has_changed() {
    in_namespace(|_peer| async {
        ip("neigh add 10.0.0.9 dev lan0 lladdr 02:00:00:00:00:91 nud reachable");
        let network = Network::open().await.unwrap();
        settle(&network).await;

        ip("neigh change 10.0.0.9 dev lan0 lladdr 02:00:00:00:00:91 nud stale");
        ip("neigh add 10.0.0.10 dev lan0 lladdr 02:00:00:00:00:a1 nud reachable");

        let change = tokio::time::timeout(BOUND, network.changed()).await.unwrap();
        let first_resolution = NetworkChange { neighbours: true, ..NetworkChange::default() };
        assert_eq!(change, first_resolution, "only the second neighbour counts");
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_remembered_route_when_routes_rules_or_links_change_then_it_is_asked_for_again() {
    in_namespace(|_peer| async {
        ip("neigh add 203.0.113.2 dev wan0 lladdr 02:00:00:00:00:22");
        ip("neigh add 203.0.113.3 dev wan0 lladdr 02:00:00:00:00:33");
        ip("route add 198.51.100.0/24 via 203.0.113.2");
        let network = Network::open().await.unwrap();
        let target = "198.51.100.7";
        until(&network, target, |hop| mac_of(hop) == Some(PEER_MAC)).await;

        ip("route replace 198.51.100.0/24 via 203.0.113.3");
        until(&network, target, |hop| mac_of(hop) == Some([2, 0, 0, 0, 0, 0x33])).await;

        ip("rule add to 198.51.100.7 blackhole");
        let blackhole = NextHop::Unreachable(Unreachable::Blackhole);
        until(&network, target, |hop| *hop == blackhole).await;
        ip("rule del to 198.51.100.7 blackhole");
        until(&network, target, |hop| mac_of(hop).is_some()).await;

        ip("link set wan0 address 02:00:00:00:00:19");
        // The kernel forgets an interface's neighbours when its MAC changes.
        ip("neigh replace 203.0.113.2 dev wan0 lladdr 02:00:00:00:00:22");
        ip("neigh replace 203.0.113.3 dev wan0 lladdr 02:00:00:00:00:33");
        until(&network, target, |hop| {
            matches!(hop, NextHop::Resolved { src_mac: [2, 0, 0, 0, 0, 0x19], .. })
        })
        .await;

        ip("nexthop add id 5 via 203.0.113.2 dev wan0");
        ip("route replace 198.51.100.0/24 nhid 5");
        until(&network, target, |hop| mac_of(hop) == Some(PEER_MAC)).await;
        ip("nexthop replace id 5 via 203.0.113.3 dev wan0");
        until(&network, target, |hop| mac_of(hop) == Some([2, 0, 0, 0, 0, 0x33])).await;

        ip("route del 198.51.100.0/24");
        until(&network, target, |hop| *hop == NextHop::Unreachable(Unreachable::NoRoute)).await;

        ip("link set wan0 down");
        until(&network, "203.0.113.2", |hop| matches!(hop, NextHop::Unreachable(_))).await;
    });
}

#[test]
#[ignore = "needs root"]
fn given_wanted_neighbours_when_kept_then_the_kernel_resolves_and_manages_them_until_released() {
    in_namespace(|_peer| async {
        ip("neigh add 203.0.113.9 dev wan0 lladdr 02:00:00:00:00:99 nud permanent");
        let network = Network::open().await.unwrap();
        let wan = index(&network, "wan0");
        let wanted: HashSet<_> =
            ["203.0.113.2", "203.0.113.9", "2001:db8:113::2"].map(|a| (wan, addr(a))).into();
        let mut managed = ManagedNeighbours::new(&network);

        managed.keep(&wanted).await.unwrap();

        until(&network, "203.0.113.2", |hop| mac_of(hop) == Some(PEER_MAC)).await;
        until(&network, "2001:db8:113::2", |hop| mac_of(hop) == Some(PEER_MAC)).await;
        settle(&network).await;
        assert_eq!(neighbours().matches("managed").count(), 2, "{}", neighbours());

        // What is kept costs nothing.
        managed.keep(&wanted).await.unwrap();
        let quiet = tokio::time::timeout(Duration::from_millis(100), network.changed()).await;
        assert!(quiet.is_err(), "{quiet:?}");

        // A sweep takes it away; the next call brings it back, and a new process adopts it.
        let mut managed = ManagedNeighbours::new(&network);
        ip("neigh flush dev wan0");
        until(&network, "203.0.113.2", |hop| mac_of(hop).is_none()).await;
        managed.keep(&wanted).await.unwrap();
        until(&network, "203.0.113.2", |hop| mac_of(hop) == Some(PEER_MAC)).await;
        settle(&network).await;

        ManagedNeighbours::new(&network).keep(&HashSet::new()).await.unwrap();

        let table = neighbours();
        assert!(!table.contains("managed"), "{table}");
        assert!(table.contains("203.0.113.2 dev wan0 lladdr 02:00:00:00:00:22"), "{table}");
        let permanent = table.lines().filter(|line| line.contains("PERMANENT"));
        assert_eq!(permanent.filter(|line| line.contains("203.0.113.9")).count(), 1, "{table}");
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_silent_neighbour_when_kept_then_it_stays_unresolved_until_it_answers() {
    in_namespace(|peer| async move {
        let network = Network::open().await.unwrap();
        let mut managed = ManagedNeighbours::new(&network);
        let wanted = HashSet::from([(index(&network, "wan0"), addr("203.0.113.5"))]);
        managed.keep(&wanted).await.unwrap();
        let hop = network.resolve(addr("203.0.113.5")).await.unwrap();
        assert!(matches!(hop, NextHop::Unresolved { .. }), "{hop:?}");

        peer.ip("addr add 203.0.113.5/24 dev wan1");

        until(&network, "203.0.113.5", |hop| mac_of(hop) == Some(PEER_MAC)).await;
    });
}

#[test]
#[ignore = "needs root"]
fn given_vips_when_set_twice_then_the_second_time_writes_and_sends_nothing() {
    in_namespace(|peer| async move {
        let network = Network::open().await.unwrap();
        let interfaces = both(&network);
        let vips = ["203.0.113.10", "10.0.0.10", "2001:db8:113::10"].map(addr);
        peer.ip("neigh add 203.0.113.10 dev wan1 lladdr 02:00:00:00:00:ff nud stale");
        peer.ip("neigh add 2001:db8:113::10 dev wan1 lladdr 02:00:00:00:00:ff nud stale");
        let mut announcer = Announcers::new(&network);

        let first = announcer.announce(Announce::Arp, &vips, &interfaces).await.unwrap();

        assert_eq!(first.added, vips);
        assert_eq!(first.announced, vips);
        for vip in vips {
            let hop = until(&network, &vip.to_string(), |hop| *hop == NextHop::Local).await;
            assert_eq!(hop, NextHop::Local);
        }
        settle(&network).await;
        let second = announcer.announce(Announce::Arp, &vips, &interfaces).await.unwrap();
        assert_eq!(second, Announced::default());
        let quiet = tokio::time::timeout(Duration::from_millis(100), network.changed()).await;
        assert!(quiet.is_err(), "{quiet:?}");
        // The peer has learnt the new MAC from the announcements.
        for vip in ["203.0.113.10", "2001:db8:113::10"] {
            let pid = std::process::id();
            let namespace = format!("--net=/proc/{pid}/task/{}/ns/net", peer.tid);
            let entry = run(Command::new("nsenter").args([&namespace, "ip", "neigh", "show", vip]));
            assert!(entry.contains("02:00:00:00:00:11"), "{entry}");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_vips_of_an_earlier_run_when_set_then_old_ones_go_and_foreign_ones_stay() {
    in_namespace(|_peer| async {
        ip("addr add 203.0.113.20/32 dev wan0");
        ip("addr add 203.0.113.99/32 dev wan0");
        let network = Network::open().await.unwrap();
        let interfaces = both(&network);
        let old = ["203.0.113.10", "203.0.113.11", "2001:db8:113::10"].map(addr);
        Announcers::new(&network).announce(Announce::Arp, &old, &interfaces).await.unwrap();
        let vips = ["203.0.113.11", "203.0.113.20"].map(addr);
        let mut announcer = Announcers::new(&network);

        let mut done = announcer.announce(Announce::Arp, &vips, &interfaces).await.unwrap();

        done.removed.sort();
        assert_eq!(done.added, [] as [IpAddr; 0]);
        assert_eq!(done.removed, ["203.0.113.10", "2001:db8:113::10"].map(addr));
        assert_eq!(done.announced, vips, "a new process announces what is there already");
        assert_eq!(announcer.withdraw().await.unwrap(), [addr("203.0.113.11")]);
        let held = run(Command::new("ip").args(["addr", "show", "dev", "wan0"]));
        for (address, expected) in [
            ("203.0.113.1/24", true),
            ("203.0.113.20/32", true),
            ("203.0.113.99/32", true),
            ("203.0.113.10/32", false),
            ("203.0.113.11/32", false),
            ("2001:db8:113::10/128", false),
        ] {
            assert_eq!(held.contains(address), expected, "{address}: {held}");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_vip_when_the_kernel_chooses_a_source_then_it_is_never_the_vip() {
    in_namespace(|_peer| async {
        ip("addr flush dev lan0");
        ip("addr add 2001:db8:10::1/64 dev lan0 nodad");
        ip("route add 10.0.0.0/24 dev lan0");
        let network = Network::open().await.unwrap();
        let interfaces = [network.interface("lan0").unwrap()];
        let vips = ["10.0.0.10", "2001:db8:10::10"].map(addr);

        Announcers::new(&network).announce(Announce::Arp, &vips, &interfaces).await.unwrap();

        for (target, expected) in
            [("10.0.0.9", "203.0.113.1"), ("2001:db8:10::9", "2001:db8:10::1")]
        {
            let route = run(Command::new("ip").args(["route", "get", target]));
            assert!(route.contains(&format!("src {expected} ")), "{target}: {route}");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_link_that_went_down_when_it_is_up_again_then_vips_are_held_and_announced_again() {
    in_namespace(|_peer| async {
        let network = Network::open().await.unwrap();
        let vips = ["203.0.113.10", "2001:db8:113::10"].map(addr);
        let mut announcer = Announcers::new(&network);
        announcer.announce(Announce::Arp, &vips, &both(&network)).await.unwrap();
        ip("link set wan0 down");
        while network.interface("wan0").unwrap().up {
            tokio::time::timeout(BOUND, network.changed()).await.expect("no event");
        }
        let done = announcer.announce(Announce::Arp, &vips, &both(&network)).await.unwrap();
        assert_eq!(done.announced, [] as [IpAddr; 0]);
        let down = VipState::Silent(Silence::LinkDown { interface: "wan0".to_owned() });
        assert_eq!(vips.map(|vip| announcer.state(vip)), [down.clone(), down]);

        ip("link set wan0 up");
        while !network.interface("wan0").unwrap().up {
            tokio::time::timeout(BOUND, network.changed()).await.expect("no event");
        }
        let done = announcer.announce(Announce::Arp, &vips, &both(&network)).await.unwrap();

        assert_eq!(done.announced, vips);
        assert_eq!(
            vips.map(|vip| announcer.state(vip)),
            [VipState::Announced, VipState::Announced]
        );
    });
}

#[test]
#[ignore = "needs root"]
fn vips_are_withdrawn_when_announcing_is_left_to_another_program() {
    in_namespace(|_peer| async {
        let network = Network::open().await.unwrap();
        let interfaces = both(&network);
        let vips = ["203.0.113.10"].map(addr);
        Announcers::new(&network).announce(Announce::Arp, &vips, &interfaces).await.unwrap();
        // Another run of the agent, which has only the marks of the addresses to go by.
        let mut announcers = Announcers::new(&network);
        assert_eq!(announcers.state(vips[0]), VipState::Withdrawn);

        for (way, added, removed, state) in [
            (Announce::None, &[][..], &vips[..], VipState::Unmanaged),
            (Announce::Arp, &vips[..], &[][..], VipState::Announced),
            (Announce::None, &[][..], &vips[..], VipState::Unmanaged),
        ] {
            let done = announcers.announce(way, &vips, &interfaces).await.unwrap();
            assert_eq!((&done.added[..], &done.removed[..]), (added, removed), "{way}");
            assert_eq!(announcers.state(vips[0]), state, "{way}");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_more_events_than_fit_when_they_are_lost_then_the_tables_are_right_all_the_same() {
    in_namespace(|_peer| async {
        let network = Network::open().await.unwrap();
        let lan = index(&network, "lan0");
        settle(&network).await;
        // This runtime has one thread: while it is busy here, nobody reads events.
        let mut batch = String::new();
        for round in 0..60 {
            for host in 0..1000 {
                let (a, b) = (host / 250 + 1, host % 250 + 1);
                let mac = format!("02:00:00:{round:02x}:{a:02x}:{b:02x}");
                batch += &format!("neigh replace 10.1.{a}.{b} dev lan0 lladdr {mac}\n");
            }
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), batch).unwrap();

        run(Command::new("ip").arg("-batch").arg(file.path()));

        let last = [2, 0, 0, 59, 4, 250];
        let mut change = NetworkChange::default();
        let found = |network: &Network| {
            let tables = network.shared.tables();
            tables.neighbours.get(&(lan, addr("10.1.4.250"))).and_then(|entry| entry.mac)
        };
        while found(&network) != Some(last) || !change.routes {
            let more = tokio::time::timeout(BOUND, network.changed()).await;
            change.merge(more.unwrap_or_else(|_| panic!("{change:?}, {:?}", found(&network))));
        }
        assert_eq!(change, NetworkChange::EVERYTHING, "events were lost");
        let known = network.shared.tables().neighbours.len();
        assert!(known >= 1000, "{known}");

        // The kernel sends events again.
        ip("neigh replace 10.1.4.250 dev lan0 lladdr 02:00:00:00:00:01");
        while found(&network) != Some([2, 0, 0, 0, 0, 1]) {
            tokio::time::timeout(BOUND, network.changed()).await.expect("no event");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_ten_thousand_next_hops_when_their_gateway_appears_then_no_route_is_looked_up_again() {
    in_namespace(|_peer| async {
        ip("route add 10.128.0.0/16 via 203.0.113.2");
        let network = Network::open().await.unwrap();
        let addresses: Vec<IpAddr> =
            (0..10_000u16).map(|n| IpAddr::from([10, 128, (n >> 8) as u8, n as u8])).collect();
        let start = Instant::now();
        let before = network.resolve_all(&addresses).await.unwrap();
        let cold = start.elapsed();
        let remembered = network.routes.lock().unwrap().state_and_size();

        ip("neigh add 203.0.113.2 dev wan0 lladdr 02:00:00:00:00:22");
        until(&network, "203.0.113.2", |hop| mac_of(hop).is_some()).await;
        let start = Instant::now();
        let after = network.resolve_all(&addresses).await.unwrap();

        eprintln!("10 000 next hops: {cold:?}, then {:?}", start.elapsed());
        assert_eq!(before.len(), 10_000);
        assert!(before.values().all(|hop| matches!(hop, NextHop::Unresolved { .. })));
        assert!(after.values().all(|hop| mac_of(hop) == Some(PEER_MAC)));
        assert_eq!(remembered, (network.shared.routing(), 10_000), "nothing was thrown away");
    });
}
