//! skeleton
pub mod cli;
pub mod config;
pub mod deliver;
pub mod ingest;
pub mod ledger;
pub mod net;
pub mod observe;
pub mod printable;
pub mod receive;
pub mod room;
pub mod send;
pub mod trust;
pub mod wire;
