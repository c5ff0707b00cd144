//! Real servers, inside a backend's namespace.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::mpsc,
    thread::JoinHandle,
};

use anyhow::{Context as _, Result, anyhow};
use axum::{
    Router,
    body::{Body, Bytes},
    http::{HeaderValue, Uri, header},
    response::{IntoResponse, Response},
    routing::get,
};
use futures_util::stream;
use ppp::{PartialResult as _, v2};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream, UdpSocket},
    sync::oneshot,
};

use crate::Host;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4096;
/// Unit in which `/big` is sent.
const CHUNK: usize = 64 * 1024;

/// What is served, on both of a host's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// HTTP/1.1: `/` answers with the server's name, in the body and in `x-backend`; `/healthz`;
    /// `/big?bytes=N` sends N bytes.
    Http(u16),
    /// TCP: sends back what it gets.
    Echo(u16),
    /// TCP that begins with a header of the PROXY protocol, version 2: says whose connection that makes
    /// it, `SOURCE DESTINATION` in a line, and then sends back what it gets.
    Proxied(u16),
    /// UDP: answers every datagram with the server's name, a space, and the datagram.
    Udp(u16),
}

impl Service {
    /// The port that it is served on.
    #[must_use]
    pub const fn port(self) -> u16 {
        match self {
            Self::Http(port) | Self::Echo(port) | Self::Proxied(port) | Self::Udp(port) => port,
        }
    }
}

/// A service of one host, running or stopped; dropping it stops it.
#[derive(Debug)]
pub struct Server {
    host: Host,
    name: String,
    service: Service,
    addresses: Vec<IpAddr>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<Result<()>>,
}

impl Server {
    /// Starts serving; returns when the port is open.
    ///
    /// # Errors
    ///
    /// The port is taken.
    pub fn start(host: &Host, service: Service) -> Result<Self> {
        Self::start_as(host, service, &host.name)
    }

    /// [`start`](Self::start), answering with another name than the host's.
    ///
    /// # Errors
    ///
    /// The port is taken.
    pub fn start_as(host: &Host, service: Service, name: &str) -> Result<Self> {
        Self::start_at(host, service, name, &host.addresses())
    }

    /// The same, on addresses that the host has besides its own.
    ///
    /// # Errors
    ///
    /// The port is taken, or an address is not there.
    pub fn start_at(
        host: &Host,
        service: Service,
        name: &str,
        addresses: &[IpAddr],
    ) -> Result<Self> {
        let mut server = Self {
            host: host.clone(),
            name: name.to_owned(),
            service,
            addresses: addresses.to_vec(),
            running: None,
        };
        server.restart()?;
        Ok(server)
    }

    /// Serves again, on the same port; does nothing while it is running.
    ///
    /// # Errors
    ///
    /// The port is taken.
    pub fn restart(&mut self) -> Result<()> {
        if self.running.is_some() {
            return Ok(());
        }
        let (addresses, name, service) = (self.addresses.clone(), self.name.clone(), self.service);
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = mpsc::channel();
        let thread = self.host.netns.thread(&self.name, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                for address in addresses {
                    serve(name.clone(), address, service).await?;
                }
                // There is no receiver if `restart` failed in the meantime.
                let _ = ready.send(());
                let _ = stopped.await;
                Ok(())
            })
            // With the runtime go all its tasks, and with those every socket.
        })?;
        if is_ready.recv().is_err() {
            // The thread ended before it was ready, so it has an error to tell.
            let result = thread.join().map_err(|_| anyhow!("the server panicked"))?;
            return result.with_context(|| format!("{}: serving {:?}", self.name, self.service));
        }
        self.running = Some(Running { stop, thread });
        Ok(())
    }

    /// Closes the port and every connection, at once; does nothing while it is stopped.
    pub fn stop(&mut self) {
        if let Some(Running { stop, thread }) = self.running.take() {
            drop(stop);
            if !matches!(thread.join(), Ok(Ok(()))) {
                eprintln!("lab: {}: {:?} ended badly", self.name, self.service);
            }
        }
    }

    /// The name it answers with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it serves.
    pub fn service(&self) -> Service {
        self.service
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Opens the port, and leaves the serving to a task.
async fn serve(name: String, address: IpAddr, service: Service) -> io::Result<()> {
    match service {
        Service::Http(port) => {
            let listener = listen(SocketAddr::new(address, port))?;
            tokio::spawn(async move { axum::serve(listener, router(&name)).await });
        }
        Service::Echo(port) => {
            let listener = listen(SocketAddr::new(address, port))?;
            tokio::spawn(async move {
                loop {
                    if let Ok((mut stream, _)) = listener.accept().await {
                        tokio::spawn(async move { echo(&mut stream).await });
                    }
                }
            });
        }
        Service::Proxied(port) => {
            let listener = listen(SocketAddr::new(address, port))?;
            tokio::spawn(async move {
                loop {
                    if let Ok((stream, _)) = listener.accept().await {
                        tokio::spawn(proxied(stream));
                    }
                }
            });
        }
        Service::Udp(port) => {
            let socket = UdpSocket::bind(SocketAddr::new(address, port)).await?;
            tokio::spawn(async move {
                let mut buffer = vec![0; usize::from(u16::MAX)];
                loop {
                    // Errors here are a client's ICMP messages.
                    if let Ok((n, from)) = socket.recv_from(&mut buffer).await {
                        let answer = [name.as_bytes(), b" ", &buffer[..n]].concat();
                        let _ = socket.send_to(&answer, from).await;
                    }
                }
            });
        }
    }
    Ok(())
}

async fn echo(stream: &mut TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(()),
            n => stream.write_all(&buffer[..n]).await?,
        }
    }
}

async fn proxied(mut stream: TcpStream) -> io::Result<()> {
    let mut bytes = Vec::new();
    let (greeting, len) = loop {
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(());
        }
        match v2::Header::try_from(&bytes[..]) {
            Err(error) if error.is_incomplete() => {}
            Err(error) => break (format!("{error}\n"), bytes.len()),
            Ok(header) => break (whose(&header), header.len()),
        }
    };
    stream.write_all(greeting.as_bytes()).await?;
    stream.write_all(&bytes[len..]).await?;
    echo(&mut stream).await
}

fn whose(header: &v2::Header<'_>) -> String {
    let (source, destination) = match header.addresses {
        v2::Addresses::IPv4(it) => (
            SocketAddr::from((it.source_address, it.source_port)),
            SocketAddr::from((it.destination_address, it.destination_port)),
        ),
        v2::Addresses::IPv6(it) => (
            SocketAddr::from((it.source_address, it.source_port)),
            SocketAddr::from((it.destination_address, it.destination_port)),
        ),
        _ => return format!("{:?}\n", header.command),
    };
    format!("{source} {destination}\n")
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // Connections of the time before `stop` may still be around.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn router(name: &str) -> Router {
    let root = named(name, name.to_owned());
    let healthy = named(name, "ok".to_owned());
    let big = {
        let name = name.to_owned();
        move |uri: Uri| async move { download(&name, &uri) }
    };
    Router::new().route("/", get(root)).route("/healthz", get(healthy)).route("/big", get(big))
}

/// A handler that always answers the same.
fn named(
    name: &str,
    body: String,
) -> impl Fn() -> std::future::Ready<Response> + Clone + Send + Sync + 'static {
    let value = header_value(name);
    move || std::future::ready(([("x-backend", value.clone())], body.clone()).into_response())
}

fn download(name: &str, uri: &Uri) -> Response {
    let bytes = uri
        .query()
        .and_then(|query| query.split('&').find_map(|pair| pair.strip_prefix("bytes=")))
        .and_then(|value| value.parse::<usize>().ok())
        .unwrap_or(0);
    let chunk = Bytes::from(vec![b'x'; CHUNK]);
    let chunks = stream::unfold(bytes, move |left| {
        let next = chunk.slice(..left.min(CHUNK));
        async move { (left > 0).then(|| (Ok::<_, io::Error>(next), left.saturating_sub(CHUNK))) }
    });
    let headers = [
        (header::HeaderName::from_static("x-backend"), header_value(name)),
        (header::CONTENT_LENGTH, HeaderValue::from(bytes)),
    ];
    (headers, Body::from_stream(chunks)).into_response()
}

fn header_value(name: &str) -> HeaderValue {
    HeaderValue::from_str(name).expect("host names of the lab are letters, digits and dashes")
}
