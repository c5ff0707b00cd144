//! A packet socket that only receives, and only what its filter lets through.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, RawFd},
};

use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, SockFilter, Socket, Type};

use crate::rights::RAW_SOCKET;

#[derive(Debug)]
pub(super) struct PacketSocket(Socket);

impl PacketSocket {
    /// Receives the frames of an Ethernet protocol from all interfaces.
    pub(super) fn open(protocol: i32, filter: &[SockFilter]) -> io::Result<Self> {
        // Protocol 0 receives nothing, so nothing comes ahead of the filter.
        let nothing = Some(Protocol::from(0));
        let socket = RAW_SOCKET.during(|| Socket::new(Domain::PACKET, Type::RAW, nothing))?;
        socket.set_nonblocking(true)?;
        socket.attach_filter(filter)?;
        let protocol = u16::try_from(protocol).map_err(io::Error::other)?;
        socket.bind(&frames_of(protocol))?;
        Ok(Self(socket))
    }

    pub(super) fn set_filter(&self, filter: &[SockFilter]) -> io::Result<()> {
        self.0.attach_filter(filter)
    }

    /// Length of the next frame, and the interface that it came by.
    pub(super) fn receive(&self, frame: &mut [u8]) -> io::Result<(usize, u32)> {
        // SAFETY: `recv_from` writes initialized bytes only.
        let frame = unsafe { &mut *(std::ptr::from_mut(frame) as *mut [MaybeUninit<u8>]) };
        let (length, from) = self.0.recv_from(frame)?;
        Ok((length, interface_of(from)))
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn frames_of(protocol: u16) -> SockAddr {
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: `sockaddr_ll` is a socket address type, and plain integers throughout.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as libc::sa_family_t;
    address.sll_protocol = protocol.to_be();
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the storage holds a `sockaddr_ll` of this length, all of it initialized.
    unsafe { SockAddr::new(storage, length) }
}

fn interface_of(from: SockAddr) -> u32 {
    let mut storage = from.as_storage();
    // SAFETY: `sockaddr_ll` is plain integers throughout, and smaller than the storage.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    u32::try_from(address.sll_ifindex).unwrap_or_default()
}
