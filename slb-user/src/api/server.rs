//! The agent's end of the socket. It owns nothing: it asks the agent's task.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    routing::{get, post},
};
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot},
};

use super::{File, Reloaded, Status};
use crate::config::{self, Config, Edit};

/// A question to the agent.
#[derive(Debug)]
pub enum Request {
    /// How are things?
    Status(oneshot::Sender<Result<Status, String>>),
    /// Go by the file as it is now.
    Reload(oneshot::Sender<Result<Reloaded, Refusal>>),
    /// Change the file, and go by it.
    Edit(Edit, oneshot::Sender<Result<Reloaded, Refusal>>),
    /// What would change if the file were this one?
    Plan(Box<Config>, oneshot::Sender<Result<Reloaded, Refusal>>),
}

/// Why a configuration was not taken over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The file cannot be read, or is wrong. Nothing was changed.
    #[error("{0}")]
    Invalid(String),
    /// The file is right, but not for this agent as it runs. Nothing was changed.
    #[error("{0}")]
    Conflict(String),
    /// The kernel refuses a part of it.
    #[error("{0}")]
    Failed(String),
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
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/reload", post(reload))
        .route("/v1/plan", post(plan))
        .route("/v1/edit", post(edit))
        .with_state(agent);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the API has ended");
        }
    });
    Ok(())
}

type Agent = State<mpsc::Sender<Request>>;
type Answer<T> = Result<Json<T>, (StatusCode, String)>;

async fn status(State(agent): Agent) -> Answer<Status> {
    let failed = |reason| (StatusCode::INTERNAL_SERVER_ERROR, reason);
    ask(&agent, Request::Status).await?.map(Json).map_err(failed)
}

async fn reload(State(agent): Agent) -> Answer<Reloaded> {
    ask(&agent, Request::Reload).await?.map(Json).map_err(refused)
}

async fn edit(State(agent): Agent, Json(edit): Json<Edit>) -> Answer<Reloaded> {
    ask(&agent, |answer| Request::Edit(edit, answer)).await?.map(Json).map_err(refused)
}

async fn plan(State(agent): Agent, Json(File { path, text }): Json<File>) -> Answer<Reloaded> {
    let parsed = tokio::task::spawn_blocking(move || config::parse(&path, &text)).await;
    let parsed = parsed.map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    let (config, warnings) =
        parsed.map_err(|report| refused(Refusal::Invalid(report.to_string())))?;
    let question = |answer| Request::Plan(Box::new(config), answer);
    let planned = ask(&agent, question).await?.map_err(refused)?;
    let warnings = warnings.iter().map(ToString::to_string).collect();
    Ok(Json(Reloaded { warnings, ..planned }))
}

/// Asks the agent's task.
pub(super) async fn ask<T>(
    agent: &mpsc::Sender<Request>,
    question: impl FnOnce(oneshot::Sender<T>) -> Request,
) -> Result<T, (StatusCode, String)> {
    let stopping = || (StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping".to_owned());
    let (answer, answered) = oneshot::channel();
    agent.send(question(answer)).await.map_err(|_| stopping())?;
    answered.await.map_err(|_| stopping())
}

fn refused(refusal: Refusal) -> (StatusCode, String) {
    let status = match &refusal {
        Refusal::Invalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
        Refusal::Conflict(_) => StatusCode::CONFLICT,
        Refusal::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
    };
    (status, refusal.to_string())
}
