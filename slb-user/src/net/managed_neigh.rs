//! Has the kernel keep the neighbours of backends resolved.
//!
//! Packets that XDP forwards never touch the kernel's neighbour entries: left alone, an entry goes
//! stale, is collected, and the next hop is lost in the middle of traffic. A *managed* entry
//! (`NTF_EXT_MANAGED`, since Linux 5.16) is probed by the kernel for as long as it has the flag.
//! Older kernels ignore the flag; there the request itself (`NTF_USE`) starts one probe, and
//! repeating it every [`MANAGE_INTERVAL`] has the same effect.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use rtnetlink::{
    packet_core::NLM_F_CREATE,
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        neighbour::{NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage},
        route::RouteProtocol,
    },
};

use super::{
    Error, Network, OWNER,
    monitor::Shared,
    rtnl::Orders,
    tables::{Neighbour, NeighbourKey},
};

/// How often [`ManagedNeighbours::keep`] must be called at least.
///
/// Shorter than the time after which the kernel doubts a neighbour (15 s at least).
pub const MANAGE_INTERVAL: Duration = Duration::from_secs(10);

/// The time that the kernel's answer to a request gets to show in the tables.
const SETTLE: Duration = Duration::from_secs(1);

/// Keeps neighbours resolved, and releases those that are no longer wanted.
#[derive(Debug)]
pub struct ManagedNeighbours {
    orders: Orders,
    shared: Arc<Shared>,
    asked: HashMap<NeighbourKey, Instant>,
}

impl ManagedNeighbours {
    /// A neighbours in this network, which adopts what an earlier one has left.
    #[must_use]
    pub fn new(network: &Network) -> Self {
        Self {
            orders: network.orders.clone(),
            shared: Arc::clone(&network.shared),
            asked: HashMap::new(),
        }
    }

    /// Keeps exactly these neighbours (interface index and address) resolved from now on.
    ///
    /// Entries that others made permanent, or that a control plane put there, are left alone.
    /// What is kept already costs nothing, so call it after every change of the neighbours and
    /// every [`MANAGE_INTERVAL`]. An empty set releases everything; released entries live on as
    /// ordinary ones until the kernel collects them.
    ///
    /// # Errors
    ///
    /// [`Error::Neighbours`] if some cannot be kept; the others are.
    pub async fn keep(&mut self, wanted: &HashSet<(u32, IpAddr)>) -> Result<(), Error> {
        let now = Instant::now();
        let (ask, release) = self.plan(wanted, now);
        let mut failures = Vec::new();
        for key in ask {
            match self.orders.give(request(key, true), NLM_F_CREATE).await {
                Ok(()) => drop(self.asked.insert(key, now)),
                Err(error) => failures.push((key.1, error)),
            }
        }
        for key in release {
            match self.orders.give(request(key, false), 0).await {
                Err(error) if !is_gone(&error) => failures.push((key.1, error)),
                _ => drop(self.asked.remove(&key)),
            }
        }
        let failed = failures.len();
        match failures.into_iter().next() {
            Some((first, source)) => Err(Error::Neighbours { failed, first, source }),
            None => Ok(()),
        }
    }

    /// What to ask for, and what to release.
    fn plan(
        &self,
        wanted: &HashSet<NeighbourKey>,
        now: Instant,
    ) -> (Vec<NeighbourKey>, Vec<NeighbourKey>) {
        let tables = self.shared.tables();
        let since = |key| self.asked.get(key).map(|&asked| now.duration_since(asked));
        let ask = wanted
            .iter()
            .filter(|key| is_due(tables.neighbours.get(key), since(key)))
            .copied()
            .collect();
        let ours = tables.neighbours.iter().filter(|(_, entry)| entry.managed && entry.ours);
        let release = ours
            .map(|(key, _)| key)
            .chain(self.asked.keys())
            .filter(|key| !wanted.contains(key))
            // The administrator may have made it permanent since.
            .filter(|key| tables.neighbours.get(key).is_none_or(|entry| !entry.fixed))
            .copied()
            .collect::<HashSet<_>>();
        (ask, release.into_iter().collect())
    }
}

/// Whether a wanted neighbour must be asked for, `since` having passed since the last time.
fn is_due(entry: Option<&Neighbour>, since: Option<Duration>) -> bool {
    match (entry, since) {
        (Some(entry), _) if entry.managed || entry.fixed => false,
        (_, None) => true,
        // Swept away, by the administrator or because the link was down.
        (None, Some(since)) => since >= SETTLE,
        // A kernel that ignores the flag.
        (Some(_), Some(since)) => since >= MANAGE_INTERVAL,
    }
}

/// The entry, or its interface, does not exist.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// With `NTF_USE` the kernel leaves the entry's MAC and state as they are; without the managed
/// flag it takes that flag away.
fn request((ifindex, address): NeighbourKey, managed: bool) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.ifindex = ifindex;
    message.header.flags = NeighbourFlags::Use;
    message.attributes.push(NeighbourAttribute::Destination(address.into()));
    message.attributes.push(NeighbourAttribute::Protocol(RouteProtocol::Other(OWNER)));
    if managed {
        message.attributes.push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
    }
    RouteNetlinkMessage::NewNeighbour(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_a_wanted_neighbour_when_planned_then_it_is_asked_for_only_where_that_helps() {
        let plain = Neighbour { mac: None, managed: false, ours: true, fixed: false };
        let managed = Neighbour { managed: true, ..plain };
        let fixed = Neighbour { fixed: true, ..plain };
        let recently = Some(Duration::from_millis(10));
        let cases = [
            ("unknown", None, None, true),
            ("asked for, and the answer is on its way", None, recently, false),
            ("swept away", None, Some(SETTLE), true),
            ("ordinary", Some(plain), None, true),
            ("asked for, flag ignored", Some(plain), recently, false),
            ("asked for long ago, flag ignored", Some(plain), Some(MANAGE_INTERVAL), true),
            ("managed", Some(managed), Some(MANAGE_INTERVAL), false),
            ("permanent", Some(fixed), None, false),
        ];
        for (case, entry, since, expected) in cases {
            assert_eq!(is_due(entry.as_ref(), since), expected, "{case}");
        }
    }
}
