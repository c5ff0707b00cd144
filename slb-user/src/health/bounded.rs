//! A connection to a server that may send without an end.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A connection that fails after so many bytes (and what the buffer of the last read takes), or so many reads.
///
/// The reads count because an HTTP parser begins anew with each: one byte at a time costs far more than its length.
#[derive(Debug)]
pub(super) struct Bounded<S> {
    inner: S,
    bytes: usize,
    reads: usize,
}

impl<S> Bounded<S> {
    /// More than any sensible answer takes up to its status, interim answers (1xx) included.
    pub(super) const BYTES: usize = 64 << 10;
    /// An answer comes in a few segments.
    pub(super) const READS: usize = 1024;

    pub(super) const fn new(inner: S) -> Self {
        Self { inner, bytes: Self::BYTES, reads: Self::READS }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.bytes == 0 || self.reads == 0 {
            return Poll::Ready(Err(io::ErrorKind::FileTooLarge.into()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(context, buffer))?;
        let read = buffer.filled().len() - before;
        self.bytes = self.bytes.saturating_sub(read);
        self.reads -= 1;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Bounded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}
