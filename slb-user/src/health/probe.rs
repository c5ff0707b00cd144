//! One probe: a question to a backend, and whether the answer was good.

use std::{
    fmt,
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::pin,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::{Request, client::conn::http1, header, http};
use hyper_util::rt::TokioIo;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, Interest},
    net::{TcpSocket, TcpStream, UdpSocket},
    time,
};

use super::bounded::Bounded;
use crate::config::{HealthCheck, HttpMethod, HttpProbe, ProbeKind, UdpProbe};

/// How long to wait for an ICMP error where no answer is expected.
///
/// It comes as fast as an answer would; waiting for the whole timeout, 10 s by default, would only
/// put off what is known by then.
const SILENCE: Duration = Duration::from_secs(1);

/// More than the header section of any sensible answer.
const HTTP_BUFFER: usize = 16 * 1024;

/// Header of the PROXY protocol, version 2, of a connection without a client (`LOCAL`).
const PROXY_LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

const USER_AGENT: &str = concat!("slb/", env!("CARGO_PKG_VERSION"));

/// Why a probe failed, in words for a table's cell.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// TCP: the port is closed.
    #[error("connection refused")]
    Refused,
    /// TCP: the other side ended the connection without an answer.
    #[error("connection closed without an answer")]
    Closed,
    /// The timeout passed.
    #[error("no answer within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
    /// The gateway knows no way to the backend, or its neighbour does not resolve.
    #[error("no route")]
    NoRoute,
    /// UDP: the port is closed.
    #[error("ICMP port unreachable")]
    PortUnreachable,
    /// UDP: there was an answer, but not the right one.
    #[error("answer did not contain {0:?}")]
    Answer(String),
    /// HTTP: a status that counts as failure.
    #[error("HTTP status {status}, expected {}", Expected(.expected))]
    Status {
        /// What came.
        status: u16,
        /// [`HttpProbe::expect`].
        expected: Vec<(u16, u16)>,
    },
    /// HTTP: the answer does not follow the protocol.
    #[error("bad HTTP answer: {0}")]
    Http(hyper::Error),
    /// HTTP: no end of the answer's head in sight.
    #[error("the HTTP answer has no status within {} KiB or {} reads", Bounded::<()>::BYTES >> 10, Bounded::<()>::READS)]
    TooLong,
    /// HTTP: no request can be made of the configured host and path.
    #[error("bad HTTP request: {0}")]
    Request(#[from] http::Error),
    /// Anything else that the sockets say.
    #[error(transparent)]
    Io(io::Error),
}

impl Failure {
    /// Whether it says nothing about the backend: the gateway itself lacked what a probe takes.
    #[must_use]
    pub fn is_local(&self) -> bool {
        let Self::Io(error) = self else { return false };
        // The last three: no local port is left.
        let local = [
            libc::EMFILE,
            libc::ENFILE,
            libc::ENOBUFS,
            libc::ENOMEM,
            libc::EADDRNOTAVAIL,
            libc::EADDRINUSE,
            libc::EAGAIN,
        ];
        error.raw_os_error().is_some_and(|code| local.contains(&code))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe => Self::Closed,
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Self::NoRoute,
            _ => Self::Io(error),
        }
    }
}

/// Probes `addr` once.
///
/// The answer comes after the check's timeout at the latest, connecting included. Cancel-safe: dropping the
/// future closes what it opened.
///
/// # Errors
///
/// The backend did not answer as `check` expects, or the gateway could not ask
/// ([`Failure::is_local`]).
pub async fn probe(check: &HealthCheck, addr: SocketAddr) -> Result<(), Failure> {
    let HealthCheck { probe: kind, timeout, proxy_header, .. } = check;
    let timeout = *timeout;
    let attempt = async {
        match kind {
            ProbeKind::Tcp => connect(addr, *proxy_header).await.map(drop),
            ProbeKind::Http(http) => ask_http(http, addr, *proxy_header).await,
            ProbeKind::Udp(udp) => ask_udp(udp, addr).await,
        }
    };
    let (patience, silence) = match kind {
        ProbeKind::Udp(UdpProbe { receive: None, .. }) => (timeout.min(SILENCE), Ok(())),
        _ => (timeout, Err(Failure::Timeout(timeout))),
    };
    time::timeout(patience, attempt).await.unwrap_or(silence)
}

/// A connection that ends with RST when it is dropped.
///
/// An orderly end would leave a socket in `TIME_WAIT` for each probe, tens of thousands with a few
/// thousand backends, and each holds a port of the gateway for a minute. It is set before
/// connecting, so that it holds whenever a probe is given up.
async fn connect(addr: SocketAddr, proxy_header: bool) -> Result<TcpStream, Failure> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_zero_linger()?;
    let mut stream = socket.connect(addr).await?;
    if proxy_header {
        stream.write_all(PROXY_LOCAL).await?;
    }
    Ok(stream)
}

async fn ask_http(probe: &HttpProbe, addr: SocketAddr, proxy_header: bool) -> Result<(), Failure> {
    talk_http(probe, addr, connect(addr, proxy_header).await?).await
}

/// Sends a request to `addr`, which `stream` leads to, and judges the answer.
async fn talk_http<S>(probe: &HttpProbe, addr: SocketAddr, stream: S) -> Result<(), Failure>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // Built anew from its parts: a scope id has no place in a `Host`.
    let authority = || SocketAddr::new(addr.ip(), addr.port()).to_string();
    let request = Request::builder()
        .method(match probe.method {
            HttpMethod::Head => http::Method::HEAD,
            HttpMethod::Get => http::Method::GET,
        })
        .uri(&probe.path)
        .header(header::HOST, probe.host.clone().unwrap_or_else(authority))
        .header(header::USER_AGENT, USER_AGENT)
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())?;

    let stream = TokioIo::new(Bounded::new(stream));
    let (mut sender, connection) =
        http1::Builder::new().max_buf_size(HTTP_BUFFER).handshake(stream).await.map_err(answer)?;
    let mut connection = pin!(connection);
    let mut response = pin!(sender.send_request(request));
    let response = tokio::select! {
        response = &mut response => response,
        // Its end settles the response, one way or the other.
        end = &mut connection => match end {
            Ok(()) => response.await,
            Err(error) => Err(error),
        },
    };
    // The body, however long, goes with the connection.
    let status = response.map_err(answer)?.status().as_u16();
    if probe.expect.iter().any(|&(first, last)| (first..=last).contains(&status)) {
        Ok(())
    } else {
        Err(Failure::Status { status, expected: probe.expect.clone() })
    }
}

/// Has a probe read `bytes` as its answer, for `tests/fuzz`.
#[cfg(feature = "fuzzing")]
pub fn fuzz_answer(bytes: &[u8]) {
    let probe = HttpProbe {
        method: HttpMethod::Get,
        path: "/".to_owned(),
        host: None,
        expect: vec![(200, 399)],
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let stream = tokio::io::join(bytes, tokio::io::sink());
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 80));
    let _ = runtime.block_on(talk_http(&probe, address, stream));
}

fn answer(error: hyper::Error) -> Failure {
    use std::error::Error as _;

    let io = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    match io {
        Some(io) if io.kind() == io::ErrorKind::FileTooLarge => Failure::TooLong,
        Some(io) if io.raw_os_error().is_some() => io::Error::from(io.kind()).into(),
        _ if error.is_incomplete_message() || error.is_closed() || error.is_canceled() => {
            Failure::Closed
        }
        _ => Failure::Http(error),
    }
}

async fn ask_udp(probe: &UdpProbe, addr: SocketAddr) -> Result<(), Failure> {
    let any: IpAddr =
        if addr.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    // Only a connected socket hears of ICMP errors.
    socket.connect(addr).await?;

    let answer =
        exchange(&socket, probe.send.as_bytes()).await.map_err(|error| match error.kind() {
            io::ErrorKind::ConnectionRefused => Failure::PortUnreachable,
            _ => error.into(),
        })?;
    match &probe.receive {
        Some(expected) if !contains(&answer, expected.as_bytes()) => {
            Err(Failure::Answer(expected.clone()))
        }
        _ => Ok(()),
    }
}

async fn exchange(socket: &UdpSocket, question: &[u8]) -> io::Result<Vec<u8>> {
    socket.send(question).await?;
    // An ICMP error does not make the socket readable, so `recv` would sleep through it.
    let interest = Interest::READABLE | Interest::ERROR;
    let receive = || {
        // Made only now: thousands of probes may be waiting.
        let mut answer = vec![0; usize::from(u16::MAX)];
        let length = (&*SockRef::from(socket)).read(&mut answer)?;
        answer.truncate(length);
        Ok(answer)
    };
    socket.async_io(interest, receive).await
}

fn contains(answer: &[u8], expected: &[u8]) -> bool {
    expected.is_empty() || answer.windows(expected.len()).any(|part| part == expected)
}

/// As the configuration writes them: `2xx, 301 or 400-403`.
struct Expected<'a>(&'a [(u16, u16)]);

impl fmt::Display for Expected<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, &(first, last)) in self.0.iter().enumerate() {
            match index {
                0 => {}
                _ if index + 1 == self.0.len() => f.write_str(" or ")?,
                _ => f.write_str(", ")?,
            }
            if first == last {
                write!(f, "{first}")?;
            } else if first % 100 == 0 && last == first + 99 {
                write!(f, "{}xx", first / 100)?;
            } else {
                write!(f, "{first}-{last}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
