//! Traffic that goes on while something else happens.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};

use super::{Client, Failure, Outcome, PATIENCE, lock};
use crate::http;

/// Time between two requests on a kept connection.
const PACE: Duration = Duration::from_millis(20);

/// One request of a [`Load`].
#[derive(Clone, Debug)]
pub struct Exchange {
    /// When it was begun.
    pub began: Instant,
    /// From then until it was answered or had failed.
    pub took: Duration,
    /// The backend that answered, or why none did.
    pub result: Result<String, Failure>,
}

/// New connections at a steady rate, until stopped.
#[derive(Debug)]
pub struct Load {
    exchanges: Arc<Mutex<Vec<Exchange>>>,
    background: Background,
}

impl Load {
    /// Begins with `rate` HTTP requests per second, each on a connection of its own.
    ///
    /// # Errors
    ///
    /// The client cannot run at all.
    pub fn start(client: &Client, to: SocketAddr, rate: u32) -> Result<Self> {
        Self::start_with(client, rate, move |client| async move { client.request(to).await })
    }

    /// The same with datagrams, each from a port of its own.
    ///
    /// # Errors
    ///
    /// The client cannot run at all.
    pub fn start_datagrams(client: &Client, to: SocketAddr, rate: u32) -> Result<Self> {
        Self::start_with(client, rate, move |client| async move { client.datagram(to).await })
    }

    fn start_with<F>(
        client: &Client,
        rate: u32,
        exchange: impl Fn(Client) -> F + Send + 'static,
    ) -> Result<Self>
    where
        F: Future<Output = Result<String, Failure>> + Send + 'static,
    {
        let exchanges = Arc::new(Mutex::new(Vec::new()));
        let (client, recorded) = (client.clone(), Arc::clone(&exchanges));
        let background = Background::start(&client.clone(), move |mut stopped| async move {
            let mut ticks = interval(Duration::from_secs(1) / rate.max(1));
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            let mut requests = JoinSet::new();
            loop {
                tokio::select! {
                    _ = stopped.changed() => break,
                    _ = ticks.tick() => {}
                }
                let (exchange, recorded) = (exchange(client.clone()), Arc::clone(&recorded));
                requests.spawn(async move {
                    let began = Instant::now();
                    let result = exchange.await;
                    lock(&recorded).push(Exchange { began, took: began.elapsed(), result });
                });
                while requests.try_join_next().is_some() {}
            }
            requests.join_all().await;
        })?;
        Ok(Self { exchanges, background })
    }

    /// What has become of the requests so far.
    pub fn so_far(&self) -> Outcome {
        let mut outcome = Outcome::default();
        for exchange in lock(&self.exchanges).iter() {
            outcome.record(exchange.result.clone());
        }
        outcome
    }

    /// The requests that have ended so far, in the order of their ends.
    pub fn exchanges(&self) -> Vec<Exchange> {
        lock(&self.exchanges).clone()
    }

    /// Ends it, once the last request is answered or has failed.
    ///
    /// # Errors
    ///
    /// The client broke down.
    pub fn stop(mut self) -> Result<Outcome> {
        self.background.finish()?;
        Ok(self.so_far())
    }

    /// [`stop`](Self::stop), with every single request.
    ///
    /// # Errors
    ///
    /// The client broke down.
    pub fn stop_with_exchanges(mut self) -> Result<Vec<Exchange>> {
        self.background.finish()?;
        Ok(self.exchanges())
    }
}

/// One kept connection.
#[derive(Clone, Debug)]
pub struct Session {
    /// The client's end.
    pub client: SocketAddr,
    /// The backend that answered the first request.
    pub backend: String,
    /// Requests answered.
    pub answered: u64,
    /// What ended the connection, if anything did.
    pub failure: Option<Failure>,
}

/// Kept connections, each with request after request, until stopped.
#[derive(Debug)]
pub struct Sessions {
    sessions: Arc<Mutex<Vec<Session>>>,
    background: Background,
}

impl Sessions {
    /// Opens `count` connections; returns when each has had its first answer.
    ///
    /// # Errors
    ///
    /// One of them could not be opened.
    pub fn open(client: &Client, to: SocketAddr, count: usize) -> Result<Self> {
        Self::open_with_pace(client, to, count, PACE)
    }

    /// The same; `pace` is the time between an answer and the next request.
    ///
    /// # Errors
    ///
    /// One of them could not be opened.
    pub fn open_with_pace(
        client: &Client,
        to: SocketAddr,
        count: usize,
        pace: Duration,
    ) -> Result<Self> {
        let opened = client.inside(async {
            let mut opened = Vec::with_capacity(count);
            for _ in 0..count {
                let open = async {
                    let mut stream = client.connect(to).await?;
                    let backend = http::get(&mut stream, "/").await?.backend;
                    let client = stream.local_addr()?;
                    let session = Session { client, backend, answered: 1, failure: None };
                    Ok::<_, std::io::Error>((stream.into_std()?, session))
                };
                opened.push(timeout(PATIENCE, open).await.context("no answer")??);
            }
            Ok::<_, anyhow::Error>(opened)
        })??;
        let (streams, sessions): (Vec<_>, Vec<_>) = opened.into_iter().unzip();
        let sessions = Arc::new(Mutex::new(sessions));
        let kept = Arc::clone(&sessions);
        let background = Background::start(client, move |stopped| async move {
            let mut tasks = JoinSet::new();
            for (index, stream) in streams.into_iter().enumerate() {
                let (kept, mut stopped) = (Arc::clone(&kept), stopped.clone());
                tasks.spawn(async move {
                    let failure = tokio::select! {
                        failure = converse(stream, &kept, index, pace) => failure,
                        _ = stopped.changed() => return,
                    };
                    lock(&kept)[index].failure = Some(failure);
                });
            }
            tasks.join_all().await;
        })?;
        Ok(Self { sessions, background })
    }

    /// How the connections have fared so far.
    pub fn so_far(&self) -> Vec<Session> {
        lock(&self.sessions).clone()
    }

    /// Closes them.
    ///
    /// # Errors
    ///
    /// The client broke down.
    pub fn stop(self) -> Result<Vec<Session>> {
        self.background.stop()?;
        Ok(lock(&self.sessions).clone())
    }
}

/// Request after request, until one fails.
async fn converse(
    stream: std::net::TcpStream,
    sessions: &Mutex<Vec<Session>>,
    index: usize,
    pace: Duration,
) -> Failure {
    let mut stream = match tokio::net::TcpStream::from_std(stream) {
        Ok(stream) => stream,
        Err(error) => return error.into(),
    };
    loop {
        tokio::time::sleep(pace).await;
        match timeout(PATIENCE, http::get(&mut stream, "/")).await {
            Ok(Ok(_)) => lock(sessions)[index].answered += 1,
            Ok(Err(error)) => return error.into(),
            Err(_) => return Failure::Timeout,
        }
    }
}

/// A thread in the client's namespace that runs one future until told to stop; dropping it stops it.
#[derive(Debug)]
struct Background {
    stop: watch::Sender<()>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Background {
    fn start<F: Future<Output = ()>>(
        client: &Client,
        work: impl FnOnce(watch::Receiver<()>) -> F + Send + 'static,
    ) -> Result<Self> {
        let (stop, mut stopped) = watch::channel(());
        stopped.mark_unchanged();
        let thread = client.host.netns.thread(&client.host.name, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(work(stopped));
            Ok(())
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }

    fn stop(mut self) -> Result<()> {
        self.finish()
    }

    fn finish(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        // There is no receiver when the work has ended by itself.
        let _ = self.stop.send(());
        match thread.join() {
            Ok(result) => result,
            Err(_) => bail!(anyhow!("a client thread panicked")),
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            eprintln!("lab: {error:#}");
        }
    }
}
