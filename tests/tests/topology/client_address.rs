//! A client cannot forge the address that backends are told. nginx and HAProxy read the PROXY protocol; what comes as a
//! TCP option is read from the segments that a backend receives.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    thread,
    time::Instant,
};

use nix::sys::socket::{setsockopt, sockopt};
use serde_json::Value;
use slb_lab::{Client, Gateway, Host, Server, Service, Topology, gateway::backends, topology};
use socket2::{Domain, Socket, Type};

use crate::support::{
    NOTICED,
    attack::{Attack, LIMIT, SYN_OPTIONS, forged, known_as},
    output,
    proxies::{self, Kind, Proxy},
    raw::{self, ACK, FIN, PSH, Parts, RST, RawClient, SYN, Segment, Tap, URG},
    talk::Talk,
    wait_until,
};

mod attacks;
mod fast_open;
mod tcp_option;

/// A listener's port, the program behind it, and whether that is reached over IPv4.
const LISTENERS: [(u16, Kind, bool); 4] = [
    (80, Kind::Nginx, true),
    (81, Kind::Nginx, false),
    (82, Kind::Haproxy, true),
    (83, Kind::Haproxy, false),
];

/// Fast Open for every listening socket, with a cookie or without: data in a SYN is always taken.
const EAGER: &str = "0x607";
/// Where health checks are answered.
const CHECK: Service = Service::Http(proxies::CHECK_PORT);

/// A gateway before servers on `web-1` and `web-2`. The order of the fields is the order in which it ends.
struct Lab<S> {
    gateway: Gateway,
    servers: Vec<S>,
    topology: Topology,
}

impl<S> Lab<S> {
    /// `serve` starts the servers of a host; `client_address` is how they learn the client's address.
    fn start(client_address: &str, serve: impl Fn(&Host, Kind) -> S) -> Self {
        let topology = Topology::build().unwrap();
        let mut text = format!(
            "[[instance]]\nname = \"lab\"\nvips = [\"{}\", \"{}\"]\n",
            topology::VIP_V4,
            topology::VIP_V6
        );
        for (port, kind, is_v4) in LISTENERS {
            let host = host(&topology, kind);
            let address = host.addresses()[usize::from(!is_v4)];
            text += &format!(
                "[[instance.group]]\nname = \"g{port}\"\nforwarding = \"full-nat\"\n\
                 client_address = \"{client_address}\"\n\
                 [[instance.group.backend]]\nname = \"{}\"\naddress = \"{address}\"\nport = {}\n\
                 [[instance.listener]]\nprotocol = \"tcp\"\nport = {port}\ngroup = \"g{port}\"\n\
                 [instance.listener.health_check]\ntype = \"http\"\nport = {}\n",
                host.name,
                proxies::PORT,
                proxies::CHECK_PORT,
            );
        }
        let servers = [Kind::Nginx, Kind::Haproxy].map(|kind| serve(host(&topology, kind), kind));
        let mut gateway = Gateway::new(&topology, &text).unwrap();
        gateway.start().unwrap();
        let are_healthy = |status: &Value| {
            LISTENERS.iter().all(|(port, ..)| {
                let found = backends(status, "tcp", *port);
                !found.is_empty() && found.iter().all(|it| it["health"] == "healthy")
            })
        };
        gateway.wait("all backends healthy", NOTICED, are_healthy).unwrap();
        Self { gateway, servers: servers.into(), topology }
    }

    /// Sets `net.<key>` on the servers' hosts.
    fn sysctl(&self, key: &str, value: &str) {
        for kind in [Kind::Nginx, Kind::Haproxy] {
            host(&self.topology, kind).netns.sysctl(key, value).unwrap();
        }
    }
}

impl Lab<Proxy> {
    /// With nginx and HAProxy.
    fn with_proxies() -> Self {
        Self::start("proxy-v2", |host, kind| {
            host.netns.sysctl("ipv4/tcp_fastopen", EAGER).unwrap();
            Proxy::start(host, kind)
        })
    }

    /// Every request in the logs has the address and port of the client that sent it, and no connection was refused.
    fn logs_are_true(&self, case: &str) {
        let clients: BTreeSet<IpAddr> =
            self.topology.clients.iter().flat_map(Host::addresses).collect();
        for proxy in &self.servers {
            for line in proxy.log().lines() {
                let words: Vec<&str> = line.split(' ').collect();
                let [address, port, vip, vip_port, path] = words[..] else {
                    panic!("{case}: {line}")
                };
                let to = SocketAddr::new(vip.parse().unwrap(), vip_port.parse().unwrap());
                let address: IpAddr = address.parse().unwrap_or_else(|_| panic!("{case}: {line}"));
                let is_true = if clients.contains(&address) {
                    path == "/"
                } else {
                    [IpAddr::from(raw::V4), raw::V6.into()].contains(&address)
                        && (path == format!("/{address}/{port}") || !path.starts_with('/'))
                };
                assert!(is_true && listeners().contains(&to), "{case}: {line}");
            }
            assert_eq!(proxy.complaints(), "", "{case}");
        }
    }
}

fn host(topology: &Topology, kind: Kind) -> &Host {
    &topology.backends[usize::from(kind == Kind::Haproxy)]
}

/// Every listener of both VIPs: clients of both families come to servers of both families.
fn listeners() -> Vec<SocketAddr> {
    let vips = [IpAddr::from(topology::VIP_V4), topology::VIP_V6.into()];
    let all = LISTENERS.map(|(port, ..)| vips.map(|vip| SocketAddr::new(vip, port)));
    all.into_iter().flatten().collect()
}

/// An honest client gets an answer to its own address and port. Takes the next `port`.
fn honest_is_known(host: &Host, port: &mut u16, to: SocketAddr, case: &str) {
    *port += 1;
    let mut talk = Talk::begin(host, *port, to, LIMIT)
        .unwrap_or_else(|error| panic!("honest client, {case}: {error}"));
    let answer = talk.ask().unwrap_or_else(|error| panic!("honest client, {case}: {error}"));
    let address = host.addresses()[usize::from(to.is_ipv6())];
    assert_eq!(answer, known_as((address, *port).into(), to), "honest client, {case}");
    talk.reset();
}

#[test]
#[ignore = "needs root"]
fn given_real_proxies_when_many_clients_come_then_each_is_known_by_its_own_address() {
    const REQUESTS: usize = 400;
    let lab = Lab::with_proxies();
    for to in listeners() {
        let host = &lab.topology.clients[0];
        let outcome = Client::new(host).http(to, REQUESTS, 8).unwrap();
        assert_eq!(outcome.ok(), REQUESTS as u64, "{to}: {outcome}");
        assert_eq!(outcome.per_backend.len(), REQUESTS, "{to}: each has a port: {outcome}");
        let address = host.addresses()[usize::from(to.is_ipv6())];
        for name in outcome.per_backend.keys() {
            let is_it = name.starts_with(&format!("{address} "))
                && name.ends_with(&format!(" {} {}", to.ip(), to.port()));
            assert!(is_it, "{to}: {name}");
        }
        let mut port = 2_000;
        for _ in 0..20 {
            honest_is_known(host, &mut port, to, &to.to_string());
        }
    }
    lab.logs_are_true("honest clients");
    for proxy in &lab.servers {
        // Each has two listeners, at two VIPs.
        assert_eq!(proxy.log().lines().count(), 4 * (REQUESTS + 20), "every request is logged");
    }
}

/// What a hostile client does with a new connection.
type Variant = fn(&mut Attack<'_>);
