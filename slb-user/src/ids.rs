//! The ids of listeners and backends: their indices in the maps.
//!
//! Flows remember ids, so ids must outlive the agent: they are read back from the maps, and only new listeners and backends
//! get new ones.

use std::{
    net::{IpAddr, SocketAddr},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use rustc_hash::FxHashMap;
use slb_common::{
    abi::{self, Endpoint, MAX_BACKENDS, MAX_LISTENERS, MAX_PREFIXES},
    hash,
};

use self::allocator::Allocator;
use crate::{
    config::{
        self, AclMode, AllUnhealthy, Backend, ClientAddress, Config, Forwarding, Group, GroupKind,
        HealthCheck, Instance, Limits, Listener, Protocol, Scheduler,
    },
    state::{Acl, State},
};

mod allocator;

/// The enabled listeners of a configuration and their backends, each with its id.
#[derive(Clone, Debug, Default)]
pub struct Ids {
    /// One per enabled listener and family of its VIPs.
    pub listeners: Vec<IndexedListener>,
    /// One per listener and backend address, in the order of the listeners.
    pub backends: Vec<IndexedBackend>,
}

/// A listener, as far as its VIPs of one family are concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexedListener {
    /// Index into `SLB_RR_CURSORS`, and [`abi::Listener::id`].
    pub id: u32,
    /// Index into [`Config::instances`].
    pub instance: usize,
    /// Index into [`crate::config::Instance::listeners`].
    pub listener: usize,
    /// Where clients connect to.
    pub endpoints: Vec<Endpoint>,
    /// How a backend is chosen.
    pub scheduler: Scheduler,
    /// What new flows get when no backend is healthy.
    pub all_unhealthy: AllUnhealthy,
    /// After this long without a packet a flow is ended.
    pub idle_timeout: Duration,
    /// For how long after its last new flow a client stays with its backend.
    pub persistence: Option<Duration>,
    /// After this long the flows of a backend that is drained are ended.
    pub drain: Option<Duration>,
    /// Which clients of its family may connect.
    pub acl: Option<(AclMode, Arc<Acl>)>,
    /// How much they may.
    pub limits: Limits,
    /// Its part of [`Ids::backends`].
    pub backends: Range<usize>,
}

/// One address of a backend, on behalf of one listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexedBackend {
    /// Index into `SLB_BACKENDS`.
    pub id: u32,
    /// Index into [`crate::config::Group::backends`]; `None`: the configuration does not name it any more, but
    /// its flows go on.
    pub backend: Option<usize>,
    /// Where packets are sent to.
    pub addr: SocketAddr,
    /// Share of new flows, relative to the others'.
    pub weight: u32,
    /// Whether its flows are to end.
    pub drains: bool,
    /// What connection IDs that it issues begin with.
    pub server_id: Option<u16>,
    /// Its place in a primary/secondary group.
    pub role: Role,
    /// How packets reach it.
    pub forwarding: Forwarding,
    /// What it sees as source, if that is replaced; empty: the gateway's own address.
    pub sources: Vec<IpAddr>,
    /// How it learns who the client is.
    pub client_address: ClientAddress,
    /// What the backend is known by on every gateway.
    pub identity: u64,
    /// How it is probed, and where; `None`: it counts as healthy.
    pub check: Option<(Arc<HealthCheck>, SocketAddr)>,
}

/// Place of a backend in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// One of many.
    Member,
    /// Gets everything while healthy.
    Primary,
    /// Gets everything otherwise.
    Secondary,
}

/// Networks of all access lists: half of [`MAX_PREFIXES`], so that all can be replaced at once.
const MOST_PREFIXES: usize = MAX_PREFIXES / 2;

/// A configuration that does not fit.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CapacityError {
    /// Of [`MAX_LISTENERS`].
    #[error(
        "more than {MAX_LISTENERS} listeners, counted per VIP; use fewer listeners per gateway"
    )]
    TooManyListeners,
    /// Of [`MOST_PREFIXES`].
    #[error("access lists of more than {MOST_PREFIXES} networks together; merge some of them")]
    TooManyPrefixes,
    /// Of [`MAX_BACKENDS`].
    #[error(
        "more than {MAX_BACKENDS} backends, counted per listener and address; use fewer per gateway"
    )]
    TooManyBackends,
}

impl Ids {
    /// Gives everything in `config` its index: the one that it has in `installed`, or a free one.
    ///
    /// # Errors
    ///
    /// The configuration does not fit into the maps.
    pub fn assign(config: &Config, installed: &State) -> Result<Self, CapacityError> {
        Self::build(config, installed, &Self::default(), &FxHashMap::default())
    }

    /// The same, where these ids are in force, which are those of `before`. Instances that `config` shares with `before`
    /// keep theirs, so that a change of one instance does not take the time of all.
    ///
    /// # Errors
    ///
    /// The configuration does not fit into the maps.
    pub fn reassign(
        &self,
        before: &Config,
        config: &Config,
        installed: &State,
    ) -> Result<Self, CapacityError> {
        let instances = before.instances.iter().enumerate();
        let known = instances.map(|(at, instance)| (Arc::as_ptr(instance), at)).collect();
        Self::build(config, installed, self, &known)
    }

    /// `known` has the index in `before` of the instances that may be taken from there.
    fn build(
        config: &Config,
        installed: &State,
        before: &Self,
        known: &FxHashMap<*const Instance, usize>,
    ) -> Result<Self, CapacityError> {
        let mut allocator = Allocator::new(config, installed);
        let known = |instance: &Arc<Instance>| known.get(&Arc::as_ptr(instance)).copied();
        // An instance that stays keeps its ids, whatever comes ahead of it in the file.
        for at in config.instances.iter().filter_map(known) {
            for listener in before.of_instance(at) {
                allocator.keep(listener, &before.backends[listener.backends.clone()])?;
            }
        }
        let mut ids = Self::default();
        for (at, instance) in config.instances.iter().enumerate() {
            if let Some(known) = known(instance) {
                ids.copy(before, known, at);
                continue;
            }
            for index in 0..instance.listeners.len() {
                for is_v4 in [true, false] {
                    ids.add((at, instance), index, is_v4, &mut allocator, installed)?;
                }
            }
        }
        let mut lists: Vec<&Arc<Acl>> = Vec::new();
        for (_, list) in ids.listeners.iter().filter_map(|listener| listener.acl.as_ref()) {
            if !lists.contains(&list) {
                lists.push(list);
            }
        }
        let prefixes: usize = lists.iter().map(|list| list.len()).sum();
        if prefixes > MOST_PREFIXES { Err(CapacityError::TooManyPrefixes) } else { Ok(ids) }
    }

    /// The listeners of an instance.
    fn of_instance(&self, at: usize) -> &[IndexedListener] {
        let first = self.listeners.partition_point(|listener| listener.instance < at);
        let after = self.listeners.partition_point(|listener| listener.instance <= at);
        &self.listeners[first..after]
    }

    /// Adds an instance with the ids that it has in `before`, where its index is `known`.
    fn copy(&mut self, before: &Self, known: usize, at: usize) {
        for listener in before.of_instance(known) {
            let first = self.backends.len();
            self.backends.extend_from_slice(&before.backends[listener.backends.clone()]);
            let backends = first..self.backends.len();
            self.listeners.push(IndexedListener { instance: at, backends, ..listener.clone() });
        }
    }

    /// Adds the part of a listener that concerns one family, if there is any.
    fn add(
        &mut self,
        (at, instance): (usize, &Instance),
        index: usize,
        is_v4: bool,
        allocator: &mut Allocator<'_>,
        installed: &State,
    ) -> Result<(), CapacityError> {
        let listener = &instance.listeners[index];
        let vips = instance.vips.iter().filter(|vip| listener.enabled && vip.is_ipv4() == is_v4);
        let endpoints: Vec<_> =
            vips.map(|&vip| endpoint(vip, listener.port, listener.protocol)).collect();
        if endpoints.is_empty() {
            return Ok(());
        }
        let id = allocator.listener(&endpoints)?;
        let first = self.backends.len();
        let group = &instance.groups[listener.group];
        // Backends of the other family serve where none of its own is.
        let serves = |is_v4| {
            let mut addresses = group.backends.iter().flat_map(|backend| &backend.addresses);
            addresses.any(|addr| addr.is_ipv4() == is_v4)
        };
        let inside =
            if group.forwarding.crosses_families() && !serves(is_v4) { !is_v4 } else { is_v4 };
        for (backend, member) in group.backends.iter().enumerate() {
            let port = port(listener, member);
            for &addr in member.addresses.iter().filter(|addr| addr.is_ipv4() == inside) {
                let id = allocator.backend(id, addr, port)?;
                let addr = SocketAddr::new(addr, port);
                self.backends.push(IndexedBackend::new(id, addr, backend, listener, group));
            }
        }
        for id in allocator.orphaned(id, &endpoints) {
            self.backends.push(IndexedBackend::orphaned(id, installed));
        }
        self.listeners.push(IndexedListener {
            id,
            instance: at,
            listener: index,
            endpoints,
            scheduler: listener.scheduler,
            all_unhealthy: listener.all_unhealthy,
            idle_timeout: listener.idle_timeout,
            persistence: listener.persistence,
            drain: listener.drain,
            acl: listener.acl.as_ref().and_then(|acl| access(acl, is_v4)),
            limits: listener.limits,
            backends: first..self.backends.len(),
        });
        Ok(())
    }
}

/// The port of a backend, on behalf of a listener.
fn port(listener: &Listener, backend: &Backend) -> u16 {
    // The parser sees to it that one of the first two is there.
    backend.port.or(listener.backend_port).unwrap_or(listener.port)
}

impl IndexedBackend {
    /// The backend with this index in `group`.
    fn new(id: u32, addr: SocketAddr, index: usize, listener: &Listener, group: &Group) -> Self {
        let backend = &group.backends[index];
        let role = Role::of(group.kind, index);
        let is_checked = role != Role::Secondary || group.check_secondary;
        let check = listener.health_check.as_ref().filter(|_| is_checked);
        let is_alike = |source: &&IpAddr| source.is_ipv4() == addr.is_ipv4();
        Self {
            id,
            backend: Some(index),
            addr,
            weight: if backend.drain { 0 } else { backend.weight.into() },
            drains: backend.drain,
            server_id: backend.server_id,
            role,
            forwarding: group.forwarding,
            sources: group.sources.iter().filter(is_alike).copied().collect(),
            client_address: match listener.protocol {
                Protocol::Tcp => group.client_address,
                Protocol::Udp => ClientAddress::None,
            },
            identity: hash::identity(addr.ip().into(), addr.port()),
            check: check.map(|check| {
                let at = check.port.unwrap_or(addr.port());
                let proxy_header = at == addr.port()
                    && listener.protocol == Protocol::Tcp
                    && group.client_address == ClientAddress::ProxyV2;
                let check = HealthCheck { proxy_header, ..check.clone() };
                (Arc::new(check), SocketAddr::new(addr.ip(), at))
            }),
        }
    }

    /// A backend that only the maps know any more.
    fn orphaned(id: u32, installed: &State) -> Self {
        let record = &installed.backends[&id];
        let addr = IpAddr::from(record.addr);
        let port = record.port as u16;
        let first = u32::from(record.source);
        let sources = installed.sources.range(first..first + u32::from(record.sources));
        Self {
            id,
            backend: None,
            addr: SocketAddr::new(addr, port),
            weight: 0,
            drains: true,
            server_id: None,
            role: Role::Member,
            forwarding: match record.mode {
                abi::Mode::FULL => Forwarding::FullNat,
                abi::Mode::DSR => Forwarding::Dsr,
                abi::Mode::IPIP => Forwarding::Ipip,
                abi::Mode::GUE => Forwarding::Gue,
                _ => Forwarding::Nat,
            },
            sources: sources.map(|(_, &source)| source.into()).collect(),
            client_address: if record.flags.intersects(abi::BackendFlags::PROXY) {
                ClientAddress::ProxyV2
            } else if record.flags.intersects(abi::BackendFlags::OPTION) {
                ClientAddress::TcpOption
            } else {
                ClientAddress::None
            },
            identity: hash::identity(record.addr, port),
            check: None,
        }
    }

    /// Whether the configuration does not name it any more.
    #[must_use]
    pub const fn is_orphaned(&self) -> bool {
        self.backend.is_none()
    }
}

impl Role {
    const fn of(group: GroupKind, index: usize) -> Self {
        match (group, index) {
            (GroupKind::PrimarySecondary, 0) => Self::Primary,
            (GroupKind::PrimarySecondary, _) => Self::Secondary,
            _ => Self::Member,
        }
    }
}

/// What a list says about clients of a family; `None`: all may connect.
fn access(acl: &config::Acl, is_v4: bool) -> Option<(AclMode, Arc<Acl>)> {
    let own = acl.sources.iter().filter(|source| source.addr().is_ipv4() == is_v4);
    let list: Acl = own
        .map(|source| {
            let before = if is_v4 { u128::BITS - u32::BITS } else { 0 };
            let bits = abi::listed_bits(before + u32::from(source.prefix_len()));
            (bits, source.network().into())
        })
        .collect();
    let says_nothing = acl.mode == AclMode::Deny && list.is_empty();
    (!says_nothing).then(|| (acl.mode, Arc::new(list)))
}

/// Key of a listener in the maps.
#[must_use]
pub fn endpoint(addr: IpAddr, port: u16, protocol: Protocol) -> Endpoint {
    let proto = match protocol {
        Protocol::Tcp => abi::TCP,
        Protocol::Udp => abi::UDP,
    };
    Endpoint { addr: addr.into(), port: port.into(), proto }
}

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
