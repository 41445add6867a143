//! Bytes to a syslog server: connect, write, and find out whether the peer took them.
//!
//! A connection is kept as long as nothing speaks against it. One about which there is any doubt is dropped, and
//! the caller sends everything again over the next.

use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs as _, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, ProtocolVersion, StreamOwned};

use crate::net::{Framing, HostPort, Identity, SyslogAddress, TlsError, client_tls_as};

/// How long a TLS 1.3 server may take to show that it accepts us, see [`await_acceptance`].
const ACCEPTANCE: Duration = Duration::from_secs(1);

/// Framed bytes are handed to the system in pieces of about this size.
const PIECE: usize = 64 * 1024;

/// Messages in a row, kept until they are safe.
#[derive(Debug, Default)]
pub(super) struct Messages {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Messages {
    /// Adds what `write` appends as one message; returns what it returns.
    pub(super) fn add<T>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let result = write(&mut self.bytes);
        self.ends.push(self.bytes.len());
        result
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| &self.bytes[start..*end])
    }
}

/// The way to one server.
pub(super) struct Transport {
    address: SyslogAddress,
    ca: Option<PathBuf>,
    identity: Option<Identity>,
    framing: Framing,
    timeout: Duration,
    /// Failures so far: each time another of the host's addresses comes first.
    failures: usize,
    connection: Option<Connection>,
}

impl Transport {
    /// Connects to nothing yet, but reads the files for TLS.
    pub(super) fn new(
        address: SyslogAddress,
        ca: Option<PathBuf>,
        identity: Option<Identity>,
        framing: Framing,
        timeout: Duration,
    ) -> Result<Self, TlsError> {
        if matches!(address, SyslogAddress::Tls(_)) {
            client_tls_as(ca.as_deref(), identity.as_ref())?;
        }
        Ok(Self { address, ca, identity, framing, timeout, failures: 0, connection: None })
    }

    pub(super) fn address(&self) -> &SyslogAddress {
        &self.address
    }

    /// Sends all messages, over a new connection if need be. Without an error the peer has them, as far as
    /// that can be known.
    ///
    /// # Errors
    /// It is not known which of them the peer has.
    pub(super) fn deliver(&mut self, messages: &Messages) -> io::Result<()> {
        let mut attempt = || {
            let mut kept = self.connection.take();
            let mut connection = match kept.as_mut().map(Connection::check) {
                Some(Ok(())) => kept.ok_or(io::ErrorKind::NotConnected)?,
                _ => self.connect()?,
            };
            connection.send(messages, self.framing)?;
            connection.await_acknowledgement(self.timeout)?;
            connection.check()?;
            self.connection = Some(connection);
            Ok(())
        };
        attempt().map_err(|error: io::Error| {
            self.failures = self.failures.wrapping_add(1);
            if is_nothing_there(&error) { late(self.timeout) } else { error }
        })
    }

    fn connect(&self) -> io::Result<Connection> {
        match &self.address {
            SyslogAddress::Udp(peer) => self.in_turn(peer, |address, _| udp(address)).map(Connection::Udp),
            SyslogAddress::Tcp(peer) => {
                self.in_turn(peer, |address, limit| self.tcp(address, limit)).map(Connection::Tcp)
            }
            SyslogAddress::Tls(peer) => {
                let config = client_tls_as(self.ca.as_deref(), self.identity.as_ref())
                    .map(without_resumption)
                    .map_err(io::Error::other)?;
                let name = ServerName::try_from(peer.host.clone()).map_err(io::Error::other)?;
                self.in_turn(peer, |address, limit| {
                    let socket = self.tcp(address, limit)?;
                    let connection =
                        ClientConnection::new(Arc::clone(&config), name.clone()).map_err(io::Error::other)?;
                    hand_shake(connection, socket, self.timeout)
                })
                .map(|stream| Connection::Tls(Box::new(stream)))
            }
            SyslogAddress::Unix(path) => self.unix(path),
        }
    }

    /// Tries the host's addresses one after the other; each may take its share of the time.
    fn in_turn<T>(
        &self,
        peer: &HostPort,
        connect: impl Fn(SocketAddr, Duration) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut addresses: Vec<SocketAddr> = (peer.host.as_str(), peer.port).to_socket_addrs()?.collect();
        let count = addresses.len().max(1);
        addresses.rotate_left(self.failures % count);
        let share = self.timeout / u32::try_from(count).unwrap_or(u32::MAX);
        let mut failed: Option<io::Error> = None;
        for address in addresses {
            match connect(address, share.max(Duration::from_millis(1))) {
                Ok(connection) => return Ok(connection),
                Err(error) => {
                    let before = failed.map_or_else(String::new, |failed| format!("{failed}; "));
                    failed = Some(io::Error::new(error.kind(), format!("{before}{address}: {error}")));
                }
            }
        }
        Err(failed.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the host has no address")))
    }

    fn tcp(&self, address: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
        let socket = TcpStream::connect_timeout(&address, limit)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(self.timeout))?;
        socket.set_write_timeout(Some(self.timeout))?;
        Ok(socket)
    }

    /// The path does not tell which kind of socket is there: `/dev/log` takes datagrams, some daemons offer a
    /// stream.
    fn unix(&self, path: &Path) -> io::Result<Connection> {
        let socket = UnixDatagram::unbound()?;
        match socket.connect(path) {
            Ok(()) => {
                socket.set_write_timeout(Some(self.timeout))?;
                Ok(Connection::UnixDatagram(socket))
            }
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::PROTOTYPE.raw_os_error()) => {
                let socket = UnixStream::connect(path)?;
                socket.set_write_timeout(Some(self.timeout))?;
                Ok(Connection::UnixStream(socket))
            }
            Err(error) => Err(error),
        }
    }
}

fn udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(address)?;
    Ok(socket)
}

/// Connections live long, and OpenSSL servers that ask for a client certificate can fail a resumed handshake.
fn without_resumption(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

type TlsStream = StreamOwned<ClientConnection, TcpStream>;

/// Nothing of a message is written before this is through: a server whose certificate is wrong gets nothing.
fn hand_shake(
    mut connection: ClientConnection,
    mut socket: TcpStream,
    timeout: Duration,
) -> io::Result<TlsStream> {
    while connection.is_handshaking() {
        connection.complete_io(&mut socket)?;
    }
    let mut stream = StreamOwned::new(connection, socket);
    if stream.conn.protocol_version() == Some(ProtocolVersion::TLSv1_3) {
        await_acceptance(&mut stream)?;
        stream.sock.set_read_timeout(Some(timeout))?;
    }
    Ok(stream)
}

/// In TLS 1.3 the client is through before the server has looked at the client's certificate (RFC 8446, section
/// 2). A server that refuses it says so a moment later; one that accepts may send a session ticket. With one that
/// does neither, as syslog-ng, a connection costs a second.
fn await_acceptance(stream: &mut TlsStream) -> io::Result<()> {
    let deadline = Instant::now() + ACCEPTANCE;
    while stream.conn.tls13_tickets_received() == 0 {
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            break;
        }
        stream.sock.set_read_timeout(Some(rest))?;
        match stream.conn.read_tls(&mut stream.sock) {
            Ok(0) => return Err(closed()),
            Ok(_) => {
                stream.conn.process_new_packets().map_err(io::Error::other)?;
            }
            Err(error) if is_nothing_there(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

enum Connection {
    Udp(UdpSocket),
    Tcp(TcpStream),
    Tls(Box<TlsStream>),
    UnixDatagram(UnixDatagram),
    UnixStream(UnixStream),
}

impl Connection {
    fn send(&mut self, messages: &Messages, framing: Framing) -> io::Result<()> {
        match self {
            Self::Udp(socket) => messages.iter().try_for_each(|message| socket.send(message).map(drop)),
            Self::UnixDatagram(socket) => {
                messages.iter().try_for_each(|message| socket.send(message).map(drop))
            }
            Self::Tcp(stream) => write(stream, messages, framing),
            Self::Tls(stream) => write(stream.as_mut(), messages, framing),
            Self::UnixStream(stream) => write(stream, messages, framing),
        }
    }

    /// Whether the peer has not closed or reset the connection, as far as this machine has heard.
    fn check(&mut self) -> io::Result<()> {
        match self {
            Self::Udp(socket) => socket.take_error()?.map_or(Ok(()), Err),
            Self::UnixDatagram(socket) => socket.take_error()?.map_or(Ok(()), Err),
            Self::Tcp(stream) => {
                stream.set_nonblocking(true)?;
                listen_for_the_end(stream)?;
                stream.set_nonblocking(false)
            }
            Self::Tls(stream) => {
                stream.sock.set_nonblocking(true)?;
                listen_for_the_end(stream.as_mut())?;
                stream.sock.set_nonblocking(false)
            }
            Self::UnixStream(stream) => {
                stream.set_nonblocking(true)?;
                listen_for_the_end(stream)?;
                stream.set_nonblocking(false)
            }
        }
    }

    /// Waits until the peer's system has acknowledged everything, where our system tells.
    fn await_acknowledgement(&self, timeout: Duration) -> io::Result<()> {
        let socket = match self {
            Self::Tcp(socket) => socket,
            Self::Tls(stream) => &stream.sock,
            // There is no network in between, or nobody who acknowledges.
            Self::Udp(_) | Self::UnixDatagram(_) | Self::UnixStream(_) => return Ok(()),
        };
        let deadline = Instant::now() + timeout;
        let mut pause = Duration::from_micros(500);
        while unacknowledged(socket)?.is_some_and(|bytes| bytes > 0) {
            if Instant::now() >= deadline {
                return Err(late(timeout));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for Connection {
    /// RFC 5425, section 4.4: a client says that it ends. Without waiting, and in vain if the peer is gone.
    fn drop(&mut self) {
        if let Self::Tls(stream) = self {
            stream.conn.send_close_notify();
            if stream.sock.set_nonblocking(true).is_ok() {
                let _ = stream.conn.write_tls(&mut stream.sock);
            }
        }
    }
}

fn write(stream: &mut impl io::Write, messages: &Messages, framing: Framing) -> io::Result<()> {
    let mut piece = Vec::with_capacity(PIECE.min(messages.bytes() + 1024));
    for message in messages.iter() {
        match framing {
            Framing::OctetCounting => {
                write!(piece, "{} ", message.len())?;
                piece.extend_from_slice(message);
            }
            Framing::Newline => {
                piece.extend_from_slice(message);
                piece.push(b'\n');
            }
        }
        if piece.len() >= PIECE {
            stream.write_all(&piece)?;
            piece.clear();
        }
    }
    stream.write_all(&piece)?;
    stream.flush()
}

/// Reads what is there without waiting. A syslog server has nothing to say, so that it is thrown away; an alert
/// or the end of the stream is an error.
fn listen_for_the_end(stream: &mut impl io::Read) -> io::Result<()> {
    let mut ignored = [0; 512];
    loop {
        match stream.read(&mut ignored) {
            Ok(0) => return Err(closed()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_nothing_there(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// A nonblocking read, or one that ran into its timeout.
fn is_nothing_there(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

fn late(timeout: Duration) -> io::Error {
    let why = format!("the server did not go on within {}", humantime::format_duration(timeout));
    io::Error::new(io::ErrorKind::TimedOut, why)
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the server closed the connection")
}

/// Bytes that were written to a TCP socket and that the peer has not acknowledged; none where the system does
/// not tell, or no longer knows the connection.
///
/// Linux's ioctl(SIOCOUTQ) would need unsafe code; /proc/net/tcp has the same number (proc(5): `tx_queue`), a
/// line for each connection of the network namespace.
fn unacknowledged(socket: &TcpStream) -> io::Result<Option<u64>> {
    let (local, peer) = (socket.local_addr()?, socket.peer_addr()?);
    let table = if local.is_ipv4() { "/proc/net/tcp" } else { "/proc/net/tcp6" };
    let (local, peer) = (in_table(local), in_table(peer));
    // A table that changes while it is read can miss a line.
    for _ in 0..3 {
        let Ok(lines) = std::fs::read_to_string(table) else { break };
        if let Some(bytes) = send_queue(&lines, &local, &peer) {
            return Ok(Some(bytes));
        }
    }
    Ok(None)
}

fn send_queue(table: &str, local: &str, peer: &str) -> Option<u64> {
    table.lines().find_map(|line| {
        let mut columns = line.split_ascii_whitespace().skip(1);
        let is_ours = columns.next() == Some(local) && columns.next() == Some(peer);
        let queues = columns.nth(1).filter(|_| is_ours)?;
        let (sending, _) = queues.split_once(':')?;
        u64::from_str_radix(sending, 16).ok()
    })
}

/// An address as /proc/net/tcp writes it: words of 32 bits, each as this machine reads it.
fn in_table(address: SocketAddr) -> String {
    let word = |octets: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(octets));
    let host: String = match address {
        SocketAddr::V4(address) => word(address.ip().octets()),
        SocketAddr::V6(address) => {
            let octets = address.ip().octets();
            let (words, _) = octets.as_chunks::<4>();
            words.iter().copied().map(word).collect()
        }
    };
    format!("{host}:{:04X}", address.port())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_send_queue_is_found_in_the_system_s_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n   \
                     0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n  \
                     13: 0100007F:D431 0100007F:1F90 01 0000A1B2:00000007 01:00000014 00000000     0\n";
        assert_eq!(send_queue(table, "0100007F:D431", "0100007F:1F90"), Some(0xA1B2));
        assert_eq!(send_queue(table, "0100007F:D431", "0100007F:1F91"), None);
        assert_eq!(send_queue("", "0100007F:D431", "0100007F:1F91"), None);
        if cfg!(target_endian = "little") {
            assert_eq!(in_table(([127, 0, 0, 1], 8080).into()), "0100007F:1F90");
            let address: SocketAddr = "[2001:db8::1]:1".parse().unwrap();
            assert_eq!(in_table(address), "B80D0120000000000000000001000000:0001");
        }
    }

    /// The peer's system takes what fits into its buffer, and no more while the peer does not read.
    #[test]
    #[cfg(target_os = "linux")]
    fn what_the_peer_s_system_has_not_taken_is_seen() {
        for host in ["127.0.0.1", "::1"] {
            let Ok(listener) = TcpListener::bind((host, 0)) else { continue };
            let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut peer, _) = listener.accept().unwrap();
            assert_eq!(unacknowledged(&socket).unwrap(), Some(0), "{host}");
            socket.set_nonblocking(true).unwrap();
            let mut sent = 0;
            while let Ok(bytes) = (&socket).write(&[b'x'; 65_536]) {
                sent += bytes;
            }
            assert!(unacknowledged(&socket).unwrap().unwrap() > 0, "{host}");
            let connection = Connection::Tcp(socket.try_clone().unwrap());
            let error = connection.await_acknowledgement(Duration::from_millis(5)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{host}");

            let mut all = vec![0; sent];
            peer.read_exact(&mut all).unwrap();
            connection.await_acknowledgement(Duration::from_secs(10)).unwrap();
            assert_eq!(unacknowledged(&socket).unwrap(), Some(0), "{host}");
        }
    }

    #[test]
    fn a_server_that_reads_nothing_is_not_believed_to_have_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp://{}", listener.local_addr().unwrap());
        let mut transport = Transport::new(
            SyslogAddress::parse(&address).unwrap(),
            None,
            None,
            Framing::OctetCounting,
            Duration::from_millis(100),
        )
        .unwrap();
        let mut messages = Messages::default();
        messages.add(|bytes| bytes.resize(64 << 20, b'x'));
        let error = transport.deliver(&messages).unwrap_err();
        assert_eq!(error.to_string(), "the server did not go on within 100ms");
        assert!(transport.connection.is_none());
    }

    #[test]
    fn messages_are_told_apart() {
        let mut messages = Messages::default();
        for text in ["one", "", "drei ü"] {
            messages.add(|bytes| bytes.extend_from_slice(text.as_bytes()));
        }
        let framed = |framing| {
            let mut out = Vec::new();
            write(&mut out, &messages, framing).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(framed(Framing::OctetCounting), "3 one0 7 drei ü");
        assert_eq!(framed(Framing::Newline), "one\n\ndrei ü\n");
    }
}
