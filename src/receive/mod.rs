//! From the socket to bounded bytes, and back to an answer.
//!
//! [`listener`] owns connections, their deadlines and the drain; [`places`] says who may be connected; [`tls`] loads
//! certificates; [`answers`] sees to it that answers are taken; [`request`]
//! routes, authorises and bounds a request until it is a delivery for `ingest`; [`response`] is the only place
//! where what became of it turns into a status.

pub mod answers;
pub mod ending;
pub mod listener;
pub mod places;
mod proxy_header;
pub mod request;
pub mod response;
pub mod tls;
