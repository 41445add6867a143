//! An HTTP receiver on a loopback port for tests, with scripted responses.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
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
    /// The connection is closed when that much of the request was read.
    HangUpIn(Part),
    /// These bytes, then the connection is closed.
    Closing(Vec<u8>),
    /// These bytes, then nothing until the peer closes the connection.
    Stalling(Vec<u8>),
    /// These bytes before the request's body is read and ignored; the next request may follow.
    Early(Vec<u8>),
}

/// Part of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Nothing.
    Nothing,
    /// A part of the head.
    Head,
    /// The head and a part of the body.
    Body,
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
    /// Number of requests, whole or not.
    begun: AtomicUsize,
}

impl Receiver {
    /// Answers the first request with the first answer and so on; the last one is repeated.
    pub(crate) fn start(script: impl Into<Vec<Answer>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/konnect", listener.local_addr().unwrap());
        let state =
            Arc::new(State { script: script.into(), requests: Mutex::default(), begun: AtomicUsize::new(0) });
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

    /// Returns how many requests were answered or cut off so far.
    pub(crate) fn begun(&self) -> usize {
        self.state.begun.load(Ordering::SeqCst)
    }
}

impl State {
    /// Takes the next answer of the script.
    fn next(&self) -> Option<Answer> {
        let number = self.begun.fetch_add(1, Ordering::SeqCst);
        self.script.get(number).or(self.script.last()).cloned()
    }

    /// Returns whether the next answer is to close the connection in that part; takes it if so.
    fn cuts_off(&self, part: Part) -> bool {
        let next = self.script.get(self.begun.load(Ordering::SeqCst)).or(self.script.last());
        let is_cut = matches!(next, Some(Answer::HangUpIn(wanted)) if *wanted == part);
        is_cut && self.next().is_some()
    }
}

fn converse(stream: TcpStream, state: &State) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    if state.cuts_off(Part::Nothing) {
        return Ok(());
    }
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head)? == 0 {
                return Ok(());
            }
            if state.cuts_off(Part::Head) {
                return Ok(());
            }
        }
        let answer = state.next();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        let length = length.unwrap_or(0);
        match &answer {
            Some(Answer::HangUpIn(_)) => return stream.read_exact(&mut vec![0; length / 2]),
            Some(Answer::Early(bytes)) => stream.get_mut().write_all(bytes)?,
            _ => {}
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body)?;
        state.requests.lock().unwrap().push(Request { head, body });
        match answer {
            Some(Answer::Whole(text)) => stream.get_mut().write_all(text.as_bytes())?,
            Some(Answer::Closing(bytes)) => return stream.get_mut().write_all(&bytes),
            Some(Answer::Stalling(bytes)) => {
                stream.get_mut().write_all(&bytes)?;
                return stream.read_to_end(&mut Vec::new()).map(drop);
            }
            // A close that was not announced could fail the next request.
            Some(Answer::Early(_)) => {}
            Some(Answer::HangUp | Answer::HangUpIn(_)) | None => return Ok(()),
        }
    }
}
