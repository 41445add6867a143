//! An HTTP/1.1 client that sends exactly what it is given, malformed requests included (RFC 9112).

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use super::TEST_TIMEOUT;
use super::site::{PATH, TOKEN};

/// One connection.
pub(crate) struct Client {
    stream: Stream,
    /// Bytes that were received and not yet returned.
    buffer: Vec<u8>,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

/// A complete response.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// Returns a header's value; there must be at most one.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.head.lines().skip(1).filter_map(|line| {
            let (known, value) = line.split_once(':')?;
            known.eq_ignore_ascii_case(name).then_some(value.trim())
        });
        let first = found.next();
        assert!(found.next().is_none(), "two headers {name}: {}", self.head);
        first
    }

    /// Checks that it is an error of that status, in the form of RFC 9457.
    #[track_caller]
    pub(crate) fn assert_problem(&self, status: u16) {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.header("content-type"), Some("application/problem+json"));
        let problem: serde_json::Value = serde_json::from_slice(&self.body).unwrap();
        assert_eq!(problem["status"], status);
        for text in ["title", "detail"] {
            assert!(problem[text].as_str().is_some_and(|text| !text.is_empty()), "{problem}");
        }
    }

    /// Checks that it is a 429 that asks for a retry after half a minute.
    #[track_caller]
    pub(crate) fn assert_retry_after_30_s(&self) {
        self.assert_problem(429);
        assert_eq!(self.header("retry-after"), Some("30"));
    }
}

/// Builds a request with `Host` and the given headers.
pub(crate) fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n").into_bytes();
    for (name, value) in headers {
        bytes.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.extend_from_slice(body);
    bytes
}

impl Client {
    /// Connects; the TLS handshake begins with the first bytes sent.
    pub(crate) fn connect(address: SocketAddr, tls: Option<Arc<ClientConfig>>) -> io::Result<Self> {
        Self::over(TcpStream::connect(address)?, tls)
    }

    /// Wraps an open connection.
    pub(crate) fn over(socket: TcpStream, tls: Option<Arc<ClientConfig>>) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        // Some responses are late by design.
        socket.set_read_timeout(Some(4 * TEST_TIMEOUT))?;
        socket.set_write_timeout(Some(TEST_TIMEOUT))?;
        let stream = match tls {
            None => Stream::Plain(socket),
            Some(config) => {
                let name = ServerName::try_from("localhost").unwrap();
                let connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
                Stream::Tls(Box::new(StreamOwned::new(connection, socket)))
            }
        };
        Ok(Self { stream, buffer: Vec::new() })
    }

    /// Posts a body as a producer does, and reads the response.
    pub(crate) fn try_post(&mut self, path: &str, coding: Option<&str>, body: &[u8]) -> io::Result<Answer> {
        self.try_post_as(path, TOKEN, coding, body)
    }

    /// Posts a body with another token.
    pub(crate) fn try_post_as(
        &mut self,
        path: &str,
        token: &str,
        coding: Option<&str>,
        body: &[u8],
    ) -> io::Result<Answer> {
        let length = body.len().to_string();
        let mut headers =
            vec![("Authorization", token), ("Content-Type", "text/plain"), ("Content-Length", &length)];
        headers.extend(coding.map(|coding| ("Content-Encoding", coding)));
        self.try_send(&request("POST", path, &headers, body))?;
        self.try_answer()
    }

    /// Posts a body to the default source.
    pub(crate) fn post(&mut self, coding: Option<&str>, body: &[u8]) -> Answer {
        self.try_post(PATH, coding, body).expect("an answer")
    }

    /// Sends a post to the default source, without reading the response.
    pub(crate) fn send_post(&mut self, body: &[u8]) {
        let length = body.len().to_string();
        self.send(&request("POST", PATH, &[("Authorization", TOKEN), ("Content-Length", &length)], body));
    }

    /// Begins a post of that many bytes to the default source, and waits for the 100 (RFC 9110,
    /// section 10.1.1).
    pub(crate) fn begin_post(&mut self, length: usize) {
        let length = length.to_string();
        let headers = [("Authorization", TOKEN), ("Content-Length", &*length), ("Expect", "100-continue")];
        self.send(&request("POST", PATH, &headers, b""));
        assert_eq!(self.answer().status, 100);
    }

    /// Sends a GET and reads the response.
    pub(crate) fn try_get(&mut self, path: &str) -> io::Result<Answer> {
        self.try_send(&request("GET", path, &[], b""))?;
        self.try_answer()
    }

    /// Sends bytes; panics where that fails.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).expect("the daemon receives the bytes");
    }

    /// Sends bytes.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.stream {
            Stream::Plain(stream) => stream.write_all(bytes),
            Stream::Tls(stream) => stream.write_all(bytes).and_then(|()| stream.flush()),
        }
    }

    /// Reads the next response.
    pub(crate) fn answer(&mut self) -> Answer {
        self.try_answer().expect("an answer")
    }

    /// Reads the next response; an error if the connection ends first.
    pub(crate) fn try_answer(&mut self) -> io::Result<Answer> {
        let end = loop {
            if let Some(at) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            self.fill()?;
        };
        let head: Vec<u8> = self.buffer.drain(..end).collect();
        let head = String::from_utf8(head).map_err(io::Error::other)?;
        let status = head
            .strip_prefix("HTTP/1.1 ")
            .or_else(|| head.strip_prefix("HTTP/1.0 "))
            .and_then(|rest| rest.get(..3)?.parse().ok())
            .unwrap_or_else(|| panic!("no status line: {head}"));
        let mut answer = Answer { status, head, body: Vec::new() };
        let length = answer.header("content-length").map_or(0, |length| length.parse().unwrap());
        while self.buffer.len() < length {
            self.fill()?;
        }
        answer.body = self.buffer.drain(..length).collect();
        Ok(answer)
    }

    /// Reads to the end of the connection, and returns the bytes.
    pub(crate) fn rest(&mut self) -> Vec<u8> {
        while self.fill().is_ok() {}
        std::mem::take(&mut self.buffer)
    }

    /// Returns whether the connection is still open, without blocking.
    pub(crate) fn is_open(&mut self) -> bool {
        self.socket().set_nonblocking(true).unwrap();
        let is_open = loop {
            match self.fill() {
                Ok(()) => {}
                Err(error) => break error.kind() == io::ErrorKind::WouldBlock,
            }
        };
        self.socket().set_nonblocking(false).unwrap();
        is_open
    }

    /// Closes the sending half, in TLS with close_notify (RFC 8446, section 6.1).
    pub(crate) fn finish(&mut self) {
        if let Stream::Tls(stream) = &mut self.stream {
            stream.conn.send_close_notify();
            stream.flush().unwrap();
        }
        self.cut();
    }

    /// Closes the sending half of the TCP connection only, as a crash does.
    pub(crate) fn cut(&mut self) {
        let _ = self.socket().shutdown(Shutdown::Write);
    }

    fn socket(&self) -> &TcpStream {
        match &self.stream {
            Stream::Plain(stream) => stream,
            Stream::Tls(stream) => &stream.sock,
        }
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut piece = [0; 16 * 1024];
        let read = match &mut self.stream {
            Stream::Plain(stream) => stream.read(&mut piece)?,
            Stream::Tls(stream) => stream.read(&mut piece)?,
        };
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.buffer.extend_from_slice(&piece[..read]);
        Ok(())
    }
}
