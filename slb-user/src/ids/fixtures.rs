//! Configurations with plausible defaults.

use std::{
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use rustc_hash::{FxHashMap, FxHashSet};
use slb_common::abi::Seed;

use super::Ids;
use crate::{
    clock::Jiffies,
    config::{
        AllUnhealthy, Announce, Backend, ClientAddress, Config, Forwarding, Gateway, Group,
        GroupKind, HealthCheck, Instance, Limits, Listener, NoListener, ProbeKind, Protocol,
        Scheduler, TunnelSource, XdpMode,
    },
    health::Health,
    plan::{fixtures::apply, plan},
    planner::{Inputs, Planner},
    state::State,
};

pub(crate) fn config(instances: impl Into<Vec<Instance>>) -> Config {
    Config {
        gateway: Gateway {
            interfaces: vec!["wan0".to_owned()],
            xdp_mode: XdpMode::Auto,
            region: None,
            flows: 1_024,
            announce: Announce::None,
            no_listener: NoListener::Pass,
            vlans: None,
            tunnel_source: TunnelSource::default(),
            seed: None,
            http: None,
            api: PathBuf::from("/run/slb/api.sock"),
            monitor: None,
            pins: PathBuf::from("/sys/fs/bpf/slb"),
        },
        instances: instances.into().into_iter().map(Arc::new).collect(),
    }
}

/// One group with these backends, at 203.0.113.10 and with a listener on port 80.
pub(crate) fn instance(backends: impl Into<Vec<Backend>>) -> Instance {
    Instance {
        name: "shop".to_owned(),
        vips: addresses(&["203.0.113.10"]),
        groups: vec![group(backends)],
        listeners: vec![listener(80)],
    }
}

pub(crate) fn group(backends: impl Into<Vec<Backend>>) -> Group {
    Group {
        name: None,
        kind: GroupKind::Default,
        forwarding: Forwarding::Nat,
        client_address: ClientAddress::None,
        sources: Vec::new(),
        check_secondary: false,
        backends: backends.into(),
    }
}

/// TCP to the first group, port 8080, checked.
pub(crate) fn listener(port: u16) -> Listener {
    Listener {
        protocol: Protocol::Tcp,
        port,
        group: 0,
        backend_port: Some(8_080),
        scheduler: Scheduler::Tch,
        persistence: None,
        idle_timeout: Duration::from_secs(900),
        drain: None,
        acl: None,
        limits: Limits::default(),
        all_unhealthy: AllUnhealthy::FailClosed,
        enabled: true,
        health_check: Some(HealthCheck {
            probe: ProbeKind::Tcp,
            port: None,
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(5),
            healthy: 3,
            unhealthy: 3,
            passive: false,
            proxy_header: false,
        }),
    }
}

pub(crate) fn backend(address: &str) -> Backend {
    Backend {
        name: address.to_owned(),
        addresses: addresses(&[address]),
        port: None,
        weight: 100,
        drain: false,
        server_id: None,
        region: None,
    }
}

pub(crate) fn addresses(addresses: &[&str]) -> Vec<IpAddr> {
    addresses.iter().map(|address| address.parse().unwrap()).collect()
}

/// What the maps should hold when all backends are healthy.
pub(crate) fn desired(ids: &Arc<Ids>) -> State {
    Planner::default().desired(
        ids,
        Inputs {
            health: &vec![Health::Healthy; ids.backends.len()],
            routes: &FxHashMap::default(),
            generic: false,
            interfaces: &[].into(),
            ingress: &Arc::default(),
            locals: &[],
            jiffies: Jiffies::per_second(250),
            installed: &State::default(),
            now: Instant::now(),
            moment: 0,
            trusted: &FxHashSet::default(),
            closing: &FxHashSet::default(),
            seed: Seed::PUBLIC,
        },
    )
}

/// What an agent with this configuration makes of the maps.
pub(crate) fn install(config: &Config, installed: &State) -> (Arc<Ids>, State) {
    let ids = Arc::new(Ids::assign(config, installed).unwrap());
    let mut state = installed.clone();
    for step in plan(&desired(&ids), installed) {
        apply(&mut state, step);
    }
    (ids, state)
}
