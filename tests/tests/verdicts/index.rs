//! Listeners and backends are found by an index of their hashes, and by the hash maps where several share
//! one.

use std::collections::HashMap;

use slb_common::{abi, hash, verdict::Verdict};

use crate::{
    fixture::{
        FAMILIES, Outcome, Slb, answer, backend, client, endpoint, forwarded, id, port, replied,
        syn, vip, with_slb,
    },
    frame::Frame,
    lab::{FIRST, ROUTER},
};

/// Two free ports of an address whose endpoints have the same hash.
fn alike(addr: std::net::SocketAddr) -> [u16; 2] {
    let mut seen = HashMap::new();
    (10_000..=u16::MAX)
        .find_map(|port| {
            let at = std::net::SocketAddr::new(addr.ip(), port);
            let other = seen.insert(hash::endpoint(&endpoint(at, abi::TCP)), port)?;
            Some([other, port])
        })
        .expect("more ports than hashes")
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
            let [one, two] = alike(vip(family, 0));
            let sends = |slb: &mut Slb<'_>, case: &str, port: u16, is_there: bool| {
                let http = syn(client(family, 1_000), vip(family, port));
                let expected = if is_there {
                    forwarded(http.to(backend(0, family, port::HTTP_BACKEND)), FIRST)
                } else {
                    Outcome::Untouched(Verdict::NoListener)
                };
                slb.client_sends(case, &http, &expected);
            };
            sends(slb, "none", one, false);
            add_listener(slb, family, one);
            sends(slb, "one", one, true);
            sends(slb, "not the other", two, false);
            add_listener(slb, family, two);
            for port in [one, two] {
                sends(slb, "both", port, true);
            }
            slb.change(|state| {
                state.listeners.remove(&endpoint(vip(family, one), abi::TCP));
            });
            sends(slb, "gone", one, false);
            sends(slb, "the other stays", two, true);
            slb.change(|state| {
                state.listeners.remove(&endpoint(vip(family, two), abi::TCP));
            });
            sends(slb, "both gone", two, false);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_backends_of_one_hash_when_they_answer_then_each_answers_for_its_own_listener() {
    with_slb(|slb| {
        for family in FAMILIES {
            let [one, two] = alike(backend(0, family, 0));
            let from = |port| -> Frame {
                let http = syn(client(family, 1_000), backend(0, family, port));
                answer(&http)
            };
            for (at, listener) in [(one, 1_001), (two, 1_002)] {
                slb.change(|state| {
                    let origin = abi::Origin {
                        vip: vip(family, 0).ip().into(),
                        port: listener,
                        backend: id::HTTP + family as u32,
                        ..abi::Origin::default()
                    };
                    let at = endpoint(backend(0, family, at), abi::TCP);
                    state.endpoints.insert(at, origin);
                });
            }
            for (at, listener) in [(one, 1_001), (two, 1_002)] {
                let expected = replied(from(at).from(vip(family, listener)), ROUTER);
                slb.backend_sends("both", &from(at), &expected);
            }
            slb.change(|state| {
                state.endpoints.remove(&endpoint(backend(0, family, one), abi::TCP));
            });
            slb.backend_sends("gone", &from(one), &Outcome::Untouched(Verdict::NotOurs));
            let expected = replied(from(two).from(vip(family, 1_002)), ROUTER);
            slb.backend_sends("stays", &from(two), &expected);
        }
    });
}
