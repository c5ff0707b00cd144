//! A status with something in every field.

use slb_api::{
    BackendStatus, Drop, FlowTableStatus, Health, InstanceStatus, InterfaceStatus, LastProbe,
    ListenerStatus, MapStatus, Problem, ProblemName, Protocol, Rates, Repairs, Role, Scheduler,
    Status, VerdictCount, XdpMode,
};

pub(crate) fn status() -> Status {
    Status {
        version: "1.2.3".to_owned(),
        pid: 4_711,
        config: "/etc/slb/slb.toml".to_owned(),
        generation: 3,
        reload_failures: 2,
        vip_claims: [("192.0.2.1".to_owned(), 6)].into(),
        log_lines_dropped: 5,
        repairs: Repairs { maps: 4, links: 1, pins: 0 },
        uptime_seconds: 3_723,
        interfaces: vec![
            InterfaceStatus {
                name: "wan0".to_owned(),
                index: 2,
                mode: XdpMode::Native,
                reason: None,
            },
            InterfaceStatus {
                name: "lan0".to_owned(),
                index: 3,
                mode: XdpMode::Generic,
                reason: Some("no XDP in the driver".to_owned()),
            },
        ],
        flow_table: FlowTableStatus { capacity: 1_048_576, bytes: 251 << 20 },
        instances: vec![InstanceStatus {
            name: "shop".to_owned(),
            vips: ["203.0.113.10", "2001:db8:113::10"].map(|vip| vip.parse().unwrap()).into(),
            listeners: vec![listener(vec![
                backend("web-1"),
                BackendStatus {
                    role: Role::Secondary,
                    endpoint: "[2001:db8::2]:8080".parse().unwrap(),
                    weight: Some(7),
                    health: Health::Unhealthy,
                    reason: Some("connection refused".to_owned()),
                    active: false,
                    expected_share: Some(0.125),
                    share: None,
                    flows: Some(0),
                    packets: 0,
                    ..backend("web-2")
                },
            ])],
        }],
        verdicts: [
            ("forwarded".to_owned(), VerdictCount { packets: 120, bytes: 34_567 }),
            ("not_ours".to_owned(), VerdictCount { packets: 9, bytes: 600 }),
        ]
        .into(),
        drops: vec![Drop {
            verdict: "no_backend".to_owned(),
            listener: None,
            packets: 3,
            bytes: 200,
        }],
        maps: vec![MapStatus {
            name: "SLB_BACKENDS".to_owned(),
            entries: Some(8),
            capacity: 65_536,
        }],
        problems: vec![Problem {
            since: Some(1_700_000_000.0),
            ..Problem::new(ProblemName::ForwardingOff, "net.ipv4.ip_forward is 0".to_owned())
        }],
    }
}

pub(crate) fn listener(backends: Vec<BackendStatus>) -> ListenerStatus {
    ListenerStatus {
        protocol: Protocol::Tcp,
        port: 80,
        group: "default".to_owned(),
        scheduler: Scheduler::Tch,
        enabled: true,
        persistence_seconds: None,
        flows: Some(12),
        packets: 120,
        bytes: 34_567,
        reply_packets: Some(99),
        reply_bytes: Some(1_234_567),
        rates: None,
        backends,
    }
}

pub(crate) fn backend(name: &str) -> BackendStatus {
    BackendStatus {
        name: name.to_owned(),
        role: Role::Member,
        endpoint: "10.0.0.1:8080".parse().unwrap(),
        weight: Some(100),
        health: Health::Healthy,
        health_since: Some(1_700_000_000.0),
        last_probe: Some(LastProbe {
            at_seconds: 1_700_000_100.0,
            duration_seconds: 0.002,
            error: None,
        }),
        transitions: 3,
        reason: None,
        active: true,
        expected_share: Some(0.875),
        share: Some(1.0),
        drains: false,
        closes_in_seconds: None,
        active_flows: 4,
        flows: Some(12),
        packets: 120,
        bytes: 34_567,
        reply_packets: Some(99),
        reply_bytes: Some(1_234_567),
        rates: Some(Rates {
            seconds: 2.0,
            flows: Some(1.5),
            packets: 12.0,
            bytes: 3_456.0,
            reply_packets: Some(9.0),
            reply_bytes: Some(123_456.0),
        }),
    }
}
