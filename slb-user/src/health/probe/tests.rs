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

/// Answers one connection with `part`, again and again, until the client has had enough.
async fn endless_http_server(begin: String, part: String, pause: Duration) -> SocketAddr {
    let listener = TcpListener::bind(V4).await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut written = stream.write_all(begin.as_bytes()).await;
        while written.is_ok() {
            written = stream.write_all(part.as_bytes()).await;
            time::sleep(pause).await;
        }
    });
    addr
}

#[tokio::test]
async fn answer_without_an_end_fails_after_few_bytes_and_reads() {
    let head = "HTTP/1.1 200 OK\r\n";
    let expected = "the HTTP answer has no status within 64 KiB or 1024 reads";
    let too_large = "bad HTTP answer: message head is too large";
    let hint = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n";
    let cases = [
        ("interim answers", String::new(), "HTTP/1.1 100 Continue\r\n\r\n".repeat(500), expected),
        ("interim answers with headers", String::new(), hint.repeat(500), expected),
        ("one header", format!("{head}X: "), "x".repeat(1 << 16), too_large),
        ("many headers", head.to_owned(), "X: y\r\n".repeat(5_000), too_large),
    ];
    for (case, begin, part, expected) in cases {
        let addr = endless_http_server(begin, part, Duration::ZERO).await;
        assert_eq!(reason(&ProbeKind::Http(http()), addr, AMPLE).await, expected, "{case}");
    }
    let every = Duration::from_millis(1);
    let addr = endless_http_server(format!("{head}X: "), "x".to_owned(), every).await;
    let slow = reason(&ProbeKind::Http(http()), addr, Duration::from_millis(200)).await;
    assert_eq!(slow, "no answer within 200ms");
    let addr = endless_http_server(format!("{head}X: "), "x".to_owned(), every).await;
    assert_eq!(reason(&ProbeKind::Http(http()), addr, AMPLE).await, expected, "byte by byte");
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
