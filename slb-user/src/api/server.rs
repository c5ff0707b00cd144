//! The agent's end of the socket. It owns nothing: it asks the agent's task.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use axum::{Json, Router, extract::State, http::StatusCode, routing::get};
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot},
};

use super::Status;

/// A question to the agent.
#[derive(Debug)]
pub enum Request {
    /// How are things?
    Status(oneshot::Sender<Result<Status, String>>),
}

/// The socket cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("API socket {}", path.display())]
pub struct ApiError {
    path: PathBuf,
    source: io::Error,
}

/// Listens on `path`, which only the agent's user may open, and passes questions on to `agent`.
///
/// The caller holds the lock that keeps other agents away, so a socket that is there is left over.
///
/// # Errors
///
/// [`ApiError`].
pub fn serve(path: &Path, agent: mpsc::Sender<Request>) -> Result<(), ApiError> {
    let failed = |source| ApiError { path: path.to_owned(), source };
    // Anything else than a socket is not ours to remove: binding says that it is in the way.
    if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let router = Router::new().route("/v1/status", get(status)).with_state(agent);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the API has ended");
        }
    });
    Ok(())
}

async fn status(
    State(agent): State<mpsc::Sender<Request>>,
) -> Result<Json<Status>, (StatusCode, String)> {
    let stopping = || (StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping".to_owned());
    let (answer, answered) = oneshot::channel();
    agent.send(Request::Status(answer)).await.map_err(|_| stopping())?;
    match answered.await {
        Ok(Ok(status)) => Ok(Json(status)),
        Ok(Err(reason)) => Err((StatusCode::INTERNAL_SERVER_ERROR, reason)),
        Err(_) => Err(stopping()),
    }
}
