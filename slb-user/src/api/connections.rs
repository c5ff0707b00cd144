//! HTTP connections: as many as there are descriptors for, and none for long.

use std::{
    collections::VecDeque,
    convert::Infallible,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Router, serve::Listener};
use hyper::{
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::{AbortHandle, JoinSet},
    time::timeout,
};

use crate::{contained, descriptors::MostConnections};

/// How long a client may take for the head of a request, and a connection may be idle.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// After that a connection ends with the answer that is under way.
const LIFETIME: Duration = Duration::from_secs(60);
/// How long a client may still take to read that.
const LAST_ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// How often connections are looked at for an idle one while all are busy.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// More than the head of any request.
const BUFFER: usize = 16 * 1024;

/// A connection that has been accepted.
struct Open {
    task: AbortHandle,
    /// Whether a request is being answered.
    is_busy: Arc<AtomicBool>,
}

/// Serves for ever. When there are too many connections, the oldest one without a request gives way to the next.
pub(super) async fn serve<L: Listener>(
    mut listener: L,
    router: Router,
    most: MostConnections,
) -> Infallible {
    let mut tasks = JoinSet::new();
    let mut open = VecDeque::<Open>::new();
    loop {
        // A failure, for want of descriptors above all, is followed by a pause.
        let (io, _) = listener.accept().await;
        while tasks.try_join_next().is_some() {}
        open.retain(|connection| !connection.task.is_finished());
        while open.len() >= most.get() {
            let idle = open.iter().find(|it| !it.is_busy.load(Ordering::Relaxed));
            if let Some(idle) = idle {
                idle.task.abort();
            }
            // One that is busy now may be idle soon, and stay: it does not end by itself.
            let _ = timeout(LOOK_AGAIN, tasks.join_next()).await;
            open.retain(|connection| !connection.task.is_finished());
        }
        let is_busy = Arc::new(AtomicBool::new(false));
        let task = contained::task(converse(io, router.clone(), Arc::clone(&is_busy)));
        open.push_back(Open { task: tasks.spawn(task), is_busy });
    }
}

/// Serves one connection until it ends. A client's mistakes are not logged.
async fn converse<I>(io: I, router: Router, is_busy: Arc<AtomicBool>)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |request| {
        let (is_busy, answer) = (Arc::clone(&is_busy), router.call(request));
        async move {
            is_busy.store(true, Ordering::Relaxed);
            let answer = answer.await;
            is_busy.store(false, Ordering::Relaxed);
            answer
        }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN).max_buf_size(BUFFER);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(io), service));
    if timeout(LIFETIME, connection.as_mut()).await.is_err() {
        connection.as_mut().graceful_shutdown();
        let _ = timeout(LAST_ANSWER_WITHIN, connection).await;
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
        time::{Instant, sleep},
    };

    use super::*;

    /// Far less than any of the limits of a single connection.
    const SOON: Duration = Duration::from_secs(5);

    /// A server with room for two connections, which takes its time.
    async fn server() -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let answer = async || {
            sleep(Duration::from_millis(200)).await;
            "answer"
        };
        let router = Router::new().route("/", get(answer));
        tokio::spawn(serve(listener, router, MostConnections::of(2)));
        addr
    }

    async fn ask(addr: std::net::SocketAddr) -> TcpStream {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        stream
    }

    async fn is_answered(mut stream: TcpStream) -> bool {
        let mut answer = [0; 15];
        let read = timeout(SOON, stream.read_exact(&mut answer)).await;
        matches!(read, Ok(Ok(_))) && &answer == b"HTTP/1.1 200 OK"
    }

    #[tokio::test]
    async fn half_open_requests_give_way_to_whole_ones() {
        let addr = server().await;
        let mut half = Vec::new();
        for _ in 0..20 {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nHost:").await.unwrap();
            half.push(stream);
        }
        assert!(is_answered(ask(addr).await).await);
    }

    #[tokio::test]
    async fn connections_that_were_busy_give_way_once_they_are_idle() {
        let addr = server().await;
        let begin = Instant::now();
        let kept = [ask(addr).await, ask(addr).await];
        sleep(Duration::from_millis(50)).await;
        assert!(is_answered(ask(addr).await).await, "after {:?}", begin.elapsed());
        drop(kept);
    }
}
