//! Watches the kernel's network on behalf of the agent, in a task of its own: asking the kernel for
//! the way to thousands of backends takes longer than a failed backend may wait.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use rustc_hash::FxHashMap;
use slb_api::{EventKind, Problem, ProblemName};
use slb_common::abi;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use super::{
    RETRY,
    conflicts::{Places, written},
    failures::Failures,
    renew::Hops,
};
use crate::{
    config::{Announce, Config},
    datapath::LoadError,
    ids::Ids,
    net::{
        self, Announcers, AttachedXdp, HostAddress, Ingress, Interface, MANAGE_INTERVAL, Mac,
        ManagedNeighbours, Network, NetworkChange, NextHop, Silence, VipState, forwarding_problems,
    },
    observe::EventLog,
    planner::BackendRoute,
};

/// The network as it was a moment ago.
#[derive(Debug, Default)]
pub(super) struct NetworkSnapshot {
    /// Those of the configured interfaces that are there, and the XDP program on each, ours or another.
    pub interfaces: Vec<(Interface, Option<AttachedXdp>)>,
    /// The way to each backend, where the kernel knows it.
    pub routes: FxHashMap<IpAddr, BackendRoute>,
    /// Addresses of this host.
    pub addresses: Vec<IpAddr>,
    /// Where packets come from.
    pub ingress: Arc<Ingress>,
    /// Whether the program may remember ways to clients that are wrong now.
    pub outdates_clients: bool,
    /// What an operator should see to.
    pub problems: Vec<Problem>,
    /// Sent to when the maps say the same: the VIPs are announced after that. Dropped: they are not.
    pub taken: Option<oneshot::Sender<()>>,
}

impl NetworkSnapshot {
    /// One of the interfaces.
    pub(super) fn interface(
        &self,
        name: &str,
    ) -> Result<&(Interface, Option<AttachedXdp>), LoadError> {
        let found = self.interfaces.iter().find(|(found, _)| found.name == name);
        found.ok_or_else(|| LoadError::NoInterface(name.to_owned()))
    }

    /// The watcher goes on with the VIPs.
    pub(super) fn take(&mut self) {
        if let Some(taken) = self.taken.take() {
            // It is gone only when the agent ends.
            let _ = taken.send(());
        }
    }
}

/// The part of the network that is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WatchSpec {
    /// Of the interfaces.
    names: Vec<String>,
    /// Addresses.
    backends: Vec<IpAddr>,
    /// VIPs, and sources of full NAT.
    vips: Vec<IpAddr>,
    /// How these are announced.
    announce: Announce,
}

impl WatchSpec {
    pub(super) fn new(config: &Config, ids: &Ids) -> Self {
        // In order, so that two can be compared.
        let mut backends: Vec<IpAddr> =
            ids.backends.iter().map(|backend| backend.addr.ip()).collect();
        backends.sort();
        backends.dedup();
        let groups = config.instances.iter().flat_map(|instance| &instance.groups);
        let sources = groups.flat_map(|group| group.sources.clone());
        let vips = config.instances.iter().flat_map(|instance| instance.vips.clone());
        let vips: BTreeSet<IpAddr> = vips.chain(sources).collect();
        Self {
            names: config.gateway.interfaces.clone(),
            backends,
            vips: vips.into_iter().collect(),
            announce: config.gateway.announce,
        }
    }
}

/// Has the watcher watch something else.
pub(super) struct WatchOrder {
    pub spec: WatchSpec,
    /// Who waits for the first look; `None`: it goes where all changes go.
    pub found: Option<oneshot::Sender<NetworkSnapshot>>,
}

/// Opens the network, and asks for the ways to these addresses ahead of the first look: the kernel takes its time for
/// thousands of them.
pub(super) async fn open_network(expected: Vec<IpAddr>) -> Result<Network, net::Error> {
    let network = Network::open().await?;
    // The answers are remembered. What fails here fails again, and is reported, when it is needed.
    let _ = network.resolve_all(&expected).await;
    Ok(network)
}

/// Knows the way to the backends, keeps it known, and holds the VIPs.
pub(super) struct NetworkWatcher {
    network: Network,
    managed: ManagedNeighbours,
    announcers: Announcers,
    /// What is announced, for those who defend it.
    places: watch::Sender<Arc<Places>>,
    /// How far each VIP is announced, as of the last attempt.
    vip_states: BTreeMap<IpAddr, VipState>,
    events: EventLog,
    /// The way to each backend, for those who ask for its MAC address.
    hops: watch::Sender<Hops>,
    /// The last known MAC address of each backend.
    macs: HashMap<IpAddr, Mac>,
    spec: WatchSpec,
    routes: FxHashMap<IpAddr, BackendRoute>,
    /// Next hops on our interfaces.
    neighbours: HashSet<(u32, IpAddr)>,
    addresses: Vec<HostAddress>,
    /// The output interfaces of the routes to backends.
    outputs: HashMap<IpAddr, Vec<u32>>,
    ingress: Arc<Ingress>,
    /// Backends whose replies cannot come back through XDP.
    unreachable_backends: Vec<Problem>,
    /// Of the kernel's settings and routes.
    problems: Vec<Problem>,
    /// Those of them that the log has been told of.
    told: Vec<Problem>,
    failures: Failures,
}

impl NetworkWatcher {
    pub(super) fn new(network: Network, spec: WatchSpec, events: EventLog) -> Self {
        Self {
            managed: ManagedNeighbours::new(&network),
            announcers: Announcers::new(&network),
            places: watch::Sender::default(),
            vip_states: BTreeMap::new(),
            network,
            events,
            hops: watch::Sender::default(),
            macs: HashMap::new(),
            spec,
            routes: FxHashMap::default(),
            neighbours: HashSet::new(),
            addresses: Vec::new(),
            outputs: HashMap::new(),
            ingress: Arc::default(),
            unreachable_backends: Vec::new(),
            problems: Vec::new(),
            told: Vec::new(),
            failures: Failures::default(),
        }
    }

    /// Reports every change to `agent`, until that is gone, and watches something else when it says so.
    pub(super) async fn run(
        mut self,
        agent: mpsc::Sender<NetworkSnapshot>,
        mut orders: mpsc::UnboundedReceiver<WatchOrder>,
    ) {
        let mut change = NetworkChange::default();
        let mut asked = None::<oneshot::Sender<NetworkSnapshot>>;
        loop {
            let (taken, is_taken) = oneshot::channel();
            let found = NetworkSnapshot { taken: Some(taken), ..self.look(change).await };
            match asked.take() {
                // A reload that has given up does not receive it: the next order follows.
                Some(asked) => drop(asked.send(found)),
                None if agent.send(found).await.is_err() => return,
                None => {}
            }
            // Either way, it has been looked at.
            let is_taken = is_taken.await.is_ok();
            self.report();
            // A VIP must not be announced before there are listeners, nor if its configuration is refused.
            let is_outdated = is_taken && self.announce().await;
            // Last: thousands of them take seconds, and what is known already is of use before.
            let kept = self.managed.keep(&self.neighbours).await;
            self.failures.note(ProblemName::NeighboursNotKept, kept);
            let pause = match (is_outdated, self.failures.is_empty()) {
                // The agent has the states of VIPs from before the announcement.
                (true, _) => Duration::ZERO,
                (false, true) => MANAGE_INTERVAL,
                (false, false) => RETRY,
            };
            change = NetworkChange::default();
            tokio::select! {
                order = orders.recv() => match order {
                    Some(WatchOrder { spec, found }) => (self.spec, asked) = (spec, found),
                    None => return,
                },
                found = self.network.changed() => change = found,
                () = tokio::time::sleep(pause) => {}
            }
            if change.any() {
                debug!(?change, "the kernel's network has changed");
            }
        }
    }

    /// Asks the kernel for the way to every backend.
    pub(super) async fn look(&mut self, change: NetworkChange) -> NetworkSnapshot {
        let interfaces = self.interfaces();
        match ways(&self.network, &self.spec.backends).await {
            Ok((answers, outputs)) => {
                self.outputs = outputs;
                self.failures.note(ProblemName::NextHopsUnknown, Ok::<_, net::Error>(()));
                self.routes =
                    answers.iter().filter_map(|(&addr, hop)| Some((addr, route(hop)?))).collect();
                let ours = |index| interfaces.iter().any(|interface| interface.index == index);
                self.unreachable_backends =
                    unreachable_backends(&self.network, &answers, &interfaces);
                let neighbours = answers.values().filter_map(NextHop::neighbour);
                self.neighbours = neighbours.filter(|(index, _)| ours(*index)).collect();
                self.note_moves(&answers);
                self.hops.send_replace(Arc::new(answers));
            }
            Err(error) => self.failures.note(ProblemName::NextHopsUnknown, Err(error)),
        }
        let addresses = self.network.addresses().await.map(|found| self.addresses = found);
        self.failures.note(ProblemName::AddressesUnknown, addresses);
        let forwarding = forwarding_problems(&interfaces).into_iter();
        let forwarding = forwarding.map(|text| Problem::new(ProblemName::ForwardingOff, text));
        let mut problems: Vec<Problem> = forwarding.collect();
        problems.extend(self.spec.names.iter().filter_map(|name| down(name, &interfaces)));
        problems.extend(self.unreachable_backends.clone());
        problems.extend(self.vip_states.iter().filter_map(|(vip, state)| silent_vip(*vip, state)));
        self.problems.clone_from(&problems);
        let ingress = self.network.ingress(&interfaces, &self.addresses, self.outputs.clone());
        if *self.ingress != ingress {
            self.ingress = Arc::new(ingress);
        }
        let interfaces = self.with_xdp(interfaces).await;
        problems.extend(self.failures.problems());
        NetworkSnapshot {
            interfaces,
            routes: self.routes.clone(),
            addresses: self.addresses.iter().map(|held| held.address).collect(),
            ingress: Arc::clone(&self.ingress),
            outdates_clients: change.outdates_answers(),
            problems,
            taken: None,
        }
    }

    /// Logs new problems, after the agent has acted on the same look.
    pub(super) fn report(&mut self) {
        for problem in self.problems.iter().filter(|problem| !self.told.contains(problem)) {
            warn!("{}", problem.text);
        }
        self.told.clone_from(&self.problems);
    }

    /// Announces the VIPs. Returns whether the state of one of them has changed.
    pub(super) async fn announce(&mut self) -> bool {
        let interfaces = self.interfaces();
        let WatchSpec { announce, vips, .. } = &self.spec;
        let result = self.announcers.announce(*announce, vips, &interfaces).await;
        if let Ok(done) = &result {
            if !done.announced.is_empty() {
                info!(vips = ?done.announced, "announced");
            }
            if !done.removed.is_empty() {
                info!(addresses = ?done.removed, "withdrew");
            }
        }
        self.failures.note(ProblemName::VipsNotAnnounced, result.map(drop));
        self.publish_places(interfaces);
        let vips = &self.spec.vips;
        let states: BTreeMap<_, _> =
            vips.iter().map(|&vip| (vip, self.announcers.state(vip))).collect();
        let has_changed = self.vip_states != states;
        self.vip_states = states;
        has_changed
    }

    /// Where the VIPs are that this agent has announced.
    pub(super) fn places(&self) -> watch::Receiver<Arc<Places>> {
        self.places.subscribe()
    }

    /// The way to each backend.
    pub(super) fn hops(&self) -> watch::Receiver<Hops> {
        self.hops.subscribe()
    }

    /// Notes the backends that have another MAC address than they had.
    fn note_moves(&mut self, answers: &HashMap<IpAddr, NextHop>) {
        self.macs.retain(|address, _| answers.contains_key(address));
        for (address, hop) in answers {
            let NextHop::Resolved { neighbour, dst_mac, .. } = hop else { continue };
            let before = self.macs.insert(*address, *dst_mac);
            // Of backends behind a router, it is the router that has moved: it is a neighbour of all of them.
            let Some(before) = before.filter(|mac| mac != dst_mac && neighbour == address) else {
                continue;
            };
            let (before, now) = (written(before), written(*dst_mac));
            let text = format!("backend {address} has another MAC address: {now}, before {before}");
            info!("{text}");
            self.events.note(EventKind::Network, text);
        }
    }

    fn publish_places(&self, interfaces: Vec<Interface>) {
        let place = |(vip, index)| {
            let interface = interfaces.iter().find(|interface| interface.index == index)?;
            Some((vip, interface.clone()))
        };
        let vips = self.announcers.places().into_iter().filter_map(place).collect();
        let (own, peers) = (self.network.own_macs(), HashSet::new());
        let places = Places { vips, interfaces, own, peers };
        self.places.send_if_modified(|known| {
            let is_new = **known != places;
            if is_new {
                *known = Arc::new(places);
            }
            is_new
        });
    }

    async fn with_xdp(
        &mut self,
        interfaces: Vec<Interface>,
    ) -> Vec<(Interface, Option<AttachedXdp>)> {
        let mut with_xdp = Vec::new();
        let mut result = Ok(());
        for interface in interfaces {
            match self.network.xdp(interface.index).await {
                Ok(xdp) => with_xdp.push((interface, xdp)),
                Err(error) => {
                    // It is there all the same.
                    with_xdp.push((interface, None));
                    result = Err(error);
                }
            }
        }
        self.failures.note(ProblemName::InterfacesUnknown, result);
        with_xdp
    }

    fn interfaces(&self) -> Vec<Interface> {
        self.spec.names.iter().filter_map(|name| self.network.interface(name)).collect()
    }
}

/// By address.
type Ways = (HashMap<IpAddr, NextHop>, HashMap<IpAddr, Vec<u32>>);

/// The way to each backend, and the output interfaces of its route.
async fn ways(network: &Network, backends: &[IpAddr]) -> Result<Ways, net::Error> {
    let answers = network.resolve_all(backends).await?;
    Ok((answers, network.outputs(backends).await?))
}

fn route(hop: &NextHop) -> Option<BackendRoute> {
    match *hop {
        NextHop::Resolved { ifindex, dst_mac, src_mac, mtu, source, .. } => {
            Some(BackendRoute { hop: abi::NextHop { ifindex, dst_mac, src_mac }, mtu, source })
        }
        _ => None,
    }
}

/// The problem with an interface that is missing or down.
fn down(name: &str, interfaces: &[Interface]) -> Option<Problem> {
    let state = match interfaces.iter().find(|interface| interface.name == name) {
        Some(interface) if interface.up => return None,
        Some(_) => "down",
        None => "missing",
    };
    let text = format!("interface {name} is {state}: no packets come or go by it");
    Some(Problem::new(ProblemName::InterfaceDown, text).of(name))
}

/// The problem with a VIP that should be announced, and is not.
fn silent_vip(vip: IpAddr, state: &VipState) -> Option<Problem> {
    let reason = match state {
        VipState::Silent(reason @ (Silence::LinkDown { .. } | Silence::Failed { .. })) => reason,
        // A link without neighbours needs no announcement; an error while a VIP is added is a failure of its own.
        VipState::Silent(Silence::NotEthernet)
        | VipState::Announced
        | VipState::Unmanaged
        | VipState::Withdrawn => return None,
    };
    let text = format!("VIP {vip} is not announced: {reason}");
    Some(Problem::new(ProblemName::VipsNotAnnounced, text).of(vip.to_string()))
}

/// How many backends with the same trouble are told of.
const SHOWN: usize = 5;

/// The backends that the kernel reaches in a way that XDP does not see the replies of. Their health
/// checks succeed all the same, so this is a problem of its own.
fn unreachable_backends(
    network: &Network,
    answers: &HashMap<IpAddr, NextHop>,
    interfaces: &[Interface],
) -> Vec<Problem> {
    let outside = |hop: &NextHop| match hop {
        NextHop::Local => Some("it is an address of this host".to_owned()),
        NextHop::Unreachable(why) => Some(why.to_string()),
        NextHop::Resolved { ifindex, .. } | NextHop::Unresolved { ifindex, .. } => {
            if interfaces.iter().any(|interface| interface.index == *ifindex) {
                return None;
            }
            let name = network.interface_by_index(*ifindex).map(|interface| interface.name);
            let name = name.unwrap_or_else(|| ifindex.to_string());
            Some(format!("its interface, {name}, is not in gateway.interfaces"))
        }
    };
    let problem = |text| Problem::new(ProblemName::BackendBypassesXdp, text);
    let mut found: Vec<Problem> = answers
        .iter()
        .filter_map(|(addr, hop)| {
            let text = format!("backend {addr} gets no traffic by XDP: {}", outside(hop)?);
            Some(problem(text).of(addr.to_string()))
        })
        .collect();
    found.sort_by(|one, other| one.text.cmp(&other.text));
    let more = found.len().saturating_sub(SHOWN);
    found.truncate(SHOWN);
    if more > 0 {
        found.push(problem(format!("and {more} more backends")));
    }
    found
}
