//! The agent's end of the socket. It owns nothing: it reads what the agent publishes, and passes on what changes the
//! agent.

use std::{
    error::Error,
    fs::{self, File},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::{
    Json,
    extract::{DefaultBodyLimit, Query, State},
    http::StatusCode,
    middleware,
};
use slb_api::{
    ConfigFile, Edit, Event, EventFilter, ExplainRequest, ExplainResponse, FlowFilter, Flows,
    Reloaded, Status,
};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot},
};
use utoipa::{OpenApi as _, openapi::OpenApi};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Refusal, RefusalKind,
    body::{self, LargeBodies},
    connections,
};
use crate::{
    config::{self, Config},
    contained,
    descriptors::MostConnections,
    error_chain::error_chain,
    observe::{ExplainError, Observer},
    rights::FILES,
};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Something that the agent's loop is to do.
#[derive(Debug)]
pub enum Request {
    /// Reload the file.
    Reload(oneshot::Sender<Result<Reloaded, Refusal>>),
    /// Change the file, and put it in force.
    Edit(Edit, oneshot::Sender<Result<Reloaded, Refusal>>),
    /// Say what would change if the file were this one.
    Plan(Box<Config>, oneshot::Sender<Result<Reloaded, Refusal>>),
}

/// How the API reaches the agent.
#[derive(Clone)]
pub struct Agent {
    /// To the loop.
    pub requests: mpsc::Sender<Request>,
    /// Beside the loop.
    pub observer: Arc<dyn Observer>,
}

/// What those may do who can open a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Everything. Only the agent's user and root can open it.
    Everything,
    /// See what the agent sees. Every user can open it who can enter its directory.
    Read,
}

impl Access {
    const fn mode(self) -> u32 {
        match self {
            Self::Everything => 0o600,
            Self::Read => 0o666,
        }
    }
}

/// The socket cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("API socket {}", path.display())]
pub struct ApiError {
    path: PathBuf,
    source: io::Error,
}

/// Listens on `path`; at most `most` connections are open.
///
/// The caller holds the lock that keeps other agents away, so a socket that is there is left over.
///
/// # Errors
///
/// [`ApiError`].
pub fn serve(
    path: &Path,
    access: Access,
    agent: Agent,
    most: MostConnections,
) -> Result<(), ApiError> {
    let failed = |source| ApiError { path: path.to_owned(), source };
    let raised = FILES.raise();
    // Anything else than a socket is not ours to remove: binding says that it is in the way.
    if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        fs::remove_file(path).map_err(failed)?;
    }
    let listener = listen(path, access).map_err(failed)?;
    drop(raised);
    let (router, _) = match access {
        Access::Everything => routes().split_for_parts(),
        Access::Read => reading_routes().fallback(read_only).split_for_parts(),
    };
    let reading = middleware::from_fn_with_state(LargeBodies::default(), body::read);
    let router = router.layer(DefaultBodyLimit::disable()).layer(reading).with_state(agent);
    tokio::spawn(connections::serve(listener, router, most));
    Ok(())
}

/// A socket that those whom `access` excludes cannot connect to from its first moment on. A symbolic link at `path` is not followed.
fn listen(path: &Path, access: Access) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // The kernel makes the file with the mode that the socket has when it is bound.
    let file = File::from(OwnedFd::from(socket));
    file.set_permissions(fs::Permissions::from_mode(access.mode()))?;
    let socket = Socket::from(OwnedFd::from(file));
    socket.bind(&SockAddr::unix(path)?)?;
    if access == Access::Read {
        // The process's umask has taken others' permission away.
        fs::set_permissions(path, fs::Permissions::from_mode(access.mode()))?;
    }
    socket.set_nonblocking(true)?;
    socket.listen(BACKLOG)?;
    UnixListener::from_std(OwnedFd::from(socket).into())
}

type Answer<T> = Result<Json<T>, (StatusCode, String)>;

/// All that the API answers, with its description.
fn routes() -> OpenApiRouter<Agent> {
    reading_routes().routes(routes!(reload)).routes(routes!(plan)).routes(routes!(edit))
}

/// What changes nothing.
fn reading_routes() -> OpenApiRouter<Agent> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(status))
        .routes(routes!(events))
        .routes(routes!(flows))
        .routes(routes!(explain))
        .routes(routes!(description))
}

/// What else is asked of a socket for reading.
async fn read_only() -> (StatusCode, &'static str) {
    (StatusCode::FORBIDDEN, "this socket is for reading (gateway.monitor); ask on gateway.api")
}

/// The API in the words of OpenAPI.
#[must_use]
pub fn description_of_api() -> OpenApi {
    routes().split_for_parts().1
}

// Types of parameters are not found by the paths.
#[derive(utoipa::OpenApi)]
#[openapi(
    components(schemas(slb_api::FragmentPart, slb_api::PacketProtocol)),
    info(
        title = "slb",
        description = "The local API of the agent, on a unix socket: curl --unix-socket /run/slb/api.sock \
                   http://slb/v1/status. Every process that may open gateway.api may do everything, and by gateway.monitor \
                   GET what is here. An error is one \
                   or more lines of text."
    )
)]
struct Description;

/// How things are.
#[utoipa::path(get, path = "/v1/status", responses(
    (status = OK, body = Status),
    (status = INTERNAL_SERVER_ERROR, body = String, description = "the maps cannot be read"),
))]
async fn status(State(agent): State<Agent>) -> Answer<Status> {
    let status = observe(&agent.observer, Observer::status).await?;
    status.map(Json).map_err(|error| failed(&error))
}

/// What has happened to health, configuration and flows; the latest thousand.
#[utoipa::path(get, path = "/v1/events", params(EventFilter), responses(
    (status = OK, body = Vec<Event>, description = "the oldest first"),
))]
async fn events(State(agent): State<Agent>, Query(filter): Query<EventFilter>) -> Json<Vec<Event>> {
    Json(agent.observer.events(filter.after.unwrap_or(0)))
}

/// The flows that have entries.
#[utoipa::path(get, path = "/v1/flows", params(FlowFilter), responses(
    (status = OK, body = Flows),
    (status = INTERNAL_SERVER_ERROR, body = String, description = "the table cannot be read"),
))]
async fn flows(State(agent): State<Agent>, Query(filter): Query<FlowFilter>) -> Answer<Flows> {
    let found = observe(&agent.observer, move |observer| observer.flows(&filter)).await?;
    found.map(Json).map_err(|error| failed(&error))
}

/// What would become of a packet, step by step.
#[utoipa::path(get, path = "/v1/explain", params(ExplainRequest), responses(
    (status = OK, body = ExplainResponse),
    (status = UNPROCESSABLE_ENTITY, body = String, description = "what is wrong with the question"),
    (status = INTERNAL_SERVER_ERROR, body = String, description = "the maps cannot be read"),
))]
async fn explain(
    State(agent): State<Agent>,
    Query(request): Query<ExplainRequest>,
) -> Answer<ExplainResponse> {
    let explained = observe(&agent.observer, move |observer| observer.explain(&request)).await?;
    explained.map(Json).map_err(|error| match error {
        ExplainError::Read(error) => failed(&error),
        _ => (StatusCode::UNPROCESSABLE_ENTITY, error.to_string()),
    })
}

/// Reads in a thread that may wait.
pub(super) async fn observe<T: Send + 'static>(
    observer: &Arc<dyn Observer>,
    read: impl FnOnce(&dyn Observer) -> T + Send + 'static,
) -> Result<T, (StatusCode, String)> {
    let observer = Arc::clone(observer);
    let read = contained::blocking(move || read(&*observer));
    tokio::task::spawn_blocking(read).await.map_err(|error| failed(&error))
}

pub(super) fn failed(error: &(dyn Error + 'static)) -> (StatusCode, String) {
    (StatusCode::INTERNAL_SERVER_ERROR, error_chain(error))
}

/// Go by the file as it is now.
#[utoipa::path(post, path = "/v1/reload", responses(
    (status = OK, body = Reloaded),
    (status = UNPROCESSABLE_ENTITY, body = String, description = "every mistake of the file; nothing was changed"),
    (status = CONFLICT, body = String, description = "why the running agent cannot do that; nothing was changed"),
    (status = INTERNAL_SERVER_ERROR, body = String, description = "what the kernel refuses; it is tried again"),
))]
async fn reload(State(agent): State<Agent>) -> Answer<Reloaded> {
    ask(&agent, Request::Reload).await?.map(Json).map_err(refused)
}

/// Change the file, and go by it.
#[utoipa::path(post, path = "/v1/edit", request_body = Edit, responses(
    (status = OK, body = Reloaded),
    (status = UNPROCESSABLE_ENTITY, body = String, description = "every mistake of the file; nothing was changed"),
    (status = CONFLICT, body = String, description = "why the running agent cannot do that; nothing was changed"),
    (status = INTERNAL_SERVER_ERROR, body = String, description = "what the kernel refuses; it is tried again"),
))]
async fn edit(State(agent): State<Agent>, Json(edit): Json<Edit>) -> Answer<Reloaded> {
    ask(&agent, |answer| Request::Edit(edit, answer)).await?.map(Json).map_err(refused)
}

/// What would change if the file were this one.
#[utoipa::path(post, path = "/v1/plan", request_body = ConfigFile, responses(
    (status = OK, body = Reloaded),
    (status = UNPROCESSABLE_ENTITY, body = String, description = "every mistake of the file; nothing was changed"),
    (status = CONFLICT, body = String, description = "why the running agent cannot do that; nothing was changed"),
))]
async fn plan(
    State(agent): State<Agent>,
    Json(ConfigFile { path, text }): Json<ConfigFile>,
) -> Answer<Reloaded> {
    let parse = contained::blocking(move || config::parse(&path, &text));
    let parsed = tokio::task::spawn_blocking(parse).await.map_err(|error| failed(&error))?;
    let (config, warnings) =
        parsed.map_err(|report| refused(Refusal::File(config::LoadError::Invalid(report))))?;
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

/// Asks the agent's loop.
async fn ask<T>(
    agent: &Agent,
    question: impl FnOnce(oneshot::Sender<T>) -> Request,
) -> Result<T, (StatusCode, String)> {
    let stopping = || (StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping".to_owned());
    let (answer, answered) = oneshot::channel();
    agent.requests.send(question(answer)).await.map_err(|_| stopping())?;
    answered.await.map_err(|_| stopping())
}

fn refused(refusal: Refusal) -> (StatusCode, String) {
    let status = match refusal.kind() {
        RefusalKind::Invalid => StatusCode::UNPROCESSABLE_ENTITY,
        RefusalKind::Conflict => StatusCode::CONFLICT,
        RefusalKind::Incomplete => StatusCode::INTERNAL_SERVER_ERROR,
    };
    (status, error_chain(&refusal))
}
