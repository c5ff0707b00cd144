//! Everything that runs in a lab: servers on the backends, the gateway with the agent, and a client.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::{Client, Gateway, Host, Server, Service, Topology, plan};

/// What runs. The order of the fields is the order in which it ends.
pub struct Lab {
    /// The agent, and its configuration.
    pub gateway: Gateway,
    /// Each of [`plan::SERVICES`] on each backend, and [`plan::SPARE`].
    pub servers: Vec<Server>,
    /// On the first of the clients' hosts.
    pub client: Client,
    /// The hosts.
    pub topology: Topology,
}

impl Lab {
    /// Starts the servers of [`plan`], and writes the configuration. The agent does not run yet.
    ///
    /// # Errors
    ///
    /// A namespace cannot be made, or a server does not start.
    pub fn prepare() -> Result<Self> {
        let topology = Topology::build()?;
        let gateway = Gateway::new(&topology, &plan::instances(&topology, plan::HEALTHY))?;
        let mut servers = Vec::new();
        for host in &topology.backends {
            for service in plan::SERVICES {
                servers.push(Server::start(host, service)?);
            }
        }
        let last = topology.backends.last().context("the lab has backends")?;
        servers.push(Server::start_as(last, plan::SPARE_SERVICE, plan::SPARE)?);
        let client = Client::new(topology.clients.first().context("the lab has clients")?);
        Ok(Self { gateway, servers, client, topology })
    }

    /// The server of `service` that answers as `name`.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn server(&mut self, name: &str, service: Service) -> Result<&mut Server> {
        self.servers
            .iter_mut()
            .find(|server| server.name() == name && server.service() == service)
            .with_context(|| format!("no {service:?} at {name}"))
    }

    /// The host `name` of the backends.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn host(&self, name: &str) -> Result<&Host> {
        let mut hosts = self.topology.backends.iter();
        hosts.find(|host| host.name == name).with_context(|| format!("no backend {name}"))
    }

    /// Waits until every backend that is checked is healthy, for at most `limit`; returns how long that took.
    ///
    /// # Errors
    ///
    /// `limit` is over.
    pub fn wait_all_healthy(&self, limit: Duration) -> Result<Duration> {
        self.gateway.wait("all backends healthy", limit, plan::all_healthy)
    }

    /// Waits until the backend `name` of a listener has `health` at all its addresses, for at most `limit`; returns
    /// how long that took.
    ///
    /// # Errors
    ///
    /// There is no such backend, or `limit` is over.
    pub fn wait_health(
        &self,
        (protocol, port): (&str, u16),
        name: &str,
        health: &str,
        limit: Duration,
    ) -> Result<Duration> {
        let addresses = self.host(name)?.addresses();
        let what = format!("{name} {health} on {protocol}/{port}");
        self.gateway.wait(&what, limit, |status| {
            addresses.into_iter().all(|address| {
                crate::gateway::health(status, protocol, port, name, address) == Some(health)
            })
        })
    }
}
