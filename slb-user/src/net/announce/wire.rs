//! Sends whole Ethernet frames.

use std::io;

use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::rights::RAW_SOCKET;

/// A packet socket that only sends.
#[derive(Debug)]
pub(super) struct Wire(Socket);

impl Wire {
    /// Needs `CAP_NET_RAW`.
    pub(super) fn open() -> io::Result<Self> {
        // Protocol 0 receives nothing.
        let protocol = Some(Protocol::from(0));
        let socket = RAW_SOCKET.during(|| Socket::new(Domain::PACKET, Type::RAW, protocol))?;
        // A link that does not drain its queue must not hold up the agent.
        socket.set_nonblocking(true)?;
        Ok(Self(socket))
    }

    /// Sends a frame out of an interface.
    pub(super) fn send(&self, index: u32, frame: &[u8]) -> io::Result<()> {
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
