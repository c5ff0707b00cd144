//! Listeners and backends are found by an index of their hashes, and by the hash maps where more than two
//! share one.

use std::{collections::HashMap, net::SocketAddr};

use slb_common::{abi, hash, verdict::Verdict};

use crate::{
    fixture::{
        FAMILIES, Outcome, Slb, answer, backend, client, endpoint, forwarded, id, port, replied,
        syn, vip, with_slb,
    },
    lab::{FIRST, ROUTER},
};

/// Three free ports of an address whose endpoints have the same hash.
fn alike(addr: SocketAddr) -> [u16; 3] {
    let mut seen: HashMap<usize, Vec<u16>> = HashMap::new();
    (10_000..=u16::MAX)
        .find_map(|port| {
            let at = SocketAddr::new(addr.ip(), port);
            let known = seen.entry(hash::endpoint(&endpoint(at, abi::TCP))).or_default();
            known.push(port);
            known.as_slice().try_into().ok()
        })
        .expect("nearly as many ports as hashes")
}

/// The HTTP listener's twin at another port.
fn add_listener(slb: &mut Slb<'_>, family: usize, at: u16) {
    slb.change(|state| {
        let http = state.listeners[&endpoint(vip(family, port::HTTP), abi::TCP)].clone();
        state.listeners.insert(endpoint(vip(family, at), abi::TCP), http);
    });
}

#[test]
#[ignore = "needs root"]
fn given_listeners_of_one_hash_when_they_come_and_go_then_each_is_found_while_it_is_there() {
    with_slb(|slb| {
        for family in FAMILIES {
            let ports = alike(vip(family, 0));
            let expect = |slb: &mut Slb<'_>, there: &[u16]| {
                for port in ports {
                    let http = syn(client(family, 1_000), vip(family, port));
                    let expected = if there.contains(&port) {
                        forwarded(http.to(backend(0, family, port::HTTP_BACKEND)), FIRST)
                    } else {
                        Outcome::Untouched(Verdict::NoListener)
                    };
                    slb.client_sends(&format!("{port} of {there:?}"), &http, &expected);
                }
            };
            expect(slb, &[]);
            for count in 1..=ports.len() {
                add_listener(slb, family, ports[count - 1]);
                expect(slb, &ports[..count]);
                slb.restart();
                expect(slb, &ports[..count]);
            }
            for count in 1..=ports.len() {
                slb.change(|state| {
                    let at = endpoint(vip(family, ports[count - 1]), abi::TCP);
                    state.listeners.remove(&at);
                });
                expect(slb, &ports[count..]);
                slb.restart();
                expect(slb, &ports[count..]);
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_backends_of_one_hash_when_they_answer_then_each_answers_for_its_own_listener() {
    with_slb(|slb| {
        for family in FAMILIES {
            let ports = alike(backend(0, family, 0));
            let listener = |port: u16| port - 9_000;
            let expect = |slb: &mut Slb<'_>, there: &[u16]| {
                for port in ports {
                    let sent = answer(&syn(client(family, 1_000), backend(0, family, port)));
                    let expected = if there.contains(&port) {
                        replied(sent.clone().from(vip(family, listener(port))), ROUTER)
                    } else {
                        Outcome::Untouched(Verdict::NotOurs)
                    };
                    slb.backend_sends(&format!("{port} of {there:?}"), &sent, &expected);
                }
            };
            for count in 1..=ports.len() {
                let port = ports[count - 1];
                slb.change(|state| {
                    let origin = abi::RevNat {
                        vip: vip(family, 0).ip().into(),
                        port: listener(port).into(),
                        backend: id::HTTP + family as u32,
                        ingress: crate::lab::LAN,
                        ..abi::RevNat::default()
                    };
                    state.endpoints.insert(endpoint(backend(0, family, port), abi::TCP), origin);
                });
                expect(slb, &ports[..count]);
            }
            for count in 1..=ports.len() {
                slb.change(|state| {
                    let at = endpoint(backend(0, family, ports[count - 1]), abi::TCP);
                    state.endpoints.remove(&at);
                });
                expect(slb, &ports[count..]);
            }
        }
    });
}
