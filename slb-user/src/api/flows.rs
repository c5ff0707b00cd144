//! The flow table and the packet path, in the words of the configuration.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};
use slb_common::abi::{self, Address, ConnState, Endpoint, Flow, TCP};
use utoipa::{IntoParams, ToSchema};

use crate::datapath::{Explainer, Explanation, Question};

/// What indices of the maps stand for.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// Listeners, as `instance tcp/80`, by where clients connect to.
    pub listeners: HashMap<Endpoint, String>,
    /// Backends and their addresses, by their index.
    pub backends: HashMap<u32, (String, SocketAddr)>,
}

/// Which flows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct FlowFilter {
    /// Only those through this listener, such as `tcp/80`.
    pub listener: Option<String>,
    /// Only those of this backend, by its name.
    pub backend: Option<String>,
    /// At most so many.
    pub limit: Option<usize>,
}

/// Flows that have entries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Flows {
    /// How many there are, those beyond the limit among them.
    pub total: u64,
    /// In no order.
    pub flows: Vec<FlowStatus>,
    /// The client that has most of them, and how many.
    pub busiest: Option<(String, u64)>,
}

/// A flow that has an entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FlowStatus {
    /// Instance, protocol and port.
    pub listener: String,
    /// Who sends.
    pub client: String,
    /// To whom.
    pub vip: String,
    /// The backend's name.
    pub backend: String,
    /// Its address and port.
    pub to: String,
    /// Port that the backend sees.
    pub port: u16,
    /// `opening`, or `established`; UDP is that from the start.
    pub state: String,
    /// Seconds until it is forgotten, if nothing more is sent.
    pub expires_seconds: u64,
}

impl Names {
    /// What a flow is called.
    fn flow(&self, flow: &Flow, now: u32, per_second: u32) -> FlowStatus {
        let vip = flow.key().destination();
        let (backend, to) = self.backend(flow.backend);
        let is_open = u32::from(flow.proto) != TCP || flow.state.intersects(ConnState::ESTABLISHED);
        FlowStatus {
            listener: self.listeners.get(&vip).cloned().unwrap_or_default(),
            client: SocketAddr::new(flow.src.into(), flow.sport).to_string(),
            vip: SocketAddr::new(flow.dst.into(), flow.dport).to_string(),
            backend,
            to,
            port: flow.port,
            state: if is_open { "established" } else { "opening" }.to_owned(),
            expires_seconds: (abi::age(flow.expires, now) / per_second).into(),
        }
    }

    fn backend(&self, id: u32) -> (String, String) {
        let known = self.backends.get(&id);
        known.map_or_else(
            || (format!("#{id}"), String::new()),
            |(name, addr)| (name.clone(), addr.to_string()),
        )
    }

    /// Those of `flows` that are asked for.
    pub fn select(
        &self,
        flows: impl Iterator<Item = Flow>,
        filter: &FlowFilter,
        now: u32,
        per_second: u32,
    ) -> Flows {
        /// More than anybody reads.
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
        found.busiest = busiest.map(|(client, flows)| (IpAddr::from(client).to_string(), flows));
        found
    }
}

/// A packet to be explained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Asked {
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Address and port of the client.
    #[param(value_type = String)]
    pub src: SocketAddr,
    /// Address and port that it talks to.
    #[param(value_type = String)]
    pub dst: SocketAddr,
    /// Whether it is in the middle of a TCP connection, and not its first packet.
    #[serde(default)]
    pub established: bool,
}

/// What would become of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Explained {
    /// In the order of the packet path, each with what was found there.
    pub steps: Vec<[String; 2]>,
    /// How it ends: a label of `slb_verdicts_total`.
    pub verdict: String,
    /// The backend that gets it.
    pub backend: Option<String>,
    /// Where it is sent to.
    pub to: Option<String>,
    /// Who the backend takes for the sender, if that is certain before.
    pub from: Option<String>,
}

impl Asked {
    /// Asks the maps.
    ///
    /// # Errors
    ///
    /// What is wrong with the question, or with the maps.
    pub fn explain(
        &self,
        explainer: &Explainer,
        names: &Names,
        now: u32,
    ) -> Result<Explained, String> {
        let proto = match self.protocol.as_str() {
            "tcp" => TCP,
            "udp" => abi::UDP,
            other => return Err(format!("{other:?} is not balanced; write tcp or udp")),
        };
        if self.src.is_ipv4() != self.dst.is_ipv4() {
            return Err(format!("{} and {} are of different families", self.src, self.dst));
        }
        let question = Question {
            proto,
            src: canonical(self.src),
            dst: canonical(self.dst),
            is_established: self.established,
            ingress: 0,
        };
        let Explanation { steps, verdict, backend, to, from } =
            explainer.explain(&question, now).map_err(|error| error.to_string())?;
        let steps = steps.into_iter().map(|step| [step.what.to_owned(), names.put(&step.found)]);
        Ok(Explained {
            steps: steps.collect(),
            verdict: verdict.map(|verdict| verdict.label().to_owned()).unwrap_or_default(),
            backend: backend.map(|id| names.backend(id).0),
            to: to.map(|to| to.to_string()),
            from: from.map(|from| from.to_string()),
        })
    }
}

impl Names {
    /// A text with names in place of `#index`.
    fn put(&self, text: &str) -> String {
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

fn canonical(at: SocketAddr) -> SocketAddr {
    SocketAddr::new(IpAddr::to_canonical(&at.ip()), at.port())
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
            state: ConnState::ESTABLISHED,
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
        assert_eq!(one.busiest, Some(("198.51.100.7".to_owned(), 2)));
        let expected = FlowStatus {
            listener: "shop tcp/80".to_owned(),
            client: "198.51.100.7:4000".to_owned(),
            vip: "192.0.2.1:80".to_owned(),
            backend: "api-2".to_owned(),
            to: "10.0.0.2:9001".to_owned(),
            port: 4_000,
            state: "established".to_owned(),
            expires_seconds: 1,
        };
        assert_eq!(one.flows, [expected]);
    }
}
