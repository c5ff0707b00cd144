//! Where the kernel would send a packet: the route from the kernel, the MAC from the neighbours.
//!
//! Routes are asked for once per address and kept until routing changes, so a neighbour that comes
//! or goes costs no look-up.

use std::{
    collections::HashMap,
    fmt, io,
    net::IpAddr,
    sync::{Arc, MutexGuard, PoisonError},
};

use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteType, RouteVia,
    },
};

use super::{
    Error, Network,
    batch::Answer,
    tables::{Mac, NeighbourKey, Tables},
};
use crate::contained;

/// How a packet leaves for an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextHop {
    /// By this frame.
    Resolved {
        /// Output interface.
        ifindex: u32,
        /// The gateway, or the address itself if it is on the link.
        neighbour: IpAddr,
        /// MAC of the neighbour.
        dst_mac: Mac,
        /// MAC of the output interface.
        src_mac: Mac,
        /// Largest packet that can be sent, from the IP header on, in bytes.
        mtu: u32,
        /// The address of this host that packets of its own have as source.
        source: Option<IpAddr>,
    },
    /// The way is known, but not the neighbour's MAC (yet).
    Unresolved {
        /// Output interface.
        ifindex: u32,
        /// The gateway, or the address itself if it is on the link.
        neighbour: IpAddr,
    },
    /// It cannot be sent from XDP.
    Unreachable(Unreachable),
    /// It is an address of this host.
    Local,
}

impl NextHop {
    /// Interface index and address of the neighbour to keep resolved, if there is one.
    #[must_use]
    pub fn neighbour(&self) -> Option<(u32, IpAddr)> {
        match self {
            Self::Resolved { ifindex, neighbour, .. } | Self::Unresolved { ifindex, neighbour } => {
                Some((*ifindex, *neighbour))
            }
            Self::Unreachable(_) | Self::Local => None,
        }
    }
}

/// Why a packet cannot leave for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unreachable {
    /// No route.
    NoRoute,
    /// A route of type `unreachable`.
    Rejected,
    /// A route of type `blackhole`.
    Blackhole,
    /// A route or rule of type `prohibit`.
    Prohibited,
    /// A broadcast or multicast address.
    NotUnicast,
    /// The output interface is down, or gone.
    LinkDown,
    /// The way leads through a tunnel or another link without Ethernet headers; the kernel can
    /// take it, XDP cannot.
    NotEthernet,
}

/// Reads a route, for `tests/fuzz`.
#[cfg(feature = "fuzzing")]
pub(super) fn fuzz_route(message: &RouteMessage) {
    let _ = parse(message, std::net::Ipv4Addr::LOCALHOST.into());
}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoRoute => "no route",
            Self::Rejected => "the route says unreachable",
            Self::Blackhole => "the route is a blackhole",
            Self::Prohibited => "the route says prohibited",
            Self::NotUnicast => "not a unicast address",
            Self::LinkDown => "the output interface is down",
            Self::NotEthernet => "the output interface is not Ethernet",
        })
    }
}

/// The kernel's answer to a route look-up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Route {
    Via {
        ifindex: u32,
        neighbour: IpAddr,
        mtu: Option<u32>,
        source: Option<IpAddr>,
        /// Of all next hops of the route.
        outputs: Vec<u32>,
    },
    Unreachable(Unreachable),
    Local,
}

/// Answers, all of one state of routing.
#[derive(Debug, Default)]
pub(super) struct RouteCache {
    routing: u64,
    answers: HashMap<IpAddr, Route>,
}

#[cfg(test)]
impl RouteCache {
    pub(super) fn state_and_size(&self) -> (u64, usize) {
        (self.routing, self.answers.len())
    }
}

impl Network {
    /// The next hop of one address; see [`resolve_all`](Self::resolve_all).
    ///
    /// # Errors
    ///
    /// [`Error::Route`].
    pub async fn resolve(&self, address: IpAddr) -> Result<NextHop, Error> {
        let routes = self.routes(&[address]).await?;
        let tables = self.shared.tables();
        Ok(next_hop(&tables, routes.get(&address).expect("every address asked for has a route")))
    }

    /// The next hops of addresses, as far as the kernel knows them now.
    ///
    /// Starts no neighbour resolution: that is [`ManagedNeighbours`](super::ManagedNeighbours)'s work. Routes are those
    /// of packets that this host sends: rules that match on a source, a mark or an input interface
    /// do not count.
    ///
    /// # Errors
    ///
    /// [`Error::Route`].
    pub async fn resolve_all(
        &self,
        addresses: &[IpAddr],
    ) -> Result<HashMap<IpAddr, NextHop>, Error> {
        let routes = self.routes(addresses).await?;
        let tables = self.shared.tables();
        Ok(routes.iter().map(|(&address, route)| (address, next_hop(&tables, route))).collect())
    }

    /// The output interfaces of the routes to addresses: of all next hops, where a route has several. Those are the
    /// interfaces that the kernel takes packets from an address by, with `rp_filter = 1`.
    ///
    /// # Errors
    ///
    /// [`Error::Route`].
    pub async fn outputs(&self, addresses: &[IpAddr]) -> Result<HashMap<IpAddr, Vec<u32>>, Error> {
        let routes = self.routes(addresses).await?.into_iter();
        Ok(routes
            .map(|(address, route)| match route {
                Route::Via { outputs, .. } => (address, outputs),
                Route::Unreachable(_) | Route::Local => (address, Vec::new()),
            })
            .collect())
    }

    /// The routes of these addresses: remembered ones, and the kernel's answers for the others.
    async fn routes(&self, addresses: &[IpAddr]) -> Result<HashMap<IpAddr, Route>, Error> {
        let routing = self.shared.routing();
        let (mut routes, mut missing) = (HashMap::with_capacity(addresses.len()), Vec::new());
        {
            let mut cache = self.cache();
            if cache.routing != routing {
                *cache = RouteCache { routing, answers: HashMap::new() };
            }
            for &address in addresses {
                match cache.answers.get(&address) {
                    Some(route) => drop(routes.insert(address, route.clone())),
                    None => missing.push(address),
                }
            }
        }
        let answers = self.ask_routes(missing).await?;

        // A change during the look-ups outdates what is stored here: `routing` was read before.
        let mut cache = self.cache();
        if cache.routing == routing {
            cache.answers.extend(answers.iter().cloned());
        }
        routes.extend(answers);
        Ok(routes)
    }

    /// The maximum segment size that the route to an address says to offer, in bytes; `None`: it says
    /// nothing, and the interface's MTU decides.
    ///
    /// # Errors
    ///
    /// [`Error::Route`].
    pub async fn advertised_mss(&self, address: IpAddr) -> Result<Option<u32>, Error> {
        let question = RouteNetlinkMessage::GetRoute(question(address));
        let answers = match self.rtnl.ask(question, 0).await {
            Ok(answers) => answers,
            Err(source) if refusal(&source).is_some() => return Ok(None),
            Err(source) => return Err(Error::Route { address, source }),
        };
        let routes = answers.iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => Some(&route.attributes),
            _ => None,
        });
        Ok(routes.flatten().find_map(|attribute| match attribute {
            RouteAttribute::Metrics(metrics) => metrics.iter().find_map(|metric| match metric {
                RouteMetric::Advmss(mss) => Some(*mss),
                _ => None,
            }),
            _ => None,
        }))
    }

    async fn ask_routes(&self, addresses: Vec<IpAddr>) -> Result<Vec<(IpAddr, Route)>, Error> {
        let Some(&first) = addresses.first() else { return Ok(Vec::new()) };
        // Of each the way of a packet, and the entry of the routing table that it goes by.
        let questions = addresses.iter().flat_map(|&it| [question(it), entry_question(it)]);
        let questions = questions.map(RouteNetlinkMessage::GetRoute).collect();
        let batch = Arc::clone(&self.batch);
        let answers =
            tokio::task::spawn_blocking(contained::blocking(move || batch.ask(questions)));
        let answers = answers.await.map_err(io::Error::other).flatten();
        let answers = answers.map_err(|source| Error::Route { address: first, source })?;
        let (mut answers, mut routes) = (answers.into_iter(), Vec::with_capacity(addresses.len()));
        for address in addresses {
            let Some((way, entry)) = answers.next().zip(answers.next()) else { break };
            let mut route = route(address, way)?;
            if let (Route::Via { outputs, .. }, Ok(RouteNetlinkMessage::NewRoute(entry))) =
                (&mut route, entry)
            {
                outputs.extend(entry.attributes.iter().flat_map(outputs_of));
                outputs.sort_unstable();
                outputs.dedup();
            }
            routes.push((address, route));
        }
        Ok(routes)
    }

    fn cache(&self) -> MutexGuard<'_, RouteCache> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the kernel's answer about an address means.
fn route(address: IpAddr, answer: Answer) -> Result<Route, Error> {
    match answer {
        Ok(RouteNetlinkMessage::NewRoute(route)) => Ok(parse(&route, address)),
        Ok(_) => Err(Error::Route { address, source: io::ErrorKind::InvalidData.into() }),
        Err(source) => match refusal(&source) {
            Some(reason) => Ok(Route::Unreachable(reason)),
            None => Err(Error::Route { address, source }),
        },
    }
}

fn next_hop(tables: &Tables, route: &Route) -> NextHop {
    match route {
        Route::Via { ifindex, neighbour, mtu, source, .. } => {
            through(tables, (*ifindex, *neighbour), *mtu, *source)
        }
        Route::Unreachable(reason) => NextHop::Unreachable(*reason),
        Route::Local => NextHop::Local,
    }
}

fn through(
    tables: &Tables,
    (ifindex, neighbour): NeighbourKey,
    mtu: Option<u32>,
    source: Option<IpAddr>,
) -> NextHop {
    let Some(interface) = tables.interfaces.get(&ifindex).filter(|interface| interface.up) else {
        return NextHop::Unreachable(Unreachable::LinkDown);
    };
    if !interface.is_ethernet {
        return NextHop::Unreachable(Unreachable::NotEthernet);
    }
    match tables.neighbours.get(&(ifindex, neighbour)).and_then(|neighbour| neighbour.mac) {
        Some(dst_mac) => NextHop::Resolved {
            ifindex,
            neighbour,
            dst_mac,
            src_mac: interface.mac,
            mtu: mtu.map_or(interface.mtu, |mtu| mtu.min(interface.mtu)),
            source,
        },
        None => NextHop::Unresolved { ifindex, neighbour },
    }
}

fn question(address: IpAddr) -> RouteMessage {
    let mut message = RouteMessage::default();
    (message.header.address_family, message.header.destination_prefix_length) = match address {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    message.attributes.push(RouteAttribute::Destination(address.into()));
    message
}

/// The same, about the entry of the routing table, with all of its next hops.
fn entry_question(address: IpAddr) -> RouteMessage {
    let mut message = question(address);
    message.header.flags = RouteFlags::FibMatch;
    message
}

/// The IPv4 side says these by error codes, the IPv6 side mostly by route types.
fn refusal(error: &io::Error) -> Option<Unreachable> {
    match error.raw_os_error()? {
        libc::ENETUNREACH => Some(Unreachable::NoRoute),
        libc::EHOSTUNREACH => Some(Unreachable::Rejected),
        libc::EACCES => Some(Unreachable::Prohibited),
        libc::EINVAL => Some(Unreachable::Blackhole),
        libc::ENETDOWN | libc::ENODEV => Some(Unreachable::LinkDown),
        _ => None,
    }
}

/// The interfaces that an attribute of a route names.
fn outputs_of(attribute: &RouteAttribute) -> Vec<u32> {
    match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    }
}

fn parse(message: &RouteMessage, address: IpAddr) -> Route {
    match message.header.kind {
        RouteType::Local | RouteType::Anycast => return Route::Local,
        RouteType::Unreachable => return Route::Unreachable(Unreachable::Rejected),
        RouteType::BlackHole => return Route::Unreachable(Unreachable::Blackhole),
        RouteType::Prohibit => return Route::Unreachable(Unreachable::Prohibited),
        RouteType::Broadcast | RouteType::Multicast => {
            return Route::Unreachable(Unreachable::NotUnicast);
        }
        _ => {}
    }
    let (mut output, mut neighbour, mut mtu, mut learned) = (None, address, None, false);
    let mut source = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(ifindex) => output = Some(*ifindex),
            RouteAttribute::Gateway(RouteAddress::Inet(v4))
            | RouteAttribute::Via(RouteVia::Inet(v4)) => neighbour = IpAddr::V4(*v4),
            RouteAttribute::Gateway(RouteAddress::Inet6(v6))
            | RouteAttribute::Via(RouteVia::Inet6(v6)) => neighbour = IpAddr::V6(*v6),
            RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => source = Some(IpAddr::V4(*v4)),
            RouteAttribute::PrefSource(RouteAddress::Inet6(v6)) => source = Some(IpAddr::V6(*v6)),
            RouteAttribute::EncapType(_) => return Route::Unreachable(Unreachable::NotEthernet),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            RouteAttribute::CacheInfo(info) => learned = info.expires != 0,
            _ => {}
        }
    }
    match output {
        // An MTU that expires was learnt from ICMP about this host's own packets; the kernel does
        // not hold forwarded packets to it either.
        Some(ifindex) => {
            let (mtu, outputs) = (mtu.filter(|_| !learned), vec![ifindex]);
            Route::Via { ifindex, neighbour, mtu, source, outputs }
        }
        None => Route::Unreachable(Unreachable::NoRoute),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const GATEWAY: std::net::Ipv4Addr = std::net::Ipv4Addr::new(192, 0, 2, 1);

    #[test]
    fn given_answers_of_the_kernel_when_parsed_then_the_way_is_the_kernels() {
        let via = |neighbour, mtu| Route::Via {
            ifindex: 7,
            neighbour,
            mtu,
            source: None,
            outputs: vec![7],
        };
        let on_link = via(ADDRESS, None);
        let gateway = RouteAttribute::Gateway(RouteAddress::Inet(GATEWAY));
        let via6 = "fe80::1".parse().unwrap();
        let oif = RouteAttribute::Oif(7);
        let cases = [
            ("on link", RouteType::Unicast, vec![oif.clone()], on_link),
            (
                "gateway and MTU",
                RouteType::Unicast,
                vec![gateway, RouteAttribute::Metrics(vec![RouteMetric::Mtu(1400)]), oif.clone()],
                via(GATEWAY.into(), Some(1400)),
            ),
            (
                "IPv6 gateway of an IPv4 route",
                RouteType::Unicast,
                vec![RouteAttribute::Via(RouteVia::Inet6(via6)), oif.clone()],
                via(via6.into(), None),
            ),
            ("own", RouteType::Local, vec![oif.clone()], Route::Local),
            (
                "blackhole",
                RouteType::BlackHole,
                vec![oif],
                Route::Unreachable(Unreachable::Blackhole),
            ),
        ];
        for (case, kind, attributes, expected) in cases {
            let mut message = RouteMessage::default();
            message.header.kind = kind;
            message.attributes = attributes;

            assert_eq!(parse(&message, ADDRESS), expected, "{case}");
        }
    }
}
