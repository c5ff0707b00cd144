//! Makes the network send the VIPs' packets to this host: one [`Announcer`] for each way to do so.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
};

use futures_util::future::BoxFuture;
use rtnetlink::packet_route::{RouteNetlinkMessage, address::AddressMessage};

use self::{arp::ArpAnnouncer, none::NoAnnouncer, plan::Held};
use super::{Error, Interface, Network, rtnl::Rtnl};
use crate::config::Announce;

mod arp;
pub(in crate::net) mod frames;
mod none;
mod plan;
mod wire;

pub use wire::Wire;

/// One way to make the network send the VIPs' packets to this host.
pub(super) trait Announcer: fmt::Debug + Send {
    /// Announces exactly these VIPs, on these interfaces, and withdraws others.
    ///
    /// Does only what is not done already, so call it again, with interfaces as they are now, when links or addresses
    /// have changed. A VIP whose announcement could not be sent is [`VipState::Silent`]; the next call tries again.
    ///
    /// # Errors
    ///
    /// [`Error::Vip`] for the first VIP that could not be added or removed, after trying all;
    /// [`Error::Dump`] or [`Error::NoInterface`].
    fn announce<'a>(
        &'a mut self,
        vips: &'a [IpAddr],
        interfaces: &'a [Interface],
    ) -> BoxFuture<'a, Result<Announced, Error>>;

    /// Withdraws every VIP that this program has announced in this way, in this run or an earlier one, and returns them.
    ///
    /// # Errors
    ///
    /// [`Error::Dump`], or [`Error::Vip`] for the first that could not be removed, after trying all.
    fn withdraw(&mut self) -> BoxFuture<'_, Result<Vec<IpAddr>, Error>>;

    /// The VIPs that this program has announced, each with the interface: it may defend them against other hosts.
    fn places(&self) -> Vec<(IpAddr, u32)>;

    /// How far the announcement of a VIP is.
    fn state(&self, vip: IpAddr) -> VipState;
}

/// What [`Announcers::announce`] has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Announced {
    /// VIPs that were added to an interface.
    pub added: Vec<IpAddr>,
    /// Addresses of this program that were removed; a VIP that moved is in both.
    pub removed: Vec<IpAddr>,
    /// VIPs that were announced on their links.
    pub announced: Vec<IpAddr>,
}

/// How far the announcement of a VIP is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VipState {
    /// This host has not announced it, or has withdrawn it.
    Withdrawn,
    /// The network knows that it is here.
    Announced,
    /// This host answers for it, but the network has not been told.
    Silent(Silence),
    /// Announcing it is left to another program.
    Unmanaged,
}

/// Why a VIP is held, and not announced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Silence {
    /// There are no neighbours to tell.
    #[error("its interface is not Ethernet")]
    NotEthernet,
    /// It is announced once the link is up.
    #[error("interface {interface} is down")]
    LinkDown {
        /// The interface's name.
        interface: String,
    },
    /// The announcement could not be sent.
    #[error("cannot send on interface {interface}: {error}")]
    Failed {
        /// The interface's name.
        interface: String,
        /// The system's answer.
        error: String,
    },
}

/// All ways to announce VIPs, one of which is in use.
#[derive(Debug)]
pub struct Announcers {
    all: Vec<(Announce, Box<dyn Announcer>)>,
    in_use: Option<Announce>,
}

impl Announcers {
    /// Announces nothing yet.
    #[must_use]
    pub fn new(network: &Network) -> Self {
        let all = Announce::WORDS.iter().map(|&(_, way)| (way, announcer(way, network)));
        Self { all: all.collect(), in_use: None }
    }

    /// Announces exactly these VIPs in one way. What was announced in another way is withdrawn first, also if an earlier
    /// run of the agent has announced it.
    ///
    /// # Errors
    ///
    /// [`Error::Vip`] for the first VIP that could not be added or removed, after trying all;
    /// [`Error::Dump`] or [`Error::NoInterface`].
    pub async fn announce(
        &mut self,
        way: Announce,
        vips: &[IpAddr],
        interfaces: &[Interface],
    ) -> Result<Announced, Error> {
        let mut withdrawn = Vec::new();
        if self.in_use != Some(way) {
            for (_, announcer) in self.all.iter_mut().filter(|(other, _)| *other != way) {
                withdrawn.extend(announcer.withdraw().await?);
            }
            self.in_use = Some(way);
        }
        let mut done = Announced::default();
        for (_, announcer) in self.all.iter_mut().filter(|(other, _)| *other == way) {
            done = announcer.announce(vips, interfaces).await?;
        }
        done.removed.splice(0..0, withdrawn);
        Ok(done)
    }

    /// Withdraws every VIP that this program has announced in any way, and returns them.
    ///
    /// # Errors
    ///
    /// [`Error::Dump`], or [`Error::Vip`] for the first that could not be removed, after trying all.
    pub async fn withdraw(&mut self) -> Result<Vec<IpAddr>, Error> {
        let mut withdrawn = Vec::new();
        for (_, announcer) in &mut self.all {
            withdrawn.extend(announcer.withdraw().await?);
        }
        Ok(withdrawn)
    }

    /// The VIPs that this program has announced, each with the interface's index.
    #[must_use]
    pub fn places(&self) -> Vec<(IpAddr, u32)> {
        let in_use = self.all.iter().find(|(way, _)| self.in_use == Some(*way));
        in_use.map_or_else(Vec::new, |(_, announcer)| announcer.places())
    }

    /// How far the announcement of a VIP is.
    #[must_use]
    pub fn state(&self, vip: IpAddr) -> VipState {
        let in_use = self.all.iter().find(|(way, _)| self.in_use == Some(*way));
        in_use.map_or(VipState::Withdrawn, |(_, announcer)| announcer.state(vip))
    }
}

fn announcer(way: Announce, network: &Network) -> Box<dyn Announcer> {
    match way {
        Announce::Arp => Box::new(ArpAnnouncer::new(network)),
        Announce::None => Box::new(NoAnnouncer),
    }
}

/// All addresses of this host.
async fn held(rtnl: &Rtnl) -> Result<Vec<Held>, Error> {
    let question = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let answers =
        rtnl.dump(question).await.map_err(|source| Error::Dump { table: "addresses", source })?;
    Ok(answers
        .iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewAddress(message) => Held::parse(message),
            _ => None,
        })
        .collect())
}

/// An address of this host, and its connected subnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostAddress {
    /// Index of the interface that it is on.
    pub ifindex: u32,
    /// The address.
    pub address: IpAddr,
    /// An address of the subnet: the peer's on point-to-point links.
    pub network: IpAddr,
    /// How many bits the addresses of the subnet have in common.
    pub prefix_len: u8,
    /// The subnet's broadcast address, if it was given one; the last address is one anyway.
    pub broadcast: Option<Ipv4Addr>,
}

impl Network {
    /// The addresses of this host, VIPs included.
    ///
    /// # Errors
    ///
    /// [`Error::Dump`].
    pub async fn addresses(&self) -> Result<Vec<HostAddress>, Error> {
        let held = held(&self.rtnl).await?.into_iter();
        let addresses = held.map(|held| {
            let Held { index: ifindex, address, network, prefix_len, broadcast, own: _ } = held;
            HostAddress { ifindex, address, network, prefix_len, broadcast }
        });
        Ok(addresses.collect())
    }
}
