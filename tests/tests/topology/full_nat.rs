//! Backends that see a source of the gateway's: they need no route to the clients, may be of another
//! family than the VIP, and may be clients themselves.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream},
    time::Duration,
};

use slb_lab::{Client, Gateway, Server, Service, Topology, topology};
use socket2::{Domain, Socket, Type};

use crate::support::{NOTICED, make_generic, wait_healthy};

const HTTP: Service = Service::Http(8080);
const UDP: Service = Service::Udp(5353);
const PROXIED: Service = Service::Proxied(8080);

/// A group of the backends' addresses of `families`, with a listener each for TCP and UDP.
fn instance(topology: &Topology, group: &str, v4: bool, v6: bool) -> String {
    let vips = format!("vips = [\"{}\", \"{}\"]\n", topology::VIP_V4, topology::VIP_V6);
    let mut text = format!("[[instance]]\nname = \"lab\"\n{vips}");
    for (name, port) in [("web", 8080), ("dns", 5353)] {
        text += &format!("[[instance.group]]\nname = \"{name}\"\n{group}\n");
        for host in &topology.backends {
            let addresses: Vec<String> = host
                .addresses()
                .into_iter()
                .filter(|addr| if addr.is_ipv4() { v4 } else { v6 })
                .map(|addr| addr.to_string())
                .collect();
            text += &format!(
                "[[instance.group.backend]]\nname = \"{}\"\naddress = {addresses:?}\nport = {port}\n",
                host.name
            );
        }
    }
    text += "[[instance.listener]]\nprotocol = \"tcp\"\nport = 80\ngroup = \"web\"\n";
    text += "[[instance.listener]]\nprotocol = \"udp\"\nport = 53\ngroup = \"dns\"\nscheduler = \"wrr\"\n";
    text
}

fn vips(port: u16) -> [SocketAddr; 2] {
    [IpAddr::from(topology::VIP_V4), topology::VIP_V6.into()].map(|vip| (vip, port).into())
}

/// Servers on all backends, and an agent that finds them healthy.
fn serving(topology: &Topology, instances: &str) -> (Gateway, Vec<Server>) {
    let mut servers = Vec::new();
    for host in &topology.backends {
        for service in [HTTP, UDP] {
            servers.push(Server::start(host, service).unwrap());
        }
    }
    let mut gateway = Gateway::new(topology, instances).unwrap();
    gateway.start().unwrap();
    wait_all_healthy(&gateway);
    (gateway, servers)
}

fn wait_all_healthy(gateway: &Gateway) {
    wait_healthy(gateway, &[("tcp", 80), ("udp", 53)], 8);
}

/// Everybody gets a part of what a client asks of both VIPs.
fn all_serve(client: &Client, case: &str) {
    for (tcp, udp) in vips(80).into_iter().zip(vips(53)) {
        for outcome in [client.http(tcp, 400, 8).unwrap(), client.udp(udp, 400, 8).unwrap()] {
            assert_eq!(outcome.ok(), 400, "{case}, {tcp}: {outcome}");
            assert_eq!(outcome.per_backend.len(), 4, "{case}, {tcp}: {outcome}");
        }
        drop(client.download(tcp, 3_000_000).unwrap());
    }
}

#[test]
#[ignore = "needs root"]
fn given_backends_without_a_route_to_clients_when_their_source_is_the_gateways_then_they_serve() {
    let topology = Topology::build().unwrap();
    for host in &topology.backends {
        host.netns
            .ip("route del default via 10.0.0.1\nroute del default via 2001:db8:10::1")
            .unwrap();
    }
    for (case, group) in [
        ("the gateway's own address", "forwarding = \"full-nat\""),
        (
            "a pool",
            "forwarding = \"full-nat\"\nsources = [\"10.0.0.201\", \"10.0.0.202\", \
             \"2001:db8:10::201\"]",
        ),
    ] {
        let (gateway, servers) = serving(&topology, &instance(&topology, group, true, true));
        all_serve(&Client::new(&topology.clients[0]), case);
        drop((gateway, servers));
    }
}

#[test]
#[ignore = "needs root"]
fn given_backends_of_one_family_when_clients_of_both_come_then_they_are_served() {
    for (v4, group) in [(true, ""), (false, ""), (true, "forwarding = \"full-nat\"")] {
        let topology = Topology::build().unwrap();
        let (gateway, servers) = serving(&topology, &instance(&topology, group, v4, !v4));
        all_serve(&Client::new(&topology.clients[0]), &format!("IPv4: {v4}, {group}"));
        drop((gateway, servers));
    }
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_when_it_is_a_client_of_its_own_vip_then_it_is_served_by_all_and_itself() {
    let topology = Topology::build().unwrap();
    let (gateway, servers) = serving(&topology, &instance(&topology, "", true, true));
    let host = &topology.backends[0];
    host.netns.sysctl("ipv4/ip_local_port_range", "60000 65535").unwrap();
    all_serve(&Client::new(host), "a backend");
    drop((gateway, servers));
}

/// What a server of [`Service::Proxied`] says, and that it sends back what it gets.
fn introduced(to: SocketAddr, payload: &[u8]) -> (SocketAddr, String) {
    let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5)).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a socket option");
    let own = stream.local_addr().expect("an address");
    let mut reader = BufReader::new(&stream);
    let mut greeting = String::new();
    if payload.is_empty() {
        // The server speaks first.
        reader.read_line(&mut greeting).expect("a greeting");
    } else {
        let mut writer = &stream;
        std::thread::scope(|scope| {
            scope.spawn(move || writer.write_all(payload).expect("room"));
            reader.read_line(&mut greeting).expect("a greeting");
            let mut back = vec![0; payload.len()];
            reader.read_exact(&mut back).expect("an echo");
            assert!(back == payload, "{to} sends something else back");
        });
    }
    (own, greeting)
}

#[test]
#[ignore = "needs root"]
fn given_the_proxy_protocol_when_clients_come_then_backends_know_who_they_are() {
    for (v4, v6) in [(true, true), (true, false), (false, true)] {
        all_introduced(v4, v6, false);
    }
}

#[test]
#[ignore = "needs root"]
fn given_generic_mode_when_backends_are_told_who_clients_are_then_they_know() {
    for (v4, v6) in [(true, true), (true, false), (false, true)] {
        all_introduced(v4, v6, true);
    }
}

/// A client that has got just as much more than it has sent as its header is long acknowledges what would answer
/// a SYN cookie, so its backend is told of some bytes less.
#[test]
#[ignore = "needs root"]
fn given_the_proxy_protocol_when_a_client_has_the_numbers_of_a_syn_cookie_then_it_goes_on_as_others()
 {
    let topology = Topology::build().unwrap();
    let servers: Vec<_> = topology
        .backends
        .iter()
        .flat_map(|host| [PROXIED, UDP].map(|service| Server::start(host, service).unwrap()))
        .collect();
    let group = "forwarding = \"full-nat\"\nclient_address = \"proxy-v2\"";
    let mut gateway = Gateway::new(&topology, &instance(&topology, group, true, false)).unwrap();
    gateway.start().unwrap();
    wait_all_healthy(&gateway);
    let client = &topology.clients[0];
    let to = vips(80)[0];
    let host = client.addresses().into_iter().find(IpAddr::is_ipv4).expect("an address");
    // The server says "CLIENT VIP" and sends back what it gets.
    let is_one = |port: &u16| {
        format!("{} {to}\n", SocketAddr::new(host, *port)).len().abs_diff(PROXY_V4) <= 3
    };
    let ports: Vec<u16> = [99, 999, 9_999, 29_999].into_iter().filter(is_one).collect();
    assert!(!ports.is_empty(), "{host} {to}");
    for port in ports {
        client.netns.run(|| echoes(SocketAddr::new(host, port), to)).unwrap();
    }
    drop((gateway, servers));
}

/// Length of the header for a client of IPv4.
const PROXY_V4: usize = 28;

/// Sends and gets the same many times.
fn echoes(from: SocketAddr, to: SocketAddr) {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).expect("a socket");
    socket.bind(&from.into()).expect("a free port");
    socket.connect_timeout(&to.into(), Duration::from_secs(5)).expect("a connection");
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a socket option");
    let mut reader = BufReader::new(&stream);
    let mut greeting = String::new();
    reader.read_line(&mut greeting).expect("a greeting");
    assert_eq!(greeting, format!("{from} {to}\n"));
    for len in 1..20 {
        let payload = vec![len as u8; 100 * len];
        (&stream).write_all(&payload).expect("room");
        let mut back = vec![0; payload.len()];
        reader.read_exact(&mut back).expect("an echo");
        assert_eq!(back, payload, "from {from}");
    }
    stream.shutdown(Shutdown::Write).expect("a connection");
    assert_eq!(reader.read(&mut [0]).expect("its end"), 0, "from {from}");
}

/// Backends of these families know clients of both.
fn all_introduced(v4: bool, v6: bool, is_generic: bool) {
    let topology = Topology::build().unwrap();
    let servers: Vec<_> = topology
        .backends
        .iter()
        .flat_map(|host| [PROXIED, UDP].map(|service| Server::start(host, service).unwrap()))
        .collect();
    let group = "forwarding = \"full-nat\"\nclient_address = \"proxy-v2\"";
    let mut gateway = Gateway::new(&topology, &instance(&topology, group, v4, v6)).unwrap();
    if is_generic {
        make_generic(&gateway);
    }
    gateway.start().unwrap();
    wait_all_healthy(&gateway);
    let client = &topology.clients[0];
    for to in vips(80) {
        let payload: Vec<u8> = (0..1_000_000_u32).map(|at| at as u8).collect();
        for len in [0, 1, 20, 1_400, 100_000, 1_000_000].repeat(5) {
            let (own, greeting) = client.netns.run(|| introduced(to, &payload[..len])).unwrap();
            assert_eq!(greeting, format!("{own} {to}\n"), "{len} bytes, generic: {is_generic}");
        }
    }
    drop((gateway, servers));
}

#[test]
#[ignore = "needs root"]
fn given_the_tcp_option_when_clients_come_then_they_are_served() {
    let topology = Topology::build().unwrap();
    let group = "forwarding = \"full-nat\"\nclient_address = \"tcp-option\"";
    let (gateway, servers) = serving(&topology, &instance(&topology, group, true, true));
    all_serve(&Client::new(&topology.clients[0]), "option");
    drop((gateway, servers));
}

#[test]
#[ignore = "needs root"]
fn given_full_nat_when_the_kernel_knows_no_address_towards_backends_then_the_status_says_so() {
    let topology = Topology::build().unwrap();
    let nowhere = instance(&topology, "forwarding = \"full-nat\"", true, false)
        .replace("[\"10.0.0.", "[\"240.0.0.");
    let mut gateway = Gateway::new(&topology, &nowhere).unwrap();
    gateway.start().unwrap();
    let says_so = |status: &serde_json::Value| {
        let problems = status["problems"].as_array().into_iter().flatten();
        problems
            .filter(|problem| problem["name"] == "no_source_address")
            .filter_map(|problem| problem["text"].as_str())
            .any(|text| text.contains("backends behind full NAT get no new flows"))
    };
    gateway.wait("a problem", NOTICED, says_so).unwrap();
}
