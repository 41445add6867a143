//! A server of a JWKS document that can also fail.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};

/// Response to the next requests.
#[derive(Clone, Debug)]
pub(crate) enum ServerAnswer {
    /// These bytes, then the end of the connection.
    Bytes(Vec<u8>),
    /// No response until the client closes the connection.
    Silence,
    /// A body without an end.
    Endless,
    /// This document with its digest as the entity tag; 304 to a client that has it (RFC 9110,
    /// section 13.1.2).
    Tagged(String),
}

impl ServerAnswer {
    pub(crate) fn status(status: &str) -> Self {
        Self::with(status, "", "")
    }

    pub(crate) fn with(status: &str, headers: &str, body: &str) -> Self {
        let length = body.len();
        let head =
            format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n");
        Self::Bytes((head + body).into_bytes())
    }

    pub(crate) fn hang_up() -> Self {
        Self::Bytes(Vec::new())
    }
}

/// A running server. It stops with the process.
pub(crate) struct KeyServer {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

struct State {
    answer: ServerAnswer,
    requests: u64,
}

impl KeyServer {
    /// Starts a server that closes every connection.
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State { answer: ServerAnswer::hang_up(), requests: 0 }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || {
                    let Some(head) = head(&stream) else { return };
                    let answer = {
                        let mut state = lock(&shared);
                        state.requests += 1;
                        state.answer.clone()
                    };
                    respond(stream, &head, &answer);
                });
            }
        });
        Self { address, state }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/jwks.json", self.address)
    }

    /// Sets the response, from the next request on.
    pub(crate) fn answer(&self, answer: ServerAnswer) {
        lock(&self.state).answer = answer;
    }

    /// Serves this document, from the next request on.
    pub(crate) fn serve(&self, document: &str) {
        self.answer(ServerAnswer::with("200 OK", "Content-Type: application/json\r\n", document));
    }

    /// Returns the number of requests so far.
    pub(crate) fn requests(&self) -> u64 {
        lock(&self.state).requests
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads the head of a request; `None` if it is incomplete.
fn head(stream: &TcpStream) -> Option<Vec<String>> {
    let mut head = Vec::new();
    for line in BufReader::new(stream).lines() {
        match line.ok()? {
            line if line.is_empty() => return Some(head),
            line => head.push(line),
        }
    }
    None
}

/// Sends a response. The client may close the connection at any time.
fn respond(mut stream: TcpStream, head: &[String], answer: &ServerAnswer) {
    match answer {
        ServerAnswer::Tagged(document) => {
            let tag = format!("\"{}\"", URL_SAFE_NO_PAD.encode(Sha256::digest(document)));
            let is_known = head
                .iter()
                .filter_map(|line| line.split_once(": "))
                .any(|(name, value)| name.eq_ignore_ascii_case("if-none-match") && value == tag);
            let (status, body) = if is_known { ("304 Not Modified", "") } else { ("200 OK", &**document) };
            respond(stream, head, &ServerAnswer::with(status, &format!("ETag: {tag}\r\n"), body));
        }
        ServerAnswer::Bytes(bytes) => {
            let _ = stream.write_all(bytes);
        }
        ServerAnswer::Silence => {
            let _ = BufReader::new(&stream).fill_buf();
        }
        ServerAnswer::Endless => {
            let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
            let mut result = stream.write_all(head);
            while result.is_ok() {
                result = stream.write_all(b"8\r\n        \r\n");
            }
        }
    }
}
