use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use hyper::StatusCode;
use slb_api::{
    ConfigFile, Event, ExplainRequest, ExplainResponse, FlowFilter, Flows, Reloaded, Status,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::mpsc,
};

use super::*;
use crate::{
    config::source::LARGEST_FILE,
    datapath::TableError,
    descriptors::MostConnections,
    observe::{
        ExplainError, Observer, ReadError,
        fixtures::{self, status},
    },
};

/// Sees the fixture, or maps that cannot be read.
struct Fixture {
    is_readable: bool,
}

impl Observer for Fixture {
    fn status(&self) -> Result<Status, ReadError> {
        if self.is_readable { Ok(status()) } else { Err(unreadable()) }
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

fn unreadable() -> ReadError {
    let source = std::io::Error::from_raw_os_error(libc::EPERM);
    ReadError::Table(TableError::Batch { map: "SLB_VERDICTS", source })
}

/// A socket in a directory of its own, and the agent's end of the requests.
struct Served {
    socket: PathBuf,
    requests: mpsc::Receiver<Request>,
    _directory: TempDir,
}

fn agent(is_readable: bool) -> (Agent, mpsc::Receiver<Request>) {
    let (requests, received) = mpsc::channel(4);
    (Agent { requests, observer: Arc::new(Fixture { is_readable }) }, received)
}

fn serve_somewhere() -> Served {
    serve_maps(true)
}

fn serve_maps(is_readable: bool) -> Served {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let (agent, requests) = agent(is_readable);
    serve(&socket, Access::Everything, agent, MostConnections::default()).unwrap();
    Served { socket, requests, _directory: directory }
}

#[tokio::test]
async fn given_a_running_agent_when_asked_for_its_status_then_the_answer_arrives_whole() {
    let Served { socket, requests: _requests, _directory } = serve_somewhere();
    let mut connection = Connection::open(&socket).await.unwrap();

    assert_eq!(connection.get::<Status>("/v1/status").await.unwrap(), status());
    let again = connection.get::<Status>("/v1/status").await.unwrap();
    assert_eq!(again, status(), "and again");
}

#[tokio::test]
async fn given_several_clients_when_they_ask_at_once_then_each_gets_its_answer() {
    let Served { socket, requests: _requests, _directory } = serve_somewhere();
    let clients: Vec<_> = (0..16)
        .map(|_| {
            let socket = socket.clone();
            tokio::spawn(async move {
                Connection::open(&socket).await.unwrap().get::<Status>("/v1/status").await.unwrap()
            })
        })
        .collect();
    for client in clients {
        assert_eq!(client.await.unwrap(), status());
    }
}

#[tokio::test]
async fn given_an_agent_with_a_failure_when_asked_then_the_client_learns_why() {
    let Served { socket, requests: _requests, _directory } = serve_maps(false);
    let mut connection = Connection::open(&socket).await.unwrap();

    match connection.get::<Status>("/v1/status").await {
        Err(ClientError::Refused { status, reason }) => {
            assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
            let cause = "map SLB_VERDICTS: reading its elements: Operation not permitted";
            assert!(reason.starts_with(cause), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn given_an_agent_that_is_stopping_when_told_to_reload_then_the_client_is_told_so() {
    let Served { socket, requests, _directory } = serve_somewhere();
    drop(requests);
    let mut connection = Connection::open(&socket).await.unwrap();

    match connection.post::<Reloaded>("/v1/reload", &()).await {
        Err(ClientError::Refused { status, .. }) => {
            assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn given_an_agent_that_drops_a_request_when_told_to_reload_then_the_client_is_not_left_waiting()
 {
    let Served { socket, mut requests, _directory } = serve_somewhere();
    tokio::spawn(async move { drop(requests.recv().await) });
    let mut connection = Connection::open(&socket).await.unwrap();

    let answer = connection.post::<Reloaded>("/v1/reload", &()).await;
    assert!(matches!(answer, Err(ClientError::Refused { .. })), "{answer:?}");
}

#[tokio::test]
async fn status_is_served_while_the_loop_is_busy() {
    // Nothing takes requests off the channel.
    let Served { socket, requests: _requests, _directory } = serve_somewhere();
    let mut busy = Connection::open(&socket).await.unwrap();
    let reload = tokio::spawn(async move { busy.post::<Reloaded>("/v1/reload", &()).await });

    let mut connection = Connection::open(&socket).await.unwrap();
    assert_eq!(connection.get::<Status>("/v1/status").await.unwrap(), status());
    assert!(!reload.is_finished());
}

#[tokio::test]
async fn wrong_question_is_unprocessable_and_says_why() {
    let Served { socket, requests: _requests, _directory } = serve_somewhere();
    let mut connection = Connection::open(&socket).await.unwrap();
    let request = ExplainRequest::new(
        slb_api::PacketProtocol::Tcp,
        "198.51.100.7:4000".parse().unwrap(),
        "[2001:db8::1]:80".parse().unwrap(),
    );
    match connection.get_with::<ExplainResponse>("/v1/explain", &request).await {
        Err(ClientError::Refused { status, reason }) => {
            assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
            assert!(reason.contains("different families"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn given_a_path_that_is_not_there_when_asked_for_then_it_is_not_found() {
    let Served { socket, requests: _requests, _directory } = serve_somewhere();
    let mut connection = Connection::open(&socket).await.unwrap();

    match connection.get::<Status>("/v9/anything").await {
        Err(ClientError::Refused { status, .. }) => assert_eq!(status, StatusCode::NOT_FOUND),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn given_an_agent_of_another_version_when_asked_then_the_client_says_so() {
    let Served { socket, requests: _requests, _directory } = serve_somewhere();
    let mut connection = Connection::open(&socket).await.unwrap();

    let answer = connection.get::<Vec<u64>>("/v1/status").await;
    assert!(matches!(answer, Err(ClientError::Answer(_))), "{answer:?}");
}

#[tokio::test]
async fn given_no_agent_when_a_client_connects_then_it_learns_where_it_looked() {
    let directory = tempfile::tempdir().unwrap();
    let left_over = directory.path().join("left-over.sock");
    drop(std::os::unix::net::UnixListener::bind(&left_over).unwrap());
    for socket in [directory.path().join("absent.sock"), left_over] {
        let error = Connection::open(&socket).await.unwrap_err();
        assert!(matches!(error, ClientError::NoAgent { .. }), "{error:?}");
        assert!(error.to_string().contains(socket.to_str().unwrap()), "{error}");
    }
}

#[tokio::test]
async fn given_a_socket_that_was_left_over_when_served_then_it_is_replaced() {
    let Served { socket, requests, _directory } = serve_somewhere();
    drop(requests);
    let (agent, _requests) = agent(true);
    serve(&socket, Access::Everything, agent, MostConnections::default()).unwrap();

    let mut connection = Connection::open(&socket).await.unwrap();
    assert_eq!(connection.get::<Status>("/v1/status").await.unwrap(), status());
}

#[tokio::test]
async fn given_a_served_socket_when_looked_at_then_only_its_owner_may_open_it() {
    let served = serve_somewhere();
    let metadata = fs::metadata(&served.socket).unwrap();

    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn socket_for_reading_is_open_to_all_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("monitor.sock");
    let (agent, mut requests) = agent(true);
    serve(&socket, Access::Read, agent, MostConnections::default()).unwrap();
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o666);

    let mut connection = Connection::open(&socket).await.unwrap();
    assert_eq!(connection.get::<Status>("/v1/status").await.unwrap(), status());
    for path in ["reload", "edit", "plan"] {
        let head = format!(
            "POST /v1/{path} HTTP/1.1\r\nhost: slb\r\ncontent-type: application/json\r\n\
             content-length: 2\r\nconnection: close\r\n\r\n"
        );
        let answer = status_line(&socket, &head, b"{}").await;
        assert_eq!(answer, "HTTP/1.1 403 Forbidden", "{path}");
    }
    assert!(requests.try_recv().is_err(), "the agent was asked nothing");
}

#[tokio::test]
async fn socket_is_never_open_to_others() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let (is_done, path) = (Arc::new(AtomicBool::new(false)), socket.clone());
    let stop = Arc::clone(&is_done);
    let looking = std::thread::spawn(move || {
        let mut modes = BTreeSet::new();
        while !stop.load(Ordering::Relaxed) {
            modes.extend(fs::symlink_metadata(&path).map(|it| it.permissions().mode() & 0o777));
        }
        modes
    });
    for _ in 0..200 {
        serve(&socket, Access::Everything, agent(true).0, MostConnections::default()).unwrap();
    }
    is_done.store(true, Ordering::Relaxed);
    assert_eq!(looking.join().unwrap(), BTreeSet::from([0o600]));
}

#[tokio::test]
async fn socket_does_not_follow_a_symbolic_link() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, elsewhere) = (directory.path().join("api.sock"), directory.path().join("other"));
    std::os::unix::fs::symlink(&elsewhere, &socket).unwrap();
    serve(&socket, Access::Everything, agent(true).0, MostConnections::default()).unwrap_err();
    assert!(!elsewhere.exists());
}

/// The status line of the answer to the head and body of a request.
async fn status_line(socket: &Path, head: &str, body: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    // The agent may have had enough of it.
    let _ = stream.write_all(body).await;
    let mut answer = vec![0; 64];
    let read = stream.read(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer[..read]).into_owned();
    answer.lines().next().unwrap_or_default().to_owned()
}

fn post(path: &str, length: usize) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: slb\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
}

#[tokio::test]
async fn largest_file_that_can_be_read_can_be_planned() {
    let Served { socket, requests: _requests, _directory } = serve_somewhere();
    // It takes twice as many bytes in JSON, and it is wrong, so that the agent's loop is not needed.
    let size = usize::try_from(LARGEST_FILE).unwrap();
    let line = format!("#{}\n", "\"".repeat(1022));
    let text = line.repeat(size / 1024 - 1) + &format!("{:1023}\n", "x = 1");
    assert_eq!(text.len(), size);
    let file = ConfigFile { path: "large.toml".into(), text };
    let mut connection = Connection::open(&socket).await.unwrap();
    match connection.post::<Reloaded>("/v1/plan", &file).await {
        Err(ClientError::Refused { status: StatusCode::UNPROCESSABLE_ENTITY, reason }) => {
            assert!(reason.contains("unknown key 'x'"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn body_has_a_bound_in_bytes_and_time() {
    let Served { socket, requests: _requests, _directory } = serve_somewhere();
    let large = vec![b' '; 100_000];
    let line = status_line(&socket, &post("/v1/edit", large.len()), &large).await;
    assert_eq!(line, "HTTP/1.1 413 Payload Too Large");
    let line = status_line(&socket, &post("/v1/plan", 1 << 30), b"").await;
    assert_eq!(line, "HTTP/1.1 413 Payload Too Large", "before it comes");
}

#[tokio::test]
async fn body_that_does_not_come_is_given_up() {
    let Served { socket, requests: _requests, _directory } = serve_somewhere();
    // Ten seconds each, at once.
    let heads = ["/v1/edit", "/v1/plan", "/v1/reload"].map(|path| post(path, 100));
    let [edit, plan, reload] = &heads;
    let lines = tokio::join!(
        status_line(&socket, edit, b"{"),
        status_line(&socket, plan, b"{"),
        status_line(&socket, reload, b"{"),
    );
    let given_up = "HTTP/1.1 408 Request Timeout".to_owned();
    assert_eq!(lines, (given_up.clone(), given_up.clone(), given_up));
}

#[tokio::test]
async fn given_a_directory_that_is_not_there_when_served_then_the_error_names_the_socket() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("absent").join("api.sock");
    let error =
        serve(&socket, Access::Everything, agent(true).0, MostConnections::default()).unwrap_err();

    assert!(error.to_string().contains(socket.to_str().unwrap()), "{error}");
    assert!(std::error::Error::source(&error).is_some());
}

#[tokio::test]
async fn given_the_api_when_asked_for_its_description_then_that_is_whole() {
    let served = serve_somewhere();
    let mut connection = Connection::open(&served.socket).await.unwrap();
    let described: serde_json::Value = connection.get("/v1/openapi.json").await.unwrap();

    let paths = described["paths"].as_object().unwrap();
    let named: Vec<&str> = paths.keys().map(String::as_str).collect();
    let expected = [
        "/v1/edit",
        "/v1/events",
        "/v1/explain",
        "/v1/flows",
        "/v1/openapi.json",
        "/v1/plan",
        "/v1/reload",
        "/v1/status",
    ];
    assert_eq!(named, expected);
    let (schemas, text) = (&described["components"]["schemas"], described.to_string());
    let references = text.split("#/components/schemas/").skip(1);
    for reference in references {
        let name = reference.split('"').next().unwrap();
        assert!(schemas[name].is_object(), "nothing says what {name} is");
    }
    let fields = schemas["BackendStatus"]["properties"].as_object().unwrap();
    let sent = serde_json::to_value(fixtures::backend("web-1")).unwrap();
    let sent: Vec<&String> = sent.as_object().unwrap().keys().collect();
    assert_eq!(fields.keys().collect::<Vec<_>>(), sent);
}
