//! Outgoing connections: checked URLs and addresses, the TLS client configuration and a small HTTPS
//! client.
//!
//! It knows nothing of keys, events or the configuration file. The caller decides what a status
//! means and whether to retry after a failure.

#[cfg(test)]
pub(crate) mod authority;
mod client;
mod endpoint;
#[cfg(test)]
pub(crate) mod loopback;
mod proxy;
#[cfg(feature = "daemon")]
mod syslog;
pub(crate) mod tls;
#[cfg(feature = "spool")]
#[doc(hidden)]
pub mod unix_socket;

pub use client::ClientError;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub use client::PlainAddress;
#[doc(hidden)]
pub use client::{Client, Fetched, InvalidToken, bearer};
pub use endpoint::{Endpoint, EndpointError};
#[doc(hidden)]
pub use hyper::body::Bytes;
#[doc(hidden)]
pub use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub use syslog::{
    Facility, Framing, HostPort, LONGEST_APP_NAME, SMALLEST_MAX_SIZE, SyslogAddress, SyslogAddressError,
    is_app_name,
};
pub use tls::TlsError;
#[doc(hidden)]
pub use tls::{ClientOptions, client_tls, client_tls_as};
pub use tls::{Identity, InvalidPin, Pin};
