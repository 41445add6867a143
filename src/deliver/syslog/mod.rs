//! The syslog sink: RFC 5424 messages over UDP, TCP, TLS or a socket of this machine, at least
//! once.
//!
//! # What "safe" means here
//!
//! Syslog has no acknowledgement, so a sink can know less than one that writes to a disk:
//!
//! * **TCP, TLS, Unix streams**: a chunk counts when the peer's *system* has acknowledged every
//!   byte (on Linux; elsewhere the bytes are written, no more) and the connection is still open a
//!   second later, or the server closed it in order. Otherwise everything that does not count is
//!   sent again over a new connection, so that messages can arrive twice, in order apart from that.
//!   A server that is killed, or whose machine loses power, after its system took the bytes and
//!   before it read them, loses what it had not read, and no client can tell. So does one that
//!   refuses the client certificate later than that.
//! * **UDP**: a datagram was handed to the network. It can be lost on the way without notice,
//!   except for a server that is known not to listen.
//! * **Unix datagrams**: the message is in the queue of the daemon, which a kill of the daemon
//!   empties.
//!
//! Where that is not enough, configure a file sink as well.

mod format;
mod send_queue;
mod transport;

pub use format::{Severity, severity_of};

use std::path::PathBuf;
use std::time::Duration;

use self::format::Formatter;
use self::transport::{Messages, Transport};
use super::sink::{Item, Sink, SinkError};
use crate::ledger::{Position, Resume};
use crate::net::{Facility, Framing, Identity, SyslogAddress, TlsError};

/// Timeout of a connection (all addresses of the host together), of each step of a handshake, of
/// each write that makes no progress, and of the peer's acknowledgement.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Destination and format of messages.
#[derive(Clone, Debug)]
pub struct Options {
    /// The server.
    pub address: SyslogAddress,
    /// For TLS: a PEM file of the only authorities to trust, instead of the system's.
    pub ca: Option<PathBuf>,
    /// For TLS: the certificate to show to a server that asks.
    pub identity: Option<Identity>,
    /// Framing in streams.
    pub framing: Framing,
    /// Facility of every message.
    pub facility: Facility,
    /// APP-NAME of every message, valid by [`is_app_name`](crate::net::is_app_name).
    pub app_name: String,
    /// Whether messages say in STRUCTURED-DATA where the line came from.
    pub structured_data: bool,
    /// Maximum length of a message in bytes; a longer one is truncated, and counted. At least
    /// [`SMALLEST_MAX_SIZE`](crate::net::SMALLEST_MAX_SIZE).
    pub max_size: usize,
}

/// A syslog server. Connects when there is something to send.
pub struct SyslogSink {
    formatter: Formatter,
    transport: Transport,
    collected: Messages,
    truncated: u64,
}

impl SyslogSink {
    /// Creates a sink that has not connected yet. The files for TLS are read here, so that the
    /// start fails when they are wrong, and again for every connection, so that renewed ones are
    /// used.
    ///
    /// # Errors
    /// See [`TlsError`]; never without TLS.
    pub fn new(options: Options) -> Result<Self, TlsError> {
        let uname = rustix::system::uname();
        let formatter = Formatter::new(
            options.facility,
            &uname.nodename().to_string_lossy(),
            &options.app_name,
            std::process::id(),
            options.structured_data,
            options.max_size,
        );
        let transport =
            Transport::new(options.address, options.ca, options.identity, options.framing, TIMEOUT)?;
        Ok(Self { formatter, transport, collected: Messages::default(), truncated: 0 })
    }
}

impl Sink for SyslogSink {
    fn resume(&mut self, last: &Resume) -> Result<Resume, SinkError> {
        self.collected.clear();
        self.transport.reset();
        Ok(last.clone())
    }

    fn push(&mut self, item: &Item<'_>) {
        let formatter = &self.formatter;
        if self.collected.add(|bytes| formatter.write(bytes, item)) {
            self.truncated += 1;
        }
    }

    fn collected(&self) -> usize {
        self.collected.bytes()
    }

    fn flush(&mut self, behind: Position, at_once: bool) -> Result<Option<Resume>, SinkError> {
        let written = match self.collected.is_empty() {
            true => Ok(()),
            false => self.transport.write(&self.collected, behind),
        };
        let confirmed = written.and_then(|()| self.transport.confirm(behind, at_once)).map_err(|cause| {
            let what = format!("cannot deliver to {}", self.transport.address());
            SinkError { start_over: true, ..SinkError::new(what, cause) }
        })?;
        self.collected.clear();
        // The server keeps nothing that a mark could point to.
        Ok(confirmed.map(|position| Resume { position, mark: Vec::new() }))
    }

    fn take_truncated(&mut self) -> u64 {
        std::mem::take(&mut self.truncated)
    }
}

#[cfg(test)]
#[path = "../../../tests/main_job/harness/machine.rs"]
mod machine;
#[cfg(test)]
mod servers;
#[cfg(test)]
mod tests;
