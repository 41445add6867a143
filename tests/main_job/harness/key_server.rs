//! A server of a JWKS document, in good and in bad days.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What it answers to the next requests.
#[derive(Clone, Debug)]
pub(crate) enum ServerAnswer {
    /// These bytes, then the end of the connection; none: it hangs up at once.
    Bytes(Vec<u8>),
    /// Nothing, for as long as the client waits.
    Silence,
    /// A body without an end.
    Endless,
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
                    let mut head = BufReader::new(&stream).lines().map_while(Result::ok);
                    if head.find(String::is_empty).is_none() {
                        return;
                    }
                    let answer = {
                        let mut state = lock(&shared);
                        state.requests += 1;
                        state.answer.clone()
                    };
                    give(stream, &answer);
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

/// The client may have had enough of it.
fn give(mut stream: TcpStream, answer: &ServerAnswer) {
    match answer {
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
