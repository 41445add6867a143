//! Bytes to a syslog server: connect, write, and find out whether the peer took them.
//!
//! One rule for streams: what was written counts as delivered when the peer's system has
//! acknowledged it and the connection is still open [`GRACE`] later, or was closed in order: a peer
//! that closes with bytes unread, or gets more after it closed, resets the connection (RFC 1122,
//! section 4.2.2.13). Otherwise the connection is dropped, and the caller sends everything again
//! that does not count yet. A datagram counts when it was handed over.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs as _, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use super::send_queue::unacknowledged;
use crate::deliver::rendered::Rendered;
use crate::ledger::Position;
use crate::net::{Framing, HostPort, Identity, SyslogAddress, TlsError, client_tls_as, tls};

/// Time for a refusal that is already on its way to arrive: of a client certificate, which a server
/// of TLS 1.3 judges after the client has finished the handshake (RFC 8446, section 2), or of bytes
/// for a process that is gone.
const GRACE: Duration = Duration::from_secs(1);

/// Approximate size of the pieces in which framed bytes are written.
const PIECE: usize = 64 * 1024;

/// The connection to one server.
pub(super) struct Transport {
    address: SyslogAddress,
    ca: Option<PathBuf>,
    identity: Option<Identity>,
    framing: Framing,
    timeout: Duration,
    /// Number of failures so far: after each, another of the host's addresses is tried first.
    failures: usize,
    connection: Option<Connection>,
    /// Times of the writes over the connection that do not count yet, and the position
    /// behind it.
    unconfirmed: VecDeque<(Instant, Position)>,
    /// Something that was written over the connection counts.
    is_proven: bool,
}

impl Transport {
    /// Creates a transport. Connects to nothing yet, but reads the files for TLS.
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
        Ok(Self {
            address,
            ca,
            identity,
            framing,
            timeout,
            failures: 0,
            connection: None,
            unconfirmed: VecDeque::new(),
            is_proven: false,
        })
    }

    pub(super) fn address(&self) -> &SyslogAddress {
        &self.address
    }

    /// Drops the connection and what was written over it.
    pub(super) fn reset(&mut self) {
        self.connection = None;
        self.unconfirmed.clear();
        self.is_proven = false;
    }

    /// Writes all messages, over a new connection if need be.
    ///
    /// # Errors
    /// The connection is dropped, and it is not known what the peer has of what was written over
    /// it.
    pub(super) fn write(&mut self, messages: &Rendered, behind: Position) -> io::Result<()> {
        let written = self.try_write(messages);
        self.unconfirmed.push_back((Instant::now(), behind));
        self.failed(written)
    }

    /// Returns the position before which everything counts as delivered, if there is a new one;
    /// everything before `behind` was written. With `to_the_end` waits until it all counts.
    ///
    /// # Errors
    /// As for [`Transport::write`].
    pub(super) fn confirm(&mut self, behind: Position, to_the_end: bool) -> io::Result<Option<Position>> {
        match self.unconfirmed.back_mut() {
            None => return Ok(Some(behind)),
            Some((_, last)) => *last = behind,
        }
        let confirmed = self.try_confirm(to_the_end);
        self.failed(confirmed)
    }

    fn failed<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| {
            self.failures = self.failures.wrapping_add(1);
            let is_refused = error.to_string().contains("received fatal alert")
                || matches!(self.connection, Some(Connection::Tls(_)));
            let is_unproven = !self.is_proven && is_refused;
            self.reset();
            if is_nothing_there(&error) {
                late(self.timeout)
            } else if is_unproven {
                let hint = "has accepted nothing over this connection: does it want a client certificate, or another \
                            one (`cert` and `key`)?";
                io::Error::new(error.kind(), format!("{error}; the server {hint}"))
            } else {
                error
            }
        })
    }

    fn try_write(&mut self, messages: &Rendered) -> io::Result<()> {
        // A peer that has closed in order gets nothing more over the same connection.
        if self.connection.as_mut().map(Connection::is_closed).transpose()? == Some(true) {
            self.try_confirm(true)?;
            self.connection = None;
        }
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect()?,
        };
        self.connection.insert(connection).send(messages.iter(), self.framing)
    }

    fn try_confirm(&mut self, to_the_end: bool) -> io::Result<Option<Position>> {
        let mut confirmed = None;
        while let (Some((written, _)), Some(connection)) = (self.unconfirmed.front(), &mut self.connection) {
            let is_closed = connection.is_closed()?;
            let rest = connection.grace().saturating_sub(written.elapsed());
            if rest.is_zero() && connection.unacknowledged()? == 0 {
                confirmed = self.unconfirmed.pop_front().map(|(_, position)| position);
                self.is_proven = true;
                if is_closed && self.unconfirmed.is_empty() {
                    self.connection = None;
                }
            } else if written.elapsed() > self.timeout + GRACE {
                return Err(late(self.timeout));
            } else if to_the_end {
                std::thread::sleep(rest.clamp(Duration::from_millis(1), Duration::from_millis(50)));
            } else {
                break;
            }
        }
        Ok(confirmed)
    }

    /// Connects and closes the connection again.
    pub(super) fn reach(&self) -> io::Result<()> {
        self.connect().map(drop)
    }

    fn connect(&self) -> io::Result<Connection> {
        match &self.address {
            SyslogAddress::Udp(peer) => {
                self.first_reachable(peer, |address, _| udp(address)).map(Connection::Udp)
            }
            SyslogAddress::Tcp(peer) => {
                self.first_reachable(peer, |address, limit| self.tcp(address, limit)).map(Connection::Tcp)
            }
            SyslogAddress::Tls(peer) => {
                let mut config =
                    client_tls_as(self.ca.as_deref(), self.identity.as_ref()).map_err(io::Error::other)?;
                // Connections live long, and OpenSSL servers that ask for a client certificate can
                // fail a resumed handshake.
                config.resumption = Resumption::disabled();
                let config = Arc::new(config);
                let name = ServerName::try_from(peer.host.clone()).map_err(io::Error::other)?;
                self.first_reachable(peer, |address, limit| {
                    handshake(Arc::clone(&config), name.clone(), self.tcp(address, limit)?)
                })
                .map(|tls| Connection::Tls(Box::new(tls)))
            }
            SyslogAddress::Unix(path) => self.unix(path),
        }
    }

    /// Tries the host's addresses one after the other; each may take its share of the time.
    fn first_reachable<T>(
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

    /// Connects to a Unix socket. The path does not tell which kind it is: `/dev/log` takes
    /// datagrams, some daemons offer a stream. Where its queue is full, connecting waits no longer
    /// than sending (unix(7)).
    fn unix(&self, path: &Path) -> io::Result<Connection> {
        let address = SocketAddrUnix::new(path)?;
        let open = |kind| {
            let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
            set_socket_timeout(&socket, Timeout::Send, Some(self.timeout))?;
            connect(&socket, &address).map(|()| socket)
        };
        match open(SocketType::DGRAM) {
            Ok(socket) => Ok(Connection::UnixDatagram(socket.into())),
            Err(rustix::io::Errno::PROTOTYPE) => Ok(Connection::UnixStream(open(SocketType::STREAM)?.into())),
            Err(error) => Err(error.into()),
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

struct Tls(StreamOwned<ClientConnection, TcpStream>);

/// Completes the handshake before anything of a message is written: a server whose certificate is
/// wrong gets nothing.
fn handshake(config: Arc<ClientConfig>, name: ServerName<'static>, mut socket: TcpStream) -> io::Result<Tls> {
    let mut connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
    while connection.is_handshaking() {
        connection.complete_io(&mut socket).map_err(|error| {
            match error.get_ref().and_then(|cause| cause.downcast_ref()) {
                Some(cause @ rustls::Error::InvalidCertificate(_)) => {
                    let cause = tls::describe(cause);
                    io::Error::new(error.kind(), format!("the server's certificate is not trusted: {cause}"))
                }
                _ => error,
            }
        })?;
    }
    Ok(Tls(StreamOwned::new(connection, socket)))
}

impl Drop for Tls {
    /// Sends close_notify (RFC 5425, section 4.4). Without waiting, and in vain if the peer is
    /// gone.
    fn drop(&mut self) {
        let Self(stream) = self;
        stream.conn.send_close_notify();
        if stream.sock.set_nonblocking(true).is_ok() {
            let _ = stream.conn.write_tls(&mut stream.sock);
        }
    }
}

enum Connection {
    Udp(UdpSocket),
    Tcp(TcpStream),
    Tls(Box<Tls>),
    UnixDatagram(UnixDatagram),
    UnixStream(UnixStream),
}

impl Connection {
    fn grace(&self) -> Duration {
        match self {
            Self::Udp(_) | Self::UnixDatagram(_) => Duration::ZERO,
            Self::Tcp(_) | Self::Tls(_) | Self::UnixStream(_) => GRACE,
        }
    }

    fn send<'a>(&mut self, mut messages: impl Iterator<Item = &'a [u8]>, framing: Framing) -> io::Result<()> {
        let sent = match self {
            Self::Udp(socket) => messages.try_for_each(|message| socket.send(message).map(drop)),
            Self::UnixDatagram(socket) => messages.try_for_each(|message| socket.send(message).map(drop)),
            Self::Tcp(stream) => write(stream, messages, framing),
            Self::Tls(tls) => write(&mut tls.0, messages, framing),
            Self::UnixStream(stream) => write(stream, messages, framing),
        };
        // The last bytes of a server, such as an alert, tell more than that it no longer reads.
        sent.or_else(|error| self.is_closed().and(Err(error)))
    }

    /// Returns whether the peer has closed its side in order, as far as this machine knows.
    ///
    /// # Errors
    /// When it has reset the connection, or refused it by an alert.
    fn is_closed(&mut self) -> io::Result<bool> {
        let (closed, failed) = match self {
            Self::Udp(socket) => (false, socket.take_error()?),
            Self::UnixDatagram(socket) => (false, socket.take_error()?),
            Self::Tcp(stream) => {
                stream.set_nonblocking(true)?;
                let closed = is_at_end(stream);
                stream.set_nonblocking(false)?;
                (closed?, stream.take_error()?)
            }
            Self::Tls(tls) => {
                tls.0.sock.set_nonblocking(true)?;
                let closed = is_at_end(&mut tls.0);
                tls.0.sock.set_nonblocking(false)?;
                (closed?, tls.0.sock.take_error()?)
            }
            Self::UnixStream(stream) => {
                stream.set_nonblocking(true)?;
                let closed = is_at_end(stream);
                stream.set_nonblocking(false)?;
                (closed?, stream.take_error()?)
            }
        };
        // After the end of the stream a reset is reported as a broken pipe, and once.
        failed.map_or(Ok(closed), Err)
    }

    /// Returns the number of bytes that were written and that the peer's system has not
    /// acknowledged, as far as ours tells.
    fn unacknowledged(&self) -> io::Result<u64> {
        let socket = match self {
            Self::Tcp(socket) => socket,
            Self::Tls(tls) => &tls.0.sock,
            // There is no network in between, or no acknowledgement.
            Self::Udp(_) | Self::UnixDatagram(_) | Self::UnixStream(_) => return Ok(0),
        };
        Ok(unacknowledged(socket)?.unwrap_or(0))
    }
}

fn write<'a>(
    stream: &mut impl io::Write,
    messages: impl Iterator<Item = &'a [u8]>,
    framing: Framing,
) -> io::Result<()> {
    let mut piece = Vec::new();
    for message in messages {
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

/// Reads what is there without waiting. Returns whether that is the end. A syslog server has
/// nothing to send, so it is discarded.
fn is_at_end(stream: &mut impl io::Read) -> io::Result<bool> {
    let mut ignored = [0; 512];
    loop {
        match stream.read(&mut ignored) {
            Ok(0) => return Ok(true),
            Ok(_) => {}
            // The end of TLS without close_notify.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_nothing_there(&error) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

/// Returns whether a read was nonblocking or timed out.
fn is_nothing_there(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

fn late(timeout: Duration) -> io::Error {
    let why = format!("the server did not respond within {}", humantime::format_duration(timeout));
    io::Error::new(io::ErrorKind::TimedOut, why)
}

#[cfg(test)]
mod tests;
