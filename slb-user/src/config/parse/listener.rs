//! `[[instance.listener]]`.

use std::{ops::RangeInclusive, time::Duration};

use toml::de::DeValue;

use super::{
    group::Group,
    health_check,
    read::{At, Field, Keys, Raw, Table},
    values,
};
use crate::config::{self, AllUnhealthy, HealthCheck, Protocol, Scheduler};

const KEYS: Keys = Keys {
    known: &[
        "protocol",
        "port",
        "group",
        "backend_port",
        "scheduler",
        "persistence",
        "idle_timeout",
        "all_unhealthy",
        "enabled",
        "health_check",
    ],
    later: &[
        ("drain", "ending the flows of a removed backend after a deadline"),
        ("acl", "access by client address"),
    ],
};

const LATER_SCHEDULERS: &[&str] = &["qch", "wlc"];
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
    idle_timeout: Field<Duration>,
    all_unhealthy: Option<AllUnhealthy>,
    enabled: Option<bool>,
    health_check: Option<Option<HealthCheck>>,
}

impl<'a> Listener<'a> {
    /// The `number`th of its instance.
    pub(super) fn read(raw: Raw<'a>, number: usize) -> Self {
        let table = raw.open(label(&raw, number), &KEYS);
        let protocol = table
            .required("protocol", "protocol = \"tcp\"", values::choice(Protocol::WORDS, &[]))
            .map(|protocol| protocol.value);
        let _: Field<()> = table.field("persistence", values::persistence);
        Self {
            protocol,
            port: table.required("port", "port = 80", values::port),
            group: table.field("group", values::name),
            backend_port: table.field("backend_port", values::port),
            scheduler: table
                .field("scheduler", values::choice(Scheduler::WORDS, LATER_SCHEDULERS))
                .or(Scheduler::Tch),
            idle_timeout: table.field("idle_timeout", values::duration(IDLE_TIMEOUT)),
            all_unhealthy: table
                .field("all_unhealthy", values::choice(AllUnhealthy::WORDS, &[]))
                .or(AllUnhealthy::FailClosed),
            enabled: table.field("enabled", values::boolean).or(true),
            health_check: health_check::health_check(&table, protocol),
            table,
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
        let names: Vec<_> = groups
            .iter()
            .filter_map(|group| Some(format!("group = {:?}", group.name.good()?.value)))
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
            idle_timeout: self.idle_timeout.or(idle_timeout(protocol))?,
            all_unhealthy: self.all_unhealthy?,
            enabled: self.enabled?,
            health_check: self.health_check?,
        })
    }
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
