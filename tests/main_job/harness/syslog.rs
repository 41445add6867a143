//! A syslog server over TCP that keeps the messages it receives (RFC 5424, framed as in RFC 6587).

use std::collections::HashSet;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::machine::ReservedPort;
use super::wait_until;

/// Framing of messages.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Framing {
    /// The number of bytes precedes them (section 3.4.1).
    OctetCounting,
    /// A line feed ends the message (section 3.4.2).
    Newline,
}

/// A server that receives messages until it is dropped.
pub(crate) struct SyslogServer {
    pub(crate) address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    received: Vec<String>,
    connections: Vec<TcpStream>,
}

impl SyslogServer {
    /// Listens on a port, with octet counting.
    pub(crate) fn start(port: &ReservedPort) -> Self {
        Self::start_with(port, Framing::OctetCounting)
    }

    /// Listens on a port, with that framing.
    pub(crate) fn start_with(port: &ReservedPort, framing: Framing) -> Self {
        Self::serve(TcpListener::bind(("127.0.0.1", port.number())).unwrap(), framing)
    }

    /// Listens on any port, with octet counting.
    pub(crate) fn start_anywhere() -> Self {
        Self::serve(TcpListener::bind("127.0.0.1:0").unwrap(), Framing::OctetCounting)
    }

    fn serve(listener: TcpListener, framing: Framing) -> Self {
        let server = Self { address: listener.local_addr().unwrap(), state: Arc::default() };
        let state = Arc::downgrade(&server.state);
        std::thread::spawn(move || {
            while let Ok((connection, _)) = listener.accept() {
                let Some(state) = state.upgrade() else { return };
                locked(&state).connections.push(connection.try_clone().unwrap());
                std::thread::spawn(move || {
                    let mut stream = BufReader::new(connection);
                    while let Some(message) = frame(&mut stream, framing) {
                        locked(&state).received.push(message);
                    }
                });
            }
        });
        server
    }

    /// Returns the MSG part of each message so far, in the order of arrival.
    pub(crate) fn messages(&self) -> Vec<String> {
        let whole = self.whole_messages();
        whole.iter().map(|message| message.splitn(8, ' ').nth(7).unwrap().to_owned()).collect()
    }

    /// Returns each message so far with its header, in the order of arrival.
    pub(crate) fn whole_messages(&self) -> Vec<String> {
        locked(&self.state).received.clone()
    }

    /// Waits until the server has received these events.
    pub(crate) fn wait_for(&self, posted: &[String]) {
        wait_until("the syslog server has every event", || {
            let count = locked(&self.state).received.len();
            if count < posted.len() {
                return Err(format!("{count} of {}", posted.len()));
            }
            let known: HashSet<String> = self.messages().into_iter().collect();
            let missing = posted.iter().filter(|event| !known.contains(*event)).count();
            if missing == 0 { Ok(()) } else { Err(format!("{missing} are missing")) }
        });
    }

    pub(crate) fn close_connections(&self) {
        for connection in locked(&self.state).connections.drain(..) {
            // The peer may have closed it.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for SyslogServer {
    fn drop(&mut self) {
        self.close_connections();
        self.state = Arc::default();
        // Wakes its thread, which ends because the state is gone.
        let _ = TcpStream::connect(self.address);
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads one message; `None` at the end of the connection.
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
