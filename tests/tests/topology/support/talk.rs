//! One conversation from a chosen source port, request by request.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use slb_lab::Host;
use socket2::{Domain, SockRef, Socket, Type};

/// A kept connection with one of the lab's HTTP servers.
pub(crate) struct Talk {
    stream: TcpStream,
}

impl Talk {
    /// Connects from `port` of `host`; nothing may take longer than `limit`.
    pub(crate) fn begin(
        host: &Host,
        port: u16,
        to: SocketAddr,
        limit: Duration,
    ) -> io::Result<Self> {
        host.netns
            .run(|| {
                let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
                socket.set_reuse_address(true)?;
                socket.bind(&source(host, port, to).into())?;
                socket.connect_timeout(&to.into(), limit)?;
                let stream = TcpStream::from(socket);
                stream.set_read_timeout(Some(limit))?;
                stream.set_nodelay(true)?;
                Ok(Self { stream })
            })
            .unwrap()
    }

    /// Who is at the other end.
    pub(crate) fn ask(&mut self) -> io::Result<String> {
        self.stream.write_all(b"GET / HTTP/1.1\r\nhost: lab\r\n\r\n")?;
        let mut response = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => response.extend_from_slice(&buffer[..n]),
            }
            let text = std::str::from_utf8(&response).unwrap();
            // The name is the body as well as the header.
            if let Some((head, body)) = text.split_once("\r\n\r\n")
                && let Some(name) = head.lines().find_map(|line| line.strip_prefix("x-backend: "))
                && body.len() == name.len()
            {
                assert_eq!(body, name);
                return Ok(body.to_owned());
            }
        }
    }

    /// Ends it by a reset instead of a close.
    pub(crate) fn reset(self) {
        SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).unwrap();
    }
}

/// A connection that has been asked for, and may not come.
#[derive(Debug)]
pub(crate) struct Attempt {
    socket: Socket,
}

impl Attempt {
    /// Sends a SYN from `port` of `host`, which may be that of other connections as well.
    pub(crate) fn begin(host: &Host, port: u16, to: SocketAddr) -> Self {
        let begin = || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.set_nonblocking(true)?;
            socket.bind(&source(host, port, to).into())?;
            match socket.connect(&to.into()) {
                Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
                _ => Ok(Self { socket }),
            }
        };
        host.netns.run(begin).unwrap().unwrap()
    }

    /// Whether the other end has answered.
    pub(crate) fn is_connected(&self) -> bool {
        self.socket.peer_addr().is_ok()
    }
}

/// A UDP socket at `port` of `host` that can talk to anybody of the family of `to`.
pub(crate) fn datagrams(host: &Host, port: u16, to: SocketAddr, limit: Duration) -> UdpSocket {
    host.netns
        .run(|| {
            let socket = UdpSocket::bind(source(host, port, to))?;
            socket.set_read_timeout(Some(limit))?;
            io::Result::Ok(socket)
        })
        .unwrap()
        .unwrap()
}

/// Who answers at `to`, which also has to be where the answer comes from.
pub(crate) fn ask(socket: &UdpSocket, to: SocketAddr, payload: &str) -> io::Result<String> {
    socket.send_to(payload.as_bytes(), to)?;
    let mut buffer = [0; 256];
    let (n, from) = socket.recv_from(&mut buffer)?;
    let answer = std::str::from_utf8(&buffer[..n]).unwrap();
    match answer.split_once(' ') {
        Some((name, echoed)) if (from, echoed) == (to, payload) => Ok(name.to_owned()),
        _ => Err(io::Error::other(format!("asked {to} {payload:?}, {from} said {answer:?}"))),
    }
}

fn source(host: &Host, port: u16, to: SocketAddr) -> SocketAddr {
    let address: IpAddr = if to.is_ipv4() { host.v4.into() } else { host.v6.into() };
    SocketAddr::new(address, port)
}
