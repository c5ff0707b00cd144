use std::{
    fs,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::PathBuf,
};

use hyper::StatusCode;
use tempfile::TempDir;
use tokio::sync::mpsc;

use super::{fixtures::status, *};
use crate::descriptors::MostConnections;

/// A socket in a directory of its own, and the agent's end of the questions.
struct Served {
    socket: PathBuf,
    questions: mpsc::Receiver<Request>,
    _directory: TempDir,
}

fn serve_somewhere() -> Served {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let (agent, questions) = mpsc::channel(4);
    serve(&socket, agent, MostConnections::default()).unwrap();
    Served { socket, questions, _directory: directory }
}

impl Served {
    /// Answers every question in the same way.
    fn answering(mut self, answer: Result<Status, String>) -> (PathBuf, TempDir) {
        tokio::spawn(async move {
            while let Some(Request::Status(asked)) = self.questions.recv().await {
                asked.send(answer.clone()).unwrap();
            }
        });
        (self.socket, self._directory)
    }
}

#[tokio::test]
async fn given_a_running_agent_when_asked_for_its_status_then_the_answer_arrives_whole() {
    let (socket, _directory) = serve_somewhere().answering(Ok(status()));
    let mut connection = Connection::open(&socket).await.unwrap();

    assert_eq!(connection.get::<Status>("/v1/status").await.unwrap(), status());
    let again = connection.get::<Status>("/v1/status").await.unwrap();
    assert_eq!(again, status(), "and again");
}

#[tokio::test]
async fn given_several_clients_when_they_ask_at_once_then_each_gets_its_answer() {
    let (socket, _directory) = serve_somewhere().answering(Ok(status()));
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
    let why = "map SLB_VERDICTS";
    let (socket, _directory) = serve_somewhere().answering(Err(why.to_owned()));
    let mut connection = Connection::open(&socket).await.unwrap();

    match connection.get::<Status>("/v1/status").await {
        Err(ClientError::Refused { status, reason }) => {
            assert_eq!((status, &*reason), (StatusCode::INTERNAL_SERVER_ERROR, why));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn given_an_agent_that_is_stopping_when_asked_then_the_client_is_told_so() {
    let Served { socket, questions, _directory } = serve_somewhere();
    drop(questions);
    let mut connection = Connection::open(&socket).await.unwrap();

    match connection.get::<Status>("/v1/status").await {
        Err(ClientError::Refused { status, .. }) => {
            assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn given_an_agent_that_drops_a_question_when_asked_then_the_client_is_not_left_waiting() {
    let Served { socket, mut questions, _directory } = serve_somewhere();
    tokio::spawn(async move { drop(questions.recv().await) });
    let mut connection = Connection::open(&socket).await.unwrap();

    let answer = connection.get::<Status>("/v1/status").await;
    assert!(matches!(answer, Err(ClientError::Refused { .. })), "{answer:?}");
}

#[tokio::test]
async fn given_a_path_that_is_not_there_when_asked_for_then_it_is_not_found() {
    let (socket, _directory) = serve_somewhere().answering(Ok(status()));
    let mut connection = Connection::open(&socket).await.unwrap();

    match connection.get::<Status>("/v9/anything").await {
        Err(ClientError::Refused { status, .. }) => assert_eq!(status, StatusCode::NOT_FOUND),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn given_an_agent_of_another_version_when_asked_then_the_client_says_so() {
    let (socket, _directory) = serve_somewhere().answering(Ok(status()));
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
    let Served { socket, questions, _directory } = serve_somewhere();
    drop(questions);
    let (agent, questions) = mpsc::channel(4);
    serve(&socket, agent, MostConnections::default()).unwrap();
    let next = Served { socket, questions, _directory };
    let (socket, _directory) = next.answering(Ok(status()));

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
async fn given_a_directory_that_is_not_there_when_served_then_the_error_names_the_socket() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("absent").join("api.sock");
    let error = serve(&socket, mpsc::channel(1).0, MostConnections::default()).unwrap_err();

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
