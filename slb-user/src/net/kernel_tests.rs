//! The modules above against the kernel, each test in network namespaces of its own.
//!
//! A namespace belongs to a thread and ends with it, so nothing is left behind, even after a panic.

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

mod announce;
mod managed_neigh;
mod next_hops;

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
        // The kernel takes its time, and drops what is sent before.
        let is_up =
            |name| run(Command::new("ip").args(["link", "show", name])).contains("state UP");
        let patience = std::time::Instant::now() + Duration::from_secs(10);
        while !(is_up("wan0") && is_up("lan0")) && std::time::Instant::now() < patience {
            thread::sleep(Duration::from_millis(5));
        }
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
    // Events come in order: when this interface is seen, all earlier events are.
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
