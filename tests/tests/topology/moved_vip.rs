//! A VIP that moves to another instance while its clients are served.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use slb_lab::{Client, Failure, Gateway, Server, Service, Sessions, Topology};

use crate::support::{wait_healthy, wait_until};

const HTTP: Service = Service::Http(8080);
const STAYS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 101);
const MOVES: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 102);
const OTHER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 103);
const DOWNLOADS: usize = 4;
/// More than is sent while the test runs.
const ENDLESS: u64 = 1 << 40;
/// How much of a download shows that it goes on.
const GOES_ON: u64 = 1 << 20;
/// What a client reads at once, and then rests for a moment: other tests need the processors as well.
const PIECE: usize = 1 << 14;
/// No server that goes on is silent for this long.
const SILENCE: Duration = Duration::from_secs(5);

/// Two instances with these VIPs, and half of the backends each.
fn instances(topology: &Topology, vips: [&[Ipv4Addr]; 2]) -> String {
    let mut text = String::new();
    for (name, vips, hosts) in
        [("a", vips[0], &topology.backends[..2]), ("b", vips[1], &topology.backends[2..])]
    {
        let vips: Vec<String> = vips.iter().map(ToString::to_string).collect();
        text += &format!("[[instance]]\nname = \"{name}\"\nvips = {vips:?}\n");
        for host in hosts {
            let (name, address) = (&host.name, host.v4);
            text += &format!("[[instance.backend]]\nname = \"{name}\"\naddress = \"{address}\"\n");
        }
        text += "[[instance.listener]]\nprotocol = \"tcp\"\nport = 80\nbackend_port = 8080\n";
    }
    text
}

/// How a download has gone on.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Reset,
    Silence,
    Stopped,
}

/// Reads until it ends, or `stop` says so.
fn download(bytes: &AtomicU64, stop: &AtomicBool) -> End {
    let mut stream = TcpStream::connect(SocketAddr::from((MOVES, 80))).expect("a connection");
    stream.set_read_timeout(Some(SILENCE)).expect("a time limit");
    write!(stream, "GET /big?bytes={ENDLESS} HTTP/1.1\r\nHost: lab\r\n\r\n").expect("a request");
    let mut buffer = vec![0; PIECE];
    while !stop.load(Ordering::Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => return End::Reset,
            Ok(read) => {
                bytes.fetch_add(read as u64, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return End::Reset,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return End::Silence,
            Err(error) => panic!("{error}"),
        }
    }
    End::Stopped
}

#[test]
#[ignore = "needs root"]
fn given_downloads_when_their_vip_moves_to_another_instance_then_they_go_on_or_are_reset() {
    let topology = Topology::build().unwrap();
    let servers = topology.backends.iter().map(|host| Server::start(host, HTTP).unwrap());
    let _servers: Vec<Server> = servers.collect();
    let before = instances(&topology, [&[STAYS, MOVES], &[OTHER]]);
    let mut gateway = Gateway::new(&topology, &before).unwrap();
    gateway.start().unwrap();
    wait_healthy(&gateway, &[("tcp", 80)], 4);

    let stop = AtomicBool::new(false);
    let progress: Vec<AtomicU64> = (0..DOWNLOADS).map(|_| AtomicU64::new(0)).collect();
    let client = &topology.clients[0].netns;
    let ends = thread::scope(|scope| {
        let downloads: Vec<_> = progress
            .iter()
            .map(|bytes| scope.spawn(|| client.run(|| download(bytes, &stop)).unwrap()))
            .collect();
        wait_until("all downloads have begun", || {
            progress.iter().all(|bytes| bytes.load(Ordering::Relaxed) > GOES_ON)
        });
        gateway.configure(&instances(&topology, [&[STAYS], &[OTHER, MOVES]])).unwrap();
        let reload = gateway.slb(&["reload"]).unwrap();
        assert!(reload.status.success(), "{}", String::from_utf8_lossy(&reload.stderr));
        // Each gets more, or has ended, or has been silent.
        let after: Vec<u64> = progress.iter().map(|it| it.load(Ordering::Relaxed)).collect();
        wait_until("each goes on or has ended", || {
            let rows = progress.iter().zip(&after).zip(&downloads);
            rows.into_iter().all(|((now, after), download)| {
                download.is_finished() || now.load(Ordering::Relaxed) > after + 4 * GOES_ON
            })
        });
        stop.store(true, Ordering::Relaxed);
        downloads.into_iter().map(|download| download.join().unwrap()).collect::<Vec<End>>()
    });
    assert!(!ends.contains(&End::Silence), "{ends:?}");
}

/// What a backend answers is that of the one VIP which leads to it, until another does as well: the connections that began
/// before have entries for one direction only.
#[test]
#[ignore = "needs root"]
fn given_connections_to_the_only_vip_when_another_comes_and_it_moves_then_they_go_on_or_are_reset()
{
    let topology = Topology::build().unwrap();
    let servers = topology.backends.iter().map(|host| Server::start(host, HTTP).unwrap());
    let _servers: Vec<Server> = servers.collect();
    let client = Client::new(&topology.clients[0]);
    for scheduler in ["tch", "wrr", "rr", "wlc"] {
        let text = |vips| {
            let scheduled = format!("protocol = \"tcp\"\nscheduler = {scheduler:?}\n");
            instances(&topology, vips).replace("protocol = \"tcp\"\n", &scheduled)
        };
        let mut gateway = Gateway::new(&topology, &text([&[MOVES], &[OTHER]])).unwrap();
        gateway.start().unwrap();
        wait_healthy(&gateway, &[("tcp", 80)], 4);
        let kept = Sessions::open(&client, (MOVES, 80).into(), 6).unwrap();
        for vips in [[&[STAYS, MOVES][..], &[OTHER]], [&[STAYS], &[OTHER, MOVES]]] {
            gateway.configure(&text(vips)).unwrap();
            assert!(gateway.slb(&["reload"]).unwrap().status.success());
            let before = kept.so_far();
            wait_until("each has an answer more, or has ended", || {
                kept.so_far()
                    .iter()
                    .zip(&before)
                    .all(|(now, before)| now.failure.is_some() || now.answered > before.answered)
            });
        }
        for session in kept.stop().unwrap() {
            assert_ne!(session.failure, Some(Failure::Timeout), "{scheduler}: {session:?}");
        }
    }
}
