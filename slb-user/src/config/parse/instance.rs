//! `[[instance]]`, and the rules between the tables of one instance and between instances.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use super::{
    group::{Backend, Group},
    listener::Listener,
    read::{At, Field, Keys, List, Raw, Table},
    values,
};
use crate::config;

const KEYS: Keys = Keys { known: &["name", "vips", "backend", "group", "listener"], later: &[] };

/// More listeners than this need another instance.
const MAX_LISTENERS: usize = 50;

/// An instance as read.
pub(super) struct Instance<'a> {
    table: Table<'a>,
    name: Option<At<String>>,
    vips: Option<List<IpAddr>>,
    groups: Vec<Group<'a>>,
    /// Each with the index of its group.
    listeners: Vec<(Listener<'a>, Option<usize>)>,
    /// Whether `groups` and `listeners` are all there are.
    complete: bool,
}

impl<'a> Instance<'a> {
    /// The `number`th of the file.
    pub(super) fn read(raw: Raw<'a>, number: usize) -> Self {
        let table = raw.open(raw.label("instance", number), &KEYS);
        let name = table.required("name", "name = \"shop\"", values::name);
        let vips = vips(&table);
        let (groups, all_groups) = groups(&table);
        let (listeners, all_listeners) = listeners(&table);

        let listeners = listeners
            .into_iter()
            .map(|listener| {
                let group = listener.resolve(&groups, all_groups);
                (listener, group)
            })
            .collect();
        let complete = all_groups && all_listeners;
        let instance = Self { table, name, vips, groups, listeners, complete };
        instance.check_listeners();
        instance.check_groups();
        instance
    }

    pub(super) fn backends(&self) -> impl Iterator<Item = &Backend<'a>> {
        self.groups.iter().flat_map(|group| &group.backends)
    }

    fn groups(&self) -> impl Iterator<Item = &Group<'a>> {
        self.groups.iter()
    }

    fn vips(&self) -> impl Iterator<Item = &At<IpAddr>> {
        self.vips.iter().flat_map(|list| &list.items)
    }

    fn check_listeners(&self) {
        let mut seen = HashSet::new();
        for (listener, _) in &self.listeners {
            if let (Some(protocol), Some(port)) = (listener.protocol, &listener.port)
                && !seen.insert((protocol, port.value))
            {
                let message = "the instance has this protocol and port already; write another \
                               port, or remove one of the listeners";
                listener.table.mistake(port.at, message);
            }
        }
        if let Some((first_too_many, _)) = self.listeners.get(MAX_LISTENERS) {
            let message = format_args!(
                "{} listeners; write at most {MAX_LISTENERS}, and the rest in another instance",
                self.listeners.len()
            );
            self.table.mistake(first_too_many.table.at, message);
        }
    }

    fn check_groups(&self) {
        let mut names = HashSet::new();
        for name in self.groups.iter().filter_map(|group| Some((group, group.name.good()?))) {
            let (group, name) = name;
            if !names.insert(&name.value) {
                let message = "the instance has a group of that name already; write another name";
                self.table.findings.mistake(name.at, format!("{}: {message}", group.label()));
            }
        }
        for (listener, group) in &self.listeners {
            if let Some(group) = group {
                listener.check_with(&self.groups[*group]);
            }
        }
        let used: HashSet<usize> = self.listeners.iter().filter_map(|(_, group)| *group).collect();
        for (index, group) in self.groups.iter().enumerate() {
            if !used.contains(&index) {
                let message = format!("{}: no listener uses it", group.label());
                self.table.findings.warning(group.at(), message);
                continue;
            }
            for is_ipv4 in [true, false] {
                let vip = self.vips().find(|vip| vip.value.is_ipv4() == is_ipv4);
                if let Some(vip) = vip {
                    group.check_family(vip.value, &self.table);
                }
            }
        }
    }

    /// Nothing if there is a gap.
    pub(super) fn build(self) -> Option<config::Instance> {
        let vips = self.vips.filter(|list| list.complete)?;
        let groups = self.groups.into_iter().map(Group::build);
        let listeners = self.listeners.into_iter().map(|(listener, group)| listener.build(group));
        self.complete.then_some(config::Instance {
            name: self.name?.value,
            vips: vips.items.into_iter().map(|vip| vip.value).collect(),
            groups: groups.collect::<Option<_>>()?,
            listeners: listeners.collect::<Option<_>>()?,
        })
    }
}

/// The rules between instances: names and VIPs are unique, and no backend is a VIP.
pub(super) fn check_together(instances: &[Instance<'_>]) {
    let mut names = HashSet::new();
    let mut owners = HashMap::new();
    for instance in instances {
        if let Some(name) = &instance.name
            && !names.insert(&name.value)
        {
            let message = "the name is taken by an instance above; write another name";
            instance.table.mistake(name.at, message);
        }
        for vip in instance.vips() {
            if let Some(owner) = owners.insert(vip.value, instance) {
                let message = format_args!(
                    "VIP {} belongs to {} already; write it once",
                    vip.value, owner.table.label
                );
                instance.table.mistake(vip.at, message);
            }
        }
    }
    let servers: HashMap<IpAddr, &str> = instances
        .iter()
        .flat_map(Instance::backends)
        .flat_map(|backend| {
            let addresses = backend.addresses.iter().flat_map(|list| &list.items);
            addresses.map(|address| (address.value, backend.table.label.as_str()))
        })
        .collect();
    for group in instances.iter().flat_map(Instance::groups) {
        group.check_sources(|source| {
            let vip = owners.get(&source).map(|owner| format!("a VIP of {}", owner.table.label));
            vip.or_else(|| servers.get(&source).map(|label| format!("the address of {label}")))
        });
    }
    for backend in instances.iter().flat_map(Instance::backends) {
        for address in backend.addresses.iter().flat_map(|list| &list.items) {
            if let Some(owner) = owners.get(&address.value) {
                let message = format_args!(
                    "address {} is a VIP of {}; write the server's own address",
                    address.value, owner.table.label
                );
                backend.table.mistake(address.at, message);
            }
        }
    }
}

fn vips(table: &Table<'_>) -> Option<List<IpAddr>> {
    const EXAMPLE: &str = "vips = [\"192.0.2.10\"]";
    match table.list("vips", "[\"192.0.2.10\"]", values::unicast) {
        Field::Absent => {
            table.report_absent("vips", EXAMPLE);
            None
        }
        Field::Bad => None,
        Field::Good(found) => {
            if found.value.items.is_empty() && found.value.complete {
                table.mistake(found.at, format_args!("'vips' is empty; write {EXAMPLE}"));
            }
            Some(found.value)
        }
    }
}

/// The groups, the default group first; and whether those are all.
fn groups<'a>(table: &Table<'a>) -> (Vec<Group<'a>>, bool) {
    let mut groups = Vec::new();
    let backends = table.tables("backend", "[[instance.backend]]");
    let named = table.tables("group", "[[instance.group]]");
    let mut complete = !matches!((&backends, &named), (Field::Bad, _) | (_, Field::Bad));
    if let Field::Good(backends) = backends
        && !backends.value.is_empty()
    {
        groups.push(Group::default_group(backends.value));
    }
    if let Field::Good(named) = named {
        let raws = named.value.into_iter().enumerate();
        groups.extend(raws.map(|(index, raw)| Group::named(raw, index + 1)));
    }
    complete &= groups.iter().all(|group| !matches!(group.name, Field::Bad));
    (groups, complete)
}

/// The listeners, and whether those are all.
fn listeners<'a>(table: &Table<'a>) -> (Vec<Listener<'a>>, bool) {
    match table.tables("listener", "[[instance.listener]]") {
        Field::Bad => (Vec::new(), false),
        Field::Good(raws) if !raws.value.is_empty() => {
            let raws = raws.value.into_iter().enumerate();
            (raws.map(|(index, raw)| Listener::read(raw, index + 1)).collect(), true)
        }
        _ => {
            let example = "[[instance.listener]] with protocol and port";
            table.report_absent("listener", example);
            (Vec::new(), false)
        }
    }
}
