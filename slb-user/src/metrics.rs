//! A status as Prometheus reads it (text exposition format, version 0.0.4).
//!
//! Counters are those of the maps, so they go on when the agent is started again. The labels are bounded by the
//! configuration.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, prometheus_text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};

use crate::api::{BackendStatus, InstanceStatus, ListenerStatus, Status};

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

type Labels = Vec<(&'static str, String)>;

/// The values of one metric.
struct Family<T> {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    values: Vec<(Labels, T)>,
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let status = &self.0;
        for family in counters(status) {
            family.encode(&mut encoder, MetricType::Counter, ConstCounter::new)?;
        }
        for family in gauges(status) {
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

fn counters(status: &Status) -> Vec<Family<u64>> {
    let family = |name, help, values| Family { name, help, unit: None, values };
    let verdicts = |count: fn(&crate::api::VerdictCount) -> u64| {
        let all = status.verdicts.iter();
        all.map(|(verdict, found)| (vec![("verdict", verdict.clone())], count(found))).collect()
    };
    let listeners = |count: fn(&ListenerStatus) -> [u64; 2]| {
        let all = listeners(status).flat_map(|(instance, listener)| {
            by_direction(&of_listener(instance, listener), count(listener))
        });
        all.collect()
    };
    let backends = |count: fn(&BackendStatus) -> [u64; 2]| {
        let all = backends(status);
        all.flat_map(|(labels, backend)| by_direction(&labels, count(backend))).collect()
    };
    vec![
        family("slb_verdicts", "Frames by what became of them.", verdicts(|count| count.packets)),
        family("slb_verdict_bytes", "Bytes by what became of them.", verdicts(|count| count.bytes)),
        family(
            "slb_listener_packets",
            "Frames forwarded for a listener; in: to backends, out: to clients.",
            listeners(|listener| [listener.packets, listener.reply_packets]),
        ),
        family(
            "slb_listener_bytes",
            "Bytes forwarded for a listener; in: to backends, out: to clients.",
            listeners(|listener| [listener.bytes, listener.reply_bytes]),
        ),
        family(
            "slb_listener_flows",
            "Flows given to a listener's backends.",
            self::listeners(status)
                .map(|(instance, listener)| (of_listener(instance, listener), listener.flows))
                .collect(),
        ),
        family(
            "slb_backend_packets",
            "Frames; in: to the backend, out: to its clients.",
            backends(|backend| [backend.packets, backend.reply_packets]),
        ),
        family(
            "slb_backend_bytes",
            "Bytes; in: to the backend, out: to its clients.",
            backends(|backend| [backend.bytes, backend.reply_bytes]),
        ),
        family(
            "slb_backend_flows",
            "Flows given to the backend.",
            self::backends(status).map(|(labels, backend)| (labels, backend.flows)).collect(),
        ),
        family(
            "slb_health_transitions",
            "How often the backend became healthy or unhealthy, since the agent started.",
            self::backends(status)
                .filter(|(_, backend)| backend.is_checked())
                .map(|(labels, backend)| (labels, backend.transitions))
                .collect(),
        ),
        family(
            "slb_reload_failures",
            "Configurations that were refused, since the agent started.",
            vec![(Vec::new(), status.reload_failures)],
        ),
        family(
            "slb_log_lines_dropped",
            "Lines of the log that could not be written, or not fast enough, since the agent started.",
            vec![(Vec::new(), status.log_lines_dropped)],
        ),
    ]
}

fn gauges(status: &Status) -> Vec<Family<f64>> {
    let family = |name, help, values| Family { name, help, unit: None, values };
    let backends = |value: fn(&BackendStatus) -> Option<f64>| {
        let all = backends(status);
        all.filter_map(|(labels, backend)| Some((labels, value(backend)?))).collect()
    };
    let maps = |value: fn(&crate::api::MapStatus) -> Option<u64>| {
        let all = status.maps.iter();
        all.filter_map(|map| Some((vec![("map", map.name.clone())], value(map)? as f64))).collect()
    };
    let mut shares = Vec::new();
    for (instance, listener) in listeners(status) {
        for backend in &listener.backends {
            // Those of the other family share other flows.
            let is_alike = |other: &&BackendStatus| other.is_v4() == backend.is_v4();
            let all: u64 = listener.backends.iter().filter(is_alike).map(|other| other.flows).sum();
            if all > 0 {
                let share = backend.flows as f64 / all as f64;
                shares.push((of_backend(instance, listener, backend), share));
            }
        }
    }
    let seconds = backends(|backend| backend.check_seconds);
    vec![
        family(
            "slb_backend_up",
            "Whether the backend gets new flows as far as its health goes.",
            backends(|backend| {
                let is_up = match backend.health.as_str() {
                    "healthy" | "unchecked" => 1.0,
                    _ => 0.0,
                };
                Some(is_up)
            }),
        ),
        family(
            "slb_backend_weight",
            "Configured weight.",
            backends(|backend| Some(backend.weight.into())),
        ),
        family(
            "slb_backend_active_flows",
            "Flows of the backend that have an entry and have not ended.",
            backends(|backend| Some(backend.active_flows as f64)),
        ),
        family(
            "slb_backend_expected_share",
            "Part of new flows that the backend is to get now, 0 to 1.",
            backends(|backend| Some(backend.expected_share)),
        ),
        family("slb_backend_share", "Part of all flows that the backend has got, 0 to 1.", shares),
        Family {
            name: "slb_health_check_duration",
            help: "How long the last probe took.",
            unit: Some(Unit::Seconds),
            values: seconds,
        },
        family("slb_map_entries", "Entries in use of a map.", maps(|map| map.entries)),
        family(
            "slb_map_capacity",
            "Entries that a map has room for.",
            maps(|map| Some(map.capacity)),
        ),
        family(
            "slb_config_generation",
            "Counts the configurations that the agent has gone by.",
            vec![(Vec::new(), status.generation as f64)],
        ),
        family(
            "slb_problems",
            "What an operator should see to; `slb status` has the texts.",
            vec![(Vec::new(), status.problems.len() as f64)],
        ),
        family(
            "slb_build_info",
            "Constant.",
            vec![(vec![("version", status.version.clone())], 1.0)],
        ),
    ]
}

fn listeners(status: &Status) -> impl Iterator<Item = (&InstanceStatus, &ListenerStatus)> {
    status
        .instances
        .iter()
        .flat_map(|instance| instance.listeners.iter().map(move |listener| (instance, listener)))
}

fn backends(status: &Status) -> impl Iterator<Item = (Labels, &BackendStatus)> {
    listeners(status).flat_map(|(instance, listener)| {
        let backends = listener.backends.iter();
        backends.map(move |backend| (of_backend(instance, listener, backend), backend))
    })
}

/// What went to backends, and what came from them.
fn by_direction(labels: &Labels, [to, from]: [u64; 2]) -> [(Labels, u64); 2] {
    [("in", to), ("out", from)].map(|(direction, count)| {
        let mut labels = labels.clone();
        labels.push(("direction", direction.to_owned()));
        (labels, count)
    })
}

fn of_listener(instance: &InstanceStatus, listener: &ListenerStatus) -> Labels {
    vec![
        ("instance", instance.name.clone()),
        ("listener", format!("{}/{}", listener.protocol, listener.port)),
    ]
}

fn of_backend(
    instance: &InstanceStatus,
    listener: &ListenerStatus,
    backend: &BackendStatus,
) -> Labels {
    let mut labels = of_listener(instance, listener);
    labels.extend([
        ("group", listener.group.clone()),
        ("backend", backend.name.clone()),
        ("address", backend.endpoint.clone()),
    ]);
    labels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::fixtures;

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
            "slb_log_lines_dropped_total 5".to_owned(),
            "slb_problems 1.0".to_owned(),
            "slb_build_info{version=\"1.2.3\"} 1.0".to_owned(),
        ];
        for line in lines {
            assert!(text.lines().any(|found| found == line), "{line}\nis not in\n{text}");
        }
    }
}
