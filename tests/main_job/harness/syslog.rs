//! A syslog server over TCP that keeps what it is sent (RFC 5424 messages, framed as in RFC 6587).

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use super::machine::ReservedPort;

/// Where a message ends.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Framing {
    /// After as many bytes as stand before it (section 3.4.1).
    OctetCounting,
    /// At a line feed (section 3.4.2).
    Newline,
}

/// A server that takes messages until the test's process ends.
pub(crate) struct SyslogServer {
    received: Arc<Mutex<Vec<String>>>,
}

impl SyslogServer {
    /// Listens on a port and counts octets.
    pub(crate) fn start(port: &ReservedPort) -> Self {
        Self::start_with(port, Framing::OctetCounting)
    }

    /// Listens on a port, for messages framed that way.
    pub(crate) fn start_with(port: &ReservedPort, framing: Framing) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port.number())).unwrap();
        let received = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&received);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let kept = Arc::clone(&kept);
                std::thread::spawn(move || {
                    let mut stream = BufReader::new(stream);
                    while let Some(message) = frame(&mut stream, framing) {
                        kept.lock().unwrap_or_else(PoisonError::into_inner).push(message);
                    }
                });
            }
        });
        Self { received }
    }

    /// The MSG part of each message so far, in the order of their arrival.
    pub(crate) fn messages(&self) -> Vec<String> {
        let received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        received.iter().map(|message| message.splitn(8, ' ').nth(7).unwrap().to_owned()).collect()
    }

    /// Each message so far, its header included, in the order of their arrival.
    pub(crate) fn whole_messages(&self) -> Vec<String> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One message; none when the connection ends.
fn frame(stream: &mut BufReader<TcpStream>, framing: Framing) -> Option<String> {
    if let Framing::Newline = framing {
        let mut line = Vec::new();
        stream.read_until(b'\n', &mut line).ok()?;
        let message = line.strip_suffix(b"\n")?;
        return Some(String::from_utf8(message.to_vec()).unwrap());
    }
    let mut length = 0;
    loop {
        let mut digit = [0];
        stream.read_exact(&mut digit).ok()?;
        match digit[0] {
            b' ' => break,
            digit => length = length * 10 + usize::from(digit - b'0'),
        }
    }
    let mut message = vec![0; length];
    stream.read_exact(&mut message).ok()?;
    Some(String::from_utf8(message).unwrap())
}
