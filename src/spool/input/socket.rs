//! Unix sockets for producers on this machine.
//!
//! A full spool reads nothing, so that a producer's write blocks. What was read and is not yet
//! committed when the process dies is lost: a producer that needs a proof writes to a file.

use std::io::{self, Read as _};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::SocketType;

use super::lines::split;
use super::{Chunk, ChunkLimits, Input, Origin};
use crate::net::unix_socket::{self, SocketFile};

/// Maximum number of connections at the same time; further ones wait.
const CONNECTIONS: usize = 64;

/// Number of bytes that are read at a time.
const STEP: usize = 64 << 10;

/// A datagram socket: one message is one or several lines.
pub struct DatagramSocket {
    socket: UnixDatagram,
    limits: ChunkLimits,
    /// The last line that was read.
    last: Origin,
    buffer: Vec<u8>,
    /// Length of a message in the buffer of which lines are left, and how far it was used.
    message: (usize, usize),
    _file: SocketFile,
}

/// A stream socket.
pub struct StreamSocket {
    listener: UnixListener,
    connections: Vec<Connection>,
    limits: ChunkLimits,
    /// The last line that was read.
    last: Origin,
    _file: SocketFile,
}

struct Connection {
    stream: UnixStream,
    rest: Vec<u8>,
    is_skipping: bool,
    has_ended: bool,
}

impl DatagramSocket {
    /// Creates the socket and its file.
    ///
    /// # Errors
    /// See [`unix_socket::bind`].
    pub fn bind(path: &Path, mode: u32, limits: ChunkLimits) -> io::Result<Self> {
        let (socket, file) = unix_socket::bind(path, SocketType::DGRAM, mode)?;
        // One byte more shows that a message was longer.
        let buffer = vec![0; limits.line + 2];
        let last = nothing_read(path);
        Ok(Self { socket: socket.into(), limits, last, buffer, message: (0, 0), _file: file })
    }
}

impl Input for DatagramSocket {
    fn resume(&mut self, _checkpoint: Option<&[u8]>) -> io::Result<()> {
        Ok(())
    }

    fn read(&mut self, timeout: Duration) -> io::Result<Chunk> {
        let (mut chunk, mut room) = (Chunk::default(), self.limits);
        if self.message.0 == self.message.1 {
            wait(&mut [PollFd::new(&self.socket, PollFlags::IN)], timeout)?;
        }
        while room.lines > 0 && room.bytes > 0 {
            if self.message.0 == self.message.1 {
                match self.socket.recv(&mut self.buffer) {
                    Ok(length) => self.message = (length, 0),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            let (length, used) = self.message;
            let (block, mut is_skipping) = (&self.buffer[used..length], false);
            let (used_now, lines) =
                split(block, true, &self.last, &mut is_skipping, &mut chunk, &mut room, self.limits.line);
            self.message.1 += used_now;
            self.last.line += lines;
        }
        Ok(chunk)
    }
}

impl StreamSocket {
    /// Creates the socket and its file.
    ///
    /// # Errors
    /// See [`unix_socket::bind`].
    pub fn bind(path: &Path, mode: u32, limits: ChunkLimits) -> io::Result<Self> {
        let (socket, file) = unix_socket::bind(path, SocketType::STREAM, mode)?;
        let (listener, last) = (socket.into(), nothing_read(path));
        Ok(Self { listener, connections: Vec::new(), limits, last, _file: file })
    }

    /// Accepts connections, while there is room for them.
    fn accept(&mut self) -> io::Result<()> {
        while self.connections.len() < CONNECTIONS {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    let (rest, is_skipping, has_ended) = (Vec::new(), false, false);
                    self.connections.push(Connection { stream, rest, is_skipping, has_ended });
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Input for StreamSocket {
    fn resume(&mut self, _checkpoint: Option<&[u8]>) -> io::Result<()> {
        Ok(())
    }

    fn read(&mut self, timeout: Duration) -> io::Result<Chunk> {
        let (mut chunk, mut room) = (Chunk::default(), self.limits);
        let has_lines = |connection: &Connection| connection.has_ended || connection.rest.contains(&b'\n');
        if !self.connections.iter().any(has_lines) {
            let mut sockets: Vec<PollFd<'_>> =
                self.connections.iter().map(|it| PollFd::new(&it.stream, PollFlags::IN)).collect();
            if sockets.len() < CONNECTIONS {
                sockets.push(PollFd::new(&self.listener, PollFlags::IN));
            }
            wait(&mut sockets, timeout)?;
        }
        self.accept()?;
        for connection in &mut self.connections {
            connection.receive(self.limits.line);
            let Connection { rest, is_skipping, has_ended, .. } = connection;
            let (used, lines) =
                split(rest, *has_ended, &self.last, is_skipping, &mut chunk, &mut room, self.limits.line);
            rest.drain(..used);
            self.last.line += lines;
        }
        self.connections.retain(|connection| !connection.has_ended || !connection.rest.is_empty());
        // The first connection must not always be the first to find room.
        if !self.connections.is_empty() {
            self.connections.rotate_left(1);
        }
        Ok(chunk)
    }
}

impl Connection {
    /// Takes what has arrived, unless a whole line is there already. A connection that fails has
    /// ended.
    fn receive(&mut self, longest: usize) {
        if self.has_ended || self.rest.len() > longest + 1 || self.rest.contains(&b'\n') {
            return;
        }
        let start = self.rest.len();
        self.rest.resize(start + STEP, 0);
        let read = self.stream.read(&mut self.rest[start..]);
        self.rest.truncate(start + *read.as_ref().unwrap_or(&0));
        self.has_ended = match read {
            Ok(read) => read == 0,
            Err(error) => !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        };
    }
}

fn nothing_read(path: &Path) -> Origin {
    Origin { file: Arc::from(path.display().to_string()), line: 0 }
}

fn wait(sockets: &mut [PollFd<'_>], timeout: Duration) -> io::Result<()> {
    let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
    match poll(sockets, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const LIMITS: ChunkLimits = ChunkLimits { line: 10, lines: 3, bytes: 1000 };

    fn read(input: &mut dyn Input, count: usize) -> Vec<String> {
        let mut lines = Vec::new();
        while lines.len() < count {
            let chunk = input.read(Duration::from_secs(20)).unwrap();
            assert!(chunk.lines.len() <= LIMITS.lines && chunk.checkpoint.is_none());
            lines.extend(chunk.lines.iter().map(|line| {
                let mark = if line.is_truncated { "…" } else { "" };
                format!("{}{mark}", String::from_utf8_lossy(&line.bytes))
            }));
        }
        lines
    }

    #[test]
    fn a_message_is_one_or_several_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.sock");
        let mut input = DatagramSocket::bind(&path, 0o660, LIMITS).unwrap();
        let producer = UnixDatagram::unbound().unwrap();
        producer.connect(&path).unwrap();
        for message in ["a", "b\nc\nd\ne\n", "a message that is long", "f\n"] {
            producer.send(message.as_bytes()).unwrap();
        }
        assert_eq!(read(&mut input, 7), ["a", "b", "c", "d", "e", "a message …", "f"]);
        drop(input);
        assert!(!path.exists());
    }

    #[test]
    fn producers_share_a_stream_socket_and_none_hinders_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.sock");
        let mut input = StreamSocket::bind(&path, 0o660, LIMITS).unwrap();
        let mut slow = UnixStream::connect(&path).unwrap();
        slow.write_all(b"hal").unwrap();
        let mut quick = UnixStream::connect(&path).unwrap();
        quick.write_all(b"a\nb\nc\nd\na line that is long\n").unwrap();
        assert_eq!(read(&mut input, 5), ["a", "b", "c", "d", "a line tha…"]);
        slow.write_all(b"f\n").unwrap();
        assert_eq!(read(&mut input, 1), ["half"]);
        quick.write_all(b"end").unwrap();
        drop(quick);
        assert_eq!(read(&mut input, 1), ["end"]);
        assert_eq!(input.connections.len(), 1);
    }

    #[test]
    fn what_is_not_read_blocks_the_producer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.sock");
        let mut input = StreamSocket::bind(&path, 0o660, LIMITS).unwrap();
        let mut producer = UnixStream::connect(&path).unwrap();
        let count = 200_000;
        std::thread::scope(|scope| {
            let writing =
                scope.spawn(move || (0..count).try_for_each(|number| writeln!(producer, "{number}")));
            let mut next = 0;
            while next < count {
                for line in input.read(Duration::from_secs(20)).unwrap().lines {
                    assert_eq!(line.bytes, next.to_string().as_bytes());
                    next += 1;
                }
                assert!(next > 10 || !writing.is_finished());
                assert!(input.connections.iter().all(|it| it.rest.len() <= STEP + LIMITS.line + 2));
            }
            writing.join().unwrap().unwrap();
        });
    }
}
