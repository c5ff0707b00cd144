//! Notices that another host claims a VIP, and defends the VIP, in a task of its own: claims can be forged by the
//! thousands, and must cost neither the agent's loop nor the watcher anything.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    future::pending,
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use slb_api::{EventKind, Problem, ProblemName};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::{RETRY, until};
use crate::{
    net::{Claim, ClaimListener, Defence, Interface, Mac, Wire},
    observe::{ClaimCounts, EventLog},
};

/// Without a claim for so long, the conflict is over.
const OVER: Duration = Duration::from_secs(30);
/// Frames that are read at once.
const BATCH: usize = 256;
/// The pause after them. What comes meanwhile waits in the socket, or is dropped there.
const PAUSE: Duration = Duration::from_millis(20);
/// So many MAC addresses are named.
const NAMED: usize = 4;

/// What is defended, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Places {
    /// The VIPs that this agent has announced, each with the interface.
    pub vips: BTreeMap<IpAddr, Interface>,
    /// The interfaces that are served.
    pub interfaces: Vec<Interface>,
    /// All MAC addresses of this host.
    pub own: HashSet<Mac>,
    /// MAC addresses of gateways that take over the same VIPs: their claims are no conflict, and are not answered. The
    /// configuration cannot name any yet, so it is empty; see `docs/adr/0028`.
    pub peers: HashSet<Mac>,
}

/// The conflict about one VIP.
#[derive(Debug)]
struct Conflict {
    defence: Defence,
    interface: String,
    /// The first that have claimed it.
    macs: Vec<Mac>,
    has_more: bool,
    claims: u64,
}

/// Listens for claims and answers them.
pub(super) struct ConflictWatch {
    places: watch::Receiver<Arc<Places>>,
    problems: watch::Sender<Vec<Problem>>,
    counts: ClaimCounts,
    events: EventLog,
    /// `None`: there is nothing to listen for yet, or it could not be opened.
    listener: Option<ClaimListener>,
    wire: Option<Wire>,
    conflicts: HashMap<IpAddr, Conflict>,
    /// When listening is to be tried again.
    retry: Option<Instant>,
}

impl ConflictWatch {
    /// Watches the VIPs in `places`.
    pub(super) fn new(
        places: watch::Receiver<Arc<Places>>,
        counts: ClaimCounts,
        events: EventLog,
    ) -> Self {
        Self {
            places,
            problems: watch::Sender::default(),
            counts,
            events,
            listener: None,
            wire: None,
            conflicts: HashMap::new(),
            retry: None,
        }
    }

    /// Where the problems are.
    pub(super) fn subscribe(&self) -> watch::Receiver<Vec<Problem>> {
        self.problems.subscribe()
    }

    /// Watches until the agent ends.
    pub(super) async fn run(mut self) {
        self.follow();
        loop {
            let due = self.due();
            tokio::select! {
                changed = self.places.changed() => match changed {
                    Ok(()) => self.follow(),
                    Err(_) => return,
                },
                heard = heard(self.listener.as_ref()) => {
                    match heard {
                        Ok(claims) => self.record(&claims, Instant::now()),
                        Err(error) => self.give_up(&error),
                    }
                    self.act(Instant::now());
                    tokio::time::sleep(PAUSE).await;
                }
                () = until(due) => {
                    if self.retry.is_some_and(|retry| retry <= Instant::now()) {
                        self.follow();
                    }
                }
            }
            self.act(Instant::now());
        }
    }

    /// When something is to be done without a claim.
    fn due(&self) -> Option<Instant> {
        let conflicts = self.conflicts.values();
        let conflicts = conflicts.flat_map(|conflict| {
            [conflict.defence.due(), Some(conflict.defence.last_claim() + OVER)]
        });
        conflicts.chain([self.retry]).flatten().min()
    }

    /// Listens for claims to the VIPs as they are now.
    fn follow(&mut self) {
        let places = Arc::clone(&self.places.borrow_and_update());
        self.retry = None;
        self.conflicts.retain(|vip, _| places.vips.contains_key(vip));
        if places.vips.is_empty() && self.listener.is_none() {
            return;
        }
        let listener = match self.listener.take() {
            Some(listener) => Ok(listener),
            None => ClaimListener::open(),
        };
        let listening = listener.and_then(|listener| {
            listener.listen_for(places.vips.keys().copied())?;
            Ok(listener)
        });
        match listening {
            Ok(listener) => self.listener = Some(listener),
            Err(error) => self.give_up(&error),
        }
    }

    fn give_up(&mut self, error: &io::Error) {
        debug!(%error, "cannot listen for hosts that claim a VIP; trying again");
        self.listener = None;
        self.retry = Some(Instant::now() + RETRY);
    }

    fn record(&mut self, claims: &[Claim], now: Instant) {
        let places = Arc::clone(&self.places.borrow());
        for Claim { address, mac, ifindex } in claims {
            let interface = places.interfaces.iter().find(|it| it.index == *ifindex);
            let Some(interface) = interface.filter(|_| places.vips.contains_key(address)) else {
                continue;
            };
            if places.own.contains(mac) || places.peers.contains(mac) {
                continue;
            }
            self.counts.add(*address);
            if let Some(conflict) = self.conflicts.get_mut(address) {
                conflict.add(*mac, now);
                continue;
            }
            let conflict = Conflict::new(*mac, interface.name.clone(), now);
            let text = conflict.text(*address);
            warn!("{text}");
            self.events.note(EventKind::Network, text);
            self.conflicts.insert(*address, conflict);
        }
    }

    /// Announces VIPs whose turn it is, ends conflicts that are over, and tells the agent.
    fn act(&mut self, now: Instant) {
        let places = Arc::clone(&self.places.borrow());
        for (vip, conflict) in &mut self.conflicts {
            let is_due = conflict.defence.due().is_some_and(|due| due <= now);
            if is_due && let Some(interface) = places.vips.get(vip) {
                conflict.defence.announced(now);
                match announce(&mut self.wire, *vip, interface) {
                    Ok(()) => debug!(%vip, interface = interface.name, "defended"),
                    Err(error) => warn!(%vip, %error, "cannot defend the VIP"),
                }
            }
        }
        let events = &self.events;
        self.conflicts.retain(|vip, conflict| {
            let is_over = now >= conflict.defence.last_claim() + OVER;
            if is_over {
                let claims = conflict.claims;
                let text =
                    format!("VIP {vip} is not claimed any longer; there were {claims} claims");
                info!("{text}");
                events.note(EventKind::Network, text);
            }
            !is_over
        });
        let mut problems: Vec<Problem> = self
            .conflicts
            .iter()
            .map(|(vip, conflict)| {
                Problem::new(ProblemName::VipClaimed, conflict.text(*vip)).of(vip.to_string())
            })
            .collect();
        problems.sort_by(|one, other| one.subject.cmp(&other.subject));
        // The agent's loop is woken only if that is new.
        self.problems.send_if_modified(|known| {
            let is_new = *known != problems;
            *known = problems;
            is_new
        });
    }
}

impl Conflict {
    fn new(mac: Mac, interface: String, now: Instant) -> Self {
        let (defence, macs) = (Defence::new(now), vec![mac]);
        Self { defence, interface, macs, has_more: false, claims: 1 }
    }

    fn add(&mut self, mac: Mac, now: Instant) {
        self.claims += 1;
        self.defence.claim(now);
        if self.macs.contains(&mac) {
            return;
        }
        match self.macs.len() < NAMED {
            true => self.macs.push(mac),
            false => self.has_more = true,
        }
    }

    /// Changes only with the MAC addresses that it names.
    fn text(&self, vip: IpAddr) -> String {
        let mut macs: Vec<String> = self.macs.iter().map(|mac| written(*mac)).collect();
        if self.has_more {
            macs.push("others".to_owned());
        }
        let (macs, interface) = (macs.join(", "), &self.interface);
        format!("VIP {vip} is claimed by another host, at {macs} on {interface}")
    }
}

/// A MAC address as it is written.
pub(super) fn written(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

async fn heard(listener: Option<&ClaimListener>) -> io::Result<Vec<Claim>> {
    match listener {
        Some(listener) => listener.hear(BATCH).await,
        None => pending().await,
    }
}

fn announce(wire: &mut Option<Wire>, vip: IpAddr, interface: &Interface) -> io::Result<()> {
    let opened = match wire.take() {
        Some(wire) => wire,
        None => Wire::open()?,
    };
    wire.insert(opened).announce(vip, interface)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIP: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 10));

    fn watching() -> ConflictWatch {
        let interface = Interface {
            index: 7,
            name: "wan0".to_owned(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1_500,
            up: false,
            is_ethernet: true,
            is_veth: false,
            master: None,
            lower: None,
        };
        let places = Places {
            vips: [(VIP, interface.clone())].into(),
            own: [interface.mac].into(),
            interfaces: vec![interface],
            peers: [[2, 0, 0, 0, 0, 2]].into(),
        };
        let (_, places) = watch::channel(Arc::new(places));
        ConflictWatch::new(places, ClaimCounts::default(), EventLog::default())
    }

    fn claim(mac: u16) -> Claim {
        let [high, low] = mac.to_be_bytes();
        Claim { address: VIP, mac: [2, 0, 0, 0, high, low], ifindex: 7 }
    }

    #[test]
    fn claims_of_this_host_and_of_its_peers_are_no_conflict() {
        let mut watch = watching();
        let elsewhere = Claim { ifindex: 8, ..claim(9) };
        let other = Claim { address: "203.0.113.11".parse().unwrap(), ..claim(9) };
        watch.record(&[claim(1), claim(2), elsewhere, other], Instant::now());
        assert!(watch.conflicts.is_empty() && watch.events.after(0).is_empty());
        assert!(watch.counts.all().is_empty());
    }

    #[test]
    fn flood_of_claims_costs_one_event_and_a_bounded_problem() {
        let mut watch = watching();
        let now = Instant::now();
        let claims: Vec<Claim> = (100..5_000).map(claim).collect();
        watch.record(&claims, now);
        watch.act(now);
        let text = watch.problems.borrow()[0].text.clone();
        assert!(text.contains("203.0.113.10") && text.contains("02:00:00:00:00:64"), "{text}");
        assert!(text.contains("wan0") && text.contains("others"), "{text}");
        let mut told = watch.subscribe();
        told.mark_unchanged();
        watch.record(&claims, now);
        watch.act(now);
        assert!(!told.has_changed().unwrap(), "nothing new");
        assert_eq!(watch.events.after(0).len(), 1);
        assert_eq!(watch.counts.all().get(&VIP), Some(&9_800));

        watch.act(now + OVER);
        assert!(watch.problems.borrow().is_empty());
        assert_eq!(watch.events.after(1).len(), 1, "and one that it is over");
    }
}
