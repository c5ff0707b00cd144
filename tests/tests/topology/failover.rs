//! A backend dies and comes back.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use slb_lab::{Exchange, Failure, Load, Sessions, gateway};

use crate::support::{
    AT_ONCE, Lab, NOTICED, answers_more, flows,
    plan::{self, PRIMARY, SECONDARY, vips},
    talk,
};

/// Of the weighted group.
const DEAD: &str = "web-3";
/// From its death on until no new flow goes to it: two probes, 500 ms apart, the last of which gets
/// 200 ms, and what the agent needs.
const BOUND: Duration = Duration::from_millis(1500);
/// New connections per second.
const RATE: u32 = 150;
/// After which a request without an answer is given up.
const PATIENCE: Duration = Duration::from_secs(3);

/// How a backend dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    /// Its port is closed.
    Refused,
    /// Its host is gone from the net.
    Silent,
}

#[test]
#[ignore = "needs root"]
fn given_load_when_a_backend_is_stopped_then_it_gets_no_flow_after_the_bound_and_others_lose_none()
{
    dies_and_returns(Death::Refused);
}

#[test]
#[ignore = "needs root"]
fn given_load_when_a_host_vanishes_then_it_gets_no_flow_after_the_bound_and_others_lose_none() {
    dies_and_returns(Death::Silent);
}

fn dies_and_returns(death: Death) {
    let mut lab = Lab::prepare();
    lab.edit(plan::TIMEOUT, "200ms");
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();
    let sides = vips(plan::WEB_PORT).map(|to| Side::start(&lab, to));
    sides.iter().for_each(|side| answers_more(&side.load, 200));
    for Side { to, load, .. } in &sides {
        assert_eq!(load.so_far().failed(), 0, "{to}: {}", load.so_far());
    }

    let died = Instant::now();
    match death {
        Death::Refused => lab.server(DEAD, plan::WEB).stop(),
        Death::Silent => lab.host(DEAD).unplug().unwrap(),
    }
    thread::sleep(BOUND.saturating_sub(died.elapsed()));
    let at_bound = sides.each_ref().map(|side| given(&lab, side.to)[DEAD]);
    lab.wait_health("tcp", plan::WEB_PORT, DEAD, "unhealthy");
    sides.iter().for_each(|side| answers_more(&side.load, 400));
    let later = sides.each_ref().map(|side| given(&lab, side.to)[DEAD]);
    assert_eq!(later, at_bound, "new flows to {DEAD}, over IPv4 and IPv6, after the bound");
    // Clients that were sent to it before have given up by then; its return must not answer them.
    thread::sleep((BOUND + PATIENCE).saturating_sub(died.elapsed()));
    for Side { to, load, .. } in &sides {
        let exchanges = load.exchanges();
        let latest = exchanges
            .iter()
            .filter(|exchange| exchange.result.is_err() || exchange.took > AT_ONCE)
            .map(|exchange| exchange.began.saturating_duration_since(died))
            .max();
        assert!(latest.unwrap_or_default() <= BOUND, "{to}: a request begun {latest:?} suffered");
    }

    match death {
        Death::Refused => lab.server(DEAD, plan::WEB).restart().unwrap(),
        Death::Silent => lab.host(DEAD).plug().unwrap(),
    }
    lab.wait_health("tcp", plan::WEB_PORT, DEAD, "healthy");
    let back = Instant::now();
    sides.iter().for_each(|side| answers_more(&side.load, 400));
    for side in sides {
        side.stop(&lab, back);
    }
}

/// Traffic over one address family.
struct Side {
    to: SocketAddr,
    sessions: Sessions,
    /// Flows that each backend was given before there was any load.
    before: BTreeMap<String, u64>,
    load: Load,
}

impl Side {
    fn start(lab: &Lab, to: SocketAddr) -> Self {
        let sessions = Sessions::open(&lab.client, to, 40).unwrap();
        let before = given(lab, to);
        Self { to, sessions, before, load: Load::start(&lab.client, to, RATE).unwrap() }
    }

    /// Ends it, and looks at all of it: [`DEAD`] was healthy again at `back`.
    fn stop(self, lab: &Lab, back: Instant) {
        let Self { to, sessions, before, load } = self;
        let exchanges = load.stop_with_exchanges().unwrap();
        let mut answered = BTreeMap::<&str, u64>::new();
        for exchange in &exchanges {
            match &exchange.result {
                Ok(backend) => *answered.entry(backend).or_default() += 1,
                Err(_) => {
                    assert!(exchange.began < back, "{to}: failed on its return: {exchange:?}");
                }
            }
        }
        let returned =
            |exchange: &&Exchange| exchange.began > back && exchange.result.as_deref() == Ok(DEAD);
        assert!(exchanges.iter().any(|exchange| returned(&exchange)), "{to}: no traffic to {DEAD}");
        // A flow that no answer belongs to is a connection lost: only those to the dead may be.
        let after = given(lab, to);
        for (&name, &answers) in answered.iter().filter(|(name, _)| **name != DEAD) {
            assert_eq!(after[name] - before[name], answers, "{to}: {name} lost connections");
        }
        for session in sessions.stop().unwrap() {
            assert!(session.backend == DEAD || session.failure.is_none(), "{to}: {session:?}");
        }
    }
}

/// Flows that each backend of the listener at `to` was given so far.
fn given(lab: &Lab, to: SocketAddr) -> BTreeMap<String, u64> {
    let status = lab.gateway.status().unwrap();
    let names = lab.topology.backends.iter().map(|host| host.name.clone());
    names.map(|name| (name.clone(), flows(&status, "tcp", to, &name))).collect()
}

#[test]
#[ignore = "needs root"]
fn given_a_primary_when_it_dies_and_returns_then_all_new_flows_go_to_the_secondary_and_back() {
    let mut lab = Lab::start();
    let cases = [("tcp", plan::DB_PORT, plan::DB), ("udp", plan::LOG_PORT, plan::LOG)];
    for (protocol, port, service) in cases {
        all_go_to(&lab, protocol, port, PRIMARY);

        lab.server(PRIMARY, service).stop();
        wait_active(&lab, protocol, port, SECONDARY);
        all_go_to(&lab, protocol, port, SECONDARY);
        lab.wait_health(protocol, port, PRIMARY, "unhealthy");

        lab.server(PRIMARY, service).restart().unwrap();
        wait_active(&lab, protocol, port, PRIMARY);
        all_go_to(&lab, protocol, port, PRIMARY);
        lab.wait_health(protocol, port, PRIMARY, "healthy");
    }
}

#[test]
#[ignore = "needs root"]
fn given_kept_connections_to_the_secondary_when_the_primary_returns_then_they_stay() {
    let mut lab = Lab::start();
    lab.server(PRIMARY, plan::DB).stop();
    wait_active(&lab, "tcp", plan::DB_PORT, SECONDARY);
    let kept = vips(plan::DB_PORT).map(|to| Sessions::open(&lab.client, to, 10).unwrap());

    lab.server(PRIMARY, plan::DB).restart().unwrap();
    wait_active(&lab, "tcp", plan::DB_PORT, PRIMARY);
    all_go_to(&lab, "tcp", plan::DB_PORT, PRIMARY);

    for session in kept.into_iter().flat_map(|sessions| sessions.stop().unwrap()) {
        assert_eq!((session.backend.as_str(), session.failure), (SECONDARY, None), "{session:?}");
    }
}

#[test]
#[ignore = "needs root"]
fn given_udp_sockets_in_use_when_the_primary_dies_then_they_go_on_with_the_secondary() {
    let mut lab = Lab::start();
    let sockets = vips(plan::LOG_PORT).map(|to| {
        let socket = talk::datagrams(&lab.topology.clients[0], 2_000, to, AT_ONCE);
        assert_eq!(talk::ask(&socket, to, "a").unwrap(), PRIMARY, "{to}");
        (to, socket)
    });

    lab.server(PRIMARY, plan::LOG).stop();
    wait_active(&lab, "udp", plan::LOG_PORT, SECONDARY);

    for (to, socket) in sockets {
        assert_eq!(talk::ask(&socket, to, "b").unwrap(), SECONDARY, "{to}");
    }
}

#[test]
#[ignore = "needs root"]
fn given_the_only_backends_when_all_die_then_connections_fail_closed_and_return_with_them() {
    let mut lab = Lab::start();
    for name in ["web-1", "web-2", "web-3", "web-4"] {
        lab.server(name, plan::WEB).stop();
        lab.wait_health("tcp", plan::WEB_PORT, name, "unhealthy");
    }
    for to in vips(plan::WEB_PORT) {
        let outcome = lab.client.http(to, 4, 4).unwrap();
        assert_eq!(outcome.failures, [(Failure::Timeout, 4)].into(), "{to}: {outcome}");
    }
    lab.server("web-4", plan::WEB).restart().unwrap();
    lab.wait_health("tcp", plan::WEB_PORT, "web-4", "healthy");
    for to in vips(plan::WEB_PORT) {
        let outcome = lab.client.http(to, 20, 4).unwrap();
        assert_eq!(outcome.per_backend, [("web-4".to_owned(), 20)].into(), "{to}: {outcome}");
    }
}

/// Waits until new flows go to `name`, over both families.
fn wait_active(lab: &Lab, protocol: &str, port: u16, name: &str) {
    let what = format!("{name} active on {protocol}/{port}");
    let reached = |status: &serde_json::Value| {
        let backends = gateway::backends(status, protocol, port);
        backends.len() == 4
            && backends.iter().all(|backend| backend["active"] == (backend["name"] == name))
    };
    lab.gateway.wait(&what, NOTICED, reached).unwrap();
}

/// All new flows to `port` go to `name`, and none fails.
fn all_go_to(lab: &Lab, protocol: &str, port: u16, name: &str) {
    for to in vips(port) {
        let outcome = match protocol {
            "udp" => lab.client.udp(to, 100, 4).unwrap(),
            _ => lab.client.http(to, 100, 4).unwrap(),
        };
        let all = (Some(&100), 0);
        let (seen, failed) = (outcome.per_backend.get(name), outcome.failed());
        assert_eq!((seen, failed), all, "{protocol} {to} to {name}: {outcome}");
    }
}
