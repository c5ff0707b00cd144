//! A status with something in every field.

use super::{
    BackendStatus, FlowTableStatus, InstanceStatus, InterfaceStatus, ListenerStatus, MapStatus,
    Status, VerdictCount,
};

pub fn status() -> Status {
    Status {
        version: "1.2.3".to_owned(),
        pid: 4_711,
        config: "/etc/slb/slb.toml".to_owned(),
        generation: 3,
        reload_failures: 2,
        log_lines_dropped: 5,
        uptime_seconds: 3_723,
        interfaces: vec![
            InterfaceStatus {
                name: "wan0".to_owned(),
                index: 2,
                mode: "native".to_owned(),
                reason: None,
            },
            InterfaceStatus {
                name: "lan0".to_owned(),
                index: 3,
                mode: "generic".to_owned(),
                reason: Some("no XDP in the driver".to_owned()),
            },
        ],
        flow_table: FlowTableStatus { capacity: 1_048_576, bytes: 251 << 20 },
        instances: vec![InstanceStatus {
            name: "shop".to_owned(),
            vips: vec!["203.0.113.10".to_owned(), "2001:db8:113::10".to_owned()],
            listeners: vec![listener(vec![
                backend("web-1"),
                BackendStatus {
                    role: Some("secondary".to_owned()),
                    endpoint: "[2001:db8::2]:8080".to_owned(),
                    weight: 7,
                    health: "unhealthy".to_owned(),
                    reason: Some("connection refused".to_owned()),
                    active: false,
                    expected_share: 0.125,
                    flows: 0,
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
        maps: vec![MapStatus {
            name: "SLB_BACKENDS".to_owned(),
            entries: Some(8),
            capacity: 65_536,
        }],
        problems: vec!["net.ipv4.ip_forward is 0".to_owned()],
    }
}

pub fn listener(backends: Vec<BackendStatus>) -> ListenerStatus {
    ListenerStatus {
        protocol: "tcp".to_owned(),
        port: 80,
        group: "default".to_owned(),
        scheduler: "tch".to_owned(),
        enabled: true,
        persistence_seconds: None,
        flows: 12,
        packets: 120,
        bytes: 34_567,
        reply_packets: 99,
        reply_bytes: 1_234_567,
        backends,
    }
}

pub fn backend(name: &str) -> BackendStatus {
    BackendStatus {
        name: name.to_owned(),
        role: None,
        endpoint: "10.0.0.1:8080".to_owned(),
        weight: 100,
        health: "healthy".to_owned(),
        check_seconds: Some(0.002),
        transitions: 3,
        reason: None,
        active: true,
        expected_share: 0.875,
        drains: false,
        closes_in_seconds: None,
        active_flows: 4,
        flows: 12,
        packets: 120,
        bytes: 34_567,
        reply_packets: 99,
        reply_bytes: 1_234_567,
    }
}
