//! Clients that forge the PROXY protocol by what they send, and by the numbers of a SYN cookie.

use super::*;

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
