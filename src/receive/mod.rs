//! From the socket to bounded bytes, and back to an answer.
//!
//! [`listener`] owns connections, their deadlines and the drain; [`connection_limit`] says who may be connected; [`tls`] loads
//! certificates; [`response_stream`] sees to it that responses are taken; [`request`]
//! routes, authorises and bounds a request until it is a delivery for `ingest`; [`response`] is the only place
//! where what became of it turns into a status.

pub mod close_reason;
pub mod connection_limit;
pub mod listener;
mod proxy_header;
pub mod request;
pub mod response;
pub mod response_stream;
pub mod tls;
