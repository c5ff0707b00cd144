//! The client's address in a TCP option.

use super::*;

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
