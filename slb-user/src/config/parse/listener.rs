//! `[[instance.listener]]`.

use std::{collections::BTreeSet, ops::RangeInclusive, sync::Arc, time::Duration};

use toml::de::DeValue;

use super::{
    group::Group,
    health_check,
    read::{At, Field, Keys, Raw, Table},
    values,
};
use crate::config::{self, Acl, AclMode, AllUnhealthy, HealthCheck, Limits, Protocol, Scheduler};

const KEYS: Keys = Keys {
    known: &[
        "protocol",
        "port",
        "group",
        "backend_port",
        "scheduler",
        "persistence",
        "idle_timeout",
        "drain",
        "all_unhealthy",
        "enabled",
        "acl",
        "limits",
        "health_check",
    ],
    later: &[],
};
const ACL: Keys = Keys { known: &["mode", "sources"], later: &[] };
const LIMITS: Keys =
    Keys { known: &["new_flows", "new_flows_per_source", "bandwidth"], later: &[] };

const PERSISTENCE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3_600);
const DRAIN: RangeInclusive<Duration> = Duration::from_secs(10)..=Duration::from_secs(15 * 60);
const NEW_FLOWS: RangeInclusive<u32> = 1..=10_000_000;
const NEW_FLOWS_PER_SOURCE: RangeInclusive<u32> = 1..=10_000;
const IDLE_TIMEOUT: RangeInclusive<Duration> =
    Duration::from_secs(10)..=Duration::from_secs(15 * 60);

/// The default, for a flow of `protocol`.
const fn idle_timeout(protocol: Protocol) -> Duration {
    match protocol {
        Protocol::Tcp => Duration::from_secs(15 * 60),
        Protocol::Udp => Duration::from_secs(90),
    }
}

/// A listener as read.
pub(super) struct Listener<'a> {
    pub(super) table: Table<'a>,
    pub(super) protocol: Option<Protocol>,
    pub(super) port: Option<At<u16>>,
    group: Field<String>,
    backend_port: Field<u16>,
    scheduler: Option<Scheduler>,
    persistence: Option<Option<Duration>>,
    idle_timeout: Field<Duration>,
    drain: Option<Option<Duration>>,
    acl: Option<Option<Acl>>,
    limits: Option<Limits>,
    all_unhealthy: Option<AllUnhealthy>,
    enabled: Option<bool>,
    health_check: Option<Option<HealthCheck>>,
    /// Where passive checks are switched on.
    passive_at: Option<usize>,
}

impl<'a> Listener<'a> {
    /// The `number`th of its instance.
    pub(super) fn read(raw: Raw<'a>, number: usize) -> Self {
        let table = raw.open(label(&raw, number), &KEYS);
        let protocol = table
            .required("protocol", "protocol = \"tcp\"", values::choice(Protocol::WORDS))
            .map(|protocol| protocol.value);
        let scheduler = scheduler(&table, protocol);
        let (health_check, passive_at) = health_check::health_check(&table, protocol);
        Self {
            protocol,
            port: table.required("port", "port = 80", values::port),
            group: table.field("group", values::name),
            backend_port: table.field("backend_port", values::port),
            scheduler,
            persistence: table
                .field("persistence", values::duration_or_off("0", PERSISTENCE))
                .or(None),
            drain: table.field("drain", values::duration_or_off("off", DRAIN)).or(None),
            acl: acl(&table),
            limits: limits(&table),
            idle_timeout: table.field("idle_timeout", values::duration(IDLE_TIMEOUT)),
            all_unhealthy: table
                .field("all_unhealthy", values::choice(AllUnhealthy::WORDS))
                .or(AllUnhealthy::FailClosed),
            enabled: table.field("enabled", values::boolean).or(true),
            health_check,
            passive_at,
            table,
        }
    }

    /// Reports what the listener wants of a group that cannot give it.
    pub(super) fn check_with(&self, group: &Group<'_>) {
        if let Some(port) = &self.port {
            group.check_ports(&self.table, port.value);
        }
        if let Some(at) = self.passive_at {
            group.check_passive(&self.table, at);
        }
    }

    /// The index of the listener's group; reports a wrong `group` or `backend_port`.
    ///
    /// `complete` says whether `groups` are all that the instance has.
    pub(super) fn resolve(&self, groups: &[Group<'_>], complete: bool) -> Option<usize> {
        let found = match &self.group {
            Field::Bad => return None,
            Field::Absent => groups.iter().position(|group| group.name.is_absent()),
            Field::Good(name) => groups
                .iter()
                .position(|group| group.name.good().is_some_and(|own| own.value == name.value)),
        };
        match (&self.group, &self.backend_port) {
            (Field::Good(_), Field::Good(port)) => {
                let message = "the backends of a named group have ports of their own; remove \
                               'backend_port', or remove 'group' to use the default group";
                self.table.mistake(port.at, message);
            }
            (Field::Absent, Field::Absent) if found.is_some() => {
                self.table.report_absent("backend_port", "backend_port = 8080");
            }
            _ => {}
        }
        if found.is_none() && complete {
            self.report_unknown_group(groups);
        }
        found
    }

    fn report_unknown_group(&self, groups: &[Group<'_>]) {
        // A message for each listener that lists all groups would be as long as the square of the file.
        const SHOWN: usize = 10;
        let names: Vec<_> = groups
            .iter()
            .filter_map(|group| Some(format!("group = {:?}", group.name.good()?.value)))
            .take(SHOWN)
            .collect();
        let names = super::read::list(&names);
        let Field::Good(group) = &self.group else {
            let or_named = if names.is_empty() { names } else { format!(", or {names} here") };
            self.table.missing(format_args!(
                "names no group, and the instance has no default group; write \
                 [[instance.backend]]{or_named}"
            ));
            return;
        };
        let write = if names.is_empty() { "[[instance.group]] with that name" } else { &names };
        let message = format!(
            "{}: 'group' is {:?}, which the instance does not have; write {write}",
            self.table.label, group.value
        );
        self.table.findings.missing(group.at, message);
    }

    /// Nothing if there is a gap.
    pub(super) fn build(self, group: Option<usize>) -> Option<config::Listener> {
        let protocol = self.protocol?;
        Some(config::Listener {
            protocol,
            port: self.port?.value,
            group: group?,
            backend_port: self.backend_port.optional()?,
            scheduler: self.scheduler?,
            persistence: self.persistence?,
            drain: self.drain?,
            acl: self.acl?,
            limits: self.limits?,
            idle_timeout: self.idle_timeout.or(idle_timeout(protocol))?,
            all_unhealthy: self.all_unhealthy?,
            enabled: self.enabled?,
            health_check: self.health_check?,
        })
    }
}

fn scheduler(table: &Table<'_>, protocol: Option<Protocol>) -> Option<Scheduler> {
    let found = match table.field("scheduler", values::choice(Scheduler::WORDS)) {
        Field::Absent => return Some(Scheduler::Tch),
        Field::Bad => return None,
        Field::Good(found) => found,
    };
    if found.value == Scheduler::Qch && protocol == Some(Protocol::Tcp) {
        let message = "scheduler \"qch\" goes by QUIC's connection IDs, and QUIC is UDP; write \
                       protocol = \"udp\", or another scheduler";
        table.mistake(found.at, message);
    }
    Some(found.value)
}

/// `Some(None)` if everybody may connect, nothing if there is a gap.
fn acl(listener: &Table<'_>) -> Option<Option<Acl>> {
    let raw = match listener.table("acl", "[instance.listener.acl]") {
        Field::Absent => return Some(None),
        Field::Bad => return None,
        Field::Good(raw) => raw,
    };
    let table = raw.value.open(format!("{}: acl", listener.label), &ACL);
    let mode = table
        .required("mode", "mode = \"allow\"", values::choice(AclMode::WORDS))
        .map(|it| it.value);
    let sources = match table.list("sources", "[\"198.51.100.0/24\"]", values::network) {
        Field::Absent => {
            table.report_absent("sources", "sources = [\"198.51.100.0/24\"]");
            None
        }
        Field::Bad => None,
        Field::Good(found) => {
            if found.value.items.is_empty() && found.value.complete && mode == Some(AclMode::Allow)
            {
                let message =
                    "allows no client, so every packet is dropped; add sources, or remove it";
                table.warning(found.at, message);
            }
            Some(found.value)
        }
    };
    let sources = sources.filter(|list| list.complete)?;
    let sources: BTreeSet<_> = sources.items.into_iter().map(|source| source.value).collect();
    Some(Some(Acl { mode: mode?, sources: Arc::new(sources) }))
}

fn limits(listener: &Table<'_>) -> Option<Limits> {
    let raw = match listener.table("limits", "[instance.listener.limits]") {
        Field::Absent => return Some(Limits::default()),
        Field::Bad => return None,
        Field::Good(raw) => raw,
    };
    let table = raw.value.open(format!("{}: limits", listener.label), &LIMITS);
    let new_flows = table.field("new_flows", values::integer(NEW_FLOWS)).optional();
    let of_source =
        table.field("new_flows_per_source", values::integer(NEW_FLOWS_PER_SOURCE)).optional();
    let bandwidth = table.field("bandwidth", values::bandwidth).optional();
    Some(Limits { new_flows: new_flows?, new_flows_per_source: of_source?, bandwidth: bandwidth? })
}

/// `listener tcp/80`, or `listener #number` if it does not say.
fn label(raw: &Raw<'_>, number: usize) -> String {
    match (raw.peek("protocol"), raw.peek("port")) {
        (Some(DeValue::String(protocol)), Some(DeValue::Integer(port))) => {
            format!("listener {}/{port}", protocol.escape_debug())
        }
        _ => format!("listener #{number}"),
    }
}
