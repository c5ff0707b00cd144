//! Who has got how much, who should have, and why they differ. Pure.
//!
//! Two looks at the counters, a while apart. A backend's part of `n` new flows is a matter of chance by hash, with a
//! standard deviation of `sqrt(n p (1 - p))` flows around the expected `n p`; what is farther from that than
//! [`SIGMAS`] has a reason, and the likely ones are looked for in what changed in between.

use serde::Serialize;

use slb_api::{BackendStatus, ListenerStatus, Scheduler, Status};

/// One in some ten thousand backends is farther off by chance.
const SIGMAS: f64 = 4.0;
/// With fewer expected flows per backend chance is all there is.
const ENOUGH: f64 = 10.0;

/// Of a listener's backends of one address family.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Distribution {
    /// Name of the instance.
    pub instance: String,
    /// Such as `tcp/80`.
    pub listener: String,
    /// How a backend is chosen.
    pub scheduler: Scheduler,
    /// `IPv4` or `IPv6`: of the backends' addresses.
    pub family: &'static str,
    /// `flows`, or `packets` where flows are not counted.
    pub unit: &'static str,
    /// How many there were.
    pub total: u64,
    /// In the order of the file.
    pub backends: Vec<Part>,
    /// In words.
    pub verdict: String,
    /// Whether nothing differs by more than chance allows.
    pub is_as_expected: bool,
    /// Whether one busy client would explain it better.
    #[serde(skip)]
    is_open: bool,
}

/// From this part of a listener's flows on, one client makes a difference.
const BUSY: f64 = 0.1;

impl Distribution {
    /// Whether it is worth asking who has most of the flows.
    #[must_use]
    pub const fn is_open(&self) -> bool {
        self.is_open
    }

    /// Of the listener's `total` flows with an entry `client` has `flows`, more than any other.
    pub fn note_busiest(&mut self, client: &str, flows: u64, total: u64) {
        let part = flows as f64 / total as f64;
        if self.is_open && part >= BUSY {
            let percent = part * 100.0;
            self.verdict =
                format!("one client, {client}, has {percent:.0} % of the flows; {}", self.verdict);
        }
    }
}

/// Of one backend.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    /// Its name.
    pub backend: String,
    /// Its address and port.
    pub address: String,
    /// Configured weight; `None`: the configuration does not name the backend any more.
    pub weight: Option<u32>,
    /// 0 to 1; `None`: the listener has no schedule.
    pub expected_share: Option<f64>,
    /// 0 to 1; `None`: there was nothing to share.
    pub share: Option<f64>,
    /// Flows, or packets.
    pub count: u64,
    /// Distance from what is expected, in standard deviations; `None`: not by chance, or too few.
    pub sigmas: Option<f64>,
    /// Whether it differs by more than chance allows.
    pub differs: bool,
}

/// What happened between two looks.
#[must_use]
pub fn between(before: &Status, after: &Status) -> Vec<Distribution> {
    let mut found = Vec::new();
    for instance in &after.instances {
        let was = before.instances.iter().find(|was| was.name == instance.name);
        for listener in &instance.listeners {
            let was = was.and_then(|was| {
                was.listeners
                    .iter()
                    .find(|was| (was.protocol, was.port) == (listener.protocol, listener.port))
            });
            for family in ["IPv4", "IPv6"] {
                let name = &instance.name;
                found.extend(of_family(name, listener, was, family, before, after));
            }
        }
    }
    found
}

fn of_family(
    instance: &str,
    listener: &ListenerStatus,
    was: Option<&ListenerStatus>,
    family: &'static str,
    before: &Status,
    after: &Status,
) -> Option<Distribution> {
    let is_alike = |backend: &&BackendStatus| backend.is_v4() == (family == "IPv4");
    let now: Vec<&BackendStatus> = listener.backends.iter().filter(is_alike).collect();
    let was: Vec<&BackendStatus> =
        was.into_iter().flat_map(|was| &was.backends).filter(is_alike).collect();
    if now.is_empty() {
        return None;
    }
    let counts_packets = now.iter().any(|backend| backend.flows.is_none());
    let count = |backend: &BackendStatus| match counts_packets {
        true => backend.packets,
        false => backend.flows.unwrap_or_default(),
    };
    let counts: Vec<u64> = now
        .iter()
        .map(|backend| {
            let was = was.iter().find(|was| was.endpoint == backend.endpoint);
            count(backend).saturating_sub(was.map_or(0, |was| count(was)))
        })
        .collect();
    let total: u64 = counts.iter().sum();
    let parts: Vec<Part> = now
        .iter()
        .zip(counts)
        .map(|(backend, count)| part(backend, count, total, counts_packets))
        .collect();
    let differs = parts.iter().any(|part| part.differs);
    let reason = reason(&now, &was, before, after);
    let is_open = differs && reason.is_none();
    let verdict = match reason {
        _ if total == 0 => format!("no new {}", unit(counts_packets)),
        Some(reason) => reason,
        None if counts_packets => {
            "shares of packets, for flows of UDP are not counted by hash: a busy flow weighs more"
                .to_owned()
        }
        None if differs => why_uneven(listener).to_owned(),
        None if listener.scheduler.is_by_hash() && is_few(&parts, total) => {
            "too few flows to tell".to_owned()
        }
        None => "as expected".to_owned(),
    };
    Some(Distribution {
        instance: instance.to_owned(),
        listener: listener.label(),
        scheduler: listener.scheduler,
        family,
        unit: unit(counts_packets),
        total,
        backends: parts,
        verdict,
        is_as_expected: !differs,
        is_open,
    })
}

/// Why shares differ from what is expected, though nothing has changed meanwhile.
fn why_uneven(listener: &ListenerStatus) -> &'static str {
    match listener.scheduler {
        _ if listener.persistence_seconds.is_some() => {
            "session persistence keeps a client with its backend: clients share as expected, and \
             busy ones weigh more"
        }
        Scheduler::Wlc => {
            "wlc evens out the flows that there are, not those that begin: a backend whose flows end \
             sooner gets more"
        }
        Scheduler::Sch => {
            "sch gives all flows of a client to one backend: clients share as expected, and busy \
             ones weigh more"
        }
        _ => {
            "differs by more than chance allows, for no reason that is known here; SYNs that are sent \
             again count twice"
        }
    }
}

fn part(backend: &BackendStatus, count: u64, total: u64, counts_packets: bool) -> Part {
    let (p, n) = (backend.expected_share.unwrap_or_default(), total as f64);
    let (expected, deviation) = (n * p, (n * p * (1.0 - p)).sqrt());
    let off = count as f64 - expected;
    // With none or all of the flows there is no chance, but a flow may have begun between the two reads.
    let is_certain = deviation < f64::EPSILON;
    let sigmas = (!counts_packets && !is_certain && expected >= ENOUGH).then(|| off / deviation);
    let is_off = sigmas.is_some_and(|sigmas| sigmas.abs() > SIGMAS);
    let differs = total > 0 && !counts_packets && (is_off || is_certain && off.abs() > 1.0);
    Part {
        backend: backend.name.clone(),
        address: backend.endpoint.to_string(),
        weight: backend.weight,
        expected_share: backend.expected_share,
        share: (total > 0).then(|| count as f64 / n),
        count,
        sigmas,
        differs,
    }
}

/// What changed in between, and so moved flows.
fn reason(
    now: &[&BackendStatus],
    was: &[&BackendStatus],
    before: &Status,
    after: &Status,
) -> Option<String> {
    if before.pid != after.pid {
        return Some("the agent was started again in between".to_owned());
    }
    let pairs = || {
        now.iter().filter_map(|backend| {
            let was = was.iter().find(|was| was.endpoint == backend.endpoint)?;
            Some((*was, *backend))
        })
    };
    if let Some((_, backend)) = pairs().find(|(was, is)| was.transitions != is.transitions) {
        return Some(format!("the health of {} changed in between", backend.name));
    }
    if let Some((_, is)) = pairs().find(|(was, is)| was.drains != is.drains) {
        let what = if is.drains { "began to be drained" } else { "is not drained any more" };
        return Some(format!("{} {what} in between", is.name));
    }
    if let Some((was, is)) = pairs().find(|(was, is)| was.weight != is.weight) {
        return Some(format!(
            "the weight of {} changed in between, from {} to {}",
            is.name,
            weight(was),
            weight(is)
        ));
    }
    if now.len() != was.len() || pairs().count() != now.len() {
        return Some("backends were added or removed in between".to_owned());
    }
    if before.generation != after.generation {
        return Some("the configuration changed in between".to_owned());
    }
    let is_moving = pairs().any(|(was, is)| was.expected_share != is.expected_share);
    is_moving.then(|| "the schedule changed in between".to_owned())
}

fn weight(backend: &BackendStatus) -> String {
    backend.weight.map_or_else(|| "none".to_owned(), |weight| weight.to_string())
}

fn is_few(parts: &[Part], total: u64) -> bool {
    parts.iter().any(|part| {
        let expected = part.expected_share.unwrap_or_default() * total as f64;
        expected > 0.0 && expected < ENOUGH
    })
}

const fn unit(counts_packets: bool) -> &'static str {
    if counts_packets { "packets" } else { "flows" }
}

#[cfg(test)]
mod tests {
    use slb_api::Protocol;

    use super::*;
    use crate::observe::fixtures;

    /// Backends with these shares and counts, of a listener by `scheduler`.
    fn status(protocol: &str, scheduler: &str, backends: &[(f64, u64)]) -> Status {
        let mut words = Scheduler::WORDS.iter();
        let scheduler = words.find(|(word, _)| *word == scheduler).unwrap().1;
        let protocol = protocol.parse().unwrap();
        let is_counted = protocol == Protocol::Tcp || !scheduler.is_by_hash();
        let backends =
            backends.iter().zip(1..).map(|(&(expected_share, flows), number)| BackendStatus {
                endpoint: format!("10.0.0.{number}:8080").parse().unwrap(),
                expected_share: Some(expected_share),
                flows: is_counted.then_some(flows),
                packets: 10 * flows,
                ..fixtures::backend(&format!("web-{number}"))
            });
        let mut status = fixtures::status();
        status.instances[0].listeners =
            vec![ListenerStatus { protocol, scheduler, ..fixtures::listener(backends.collect()) }];
        status
    }

    fn only(before: &Status, after: &Status) -> Distribution {
        let found = between(before, after);
        let [only] = &found[..] else { panic!("{found:?}") };
        only.clone()
    }

    fn tch(counts: [u64; 2]) -> Status {
        status("tcp", "tch", &[(0.25, counts[0]), (0.75, counts[1])])
    }

    #[test]
    fn given_counts_when_compared_then_chance_is_told_from_what_has_a_reason() {
        let before = tch([100, 300]);
        // 1000 flows: 250 are expected, with a standard deviation of 13.7.
        let cases = [
            ([350, 1_050], true, "as expected"),
            ([350 + 54, 1_050 - 54], true, "as expected"),
            ([350 + 56, 1_050 - 56], false, "differs by more than chance allows"),
            ([350 - 56, 1_050 + 56], false, "differs by more than chance allows"),
            ([105, 310], true, "too few flows to tell"),
            ([100, 300], true, "no new flows"),
        ];
        for (counts, is_as_expected, verdict) in cases {
            let found = only(&before, &tch(counts));
            assert_eq!(found.is_as_expected, is_as_expected, "{found:?}");
            assert!(found.verdict.starts_with(verdict), "{found:?}");
        }
        let found = only(&before, &tch([404, 996]));
        assert_eq!((found.total, found.unit, found.family), (1_000, "flows", "IPv4"));
        assert_eq!((found.backends[0].count, found.backends[0].share), (304, Some(0.304)));
        let sigmas = found.backends[0].sigmas.unwrap();
        assert!((sigmas - 54.0 / 187.5_f64.sqrt()).abs() < 1e-9, "{sigmas}");
    }

    #[test]
    fn given_something_that_changed_in_between_when_compared_then_that_is_the_reason() {
        let before = tch([0, 0]);
        let change = |change: fn(&mut Status)| {
            let mut after = tch([500, 500]);
            change(&mut after);
            only(&before, &after).verdict
        };
        fn second(status: &mut Status) -> &mut BackendStatus {
            &mut status.instances[0].listeners[0].backends[1]
        }
        type Change = fn(&mut Status);
        let cases: [(Change, &str); 7] = [
            (|status| second(status).drains = true, "web-2 began to be drained"),
            (|status| second(status).transitions += 2, "the health of web-2 changed"),
            (
                |status| second(status).weight = Some(7),
                "the weight of web-2 changed in between, from 100 to 7",
            ),
            (|status| second(status).expected_share = Some(0.5), "the schedule changed"),
            (
                |status| second(status).endpoint = "10.0.0.9:1".parse().unwrap(),
                "backends were added or removed",
            ),
            (|status| status.generation += 1, "the configuration changed"),
            (|status| status.pid += 1, "the agent was started again"),
        ];
        for (changed, expected) in cases {
            let verdict = change(changed);
            assert!(verdict.starts_with(expected), "{verdict}");
        }
    }

    #[test]
    fn given_what_is_no_matter_of_chance_when_compared_then_it_is_judged_as_it_is() {
        let cases = [
            // A backend with no share gets nothing, but for a flow at the edge.
            ("tcp", "wrr", [(0.0, 50), (1.0, 100)], false, "differs"),
            ("tcp", "wrr", [(0.0, 1), (1.0, 100)], true, "as expected"),
            ("tcp", "wrr", [(0.5, 2), (0.5, 3)], true, "as expected"),
            ("tcp", "sch", [(0.5, 900), (0.5, 100)], false, "sch gives all flows of a client"),
            ("tcp", "wlc", [(0.5, 900), (0.5, 100)], false, "wlc evens out the flows"),
            ("udp", "tch", [(0.5, 900), (0.5, 100)], true, "shares of packets"),
            ("udp", "wrr", [(0.5, 900), (0.5, 100)], false, "differs"),
        ];
        for (protocol, scheduler, counts, is_as_expected, verdict) in cases {
            let before = status(protocol, scheduler, &counts.map(|(share, _)| (share, 0)));
            let found = only(&before, &status(protocol, scheduler, &counts));
            assert_eq!(found.is_as_expected, is_as_expected, "{found:?}");
            assert!(found.verdict.starts_with(verdict), "{found:?}");
        }
    }

    #[test]
    fn given_persistence_and_a_busy_client_when_compared_then_both_are_told() {
        let sticky = |counts: [u64; 2]| {
            let mut status = status("tcp", "wrr", &[(0.5, counts[0]), (0.5, counts[1])]);
            status.instances[0].listeners[0].persistence_seconds = Some(600);
            status
        };
        let mut found = only(&sticky([0, 0]), &sticky([900, 100]));
        assert!(found.is_open() && found.verdict.starts_with("session persistence"), "{found:?}");
        found.note_busiest("198.51.100.7", 9, 100);
        assert!(found.verdict.starts_with("session persistence"), "not busy enough: {found:?}");
        found.note_busiest("198.51.100.7", 80, 100);
        let expected = "one client, 198.51.100.7, has 80 % of the flows; session persistence";
        assert!(found.verdict.starts_with(expected), "{found:?}");

        let mut even = only(&sticky([0, 0]), &sticky([500, 500]));
        even.note_busiest("198.51.100.7", 80, 100);
        assert_eq!(even.verdict, "as expected");
    }
}
