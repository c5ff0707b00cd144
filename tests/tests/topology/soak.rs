//! Connections that live long, while everything around them changes: `SLB_SOAK_SECONDS` says for how long.

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use etherparse::{IpNumber, Ipv4Header, TcpHeader};
use slb_lab::{
    Client, Gateway, Host, Server, Service, Sessions, Topology, gateway::backends, topology,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::support::NOTICED;

const HTTP: Service = Service::Http(8080);
/// What tells whether a backend is healthy, so that one can fall ill without a connection that ends.
const CHECK: Service = Service::Http(9090);
/// By hash, and in turn.
const PORTS: [(u16, &str); 2] = [(80, "tch"), (81, "wrr")];
/// Of each listener.
const CONNECTIONS: usize = 100;
/// SYNs from everywhere, per second.
const FLOOD: u64 = 2_000;

fn instances(topology: &Topology) -> String {
    let mut text = format!("[[instance]]\nname = \"lab\"\nvips = [\"{}\"]\n", topology::VIP_V4);
    for host in &topology.backends {
        text +=
            &format!("[[instance.backend]]\nname = \"{}\"\naddress = \"{}\"\n", host.name, host.v4);
    }
    for (port, scheduler) in PORTS {
        text += &format!(
            "[[instance.listener]]\nprotocol = \"tcp\"\nport = {port}\nbackend_port = 8080\n\
             scheduler = \"{scheduler}\"\n[instance.listener.health_check]\ntype = \"http\"\n\
             port = 9090\ninterval = \"500ms\"\ntimeout = \"400ms\"\nhealthy = 1\nunhealthy = 1\n"
        );
    }
    text
}

/// SYNs from random addresses and ports to both listeners, until told to stop.
fn flood(host: &Host, stop: &Arc<AtomicBool>, sent: &Arc<AtomicU64>) -> thread::JoinHandle<()> {
    let (stop, sent) = (Arc::clone(stop), Arc::clone(sent));
    host.netns
        .thread("flood", move || {
            let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255)))?;
            let began = Instant::now();
            let mut random = 0x51b_u64;
            while !stop.load(Ordering::Relaxed) {
                let number = sent.load(Ordering::Relaxed);
                // No more than so many per second, without a clock per packet.
                if number.is_multiple_of(64) {
                    let due = Duration::from_micros(number * 1_000_000 / FLOOD);
                    thread::sleep(due.saturating_sub(began.elapsed()));
                }
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                // Benchmarking addresses (RFC 2544): no host has them.
                let source = Ipv4Addr::from_bits(0xc612_0000 | (random >> 32) as u32 & 0x1_ffff);
                let (port, _) = PORTS[(number % 2) as usize];
                let mut tcp =
                    TcpHeader::new((random >> 16) as u16 | 1_024, port, random as u32, 64_240);
                tcp.syn = true;
                tcp.checksum = tcp
                    .calc_checksum_ipv4_raw(source.octets(), topology::VIP_V4.octets(), &[])
                    .expect("a short segment");
                let (from, to) = (source.octets(), topology::VIP_V4.octets());
                let ip = Ipv4Header::new(20, 64, IpNumber::TCP, from, to).expect("a short packet");
                let packet = [&ip.to_bytes()[..], &tcp.to_bytes()].concat();
                // A full queue drops it, which is as good.
                let to = SocketAddr::from(SocketAddrV4::new(topology::VIP_V4, 0));
                let _ = socket.send_to(&packet, &to.into());
                sent.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })
        .map(|handle| thread::spawn(move || handle.join().expect("the flood").expect("a socket")))
        .unwrap()
}

#[test]
#[ignore = "needs root"]
fn given_a_flood_and_backends_that_come_and_go_when_connections_go_on_then_none_breaks() {
    let seconds = std::env::var("SLB_SOAK_SECONDS").map_or(8, |text| text.parse().unwrap());
    let topology = Topology::build().unwrap();
    let mut checks = Vec::new();
    let mut servers = Vec::new();
    for host in &topology.backends {
        servers.push(Server::start(host, HTTP).unwrap());
        checks.push(Server::start(host, CHECK).unwrap());
    }
    let mut gateway = Gateway::new(&topology, &instances(&topology)).unwrap();
    gateway.start().unwrap();
    let healthy = |wanted: usize| {
        move |status: &serde_json::Value| {
            PORTS.iter().all(|(port, _)| {
                let found = backends(status, "tcp", *port);
                found.iter().filter(|backend| backend["health"] == "healthy").count() == wanted
            })
        }
    };
    gateway.wait("all backends healthy", NOTICED, healthy(4)).unwrap();
    let client = Client::new(&topology.clients[0]);
    let sessions: Vec<Sessions> = PORTS
        .iter()
        .map(|(port, _)| {
            Sessions::open(&client, (topology::VIP_V4, *port).into(), CONNECTIONS).unwrap()
        })
        .collect();

    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let flooding = flood(&topology.clients[1], &stop, &sent);
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut changes = 0;
    while Instant::now() < until {
        let check = &mut checks[changes / 2 % 4];
        let wanted = if changes % 2 == 0 {
            check.stop();
            3
        } else {
            check.restart().unwrap();
            4
        };
        gateway.wait("the change", NOTICED, healthy(wanted)).unwrap();
        changes += 1;
    }
    stop.store(true, Ordering::Relaxed);
    flooding.join().unwrap();

    let mut answered = 0;
    for (sessions, (port, scheduler)) in sessions.into_iter().zip(PORTS) {
        let sessions = sessions.stop().unwrap();
        assert_eq!(sessions.len(), CONNECTIONS);
        for session in sessions {
            assert_eq!(session.failure, None, "{scheduler}, port {port}: {session:?}");
            answered += session.answered;
        }
    }
    let sent = sent.load(Ordering::Relaxed);
    eprintln!("{changes} changes, {sent} SYNs from everywhere, {answered} requests answered");
    assert!(changes >= seconds as usize / 2, "{changes} changes in {seconds} s");
    assert!(sent > seconds * FLOOD / 4, "{sent} SYNs in {seconds} s");
    // New clients still get in.
    for (port, _) in PORTS {
        let outcome = client.http((topology::VIP_V4, port).into(), 200, 8).unwrap();
        assert_eq!(outcome.ok(), 200, "{outcome}");
    }
}
