//! Connections: accept, handshake, serve, linger, drain.
//!
//! Each connection has one task and one [`ConnectionPermit`]; a drain is done when all connections
//! are closed. Transient errors of accept do not end it.

use std::error::Error as _;
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::header::{CONNECTION, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::close_reason::CloseReason;
use super::connection_limit::{ConnectionLimit, ConnectionPermit, Evicted};
use super::proxy_header;
use super::request::{Aborted, HEAD_BYTES, HEAD_FIELDS, Service};
use super::response::Refusal;
use super::response_stream::{ResponseDue, ResponseStream};
use super::tls::Certificates;
use crate::log_throttle::log_throttled;

/// The parts of the listener.
pub struct Listener {
    /// `https` or `http`, for the log.
    pub scheme: &'static str,
    /// None for plain HTTP, which the configuration allows on loopback only.
    pub tls: Option<Arc<Certificates>>,
    /// Limit of simultaneous connections.
    pub connections: ConnectionLimit,
    /// Handler of the requests.
    pub service: Arc<Service>,
    /// Called for each connection; what it returns is kept until the connection ends.
    pub connected: Box<dyn Fn() -> Box<dyn Send> + Send + Sync>,
    /// Called at the end of each connection.
    pub ended: Box<dyn Fn(CloseReason) + Send + Sync>,
}

/// Time and number of bytes for which a connection is read after an early response, before it is
/// closed.
const LINGER_TIMEOUT: Duration = Duration::from_secs(2);
const MAX_LINGER_BYTES: usize = 16 << 20;

/// Maximum number of unauthenticated connections in lingering close. Beyond it the peer may see a
/// reset instead of the response.
const MAX_LINGERING: usize = 64;

/// Pause between two attempts to accept when the system is short of a resource.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(20);

/// Time for which a drain leaves connections open that have no request in progress. A request that
/// is just about to come, on a kept connection or on a new one, still gets a response, and with it
/// `Connection: close` (RFC 9112, section 9.6); closing at once would cross the request, and a
/// sender without retries would lose it.
const DRAIN_GRACE: Duration = Duration::from_secs(2);

impl Listener {
    /// Serves until `shutdown` turns true, then lets every request finish that has begun, or begins
    /// within [`DRAIN_GRACE`] on an open connection, for the time that a body may take. Returns
    /// whether all did.
    ///
    /// The socket is closed first, not shut down: where another process holds it too, that one
    /// serves the connections that wait in its queue or are made from now on; otherwise they are
    /// refused at once.
    pub async fn serve(self, socket: TcpListener, mut shutdown: watch::Receiver<bool>) -> bool {
        if let Ok(address) = socket.local_addr() {
            tracing::info!(code = "listening", "listening on {scheme}://{address}", scheme = self.scheme);
        }
        let (this, stop) = (Arc::new(self), shutdown.clone());
        let lingering = Arc::new(Semaphore::new(MAX_LINGERING));
        let begin = |stream, permit| {
            let (this, shutdown, lingering) = (Arc::clone(&this), stop.clone(), Arc::clone(&lingering));
            tokio::spawn(async move { this.connection(stream, permit, shutdown, &lingering).await });
        };
        let waiting = loop {
            let (stream, peer) = tokio::select! {
                next = this.accept(&socket) => next,
                _ = shutdown.wait_for(|stop| *stop) => break None,
            };
            let permit = tokio::select! {
                permit = this.admit(peer) => permit,
                _ = shutdown.wait_for(|stop| *stop) => break Some((stream, peer)),
            };
            begin(stream, permit);
            // A flood is accepted no faster than the connections before it are examined.
            tokio::task::yield_now().await;
        };
        drop(socket);
        // Taken from the queue, so no other process can serve it.
        if let Some((stream, peer)) = waiting
            && let Ok(permit) = timeout(DRAIN_GRACE, this.admit(peer)).await
        {
            begin(stream, permit);
        }
        let drain = this.service.in_force().body_deadline.total;
        let in_work = &this.service.in_work;
        let idle = async {
            this.connections.wait_until_empty().await;
            let _ = in_work.acquire_many(u32::try_from(super::request::IN_WORK).unwrap_or(u32::MAX)).await;
        };
        timeout(DRAIN_GRACE + drain, idle).await.is_ok()
    }

    /// Accepts the next connection. Errors that concern one peer are skipped; when descriptors or
    /// memory are short, a connection is evicted, and if none can be, this waits until one ends.
    async fn accept(&self, socket: &TcpListener) -> (TcpStream, IpAddr) {
        loop {
            let error = match socket.accept().await {
                Ok((stream, peer)) => return (stream, peer.ip().to_canonical()),
                Err(error) => error,
            };
            if concerns_one_peer(&error) {
                continue;
            }
            log_throttled!(
                error,
                "",
                code = "accept-failing",
                "cannot accept connections: {error}; retrying: raise the limit of open files (LimitNOFILE), or \
                 lower limits.connections"
            );
            self.connections.evict_one();
            tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
        }
    }

    async fn admit(&self, peer: IpAddr) -> (ConnectionPermit, oneshot::Receiver<Evicted>) {
        self.connections.admit(peer, self.is_proxy(peer)).await
    }

    fn is_proxy(&self, peer: IpAddr) -> bool {
        self.service.in_force().proxies.iter().any(|network| network.contains(&peer))
    }

    async fn connection(
        &self,
        stream: TcpStream,
        (permit, evicted): (ConnectionPermit, oneshot::Receiver<Evicted>),
        shutdown: watch::Receiver<bool>,
        lingering: &Semaphore,
    ) {
        let _connected = (self.connected)();
        let _ = stream.set_nodelay(true);
        let permit = Arc::new(permit);
        let reason = tokio::select! {
            Ok(why) = evicted => match why {
                Evicted::TooMany => CloseReason::Evicted,
                Evicted::PerPeer => CloseReason::PerPeerLimit,
            },
            reason = self.serve_connection(stream, &permit, shutdown, lingering) => reason,
        };
        (self.ended)(reason);
        tracing::debug!(reason = reason.as_str(), "a connection ended");
    }

    async fn serve_connection(
        &self,
        stream: TcpStream,
        permit: &Arc<ConnectionPermit>,
        shutdown: watch::Receiver<bool>,
        lingering: &Semaphore,
    ) -> CloseReason {
        let deadline = self.service.in_force().deadline;
        let opened = tokio::select! {
            opened = timeout(deadline, self.open(stream, permit)) => opened,
            // Nothing has been asked yet, so no response is due.
            () = drain_grace_over(shutdown.clone()) => return CloseReason::Done,
        };
        let (reason, answered) = match opened {
            Err(_) => return CloseReason::HandshakeTimeout,
            Ok(Err(reason)) => return reason,
            Ok(Ok(Opened::Plain(stream))) => self.requests(stream, permit, shutdown).await,
            Ok(Ok(Opened::HttpWithoutTls(mut stream))) => {
                let refused = stream.write_all(&self.service.refuse(&Refusal::NoTls)).await;
                (CloseReason::Malformed, refused.is_ok().then_some(stream))
            }
            Ok(Ok(Opened::Tls(encrypted))) => {
                let (reason, answered) = self.requests(*encrypted, permit, shutdown).await;
                let answered = match answered {
                    Some(mut encrypted) => {
                        // Sends close_notify; what still comes is discarded undecrypted.
                        let _ = timeout(LINGER_TIMEOUT, encrypted.shutdown()).await;
                        Some(encrypted.into_inner().0)
                    }
                    None => None,
                };
                (reason, answered)
            }
        };
        if let Some(stream) = answered {
            let slot = lingering.try_acquire();
            if slot.is_ok() || permit.is_authenticated() {
                linger(stream).await;
            }
        }
        reason
    }

    /// Handles what comes before the first request: the PROXY header and the TLS handshake.
    async fn open(&self, mut stream: TcpStream, permit: &ConnectionPermit) -> Result<Opened, CloseReason> {
        if self.is_proxy(permit.peer()) {
            match proxy_header::read(&mut stream).await {
                Ok(Some(client)) => permit.set_client(client.to_canonical()),
                Ok(None) => {}
                Err(error) => {
                    let proxy = permit.peer().to_string();
                    // The error may repeat what the peer sent, so it is a field, whose quotes are
                    // escaped.
                    log_throttled!(
                        warn,
                        &proxy,
                        code = "proxy-header-invalid",
                        proxy,
                        error = error.to_string(),
                        "a connection from the proxy {proxy} has no valid PROXY header and is closed"
                    );
                    return Err(CloseReason::Malformed);
                }
            }
        }
        let Some(tls) = &self.tls else { return Ok(Opened::Plain(stream)) };
        // HTTP begins with a letter, a TLS handshake does not (RFC 8446, section 5.1).
        let mut first = [0];
        if matches!(stream.peek(&mut first).await, Ok(1)) && first[0].is_ascii_uppercase() {
            return Ok(Opened::HttpWithoutTls(stream));
        }
        let encrypted = TlsAcceptor::from(tls.config()).accept(stream).await.map_err(|error| {
            tracing::debug!(%error, "a TLS handshake failed");
            CloseReason::HandshakeFailed
        })?;
        Ok(Opened::Tls(Box::new(encrypted)))
    }

    /// Serves a connection's requests. Returns the stream when its last bytes are a response, which
    /// the peer should be able to read.
    async fn requests<S>(
        &self,
        stream: S,
        permit: &Arc<ConnectionPermit>,
        shutdown: watch::Receiver<bool>,
    ) -> (CloseReason, Option<S>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (response_due, is_asked) = (ResponseDue::default(), Arc::new(AtomicBool::new(false)));
        let asked = Arc::clone(&is_asked);
        let service = service_fn(|request| {
            let (service, permit, response_due) =
                (Arc::clone(&self.service), Arc::clone(permit), response_due.clone());
            let shutdown = shutdown.clone();
            asked.store(true, Ordering::Relaxed);
            Box::pin(async move {
                permit.idle(false);
                let mut answer = service.answer(request, &permit).await;
                response_due.answer();
                if let Ok(answer) = &mut answer
                    && *shutdown.borrow()
                {
                    // hyper then closes the connection itself.
                    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                answer
            })
        });
        let refuse = |status| self.service.refuse(&Refusal::Head(status));
        let on_written = || permit.idle(true);
        let rules = self.service.in_force();
        let deadline = rules.deadline;
        let answers = ResponseStream::new(stream, deadline, response_due.clone(), refuse, on_written);
        let mut connection = http1::Builder::new()
            .timer(TokioTimer::new())
            // A client may close its sending side and still wait for its response (RFC 9112,
            // section 9.6).
            .half_close(true)
            .header_read_timeout(rules.idle_timeout)
            .max_headers(2 * HEAD_FIELDS)
            .max_buf_size(2 * HEAD_BYTES)
            .serve_connection(TokioIo::new(answers), service);
        let mut drain_grace_over = pin!(drain_grace_over(shutdown.clone()));
        let mut first_request = pin!(tokio::time::sleep(deadline));
        let (mut draining, mut is_late) = (false, false);
        let ended = loop {
            tokio::select! {
                // First, so that a request that has just come is not aborted.
                biased;
                ended = poll_fn(|context| connection.poll_without_shutdown(context)) => break ended,
                () = &mut first_request, if !is_late => {
                    is_late = true;
                    if !is_asked.load(Ordering::Relaxed) {
                        return (CloseReason::HeaderTimeout, None);
                    }
                }
                () = &mut drain_grace_over, if !draining => {
                    draining = true;
                    Pin::new(&mut connection).graceful_shutdown();
                }
            }
        };
        let reason = ended.as_ref().map_or_else(close_reason, |()| CloseReason::Done);
        let mut answers = connection.into_parts().io.into_inner();
        if !matches!(reason, CloseReason::Done | CloseReason::Malformed) {
            return (reason, None);
        }
        // The response in place of hyper's refusal may not be written yet.
        let _ = timeout(deadline, answers.flush()).await;
        (reason, Some(answers.into_inner()))
    }
}

/// A connection on which requests may come.
enum Opened {
    Plain(TcpStream),
    HttpWithoutTls(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Returns when connections without a request in progress are to be closed.
async fn drain_grace_over(mut shutdown: watch::Receiver<bool>) {
    // A sender that was dropped cannot stop us any more, which counts as stopped.
    let _ = shutdown.wait_for(|stop| *stop).await;
    tokio::time::sleep(DRAIN_GRACE).await;
}

/// Returns the reason for which hyper ended a connection.
fn close_reason(error: &hyper::Error) -> CloseReason {
    tracing::debug!(%error, "a connection ended early");
    let source = error.source();
    if error.is_timeout() {
        return CloseReason::HeaderTimeout;
    }
    if error.is_parse() {
        return CloseReason::Malformed;
    }
    if source.and_then(|source| source.downcast_ref()) == Some(&Aborted::TooSlow) {
        return CloseReason::BodyTooSlow;
    }
    match source.and_then(|source| source.downcast_ref::<io::Error>()) {
        Some(error) if error.kind() == io::ErrorKind::TimedOut => CloseReason::AnswerTimeout,
        _ => CloseReason::CutOff,
    }
}

fn concerns_one_peer(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

/// Closes our side and reads on for a limited time: closing with unread bytes would send a reset,
/// which can destroy the response before the peer has read it.
async fn linger(mut stream: TcpStream) {
    if stream.shutdown().await.is_err() {
        return;
    }
    let drained = async {
        let mut left = MAX_LINGER_BYTES;
        let mut scratch = vec![0; 16 * 1024];
        while let Ok(read) = stream.read(&mut scratch).await {
            if read == 0 || read > left {
                break;
            }
            left -= read;
        }
    };
    let _ = timeout(LINGER_TIMEOUT, drained).await;
}
