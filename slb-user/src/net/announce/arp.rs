//! Holds the VIPs as addresses of this host, and announces them on their links by gratuitous ARP and unsolicited neighbour
//! advertisements.
//!
//! An address that this program adds carries its mark ([`OWNER`]); an address without the mark was added by another
//! program and is never touched. (Kernels before 5.18 do not store the mark: there, only the process that added an address
//! removes it.)
//!
//! VIPs are for answering, not for sending: the kernel must never choose one as the source of its
//! own packets. IPv4 VIPs have scope `host`, which source selection skips for every other
//! destination; IPv6 VIPs are deprecated from the start (preferred lifetime 0), so any other
//! address of fitting scope wins. Neither brings a subnet route, and an IPv6 VIP answers at once:
//! duplicate detection would keep it silent for a second, and silent for good if the gateway that
//! had it before still does.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::IpAddr,
};

use futures_util::future::{BoxFuture, FutureExt as _};
use rtnetlink::{
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{
            AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, AddressScope,
            CacheInfo,
        },
    },
};
use tracing::warn;

use super::{
    Announced, Announcer, Silence, VipState,
    plan::{self, Held, host_prefix},
    wire::Wire,
};
use crate::net::{
    Error, Interface, Mac, Network, OWNER,
    rtnl::{Orders, Rtnl},
};

/// Announces by ARP and neighbour discovery.
#[derive(Debug)]
pub(super) struct ArpAnnouncer {
    rtnl: Rtnl,
    orders: Orders,
    /// For kernels that do not store the mark.
    added: HashSet<(IpAddr, u32)>,
    /// Where, and with which MAC, each VIP was announced last.
    told: HashMap<IpAddr, (u32, Mac)>,
    /// VIPs that are held, and not announced.
    silent: HashMap<IpAddr, Silence>,
    /// Opened when first needed, and kept: closing it waits for the kernel's packet receivers.
    wire: Option<Wire>,
}

impl Announcer for ArpAnnouncer {
    fn announce<'a>(
        &'a mut self,
        vips: &'a [IpAddr],
        interfaces: &'a [Interface],
    ) -> BoxFuture<'a, Result<Announced, Error>> {
        self.set(vips, interfaces).boxed()
    }

    fn withdraw(&mut self) -> BoxFuture<'_, Result<Vec<IpAddr>, Error>> {
        self.withdraw_all().boxed()
    }

    fn places(&self) -> Vec<(IpAddr, u32)> {
        self.told.iter().map(|(vip, (index, _))| (*vip, *index)).collect()
    }

    fn state(&self, vip: IpAddr) -> VipState {
        match self.silent.get(&vip) {
            Some(silence) => VipState::Silent(silence.clone()),
            None if self.told.contains_key(&vip) => VipState::Announced,
            None => VipState::Withdrawn,
        }
    }
}

impl ArpAnnouncer {
    /// An announcer in this network. It holds nothing yet, and has announced nothing.
    pub(super) fn new(network: &Network) -> Self {
        Self {
            rtnl: network.rtnl.clone(),
            orders: network.orders.clone(),
            added: HashSet::new(),
            told: HashMap::new(),
            silent: HashMap::new(),
            wire: None,
        }
    }

    /// Adds missing VIPs, removes others, and announces what the links have not been told: a VIP that is new, that has
    /// moved, whose interface has another MAC or was down. It also brings back IPv6 VIPs, which the kernel drops with the
    /// link.
    async fn set(&mut self, vips: &[IpAddr], interfaces: &[Interface]) -> Result<Announced, Error> {
        let plan = plan::plan(vips, interfaces, &self.held().await?)?;
        let name = |index: u32| {
            let known = interfaces.iter().find(|interface| interface.index == index);
            known.map_or_else(|| index.to_string(), |interface| interface.name.clone())
        };
        let mut done = Announced::default();
        let mut failure = None;
        for &(address, index) in &plan.add {
            match self.add(address, index).await {
                Ok(()) => done.added.push(address),
                Err(source) => {
                    let (action, interface) = ("add", name(index));
                    failure.get_or_insert(Error::Vip { action, address, interface, source });
                }
            }
        }
        for held in &plan.remove {
            match self.remove(held).await {
                Ok(()) => done.removed.push(held.address),
                Err(source) => {
                    let (action, interface) = ("remove", name(held.index));
                    let address = held.address;
                    failure.get_or_insert(Error::Vip { action, address, interface, source });
                }
            }
        }
        let missing = |vip| plan.add.iter().any(|add| add.0 == vip) && !done.added.contains(&vip);
        let places: Vec<_> = plan.places.iter().filter(|place| !missing(place.0)).collect();
        let is_held = |vip: &IpAddr| places.iter().any(|place| place.0 == *vip);
        self.told.retain(|vip, _| is_held(vip));
        self.silent.retain(|vip, _| is_held(vip));
        for &(vip, index) in places {
            let interface = interfaces.iter().find(|interface| interface.index == index);
            if let Some(interface) = interface
                && self.tell(vip, interface)
            {
                done.announced.push(vip);
            }
        }
        failure.map_or(Ok(done), Err)
    }

    /// Removes every address that carries this program's mark, on all interfaces, and returns them.
    async fn withdraw_all(&mut self) -> Result<Vec<IpAddr>, Error> {
        let mut withdrawn = Vec::new();
        let mut failure = None;
        for held in self.held().await?.iter().filter(|held| held.own) {
            match self.remove(held).await {
                Ok(()) => withdrawn.push(held.address),
                Err(source) => {
                    let (address, interface) = (held.address, held.index.to_string());
                    failure.get_or_insert(Error::Vip {
                        action: "remove",
                        address,
                        interface,
                        source,
                    });
                }
            }
        }
        self.told.clear();
        self.silent.clear();
        failure.map_or(Ok(withdrawn), Err)
    }

    /// All addresses of this host.
    async fn held(&self) -> Result<Vec<Held>, Error> {
        let mut held = super::held(&self.rtnl).await?;
        for held in &mut held {
            held.own |= held.prefix_len == host_prefix(held.address)
                && self.added.contains(&(held.address, held.index));
        }
        Ok(held)
    }

    async fn add(&mut self, vip: IpAddr, index: u32) -> io::Result<()> {
        let mut message = address_message(vip, index, host_prefix(vip));
        message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(OWNER)));
        if vip.is_ipv4() {
            message.header.scope = AddressScope::Host;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Noprefixroute));
        } else {
            let mut lifetimes = CacheInfo::default();
            lifetimes.ifa_valid = u32::MAX; // for ever
            lifetimes.ifa_preferred = 0;
            let flags = AddressFlags::Noprefixroute | AddressFlags::Nodad;
            message.attributes.push(AddressAttribute::CacheInfo(lifetimes));
            message.attributes.push(AddressAttribute::Flags(flags));
        }
        let order = RouteNetlinkMessage::NewAddress(message);
        self.orders.give(order, NLM_F_CREATE | NLM_F_EXCL).await?;
        self.added.insert((vip, index));
        Ok(())
    }

    async fn remove(&mut self, held: &Held) -> io::Result<()> {
        let message = address_message(held.address, held.index, held.prefix_len);
        match self.orders.give(RouteNetlinkMessage::DelAddress(message), 0).await {
            Err(error)
                if !matches!(
                    error.raw_os_error(),
                    Some(libc::EADDRNOTAVAIL | libc::ENODEV | libc::ENXIO)
                ) =>
            {
                Err(error)
            }
            // Gone is what was wanted.
            _ => {
                self.added.remove(&(held.address, held.index));
                Ok(())
            }
        }
    }

    /// Announces a VIP if that is due; says whether it has.
    fn tell(&mut self, vip: IpAddr, interface: &Interface) -> bool {
        let place = (interface.index, interface.mac);
        let is_able = interface.up && interface.is_ethernet;
        if is_able && self.told.get(&vip) == Some(&place) {
            return false;
        }
        self.told.remove(&vip);
        let silence = if !interface.is_ethernet {
            Silence::NotEthernet
        } else if !interface.up {
            Silence::LinkDown { interface: interface.name.clone() }
        } else if let Err(error) = self.send(vip, interface) {
            warn!(%vip, interface = interface.name, %error, "cannot announce the VIP");
            Silence::Failed { interface: interface.name.clone(), error: error.to_string() }
        } else {
            self.silent.remove(&vip);
            self.told.insert(vip, place);
            return true;
        };
        self.silent.insert(vip, silence);
        false
    }

    /// Sends one round of announcements.
    fn send(&mut self, vip: IpAddr, interface: &Interface) -> io::Result<()> {
        let wire = match self.wire.take() {
            Some(wire) => wire,
            None => Wire::open()?,
        };
        let wire = self.wire.insert(wire);
        wire.announce(vip, interface)
    }
}

fn address_message(address: IpAddr, index: u32, prefix_len: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family =
        if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.index = index;
    message.header.prefix_len = prefix_len;
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    message
}
