//! The kernel's network as the datapath needs it: interfaces, next hops, and which host answers for a VIP.
//!
//! The kernel's routing and neighbour tables are the truth. [`Network`] follows them by netlink and
//! never decides by itself where a packet goes; it only knows what the kernel would do.
//!
//! ```text
//!  kernel ──multicast──► monitor ──► Tables (links, neighbours) ──┐
//!    ▲                      └──────► NetworkChange ──► agent      ├──► resolve ──► NextHop
//!    └──── RTM_GETROUTE, once per address and state of routing ───┘
//! ```

use std::{
    collections::HashSet,
    io,
    net::IpAddr,
    sync::{Arc, Mutex},
};

use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage, LinkXdp, XdpAttached},
};
use tokio::task::AbortHandle;

mod announce;
mod ask;
mod batch;
mod challenge_ack;
mod claims;
mod defence;
mod forwarding;
mod ingress;
#[cfg(test)]
mod kernel_tests;
mod managed_neigh;
mod monitor;

mod resolve;
mod rtnl;
mod tables;

pub use announce::{Announced, Announcers, HostAddress, Silence, VipState, Wire};
pub use challenge_ack::{ConnectionEnds, send_challenge_acks};
pub use claims::{Claim, ClaimListener};
pub use defence::Defence;
pub use forwarding::{forwarding_problems, local_source_problems};
pub use ingress::Ingress;
pub use managed_neigh::{MANAGE_INTERVAL, ManagedNeighbours};

pub use resolve::{NextHop, Unreachable};
#[cfg(feature = "fuzzing")]
pub use tables::fuzz_messages;
pub use tables::{Interface, Mac, NetworkChange};

/// Marks what this program writes into the kernel's tables, so that its next run knows its own.
///
/// It stands where the kernel records who made an entry: `IFA_PROTO` of addresses, `NDA_PROTOCOL`
/// of neighbours; `ip` shows it as `proto 0x5b` or `proto 91`.
const OWNER: u8 = 0x5b;

/// Why the kernel's network could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No netlink socket, or not the rights that it needs.
    #[error("cannot follow the kernel's network by netlink")]
    Open(#[source] io::Error),
    /// A table could not be read.
    #[error("cannot read the kernel's table of {table}")]
    Dump {
        /// Which table.
        table: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A route look-up failed for another reason than that there is no route.
    #[error("cannot ask the kernel for the route to {address}")]
    Route {
        /// Where to.
        address: IpAddr,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Some neighbours cannot be kept; the others are.
    #[error(
        "{failed} neighbours cannot be kept resolved, first {first}; if the table is full, raise \
         net.ipv4.neigh.default.gc_thresh3 and net.ipv6.neigh.default.gc_thresh3"
    )]
    Neighbours {
        /// How many.
        failed: usize,
        /// The first of them.
        first: IpAddr,
        /// The kernel's answer for the first.
        #[source]
        source: io::Error,
    },
    /// Some VIPs cannot be added or removed; the others are.
    #[error("cannot {action} VIP {address} on interface {interface}")]
    Vip {
        /// `add` or `remove`.
        action: &'static str,
        /// The VIP.
        address: IpAddr,
        /// The interface's name, or its index if it has none any more.
        interface: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// VIPs need an interface to live on.
    #[error("no interface to hold the VIPs")]
    NoInterface,
}

/// The kernel's network in the namespace of the thread that opened it.
///
/// Must be opened and used in a Tokio runtime. Dropping it ends its background tasks.
#[derive(Debug)]
pub struct Network {
    rtnl: rtnl::Rtnl,
    orders: rtnl::Orders,
    batch: Arc<batch::Batch>,
    shared: Arc<monitor::Shared>,
    routes: Mutex<resolve::RouteCache>,
    tasks: [AbortHandle; 3],
}

impl Network {
    /// Reads the kernel's tables and starts to follow them.
    ///
    /// # Errors
    ///
    /// [`Error::Open`] or [`Error::Dump`].
    pub async fn open() -> Result<Self, Error> {
        let batch = Arc::new(batch::Batch::open().map_err(Error::Open)?);
        let (rtnl, questions) = rtnl::Rtnl::open().map_err(Error::Open)?;
        let (orders, given) = rtnl::Orders::open().map_err(Error::Open)?;
        match monitor::start(&rtnl).await {
            Ok((shared, events)) => {
                let tasks = [questions, given, events.abort_handle()];
                Ok(Self { rtnl, orders, batch, shared, routes: Mutex::default(), tasks })
            }
            Err(error) => {
                questions.abort();
                given.abort();
                Err(error)
            }
        }
    }

    /// Waits until something changed since the last call, and says what.
    ///
    /// Everything that arrived in between comes in one answer, so a slow caller misses nothing.
    /// Meant for one caller at a time. Cancelling it loses nothing.
    pub async fn changed(&self) -> NetworkChange {
        self.shared.changed().await
    }

    /// The interface of this name as it is now, if there is one.
    #[must_use]
    pub fn interface(&self, name: &str) -> Option<Interface> {
        self.shared.tables().interfaces.values().find(|i| i.name == name).cloned()
    }

    /// The MAC addresses of all interfaces of this host.
    #[must_use]
    pub fn own_macs(&self) -> HashSet<Mac> {
        self.shared.tables().interfaces.values().map(|interface| interface.mac).collect()
    }

    /// The interface of this index as it is now, if there is one.
    #[must_use]
    pub fn interface_by_index(&self, index: u32) -> Option<Interface> {
        self.shared.tables().interfaces.get(&index).cloned()
    }

    /// The XDP program on an interface, ours or another; `None`: there is none.
    ///
    /// Asks the kernel each time, because attaching through a BPF link sends no event.
    ///
    /// # Errors
    ///
    /// [`Error::Dump`], also when the interface is gone.
    pub async fn xdp(&self, index: u32) -> Result<Option<AttachedXdp>, Error> {
        let mut question = LinkMessage::default();
        question.header.index = index;
        let answers = self
            .rtnl
            .ask(RouteNetlinkMessage::GetLink(question), 0)
            .await
            .map_err(|source| Error::Dump { table: "interfaces", source })?;
        Ok(answers.iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => link.attributes.iter().find_map(attached_xdp),
            _ => None,
        }))
    }
}

/// An XDP program on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachedXdp {
    /// Its id.
    pub program: u32,
    /// [`NATIVE`] or [`GENERIC`].
    pub mode: &'static str,
}

/// In the driver.
pub const NATIVE: &str = "native";
/// In the kernel's stack.
pub const GENERIC: &str = "generic";

impl Drop for Network {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn attached_xdp(attribute: &LinkAttribute) -> Option<AttachedXdp> {
    let LinkAttribute::Xdp(xdp) = attribute else { return None };
    let program = xdp.iter().find_map(|part| match part {
        LinkXdp::ProgId(id) if *id != 0 => Some(*id),
        _ => None,
    })?;
    let is_generic =
        xdp.iter().any(|part| matches!(part, LinkXdp::Attached(XdpAttached::SocketBuffer)));
    Some(AttachedXdp { program, mode: if is_generic { GENERIC } else { NATIVE } })
}
