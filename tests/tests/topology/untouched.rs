//! Packets that are not for a listener pass as they are.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener},
    process::Command,
};

use slb_lab::{Client, Failure, Host, Server};

use crate::support::{
    AT_ONCE, Lab, output,
    plan::{self, vips},
    talk::Talk,
};

/// On which no listener is.
const FREE_PORT: u16 = 9_999;

fn ping(host: &Host, to: IpAddr, more: &[&str]) -> String {
    let to = to.to_string();
    output(&host.netns, "ping", &[&["-c", "3", "-i", "0.1", "-W", "1"], more, &[&to]].concat())
}

#[test]
#[ignore = "needs root"]
fn given_a_running_balancer_when_hosts_ping_then_the_vips_the_gateway_and_everybody_answer() {
    let lab = Lab::start();
    let client = &lab.topology.clients[0];
    let backend = lab.host("web-2");
    for vip in vips(0) {
        ping(client, vip.ip(), &[]);
        ping(backend, vip.ip(), &[]);
    }
    for address in ["192.0.2.1", "2001:db8:1::1", "10.0.0.1", "2001:db8:10::1"] {
        ping(client, address.parse().unwrap(), &[]);
    }
    for (ours, theirs) in client.addresses().into_iter().zip(backend.addresses()) {
        ping(client, theirs, &[]);
        ping(backend, ours, &[]);
        // In fragments.
        ping(client, theirs, &["-s", "4000"]);
    }
}

#[test]
#[ignore = "needs root"]
fn given_a_ttl_that_ends_on_the_gateway_when_a_client_pings_a_backend_then_the_gateway_says_so() {
    let lab = Lab::start();
    let client = &lab.topology.clients[0];
    let gateway = ["192.0.2.1", "2001:db8:1::1"];
    for (to, gateway) in lab.host("web-2").addresses().into_iter().zip(gateway) {
        let ping = |ttl| {
            let to = to.to_string();
            let mut ping = Command::new("ping");
            ping.args(["-c", "1", "-W", "1", "-t", ttl, &to]);
            let output = client.netns.run(|| ping.output()).unwrap().unwrap();
            (output.status.success(), String::from_utf8(output.stdout).unwrap())
        };
        let (answered, said) = ping("1");
        assert!(!answered && said.contains(&format!("From {gateway}")), "{to}: {said}");
        assert!(ping("2").0, "{to} is two hops away");
    }
}

#[test]
#[ignore = "needs root"]
fn given_a_vip_when_a_client_comes_to_a_port_without_a_listener_then_the_kernel_refuses() {
    let lab = Lab::start();
    for to in vips(FREE_PORT) {
        for outcome in [lab.client.http(to, 5, 1).unwrap(), lab.client.udp(to, 5, 1).unwrap()] {
            // UDP: the kernel sends so many ICMP errors a second and no more.
            let refused = outcome.failures.get(&Failure::Refused).copied().unwrap_or_default();
            assert!(outcome.ok() == 0 && refused > 0, "{to}: {outcome}");
        }
    }
    // A TCP port whose number only UDP listens on, and the other way round.
    for (tcp, udp) in vips(plan::UDP_PORT).into_iter().zip(vips(plan::WEB_PORT)) {
        for outcome in [lab.client.http(tcp, 1, 1).unwrap(), lab.client.udp(udp, 1, 1).unwrap()] {
            assert_eq!(outcome.failures, [(Failure::Refused, 1)].into(), "{tcp}: {outcome}");
        }
    }
}

#[test]
#[ignore = "needs root"]
fn given_services_of_the_gateway_itself_when_clients_come_then_they_are_served() {
    let lab = Lab::start();
    let [vip_v4, vip_v6] = vips(FREE_PORT);
    let own = [
        // The port of a listener, but not its address.
        SocketAddr::new("192.0.2.1".parse().unwrap(), plan::WEB_PORT),
        SocketAddr::new("2001:db8:1::1".parse().unwrap(), plan::WEB_PORT),
        SocketAddr::new("10.0.0.1".parse().unwrap(), plan::WEB.port()),
        SocketAddr::new("2001:db8:10::1".parse().unwrap(), plan::WEB.port()),
        // A VIP, but not the port of a listener.
        vip_v4,
        vip_v6,
    ];
    for to in own {
        let listener = lab.topology.gateway.run(|| TcpListener::bind(to)).unwrap().unwrap();
        std::thread::scope(|scope| {
            let served = scope.spawn(|| {
                let (mut stream, _) = listener.accept()?;
                let mut request = [0; 4096];
                let _ = stream.read(&mut request)?;
                stream.write_all(b"HTTP/1.1 200 OK\r\nx-backend: gw\r\ncontent-length: 2\r\n\r\ngw")
            });
            let client = &lab.topology.clients[0];
            let mut talk = Talk::begin(client, 2_000, to, AT_ONCE)
                .unwrap_or_else(|error| panic!("{to}: {error}"));
            assert_eq!(talk.ask().unwrap(), "gw", "{to}");
            served.join().unwrap().unwrap();
        });
    }
}

#[test]
#[ignore = "needs root"]
fn given_servers_on_a_client_when_backends_connect_to_them_then_nothing_is_translated() {
    let lab = Lab::start();
    let client = &lab.topology.clients[0];
    let server = Server::start(client, plan::WEB).unwrap();
    for host in &lab.topology.backends {
        for address in client.addresses() {
            let to = SocketAddr::new(address, plan::WEB.port());
            let outcome = Client::new(host).http(to, 20, 4).unwrap();
            let expected = [(server.name().to_owned(), 20)].into();
            assert_eq!((outcome.per_backend, outcome.failures.len()), (expected, 0), "{to}");
        }
    }
}
