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

/// Accepts every request.
fn without_token() -> Authorise {
    Box::new(|_| true)
}

fn no_status() -> ReadStatus {
    Box::new(StatusReport::default)
}

impl Endpoint {
    async fn start() -> Self {
        Self::start_for(without_token()).await
    }

    async fn start_for(authorise: Authorise) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let metrics = Arc::new(Metrics::new(&["us".into()], &["siem".into()]).unwrap());
        let health = Arc::new(Health::new());
        let (stop, stopped) = watch::channel(false);
        let pages = Pages {
            metrics: Arc::clone(&metrics),
            health: Arc::clone(&health),
            status: no_status(),
            authorise,
        };
        let task = tokio::spawn(serve(Socket::Tcp(listener), pages, stopped));
        Self { address, metrics, health, stop, task }
    }

    /// Sends a request on a new connection, and reads the response to its end.
    async fn ask(&self, method: &str, target: &str) -> String {
        self.ask_with(method, target, "").await
    }

    /// Sends a request with further header fields, each with its line end.
    async fn ask_with(&self, method: &str, target: &str, headers: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request =
            format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n{headers}Connection: close\r\n\r\n");
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

/// Reads until the bytes end like this: one response on a connection that stays open.
async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut answer = Vec::new();
    while !answer.ends_with(end.as_bytes()) {
        assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0, "closed early");
    }
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn another_host_name_is_accepted_only_with_a_token() {
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
async fn metrics_are_served_as_openmetrics_to_whom_asks_for_it() {
    let endpoint = Endpoint::start().await;
    let accept = "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n";
    let answer = endpoint.ask_with("GET", "/metrics", accept).await;
    let content_type = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n";
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains(content_type), "{answer}");
    assert!(answer.contains("\n# TYPE auditgate_sink_events counter\n") && answer.ends_with("\n# EOF\n"));
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
async fn the_process_is_healthy_before_it_is_ready() {
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
    for target in ["/index.html", "/metrics/", "//metrics", "/status/"] {
        let answer = endpoint.ask("GET", target).await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{target}: {answer}");
    }
    for target in ["/", "/metrics", "/healthz", "/readyz", "/status"] {
        let answer = endpoint.ask("POST", target).await;
        assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("allow: GET, HEAD\r\n"), "{answer}");
    }
    endpoint.stop().await;
}

#[tokio::test]
async fn with_a_token_requests_without_it_are_refused() {
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
    // A load balancer has no token.
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
    let pages =
        Pages { metrics, health: Arc::new(Health::new()), status: no_status(), authorise: without_token() };
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(serve(socket, pages, stopped));
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(body(&answer), "ok");
    stop.send(true).unwrap();
    task.await.unwrap();
}

#[tokio::test]
async fn a_connection_serves_several_requests_and_garbage_closes_only_its_own() {
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
async fn a_dropped_stop_channel_ends_the_endpoint() {
    let endpoint = Endpoint::start().await;
    drop(endpoint.stop);
    endpoint.task.await.unwrap();
}

#[tokio::test]
async fn connections_beyond_the_limit_wait() {
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
    // Meanwhile every open connection is answered once more.
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
        let pages = Pages {
            metrics,
            health: Arc::new(Health::new()),
            status: no_status(),
            authorise: without_token(),
        };
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
            serve_accepted(accept, answer_from(pages), true, stopped).await;
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
fn only_an_aborted_connection_is_followed_by_another_accept_at_once() {
    assert!(concerns_one_connection(&io::ErrorKind::ConnectionAborted.into()));
    assert!(!concerns_one_connection(&io::Error::from_raw_os_error(24)));
}
