//! Sends signed audit events over HTTPS as Kong Konnect does: formatted as CEF or JSON, signed with
//! Ed25519, batched, compressed, posted, and posted again when the receiver is overloaded.
//!
//! [`send::Sender`] takes events ([`wire::event::Event`]) or ready lines and posts them to an
//! endpoint ([`net::Endpoint`]); [`send`] has an example. It runs inside a tokio runtime. With
//! `default-features = false` and `features = ["send"]` nothing else of this crate is built; with the
//! feature `spool`, [`spool::Sender`] keeps events on disk until the receiver has them.
//!
//! The rest of the crate is the command `auditgate`, which is not a stable interface: the daemon
//! stands between such a producer and a SIEM. It receives batches of signed events, verifies every
//! signature, keeps its promises through crashes, and delivers each event once.
//!
//! # The journey of one delivery
//!
//! 1. A connection comes in at [`receive::listener`], which bounds how many there are and how slow
//!    they may be. [`receive::request`] routes the request by its path, compares its
//!    `Authorization`, and only then reads the body, acquiring memory of [`memory_budget`] as it
//!    arrives.
//! 2. [`ingest`] runs the recipe, apart from the connection: [`wire::batch`] inflates the body
//!    under caps and splits it; [`wire::line`] recognises each line as CEF, JSON or CPS, and
//!    [`wire::signature`] finds which of its bytes are signed; [`trust::verify`] verifies many
//!    lines at once with the keys that [`trust::keyring`] keeps.
//! 3. [`ledger`] writes fingerprints and batch in one transaction with whatever else waits, syncs
//!    it, and only then creates the [`ledger::CommitReceipt`] that [`receive::response`] needs for
//!    a 200. This is the promise.
//! 4. In [`deliver`], one worker per sink reads what the ledger holds, in commit order, and writes
//!    it to the sink; what is safe in a sink is recorded in the ledger, and what every sink has is
//!    deleted from it.
//!
//! The other modules: [`send`] is the producer's side, on the same [`wire`], and [`spool`] keeps its
//! lines on disk until the receiver has them; [`verify`] checks
//! saved lines again, offline; [`mock`] stands in for Konnect in tests and training; [`config`] reads the operator's file into the parts' options;
//! [`net`] is the outgoing HTTPS client; [`observe`] has metrics, readiness and the log;
//! [`database`] has the settings of SQLite; [`compression`] reads compressed files; [`clock`] the machine's clocks; [`secret`] masks and
//! zeroes tokens; [`escape`] keeps foreign text from controlling terminals; [`log_throttle`] keeps
//! peers and failing sinks from flooding the log. [`cli`] is the command line, and `cli/serve` the
//! only place where the parts are put together.
//!
//! # Directions
//!
//! `cli` → `receive` → `ingest` → (`wire` | `trust` | `ledger`); `cli` → `deliver` → (`ledger` |
//! `wire`); `cli` → `send` → (`wire` | `net`); `cli` → `spool` → (`ledger` | `deliver` | `send`);
//! `cli` → `mock` → (`send` | `net`); `cli` → `verify` → (`ingest` | `deliver` | `wire` |
//! `trust`), to judge and to read as they do. Nothing points up. `receive` and `deliver` meet only
//! in the ledger; only `ingest` knows the order of the recipe.

#![cfg_attr(
    not(feature = "daemon"),
    expect(rustdoc::broken_intra_doc_links, reason = "the journey names modules that are not built")
)]

#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod cli;
#[cfg(feature = "spool")]
#[doc(hidden)]
pub mod clock;
#[cfg(feature = "spool")]
#[doc(hidden)]
pub mod compression;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod config;
#[cfg(feature = "spool")]
#[doc(hidden)]
pub mod database;
#[cfg(feature = "spool")]
#[doc(hidden)]
pub mod deliver;
#[doc(hidden)]
pub mod escape;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod ingest;
#[cfg(feature = "spool")]
#[doc(hidden)]
pub mod ledger;
#[cfg(feature = "spool")]
#[doc(hidden)]
pub mod log_throttle;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod memory_budget;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod mock;
#[cfg(feature = "send")]
pub mod net;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod observe;
#[cfg(feature = "spool")]
mod quantity;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod receive;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod secret;
#[cfg(feature = "send")]
pub mod send;
#[cfg(feature = "spool")]
pub mod spool;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod trust;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod verify;
pub mod wire;
