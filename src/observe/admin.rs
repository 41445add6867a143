//! The admin endpoint: `/metrics`, `/healthz` and `/readyz` over plain HTTP/1.1.
//!
//! It is meant for loopback, a Unix socket or a trusted network: no TLS, nothing secret in the answers, a bearer
//! token (RFC 6750) where there is one. It still has to outlive a careless or hostile peer, so connections, header time and a connection's whole
//! life are bounded, and request bodies are never read.

use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{ALLOW, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use hyper::http::uri::Authority;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use super::health::{Health, Problem};
use super::metrics::{self, Metrics};
use crate::escape::{Notation, write_escaped};

/// Further connections wait in the kernel's queue.
const MAX_CONNECTIONS: u32 = 64;

/// For a request's header; as hyper counts it from the end of the answer before, also for an idle connection.
const HEADER_READ_TIMEOUT: Duration = Duration::from_secs(5);

/// After that a connection is closed at the next answer, so that a peer that does not read cannot keep its
/// place for ever.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(60);

/// For the answer in progress when a connection's life or the daemon's ends.
const GRACE: Duration = Duration::from_secs(2);

/// Between attempts while the kernel has no descriptor or memory for another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The socket of the endpoint.
#[derive(Debug)]
pub enum Socket {
    /// For those who reach the address.
    Tcp(TcpListener),
    /// For those who may write to its file.
    Unix(UnixListener),
}

/// Tells whether somebody may look who shows this bearer token, or none; in a time that does not depend on where it
/// differs from the right one.
pub type Authorise = Box<dyn Fn(Option<&[u8]>) -> bool + Send + Sync>;

/// What the endpoint has to show, and to whom.
pub struct Pages {
    /// `/metrics`.
    pub metrics: Arc<Metrics>,
    /// `/healthz` and `/readyz`.
    pub health: Arc<Health>,
    /// Asked for each request.
    pub authorise: Authorise,
}

/// Serves the endpoint until `shutdown` holds `true` or its sender is gone, then finishes the answers in
/// progress (2 s at most) and returns. Errors of single connections and of accepting are survived.
///
/// It owns the socket, but not a Unix socket's file. To answer `/readyz` with 503 during the drain, shut it down
/// last.
pub async fn serve(socket: Socket, pages: Pages, shutdown: watch::Receiver<bool>) {
    match &socket {
        Socket::Tcp(socket) => {
            let accept = || async move { Ok(socket.accept().await?.0) };
            serve_accepted(accept, pages, true, shutdown).await;
        }
        Socket::Unix(socket) => {
            let accept = || async move { Ok(socket.accept().await?.0) };
            serve_accepted(accept, pages, false, shutdown).await;
        }
    }
}

async fn serve_accepted<A, F, S>(
    mut accept: A,
    pages: Pages,
    is_network: bool,
    shutdown: watch::Receiver<bool>,
) where
    A: FnMut() -> F,
    F: Future<Output = io::Result<S>>,
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let pages = Arc::new(pages);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS as usize));
    let mut stopping = shutdown.clone();
    let mut stopped = pin!(until_stopped(&mut stopping));
    let mut failing = false;
    loop {
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, accept().await)
        };
        let (place, accepted) = tokio::select! {
            biased;
            () = &mut stopped => break,
            next = next => next,
        };
        match accepted {
            Ok(stream) => {
                failing = false;
                let connection = converse(stream, Arc::clone(&pages), is_network, shutdown.clone());
                tokio::spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            Err(error) if concerns_one_connection(&error) => {}
            Err(error) => {
                // Once for a row of failures: the condition lasts and would fill the log.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "The admin endpoint cannot accept connections; it keeps trying");
                }
                tokio::select! {
                    () = &mut stopped => break,
                    () = sleep(ACCEPT_PAUSE) => {}
                }
            }
        }
    }
    // Every place is free again when every connection is over, and each is bounded by GRACE.
    let _ = places.acquire_many(MAX_CONNECTIONS).await;
}

/// A peer that went away before it was accepted (accept(2)) says nothing about the next one.
fn concerns_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

async fn until_stopped(shutdown: &mut watch::Receiver<bool>) {
    // A sender that is gone cannot stop us any more, which counts as stopped.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// One connection, from its first request to its end.
async fn converse<S>(stream: S, pages: Arc<Pages>, is_network: bool, mut shutdown: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let service = service_fn(|request| {
        let pages = Arc::clone(&pages);
        // Metrics are looked up in files.
        tokio::task::spawn_blocking(move || answer(&request, &pages, is_network))
    });
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
        tracing::debug!(%error, "A connection to the admin endpoint ended early");
    }
}

/// hyper leaves the body out of an answer to HEAD.
fn answer<B>(request: &Request<B>, pages: &Pages, is_network: bool) -> Response<Full<Bytes>> {
    const TEXT: &str = "text/plain; charset=utf-8";
    const ENDPOINTS: &str = "Not found; there are /metrics, /healthz and /readyz.\n";

    let path = request.uri().path();
    let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
    // A balancer has no token, and there is nothing to learn from it.
    if path == "/healthz" && is_read {
        return response(StatusCode::OK, TEXT, "ok");
    }
    // Without a token, a page in a browser of this machine could read the answers once its own name leads here (DNS
    // rebinding); it cannot choose the name in `Host`.
    if is_network && (pages.authorise)(None) && !is_for_this_machine(request) {
        return response(
            StatusCode::MISDIRECTED_REQUEST,
            TEXT,
            "Without a token the admin endpoint answers to an IP address or localhost in Host only; use one of \
             these, or set [admin] token.\n",
        );
    }
    if !(pages.authorise)(bearer(request.headers())) {
        let mut refusal =
            response(StatusCode::UNAUTHORIZED, TEXT, "Authorization must be Bearer and the admin token.\n");
        refusal.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        return refusal;
    }
    if !matches!(path, "/metrics" | "/healthz" | "/readyz") {
        return response(StatusCode::NOT_FOUND, TEXT, ENDPOINTS);
    }
    if !is_read {
        let mut refusal = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "Only GET and HEAD are allowed.\n");
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    match path {
        "/metrics" => match pages.metrics.render() {
            Ok(text) => response(StatusCode::OK, metrics::CONTENT_TYPE, text),
            Err(error) => {
                tracing::error!(%error, "The metrics could not be rendered");
                response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{error}\n"))
            }
        },
        _ => match pages.health.ready() {
            Ok(()) => response(StatusCode::OK, TEXT, "ready"),
            Err(problems) => {
                response(StatusCode::SERVICE_UNAVAILABLE, "application/json", not_ready(&problems))
            }
        },
    }
}

/// Whether a request names its host by a literal address or as `localhost` (RFC 9110, section 7.2); only HTTP/1.0
/// names none.
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

/// The bearer token of a request with one `Authorization`, whose scheme may be in any case (RFC 9110, section 11.1).
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
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

/// The reasons as JSON. A problem may quote what came from the network, hence the escaping.
fn not_ready(problems: &[Problem]) -> String {
    #[derive(Serialize)]
    struct NotReady<'a> {
        ready: bool,
        problems: &'a [Problem],
    }

    let mut body = String::new();
    let written = serde_json::to_string(&NotReady { ready: false, problems })
        .is_ok_and(|json| write_escaped(&json, Notation::Json, &mut body).is_ok());
    if written { body } else { r#"{"ready":false,"problems":[]}"#.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpStream, UnixStream};
    use tokio::task::JoinHandle;

    use super::*;

    struct Endpoint {
        address: SocketAddr,
        metrics: Arc<Metrics>,
        health: Arc<Health>,
        stop: watch::Sender<bool>,
        task: JoinHandle<()>,
    }

    fn everybody() -> Authorise {
        Box::new(|_| true)
    }

    impl Endpoint {
        async fn start() -> Self {
            Self::start_for(everybody()).await
        }

        async fn start_for(authorise: Authorise) -> Self {
            let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
            let address = listener.local_addr().unwrap();
            let metrics = Arc::new(Metrics::new(&["us".into()], &["siem".into()]).unwrap());
            let health = Arc::new(Health::new());
            let (stop, stopped) = watch::channel(false);
            let pages = Pages { metrics: Arc::clone(&metrics), health: Arc::clone(&health), authorise };
            let task = tokio::spawn(serve(Socket::Tcp(listener), pages, stopped));
            Self { address, metrics, health, stop, task }
        }

        /// Sends one request on a connection of its own and reads the answer to its end.
        async fn ask(&self, method: &str, target: &str) -> String {
            self.ask_with(method, target, "").await
        }

        /// With further header fields, each with its line end.
        async fn ask_with(&self, method: &str, target: &str, headers: &str) -> String {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            let request = format!(
                "{method} {target} HTTP/1.1\r\nHost: localhost\r\n{headers}Connection: close\r\n\r\n"
            );
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        }

        async fn stop(self) {
            self.stop.send(true).unwrap();
            self.task.await.unwrap();
        }
    }

    fn body(answer: &str) -> &str {
        answer.split_once("\r\n\r\n").unwrap().1
    }

    /// Reads until the bytes end as given: one answer on a connection that stays open.
    async fn read_until(stream: &mut TcpStream, end: &str) -> String {
        let mut answer = Vec::new();
        while !answer.ends_with(end.as_bytes()) {
            assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0, "closed early");
        }
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test]
    async fn a_name_of_somebody_else_is_answered_with_a_token_only() {
        let ask = async |endpoint: &Endpoint, host: &str, more: &str| {
            let mut stream = TcpStream::connect(endpoint.address).await.unwrap();
            let request = format!("GET /metrics HTTP/1.1\r\n{host}{more}Connection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer.split(' ').nth(1).unwrap().to_owned()
        };
        let endpoint = Endpoint::start().await;
        for host in ["127.0.0.1:9464", "[::1]:9464", "::1", "localhost", "LOCALHOST:9464", "192.0.2.1"] {
            let wanted = if host == "::1" { "421" } else { "200" };
            assert_eq!(ask(&endpoint, &format!("Host: {host}\r\n"), "").await, wanted, "{host}");
        }
        for host in [
            "Host: evil.example\r\n",
            "Host: 127.0.0.1.evil.example\r\n",
            "Host: \r\n",
            "Host: localhost\r\nHost: localhost\r\n",
            "",
        ] {
            assert_eq!(ask(&endpoint, host, "").await, "421", "{host}");
        }
        endpoint.stop().await;
        let endpoint = Endpoint::start_for(Box::new(|shown| shown == Some(b"t"))).await;
        let token = "Authorization: Bearer t\r\n";
        assert_eq!(ask(&endpoint, "Host: metrics.example\r\n", token).await, "200");
        assert_eq!(ask(&endpoint, "Host: metrics.example\r\n", "").await, "401");
        endpoint.stop().await;
    }

    #[tokio::test]
    async fn metrics_are_served_as_text() {
        let endpoint = Endpoint::start().await;
        endpoint.metrics.sink_delivered("siem", 5);
        let answer = endpoint.ask("GET", "/metrics?debug=1").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("content-type: text/plain; version=0.0.4\r\n"), "{answer}");
        assert!(body(&answer).contains("\nauditgate_sink_events_total{sink=\"siem\"} 5\n"), "{answer}");
        endpoint.stop().await;
    }

    #[tokio::test]
    async fn head_has_the_length_and_no_body() {
        let endpoint = Endpoint::start().await;
        let answer = endpoint.ask("HEAD", "/healthz").await;
        assert!(
            answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("content-length: 2\r\n"),
            "{answer}"
        );
        assert_eq!(body(&answer), "");
        endpoint.stop().await;
    }

    #[tokio::test]
    async fn the_process_is_alive_though_not_ready() {
        let endpoint = Endpoint::start().await;
        assert_eq!(body(&endpoint.ask("GET", "/healthz").await), "ok");
        assert!(endpoint.ask("GET", "/readyz").await.starts_with("HTTP/1.1 503 "));
        endpoint.health.started();
        let answer = endpoint.ask("GET", "/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 200 "));
        assert_eq!(body(&answer), "ready");
        endpoint.stop().await;
    }

    #[tokio::test]
    async fn the_problems_are_listed_as_harmless_json() {
        let endpoint = Endpoint::start().await;
        endpoint.health.set("ledger", Err("a\x1b\u{202e}\u{9b}\"b".into()));
        let answer = endpoint.ask("GET", "/readyz").await;
        assert!(answer.contains("content-type: application/json\r\n"), "{answer}");
        assert_eq!(
            body(&answer),
            concat!(
                r#"{"ready":false,"problems":["#,
                r#"{"condition":"startup","problem":"The daemon is starting."},"#,
                r#"{"condition":"ledger","problem":"a\u001b\u202e\u009b\"b"}]}"#
            )
        );
        endpoint.stop().await;
    }

    #[tokio::test]
    async fn other_paths_and_methods_are_refused() {
        let endpoint = Endpoint::start().await;
        for target in ["/", "/metrics/", "//metrics", "/status"] {
            let answer = endpoint.ask("GET", target).await;
            assert!(answer.starts_with("HTTP/1.1 404 "), "{target}: {answer}");
        }
        for target in ["/metrics", "/healthz", "/readyz"] {
            let answer = endpoint.ask("POST", target).await;
            assert!(
                answer.starts_with("HTTP/1.1 405 ") && answer.contains("allow: GET, HEAD\r\n"),
                "{answer}"
            );
        }
        endpoint.stop().await;
    }

    #[tokio::test]
    async fn with_a_token_nobody_else_sees_anything() {
        let token: Authorise = Box::new(|presented| presented == Some(b"let me see"));
        let endpoint = Endpoint::start_for(token).await;
        for headers in [
            "",
            "Authorization: let me see\r\n",
            "Authorization: Bearer\r\n",
            "Authorization: Bearer let me\r\n",
            "Authorization: Bearerlet me see\r\n",
            "Authorization: Basic let me see\r\n",
            "Authorization: Bearer let me see\r\nAuthorization: Bearer let me see\r\n",
        ] {
            for target in ["/metrics", "/readyz", "/other"] {
                let answer = endpoint.ask_with("GET", target, headers).await;
                assert!(answer.starts_with("HTTP/1.1 401 "), "{headers}{target}: {answer}");
                assert!(answer.contains("www-authenticate: Bearer\r\n"), "{answer}");
            }
        }
        // A balancer has no token.
        assert_eq!(body(&endpoint.ask_with("GET", "/healthz", "").await), "ok");
        for scheme in ["Bearer", "bearer", "BEARER "] {
            let headers = format!("Authorization: {scheme} let me see\r\n");
            let answer = endpoint.ask_with("GET", "/metrics", &headers).await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        }
        endpoint.stop().await;
    }

    #[tokio::test]
    async fn a_unix_socket_serves_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("admin.sock");
        let socket = Socket::Unix(UnixListener::bind(&path).unwrap());
        let metrics = Arc::new(Metrics::new(&[], &[]).unwrap());
        let pages = Pages { metrics, health: Arc::new(Health::new()), authorise: everybody() };
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(serve(socket, pages, stopped));
        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream
            .write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!(body(&answer), "ok");
        stop.send(true).unwrap();
        task.await.unwrap();
    }

    #[tokio::test]
    async fn a_connection_serves_several_requests_and_garbage_costs_only_its_own() {
        let endpoint = Endpoint::start().await;
        let mut stream = TcpStream::connect(endpoint.address).await.unwrap();
        for _ in 0..3 {
            stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
            read_until(&mut stream, "\r\n\r\nok").await;
        }
        let mut garbage = TcpStream::connect(endpoint.address).await.unwrap();
        garbage.write_all(b"\x16\x03\x01\x02\x00\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        garbage.read_to_end(&mut answer).await.unwrap();
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        read_until(&mut stream, "\r\n\r\nok").await;
        endpoint.stop().await;
    }

    #[tokio::test]
    async fn shutdown_closes_idle_connections_and_returns() {
        let endpoint = Endpoint::start().await;
        let mut stream = TcpStream::connect(endpoint.address).await.unwrap();
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        read_until(&mut stream, "\r\n\r\nok").await;
        endpoint.stop().await;
        assert_eq!(stream.read(&mut [0; 16]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_dropped_sender_stops_it_too() {
        let endpoint = Endpoint::start().await;
        drop(endpoint.stop);
        endpoint.task.await.unwrap();
    }

    #[tokio::test]
    async fn connections_beyond_the_limit_wait_for_a_place() {
        let endpoint = Endpoint::start().await;
        let mut idle = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            let mut stream = TcpStream::connect(endpoint.address).await.unwrap();
            stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
            read_until(&mut stream, "\r\n\r\nok").await;
            idle.push(stream);
        }
        let mut waiting = TcpStream::connect(endpoint.address).await.unwrap();
        waiting.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        // Every other connection is answered once more meanwhile.
        for stream in &mut idle {
            stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
            read_until(stream, "\r\n\r\nok").await;
        }
        assert_eq!(waiting.try_read(&mut [0; 16]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        idle.pop();
        read_until(&mut waiting, "\r\n\r\nok").await;
        endpoint.stop().await;
    }

    #[tokio::test]
    async fn failures_to_accept_are_survived() {
        const EMFILE: i32 = 24;
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let attempts = Arc::new(AtomicUsize::new(0));
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn({
            let attempts = Arc::clone(&attempts);
            let metrics = Arc::new(Metrics::new(&[], &[]).unwrap());
            let pages = Pages { metrics, health: Arc::new(Health::new()), authorise: everybody() };
            async move {
                let accept = || {
                    let attempt = attempts.fetch_add(1, Ordering::Relaxed);
                    let listener = &listener;
                    async move {
                        match attempt {
                            0 => Err(io::Error::from_raw_os_error(EMFILE)),
                            1 => Err(io::ErrorKind::ConnectionAborted.into()),
                            _ => Ok(listener.accept().await?.0),
                        }
                    }
                };
                serve_accepted(accept, pages, true, stopped).await;
            }
        });
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        read_until(&mut stream, "\r\n\r\nok").await;
        assert!(attempts.load(Ordering::Relaxed) >= 3);
        stop.send(true).unwrap();
        task.await.unwrap();
    }

    #[test]
    fn only_a_lost_peer_is_followed_by_the_next_at_once() {
        assert!(concerns_one_connection(&io::ErrorKind::ConnectionAborted.into()));
        assert!(!concerns_one_connection(&io::Error::from_raw_os_error(24)));
    }
}
