//! Follows the kernel's multicast events.
//!
//! Tables are up to date as soon as an event is read; the agent is told a little later, so that a
//! burst (a routing daemon, an interface that goes down with a thousand neighbours) wakes it once.
//! Lost events are no error: the tables are read anew and everything counts as changed.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::FutureExt;
use rtnetlink::{
    MulticastGroup,
    packet_core::{NetlinkBuffer, NetlinkMessage, NetlinkPayload},
    packet_route::{RouteNetlinkMessage, link::LinkMessage, neighbour::NeighbourMessage},
    sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE},
};
use tokio::{
    sync::Notify,
    task::{JoinHandle, unconstrained},
    time::{Instant, sleep, timeout_at},
};
use tracing::{debug, warn};

use super::{
    Error,
    rtnl::{Rtnl, force_receive_buffer},
    tables::{NetworkChange, Tables},
};

/// How long a change waits for others to join it.
const DEBOUNCE: Duration = Duration::from_millis(5);

/// Between attempts when the kernel's tables cannot be read.
const RETRY: Duration = Duration::from_secs(1);

/// Room for events that arrive while the agent is busy, in bytes.
const RECEIVE_BUFFER: usize = 8 << 20;

/// No event is larger: the kernel limits netlink messages to 32 KiB.
const LARGEST_MESSAGE: usize = 64 << 10;

const GROUPS: [MulticastGroup; 9] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
    MulticastGroup::Nexthop,
];

/// What the monitor shares with the rest.
#[derive(Debug, Default)]
pub(super) struct Shared {
    state: Mutex<State>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct State {
    tables: Tables,
    routing: u64,
    untold: NetworkChange,
}

/// [`Tables`], locked.
pub(super) struct TablesGuard<'a>(MutexGuard<'a, State>);

impl std::ops::Deref for TablesGuard<'_> {
    type Target = Tables;

    fn deref(&self) -> &Tables {
        &self.0.tables
    }
}

impl Shared {
    /// Links and neighbours now. Never hold it across an `await`.
    pub(super) fn tables(&self) -> TablesGuard<'_> {
        TablesGuard(self.lock())
    }

    /// Grows whenever a route look-up could have another answer than before.
    ///
    /// Read it *before* a look-up: a change during the look-up then outdates its answer.
    pub(super) fn routing(&self) -> u64 {
        self.lock().routing
    }

    pub(super) async fn changed(&self) -> NetworkChange {
        loop {
            let untold = std::mem::take(&mut self.lock().untold);
            if untold.any() {
                return untold;
            }
            // A wake-up between the two lines above and this one is kept for us.
            self.wake.notified().await;
        }
    }

    fn tell(&self, change: NetworkChange) {
        self.lock().untold.merge(change);
        self.wake.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No critical section can leave the state half-written.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the tables and starts the task that keeps them up to date.
pub(super) async fn start(rtnl: &Rtnl) -> Result<(Arc<Shared>, JoinHandle<()>), Error> {
    // Listen first, read then: what changes in between arrives as an event.
    let socket = listen().map_err(Error::Open)?;
    let shared = Arc::new(Shared::default());
    let monitor = Monitor { rtnl: rtnl.clone(), shared: Arc::clone(&shared), socket };
    monitor.read_tables().await?;
    Ok((shared, tokio::spawn(monitor.run())))
}

fn listen() -> io::Result<TokioSocket> {
    let mut listener = TokioSocket::new(NETLINK_ROUTE)?;
    let socket = listener.socket_mut();
    socket.bind(&SocketAddr::new(0, 0))?;
    for group in GROUPS {
        socket.add_membership(group as u32)?;
    }
    if let Err(error) = force_receive_buffer(socket, RECEIVE_BUFFER) {
        debug!(%error, "the netlink socket keeps its default receive buffer");
    }
    Ok(listener)
}

struct Monitor {
    rtnl: Rtnl,
    shared: Arc<Shared>,
    socket: TokioSocket,
}

impl Monitor {
    async fn run(self) {
        let mut buffer = Vec::with_capacity(LARGEST_MESSAGE);
        let mut untold = NetworkChange::default();
        let mut due: Option<Instant> = None;
        loop {
            let received = match due {
                None => self.receive(&mut buffer).await,
                Some(due) => match timeout_at(due, self.receive(&mut buffer)).await {
                    Ok(received) => received,
                    Err(_) => Ok(()),
                },
            };
            let applied = received.and_then(|()| self.apply(&buffer));
            match applied {
                Ok(change) => untold.merge(change),
                Err(error) => {
                    warn!(%error, "network events were lost; reading the kernel's tables anew");
                    self.recover(&mut buffer).await;
                    untold = NetworkChange::EVERYTHING;
                }
            }
            // A steady stream of events must not keep the agent waiting: look at the clock even
            // though there is more to read.
            let now = Instant::now();
            if due.is_some_and(|due| due <= now) {
                self.shared.tell(std::mem::take(&mut untold));
                due = None;
            } else if untold.any() && due.is_none() {
                due = Some(now + DEBOUNCE);
            }
        }
    }

    /// Replaces the content of `buffer` by the next datagram; empty if the wait is cancelled.
    async fn receive(&self, buffer: &mut Vec<u8>) -> io::Result<()> {
        buffer.clear();
        self.socket.recv_from(buffer).await.map(drop)
    }

    fn apply(&self, datagram: &[u8]) -> io::Result<NetworkChange> {
        let mut change = NetworkChange::default();
        let mut rest = datagram;
        while !rest.is_empty() {
            let event = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
            let length = event.length() as usize;
            change.merge(self.apply_event(event.message_type(), &rest[..length])?);
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(change)
    }

    fn apply_event(&self, kind: u16, event: &[u8]) -> io::Result<NetworkChange> {
        let none = NetworkChange::default();
        // Of most events it is enough to know that they happened: a routing daemon can send
        // a million of them.
        let happened = match kind {
            libc::RTM_NEWROUTE
            | libc::RTM_DELROUTE
            | libc::RTM_NEWRULE
            | libc::RTM_DELRULE
            | RTM_NEWNEXTHOP
            | RTM_DELNEXTHOP
            | RTM_NEWNEXTHOPBUCKET => NetworkChange { routes: true, ..none },
            libc::RTM_NEWADDR | libc::RTM_DELADDR => NetworkChange { addresses: true, ..none },
            _ => none,
        };
        let tabled = matches!(
            kind,
            libc::RTM_NEWLINK | libc::RTM_DELLINK | libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH
        );
        let message = tabled
            .then(|| NetlinkMessage::<RouteNetlinkMessage>::deserialize(event))
            .transpose()
            .map_err(io::Error::other)?;

        let mut state = self.shared.lock();
        let change = match message.map(|message| message.payload) {
            Some(NetlinkPayload::InnerMessage(message)) => state.tables.apply(&message),
            _ => happened,
        };
        state.routing += u64::from(change.outdates_routes());
        Ok(change)
    }

    async fn recover(&self, buffer: &mut Vec<u8>) {
        // What is queued is older than the loss: read after the tables, it would undo them. And
        // the kernel sends nothing more before the queue is empty.
        let mut queued = true;
        while queued {
            queued = unconstrained(self.receive(buffer)).now_or_never().is_some();
        }
        while let Err(error) = self.read_tables().await {
            warn!(error = &error as &dyn std::error::Error, "trying again");
            sleep(RETRY).await;
        }
    }

    async fn read_tables(&self) -> Result<(), Error> {
        let questions = [
            ("interfaces", RouteNetlinkMessage::GetLink(LinkMessage::default())),
            ("neighbours", RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default())),
        ];
        let mut tables = Tables::default();
        for (table, question) in questions {
            let answers =
                self.rtnl.dump(question).await.map_err(|source| Error::Dump { table, source })?;
            for answer in &answers {
                tables.apply(answer);
            }
        }
        let mut state = self.shared.lock();
        state.tables = tables;
        state.routing += 1;
        Ok(())
    }
}

// Not in `libc`; from <linux/rtnetlink.h>.
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;
const RTM_NEWNEXTHOPBUCKET: u16 = 116;
