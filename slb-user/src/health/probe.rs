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
    io::{AsyncWriteExt as _, Interest},
    net::{TcpSocket, TcpStream, UdpSocket},
    time,
};

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

    let stream = TokioIo::new(connect(addr, proxy_header).await?);
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

fn answer(error: hyper::Error) -> Failure {
    use std::error::Error as _;

    let io = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    match io {
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
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
        task::JoinHandle,
    };

    use super::*;

    /// Never reached, unless the test fails.
    const AMPLE: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(50);

    const V4: (&str, u16) = ("127.0.0.1", 0);

    fn http() -> HttpProbe {
        HttpProbe {
            method: HttpMethod::Head,
            path: "/healthz".into(),
            host: None,
            expect: vec![(200, 299), (300, 399)],
        }
    }

    fn udp(send: &str, receive: Option<&str>) -> ProbeKind {
        ProbeKind::Udp(UdpProbe { send: send.into(), receive: receive.map(Into::into) })
    }

    fn check(kind: &ProbeKind, timeout: Duration) -> HealthCheck {
        HealthCheck {
            probe: kind.clone(),
            port: None,
            interval: AMPLE,
            timeout,
            healthy: 1,
            unhealthy: 1,
            passive: false,
            proxy_header: false,
        }
    }

    /// What a user reads.
    async fn reason(kind: &ProbeKind, addr: SocketAddr, timeout: Duration) -> String {
        match probe(&check(kind, timeout), addr).await {
            Ok(()) => "success".into(),
            Err(failure) => failure.to_string(),
        }
    }

    /// Answers one connection with `answer` after it has read a request; the task ends with that.
    async fn http_server(answer: impl Into<Vec<u8>>) -> (SocketAddr, JoinHandle<String>) {
        let listener = TcpListener::bind(V4).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let answer = answer.into();
        let served = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0, "request ends early");
            }
            // Long answers are cut off by the client.
            let _ = stream.write_all(&answer).await;
            String::from_utf8(request).unwrap()
        });
        (addr, served)
    }

    async fn udp_server(answer: Option<&'static str>) -> (SocketAddr, JoinHandle<Vec<u8>>) {
        let socket = UdpSocket::bind(V4).await.unwrap();
        let addr = socket.local_addr().unwrap();
        let served = tokio::spawn(async move {
            let mut question = Vec::with_capacity(64);
            let (_, client) = socket.recv_buf_from(&mut question).await.unwrap();
            match answer {
                Some(answer) => drop(socket.send_to(answer.as_bytes(), client).await.unwrap()),
                None => std::future::pending().await,
            }
            question
        });
        (addr, served)
    }

    /// A closed port: one that was just given back.
    async fn closed_port() -> SocketAddr {
        TcpListener::bind(V4).await.unwrap().local_addr().unwrap()
    }

    #[tokio::test]
    async fn given_a_tcp_backend_when_probed_then_the_handshake_decides() {
        for host in ["127.0.0.1", "::1"] {
            let Ok(listener) = TcpListener::bind((host, 0)).await else { continue };
            let addr = listener.local_addr().unwrap();
            assert_eq!(reason(&ProbeKind::Tcp, addr, AMPLE).await, "success", "{host}");
            drop(listener);
            assert_eq!(reason(&ProbeKind::Tcp, addr, AMPLE).await, "connection refused", "{host}");
        }
    }

    #[tokio::test]
    async fn given_a_tcp_backend_when_probed_then_the_connection_ends_with_a_reset() {
        let listener = TcpListener::bind(V4).await.unwrap();
        probe(&check(&ProbeKind::Tcp, AMPLE), listener.local_addr().unwrap()).await.unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        let error = stream.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn given_http_answers_when_probed_then_the_status_decides() {
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n";
        let endless = format!("{head}{}", "x".repeat(1 << 20));
        let long = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(2 * HTTP_BUFFER));
        let unexpected = "HTTP status 503, expected 2xx or 3xx";
        let cases = [
            ("success", HttpMethod::Head, head, "success"),
            ("old version", HttpMethod::Head, "HTTP/1.0 204 No Content\r\n\r\n", "success"),
            ("redirect", HttpMethod::Get, "HTTP/1.1 302 Found\r\n\r\n", "success"),
            ("body", HttpMethod::Get, &endless, "success"),
            ("error", HttpMethod::Head, "HTTP/1.1 503 Busy\r\n\r\n", unexpected),
            ("nothing", HttpMethod::Get, "", "connection closed without an answer"),
            (
                "garbage",
                HttpMethod::Get,
                "SSH-2.0-OpenSSH_9.2\r\n\r\n",
                "bad HTTP answer: invalid HTTP version parsed",
            ),
            ("long", HttpMethod::Get, &long, "bad HTTP answer: message head is too large"),
        ];
        for (case, method, answer, expected) in cases {
            let (addr, _served) = http_server(answer).await;
            let kind = ProbeKind::Http(HttpProbe { method, ..http() });
            assert_eq!(reason(&kind, addr, AMPLE).await, expected, "{case}");
        }
        let kind = ProbeKind::Http(http());
        assert_eq!(reason(&kind, closed_port().await, AMPLE).await, "connection refused");
    }

    #[tokio::test]
    async fn given_an_http_backend_when_probed_then_the_request_is_as_configured() {
        let named = HttpProbe { host: Some("shop.example".into()), ..http() };
        for (method, name) in [(HttpMethod::Head, "HEAD"), (HttpMethod::Get, "GET")] {
            for probe_http in [http(), named.clone()] {
                let (addr, served) = http_server("HTTP/1.1 200 OK\r\n\r\n").await;
                let host = probe_http.host.clone().unwrap_or_else(|| addr.to_string());
                let kind = ProbeKind::Http(HttpProbe { method, ..probe_http });
                probe(&check(&kind, AMPLE), addr).await.unwrap();
                let expected = format!(
                    "{name} /healthz HTTP/1.1\r\nhost: {host}\r\nuser-agent: {USER_AGENT}\r\n\
                     connection: close\r\n\r\n"
                );
                assert_eq!(served.await.unwrap(), expected);
            }
        }
    }

    #[tokio::test]
    async fn given_a_backend_that_expects_a_proxy_header_when_probed_then_it_gets_one_without_a_client()
     {
        let (addr, served) = http_server("HTTP/1.1 200 OK\r\n\r\n").await;
        let kind = ProbeKind::Http(http());
        let check = HealthCheck { proxy_header: true, ..check(&kind, AMPLE) };
        probe(&check, addr).await.unwrap();
        // The signature, version 2 and LOCAL, no family, no addresses.
        let header = "\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";
        let expected = format!("{header}HEAD /healthz HTTP/1.1\r\nhost: {addr}\r\n");
        let found = served.await.unwrap();
        assert!(found.starts_with(&expected), "{found:?}");
    }

    #[tokio::test]
    async fn given_an_http_backend_that_hangs_when_probed_then_the_timeout_ends_it() {
        let listener = TcpListener::bind(V4).await.unwrap();
        let kind = ProbeKind::Http(http());
        let reason = reason(&kind, listener.local_addr().unwrap(), SHORT).await;
        assert_eq!(reason, "no answer within 50ms");
    }

    #[tokio::test]
    async fn given_a_udp_backend_when_probed_then_the_answer_decides() {
        let cases = [
            ("as expected", Some("pong"), Some("well, pong!"), AMPLE, "success"),
            ("wrong", Some("pong"), Some("what?"), AMPLE, r#"answer did not contain "pong""#),
            ("empty", Some("pong"), Some(""), AMPLE, r#"answer did not contain "pong""#),
            ("silent", Some("pong"), None, SHORT, "no answer within 50ms"),
            ("any will do", None, Some("what?"), AMPLE, "success"),
            ("none will do", None, None, SHORT, "success"),
        ];
        for (case, receive, answer, timeout, expected) in cases {
            let (addr, served) = udp_server(answer).await;
            assert_eq!(reason(&udp("ping", receive), addr, timeout).await, expected, "{case}");
            if answer.is_some() {
                assert_eq!(served.await.unwrap(), b"ping", "{case}");
            }
        }
    }

    #[tokio::test]
    async fn given_nothing_to_send_when_a_udp_backend_is_probed_then_an_empty_datagram_goes_out() {
        let (addr, served) = udp_server(Some("")).await;
        assert_eq!(reason(&udp("", None), addr, AMPLE).await, "success");
        assert_eq!(served.await.unwrap(), b"");
    }

    #[tokio::test]
    async fn given_a_closed_udp_port_when_probed_then_icmp_says_so() {
        for receive in [None, Some("pong")] {
            let addr = UdpSocket::bind(V4).await.unwrap().local_addr().unwrap();
            let reason = reason(&udp("ping", receive), addr, AMPLE).await;
            assert_eq!(reason, "ICMP port unreachable", "{receive:?}");
        }
    }

    #[test]
    fn given_socket_errors_when_told_then_the_gateways_own_are_apart() {
        let cases = [
            (libc::ENETUNREACH, "no route", false),
            (libc::EHOSTUNREACH, "no route", false),
            (libc::ECONNRESET, "connection closed without an answer", false),
            (libc::EMFILE, "Too many open files (os error 24)", true),
            (libc::EADDRNOTAVAIL, "Cannot assign requested address (os error 99)", true),
            (libc::ETIMEDOUT, "Connection timed out (os error 110)", false),
        ];
        for (code, reason, local) in cases {
            let failure = Failure::from(io::Error::from_raw_os_error(code));
            assert_eq!((failure.to_string().as_str(), failure.is_local()), (reason, local));
        }
    }

    #[test]
    fn given_expected_statuses_when_shown_then_they_read_as_configured() {
        let shown = Expected(&[(200, 299), (301, 301), (400, 403)]).to_string();
        assert_eq!(shown, "2xx, 301 or 400-403");
    }
}
