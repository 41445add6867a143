//! An HTTP server on a loopback port for tests, with scripted responses.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;

use super::Endpoint;

/// Response to the next request.
#[derive(Clone)]
pub(crate) enum Answer {
    /// These bytes, then possibly the end of the connection.
    Raw { bytes: Vec<u8>, close: bool },
    /// A chunked body without an end.
    Endless,
    /// The head and a part of the body, then nothing more.
    Stalled,
    /// No response.
    Silence,
}

impl Answer {
    pub(crate) fn ok(body: &str) -> Answer {
        Answer::whole("200 OK", "", body)
    }

    /// A 200 with header fields, each with its line end.
    pub(crate) fn ok_with(headers: &str, body: &str) -> Answer {
        Answer::whole("200 OK", headers, body)
    }

    pub(crate) fn status(status: u16) -> Answer {
        Answer::whole(&format!("{status} Test"), "", "")
    }

    pub(crate) fn redirect(to: &str) -> Answer {
        Answer::whole("302 Found", &format!("location: {to}\r\n"), "")
    }

    pub(crate) fn raw(bytes: &str) -> Answer {
        Answer::Raw { bytes: bytes.as_bytes().to_vec(), close: true }
    }

    fn whole(status: &str, headers: &str, body: &str) -> Answer {
        let length = body.len();
        let bytes =
            format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\n\r\n{body}").into_bytes();
        Answer::Raw { bytes, close: false }
    }
}

struct State {
    answer: Mutex<Answer>,
    last_request: Mutex<String>,
    connections: AtomicUsize,
    requests: AtomicUsize,
    requested: Notify,
}

/// A server that runs as long as the test's runtime.
pub(crate) struct Server {
    endpoint: Endpoint,
    state: Arc<State>,
}

impl Server {
    pub(crate) async fn start(answer: Answer) -> Server {
        Server::listen(answer, None).await
    }

    pub(crate) async fn start_tls(answer: Answer, acceptor: TlsAcceptor) -> Server {
        Server::listen(answer, Some(acceptor)).await
    }

    /// Returns an endpoint where no server listens: the system never assigns port 1 by itself.
    pub(crate) fn refusing() -> Endpoint {
        Endpoint::parse("http://127.0.0.1:1/jwks.json").unwrap()
    }

    async fn listen(answer: Answer, acceptor: Option<TlsAcceptor>) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let scheme = if acceptor.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://{}/jwks.json", listener.local_addr().unwrap());
        let state = Arc::new(State {
            answer: Mutex::new(answer),
            last_request: Mutex::default(),
            connections: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            requested: Notify::new(),
        });
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                shared.connections.fetch_add(1, Ordering::SeqCst);
                let (state, acceptor) = (Arc::clone(&shared), acceptor.clone());
                // A closed connection ends only its own task.
                tokio::spawn(async move {
                    match acceptor {
                        None => converse(stream, &state).await,
                        Some(acceptor) => converse(acceptor.accept(stream).await?, &state).await,
                    }
                });
            }
        });
        Server { endpoint: Endpoint::parse(&url).unwrap(), state }
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        self.endpoint.clone()
    }

    /// Sets the response, from the next request on.
    pub(crate) fn answer(&self, answer: Answer) {
        *self.state.answer.lock().unwrap() = answer;
    }

    pub(crate) fn last_request(&self) -> String {
        self.state.last_request.lock().unwrap().clone()
    }

    pub(crate) fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }

    pub(crate) fn requests(&self) -> usize {
        self.state.requests.load(Ordering::SeqCst)
    }

    /// Waits until `count` requests have arrived since the start.
    pub(crate) async fn has_received(&self, count: usize) {
        while self.requests() < count {
            self.state.requested.notified().await;
        }
    }
}

async fn converse<S: AsyncRead + AsyncWrite + Unpin>(stream: S, state: &State) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut request = String::new();
        while !request.ends_with("\r\n\r\n") {
            if stream.read_line(&mut request).await? == 0 {
                return Ok(());
            }
        }
        let length = request.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        stream.read_exact(&mut body).await?;
        request.push_str(&String::from_utf8_lossy(&body));
        *state.last_request.lock().unwrap() = request;
        state.requests.fetch_add(1, Ordering::SeqCst);
        state.requested.notify_one();
        let answer = state.answer.lock().unwrap().clone();
        match answer {
            Answer::Raw { bytes, close } => {
                stream.write_all(&bytes).await?;
                stream.flush().await?;
                if close {
                    return stream.shutdown().await;
                }
            }
            Answer::Endless => {
                stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await?;
                loop {
                    stream.write_all(b"8\r\n        \r\n").await?;
                }
            }
            Answer::Stalled => {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf").await?;
                stream.flush().await?;
                std::future::pending::<()>().await;
            }
            Answer::Silence => std::future::pending::<()>().await,
        }
    }
}
