//! Metrics over HTTP, for Prometheus; read-only.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Instant,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use bytes::Bytes;
use tokio::{sync::Mutex, task::AbortHandle};

use super::{
    connections,
    server::{failed, observe},
};
use crate::{
    descriptors::MostConnections,
    observe::{Observer, metrics},
    rights::LOW_PORT,
};

/// The address cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on gateway.http = \"{addr}\"")]
pub struct HttpError {
    addr: SocketAddr,
    source: io::Error,
}

/// Listens on `addr` until the task is aborted, and serves what `observer` sees; at most `most` connections are open.
///
/// # Errors
///
/// [`HttpError`].
pub fn serve_metrics(
    addr: SocketAddr,
    observer: Arc<dyn Observer>,
    most: MostConnections,
) -> Result<AbortHandle, HttpError> {
    let listener = LOW_PORT
        .during(|| TcpListener::bind(addr))
        .and_then(|listener| {
            listener.set_nonblocking(true)?;
            tokio::net::TcpListener::from_std(listener)
        })
        .map_err(|source| HttpError { addr, source })?;
    let state = Scrapes { observer, latest: Arc::default() };
    let router = Router::new().route("/metrics", get(metrics)).with_state(state);
    Ok(tokio::spawn(connections::serve(listener, router, most)).abort_handle())
}

/// What several scrapes at once share.
#[derive(Clone)]
struct Scrapes {
    observer: Arc<dyn Observer>,
    latest: Arc<Mutex<Option<Scrape>>>,
}

struct Scrape {
    began: Instant,
    text: Bytes,
}

impl Scrapes {
    /// The metrics as they are now, or as they were at some time since this was called.
    ///
    /// One scrape is made at a time, and those that wait for it share the next one: any host that reaches the port can
    /// ask as often as it likes, and must not take all CPUs or memory for a text of megabytes per connection.
    async fn text(&self) -> Result<Bytes, (StatusCode, String)> {
        let asked = Instant::now();
        let mut latest = self.latest.lock().await;
        if let Some(scrape) = latest.as_ref().filter(|scrape| scrape.began >= asked) {
            return Ok(scrape.text.clone());
        }
        let began = Instant::now();
        // Both take time with thousands of backends.
        let encode = |observer: &dyn Observer| {
            let status = observer.status().map_err(|error| failed(&error))?;
            metrics::encode(status).map_err(|error| failed(&error))
        };
        let text = Bytes::from(observe(&self.observer, encode).await??);
        *latest = Some(Scrape { began, text: text.clone() });
        Ok(text)
    }
}

async fn metrics(
    State(scrapes): State<Scrapes>,
) -> Result<impl IntoResponse, (StatusCode, String)> {
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], scrapes.text().await?))
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        thread::sleep,
        time::Duration,
    };

    use slb_api::{
        Event, ExplainRequest, ExplainResponse, FlowFilter, Flows, Status as AgentStatus,
    };

    use super::*;
    use crate::observe::{ExplainError, ReadError, fixtures};

    /// Takes its time for a status, and counts them.
    #[derive(Default)]
    struct Slow(AtomicUsize);

    impl Observer for Slow {
        fn status(&self) -> Result<AgentStatus, ReadError> {
            sleep(Duration::from_millis(100));
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(fixtures::status())
        }

        fn flows(&self, _: &FlowFilter) -> Result<Flows, ReadError> {
            Ok(Flows { total: 0, flows: Vec::new(), busiest: None })
        }

        fn explain(&self, request: &ExplainRequest) -> Result<ExplainResponse, ExplainError> {
            Err(ExplainError::Families { src: request.src, dst: request.dst })
        }

        fn events(&self, _: u64) -> Vec<Event> {
            Vec::new()
        }
    }

    #[tokio::test]
    async fn scrapes_at_the_same_time_share_their_work_and_later_ones_are_new() {
        let slow = Arc::new(Slow::default());
        let observer: Arc<dyn Observer> = Arc::clone(&slow) as _;
        let scrapes = Scrapes { observer, latest: Arc::default() };
        let many = (0..64).map(|_| {
            let scrapes = scrapes.clone();
            tokio::spawn(async move { scrapes.text().await.map(|text| text.len()) })
        });
        for scrape in many.collect::<Vec<_>>() {
            assert!(scrape.await.unwrap().unwrap() > 0);
        }
        let made = slow.0.load(Ordering::Relaxed);
        assert!(made <= 2, "{made}");
        scrapes.text().await.unwrap();
        assert_eq!(slow.0.load(Ordering::Relaxed), made + 1);
    }
}
