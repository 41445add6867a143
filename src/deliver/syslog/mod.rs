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
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

use self::format::Formatter;
use self::transport::Transport;
use super::rendered::Rendered;
use super::sink::{Item, Sink, SinkError};
use crate::ledger::{Position, Resume};
use crate::net::{
    Facility, Framing, Identity, LONGEST_APP_NAME, SMALLEST_MAX_SIZE, SyslogAddress, TlsError, is_app_name,
};
use crate::quantity::{parsed, size};

/// Timeout of a connection (all addresses of the host together), of each step of a handshake, of
/// each write that makes no progress, and of the peer's acknowledgement.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Options of a syslog sink: the receiver's address, and the form of the messages.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct SyslogOptions {
    /// The server.
    pub address: SyslogAddress,
    /// PEM file of the only authorities to trust, instead of the system's; for TLS only.
    pub ca: Option<PathBuf>,
    /// PEM file with the certificate to show to a server that asks, then its intermediates; for TLS
    /// only.
    pub cert: Option<PathBuf>,
    /// PEM file with the certificate's private key, unencrypted; for TLS only.
    pub key: Option<PathBuf>,
    /// Framing in streams. Default [`Framing::OctetCounting`], and [`Framing::Newline`] with
    /// `unix://`.
    pub framing: Option<Framing>,
    /// Facility of every message. Default `local0`.
    #[serde(default = "local0")]
    pub facility: Facility,
    /// APP-NAME of every message, valid by [`is_app_name`]. Default `auditgate`.
    #[serde(default = "auditgate", deserialize_with = "app_name")]
    pub app_name: String,
    /// Adds the line's origin to messages, as STRUCTURED-DATA. Default off.
    #[serde(default)]
    pub structured_data: bool,
    /// Maximum length of a message in bytes; a longer one is truncated, and counted. At least
    /// [`SMALLEST_MAX_SIZE`], and at most 65507 B with `udp://` and `unix://`, else 16 MiB. Default
    /// 2 KiB with `udp://`, 8 KiB with `unix://`, else 64 KiB.
    #[serde(default, with = "size")]
    pub max_size: Option<usize>,
}

/// Maximum size that every receiver should accept, in bytes (RFC 5426, section 3.2).
const UDP_SIZE: usize = 2 << 10;
/// Maximum size that rsyslog accepts by default, in bytes.
const UNIX_SIZE: usize = 8 << 10;
/// Maximum size that syslog-ng accepts by default, in bytes. It closes a connection with a longer
/// frame, which would be sent again forever.
const STREAM_SIZE: usize = 64 << 10;
/// Maximum payload of UDP over IPv4, in bytes.
const LARGEST_DATAGRAM: usize = 65_507;
/// Maximum size in a stream, in bytes, for a server that is configured to accept more.
const LARGEST_IN_STREAM: usize = 16 << 20;

fn local0() -> Facility {
    Facility::LOCAL0
}

fn auditgate() -> String {
    "auditgate".to_owned()
}

fn app_name<'de, D: Deserializer<'de>>(written: D) -> Result<String, D::Error> {
    parsed(written, |text| {
        let problem = || {
            format!(
                "it cannot stand in a syslog header; use 1 to {LONGEST_APP_NAME} ASCII characters, no space"
            )
        };
        is_app_name(text).then(|| text.to_owned()).ok_or_else(problem)
    })
}

impl SyslogOptions {
    /// Fills in the defaults that depend on the address.
    pub fn fill_in(&mut self) {
        if !matches!(self.address, SyslogAddress::Udp(_)) {
            self.framing = Some(self.framing());
        }
        self.max_size = Some(self.max_size());
    }

    fn framing(&self) -> Framing {
        let is_unix = matches!(self.address, SyslogAddress::Unix(_));
        self.framing.unwrap_or(if is_unix { Framing::Newline } else { Framing::OctetCounting })
    }

    fn max_size(&self) -> usize {
        self.max_size.unwrap_or(match self.address {
            SyslogAddress::Udp(_) => UDP_SIZE,
            SyslogAddress::Unix(_) => UNIX_SIZE,
            SyslogAddress::Tcp(_) | SyslogAddress::Tls(_) => STREAM_SIZE,
        })
    }

    /// Reports options that exclude each other to `problem`, with the reason.
    pub fn check(&self, problem: &mut dyn FnMut(&[&str], String)) {
        let Self { address, ca, cert, key, .. } = self;
        let is_tls = matches!(address, SyslogAddress::Tls(_));
        let is_stream = !matches!(address, SyslogAddress::Udp(_));
        for (name, is_there, fits, schemes) in [
            ("ca", ca.is_some(), is_tls, "tls://"),
            ("cert", cert.is_some(), is_tls, "tls://"),
            ("key", key.is_some(), is_tls, "tls://"),
            ("framing", self.framing.is_some(), is_stream, "tcp://, tls:// and unix://"),
        ] {
            if is_there && !fits {
                let hint = format!("`{name}` is for {schemes} only: remove it");
                problem(&[name, "address"], format!("`{name}` with the address {address}; {hint}"));
            }
        }
        if is_tls && cert.is_some() != key.is_some() {
            let text = "only one of `cert` and `key`; a client certificate needs both";
            problem(&["cert", "key"], text.to_owned());
        }
        let largest = match address {
            SyslogAddress::Udp(_) | SyslogAddress::Unix(_) => LARGEST_DATAGRAM,
            SyslogAddress::Tcp(_) | SyslogAddress::Tls(_) => LARGEST_IN_STREAM,
        };
        let max_size = self.max_size();
        if !(SMALLEST_MAX_SIZE..=largest).contains(&max_size) {
            let text = format!(
                "`max_size` cannot be {max_size}B with the address {address}; write a size from {SMALLEST_MAX_SIZE}B to \
                 {largest}B"
            );
            problem(&["max_size", "address"], text);
        }
    }
}

/// A syslog server. Connects when there is something to send.
pub struct SyslogSink {
    formatter: Formatter,
    transport: Transport,
    collected: Rendered,
    truncated: AtomicU64,
}

impl SyslogSink {
    /// Creates a sink that has not connected yet. The files for TLS are read here, so that the
    /// start fails when they are wrong, and again for every connection, so that renewed ones are
    /// used.
    ///
    /// # Errors
    /// See [`TlsError`]; never without TLS.
    pub fn new(options: SyslogOptions) -> Result<Self, TlsError> {
        let uname = rustix::system::uname();
        let formatter = Formatter::new(
            options.facility,
            &uname.nodename().to_string_lossy(),
            &options.app_name,
            std::process::id(),
            options.structured_data,
            options.max_size(),
        );
        let framing = options.framing();
        let identity = options.cert.zip(options.key).map(|(cert, key)| Identity { cert, key });
        let transport = Transport::new(options.address, options.ca, identity, framing, TIMEOUT)?;
        Ok(Self { formatter, transport, collected: Rendered::default(), truncated: AtomicU64::new(0) })
    }

    /// Connects, with a handshake where the address asks for TLS, and sends nothing. Takes 10 s at
    /// most.
    ///
    /// # Errors
    /// As for delivering.
    pub fn reach(&self) -> Result<(), SinkError> {
        let what = || format!("cannot reach {}", self.transport.address());
        self.transport.reach().map_err(|cause| SinkError::new(what(), cause))
    }
}

impl Sink for SyslogSink {
    fn resume(&mut self, last: &Resume) -> Result<Resume, SinkError> {
        self.collected.clear();
        self.transport.reset();
        Ok(last.clone())
    }

    fn push(&mut self, item: &Item<'_>) {
        self.push_all(&[*item]);
    }

    fn push_all(&mut self, items: &[Item<'_>]) {
        let Self { formatter, truncated, .. } = self;
        self.collected.add_all(items, |bytes, item| {
            if formatter.write(bytes, item) {
                truncated.fetch_add(1, Ordering::Relaxed);
            }
        });
    }

    fn collected(&self) -> usize {
        self.collected.bytes().len()
    }

    fn flush(&mut self, behind: Position, at_once: bool) -> Result<Option<Resume>, SinkError> {
        let written = match self.collected.is_empty() {
            true => Ok(()),
            false => self.transport.write(&self.collected, behind),
        };
        let confirmed = written.and_then(|()| self.transport.confirm(behind, at_once)).map_err(|cause| {
            let what = format!("cannot deliver to {}", self.transport.address());
            SinkError { must_resume: true, ..SinkError::new(what, cause) }
        })?;
        self.collected.clear();
        // The server keeps nothing that a mark could point to.
        Ok(confirmed.map(|position| Resume { position, mark: Vec::new() }))
    }

    fn take_truncated(&mut self) -> u64 {
        std::mem::take(self.truncated.get_mut())
    }
}

#[cfg(test)]
#[path = "../../../tests/main_job/harness/machine.rs"]
mod machine;
#[cfg(test)]
mod servers;
#[cfg(test)]
mod tests;
