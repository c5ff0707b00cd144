//! TCP Fast Open, which is not offered to backends that are told the client's address.

use super::*;

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
