//! What the indices of the maps stand for.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
};

use slb_api::{BusiestClient, FlowFilter, FlowState, FlowStatus, Flows};
use slb_common::abi::{self, Address, ConnState, Endpoint, Flow, TCP};

use super::Snapshot;

/// What indices of the maps stand for.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// Listeners, as `instance tcp/80`, by where clients connect to.
    listeners: HashMap<Endpoint, String>,
    /// Backends and their addresses, by index into `SLB_BACKENDS`.
    backends: HashMap<u32, (String, SocketAddr)>,
}

impl Names {
    /// The names in the configuration of a snapshot.
    #[must_use]
    pub fn new(Snapshot { config, ids, .. }: &Snapshot) -> Self {
        let mut names = Self::default();
        for indexed in &ids.listeners {
            let instance = &config.instances[indexed.instance];
            let listener = &instance.listeners[indexed.listener];
            let label = format!("{} {}/{}", instance.name, listener.protocol, listener.port);
            names.listeners.extend(indexed.endpoints.iter().map(|&at| (at, label.clone())));
            let backends = &instance.groups[listener.group].backends;
            for backend in &ids.backends[indexed.backends.clone()] {
                let name = backend
                    .backend
                    .map_or_else(|| backend.addr.ip().to_string(), |it| backends[it].name.clone());
                names.backends.insert(backend.id, (name, backend.addr));
            }
        }
        names
    }

    /// The name of a backend.
    #[must_use]
    pub fn backend(&self, id: u32) -> String {
        self.backends.get(&id).map_or_else(|| format!("#{id}"), |(name, _)| name.clone())
    }

    fn flow(&self, flow: &Flow, now: u32, per_second: u32) -> FlowStatus {
        let vip = flow.key().destination();
        let is_open = u32::from(flow.proto) != TCP
            || flow.state().intersects(ConnState::ESTABLISHED | ConnState::AGED);
        FlowStatus {
            listener: self.listeners.get(&vip).cloned(),
            client: SocketAddr::new(flow.src.into(), flow.sport),
            vip: SocketAddr::new(flow.dst.into(), flow.dport),
            backend: self.backend(flow.backend),
            to: self.backends.get(&flow.backend).map(|(_, addr)| *addr),
            port: flow.port,
            state: if is_open { FlowState::Established } else { FlowState::Opening },
            expires_seconds: (abi::age(flow.expires, now) / per_second).into(),
        }
    }

    /// Those of `flows` that are asked for.
    #[must_use]
    pub fn select(
        &self,
        flows: impl Iterator<Item = Flow>,
        filter: &FlowFilter,
        now: u32,
        per_second: u32,
    ) -> Flows {
        /// More than a person reads.
        const MOST: usize = 1_000;
        let limit = filter.limit.unwrap_or(MOST);
        let mut found = Flows { total: 0, flows: Vec::new(), busiest: None };
        let mut clients = HashMap::<Address, u64>::new();
        for flow in flows {
            let is_listener = filter.listener.as_ref().is_none_or(|wanted| {
                let known = self.listeners.get(&flow.key().destination());
                known.is_some_and(|known| known == wanted || known.ends_with(&format!(" {wanted}")))
            });
            let is_backend = filter.backend.as_ref().is_none_or(|wanted| {
                self.backends.get(&flow.backend).is_some_and(|(name, _)| name == wanted)
            });
            if !is_listener || !is_backend {
                continue;
            }
            found.total += 1;
            *clients.entry(flow.src).or_default() += 1;
            if found.flows.len() < limit {
                found.flows.push(self.flow(&flow, now, per_second));
            }
        }
        let busiest = clients.into_iter().max_by_key(|(client, flows)| (*flows, *client));
        found.busiest =
            busiest.map(|(client, flows)| BusiestClient { client: IpAddr::from(client), flows });
        found
    }

    /// A text with names in place of `#index`.
    pub(super) fn put(&self, text: &str) -> String {
        let mut parts = text.split('#');
        let mut named = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            let (number, rest) = part.split_at(end);
            let name = number.parse().ok().and_then(|id: u32| self.backends.get(&id));
            match name {
                Some((name, _)) => named += name,
                None => named += &format!("#{number}"),
            }
            named += rest;
        }
        named
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        let web = ("web-1".to_owned(), "10.0.0.1:8080".parse().unwrap());
        let api = ("api-2".to_owned(), "10.0.0.2:9001".parse().unwrap());
        let at = |port| Endpoint { addr: IpAddr::from([192, 0, 2, 1]).into(), port, proto: TCP };
        let listeners = [(at(80), "shop tcp/80".to_owned()), (at(81), "shop tcp/81".to_owned())];
        Names { listeners: listeners.into(), backends: [(3, web), (14, api)].into() }
    }

    fn flow(dport: u16, backend: u32) -> Flow {
        Flow {
            tag: 7,
            expires: 1_250,
            src: IpAddr::from([198, 51, 100, 7]).into(),
            dst: IpAddr::from([192, 0, 2, 1]).into(),
            sport: 4_000,
            dport,
            backend,
            proto: TCP as u8,
            kind: abi::FLOW_ORIGINAL,
            state: ConnState::ESTABLISHED.bits(),
            proxy: 0,
            port: 4_000,
            source: 0,
            peer: 0,
            sequence: 0,
        }
    }

    #[test]
    fn given_indices_in_a_text_when_named_then_only_those_that_are_known_are() {
        assert_eq!(
            names().put("#3 at x, #14: #15 and # alone"),
            "web-1 at x, api-2: #15 and # alone"
        );
    }

    #[test]
    fn given_flows_when_asked_for_some_then_those_are_counted_and_named() {
        let flows = [flow(80, 3), flow(80, 14), flow(81, 14), flow(82, 99)];
        let select = |listener: Option<&str>, backend: Option<&str>, limit| {
            let (listener, backend) = (listener.map(Into::into), backend.map(Into::into));
            let filter = FlowFilter { listener, backend, limit };
            names().select(flows.into_iter(), &filter, 1_000, 250)
        };
        assert_eq!(select(None, None, None).total, 4);
        assert_eq!(select(Some("tcp/80"), None, None).total, 2);
        assert_eq!(select(Some("shop tcp/80"), Some("api-2"), None).total, 1);
        assert_eq!(select(Some("blog tcp/80"), None, None).total, 0);
        let one = select(None, Some("api-2"), Some(1));
        assert_eq!((one.total, one.flows.len()), (2, 1));
        assert_eq!(
            one.busiest,
            Some(BusiestClient { client: IpAddr::from([198, 51, 100, 7]), flows: 2 })
        );
        let expected = FlowStatus {
            listener: Some("shop tcp/80".to_owned()),
            client: "198.51.100.7:4000".parse().unwrap(),
            vip: "192.0.2.1:80".parse().unwrap(),
            backend: "api-2".to_owned(),
            to: Some("10.0.0.2:9001".parse().unwrap()),
            port: 4_000,
            state: FlowState::Established,
            expires_seconds: 1,
        };
        assert_eq!(one.flows, [expected]);
    }
}
