//! An HTTP receiver on a loopback port for tests, with scripted responses.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use crate::net::Endpoint;
use crate::wire::batch::{Caps, Coding, decode};

/// Response to a request.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    /// These bytes.
    Whole(String),
    /// The connection is closed without a response.
    HangUp,
}

impl Answer {
    /// A response with header fields, each with its line end.
    pub(crate) fn new(status: u16, headers: &str, body: &str) -> Self {
        let length = body.len();
        Self::Whole(format!("HTTP/1.1 {status} Test\r\n{headers}content-length: {length}\r\n\r\n{body}"))
    }

    /// A 200 with a receipt.
    pub(crate) fn receipt(accepted: u64, duplicates: u64, quarantined: u64) -> Self {
        let counts =
            format!(r#"{{"accepted":{accepted},"duplicates":{duplicates},"quarantined":{quarantined}}}"#);
        Self::new(200, "", &counts)
    }
}

/// A request as it was received.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// The request line and the headers.
    pub(crate) head: String,
    /// The body as it was sent.
    pub(crate) body: Vec<u8>,
}

impl Request {
    /// Returns the lines of the inflated body.
    pub(crate) fn lines(&self) -> Vec<String> {
        let decoded = decode(&self.body, Coding::Gzip, Caps::NONE, &mut |_| true).unwrap();
        decoded.lines().map(|line| String::from_utf8(line.to_vec()).unwrap()).collect()
    }
}

/// A receiver with its own threads, so that tests with and without a runtime can use it. They run
/// as long as the process.
pub(crate) struct Receiver {
    endpoint: Endpoint,
    state: Arc<State>,
}

struct State {
    script: Vec<Answer>,
    requests: Mutex<Vec<Request>>,
}

impl Receiver {
    /// Answers the first request with the first answer and so on; the last one is repeated.
    pub(crate) fn start(script: impl Into<Vec<Answer>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/konnect", listener.local_addr().unwrap());
        let state = Arc::new(State { script: script.into(), requests: Mutex::default() });
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let state = Arc::clone(&shared);
                // A closed connection ends only its own thread.
                std::thread::spawn(move || stream.and_then(|stream| converse(stream, &state)));
            }
        });
        Self { endpoint: Endpoint::parse(&url).unwrap(), state }
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        self.endpoint.clone()
    }

    /// Returns the requests so far.
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.state.requests.lock().unwrap().clone()
    }
}

fn converse(stream: TcpStream, state: &State) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head)? == 0 {
                return Ok(());
            }
        }
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        stream.read_exact(&mut body)?;
        let answer = {
            let mut requests = state.requests.lock().unwrap();
            requests.push(Request { head, body });
            state.script.get(requests.len() - 1).or(state.script.last()).cloned()
        };
        match answer {
            Some(Answer::Whole(text)) => stream.get_mut().write_all(text.as_bytes())?,
            Some(Answer::HangUp) | None => return Ok(()),
        }
    }
}
