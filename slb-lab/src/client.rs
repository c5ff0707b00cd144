//! Traffic, from inside a client's namespace.
//!
//! Source ports are taken in order, from [`PORTS`], and never by chance: a hash of the 4-tuple then
//! gives the same shares in every run, and no test fails once in a hundred.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::{
    net::{TcpSocket, TcpStream, UdpSocket},
    task::JoinSet,
    time::timeout,
};

use crate::{Host, http, interrupt};

pub use load::{Exchange, Load, Session, Sessions};

mod load;

/// Source ports of everything a [`Client`] sends.
const PORTS: Range<u32> = 10_000..60_000;
/// Without an answer for this long an exchange has failed.
const PATIENCE: Duration = Duration::from_secs(3);

/// A client host, and the next source port to use.
#[derive(Clone, Debug)]
pub struct Client {
    host: Host,
    ports: Arc<AtomicU32>,
}

/// Why an exchange failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// The port was closed.
    Refused,
    /// The connection was reset, or closed too early.
    Reset,
    /// No answer in time.
    Timeout,
    /// Anything else.
    Other,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof => Self::Reset,
            io::ErrorKind::TimedOut => Self::Timeout,
            _ => Self::Other,
        }
    }
}

/// What became of a number of exchanges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Answered, by name of the backend.
    pub per_backend: BTreeMap<String, u64>,
    /// Not answered, by reason.
    pub failures: BTreeMap<Failure, u64>,
}

impl Outcome {
    /// Exchanges that were answered.
    pub fn ok(&self) -> u64 {
        self.per_backend.values().sum()
    }

    /// Exchanges that were not.
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    /// Connections that were reset after they had been accepted.
    pub fn resets(&self) -> u64 {
        self.failures.get(&Failure::Reset).copied().unwrap_or(0)
    }

    /// The part of all answers that `backend` gave, 0 to 1.
    #[expect(clippy::cast_precision_loss, reason = "counts of a lab are far below 2^52")]
    pub fn share(&self, backend: &str) -> f64 {
        let answers = self.per_backend.get(backend).copied().unwrap_or(0);
        answers as f64 / self.ok().max(1) as f64
    }

    /// Counts one more exchange.
    pub fn record(&mut self, result: Result<String, Failure>) {
        match result {
            Ok(backend) => *self.per_backend.entry(backend).or_default() += 1,
            Err(failure) => *self.failures.entry(failure).or_default() += 1,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} answered", self.ok())?;
        for (backend, count) in &self.per_backend {
            write!(f, ", {backend} {count}")?;
        }
        write!(f, "; {} failed", self.failed())?;
        for (failure, count) in &self.failures {
            write!(f, ", {failure:?} {count}")?;
        }
        Ok(())
    }
}

/// A finished download.
#[derive(Clone, Debug)]
pub struct Download {
    /// Who sent it.
    pub backend: String,
    /// Bytes of body.
    pub bytes: u64,
    /// From the connect to the last byte.
    pub elapsed: Duration,
}

impl Client {
    /// Traffic from `host`.
    pub fn new(host: &Host) -> Self {
        Self { host: host.clone(), ports: Arc::new(AtomicU32::new(PORTS.start)) }
    }

    /// `count` HTTP requests, each on a connection of its own, `concurrency` at a time. Stops early
    /// on a signal.
    ///
    /// # Errors
    ///
    /// The client cannot run at all; failed exchanges are in the outcome.
    pub fn http(&self, to: SocketAddr, count: usize, concurrency: usize) -> Result<Outcome> {
        self.exchanges(count, concurrency, move |client| async move { client.request(to).await })
    }

    /// `count` datagrams, each from a port of its own and answered before the next of the same
    /// worker, `concurrency` workers. Stops early on a signal.
    ///
    /// # Errors
    ///
    /// The client cannot run at all; failed exchanges are in the outcome.
    pub fn udp(&self, to: SocketAddr, count: usize, concurrency: usize) -> Result<Outcome> {
        self.exchanges(count, concurrency, move |client| async move { client.datagram(to).await })
    }

    /// One long HTTP response.
    ///
    /// # Errors
    ///
    /// The download breaks off.
    pub fn download(&self, to: SocketAddr, bytes: u64) -> Result<Download> {
        self.inside(async {
            let began = Instant::now();
            let mut stream = self.connect(to).await?;
            let response = http::get(&mut stream, &format!("/big?bytes={bytes}")).await?;
            Ok(Download {
                backend: response.backend,
                bytes: response.body,
                elapsed: began.elapsed(),
            })
        })?
    }

    fn exchanges<F>(
        &self,
        count: usize,
        concurrency: usize,
        exchange: impl Fn(Self) -> F + Send + Sync + Clone + 'static,
    ) -> Result<Outcome>
    where
        F: Future<Output = Result<String, Failure>> + Send + 'static,
    {
        self.inside(async {
            let outcome = Arc::new(Mutex::new(Outcome::default()));
            let begun = Arc::new(AtomicUsize::new(0));
            let mut workers = JoinSet::new();
            for _ in 0..concurrency {
                let (client, exchange) = (self.clone(), exchange.clone());
                let (outcome, begun) = (Arc::clone(&outcome), Arc::clone(&begun));
                workers.spawn(async move {
                    while begun.fetch_add(1, Ordering::Relaxed) < count && !interrupt::requested() {
                        let result = exchange(client.clone()).await;
                        lock(&outcome).record(result);
                    }
                });
            }
            workers.join_all().await;
            lock(&outcome).clone()
        })
    }

    /// Runs `future` in the client's namespace, to its end.
    fn inside<F>(&self, future: F) -> Result<F::Output>
    where
        F: Future + Send,
        F::Output: Send,
    {
        self.host.netns.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("starting a runtime")?;
            Ok(runtime.block_on(future))
        })?
    }

    /// A request on a new connection, which the client closes: what lingers, lingers here.
    async fn request(&self, to: SocketAddr) -> Result<String, Failure> {
        let exchange = async {
            let mut stream = self.connect(to).await?;
            Ok(http::get(&mut stream, "/").await?.backend)
        };
        timeout(PATIENCE, exchange).await.unwrap_or(Err(Failure::Timeout))
    }

    async fn datagram(&self, to: SocketAddr) -> Result<String, Failure> {
        const PAYLOAD: &str = "hello";
        let exchange = async {
            let socket = loop {
                match UdpSocket::bind(self.source(to)).await {
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                    bound => break bound?,
                }
            };
            socket.connect(to).await?;
            socket.send(PAYLOAD.as_bytes()).await?;
            let mut buffer = [0; 256];
            let n = socket.recv(&mut buffer).await?;
            let answer = std::str::from_utf8(&buffer[..n]).map_err(|_| Failure::Other)?;
            match answer.split_once(' ') {
                Some((backend, PAYLOAD)) => Ok(backend.to_owned()),
                _ => Err(Failure::Other),
            }
        };
        timeout(PATIENCE, exchange).await.unwrap_or(Err(Failure::Timeout))
    }

    async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        loop {
            let socket = if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
            // Lets a port be used again while its last connection is in TIME_WAIT.
            socket.set_reuseaddr(true)?;
            let attempt = match socket.bind(self.source(to)) {
                Ok(()) => socket.connect(to).await,
                Err(error) => Err(error),
            };
            match attempt {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                // In use by a connection of this lab; the caller's patience ends the loop.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable
                    ) =>
                {
                    tokio::task::yield_now().await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The next source address for traffic to `to`.
    fn source(&self, to: SocketAddr) -> SocketAddr {
        let taken = self.ports.fetch_add(1, Ordering::Relaxed);
        let port = PORTS.start + (taken - PORTS.start) % (PORTS.end - PORTS.start);
        let address: IpAddr = if to.is_ipv4() { self.host.v4.into() } else { self.host.v6.into() };
        SocketAddr::new(address, u16::try_from(port).expect("PORTS are below 65536"))
    }
}

/// Counters stay valid when a thread panics that has locked them.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
