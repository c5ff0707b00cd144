//! Metrics over HTTP, for Prometheus; read-only.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::task::AbortHandle;

use super::{
    connections,
    server::{failed, observe},
};
use crate::{
    descriptors::MostConnections,
    observe::{Observer, metrics},
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
    let listener = TcpListener::bind(addr)
        .and_then(|listener| {
            listener.set_nonblocking(true)?;
            tokio::net::TcpListener::from_std(listener)
        })
        .map_err(|source| HttpError { addr, source })?;
    let router = Router::new().route("/metrics", get(metrics)).with_state(observer);
    Ok(tokio::spawn(connections::serve(listener, router, most)).abort_handle())
}

async fn metrics(
    State(observer): State<Arc<dyn Observer>>,
) -> Result<impl IntoResponse, (StatusCode, String)> {
    // Both take time with thousands of backends.
    let encode = |observer: &dyn Observer| {
        let status = observer.status().map_err(|error| failed(&error))?;
        metrics::encode(status).map_err(|error| failed(&error))
    };
    let text = observe(&observer, encode).await??;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text))
}
