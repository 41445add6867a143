//! From the socket to bounded bytes, and back to an answer.
//!
//! [`listener`] owns connections, their deadlines and the drain; [`tls`] loads certificates; [`request`]
//! routes, authorises and bounds a request until it is a delivery for `ingest`; [`response`] is the only place
//! where what became of it turns into a status.

pub mod listener;
pub mod request;
pub mod response;
pub mod tls;
