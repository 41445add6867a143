//! The admin endpoint: `/metrics`, `/healthz`, `/readyz`, `/status` and a page at `/`, over plain
//! HTTP/1.1.
//!
//! It is meant for loopback, a Unix socket or a trusted network: no TLS, nothing secret in the
//! responses, a bearer token (RFC 6750) where one is configured. It still has to survive a careless
//! or hostile peer, so the number of connections, the time for a header and the lifetime of a
//! connection are bounded, and request bodies are never read.

use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{
    ACCEPT, ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, WWW_AUTHENTICATE,
};
use hyper::http::uri::Authority;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinError;
use tokio::time::{sleep, timeout};

use super::health::{Health, Problem};
use super::metrics::{Metrics, TextFormat};
use super::status::StatusReport;
use crate::escape::{escape, escape_json};

mod page;

/// Maximum number of connections. Further ones wait in the kernel's queue.
const MAX_CONNECTIONS: u32 = 64;

/// Timeout of a request's header; as hyper counts it from the end of the previous response, also of
/// an idle connection.
const HEADER_READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Time after which a connection is closed at the next response, so that a peer that does not read
/// cannot keep it forever.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(60);

/// Time for the response in progress when a connection's lifetime or the daemon ends.
const GRACE: Duration = Duration::from_secs(2);

/// Pause between attempts while the kernel has no descriptor or memory for another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The socket of the endpoint.
#[derive(Debug)]
pub enum Socket {
    /// For clients that can reach the address.
    Tcp(TcpListener),
    /// For processes that may write to its file.
    Unix(UnixListener),
}

/// Returns whether a client with this bearer token, or none, may read the pages; in a time that
/// does not depend on where the token differs from the right one.
pub type Authorise = Box<dyn Fn(Option<&[u8]>) -> bool + Send + Sync>;

/// Returns the report of `/status`. It may block on the disk.
pub type ReadStatus = Box<dyn Fn() -> StatusReport + Send + Sync>;

/// Pages of the endpoint, and who may read them.
pub struct Pages {
    /// `/metrics`.
    pub metrics: Arc<Metrics>,
    /// `/healthz` and `/readyz`.
    pub health: Arc<Health>,
    /// `/status`.
    pub status: ReadStatus,
    /// Called for each request.
    pub authorise: Authorise,
}

/// Response to a request, whose first argument says whether it came over the network. An error closes
/// the connection.
pub type Answer = Arc<dyn Fn(bool, Request<Incoming>) -> Answering + Send + Sync>;

/// A response that is being made.
pub type Answering = Pin<Box<dyn Future<Output = Result<Response<Full<Bytes>>, JoinError>> + Send>>;

/// Makes responses by a function that may block, as one that opens files.
pub fn blocking(
    answer: impl Fn(bool, &Request<Incoming>) -> Response<Full<Bytes>> + Send + Sync + 'static,
) -> Answer {
    let answer = Arc::new(answer);
    Arc::new(move |is_network, request| {
        let answer = Arc::clone(&answer);
        Box::pin(tokio::task::spawn_blocking(move || answer(is_network, &request)))
    })
}

/// Serves the endpoint as [`serve_answers`] does.
pub async fn serve(socket: Socket, pages: Pages, shutdown: watch::Receiver<bool>) {
    serve_answers(socket, answer_from(pages), shutdown).await;
}

fn answer_from(pages: Pages) -> Answer {
    // Reading the metrics opens files.
    blocking(move |is_network, request| answer(request, &pages, is_network))
}

/// Serves small documents over plain HTTP until `shutdown` holds `true` or its sender is dropped,
/// then finishes the responses in progress (2 s at most) and returns. Errors of single connections
/// and of accepting do not end it.
///
/// It owns the socket, but not a Unix socket's file. To answer `/readyz` with 503 during the drain,
/// shut it down last.
pub async fn serve_answers(socket: Socket, answer: Answer, shutdown: watch::Receiver<bool>) {
    match &socket {
        Socket::Tcp(socket) => {
            let accept = || async move { Ok(socket.accept().await?.0) };
            serve_accepted(accept, answer, true, shutdown).await;
        }
        Socket::Unix(socket) => {
            let accept = || async move { Ok(socket.accept().await?.0) };
            serve_accepted(accept, answer, false, shutdown).await;
        }
    }
}

async fn serve_accepted<A, F, S>(
    mut accept: A,
    answer: Answer,
    is_network: bool,
    shutdown: watch::Receiver<bool>,
) where
    A: FnMut() -> F,
    F: Future<Output = io::Result<S>>,
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS as usize));
    let mut stopping = shutdown.clone();
    let mut stopped = pin!(until_stopped(&mut stopping));
    let mut failing = false;
    loop {
        let next = async {
            let permit = Arc::clone(&permits).acquire_owned().await;
            (permit, accept().await)
        };
        let (permit, accepted) = tokio::select! {
            biased;
            () = &mut stopped => break,
            next = next => next,
        };
        match accepted {
            Ok(stream) => {
                failing = false;
                let connection = serve_connection(stream, Arc::clone(&answer), is_network, shutdown.clone());
                tokio::spawn(async move {
                    connection.await;
                    drop(permit);
                });
            }
            Err(error) if concerns_one_connection(&error) => {}
            Err(error) => {
                // Once for consecutive failures: the condition lasts and would fill the log.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(
                        code = "admin-accept-failing",
                        "the admin endpoint cannot accept connections: {error}; retrying every {pause} ms",
                        pause = ACCEPT_PAUSE.as_millis()
                    );
                }
                tokio::select! {
                    () = &mut stopped => break,
                    () = sleep(ACCEPT_PAUSE) => {}
                }
            }
        }
    }
    // All permits are free again when every connection is closed, and each is bounded by GRACE.
    let _ = permits.acquire_many(MAX_CONNECTIONS).await;
}

/// Returns whether an error concerns a peer that went away before it was accepted (accept(2)),
/// which says nothing about the next one.
fn concerns_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

async fn until_stopped(shutdown: &mut watch::Receiver<bool>) {
    // A sender that was dropped cannot stop us any more, which counts as stopped.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// Serves one connection, from its first request to its end.
async fn serve_connection<S>(stream: S, answer: Answer, is_network: bool, mut shutdown: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let service = service_fn(|request| answer(is_network, request));
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .half_close(true)
            .header_read_timeout(HEADER_READ_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service)
    );
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = until_stopped(&mut shutdown) => None,
        () = sleep(CONNECTION_LIFETIME) => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            timeout(GRACE, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection to the admin endpoint ended early");
    }
}

/// Returns the response. hyper leaves the body out of a response to HEAD.
fn answer<B>(request: &Request<B>, pages: &Pages, is_network: bool) -> Response<Full<Bytes>> {
    const TEXT: &str = "text/plain; charset=utf-8";
    const JSON: &str = "application/json";
    const ENDPOINTS: &str = "Not found; there are /, /metrics, /healthz, /readyz and /status.\n";

    let path = request.uri().path();
    let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
    // A balancer has no token, and this page reveals nothing.
    if path == "/healthz" && is_read {
        return response(StatusCode::OK, TEXT, "ok");
    }
    // Without a token, a page in a browser of this machine could read the responses once its own
    // name leads here (DNS rebinding); it cannot choose the name in `Host`.
    if is_network && (pages.authorise)(None) && !is_for_this_machine(request) {
        return response(
            StatusCode::MISDIRECTED_REQUEST,
            TEXT,
            "Without a token the admin endpoint answers to an IP address or localhost in Host only; use one of \
             these, or set [admin] token.\n",
        );
    }
    // It holds no data, and asks for the token itself.
    if path == "/" && is_read {
        return page::response();
    }
    if !(pages.authorise)(bearer(request.headers())) {
        let mut refusal =
            response(StatusCode::UNAUTHORIZED, TEXT, "Authorization must be Bearer and the admin token.\n");
        refusal.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        return refusal;
    }
    if !matches!(path, "/" | "/metrics" | "/healthz" | "/readyz" | "/status") {
        return response(StatusCode::NOT_FOUND, TEXT, ENDPOINTS);
    }
    if !is_read {
        let mut refusal = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "Only GET and HEAD are allowed.\n");
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    match path {
        "/metrics" => match pages.metrics.render(accepted(request.headers())) {
            Ok(text) => response(StatusCode::OK, accepted(request.headers()).content_type(), text),
            Err(error) => {
                tracing::error!(code = "metrics-not-rendered", "/metrics is answered with 500: {error}");
                response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{error}\n"))
            }
        },
        "/status" => {
            let mut answer = response(StatusCode::OK, JSON, json(&(pages.status)()));
            answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
            answer
        }
        _ => match pages.health.ready() {
            Ok(()) => response(StatusCode::OK, TEXT, ready(&pages.health.warnings())),
            Err(problems) => response(StatusCode::SERVICE_UNAVAILABLE, JSON, not_ready(&problems)),
        },
    }
}

/// Returns whether a request names its host by a literal address or as `localhost` (RFC 9110,
/// section 7.2); only HTTP/1.0 may name none.
fn is_for_this_machine<B>(request: &Request<B>) -> bool {
    let mut hosts = request.headers().get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) => request.version() == Version::HTTP_10,
        (Some(host), None) => {
            let authority = host.to_str().ok().and_then(|host| host.parse::<Authority>().ok());
            authority.is_some_and(|authority| {
                let host = authority.host().trim_start_matches('[').trim_end_matches(']');
                host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok()
            })
        }
        _ => false,
    }
}

/// Returns the format of the metrics that a client prefers.
fn accepted(headers: &HeaderMap) -> TextFormat {
    let text = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
    TextFormat::accepted(text.unwrap_or_default())
}

/// Returns the bearer token of a request with one `Authorization`, whose scheme may be in any case
/// (RFC 9110, section 11.1).
pub(crate) fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut presented = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (presented.next(), presented.next()) else { return None };
    let (scheme, token) = value.as_bytes().split_at_checked(b"Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii_start())
}

fn response(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Returns `ready`, and a line for each thing that needs attention nevertheless.
fn ready(warnings: &[Problem]) -> String {
    let mut body = "ready".to_owned();
    for warning in warnings {
        // Writing into a string cannot fail.
        let _ = write!(body, "\nwarning: {}", escape(&warning.to_string()));
    }
    body
}

/// Returns the reasons as JSON.
fn not_ready(problems: &[Problem]) -> String {
    #[derive(Serialize)]
    struct NotReady<'a> {
        ready: bool,
        problems: &'a [Problem],
    }

    json(&NotReady { ready: false, problems })
}

/// Returns a value as JSON with escapes, since what it quotes may come from the network.
fn json(value: &impl Serialize) -> String {
    // Only a map with keys that are not text cannot be written, and there is none.
    escape_json(&serde_json::to_string(value).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests;
