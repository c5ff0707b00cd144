//! Sends whole Ethernet frames.

use std::{io, net::IpAddr};

use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use super::frames::{Arp, gratuitous_arp, unsolicited_advertisement};
use crate::{
    net::{Interface, forwarding},
    rights::RAW_SOCKET,
};

/// A packet socket that only sends.
#[derive(Debug)]
pub struct Wire(Socket);

impl Wire {
    /// Needs `CAP_NET_RAW`.
    ///
    /// # Errors
    ///
    /// The system refuses the socket.
    pub fn open() -> io::Result<Self> {
        // Protocol 0 receives nothing.
        let protocol = Some(Protocol::from(0));
        let socket = RAW_SOCKET.during(|| Socket::new(Domain::PACKET, Type::RAW, protocol))?;
        // A link that does not drain its queue must not hold up the agent.
        socket.set_nonblocking(true)?;
        Ok(Self(socket))
    }

    /// Tells the hosts on the link of an interface once that a VIP is there.
    ///
    /// # Errors
    ///
    /// A frame could not be sent.
    pub fn announce(&self, vip: IpAddr, interface: &Interface) -> io::Result<()> {
        let mac = interface.mac;
        let frames = match vip {
            IpAddr::V4(vip) => {
                [Arp::Request, Arp::Reply].map(|form| gratuitous_arp(form, mac, vip)).to_vec()
            }
            IpAddr::V6(vip) => {
                let router = forwarding::is_router(&interface.name);
                vec![unsolicited_advertisement(mac, vip, router)]
            }
        };
        frames.iter().try_for_each(|frame| self.send(interface.index, frame))
    }

    /// Sends a frame out of an interface.
    pub(in crate::net) fn send(&self, index: u32, frame: &[u8]) -> io::Result<()> {
        self.0.send_to(frame, &out_of(index)?).map(drop)
    }
}

fn out_of(index: u32) -> io::Result<SockAddr> {
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: `sockaddr_ll` is a socket address type, and plain integers throughout.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as libc::sa_family_t;
    address.sll_ifindex = i32::try_from(index).map_err(io::Error::other)?;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the storage holds a `sockaddr_ll` of this length, all of it initialized.
    Ok(unsafe { SockAddr::new(storage, length) })
}
