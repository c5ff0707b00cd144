//! Finds what was changed in the maps by others, and writes it again.
//!
//! The agent's loop is the only writer. So what a thread has found to differ may have been written since it looked, and
//! is read again here before it counts.

use std::{
    collections::BTreeMap,
    fmt::{self, Display},
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use aya::{
    Pod,
    maps::{Array, HashMap, LpmTrie, MapData, MapError, lpm_trie::Key},
};
use slb_common::abi::{self, Address, Endpoint, Settings, TCP, UDP};

use super::{
    Maps, TableError,
    apply::{chunk, record},
    at,
};
use crate::{
    datapath::kept::{Large, MapContents},
    state::Schedule,
};

/// `BPF_NOEXIST` of `linux/bpf.h`: write only what is not there.
const NO_EXIST: u64 = 1;
/// How many elements are named.
const NAMED: usize = 3;

/// What in a map differed from what the agent has written, and was written again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drift {
    /// Which map.
    pub map: &'static str,
    /// How many elements.
    pub count: usize,
    /// The first of them, in words.
    named: Vec<String>,
}

impl Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { map, count, named } = self;
        write!(f, "{map}: {}", named.join(", "))?;
        match count.saturating_sub(named.len()) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// How an element differed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Removed,
    Overwritten,
    Added,
}

impl Change {
    fn of<V: PartialEq>(found: Option<&V>, wanted: Option<&V>) -> Option<Self> {
        match (found, wanted) {
            (None, Some(_)) => Some(Self::Removed),
            (Some(_), None) => Some(Self::Added),
            (found, wanted) => (found != wanted).then_some(Self::Overwritten),
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Removed => "removed",
            Self::Overwritten => "overwritten",
            Self::Added => "added",
        }
    }
}

/// A map of which single elements are put right.
trait Repair<K, V> {
    /// Writes an element, or removes it if none is wanted, unless it is as wanted. Says what it was like.
    fn repair(&mut self, key: &K, wanted: Option<V>) -> Result<Option<Change>, MapError>;
}

impl<K: Pod, V: Pod + PartialEq> Repair<K, V> for HashMap<MapData, K, V> {
    fn repair(&mut self, key: &K, wanted: Option<V>) -> Result<Option<Change>, MapError> {
        let found = known(self.get(key, 0))?;
        let change = Change::of(found.as_ref(), wanted.as_ref());
        match (change, wanted) {
            (None, _) => {}
            (Some(_), Some(value)) => self.insert(*key, value, 0)?,
            (Some(_), None) => drop(known(self.remove(key))?),
        }
        Ok(change)
    }
}

/// An element that was never used is the default.
impl<V: Pod + Default + PartialEq> Repair<u32, V> for Array<MapData, V> {
    fn repair(&mut self, key: &u32, wanted: Option<V>) -> Result<Option<Change>, MapError> {
        let found = Some(self.get(key, 0)?).filter(|found| *found != V::default());
        let change = Change::of(found.as_ref(), wanted.as_ref());
        if change.is_some() {
            self.set(*key, wanted.unwrap_or_default(), 0)?;
        }
        Ok(change)
    }
}

/// A look-up finds shorter prefixes as well, so it does not tell whether an element is there.
impl<K: Pod, V: Pod + PartialEq> Repair<Key<K>, V> for LpmTrie<MapData, K, V> {
    fn repair(&mut self, key: &Key<K>, wanted: Option<V>) -> Result<Option<Change>, MapError> {
        let Some(value) = wanted else {
            return Ok(known(self.remove(key))?.map(|()| Change::Added));
        };
        match self.insert(key, value, NO_EXIST) {
            Ok(()) => return Ok(Some(Change::Removed)),
            Err(MapError::SyscallError(error))
                if error.io_error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        if known(self.get(key, 0))? == Some(value) {
            return Ok(None);
        }
        self.insert(key, value, 0)?;
        Ok(Some(Change::Overwritten))
    }
}

/// `None`: it is not there.
fn known<V>(result: Result<V, MapError>) -> Result<Option<V>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The keys of elements that differ.
fn differing<'a, K: Ord + Copy + 'a, V: PartialEq>(
    wanted: impl Iterator<Item = (&'a K, V)>,
    found: &[(K, V)],
) -> Vec<K> {
    let mut differing = Vec::new();
    let mut found = found.iter().peekable();
    for (&key, value) in wanted {
        let added = std::iter::from_fn(|| found.next_if(|(it, _)| *it < key));
        differing.extend(added.map(|(key, _)| *key));
        let is_same = found.next_if(|(it, _)| *it == key).is_some_and(|(_, it)| *it == value);
        if !is_same {
            differing.push(key);
        }
    }
    differing.extend(found.map(|(key, _)| *key));
    differing
}

/// Puts the differing elements of one map right.
fn repair<'a, K: Ord + Copy + 'a, V: PartialEq + Copy + 'a>(
    map: &'static str,
    table: &mut impl Repair<K, V>,
    wanted: &'a BTreeMap<K, V>,
    found: &[(K, V)],
    name: impl Fn(&K) -> String,
) -> Result<Option<Drift>, TableError> {
    let keys = differing(wanted.iter().map(|(key, value)| (key, *value)), found);
    let changes =
        keys.into_iter().map(|key| Ok((key, table.repair(&key, wanted.get(&key).copied())?)));
    changed(map, changes.collect::<Result<_, _>>().map_err(at(map))?, name)
}

/// Those that had really changed.
fn changed<K>(
    map: &'static str,
    changes: Vec<(K, Option<Change>)>,
    name: impl Fn(&K) -> String,
) -> Result<Option<Drift>, TableError> {
    let changes = changes.iter().filter_map(|(key, change)| Some((key, (*change)?)));
    let count = changes.clone().count();
    let named = changes.take(NAMED).map(|(key, change)| format!("{} {}", name(key), change.word()));
    Ok((count > 0).then(|| Drift { map, count, named: named.collect() }))
}

impl Maps {
    /// What a thread compares with the maps.
    #[must_use]
    pub fn large(&self) -> Large {
        let listeners = self.installed.listeners.iter();
        let schedules = listeners.filter_map(|(endpoint, listener)| {
            let range = self.ranges.get(endpoint)?;
            (!range.is_empty()).then(|| (range.start, listener.schedule.clone()))
        });
        Large { acls: self.installed.acls.clone(), schedules: schedules.collect() }
    }

    /// Compares what was found with what the agent has written. Writes what differs again, and says what that was.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn audit(&mut self, found: MapContents) -> Result<Option<Drift>, TableError> {
        let Self { installed, written, .. } = self;
        let place = |index: &u32| format!("element {index}");
        match found {
            MapContents::Settings => self.audit_settings(),
            MapContents::Vlans(found) => {
                repair("SLB_VLANS", &mut self.vlans, &written.vlans, &found, place)
            }
            MapContents::Interfaces(found) => {
                let name = |index: &u32| format!("interface {index}");
                let wanted = &installed.interfaces;
                repair("SLB_INTERFACES", &mut self.interfaces, wanted, &found, name)
            }
            MapContents::Ingress(found) => {
                repair("SLB_INGRESS", &mut self.ingress, &written.ingress, &found, place)
            }
            MapContents::Macs(found) => {
                let name = |mac: &abi::OwnMac| format!("{mac:?}");
                repair("SLB_MACS", &mut self.macs, &installed.macs, &found, name)
            }
            MapContents::Subnets(found) => self.audit_subnets(&found),
            MapContents::Sources(found) => {
                let wanted = &installed.sources;
                let name = |index: &u32| wanted.get(index).map_or_else(|| place(index), address);
                repair("SLB_SOURCES", &mut self.sources, wanted, &found, name)
            }
            MapContents::Backends(found) => {
                let wanted = &installed.backends;
                let name = |id: &u32| {
                    let known = wanted.get(id);
                    let addr = known.map(|it| SocketAddr::new(it.addr.into(), it.port as u16));
                    addr.map_or_else(|| place(id), |addr| format!("backend {addr}"))
                };
                repair("SLB_BACKENDS", &mut self.backends, wanted, &found, name)
            }
            MapContents::Quic(found) => {
                let name = |_: &abi::QuicKey| "a server id".to_owned();
                repair("SLB_QUIC", &mut self.quic, &installed.quic, &found, name)
            }
            MapContents::Limits(found) => {
                let name = |id: &u32| format!("listener number {id}");
                repair("SLB_LIMITS", &mut self.limits, &installed.limits, &found, name)
            }
            MapContents::Acl(suspects) => self.audit_acl(suspects),
            MapContents::Slots(suspects) => self.audit_slots(suspects),
            MapContents::Listeners(found) => {
                let wanted = self.listener_records();
                repair("SLB_LISTENERS", &mut self.listeners, &wanted, &found, endpoint)
            }
            MapContents::ListenerIndex => {
                let wanted = self.listener_records();
                let entries = wanted.iter().map(|(at, record)| (at, *record));
                Ok(index("SLB_LISTENER_INDEX", &self.listener_index.audit(entries)))
            }
            MapContents::Endpoints(found) => {
                repair("SLB_REVNAT", &mut self.endpoints, &installed.endpoints, &found, endpoint)
            }
            MapContents::EndpointIndex => {
                let entries = installed.endpoints.iter().map(|(at, value)| (at, *value));
                Ok(index("SLB_REVNAT_INDEX", &self.endpoint_index.audit(entries)))
            }
            MapContents::Addresses(found) => {
                let wanted = &installed.addresses;
                repair("SLB_ADDRESSES", &mut self.addresses, wanted, &found, address)
            }
            MapContents::Filter => Ok(self.audit_filter()),
        }
    }

    fn listener_records(&self) -> BTreeMap<Endpoint, abi::Listener> {
        let listeners = self.installed.listeners.iter();
        let records = listeners.filter_map(|(endpoint, listener)| {
            let first_chunk = self.ranges.get(endpoint)?.start;
            Some((*endpoint, record(listener, first_chunk)))
        });
        records.collect()
    }

    fn audit_settings(&mut self) -> Result<Option<Drift>, TableError> {
        let map = "SLB_SETTINGS";
        let found = self.settings.get(&0, 0).map_err(at(map))?;
        let wanted = self.written.settings;
        if found == wanted {
            return Ok(None);
        }
        self.settings.set(0, wanted, 0).map_err(at(map))?;
        let change =
            if found == Settings::default() { Change::Removed } else { Change::Overwritten };
        Ok(Some(Drift { map, count: 1, named: vec![format!("the settings {}", change.word())] }))
    }

    fn audit_subnets(
        &mut self,
        found: &[((u32, Address), u64)],
    ) -> Result<Option<Drift>, TableError> {
        let map = "SLB_SUBNETS";
        let wanted = &self.installed.subnets;
        let keys = differing(wanted.iter().map(|(key, value)| (key, *value)), found);
        let changes = keys.into_iter().map(|(bits, addr)| {
            let key = Key::new(bits, abi::subnet(addr));
            Ok(((bits, addr), self.subnets.repair(&key, wanted.get(&(bits, addr)).copied())?))
        });
        let changes = changes.collect::<Result<Vec<_>, _>>().map_err(at(map))?;
        changed(map, changes, |(bits, addr)| prefix(*bits, addr))
    }

    fn audit_acl(
        &mut self,
        suspects: Vec<(u32, (u32, Address))>,
    ) -> Result<Option<Drift>, TableError> {
        let map = "SLB_ACL";
        let acls = &self.installed.acls;
        let changes = suspects.into_iter().map(|(acl, (bits, addr))| {
            let is_listed = acls.get(&acl).is_some_and(|list| list.contains(&(bits, addr)));
            let key = Key::new(bits, abi::listed(acl, addr));
            Ok(((bits - u32::BITS, addr), self.acls.repair(&key, is_listed.then_some(1))?))
        });
        let changes = changes.collect::<Result<Vec<_>, _>>().map_err(at(map))?;
        let drift = changed(map, changes, |(bits, addr)| prefix(*bits, addr))?;
        if drift.is_some() {
            // The program remembers what it has found in the list.
            self.next_acl_epoch()?;
        }
        Ok(drift)
    }

    fn audit_slots(
        &mut self,
        suspects: Vec<(u32, Arc<Schedule>, usize)>,
    ) -> Result<Option<Drift>, TableError> {
        let map = "SLB_SLOTS";
        if suspects.is_empty() {
            return Ok(None);
        }
        let (mut changes, large) = (Vec::new(), self.large());
        for (first, schedule, number) in suspects {
            // Others may have these chunks by now.
            let is_same = large.schedules.get(&first).is_some_and(|it| *it == schedule);
            let Some(part) = schedule.chunks().nth(number).filter(|_| is_same) else { continue };
            let index = first + number as u32;
            let (found, wanted) = (self.slots.get(&index, 0).map_err(at(map))?, chunk(part));
            if found != wanted {
                self.slots.set(index, wanted, 0).map_err(at(map))?;
                changes.push((index, Some(Change::Overwritten)));
            }
        }
        changed(map, changes, |index| {
            let listener = self.ranges.iter().find(|(_, range)| range.contains(index));
            let listener = listener.map(|(at, _)| endpoint(at)).unwrap_or_default();
            format!("element {index} of listener {listener}")
        })
    }

    fn audit_filter(&mut self) -> Option<Drift> {
        let (addresses, count) = self.filter.audit();
        let named = addresses.iter().take(NAMED).map(address).collect::<Vec<_>>();
        let named = if named.is_empty() { "no address".to_owned() } else { named.join(", ") };
        let named = vec![format!("the bytes of {named} overwritten")];
        (count > 0).then(|| Drift { map: "SLB_FILTER", count: count.max(named.len()), named })
    }
}

/// Of an index, the records and the slots that differed.
fn index(map: &'static str, (records, slots): &(Vec<Endpoint>, usize)) -> Option<Drift> {
    let overwritten = |at: &Endpoint| format!("{} overwritten", endpoint(at));
    let mut named: Vec<String> = records.iter().take(NAMED).map(overwritten).collect();
    if named.is_empty() && *slots > 0 {
        named.push("slots overwritten".to_owned());
    }
    let count = records.len() + slots;
    (count > 0).then_some(Drift { map, count, named })
}

fn endpoint(endpoint: &Endpoint) -> String {
    let at = SocketAddr::new(endpoint.addr.into(), endpoint.port as u16);
    match endpoint.proto {
        TCP => format!("tcp {at}"),
        UDP => format!("udp {at}"),
        other => format!("protocol {other} {at}"),
    }
}

fn address(addr: &Address) -> String {
    IpAddr::from(*addr).to_string()
}

/// `bits` count those of an IPv6 address.
fn prefix(bits: u32, addr: &Address) -> String {
    let bits = if addr.is_v4() { bits.saturating_sub(96) } else { bits };
    format!("{}/{bits}", address(addr))
}
