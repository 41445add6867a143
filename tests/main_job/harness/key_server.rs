//! A server of a JWKS document, in good and in bad days.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};

/// What it answers to the next requests.
#[derive(Clone, Debug)]
pub(crate) enum ServerAnswer {
    /// These bytes, then the end of the connection; none: it hangs up at once.
    Bytes(Vec<u8>),
    /// Nothing, for as long as the client waits.
    Silence,
    /// A body without an end.
    Endless,
    /// This document, whose version is its digest: 304 to who has that one (RFC 9110, section 13.1.2).
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

/// A running server; it ends with the process.
pub(crate) struct KeyServer {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

struct State {
    answer: ServerAnswer,
    requests: u64,
}

impl KeyServer {
    /// Starts one that hangs up.
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
                    give(stream, &head, &answer);
                });
            }
        });
        Self { address, state }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/jwks.json", self.address)
    }

    /// From the next request on.
    pub(crate) fn answer(&self, answer: ServerAnswer) {
        lock(&self.state).answer = answer;
    }

    /// From the next request on, this document.
    pub(crate) fn serve(&self, document: &str) {
        self.answer(ServerAnswer::with("200 OK", "Content-Type: application/json\r\n", document));
    }

    /// How many requests there were so far.
    pub(crate) fn requests(&self) -> u64 {
        lock(&self.state).requests
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The lines of a request before the empty one, which must be there.
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

/// The client may have had enough of it.
fn give(mut stream: TcpStream, head: &[String], answer: &ServerAnswer) {
    match answer {
        ServerAnswer::Tagged(document) => {
            let tag = format!("\"{}\"", URL_SAFE_NO_PAD.encode(Sha256::digest(document)));
            let is_known = head
                .iter()
                .filter_map(|line| line.split_once(": "))
                .any(|(name, value)| name.eq_ignore_ascii_case("if-none-match") && value == tag);
            let (status, body) = if is_known { ("304 Not Modified", "") } else { ("200 OK", &**document) };
            give(stream, head, &ServerAnswer::with(status, &format!("ETag: {tag}\r\n"), body));
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
