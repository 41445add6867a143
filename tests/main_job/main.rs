//! The main job from outside: the real binary, real sockets, real files.
//!
//! Nothing here links the library: keys, signatures, certificates and requests are made by
//! independent code, so that a mistake cannot cancel itself out.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "the whole crate is a test, and skipped tests are reported on stderr"
)]

mod harness;

mod admin;
mod backlog;
mod bombs;
mod cases;
mod crash;
mod dedup;
mod faults;
mod full_disk;
mod go_client;
mod independent;
mod injection;
mod keys;
mod lag;
mod misconfigured;
mod mock;
mod operate;
mod order;
mod produce;
mod proxies;
mod quarantine;
mod reload;
mod restart;
mod send_errors;
mod service;
mod sinks;
mod spool;
mod status;
mod statuses;
mod streams;
mod tail;
mod unauthenticated;
mod verify_configured;
mod verify_database;
mod verify_file;
