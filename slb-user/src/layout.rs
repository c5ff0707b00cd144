//! A configuration, spread out over the maps: which listener and which backend has which index.
//!
//! Indices are what flows remember, so they must outlive the agent: they are read back from the
//! maps, and only what is new gets a new one.

use std::{
    net::{IpAddr, SocketAddr},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use slb_common::{
    abi::{self, Endpoint, MAX_BACKENDS, MAX_LISTENERS, MAX_PREFIXES},
    hash,
};

use self::ids::Ids;
use crate::{
    config::{
        self, AclMode, AllUnhealthy, ClientAddress, Config, Forwarding, GroupKind, HealthCheck,
        Instance, Limits, Protocol, Scheduler,
    },
    state::{Acl, State},
};

mod ids;

/// A configuration with an index for everything.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// One per enabled listener and family of its VIPs.
    pub services: Vec<Service>,
    /// One per service and backend address, in the order of the services.
    pub targets: Vec<Target>,
}

/// A listener, as far as its VIPs of one family are concerned.
#[derive(Clone, Debug)]
pub struct Service {
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
    /// Its part of [`Layout::targets`].
    pub targets: Range<usize>,
}

/// One backend of one service.
#[derive(Clone, Debug)]
pub struct Target {
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
    pub check: Option<(HealthCheck, SocketAddr)>,
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
pub enum LayoutError {
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

impl Layout {
    /// Gives everything in `config` its index: the one that it has in `installed`, or a free one.
    ///
    /// # Errors
    ///
    /// The configuration does not fit into the maps.
    pub fn new(config: &Config, installed: &State) -> Result<Self, LayoutError> {
        let mut ids = Ids::new(config, installed);
        let mut layout = Self::default();
        for (at, instance) in config.instances.iter().enumerate() {
            for index in 0..instance.listeners.len() {
                for is_v4 in [true, false] {
                    layout.add((at, instance), index, is_v4, &mut ids, installed)?;
                }
            }
        }
        let mut lists: Vec<&Arc<Acl>> = Vec::new();
        for (_, list) in layout.services.iter().filter_map(|service| service.acl.as_ref()) {
            if !lists.contains(&list) {
                lists.push(list);
            }
        }
        let prefixes: usize = lists.iter().map(|list| list.len()).sum();
        if prefixes > MOST_PREFIXES { Err(LayoutError::TooManyPrefixes) } else { Ok(layout) }
    }

    /// Adds the part of a listener that concerns one family, if there is any.
    fn add(
        &mut self,
        (at, instance): (usize, &Instance),
        index: usize,
        is_v4: bool,
        ids: &mut Ids<'_>,
        installed: &State,
    ) -> Result<(), LayoutError> {
        let listener = &instance.listeners[index];
        let vips = instance.vips.iter().filter(|vip| listener.enabled && vip.is_ipv4() == is_v4);
        let endpoints: Vec<_> =
            vips.map(|&vip| endpoint(vip, listener.port, listener.protocol)).collect();
        if endpoints.is_empty() {
            return Ok(());
        }
        let id = ids.listener(&endpoints)?;
        let first = self.targets.len();
        let group = &instance.groups[listener.group];
        // Backends of the other family serve where none of its own is.
        let serves = |is_v4| {
            let mut addresses = group.backends.iter().flat_map(|backend| &backend.addresses);
            addresses.any(|addr| addr.is_ipv4() == is_v4)
        };
        let inside =
            if group.forwarding.crosses_families() && !serves(is_v4) { !is_v4 } else { is_v4 };
        for (backend, member) in group.backends.iter().enumerate() {
            // The parser sees to it that one of them is there.
            let port = member.port.or(listener.backend_port).unwrap_or(listener.port);
            let role = Role::of(group.kind, backend);
            let is_checked = role != Role::Secondary || group.check_secondary;
            let check = listener.health_check.as_ref().filter(|_| is_checked);
            for &addr in member.addresses.iter().filter(|addr| addr.is_ipv4() == inside) {
                self.targets.push(Target {
                    id: ids.backend(id, addr, port)?,
                    backend: Some(backend),
                    addr: SocketAddr::new(addr, port),
                    weight: if member.drain { 0 } else { member.weight.into() },
                    drains: member.drain,
                    server_id: member.server_id,
                    role,
                    forwarding: group.forwarding,
                    sources: group
                        .sources
                        .iter()
                        .copied()
                        .filter(|source| source.is_ipv4() == inside)
                        .collect(),
                    client_address: match listener.protocol {
                        Protocol::Tcp => group.client_address,
                        Protocol::Udp => ClientAddress::None,
                    },
                    identity: hash::identity(addr.into(), port),
                    check: check.map(|check| {
                        let at = check.port.unwrap_or(port);
                        let proxy_header = at == port
                            && listener.protocol == Protocol::Tcp
                            && group.client_address == ClientAddress::ProxyV2;
                        let check = HealthCheck { proxy_header, ..check.clone() };
                        (check, SocketAddr::new(addr, at))
                    }),
                });
            }
        }
        for id in ids.departed(id, &endpoints) {
            self.targets.push(Target::departed(id, installed));
        }
        self.services.push(Service {
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
            targets: first..self.targets.len(),
        });
        Ok(())
    }
}

impl Target {
    /// A backend that only the maps know any more.
    fn departed(id: u32, installed: &State) -> Self {
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
            forwarding: match record.mode() {
                Some(abi::Mode::Full) => Forwarding::FullNat,
                Some(abi::Mode::Dsr) => Forwarding::Dsr,
                Some(abi::Mode::Ipip) => Forwarding::Ipip,
                Some(abi::Mode::Gue) => Forwarding::Gue,
                Some(abi::Mode::Nat) | None => Forwarding::Nat,
            },
            sources: sources.map(|(_, &source)| source.into()).collect(),
            client_address: if record.flags & abi::BACKEND_PROXY != 0 {
                ClientAddress::ProxyV2
            } else if record.flags & abi::BACKEND_OPTION != 0 {
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
    pub const fn is_departed(&self) -> bool {
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
