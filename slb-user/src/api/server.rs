//! The agent's end of the socket. It owns nothing: it asks the agent's task.

use std::{
    fmt, fs, io,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::{
    Json,
    extract::{Query, State},
    http::StatusCode,
};
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot},
};

use utoipa::{OpenApi as _, openapi::OpenApi};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Asked, Event, EventFilter, Explained, File, FlowFilter, Flows, Names, Reloaded, Status,
    connections,
};
use crate::{
    clock::Jiffies,
    config::{self, Config, Edit},
    contained,
    datapath::{Explainer, FlowTable},
    descriptors::MostConnections,
};

/// A question to the agent.
#[derive(Debug)]
pub enum Request {
    /// How are things?
    Status(oneshot::Sender<Result<Status, String>>),
    /// What has happened after that number?
    Events(u64, oneshot::Sender<Vec<Event>>),
    /// What is there to look at?
    Sight(oneshot::Sender<Sight>),
    /// Go by the file as it is now.
    Reload(oneshot::Sender<Result<Reloaded, Refusal>>),
    /// Change the file, and go by it.
    Edit(Edit, oneshot::Sender<Result<Reloaded, Refusal>>),
    /// What would change if the file were this one?
    Plan(Box<Config>, oneshot::Sender<Result<Reloaded, Refusal>>),
}

/// What can be looked at without the agent's task, which must not wait.
#[derive(Clone)]
pub struct Sight {
    /// What the indices in it stand for.
    pub names: Arc<Names>,
    /// The maps.
    pub explainer: Arc<Explainer>,
    /// The flow table.
    pub table: FlowTable,
    /// Its clock.
    pub jiffies: Jiffies,
}

impl fmt::Debug for Sight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sight").field("names", &self.names).finish_non_exhaustive()
    }
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

/// Listens on `path`, which only the agent's user may open, and passes questions on to `agent`; `most` is how many
/// connections may be open.
///
/// The caller holds the lock that keeps other agents away, so a socket that is there is left over.
///
/// # Errors
///
/// [`ApiError`].
pub fn serve(
    path: &Path,
    agent: mpsc::Sender<Request>,
    most: MostConnections,
) -> Result<(), ApiError> {
    let failed = |source| ApiError { path: path.to_owned(), source };
    // Anything else than a socket is not ours to remove: binding says that it is in the way.
    if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let (router, _) = routes().split_for_parts();
    let router = router.with_state(agent);
    tokio::spawn(connections::serve(listener, router, most));
    Ok(())
}

type Agent = State<mpsc::Sender<Request>>;
type Answer<T> = Result<Json<T>, (StatusCode, String)>;

/// All that the API answers, with its description.
fn routes() -> OpenApiRouter<mpsc::Sender<Request>> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(status))
        .routes(routes!(events))
        .routes(routes!(flows))
        .routes(routes!(explain))
        .routes(routes!(reload))
        .routes(routes!(plan))
        .routes(routes!(edit))
        .routes(routes!(description))
}

/// The API in the words of OpenAPI.
#[must_use]
pub fn description_of_api() -> OpenApi {
    routes().split_for_parts().1
}

#[derive(utoipa::OpenApi)]
#[openapi(info(
    title = "slb",
    description = "The local API of the agent, on a unix socket: curl --unix-socket /run/slb/api.sock \
                   http://slb/v1/status. Whoever may open the socket may do everything. An error is one \
                   or more lines of text."
))]
struct Description;

/// How things are.
#[utoipa::path(get, path = "/v1/status", responses(
    (status = OK, body = Status),
    (status = INTERNAL_SERVER_ERROR, body = String, description = "the maps cannot be read"),
))]
async fn status(State(agent): Agent) -> Answer<Status> {
    let failed = |reason| (StatusCode::INTERNAL_SERVER_ERROR, reason);
    ask(&agent, Request::Status).await?.map(Json).map_err(failed)
}

/// What has happened to health, configuration and flows; the latest thousand.
#[utoipa::path(get, path = "/v1/events", params(EventFilter), responses(
    (status = OK, body = Vec<Event>, description = "the oldest first"),
))]
async fn events(State(agent): Agent, Query(filter): Query<EventFilter>) -> Answer<Vec<Event>> {
    let after = filter.after.unwrap_or(0);
    ask(&agent, |answer| Request::Events(after, answer)).await.map(Json)
}

/// The flows that have entries.
#[utoipa::path(get, path = "/v1/flows", params(FlowFilter), responses(
    (status = OK, body = Flows),
    (status = INTERNAL_SERVER_ERROR, body = String, description = "the table cannot be read"),
))]
async fn flows(State(agent): Agent, Query(filter): Query<FlowFilter>) -> Answer<Flows> {
    let found = look(&agent, move |Sight { names, table, jiffies, .. }, now| {
        Ok(names.select(table.flows(), &filter, now, jiffies.per(1)))
    });
    found.await?.map(Json).map_err(|reason: String| (StatusCode::INTERNAL_SERVER_ERROR, reason))
}

/// What would become of a packet, step by step.
#[utoipa::path(get, path = "/v1/explain", params(Asked), responses(
    (status = OK, body = Explained),
    (status = UNPROCESSABLE_ENTITY, body = String, description = "what is wrong with the question"),
))]
async fn explain(State(agent): Agent, Query(asked): Query<Asked>) -> Answer<Explained> {
    let explained = look(&agent, move |Sight { names, explainer, .. }, now| {
        asked.explain(&explainer, &names, now)
    });
    explained.await?.map(Json).map_err(|reason| (StatusCode::UNPROCESSABLE_ENTITY, reason))
}

/// Looks at the maps, at the present in jiffies, in a thread that may wait.
async fn look<T: Send + 'static>(
    agent: &mpsc::Sender<Request>,
    read: impl FnOnce(Sight, u32) -> Result<T, String> + Send + 'static,
) -> Result<Result<T, String>, (StatusCode, String)> {
    let sight = ask(agent, Request::Sight).await?;
    let read = contained::blocking(move || {
        let now = sight.jiffies.now().map_err(|error| error.to_string())?;
        read(sight, now)
    });
    tokio::task::spawn_blocking(read)
        .await
        .map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

/// Go by the file as it is now.
#[utoipa::path(post, path = "/v1/reload", responses(
    (status = OK, body = Reloaded),
    (status = UNPROCESSABLE_ENTITY, body = String, description = "every mistake of the file; nothing was changed"),
    (status = CONFLICT, body = String, description = "why the running agent cannot do that; nothing was changed"),
    (status = INTERNAL_SERVER_ERROR, body = String, description = "what the kernel refuses; it is tried again"),
))]
async fn reload(State(agent): Agent) -> Answer<Reloaded> {
    ask(&agent, Request::Reload).await?.map(Json).map_err(refused)
}

/// Change the file, and go by it.
#[utoipa::path(post, path = "/v1/edit", request_body = Edit, responses(
    (status = OK, body = Reloaded),
    (status = UNPROCESSABLE_ENTITY, body = String, description = "every mistake of the file; nothing was changed"),
    (status = CONFLICT, body = String, description = "why the running agent cannot do that; nothing was changed"),
    (status = INTERNAL_SERVER_ERROR, body = String, description = "what the kernel refuses; it is tried again"),
))]
async fn edit(State(agent): Agent, Json(edit): Json<Edit>) -> Answer<Reloaded> {
    ask(&agent, |answer| Request::Edit(edit, answer)).await?.map(Json).map_err(refused)
}

/// What would change if the file were this one.
#[utoipa::path(post, path = "/v1/plan", request_body = File, responses(
    (status = OK, body = Reloaded),
    (status = UNPROCESSABLE_ENTITY, body = String, description = "every mistake of the file; nothing was changed"),
    (status = CONFLICT, body = String, description = "why the running agent cannot do that; nothing was changed"),
))]
async fn plan(State(agent): Agent, Json(File { path, text }): Json<File>) -> Answer<Reloaded> {
    let parse = contained::blocking(move || config::parse(&path, &text));
    let parsed = tokio::task::spawn_blocking(parse).await;
    let parsed = parsed.map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    let (config, warnings) =
        parsed.map_err(|report| refused(Refusal::Invalid(report.to_string())))?;
    let question = |answer| Request::Plan(Box::new(config), answer);
    let planned = ask(&agent, question).await?.map_err(refused)?;
    let warnings = warnings.iter().map(ToString::to_string).collect();
    Ok(Json(Reloaded { warnings, ..planned }))
}

/// This description.
#[utoipa::path(get, path = "/v1/openapi.json", responses(
    (status = OK, description = "OpenAPI 3.1", content_type = "application/json"),
))]
async fn description() -> Json<OpenApi> {
    Json(description_of_api())
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
