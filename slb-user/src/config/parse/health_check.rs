//! `[instance.listener.health_check]`.

use std::{ops::RangeInclusive, time::Duration};

use super::{
    read::{Field, Keys, List, Table},
    values,
};
use crate::config::{HealthCheck, HttpMethod, HttpProbe, ProbeKind, Protocol, UdpProbe};

const KEYS: Keys = Keys {
    known: &[
        "enabled",
        "type",
        "port",
        "interval",
        "timeout",
        "healthy",
        "unhealthy",
        "method",
        "path",
        "host",
        "expect",
        "send",
        "receive",
        "passive",
    ],
    later: &[],
};
/// The keys that only one type of check has.
const OWN_KEYS: &[(Type, &[&str])] =
    &[(Type::Http, &["method", "path", "host", "expect"]), (Type::Udp, &["send", "receive"])];

const INTERVAL: RangeInclusive<Duration> = Duration::from_millis(500)..=Duration::from_secs(50);
const TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(300);
const THRESHOLD: RangeInclusive<u8> = 1..=10;
const DEFAULT_THRESHOLD: u8 = 3;
const DEFAULT_EXPECT: [(u16, u16); 2] = [(200, 299), (300, 399)];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Type {
    Tcp,
    Http,
    Udp,
}

impl Type {
    const WORDS: &[(&str, Self)] = &[("tcp", Self::Tcp), ("http", Self::Http), ("udp", Self::Udp)];

    fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(_, kind)| *kind == self).map_or("", |(word, _)| word)
    }

    const fn transport(self) -> Protocol {
        match self {
            Self::Tcp | Self::Http => Protocol::Tcp,
            Self::Udp => Protocol::Udp,
        }
    }
}

/// What a listener of one protocol gets without saying so.
struct Defaults {
    kind: Type,
    interval: Duration,
    timeout: Duration,
}

const fn defaults(protocol: Protocol) -> Defaults {
    let (kind, interval, timeout) = match protocol {
        Protocol::Tcp => (Type::Tcp, 2, 5),
        Protocol::Udp => (Type::Udp, 5, 10),
    };
    let (interval, timeout) = (Duration::from_secs(interval), Duration::from_secs(timeout));
    Defaults { kind, interval, timeout }
}

/// The health check of `listener`: `Some(None)` if it is switched off, nothing if there is a gap. And where passive
/// checks are switched on.
pub(super) fn health_check(
    listener: &Table<'_>,
    protocol: Option<Protocol>,
) -> (Option<Option<HealthCheck>>, Option<usize>) {
    match listener.table("health_check", "[instance.listener.health_check]") {
        Field::Bad => (None, None),
        Field::Absent => (protocol.map(|protocol| Some(default(protocol))), None),
        Field::Good(raw) => {
            let table = raw.value.open(format!("{}: health_check", listener.label), &KEYS);
            let enabled = table.field("enabled", values::boolean).or(true);
            let passive = table.field("passive", values::boolean);
            let passive_at = passive.good().filter(|passive| passive.value).map(|it| it.at);
            if let (Some(at), Some(Protocol::Udp)) = (passive_at, protocol) {
                let message = "'passive' goes by the answers to SYNs, and UDP has none; remove it";
                table.mistake(at, message);
            }
            if let (Some(at), Some(false)) = (passive_at, enabled) {
                let message = "'passive' has backends probed early, and there are no probes; write \
                               enabled = true, or remove it";
                table.mistake(at, message);
            }
            // A check that is switched off must still be right.
            let check = read(&table, protocol, passive.or(false));
            let check =
                enabled.and_then(|enabled| if enabled { check.map(Some) } else { Some(None) });
            (check, passive_at)
        }
    }
}

fn default(protocol: Protocol) -> HealthCheck {
    let Defaults { kind, interval, timeout } = defaults(protocol);
    let probe = match kind {
        Type::Udp => ProbeKind::Udp(UdpProbe { send: String::new(), receive: None }),
        _ => ProbeKind::Tcp,
    };
    HealthCheck {
        probe,
        port: None,
        interval,
        timeout,
        healthy: DEFAULT_THRESHOLD,
        unhealthy: DEFAULT_THRESHOLD,
        passive: false,
        proxy_header: false,
    }
}

fn read(
    table: &Table<'_>,
    protocol: Option<Protocol>,
    passive: Option<bool>,
) -> Option<HealthCheck> {
    let kind = table.field("type", values::choice(Type::WORDS));
    let port = table.field("port", values::port);
    let interval = table.field("interval", values::duration(INTERVAL));
    let timeout = table.field("timeout", values::duration(TIMEOUT));
    let healthy = table.field("healthy", values::integer(THRESHOLD)).or(DEFAULT_THRESHOLD);
    let unhealthy = table.field("unhealthy", values::integer(THRESHOLD)).or(DEFAULT_THRESHOLD);
    let http = http(table);
    let udp = udp(table);

    let defaults = protocol.map(defaults);
    let kind_at = kind.good().map_or(table.at, |kind| kind.at);
    let kind = match (kind, &defaults) {
        (Field::Good(kind), _) => Some(kind.value),
        (Field::Absent, Some(defaults)) => Some(defaults.kind),
        _ => None,
    };
    if let (Some(kind), Some(protocol)) = (kind, protocol) {
        refuse_keys_of_other_types(table, kind);
        // What answers on the backend's port speaks the listener's protocol.
        if kind.transport() != protocol && port.is_absent() {
            let message = format_args!(
                "type \"{}\" cannot ask the {protocol} port of a backend; write the port to ask, \
                 such as port = 8080, or another type",
                kind.word()
            );
            table.mistake(kind_at, message);
        }
    }

    let defaults = defaults?;
    Some(HealthCheck {
        probe: match kind? {
            Type::Tcp => ProbeKind::Tcp,
            Type::Http => ProbeKind::Http(http?),
            Type::Udp => ProbeKind::Udp(udp?),
        },
        port: port.optional()?,
        interval: interval.or(defaults.interval)?,
        timeout: timeout.or(defaults.timeout)?,
        healthy: healthy?,
        unhealthy: unhealthy?,
        passive: passive?,
        proxy_header: false,
    })
}

fn refuse_keys_of_other_types(table: &Table<'_>, kind: Type) {
    for (owner, keys) in OWN_KEYS.iter().filter(|(owner, _)| *owner != kind) {
        for (key, at) in keys.iter().filter_map(|key| Some((key, table.key_at(key)?))) {
            let message = format_args!(
                "'{key}' goes with type \"{0}\", and this is \"{1}\"; remove it, or write \
                 type = \"{0}\"",
                owner.word(),
                kind.word()
            );
            table.mistake(at, message);
        }
    }
}

fn http(table: &Table<'_>) -> Option<HttpProbe> {
    let method = table.field("method", values::choice(HttpMethod::WORDS)).or(HttpMethod::Head);
    let path = table.field("path", values::http_path).or("/".to_owned());
    let host = table.field("host", values::http_host).optional();
    let expect = expect(table);
    Some(HttpProbe { method: method?, path: path?, host: host?, expect: expect? })
}

fn expect(table: &Table<'_>) -> Option<Vec<(u16, u16)>> {
    const EXAMPLE: &str = "[\"2xx\", \"3xx\"]";
    match table.list("expect", EXAMPLE, values::statuses) {
        Field::Absent => Some(DEFAULT_EXPECT.to_vec()),
        Field::Bad => None,
        Field::Good(found) => {
            let List { items, complete } = found.value;
            if items.is_empty() && complete {
                table.mistake(found.at, format_args!("'expect' is empty; write {EXAMPLE}"));
            }
            complete.then(|| items.into_iter().map(|range| range.value).collect())
        }
    }
}

fn udp(table: &Table<'_>) -> Option<UdpProbe> {
    let send = table.field("send", values::payload(0)).or(String::new());
    let receive = table.field("receive", values::payload(1)).optional();
    Some(UdpProbe { send: send?, receive: receive? })
}
