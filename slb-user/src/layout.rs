//! A configuration, spread out over the maps: which listener and which backend has which index.
//!
//! Indices are what flows remember, so they must outlive the agent: they are read back from the
//! maps, and only what is new gets a new one.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    ops::Range,
    time::Duration,
};

use slb_common::{
    abi::{self, Address, Endpoint, MAX_BACKENDS, MAX_LISTENERS},
    hash,
};

use crate::{
    config::{AllUnhealthy, Config, GroupKind, HealthCheck, Protocol, Scheduler},
    state::State,
};

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
    /// Index into `SLB_CURSORS`, and [`abi::Listener::id`].
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
    /// After this long without a packet a flow is forgotten.
    pub idle_timeout: Duration,
    /// Its part of [`Layout::targets`].
    pub targets: Range<usize>,
}

/// One backend of one service.
#[derive(Clone, Debug)]
pub struct Target {
    /// Index into `SLB_BACKENDS`.
    pub id: u32,
    /// Index into [`crate::config::Group::backends`].
    pub backend: usize,
    /// Where packets are sent to.
    pub addr: SocketAddr,
    /// Share of new flows, relative to the others'.
    pub weight: u32,
    /// Its place in a primary/secondary group.
    pub role: Role,
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

/// A configuration that does not fit.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Of [`MAX_LISTENERS`].
    #[error(
        "more than {MAX_LISTENERS} listeners, counted per VIP; use fewer listeners per gateway"
    )]
    TooManyListeners,
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
        let mut endpoint_count = 0;
        let mut layout = Self::default();
        for (instance_index, instance) in config.instances.iter().enumerate() {
            for (listener_index, listener) in instance.listeners.iter().enumerate() {
                for is_v4 in [true, false] {
                    let endpoints: Vec<_> = instance
                        .vips
                        .iter()
                        .filter(|vip| listener.enabled && vip.is_ipv4() == is_v4)
                        .map(|&vip| endpoint(vip, listener.port, listener.protocol))
                        .collect();
                    if endpoints.is_empty() {
                        continue;
                    }
                    endpoint_count += endpoints.len();
                    if endpoint_count > MAX_LISTENERS {
                        return Err(LayoutError::TooManyListeners);
                    }
                    let id = ids.listener(&endpoints)?;
                    let group = &instance.groups[listener.group];
                    let first = layout.targets.len();
                    for (index, backend) in group.backends.iter().enumerate() {
                        let addresses = backend.addresses.iter();
                        for &addr in addresses.filter(|addr| addr.is_ipv4() == is_v4) {
                            // The parser sees to it that one of them is there.
                            let port =
                                backend.port.or(listener.backend_port).unwrap_or(listener.port);
                            let role = match (group.kind, index) {
                                (GroupKind::PrimarySecondary, 0) => Role::Primary,
                                (GroupKind::PrimarySecondary, _) => Role::Secondary,
                                _ => Role::Member,
                            };
                            let check = listener
                                .health_check
                                .as_ref()
                                .filter(|_| role != Role::Secondary)
                                .map(|check| {
                                    let port = check.port.unwrap_or(port);
                                    (check.clone(), SocketAddr::new(addr, port))
                                });
                            layout.targets.push(Target {
                                id: ids.backend(id, addr, port)?,
                                backend: index,
                                addr: SocketAddr::new(addr, port),
                                weight: backend.weight.into(),
                                role,
                                identity: hash::identity(addr.into(), port),
                                check,
                            });
                        }
                    }
                    layout.services.push(Service {
                        id,
                        instance: instance_index,
                        listener: listener_index,
                        endpoints,
                        scheduler: listener.scheduler,
                        all_unhealthy: listener.all_unhealthy,
                        idle_timeout: listener.idle_timeout,
                        targets: first..layout.targets.len(),
                    });
                }
            }
        }
        Ok(layout)
    }
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

/// Hands out indices.
struct Ids<'a> {
    installed: &'a State,
    /// Of listeners, in use or about to be.
    listeners: HashSet<u32>,
    given_listeners: HashSet<u32>,
    /// Backends that the maps know, in use or not: by listener, address and port.
    backends: HashMap<(u32, Address, u32), u32>,
    given_backends: HashSet<u32>,
    next_listener: u32,
    /// Never used, then retired ones: a flow may still refer to those.
    free_backends: Box<dyn Iterator<Item = u32> + 'a>,
}

impl<'a> Ids<'a> {
    fn new(config: &Config, installed: &'a State) -> Self {
        let wanted: HashSet<Endpoint> = config
            .instances
            .iter()
            .flat_map(|instance| {
                instance.listeners.iter().flat_map(|listener| {
                    instance.vips.iter().map(|&vip| endpoint(vip, listener.port, listener.protocol))
                })
            })
            .collect();
        let kept = |(endpoint, _): &(&Endpoint, _)| wanted.contains(*endpoint);
        let listeners =
            installed.listeners.iter().filter(kept).map(|(_, service)| service.id).collect();
        let known: BTreeMap<u32, _> = installed.backends.iter().map(|(&id, b)| (id, b)).collect();
        let backends = known.iter().map(|(&id, b)| ((b.listener, b.addr, b.port), id)).collect();
        let retired: Vec<u32> = known
            .iter()
            .filter(|(_, backend)| backend.flags & abi::BACKEND_IN_USE == 0)
            .map(|(&id, _)| id)
            .collect();
        let never_used = (0..MAX_BACKENDS as u32).filter(move |id| !known.contains_key(id));
        Self {
            installed,
            listeners,
            given_listeners: HashSet::new(),
            backends,
            given_backends: HashSet::new(),
            next_listener: 0,
            free_backends: Box::new(never_used.chain(retired)),
        }
    }

    fn listener(&mut self, endpoints: &[Endpoint]) -> Result<u32, LayoutError> {
        let mut known =
            endpoints.iter().filter_map(|endpoint| self.installed.listeners.get(endpoint));
        // VIPs that shared a listener may have one each by now: only one of those inherits.
        if let Some(service) = known.find(|service| self.given_listeners.insert(service.id)) {
            return Ok(service.id);
        }
        while self.listeners.contains(&self.next_listener) {
            self.next_listener += 1;
        }
        if self.next_listener as usize >= MAX_LISTENERS {
            return Err(LayoutError::TooManyListeners);
        }
        self.listeners.insert(self.next_listener);
        Ok(self.next_listener)
    }

    fn backend(&mut self, listener: u32, addr: IpAddr, port: u16) -> Result<u32, LayoutError> {
        let known = self.backends.get(&(listener, addr.into(), port.into())).copied();
        if let Some(id) = known.filter(|id| self.given_backends.insert(*id)) {
            return Ok(id);
        }
        let free = self.free_backends.find(|id| !self.given_backends.contains(id));
        let id = free.ok_or(LayoutError::TooManyBackends)?;
        self.given_backends.insert(id);
        Ok(id)
    }
}

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
