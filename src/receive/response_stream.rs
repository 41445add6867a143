//! The stream that responses are written to: they have a deadline, and what hyper refuses by itself
//! (a head that is malformed or too large) gets the same form as our own refusals, and is counted.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// A connection whose peer must read its responses in time.
///
/// A response that begins while none is [due](ResponseDue) is one of hyper's: it is replaced by
/// what `refuse` returns for its status.
pub struct ResponseStream<S, F, T> {
    stream: S,
    timeout: Duration,
    /// Runs while the peer reads nothing.
    deadline: Option<Pin<Box<Sleep>>>,
    response_due: ResponseDue,
    refuse: F,
    /// Called when a response has been written.
    on_written: T,
    /// A response has begun to be written.
    is_responding: bool,
    /// Bytes that are written in place of hyper's own response, and how many of them are written.
    replacement: (Vec<u8>, usize),
}

/// Whether the service has returned a response that has not begun to be written.
#[derive(Clone, Debug, Default)]
pub struct ResponseDue(Arc<AtomicBool>);

impl ResponseDue {
    /// Records that the service has returned a response.
    pub fn answer(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

impl<S, F: FnMut(StatusCode) -> Vec<u8>, T: FnMut()> ResponseStream<S, F, T> {
    /// Wraps a stream. `refuse` returns a whole response, head and body; `on_written` is called
    /// when a response has been written.
    pub fn new(stream: S, timeout: Duration, response_due: ResponseDue, refuse: F, on_written: T) -> Self {
        Self {
            stream,
            timeout,
            deadline: None,
            response_due,
            refuse,
            on_written,
            is_responding: false,
            replacement: (Vec::new(), 0),
        }
    }

    /// Returns the wrapped stream.
    pub fn into_inner(self) -> S {
        self.stream
    }

    /// Applies the deadline to a result of the stream.
    fn in_time<O>(&mut self, context: &mut Context<'_>, said: Poll<io::Result<O>>) -> Poll<io::Result<O>> {
        if said.is_ready() {
            self.deadline = None;
            return said;
        }
        let timeout = self.timeout;
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(sleep(timeout)));
        ready!(deadline.as_mut().poll(context));
        deadline.as_mut().reset(Instant::now() + timeout);
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

/// Returns the status of a response that begins here.
fn status(bytes: &[u8]) -> Option<StatusCode> {
    let line = bytes.strip_prefix(b"HTTP/1.1 ").or_else(|| bytes.strip_prefix(b"HTTP/1.0 "))?;
    StatusCode::from_bytes(line.get(..3)?).ok()
}

impl<S, F, T> ResponseStream<S, F, T>
where
    S: AsyncWrite + Unpin,
    F: FnMut(StatusCode) -> Vec<u8> + Unpin,
    T: FnMut() + Unpin,
{
    fn write_instead(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.replacement.1 < self.replacement.0.len() {
            let written =
                Pin::new(&mut self.stream).poll_write(context, &self.replacement.0[self.replacement.1..]);
            let written = ready!(self.in_time(context, written))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.replacement.1 += written;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin, F: Unpin, T: Unpin> AsyncRead for ResponseStream<S, F, T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match ready!(Pin::new(&mut self.stream).poll_read(context, buffer)) {
            // The end without close_notify. A message itself says where it ends, so a truncated
            // body is found by its length (RFC 9112, section 9.8).
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Poll::Ready(Ok(())),
            read => Poll::Ready(read),
        }
    }
}

impl<S, F, T> AsyncWrite for ResponseStream<S, F, T>
where
    S: AsyncWrite + Unpin,
    F: FnMut(StatusCode) -> Vec<u8> + Unpin,
    T: FnMut() + Unpin,
{
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.write_instead(context))?;
        // The interim response for a body (100) is hyper's.
        if let Some(status) = status(bytes).filter(|status| !status.is_informational())
            && !self.response_due.0.load(Ordering::Relaxed)
            && self.replacement.0.is_empty()
        {
            self.replacement = ((self.refuse)(status), 0);
            // hyper writes its refusal in one piece, and closes after it.
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        let written = ready!(self.in_time(context, written))?;
        if status(bytes).is_some_and(|status| !status.is_informational()) {
            self.is_responding |= self.response_due.take();
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.write_instead(context))?;
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        ready!(self.in_time(context, flushed))?;
        if std::mem::take(&mut self.is_responding) {
            (self.on_written)();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.write_instead(context))?;
        let shut = Pin::new(&mut self.stream).poll_shutdown(context);
        self.in_time(context, shut)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[test]
    fn a_response_is_recognised_by_its_first_line() {
        for (bytes, expected) in [
            (&b"HTTP/1.1 200 OK\r\n"[..], Some(200)),
            (b"HTTP/1.0 200 OK\r\n", Some(200)),
            (b"HTTP/1.1 100 Continue\r\n", Some(100)),
            (b"HTTP/1.1 20", None),
            (b"{}", None),
            (b"", None),
        ] {
            assert_eq!(status(bytes).map(|status| status.as_u16()), expected);
        }
    }

    #[tokio::test]
    async fn responses_by_hyper_itself_are_replaced() {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        let response_due = ResponseDue::default();
        let refuse = |status: StatusCode| format!("ours {}", status.as_u16()).into_bytes();
        let mut answers =
            ResponseStream::new(ours, Duration::from_secs(60), response_due.clone(), refuse, || ());
        answers.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
        response_due.answer();
        answers.write_all(b"HTTP/1.1 404 Not Found\r\n\r\n{}").await.unwrap();
        answers.write_all(b"HTTP/1.1 431 Request Header Fields Too Large\r\n\r\n").await.unwrap();
        answers.shutdown().await.unwrap();
        let mut seen = String::new();
        theirs.read_to_string(&mut seen).await.unwrap();
        assert_eq!(seen, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\n\r\n{}ours 431");
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_reads_nothing_has_a_deadline() {
        let (ours, mut theirs) = tokio::io::duplex(4);
        let timeout = Duration::from_secs(10);
        let mut answers =
            ResponseStream::new(ours, timeout, ResponseDue::default(), |_: StatusCode| Vec::new(), || ());
        let begun = Instant::now();
        let error = answers.write_all(b"123456").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() >= timeout);
        // A peer that reads something, however late, gets the whole time again.
        let mut taken = [0; 4];
        theirs.read_exact(&mut taken).await.unwrap();
        answers.write_all(b"56").await.unwrap();
    }
}
