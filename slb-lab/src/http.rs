//! The little HTTP/1.1 that a client of the lab speaks.
//!
//! By hand, because a test wants to know what happened to the connection, which client libraries
//! hide behind pools and retries.

use std::io;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// More than any server of the lab sends before the body.
const MAX_HEAD: usize = 4096;

/// Response head, and how much body followed it.
#[derive(Debug)]
pub(crate) struct Response {
    /// The header `x-backend`.
    pub backend: String,
    /// Bytes of body, all of them read.
    pub body: u64,
}

/// One GET on a connection that stays open; reads the whole response.
///
/// # Errors
///
/// Those of the socket; `InvalidData` for anything but a 200 with a length and `x-backend`.
pub(crate) async fn get(stream: &mut TcpStream, path: &str) -> io::Result<Response> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: lab\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;

    let mut head = Vec::with_capacity(512);
    let end = loop {
        if let Some(at) = head.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
        if head.len() > MAX_HEAD {
            return Err(invalid("endless response head"));
        }
        if stream.read_buf(&mut head).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    };
    let (backend, length) = parse_head(&head[..end])?;
    let mut body = as_u64(head.len() - end);
    let mut buffer = vec![0; 64 * 1024];
    while body < length {
        match stream.read(&mut buffer).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => body += as_u64(n),
        }
    }
    Ok(Response { backend, body })
}

fn parse_head(head: &[u8]) -> io::Result<(String, u64)> {
    let head = std::str::from_utf8(head).map_err(|_| invalid("response head is not text"))?;
    let (status, headers) = head.split_once("\r\n").ok_or_else(|| invalid("no status line"))?;
    if status.split(' ').nth(1) != Some("200") {
        return Err(invalid(status));
    }
    let header = |name: &str| {
        headers
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim())
    };
    let backend = header("x-backend").ok_or_else(|| invalid("no x-backend"))?;
    let length = header("content-length")
        .and_then(|value| value.parse().ok())
        .ok_or_else(|| invalid("no content-length"))?;
    Ok((backend.to_owned(), length))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

fn as_u64(n: usize) -> u64 {
    u64::try_from(n).expect("a usize fits into 64 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_response_heads_when_parsed_then_only_a_complete_200_is_accepted() {
        let cases = [
            ("HTTP/1.1 200 OK\r\nX-Backend: web-1\r\nContent-Length: 5\r\n\r\n", Some(5)),
            ("HTTP/1.1 200 OK\r\nx-backend: web-1\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", None),
            ("HTTP/1.1 503 No\r\nx-backend: web-1\r\ncontent-length: 5\r\n\r\n", None),
        ];
        for (head, length) in cases {
            let parsed = parse_head(head.as_bytes()).ok();
            assert_eq!(parsed, length.map(|length| ("web-1".to_owned(), length)), "{head:?}");
        }
    }
}
