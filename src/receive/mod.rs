//! From the socket to bounded bytes, and back to a response.
//!
//! [`listener`] owns connections, their deadlines and the drain; [`connection_limit`] decides which
//! connections are open; [`tls`] loads certificates; [`response_stream`] sets a deadline for
//! reading a response; [`request`] routes, authorises and bounds a request until it is a delivery
//! for `ingest`; [`response`] is the only place where the result becomes a status.

pub mod close_reason;
pub mod connection_limit;
pub mod listener;
mod proxy_header;
pub mod request;
pub mod response;
pub mod response_stream;
pub mod tls;
