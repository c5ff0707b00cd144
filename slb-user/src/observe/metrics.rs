//! A status as Prometheus reads it (text exposition format, version 0.0.4).
//!
//! Counters are those of the maps, so they go on when the agent is started again. The labels are bounded by the
//! configuration.

use std::{collections::BTreeMap, fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, LabelSetEncoder, prometheus_text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};

use slb_api::{
    BackendStatus, Health, InstanceStatus, ListenerStatus, MapStatus, ProblemName, Repairs,
    Severity, Status, VerdictCount,
};

/// What `GET /metrics` answers with.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics.
///
/// # Errors
///
/// None that a [`String`] has.
pub fn encode(status: Status) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Metrics(status)));
    let mut text = String::new();
    prometheus_text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Metrics(Status);

/// Labels that many metrics share: with thousands of backends, copies would take most of the time of a scrape.
type Shared = Arc<Vec<(&'static str, String)>>;

/// The labels of one value.
#[derive(Clone, Debug)]
struct Labels {
    shared: Shared,
    direction: Option<&'static str>,
}

impl From<Vec<(&'static str, String)>> for Labels {
    fn from(labels: Vec<(&'static str, String)>) -> Self {
        Self { shared: Arc::new(labels), direction: None }
    }
}

impl EncodeLabelSet for Labels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.shared.encode(encoder)?;
        let direction = self.direction.map(|direction| ("direction", direction));
        direction.as_slice().encode(encoder)
    }
}

/// What has labels of its own in a status.
struct View<'a> {
    status: &'a Status,
    listeners: Vec<(Labels, &'a ListenerStatus)>,
    backends: Vec<(Labels, &'a BackendStatus)>,
}

impl<'a> View<'a> {
    fn new(status: &'a Status) -> Self {
        let (mut listeners, mut backends) = (Vec::new(), Vec::new());
        for instance in &status.instances {
            // Of one that is switched off nothing is known: its counters go on when it is switched on.
            for listener in instance.listeners.iter().filter(|listener| listener.enabled) {
                listeners.push((of_listener(instance, listener).into(), listener));
                backends.extend(
                    listener
                        .backends
                        .iter()
                        .map(|backend| (of_backend(instance, listener, backend).into(), backend)),
                );
            }
        }
        Self { status, listeners, backends }
    }
}

/// The values of one metric.
struct Family<T> {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    values: Vec<(Labels, T)>,
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let view = View::new(&self.0);
        for family in counters(&view) {
            family.encode(&mut encoder, MetricType::Counter, ConstCounter::new)?;
        }
        for family in gauges(&view) {
            family.encode(&mut encoder, MetricType::Gauge, ConstGauge::new)?;
        }
        Ok(())
    }
}

impl<T: Copy> Family<T> {
    fn encode<M: EncodeMetric>(
        self,
        encoder: &mut DescriptorEncoder<'_>,
        kind: MetricType,
        metric: impl Fn(T) -> M,
    ) -> fmt::Result {
        let Self { name, help, unit, values } = self;
        if values.is_empty() {
            return Ok(());
        }
        let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
        for (labels, value) in values {
            metric(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

fn counters(view: &View<'_>) -> Vec<Family<u64>> {
    let status = view.status;
    let family = |name, help, values| Family { name, help, unit: None, values };
    let verdicts = |count: fn(&VerdictCount) -> u64| {
        let all = status.verdicts.iter();
        all.map(|(verdict, found)| (vec![("verdict", verdict.clone())].into(), count(found)))
            .collect()
    };
    let listeners = |count: fn(&ListenerStatus) -> [Option<u64>; 2]| {
        let all = view.listeners.iter();
        all.flat_map(|(labels, listener)| by_direction(labels, count(listener))).collect()
    };
    let backends = |count: fn(&BackendStatus) -> [Option<u64>; 2]| {
        let all = view.backends.iter();
        all.flat_map(|(labels, backend)| by_direction(labels, count(backend))).collect()
    };
    vec![
        family("slb_verdicts", "Frames by what became of them.", verdicts(|count| count.packets)),
        family("slb_verdict_bytes", "Bytes by what became of them.", verdicts(|count| count.bytes)),
        family(
            "slb_listener_packets",
            "Frames forwarded for a listener; in: to backends, out: to clients.",
            listeners(|listener| [Some(listener.packets), listener.reply_packets]),
        ),
        family(
            "slb_listener_bytes",
            "Bytes forwarded for a listener; in: to backends, out: to clients.",
            listeners(|listener| [Some(listener.bytes), listener.reply_bytes]),
        ),
        family(
            "slb_listener_flows",
            "Flows given to a listener's backends.",
            view.listeners
                .iter()
                .filter_map(|(labels, listener)| Some((labels.clone(), listener.flows?)))
                .collect(),
        ),
        family(
            "slb_backend_packets",
            "Frames; in: to the backend, out: to its clients.",
            backends(|backend| [Some(backend.packets), backend.reply_packets]),
        ),
        family(
            "slb_backend_bytes",
            "Bytes; in: to the backend, out: to its clients.",
            backends(|backend| [Some(backend.bytes), backend.reply_bytes]),
        ),
        family(
            "slb_backend_flows",
            "Flows given to the backend.",
            view.backends
                .iter()
                .filter_map(|(labels, backend)| Some((labels.clone(), backend.flows?)))
                .collect(),
        ),
        family(
            "slb_health_transitions",
            "How often the backend became healthy or unhealthy, since the agent started.",
            view.backends
                .iter()
                .filter(|(_, backend)| backend.is_checked())
                .map(|(labels, backend)| (labels.clone(), backend.transitions))
                .collect(),
        ),
        family(
            "slb_reload_failures",
            "Configurations that were refused, since the agent started.",
            vec![(Vec::new().into(), status.reload_failures)],
        ),
        family(
            "slb_vip_claims",
            "How often another host has claimed the VIP by ARP or neighbour discovery, since the agent started.",
            status
                .vip_claims
                .iter()
                .map(|(vip, claims)| (vec![("vip", vip.clone())].into(), *claims))
                .collect(),
        ),
        family(
            "slb_datapath_repairs",
            "What another program had changed and the agent has put right, since the agent started: elements of maps, \
             links, pins.",
            repairs(status),
        ),
        family(
            "slb_log_lines_dropped",
            "Lines of the log that could not be written, or not fast enough, since the agent started.",
            vec![(Vec::new().into(), status.log_lines_dropped)],
        ),
    ]
}

fn gauges(view: &View<'_>) -> Vec<Family<f64>> {
    let status = view.status;
    let family = |name, help, values| Family { name, help, unit: None, values };
    let mut families = backend_gauges(view);
    let maps = |value: fn(&MapStatus) -> Option<u64>| {
        let all = status.maps.iter();
        all.filter_map(|map| Some((vec![("map", map.name.clone())].into(), value(map)? as f64)))
            .collect()
    };
    families.extend([
        family("slb_map_entries", "Entries in use of a map.", maps(|map| map.entries)),
        family(
            "slb_map_capacity",
            "Entries that a map has room for.",
            maps(|map| Some(map.capacity)),
        ),
        family(
            "slb_config_generation",
            "Counts the configurations that the agent has gone by.",
            vec![(Vec::new().into(), status.generation as f64)],
        ),
        family(
            "slb_problems",
            "What an operator should see to; `slb status` has the texts.",
            vec![(Vec::new().into(), status.problems.len() as f64)],
        ),
        family(
            "slb_problem",
            "Problems of one name; `slb status` has the texts.",
            problems(status),
        ),
        family(
            "slb_build_info",
            "Constant.",
            vec![(vec![("version", status.version.clone())].into(), 1.0)],
        ),
    ]);
    families
}

fn backend_gauges(view: &View<'_>) -> Vec<Family<f64>> {
    let family = |name, help, value: fn(&BackendStatus) -> Option<f64>| {
        let all = view.backends.iter();
        let values = all.filter_map(|(labels, backend)| Some((labels.clone(), value(backend)?)));
        Family { name, help, unit: None, values: values.collect() }
    };
    vec![
        family(
            "slb_backend_up",
            "Whether the backend gets new flows as far as its health goes.",
            |backend| {
                let is_up = matches!(backend.health, Health::Healthy | Health::Unchecked);
                Some(f64::from(u8::from(is_up)))
            },
        ),
        family("slb_backend_weight", "Configured weight.", |backend| backend.weight.map(f64::from)),
        family(
            "slb_backend_active_flows",
            "Flows of the backend that have an entry and have not ended.",
            |backend| Some(backend.active_flows as f64),
        ),
        family(
            "slb_backend_expected_share",
            "Part of new flows that the backend is to get now, 0 to 1.",
            |backend| backend.expected_share,
        ),
        family(
            "slb_backend_share",
            "Part of all flows that the backend has got, 0 to 1; of packets where flows are not counted.",
            |backend| backend.share,
        ),
        Family {
            unit: Some(Unit::Seconds),
            ..family("slb_health_check_duration", "How long the last probe took.", |backend| {
                backend.last_probe.as_ref().map(|probe| probe.duration_seconds)
            })
        },
    ]
}

fn repairs(status: &Status) -> Vec<(Labels, u64)> {
    let Repairs { maps, links, pins } = status.repairs;
    let counts = [("map", maps), ("link", links), ("pin", pins)];
    counts.map(|(kind, count)| (vec![("kind", kind.to_owned())].into(), count)).into()
}

/// How many problems there are of each name.
fn problems(status: &Status) -> Vec<(Labels, f64)> {
    let mut counts = BTreeMap::<(ProblemName, Severity), f64>::new();
    for problem in &status.problems {
        *counts.entry((problem.name, problem.severity)).or_default() += 1.0;
    }
    let labels = |name: ProblemName, severity: Severity| {
        vec![("name", name.to_string()), ("severity", severity.to_string())].into()
    };
    counts.into_iter().map(|((name, severity), count)| (labels(name, severity), count)).collect()
}

/// What went to backends, and what came from them; what is not known is left out.
fn by_direction(
    labels: &Labels,
    counts: [Option<u64>; 2],
) -> impl Iterator<Item = (Labels, u64)> + use<> {
    let shared = Arc::clone(&labels.shared);
    let counts = ["in", "out"].into_iter().zip(counts);
    counts.filter_map(move |(direction, count)| {
        let labels = Labels { shared: Arc::clone(&shared), direction: Some(direction) };
        Some((labels, count?))
    })
}

fn of_listener(
    instance: &InstanceStatus,
    listener: &ListenerStatus,
) -> Vec<(&'static str, String)> {
    vec![("instance", instance.name.clone()), ("listener", listener.label())]
}

fn of_backend(
    instance: &InstanceStatus,
    listener: &ListenerStatus,
    backend: &BackendStatus,
) -> Vec<(&'static str, String)> {
    let mut labels = of_listener(instance, listener);
    labels.extend([
        ("group", listener.group.clone()),
        ("backend", backend.name.clone()),
        ("address", backend.endpoint.to_string()),
    ]);
    labels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::fixtures;

    #[test]
    fn given_a_status_when_encoded_then_every_metric_is_there_by_its_name() {
        let text = encode(fixtures::status()).unwrap();
        let web_1 = "instance=\"shop\",listener=\"tcp/80\",group=\"default\",backend=\"web-1\",\
                     address=\"10.0.0.1:8080\"";
        let web_2 = "instance=\"shop\",listener=\"tcp/80\",group=\"default\",backend=\"web-2\",\
                     address=\"[2001:db8::2]:8080\"";
        let lines = [
            "# TYPE slb_verdicts_total counter".to_owned(),
            "slb_verdicts_total{verdict=\"forwarded\"} 120".to_owned(),
            "slb_verdict_bytes_total{verdict=\"not_ours\"} 600".to_owned(),
            "slb_listener_packets_total{instance=\"shop\",listener=\"tcp/80\",direction=\"in\"} 120".to_owned(),
            "slb_listener_flows_total{instance=\"shop\",listener=\"tcp/80\"} 12".to_owned(),
            format!("slb_backend_packets_total{{{web_1},direction=\"in\"}} 120"),
            format!("slb_backend_flows_total{{{web_1}}} 12"),
            format!("slb_backend_up{{{web_1}}} 1.0"),
            format!("slb_backend_up{{{web_2}}} 0.0"),
            format!("slb_backend_weight{{{web_2}}} 7.0"),
            format!("slb_backend_expected_share{{{web_2}}} 0.125"),
            format!("slb_backend_share{{{web_1}}} 1.0"),
            format!("slb_health_check_duration_seconds{{{web_1}}} 0.002"),
            format!("slb_health_transitions_total{{{web_1}}} 3"),
            "slb_map_entries{map=\"SLB_BACKENDS\"} 8.0".to_owned(),
            "slb_map_capacity{map=\"SLB_BACKENDS\"} 65536.0".to_owned(),
            "slb_config_generation 3.0".to_owned(),
            "slb_reload_failures_total 2".to_owned(),
            "slb_vip_claims_total{vip=\"192.0.2.1\"} 6".to_owned(),
            "slb_datapath_repairs_total{kind=\"map\"} 4".to_owned(),
            "slb_log_lines_dropped_total 5".to_owned(),
            "slb_problems 1.0".to_owned(),
            "slb_problem{name=\"forwarding_off\",severity=\"critical\"} 1.0".to_owned(),
            "slb_build_info{version=\"1.2.3\"} 1.0".to_owned(),
        ];
        for line in lines {
            assert!(text.lines().any(|found| found == line), "{line}\nis not in\n{text}");
        }
    }

    #[test]
    fn listener_that_is_switched_off_has_no_series() {
        let mut status = fixtures::status();
        status.instances[0].listeners[0].enabled = false;
        let text = encode(status).unwrap();
        assert!(!text.contains("tcp/80") && text.contains("slb_verdicts_total"), "{text}");
    }

    #[test]
    fn what_is_not_known_is_absent() {
        let mut status = fixtures::status();
        let listener = &mut status.instances[0].listeners[0];
        listener.flows = None;
        listener.reply_packets = None;
        listener.backends.truncate(1);
        let backend = &mut listener.backends[0];
        (backend.flows, backend.reply_packets, backend.reply_bytes) = (None, None, None);
        (backend.weight, backend.share, backend.expected_share) = (None, None, None);
        backend.last_probe = None;
        let text = encode(status).unwrap();
        let absent = [
            "slb_listener_flows_total",
            "slb_backend_flows_total",
            "slb_backend_weight",
            "slb_backend_share",
            "slb_backend_expected_share",
            "slb_health_check_duration_seconds",
        ];
        for name in absent {
            assert!(!text.contains(name), "{name} is in\n{text}");
        }
        let packets = |line: &&str| line.starts_with("slb_backend_packets_total{");
        let directions: Vec<_> = text.lines().filter(packets).collect();
        assert!(matches!(directions[..], [one] if one.contains("direction=\"in\"")), "{text}");
    }
}
