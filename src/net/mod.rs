//! The way out: checked URLs, the TLS client configuration and a small HTTPS client.
//!
//! A leaf: it knows nothing of keys, events or the configuration file. Whoever calls decides
//! what a status means and whether a failure is worth another try.

mod client;
mod endpoint;
#[cfg(test)]
pub(crate) mod loopback;
mod tls;

pub use client::{Client, ClientError, Fetched, InvalidToken, bearer};
pub use endpoint::{Endpoint, EndpointError};
pub use hyper::body::Bytes;
pub use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
pub use tls::{TlsError, client_tls};
