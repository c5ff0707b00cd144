//! Bodies of requests: read whole before they are looked at, with a bound in bytes and in time.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, HttpBody as _, to_bytes},
    extract::{Request, State},
    http::StatusCode,
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use tokio::{sync::Semaphore, time::timeout};

use crate::config::source::LARGEST_FILE;

/// Of an edit: far more than its few names and numbers.
const LARGEST: usize = 64 << 10;
/// Of a configuration file in JSON: a line break, a tab and a quotation mark take two bytes each there.
const LARGEST_WITH_FILE: usize = 2 * LARGEST_FILE as usize + LARGEST;
/// How long the client may take for it.
const WITHIN: Duration = Duration::from_secs(10);

/// Whose bodies may be as large as a file.
pub(super) const WITH_FILE: &str = "/v1/plan";

/// Large bodies are read and worked on one at a time, so that they do not take the memory of all connections together.
#[derive(Clone, Debug)]
pub(super) struct LargeBodies(Arc<Semaphore>);

impl Default for LargeBodies {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

/// Reads the body before the request goes on.
pub(super) async fn read(
    State(LargeBodies(turns)): State<LargeBodies>,
    request: Request,
    next: Next,
) -> Response {
    let is_large = request.uri().path() == WITH_FILE;
    let (_turn, largest) = if is_large {
        (turns.acquire_owned().await.ok(), LARGEST_WITH_FILE)
    } else {
        (None, LARGEST)
    };
    let too_large = || {
        let text = format!("the body is not complete, or larger than {largest} bytes");
        (StatusCode::PAYLOAD_TOO_LARGE, text).into_response()
    };
    let (head, body) = request.into_parts();
    if body.size_hint().lower() > largest as u64 {
        return too_large();
    }
    match timeout(WITHIN, to_bytes(body, largest)).await {
        Ok(Ok(bytes)) => next.run(Request::from_parts(head, Body::from(bytes))).await,
        Ok(Err(_)) => too_large(),
        Err(_) => {
            let text = format!("the body did not come within {} s", WITHIN.as_secs());
            (StatusCode::REQUEST_TIMEOUT, text).into_response()
        }
    }
}
