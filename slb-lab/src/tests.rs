//! The lab itself, without a balancer: the gateway's kernel forwards.

use std::{fs, net::SocketAddr, thread, time::Duration};

use super::*;

const PORT: u16 = 8080;

fn lab() -> (Topology, Client) {
    let topology = Topology::build().unwrap();
    let client = Client::new(&topology.clients[0]);
    (topology, client)
}

#[test]
#[ignore = "needs root"]
fn given_a_lab_when_clients_ask_each_backend_over_both_families_then_that_backend_answers() {
    let (topology, client) = lab();
    for host in &topology.backends {
        let _http = Server::start(host, Service::Http(PORT)).unwrap();
        let _udp = Server::start(host, Service::Udp(PORT)).unwrap();
        for address in host.addresses() {
            let to = SocketAddr::new(address, PORT);
            let answered = [client.http(to, 20, 4).unwrap(), client.udp(to, 20, 4).unwrap()];
            for outcome in answered {
                assert_eq!((outcome.per_backend.get(&host.name), outcome.failed()), (Some(&20), 0));
            }
        }
        let to = SocketAddr::new(host.v4.into(), PORT);
        let download = client.download(to, 5_000_000).unwrap();
        assert_eq!((download.backend, download.bytes), (host.name.clone(), 5_000_000));
    }
}

#[test]
#[ignore = "needs root"]
fn given_kept_connections_and_a_load_when_the_server_stops_and_starts_then_both_saw_it() {
    let (topology, client) = lab();
    let host = &topology.backends[0];
    let to = SocketAddr::new(host.v6.into(), PORT);
    let mut server = Server::start(host, Service::Http(PORT)).unwrap();
    let sessions = Sessions::open(&client, to, 3).unwrap();
    let load = Load::start(&client, to, 100).unwrap();
    thread::sleep(Duration::from_millis(300));
    assert_eq!(load.so_far().failed(), 0, "{}", load.so_far());

    server.stop();
    let refused = client.http(to, 10, 2).unwrap();
    thread::sleep(Duration::from_millis(100));
    server.restart().unwrap();

    assert_eq!(refused.failures, [(Failure::Refused, 10)].into());
    assert_eq!(client.http(to, 10, 2).unwrap().ok(), 10);
    let sessions = sessions.stop().unwrap();
    assert!(sessions.iter().all(|session| session.failure == Some(Failure::Reset)), "{sessions:?}");
    let load = load.stop().unwrap();
    assert!(load.ok() > 0 && load.failed() > 0, "{load}");
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_when_it_is_unplugged_and_plugged_then_it_is_silent_and_back() {
    let (topology, client) = lab();
    let host = &topology.backends[1];
    let to = SocketAddr::new(host.v6.into(), PORT);
    let _server = Server::start(host, Service::Udp(PORT)).unwrap();
    assert_eq!(client.udp(to, 2, 1).unwrap().ok(), 2);

    host.unplug().unwrap();
    let silent = client.udp(to, 2, 2).unwrap();
    host.plug().unwrap();

    assert_eq!(silent.ok(), 0, "{silent}");
    // The client's kernel asks for its neighbour again, in its own time.
    let is_back = (0..20).any(|_| client.udp(to, 2, 1).unwrap().ok() == 2);
    assert!(is_back);
}

#[test]
#[ignore = "needs root; some seconds"]
fn given_twenty_thousand_new_connections_when_made_then_none_fails() {
    let (topology, client) = lab();
    let host = &topology.backends[0];
    let _server = Server::start(host, Service::Http(PORT)).unwrap();
    let outcome = client.http(SocketAddr::new(host.v4.into(), PORT), 20_000, 64).unwrap();
    assert_eq!((outcome.ok(), outcome.failed()), (20_000, 0), "{outcome}");
}

#[test]
#[ignore = "needs root"]
fn given_a_lab_when_dropped_or_abandoned_by_a_panic_then_its_namespaces_are_gone() {
    let (topology, _client) = lab();
    let path = topology.gateway.path();
    assert!(path.exists());
    let panicked = thread::spawn(move || {
        let _lab = topology;
        panic!("as a failing test does");
    });
    assert!(panicked.join().is_err());
    assert!(!path.exists());
    let left: Vec<_> = fs::read_dir("/run/netns")
        .unwrap()
        .flatten()
        .filter(|entry| naming::is_stale(&entry.file_name().to_string_lossy()))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
