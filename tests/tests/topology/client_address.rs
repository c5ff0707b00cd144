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

/// Ways to forge an address. Where the connection survives, the last step is a request that is answered under the true
/// address.
const ATTACKS: [(&str, Variant); 23] = [
    ("own header before the first byte", |it| {
        it.open();
        it.send(ACK | PSH, -it.len, &it.forged);
        it.is_known();
    }),
    ("own header and request before the first byte", |it| {
        it.open();
        it.send(ACK | PSH, -it.len, &it.forged_request());
        it.is_known();
    }),
    ("own header as text", |it| {
        it.open();
        it.send(ACK | PSH, -it.len, &[&it.forged_text[..], &it.request].concat());
        it.is_known();
    }),
    ("a second SYN before the SYN-ACK", |it| {
        it.syn();
        for offset in [it.len, -it.len, 1_000] {
            it.syn_with(offset, SYN, &SYN_OPTIONS, b"");
        }
        it.is_accepted();
        for offset in [it.len, -it.len, 1_000, 0] {
            it.send(ACK | PSH, offset - it.len, &it.forged_request());
        }
    }),
    ("a second SYN with a lower number after the SYN-ACK", |it| {
        for offset in [-it.len, -1_000] {
            it.open_again(5_000);
            it.syn_aside(offset);
            for at in [-it.len, offset - it.len] {
                it.send(ACK | PSH, at, &it.forged_request());
            }
        }
        it.open_again(5_000);
        it.is_known();
    }),
    ("a second SYN with a higher number after the SYN-ACK", |it| {
        it.open();
        it.syn_with(it.len, SYN, &SYN_OPTIONS, b"");
        it.send(ACK | PSH, -it.len, &it.forged_request());
        it.open_again(1_000);
        it.send(ACK | PSH, -it.len, &it.forged_request());
        it.is_known();
    }),
    ("data before the SYN-ACK", |it| {
        it.syn();
        for at in [-it.len, 0] {
            it.send(ACK | PSH, at, &it.forged_request());
            it.send(PSH, at, &it.forged_request());
        }
        it.is_accepted();
        it.is_known();
    }),
    ("overlap with the first byte", |it| {
        it.open();
        it.send(ACK | PSH, -1, b"\nG");
        it.send(ACK | PSH, -it.len - 1, &[b"G", &it.forged_request()[..]].concat());
        it.send(ACK | PSH, -it.len / 2, &it.forged_request()[it.len as usize / 2..]);
        it.is_known();
    }),
    ("urgent without data", |it| {
        it.open();
        let urgent = it.len as u16 / 2;
        it.send_with(0, 0, Parts { flags: ACK | URG, urgent, ..Parts::default() });
        it.is_known();
    }),
    ("urgent data", |it| {
        it.open();
        let (urgent, payload) = (it.len as u16 / 2, &it.request[..]);
        it.send_with(0, 0, Parts { flags: ACK | PSH | URG, urgent, payload, options: &[] });
        it.is_answered();
    }),
    ("keep-alive probes", |it| {
        it.open();
        it.send(ACK, -1, b"");
        it.send(ACK, -1, b"\0");
        it.send(ACK, -it.len, b"\r");
        it.is_known();
    }),
    ("FIN before the first byte", |it| {
        it.open();
        it.send(FIN | ACK, -1, b"");
        it.send(FIN | ACK, -it.len, b"");
        it.send(FIN | ACK | PSH, -it.len, &it.forged);
        it.is_known();
    }),
    ("FIN first", |it| {
        it.open();
        it.send(FIN | ACK, 0, b"");
        it.send(ACK | PSH, -it.len, &it.forged_request());
    }),
    ("RST with data, then the port again", |it| {
        it.open();
        it.send(RST | ACK, -it.len, &it.forged_request());
        it.send(RST, 0, b"");
        it.open_again(1_000);
        it.send(ACK | PSH, -it.len, &it.forged_request());
        it.is_known();
    }),
    ("the port again after an answer", |it| {
        it.open();
        it.is_known();
        it.send(ACK | PSH, -it.len, &it.forged_request());
        it.reset();
        it.open_again(it.request.len() as i64 + it.len);
        it.send(ACK | PSH, -it.len, &it.forged_request());
        it.is_known();
    }),
    ("a SYN within a connection", |it| {
        it.open();
        it.is_known();
        it.syn_with(5_000, SYN, &SYN_OPTIONS, b"");
        it.send(ACK | PSH, 5_000 - it.len, &it.forged_request());
        it.send(ACK | PSH, 5_000, &it.forged_request());
        it.reset();
        it.open_again(5_000);
        it.send(ACK | PSH, -it.len, &it.forged_request());
        it.is_known();
    }),
    ("out of order", |it| {
        it.open();
        let (begin, end) = it.request.split_at(10);
        it.send(ACK | PSH, 10, end);
        it.send(ACK | PSH, -it.len, &it.forged);
        it.send(ACK | PSH, 0, begin);
        // With SYN cookies, a server keeps nothing of what came too early.
        it.send(ACK | PSH, 10, end);
        it.is_answered();
    }),
    ("cut and twice", |it| {
        it.open();
        for (at, byte) in it.request.chunks(7).enumerate() {
            for _ in 0..2 {
                it.send(ACK | PSH, 7 * at as i64, byte);
                it.send(ACK | PSH, 7 * at as i64 - it.len, &it.forged);
            }
        }
        it.is_answered();
    }),
    ("a SYN with data", |it| {
        it.syn_with(0, SYN, &SYN_OPTIONS, &it.forged_request());
        for flags in [SYN | PSH, SYN | ACK, SYN | FIN, SYN | RST, SYN | FIN | PSH] {
            it.syn_with(0, flags, &SYN_OPTIONS, &it.forged_request());
        }
        it.open();
        it.send(ACK | PSH, -it.len, &it.forged);
        it.is_known();
    }),
    ("TCP Fast Open", |it| {
        let options: [&[u8]; 3] = [
            // Asks for a cookie, has a cookie, and has one in the experimental form (RFC 6994).
            &[2, 4, 0x05, 0xb4, 34, 2, 1, 1],
            &[2, 4, 0x05, 0xb4, 34, 10, 1, 2, 3, 4, 5, 6, 7, 8, 1, 1],
            &[2, 4, 0x05, 0xb4, 254, 12, 0xf9, 0x89, 1, 2, 3, 4, 5, 6, 7, 8],
        ];
        for options in options {
            it.syn_with(0, SYN, options, &it.forged_request());
        }
        for options in options {
            it.syn_with(0, SYN, options, b"");
        }
        it.is_accepted();
        it.send(ACK | PSH, -it.len, &it.forged);
        it.is_known();
    }),
    ("an option of kind 254", |it| {
        let forged: &[u8] = &[254, 8, 0x1a, 0x0a, 203, 0, 113, 66];
        it.syn_with(0, SYN, &[&SYN_OPTIONS, forged].concat(), b"");
        it.is_accepted();
        for (flags, payload) in [(ACK, &b""[..]), (ACK | PSH, &it.request)] {
            it.send_with(0, 0, Parts { flags, options: forged, payload, urgent: 0 });
        }
        it.is_answered();
    }),
    ("numbers that a SYN cookie fits as well", |it| {
        it.open();
        // A cookie is good for any pair of numbers with the same distance.
        for shift in [1, it.len, 2 * it.len, 1_000, 70_000, -1, -it.len, -1_000] {
            let (flags, payload) = (ACK | PSH, &it.forged_request()[..]);
            it.send_with(shift - it.len, shift, Parts { flags, payload, ..Parts::default() });
        }
        it.is_known();
    }),
    ("acknowledgements of nothing", |it| {
        it.open();
        for ack in [-1, 1, 1_000, 1 << 20] {
            let (flags, payload) = (ACK | PSH, &it.forged_request()[..]);
            for at in [-it.len, 1] {
                it.send_with(at, ack, Parts { flags, payload, ..Parts::default() });
            }
        }
        it.is_known();
    }),
];

#[test]
#[ignore = "needs root"]
fn given_real_proxies_when_a_client_forges_its_address_then_they_know_its_own() {
    let lab = Lab::with_proxies();
    let raw = RawClient::new(&lab.topology, &lab.topology.clients[0]);
    let mut port = 2_000;
    // SYN cookies where needed, and always.
    for cookies in ["1", "2"] {
        lab.sysctl("ipv4/tcp_syncookies", cookies);
        for (name, attack) in ATTACKS {
            for to in listeners() {
                let mut it = Attack::new(&raw, to, &format!("{name}, cookies {cookies}"));
                attack(&mut it);
                let case = it.case.clone();
                it.end();
                honest_is_known(&lab.topology.clients[1], &mut port, to, &case);
            }
            lab.logs_are_true(name);
        }
    }
    let status = lab.gateway.status().unwrap();
    let dropped = &status["verdicts"]["before_client_address"]["packets"];
    assert!(dropped.as_u64().unwrap() > 0, "{dropped}");

    // The same header, sent to a backend directly, is believed: the check above would see it.
    for (proxy, kind) in lab.servers.iter().zip([Kind::Nginx, Kind::Haproxy]) {
        for address in host(&lab.topology, kind).addresses() {
            let mut it = Attack::new(&raw, (address, proxies::PORT).into(), "without the gateway");
            it.open();
            it.send(ACK | PSH, 0, &it.forged_request());
            let line = format!("{} /{}/", known_as(forged(address.is_ipv4()), it.to), it.from.ip());
            wait_until("the forged address in the log", || proxy.log().contains(&line));
        }
    }
}

/// Sends forged headers that the SYN cookie of a connection is good for: Linux accepts any two numbers whose distance is
/// that of the first ones.
fn replay(it: &Attack<'_>) {
    for shift in [0, 1, it.len, 2 * it.len, 1_000, 70_000, -1, -it.len, -1_000] {
        let (flags, payload) = (ACK | PSH, &it.forged_request()[..]);
        it.send_with(shift - it.len, shift, Parts { flags, payload, ..Parts::default() });
    }
}

#[test]
#[ignore = "needs root"]
fn given_syn_cookies_when_a_connection_has_ended_then_its_numbers_begin_no_other() {
    let lab = Lab::with_proxies();
    let raw = RawClient::new(&lab.topology, &lab.topology.clients[0]);
    lab.sysctl("ipv4/tcp_syncookies", "2");
    let open = |name, to, more: &str| {
        let mut it = Attack::new(&raw, to, name);
        let end = it.request.len() - 2;
        it.request.splice(end..end, more.bytes());
        it.open();
        it.is_known();
        it
    };
    let mut port = 2_000;
    let mut is_harmless = |it: Attack<'_>| {
        replay(&it);
        let (to, case) = (it.to, it.case.clone());
        it.end();
        honest_is_known(&lab.topology.clients[1], &mut port, to, &case);
        lab.logs_are_true(&case);
    };
    for to in listeners() {
        let it = open("the client resets", to, "");
        it.reset();
        is_harmless(it);

        let mut it = open("the client closes", to, "");
        let sent = it.request.len() as i64;
        it.send_with(sent, it.received(), Parts::of(FIN | ACK));
        it.is_closed();
        it.send_with(sent + 1, it.received() + 1, Parts::of(ACK));
        is_harmless(it);
    }

    // The client leaves the connection open until the server gives up.
    lab.sysctl("ipv4/tcp_fin_timeout", "1");
    let closed: Vec<_> = listeners()
        .into_iter()
        .map(|to| {
            let mut it = open("the server closes", to, "connection: close\r\n");
            it.is_closed();
            it.send_with(it.request.len() as i64, it.received() + 1, Parts::of(ACK));
            it
        })
        .collect();
    for kind in [Kind::Nginx, Kind::Haproxy] {
        let netns = &host(&lab.topology, kind).netns;
        let filter = format!("( sport = :{} )", proxies::PORT);
        let sockets = || output(netns, "ss", &["-Htn", "state", "connected", &filter]);
        wait_until("the servers have no sockets left", || sockets().is_empty());
    }
    closed.into_iter().for_each(is_harmless);
}

/// Sends a request on a socket with TCP Fast Open; gives its address and the answer.
fn ask_fast(host: &Host, to: SocketAddr) -> (SocketAddr, String) {
    let stream = host
        .netns
        .run(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
            setsockopt(&socket, sockopt::TcpFastOpenConnect, &true).unwrap();
            socket.connect(&to.into()).unwrap();
            TcpStream::from(socket)
        })
        .unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let request = "GET / HTTP/1.1\r\nhost: lab\r\nconnection: close\r\n\r\n";
    (&stream).write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    (&stream).read_to_string(&mut answer).unwrap();
    (stream.local_addr().unwrap(), answer)
}

/// How many SYNs a host has received for `port` with an option of TCP Fast Open, and with data.
fn fast_syns(tap: &Tap, is_v4: bool, port: u16) -> (usize, usize) {
    let (mut options, mut data) = (0, 0);
    while let Some(segment) = tap.next(is_v4, Instant::now()) {
        if segment.to.port() == port && segment.flags & SYN != 0 {
            options += usize::from(segment.options().iter().any(|option| option[0] == 34));
            data += usize::from(!segment.payload.is_empty());
        }
    }
    (options, data)
}

#[test]
#[ignore = "needs root"]
fn given_real_proxies_when_clients_use_tcp_fast_open_then_they_are_known_and_served_without_it() {
    let lab = Lab::with_proxies();
    let client = &lab.topology.clients[0];
    client.netns.sysctl("ipv4/tcp_fastopen", "3").unwrap();
    let taps = [Kind::Nginx, Kind::Haproxy].map(|kind| Tap::new(&host(&lab.topology, kind).netns));
    for (tap, kind) in taps.iter().zip([Kind::Nginx, Kind::Haproxy]) {
        for address in host(&lab.topology, kind).addresses() {
            // The first asks for a cookie, the second has it.
            host(&lab.topology, kind).netns.sysctl("ipv4/tcp_fastopen", "3").unwrap();
            for _ in 0..2 {
                drop(ask_fast(client, (address, proxies::CHECK_PORT).into()));
            }
            let seen = fast_syns(tap, address.is_ipv4(), proxies::CHECK_PORT);
            assert_eq!(seen, (2, 1), "{address}, without the gateway");
        }
    }
    lab.sysctl("ipv4/tcp_fastopen", EAGER);
    let is_known = |to: SocketAddr| {
        let (own, answer) = ask_fast(client, to);
        let name = format!("x-backend: {}\r\n", known_as(own, to));
        assert!(answer.to_ascii_lowercase().contains(&name), "{own} to {to}: {answer}");
    };
    for to in listeners() {
        for _ in 0..5 {
            is_known(to);
        }
    }
    // Now SYNs have data without a cookie. All at once: the clients send it again only after a second.
    client.netns.sysctl("ipv4/tcp_fastopen", "7").unwrap();
    thread::scope(|scope| {
        for to in listeners() {
            scope.spawn(move || is_known(to));
        }
    });
    for tap in &taps {
        for is_v4 in [true, false] {
            assert_eq!(fast_syns(tap, is_v4, proxies::PORT), (0, 0), "IPv4: {is_v4}");
        }
    }
    lab.logs_are_true("TCP Fast Open");
}

/// Whether a segment has the option with the true address; it must have no other of this kind.
fn is_told(segment: &Segment, own: &[u8], forged: &[u8], case: &str) -> bool {
    let is_forged = segment.options.windows(forged.len()).any(|bytes| bytes == forged);
    assert!(!is_forged, "{case}: {segment:?}");
    let options = segment.options();
    let named: Vec<_> = options.iter().filter(|option| option[0] == 254).collect();
    assert!(named.is_empty() || named == [&own], "{case}: {segment:?}");
    !named.is_empty()
}

/// Options that a hostile client sends, given one with another address.
fn foreign_options(forged: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let fill = |before: &[u8]| [before, &vec![1; (40 - before.len()) % 4]].concat();
    let long = |kind: u8, len: usize| {
        let mut option = vec![9; len];
        option[..2].copy_from_slice(&[kind, len as u8]);
        option
    };
    let stamp: &[u8] = &[1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 0];
    let room = 40 - forged.len();
    vec![
        ("none", Vec::new()),
        ("a timestamp", stamp.to_vec()),
        ("no operation, forty times", vec![1; 40]),
        ("forged", fill(forged)),
        ("forged, then as much as there is room for", [forged, &long(30, room)].concat()),
        ("as much as there is room for, then forged", [&long(30, room), forged].concat()),
        ("forged twice", [forged, forged].concat()),
        ("forged at an odd place", fill(&[&[1], forged].concat())),
        ("a timestamp, then forged", fill(&[stamp, forged].concat())),
        ("forged, then a timestamp", fill(&[forged, stamp].concat())),
        ("forged behind a length of 0", fill(&[&[30, 0], forged].concat())),
        ("forged behind a length of 1", fill(&[&[254, 1], forged].concat())),
        (
            "forged in a longer one",
            fill(&[&[254, forged.len() as u8 + 4], &forged[2..], &[0; 4]].concat()),
        ),
        ("forged behind the end", fill(&[&[0], forged].concat())),
        ("forged and cut", forged[..forged.len() - 4].to_vec()),
    ]
}

#[test]
#[ignore = "needs root"]
fn given_the_tcp_option_when_a_client_forges_it_then_backends_see_its_own_address() {
    let lab = Lab::start("tcp-option", |host, _| {
        (
            Server::start(host, Service::Http(proxies::PORT)).unwrap(),
            Server::start(host, CHECK).unwrap(),
        )
    });
    let raw = RawClient::new(&lab.topology, &lab.topology.clients[0]);
    let taps = [Kind::Nginx, Kind::Haproxy].map(|kind| Tap::new(&host(&lab.topology, kind).netns));
    for to in listeners() {
        let (_, kind, is_v4) = *LISTENERS.iter().find(|(port, ..)| *port == to.port()).unwrap();
        let tap = &taps[usize::from(kind == Kind::Haproxy)];
        let forged = Attack::new(&raw, to, "").options()[1].clone();
        for (name, options) in foreign_options(&forged) {
            let mut it = Attack::new(&raw, to, name);
            it.answer.clone_from(&host(&lab.topology, kind).name);
            it.request = b"GET / HTTP/1.1\r\nhost: lab\r\n\r\n".to_vec();
            let [own, forged] = it.options();
            let options = &options[..];
            it.syn_with(0, SYN, options, b"");
            it.is_accepted();
            let request = it.request.clone();
            let len = request.len() as i64;
            for (at, payload) in [(0, &b""[..]), (0, &request), (len, &request)] {
                let flags = ACK | if payload.is_empty() { 0 } else { PSH };
                it.send_with(at, it.received(), Parts { flags, options, payload, urgent: 0 });
                if !payload.is_empty() {
                    it.is_answered();
                }
            }
            it.send_with(2 * len, 0, Parts { flags: RST, options, ..Parts::default() });
            let deadline = Instant::now() + LIMIT;
            let (mut told, mut from) = (Vec::new(), None);
            loop {
                let segment = tap.next(is_v4, deadline);
                let segment = segment.unwrap_or_else(|| panic!("no RST: {}", it.case));
                if segment.to.port() != proxies::PORT {
                    continue;
                }
                // Late segments of a connection before are not those of this one.
                if segment.flags & SYN != 0 {
                    from = Some(segment.from);
                }
                if from != Some(segment.from) {
                    continue;
                }
                let is_told = is_told(&segment, &own, &forged, &it.case);
                if segment.flags & SYN == 0 {
                    told.push(is_told);
                }
                if segment.flags & RST != 0 {
                    break;
                }
            }
            // The end of the handshake, and data.
            assert_eq!(told[..2], [true, true], "{}", it.case);
        }
        let outcome = Client::new(&lab.topology.clients[1]).http(to, 20, 1).unwrap();
        assert_eq!(outcome.ok(), 20, "{to}: {outcome}");
        while tap.next(is_v4, Instant::now()).is_some() {}
    }
}
