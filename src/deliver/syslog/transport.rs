//! Bytes to a syslog server: connect, write, and find out whether the peer took them.
//!
//! A connection is kept as long as nothing speaks against it. One about which there is any doubt is dropped, and
//! the caller sends everything again over the next.

use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs as _, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::pki_types::ServerName;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ClientConnection, ProtocolVersion, SignatureScheme, StreamOwned};

use crate::log_throttle::log_seldom;
use crate::net::{Framing, HostPort, Identity, SyslogAddress, TlsError, client_tls_as};

/// How long a refusal may take that is on its way already. Paid at most a few times a connection: see
/// [`await_acceptance`], [`Tls::await_judgement`] and [`Connection::go_on_past_the_end`].
const GRACE: Duration = Duration::from_secs(1);

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
            let connection = match kept.as_mut().map(Connection::check) {
                Some(Ok(())) => kept.ok_or(io::ErrorKind::NotConnected)?,
                _ => self.connect()?,
            };
            self.connection = Some(connection.deliver(messages, self.framing, self.timeout)?);
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
                let mut config =
                    client_tls_as(self.ca.as_deref(), self.identity.as_ref()).map_err(io::Error::other)?;
                // Connections live long, and OpenSSL servers that ask for a client certificate can fail a resumed
                // handshake.
                config.resumption = Resumption::disabled();
                let name = ServerName::try_from(peer.host.clone()).map_err(io::Error::other)?;
                self.in_turn(peer, |address, limit| {
                    let socket = self.tcp(address, limit)?;
                    hand_shake(config.clone(), name.clone(), socket, self.timeout)
                })
                .map(|tls| Connection::Tls(Box::new(tls)))
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

/// Notes whether the server asked for a client certificate, and whether it was shown one.
#[derive(Debug)]
struct Question {
    identity: Arc<dyn ResolvesClientCert>,
    is_shown: OnceLock<bool>,
}

impl Question {
    /// What a failure means before the server has accepted the connection.
    fn explain(&self, error: io::Error) -> io::Error {
        let with = match self.is_shown.get() {
            None => return error,
            Some(_) if is_nothing_there(&error) => return error,
            Some(true) => "with this sink's certificate",
            Some(false) => "without a certificate: give the sink `cert` and `key`",
        };
        let why = format!(
            "{error}; the server asks for a client certificate and did not accept the connection {with}"
        );
        io::Error::new(error.kind(), why)
    }
}

impl ResolvesClientCert for Question {
    fn resolve(
        &self,
        root_hint_subjects: &[&[u8]],
        schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        let key = self.identity.resolve(root_hint_subjects, schemes);
        let _ = self.is_shown.set(key.is_some());
        key
    }

    fn only_raw_public_keys(&self) -> bool {
        self.identity.only_raw_public_keys()
    }

    fn has_certs(&self) -> bool {
        self.identity.has_certs()
    }
}

type TlsStream = StreamOwned<ClientConnection, TcpStream>;

struct Tls {
    stream: TlsStream,
    /// Until it is believed that the server accepts us; only of a server that asked for a certificate.
    trial: Option<Arc<Question>>,
}

/// Nothing of a message is written before this is through: a server whose certificate is wrong gets nothing.
fn hand_shake(
    mut config: ClientConfig,
    name: ServerName<'static>,
    mut socket: TcpStream,
    timeout: Duration,
) -> io::Result<Tls> {
    let question = Arc::new(Question {
        identity: Arc::clone(&config.client_auth_cert_resolver),
        is_shown: OnceLock::new(),
    });
    config.client_auth_cert_resolver = Arc::<Question>::clone(&question);
    let mut connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    while connection.is_handshaking() {
        connection.complete_io(&mut socket)?;
    }
    let mut stream = StreamOwned::new(connection, socket);
    if is_judged_late(&stream) {
        await_acceptance(&mut stream).map_err(|error| question.explain(error))?;
        stream.sock.set_read_timeout(Some(timeout))?;
    }
    let trial = question.is_shown.get().is_some().then_some(question);
    Ok(Tls { stream, trial })
}

/// In TLS 1.3 the client is through before the server has looked at the client's certificate (RFC 8446, section
/// 2). In TLS 1.2 the server looks first (RFC 5246, section 7.3).
fn is_judged_late(stream: &TlsStream) -> bool {
    stream.conn.protocol_version() == Some(ProtocolVersion::TLSv1_3)
}

/// A server that refuses us mostly says so a moment later; one that accepts may send a session ticket. With one
/// that does neither, as syslog-ng, a connection costs a second.
fn await_acceptance(stream: &mut TlsStream) -> io::Result<()> {
    let deadline = Instant::now() + GRACE;
    while stream.conn.tls13_tickets_received() == 0 {
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            break;
        }
        listen(stream, rest)?;
    }
    Ok(())
}

impl Tls {
    /// What went to a server that then refuses us is lost, and it may take its time. So until it is known that
    /// it accepts us, nothing counts as delivered that the connection has carried.
    ///
    /// A session ticket comes after the server has checked the certificate's chain (RFC 8446, section 4.6.1). Some
    /// check its name right after the handshake, as rsyslog, so that one more moment must pass. Data from the
    /// server would prove nothing: it may come before the client's certificate (section 2). With a server that
    /// sends no ticket, only that it says nothing for the whole of `timeout` speaks for it.
    fn await_judgement(&mut self, written: Instant, timeout: Duration) -> io::Result<()> {
        let Some(question) = self.trial.take() else { return Ok(()) };
        let mut accepted = None;
        loop {
            if !is_judged_late(&self.stream) || self.stream.conn.tls13_tickets_received() > 0 {
                accepted.get_or_insert_with(Instant::now);
            }
            let deadline = accepted.map_or(written + timeout, |accepted| accepted + GRACE);
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return self.stream.sock.set_read_timeout(Some(timeout));
            }
            listen(&mut self.stream, rest).map_err(|error| question.explain(error))?;
        }
    }
}

impl Drop for Tls {
    /// RFC 5425, section 4.4: a client says that it ends. Without waiting, and in vain if the peer is gone.
    fn drop(&mut self) {
        let stream = &mut self.stream;
        stream.conn.send_close_notify();
        if stream.sock.set_nonblocking(true).is_ok() {
            let _ = stream.conn.write_tls(&mut stream.sock);
        }
    }
}

/// Takes in what the server says next, if it does within `limit`, which is not zero.
fn listen(stream: &mut TlsStream, limit: Duration) -> io::Result<()> {
    stream.sock.set_read_timeout(Some(limit))?;
    match stream.conn.read_tls(&mut stream.sock) {
        Ok(0) => Err(closed()),
        Ok(_) => {
            stream.conn.process_new_packets().map_err(io::Error::other)?;
            listen_for_the_end(&mut stream.conn.reader())
        }
        Err(error) if is_nothing_there(&error) => Ok(()),
        Err(error) => Err(error),
    }
}

enum Connection {
    Udp(UdpSocket),
    Tcp(TcpStream),
    /// The peer has ended its side, and was found to go on reading.
    HalfClosed(TcpStream),
    Tls(Box<Tls>),
    UnixDatagram(UnixDatagram),
    UnixStream(UnixStream),
}

impl Connection {
    /// Without an error the peer has all messages, as far as that can be known, and the connection can be kept.
    fn deliver(mut self, messages: &Messages, framing: Framing, timeout: Duration) -> io::Result<Self> {
        let start = Instant::now();
        let sent = self.send(messages.iter(), framing).and_then(|()| self.await_acknowledgement(timeout));
        // A server's last word, such as an alert, tells more than that it no longer reads.
        match (sent, self.check()) {
            (Ok(()), Ok(())) => {}
            (Ok(()), Err(end)) if is_end(&end) => {
                let Self::Tcp(stream) = self else { return Err(self.explain(end)) };
                return Self::go_on_past_the_end(stream, messages, framing, timeout);
            }
            (_, Err(error)) | (Err(error), Ok(())) => return Err(self.explain(error)),
        }
        if let Self::Tls(tls) = &mut self {
            tls.await_judgement(start, timeout)?;
        }
        Ok(self)
    }

    fn explain(&self, error: io::Error) -> io::Error {
        match self {
            Self::Tls(tls) => match &tls.trial {
                Some(question) => question.explain(error),
                None => error,
            },
            // What the peer did is known, whichever way it shows.
            Self::HalfClosed(_) if !is_nothing_there(&error) => closed(),
            _ => error,
        }
    }

    /// Sends again to a peer that has ended its side of the connection while the messages were on their way.
    ///
    /// The end of the stream alone does not tell a peer that closed, which may have lost them, from one that has
    /// nothing to say and reads on. What is sent after it does: a system whose process has closed answers with a
    /// reset (RFC 1122, section 4.2.2.13), and one that acknowledges has a process that can read. A relay in between
    /// acknowledges and resets a moment later, so that a single message goes first.
    fn go_on_past_the_end(
        stream: TcpStream,
        messages: &Messages,
        framing: Framing,
        timeout: Duration,
    ) -> io::Result<Self> {
        const PAUSE: Duration = Duration::from_millis(20);
        let peer = stream.peer_addr()?;
        let mut connection = Self::HalfClosed(stream);
        let mut attempt = || {
            connection.send(messages.iter().take(1), framing)?;
            connection.await_acknowledgement(timeout)?;
            let deadline = Instant::now() + GRACE;
            while Instant::now() < deadline {
                connection.check()?;
                std::thread::sleep(PAUSE);
            }
            connection.send(messages.iter(), framing)?;
            connection.await_acknowledgement(timeout)?;
            connection.check()
        };
        attempt().map_err(|error| connection.explain(error))?;
        log_seldom!(
            warn,
            &peer.to_string(),
            %peer,
            "the syslog server closed its side of the connection and goes on reading; what was on its way then was \
             sent again, and its end will only show when something is sent"
        );
        Ok(connection)
    }

    fn send<'a>(&mut self, mut messages: impl Iterator<Item = &'a [u8]>, framing: Framing) -> io::Result<()> {
        match self {
            Self::Udp(socket) => messages.try_for_each(|message| socket.send(message).map(drop)),
            Self::UnixDatagram(socket) => messages.try_for_each(|message| socket.send(message).map(drop)),
            Self::Tcp(stream) | Self::HalfClosed(stream) => write(stream, messages, framing),
            Self::Tls(tls) => write(&mut tls.stream, messages, framing),
            Self::UnixStream(stream) => write(stream, messages, framing),
        }
    }

    /// Whether the peer has not closed or reset the connection, as far as this machine has heard.
    fn check(&mut self) -> io::Result<()> {
        match self {
            Self::Udp(socket) => socket.take_error()?.map_or(Ok(()), Err),
            Self::UnixDatagram(socket) => socket.take_error()?.map_or(Ok(()), Err),
            // Its reads return the end of the stream, whatever happened since.
            Self::HalfClosed(stream) => stream.take_error()?.map_or(Ok(()), Err),
            Self::Tcp(stream) => {
                stream.set_nonblocking(true)?;
                let heard = listen_for_the_end(stream);
                stream.set_nonblocking(false)?;
                heard
            }
            Self::Tls(tls) => {
                tls.stream.sock.set_nonblocking(true)?;
                let heard = listen_for_the_end(&mut tls.stream);
                tls.stream.sock.set_nonblocking(false)?;
                heard
            }
            Self::UnixStream(stream) => {
                stream.set_nonblocking(true)?;
                let heard = listen_for_the_end(stream);
                stream.set_nonblocking(false)?;
                heard
            }
        }
    }

    /// Waits until the peer's system has acknowledged everything, where our system tells.
    fn await_acknowledgement(&self, timeout: Duration) -> io::Result<()> {
        let socket = match self {
            Self::Tcp(socket) | Self::HalfClosed(socket) => socket,
            Self::Tls(tls) => &tls.stream.sock,
            // There is no network in between, or nobody who acknowledges.
            Self::Udp(_) | Self::UnixDatagram(_) | Self::UnixStream(_) => return Ok(()),
        };
        let deadline = Instant::now() + timeout;
        let mut pause = Duration::from_micros(500);
        loop {
            let start = Instant::now();
            if unacknowledged(socket)?.is_none_or(|bytes| bytes == 0) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(late(timeout));
            }
            // Asking takes long where there are many connections: no more than half of the time goes there.
            std::thread::sleep(pause.max(start.elapsed()));
            pause = (pause * 2).min(Duration::from_millis(50));
        }
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

/// The peer ended its side of the stream, and nothing else is known to have happened.
fn is_end(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionAborted && error.raw_os_error().is_none()
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
/// Linux's ioctl(SIOCOUTQ) and getsockopt(TCP_INFO) would need unsafe code, and sock_diag(7) a socket family that a
/// sandboxed service has no other need for. /proc/net/tcp has the same number (proc(5): `tx_queue`), a line for
/// each connection of the network namespace; the system makes them while they are read, so that reading stops
/// at ours.
fn unacknowledged(socket: &TcpStream) -> io::Result<Option<u64>> {
    let (local, peer) = (socket.local_addr()?, socket.peer_addr()?);
    let table = if local.is_ipv4() { "/proc/net/tcp" } else { "/proc/net/tcp6" };
    let (local, peer) = (in_table(local), in_table(peer));
    // A table that changes while it is read can miss a line.
    for _ in 0..3 {
        let Ok(table) = std::fs::File::open(table) else { break };
        match send_queue(io::BufReader::with_capacity(PIECE, table), &local, &peer) {
            Ok(None) => {}
            Ok(found) => return Ok(found),
            Err(_) => break,
        }
    }
    Ok(None)
}

fn send_queue(mut table: impl io::BufRead, local: &str, peer: &str) -> io::Result<Option<u64>> {
    let mut line = String::new();
    while table.read_line(&mut line)? > 0 {
        let mut columns = line.split_ascii_whitespace().skip(1);
        if columns.next() == Some(local) && columns.next() == Some(peer) {
            let sending = columns.nth(1).and_then(|queues| queues.split_once(':'));
            return Ok(sending.and_then(|(bytes, _)| u64::from_str_radix(bytes, 16).ok()));
        }
        line.clear();
    }
    Ok(None)
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
    use std::net::{Shutdown, TcpListener};

    use super::super::machine;
    use super::*;

    #[test]
    fn the_send_queue_is_found_in_the_system_s_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n   \
                     0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n  \
                     13: 0100007F:D431 0100007F:1F90 01 0000A1B2:00000007 01:00000014 00000000     0\n";
        let found = |table: &str, peer| send_queue(table.as_bytes(), "0100007F:D431", peer).unwrap();
        assert_eq!(found(table, "0100007F:1F90"), Some(0xA1B2));
        assert_eq!(found(table, "0100007F:1F91"), None);
        assert_eq!(found("", "0100007F:1F91"), None);
        if cfg!(target_endian = "little") {
            assert_eq!(in_table(([127, 0, 0, 1], 8080).into()), "0100007F:1F90");
            let address: SocketAddr = "[2001:db8::1]:1".parse().unwrap();
            assert_eq!(in_table(address), "B80D0120000000000000000001000000:0001");
        }
    }

    /// The peer's system takes what fits into its buffer, and no more while the peer does not read.
    #[cfg(target_os = "linux")]
    fn what_is_not_taken_is_seen(listener: &TcpListener) {
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        assert_eq!(unacknowledged(&socket).unwrap(), Some(0));
        socket.set_nonblocking(true).unwrap();
        let mut sent = 0;
        while let Ok(bytes) = (&socket).write(&[b'x'; 65_536]) {
            sent += bytes;
        }
        assert!(unacknowledged(&socket).unwrap().unwrap() > 0);
        let connection = Connection::Tcp(socket.try_clone().unwrap());
        let error = connection.await_acknowledgement(Duration::from_millis(5)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);

        let mut all = vec![0; sent];
        peer.read_exact(&mut all).unwrap();
        connection.await_acknowledgement(Duration::from_secs(60)).unwrap();
        assert_eq!(unacknowledged(&socket).unwrap(), Some(0));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_the_peer_s_system_has_not_taken_is_seen() {
        what_is_not_taken_is_seen(&TcpListener::bind("127.0.0.1:0").unwrap());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_the_peer_s_system_has_not_taken_is_seen_over_ipv6() {
        match TcpListener::bind("[::1]:0") {
            Ok(listener) => what_is_not_taken_is_seen(&listener),
            Err(_) => machine::skip("the machine has no ::1"),
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
            Duration::from_secs(1),
        )
        .unwrap();
        let mut messages = Messages::default();
        messages.add(|bytes| bytes.resize(64 << 20, b'x'));
        let error = transport.deliver(&messages).unwrap_err();
        assert_eq!(error.to_string(), "the server did not go on within 1s");
        assert!(transport.connection.is_none());
    }

    /// More than the peer's system takes while the peer does not read, so that a server has done what it wants to
    /// do first before the last of it is acknowledged.
    fn large() -> (Messages, usize) {
        const EACH: usize = 1_000_000;
        let mut messages = Messages::default();
        for _ in 0..20 {
            messages.add(|bytes| bytes.resize(bytes.len() + EACH, b'x'));
        }
        (messages, 20 * (EACH + "1000000 ".len()))
    }

    fn plain(listener: &TcpListener) -> Transport {
        let address = SyslogAddress::parse(&format!("tcp://{}", listener.local_addr().unwrap())).unwrap();
        Transport::new(address, None, None, Framing::OctetCounting, Duration::from_secs(10)).unwrap()
    }

    #[test]
    fn a_server_that_only_listens_gets_everything_over_one_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut transport = plain(&listener);
        let server = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            socket.shutdown(Shutdown::Write).unwrap();
            let mut bytes = Vec::new();
            socket.read_to_end(&mut bytes).unwrap();
            bytes
        });
        let (messages, length) = large();
        transport.deliver(&messages).unwrap();
        let mut later = Messages::default();
        later.add(|bytes| bytes.extend_from_slice(b"later"));
        transport.deliver(&later).unwrap();
        transport.deliver(&later).unwrap();
        drop(transport);
        let bytes = server.join().unwrap();
        // Once before the end of the server's side was known, a message to find out, and once for good.
        assert_eq!(bytes.len(), length + length / 20 + length + 2 * "5 later".len());
        assert!(bytes.ends_with(b"x5 later5 later"));
    }

    /// Its end of the stream looks the same as that of a server which only listens.
    #[test]
    fn a_server_that_closed_is_not_believed_to_listen() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut transport = plain(&listener);
        let (messages, length) = large();
        let server = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            socket.shutdown(Shutdown::Write).unwrap();
            socket.read_exact(&mut vec![0; length]).unwrap();
            drop(socket);
            let mut bytes = Vec::new();
            listener.accept().unwrap().0.read_to_end(&mut bytes).unwrap();
            bytes
        });
        let error = transport.deliver(&messages).unwrap_err();
        assert_eq!(error.to_string(), "the server closed the connection");
        transport.deliver(&messages).unwrap();
        drop(transport);
        assert_eq!(server.join().unwrap().len(), length);
    }

    /// Nobody is told of its end any more, until something is sent.
    #[test]
    fn a_server_that_only_listened_and_is_gone_is_noticed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut transport = plain(&listener);
        let (messages, length) = large();
        let server = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            socket.shutdown(Shutdown::Write).unwrap();
            socket.read_exact(&mut vec![0; length + length / 20 + length]).unwrap();
            listener
        });
        transport.deliver(&messages).unwrap();
        let listener = server.join().unwrap();
        let mut later = Messages::default();
        later.add(|bytes| bytes.extend_from_slice(b"later"));
        let error = transport.deliver(&later).unwrap_err();
        assert_eq!(error.to_string(), "the server closed the connection");
        transport.deliver(&later).unwrap();
        drop(transport);
        let mut bytes = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"5 later");
    }

    #[test]
    fn messages_are_told_apart() {
        let mut messages = Messages::default();
        for text in ["one", "", "drei ü"] {
            messages.add(|bytes| bytes.extend_from_slice(text.as_bytes()));
        }
        let framed = |framing| {
            let mut out = Vec::new();
            write(&mut out, messages.iter(), framing).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(framed(Framing::OctetCounting), "3 one0 7 drei ü");
        assert_eq!(framed(Framing::Newline), "one\n\ndrei ü\n");
    }
}
