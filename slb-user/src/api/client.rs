//! The command's end of the socket.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, StatusCode, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

/// Far more than an agent needs.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// More, for each mebibyte that it has to read: a busy gateway parses some in a second.
const ANSWER_WITHIN_MORE: Duration = Duration::from_millis(750);

/// The agent cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No agent listens there.
    #[error("no agent answers on {}; is `slb run` running, and with this `gateway.api`?", path.display())]
    NoAgent {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It may be there, but does not let us in.
    #[error("cannot ask the agent on {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not answer in time.
    #[error("the agent does not answer within {} s", .0.as_secs())]
    Silent(Duration),
    /// The connection was closed.
    #[error("the agent closed the connection")]
    Http(#[from] hyper::Error),
    /// The agent said no.
    #[error("the agent answers {status}: {reason}")]
    Refused {
        /// HTTP status.
        status: StatusCode,
        /// The agent's text.
        reason: String,
    },
    /// A parameter that no request can have.
    #[error("not a request that can be made")]
    Uri(#[from] hyper::http::uri::InvalidUri),
    /// The answer has another format.
    #[error("the agent's answer is not understood; is it of another version?")]
    Answer(#[from] serde_json::Error),
}

/// To a running agent.
#[derive(Debug)]
pub struct Connection {
    path: PathBuf,
    /// For the next question. The agent closes one that is idle, so each question has its own.
    requests: Option<http1::SendRequest<Full<Bytes>>>,
}

impl Connection {
    /// Connects to the agent's socket.
    ///
    /// # Errors
    ///
    /// [`ClientError::NoAgent`] above all.
    pub async fn open(path: &Path) -> Result<Self, ClientError> {
        let requests = Some(Self::connect(path).await?);
        Ok(Self { path: path.to_owned(), requests })
    }

    async fn connect(path: &Path) -> Result<http1::SendRequest<Full<Bytes>>, ClientError> {
        let stream = UnixStream::connect(path).await.map_err(|source| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    ClientError::NoAgent { path, source }
                }
                _ => ClientError::Connect { path, source },
            }
        })?;
        let (requests, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(requests)
    }

    /// Asks for `path`.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&mut self, path: &'static str) -> Result<T, ClientError> {
        self.ask(Method::GET, path, Bytes::new()).await
    }

    /// Asks for `path` with parameters.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn get_with<T: DeserializeOwned>(
        &mut self,
        path: &'static str,
        parameters: &impl Serialize,
    ) -> Result<T, ClientError> {
        let parameters = serde_urlencoded::to_string(parameters).unwrap_or_default();
        self.ask(Method::GET, &format!("{path}?{parameters}"), Bytes::new()).await
    }

    /// Sends `body` to `path`.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn post<T: DeserializeOwned>(
        &mut self,
        path: &'static str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body)?;
        self.ask(Method::POST, path, body.into()).await
    }

    async fn ask<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let patience = ANSWER_WITHIN + ANSWER_WITHIN_MORE * (body.len() >> 20) as u32;
        let answer = tokio::time::timeout(patience, self.exchange(method, path, body)).await;
        answer.map_err(|_| ClientError::Silent(patience))?
    }

    async fn exchange<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = path.parse()?;
        let headers = request.headers_mut();
        headers.insert(header::HOST, header::HeaderValue::from_static("slb"));
        let json = header::HeaderValue::from_static("application/json");
        headers.insert(header::CONTENT_TYPE, json);
        let mut requests = match self.requests.take() {
            Some(requests) => requests,
            None => Self::connect(&self.path).await?,
        };
        let response = requests.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        if !status.is_success() {
            let reason = String::from_utf8_lossy(&body).into_owned();
            return Err(ClientError::Refused { status, reason });
        }
        Ok(serde_json::from_slice(&body)?)
    }
}
