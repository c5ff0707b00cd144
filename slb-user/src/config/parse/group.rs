//! Server groups and their backends.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    ops::RangeInclusive,
};

use super::{
    read::{At, Field, Keys, List, Raw, Table},
    values,
};
use crate::config::{self, ClientAddress, Forwarding, GroupKind};

const GROUP: Keys = Keys {
    known: &[
        "name",
        "forwarding",
        "sources",
        "client_address",
        "backend",
        "primary",
        "secondary",
        "check_secondary",
    ],
    later: &[],
};
const BACKEND: Keys = Keys {
    known: &["name", "address", "port", "weight", "drain", "server_id", "region"],
    later: &[],
};

const WEIGHT: RangeInclusive<u8> = 0..=config::MAX_WEIGHT;
const DEFAULT_WEIGHT: u8 = 100;
const BACKENDS_HEADER: &str = "[[instance.group.backend]]";

/// A group as read.
pub(super) struct Group<'a> {
    table: Option<Table<'a>>,
    /// Absent for the default group.
    pub(super) name: Field<String>,
    kind: GroupKind,
    forwarding: Option<Forwarding>,
    pub(super) sources: Option<List<IpAddr>>,
    client_address: Option<ClientAddress>,
    check_secondary: Option<bool>,
    pub(super) backends: Vec<Backend<'a>>,
    /// Whether `backends` are all there are.
    complete: bool,
}

impl<'a> Group<'a> {
    /// The instance's own group.
    pub(super) fn default_group(raws: Vec<Raw<'a>>) -> Self {
        let mut group = Self {
            table: None,
            name: Field::Absent,
            kind: GroupKind::Default,
            forwarding: Some(Forwarding::Nat),
            sources: Some(List { items: Vec::new(), complete: true }),
            client_address: Some(ClientAddress::None),
            check_secondary: Some(false),
            backends: Vec::new(),
            complete: true,
        };
        group.read_backends(raws);
        group.check();
        group
    }

    /// `[[instance.group]]`, the `number`th.
    pub(super) fn named(raw: Raw<'a>, number: usize) -> Self {
        let table = raw.open(raw.label("group", number), &GROUP);
        let name = table.required("name", "name = \"api\"", values::name);
        let forwarding =
            table.field("forwarding", values::choice(Forwarding::WORDS)).or(Forwarding::Nat);
        let pair = [("primary", "primary"), ("secondary", "secondary")]
            .map(|(key, label)| (label, table.table(key, &example(key))));
        let backends = table.tables("backend", BACKENDS_HEADER);

        let is_pair = pair.iter().any(|(_, half)| !half.is_absent());
        let mut group = Self {
            table: None,
            name: name.map_or(Field::Bad, Field::Good),
            kind: if is_pair { GroupKind::PrimarySecondary } else { GroupKind::VServer },
            sources: sources(&table, forwarding),
            client_address: client_address(&table, forwarding),
            check_secondary: check_secondary(&table, is_pair),
            forwarding,
            backends: Vec::new(),
            complete: true,
        };
        if is_pair {
            if let Field::Good(backends) = &backends {
                let message = "has a primary or secondary, and 'backend' as well; write either \
                               'primary' and 'secondary', or only 'backend'";
                table.mistake(backends.at, message);
            }
            for (key, half) in pair {
                match half {
                    Field::Absent => {
                        table.report_absent(key, &example(key));
                        group.complete = false;
                    }
                    Field::Bad => group.complete = false,
                    Field::Good(raw) => {
                        group.backends.push(Backend::read(raw.value, key, 1, group.kind));
                    }
                }
            }
        } else {
            match backends {
                Field::Good(raws) if !raws.value.is_empty() => group.read_backends(raws.value),
                Field::Bad => group.complete = false,
                _ => {
                    table.report_absent("backend", &format!("{BACKENDS_HEADER} below the group"));
                    group.complete = false;
                }
            }
        }
        group.table = Some(table);
        group.check();
        group
    }

    fn read_backends(&mut self, raws: Vec<Raw<'a>>) {
        for (index, raw) in raws.into_iter().enumerate() {
            self.backends.push(Backend::read(raw, "backend", index + 1, self.kind));
        }
    }

    /// Names and endpoints are unique, and some backend gets new flows.
    fn check(&mut self) {
        self.complete &= self.backends.iter().all(Backend::is_complete);
        let mut names = HashSet::new();
        let mut endpoints = HashMap::new();
        let mut servers = HashMap::new();
        for backend in &self.backends {
            if let Some(id) = backend.server_id.good()
                && let Some(other) = servers.insert(id.value, backend)
            {
                let message = format_args!(
                    "server_id {} is that of {} already; write another number",
                    id.value, other.table.label,
                );
                backend.table.mistake(id.at, message);
            }
            if let Some(name) = &backend.name
                && !names.insert(&name.value)
            {
                let message = "the name is taken by a backend above; write another name";
                backend.table.mistake(name.at, message);
            }
            let Some(port) = backend.port else { continue };
            for address in backend.addresses.iter().flat_map(|list| &list.items) {
                let endpoint = (address.value, port);
                if let Some(other) = endpoints.insert(endpoint, backend) {
                    let at_port = port.map(|port| format!(" port {port}")).unwrap_or_default();
                    let message = format_args!(
                        "{}{at_port} belongs to {} already; write another address, or remove one of them",
                        address.value, other.table.label,
                    );
                    backend.table.mistake(address.at, message);
                }
            }
        }
        if let Some(first) = self.backends.first()
            && self.complete
            && self
                .backends
                .iter()
                .all(|backend| backend.weight == Some(0) || backend.drain == Some(true))
        {
            let table = self.table.as_ref().unwrap_or(&first.table);
            let message = format!(
                "{}: every weight is 0, or drained, so there are no new flows",
                self.label()
            );
            table.findings.warning(table.at, message);
        }
    }

    /// What messages call it.
    pub(super) fn label(&self) -> String {
        self.table.as_ref().map_or("default group".to_owned(), |table| table.label.clone())
    }

    /// Where it begins.
    pub(super) fn at(&self) -> usize {
        let table = self.table.as_ref().or(self.backends.first().map(|backend| &backend.table));
        table.map_or(0, |table| table.at)
    }

    /// Reports sources that are addresses of a VIP or a backend.
    pub(super) fn check_sources(&self, owner: impl Fn(IpAddr) -> Option<String>) {
        let Some(table) = &self.table else { return };
        for source in self.sources.iter().flat_map(|list| &list.items) {
            if let Some(owner) = owner(source.value) {
                let message = format_args!(
                    "source {} is {owner}; write an address that is nothing else",
                    source.value
                );
                table.mistake(source.at, message);
            }
        }
    }

    /// Reports backends whose port is not the listener's, if packets keep theirs.
    pub(super) fn check_ports(&self, listener: &Table<'_>, port: u16) {
        let Some(forwarding) = self.forwarding.filter(|it| it.is_direct_return()) else { return };
        for backend in &self.backends {
            if let Some(Some(own)) = backend.port
                && own != port
            {
                let message = format_args!(
                    "has port {own}, but '{forwarding}' keeps that of {}; write port = {port}",
                    listener.label,
                );
                backend.table.mistake(backend.table.at, message);
            }
        }
    }

    /// Reports a passive check of backends whose answers go another way.
    pub(super) fn check_passive(&self, listener: &Table<'_>, at: usize) {
        if let Some(forwarding) = self.forwarding.filter(|it| it.is_direct_return()) {
            let message = format_args!(
                "'passive' has nothing to go by: answers of '{forwarding}' backends do not come \
                 through the gateway; remove it"
            );
            listener.mistake(at, message);
        }
    }

    /// Reports a `vip` that no backend, or only one of a pair, can serve.
    pub(super) fn check_family(&self, vip: IpAddr, table: &Table<'_>) {
        if !self.complete {
            return;
        }
        let family = if vip.is_ipv4() { "IPv4" } else { "IPv6" };
        let serves = |backend: &Backend<'_>| {
            let mut addresses = backend.addresses.iter().flat_map(|list| &list.items);
            addresses.any(|address| address.value.is_ipv4() == vip.is_ipv4())
        };
        if !self.backends.iter().any(serves) {
            if self.forwarding.is_some_and(Forwarding::crosses_families) {
                return;
            }
            let message = format!(
                "{}: no backend has an {family} address for VIP {vip}, and 'dsr' does not translate; \
                 add an {family} address to a backend, or remove the VIP",
                self.label(),
            );
            table.findings.missing(self.at(), message);
        } else if self.kind == GroupKind::PrimarySecondary {
            for backend in self.backends.iter().filter(|backend| !serves(backend)) {
                let message = format!(
                    "{}: has no {family} address, so VIP {vip} is left to the other one",
                    backend.table.label,
                );
                table.findings.warning(backend.table.at, message);
            }
        }
    }

    /// Nothing if there is a gap.
    pub(super) fn build(self) -> Option<config::Group> {
        Some(config::Group {
            name: self.name.optional()?,
            kind: self.kind,
            forwarding: self.forwarding?,
            sources: self.sources?.items.into_iter().map(|source| source.value).collect(),
            client_address: self.client_address?,
            check_secondary: self.check_secondary?,
            backends: self.backends.into_iter().map(Backend::build).collect::<Option<_>>()?,
        })
    }
}

/// What backends of a group see as source.
fn sources(table: &Table<'_>, forwarding: Option<Forwarding>) -> Option<List<IpAddr>> {
    let found = match table.one_or_list("sources", values::unicast) {
        Field::Absent => return Some(List { items: Vec::new(), complete: true }),
        Field::Bad => return None,
        Field::Good(found) => found,
    };
    if forwarding.is_some_and(|forwarding| forwarding != Forwarding::FullNat) {
        let message = "'sources' are for forwarding = \"full-nat\"; remove them, or write that";
        table.mistake(found.at, message);
    }
    let mut seen = HashSet::new();
    for source in &found.value.items {
        if !seen.insert(source.value) {
            let message = format_args!("{} is a source twice; write it once", source.value);
            table.mistake(source.at, message);
        }
    }
    found.value.complete.then_some(found.value)
}

/// How backends of a group learn who the client is.
fn client_address(table: &Table<'_>, forwarding: Option<Forwarding>) -> Option<ClientAddress> {
    let found = match table.field("client_address", values::choice(ClientAddress::WORDS)) {
        Field::Absent => return Some(ClientAddress::None),
        Field::Bad => return None,
        Field::Good(found) => found,
    };
    let is_needless = forwarding.is_some_and(|forwarding| forwarding != Forwarding::FullNat);
    if is_needless && found.value != ClientAddress::None {
        let message = "'client_address' is for forwarding = \"full-nat\"; remove it, or write that";
        table.mistake(found.at, message);
    }
    Some(found.value)
}

/// Whether a pair's secondary is checked.
fn check_secondary(table: &Table<'_>, is_pair: bool) -> Option<bool> {
    let found = match table.field("check_secondary", values::boolean) {
        Field::Absent => return Some(false),
        Field::Bad => return None,
        Field::Good(found) => found,
    };
    if !is_pair {
        let message = "'check_secondary' is for a group with primary and secondary; remove it";
        table.mistake(found.at, message);
    }
    Some(found.value)
}

fn example(key: &str) -> String {
    format!("{key} = {{ name = \"db-1\", address = \"10.0.0.31\", port = 5432 }}")
}

/// A backend as read.
pub(super) struct Backend<'a> {
    pub(super) table: Table<'a>,
    name: Option<At<String>>,
    pub(super) addresses: Option<List<IpAddr>>,
    /// `Some(None)`: rightly without.
    port: Option<Option<u16>>,
    weight: Option<u8>,
    drain: Option<bool>,
    server_id: Field<u16>,
    region: Field<String>,
}

impl<'a> Backend<'a> {
    fn read(raw: Raw<'a>, noun: &str, number: usize, kind: GroupKind) -> Self {
        let table = raw.open(raw.label(noun, number), &BACKEND);
        Self {
            name: table.required("name", "name = \"web-1\"", values::name),
            addresses: addresses(&table),
            port: port(&table, kind),
            weight: weight(&table, kind),
            drain: table.field("drain", values::boolean).or(false),
            server_id: table.field("server_id", values::integer(0..=u16::MAX)),
            region: table.field("region", values::name),
            table,
        }
    }

    fn is_complete(&self) -> bool {
        self.addresses.as_ref().is_some_and(|list| list.complete)
    }

    /// A backend is in the gateway's region, or says nothing about it.
    pub(super) fn check_region(&self, gateway: &Field<String>) {
        let Some(region) = self.region.good() else { return };
        let (found, write) = match gateway {
            Field::Bad => return,
            Field::Good(own) if own.value == region.value => return,
            Field::Good(own) => {
                (format!("in {:?}", own.value), format!("region = {:?}", own.value))
            }
            Field::Absent => {
                let write = format!("region = {:?} in [gateway]", region.value);
                ("in no region".to_owned(), write)
            }
        };
        let message = format_args!(
            "'region' is {:?}, but the gateway is {found}; write {write}, or remove the backend's",
            region.value
        );
        // With a part of the file lost, the gateway's may be there.
        if gateway.is_absent() {
            self.table.findings.missing(region.at, format!("{}: {message}", self.table.label));
        } else {
            self.table.mistake(region.at, message);
        }
    }

    fn build(self) -> Option<config::Backend> {
        Some(config::Backend {
            name: self.name?.value,
            addresses: self.addresses?.items.into_iter().map(|address| address.value).collect(),
            port: self.port?,
            weight: self.weight?,
            drain: self.drain?,
            server_id: self.server_id.optional()?,
            region: self.region.optional()?,
        })
    }
}

fn addresses(table: &Table<'_>) -> Option<List<IpAddr>> {
    const EXAMPLE: &str = "address = \"10.0.0.11\"";
    let mut found = match table.one_or_list("address", values::unicast) {
        Field::Absent => {
            table.report_absent("address", EXAMPLE);
            return None;
        }
        Field::Bad => return None,
        Field::Good(found) => found,
    };
    let List { items, complete } = &mut found.value;
    if items.is_empty() && *complete {
        table.mistake(found.at, format_args!("'address' is empty; write {EXAMPLE}"));
        *complete = false;
    }
    let mut families = HashSet::new();
    items.retain(|address| {
        let family = if address.value.is_ipv4() { "IPv4" } else { "IPv6" };
        let is_first = families.insert(family);
        if !is_first {
            let message = format_args!(
                "{} is a second {family} address; write one per family, and further backends for \
                 further addresses",
                address.value
            );
            table.mistake(address.at, message);
        }
        is_first
    });
    Some(found.value)
}

fn port(table: &Table<'_>, kind: GroupKind) -> Option<Option<u16>> {
    match (kind, table.field("port", values::port)) {
        (GroupKind::Default, Field::Absent) => Some(None),
        (GroupKind::Default, Field::Good(port)) => {
            let message = "backends of the default group have no 'port'; remove it, and write \
                           backend_port in the listener";
            table.mistake(port.at, message);
            None
        }
        (_, Field::Absent) => {
            table.report_absent("port", "port = 8080");
            None
        }
        (_, Field::Bad) => None,
        (_, Field::Good(port)) => Some(Some(port.value)),
    }
}

fn weight(table: &Table<'_>, kind: GroupKind) -> Option<u8> {
    match (kind, table.field("weight", values::integer(WEIGHT))) {
        (GroupKind::PrimarySecondary, Field::Good(weight)) => {
            let message = "'weight' means nothing in a primary/secondary group; remove it";
            table.mistake(weight.at, message);
            None
        }
        (_, weight) => weight.or(DEFAULT_WEIGHT),
    }
}
