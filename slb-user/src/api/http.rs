//! Metrics over HTTP, for Prometheus; read-only.

use std::{
    io,
    net::{SocketAddr, TcpListener},
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::{sync::mpsc, task::AbortHandle};

use super::{Request, connections, server::ask};
use crate::{descriptors::MostConnections, metrics};

/// The address cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on gateway.http = \"{addr}\"")]
pub struct HttpError {
    addr: SocketAddr,
    source: io::Error,
}

/// Listens on `addr` until the task is aborted, and answers with what `agent` says; `most` is how many connections may
/// be open.
///
/// # Errors
///
/// [`HttpError`].
pub fn serve_metrics(
    addr: SocketAddr,
    agent: mpsc::Sender<Request>,
    most: MostConnections,
) -> Result<AbortHandle, HttpError> {
    let listener = TcpListener::bind(addr)
        .and_then(|listener| {
            listener.set_nonblocking(true)?;
            tokio::net::TcpListener::from_std(listener)
        })
        .map_err(|source| HttpError { addr, source })?;
    let router = Router::new().route("/metrics", get(metrics)).with_state(agent);
    Ok(tokio::spawn(connections::serve(listener, router, most)).abort_handle())
}

async fn metrics(
    State(agent): State<mpsc::Sender<Request>>,
) -> Result<impl IntoResponse, (StatusCode, String)> {
    let failed = |why: String| (StatusCode::INTERNAL_SERVER_ERROR, why);
    let status = ask(&agent, Request::Status).await?.map_err(failed)?;
    let text = metrics::encode(status).map_err(|error| failed(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text))
}
