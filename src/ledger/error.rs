//! Errors of the ledger.

use std::path::PathBuf;

/// Reason why a commit returned no receipt. Nothing of the batch was kept, unless the variant says
/// otherwise.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CommitError {
    /// The transaction was rolled back: no space, an I/O error. Can be retried.
    #[error("the ledger could not write: {0}")]
    Storage(String),
    /// The ledger is closed: the process ends. It is not known whether the batch was kept; recovery
    /// decides.
    #[error("the ledger is closed")]
    Closed,
}

/// Reason why the ledger cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another daemon uses it.
    #[error("{0} is in use by another auditgate; each daemon needs a data_dir of its own")]
    InUse(PathBuf),
    /// The directory in which it would be created does not exist.
    #[error(
        "cannot create data_dir {data_dir}: {parent} does not exist; make it, mount its disk, or correct data_dir"
    )]
    NoParent {
        /// The directory.
        data_dir: PathBuf,
        /// The directory that is missing.
        parent: PathBuf,
    },
    /// The directory or a file in it cannot be used.
    #[error("cannot use {path}: {cause}")]
    Io {
        /// The directory or file.
        path: PathBuf,
        /// The system's error.
        cause: std::io::Error,
    },
    /// SQLite refuses it.
    #[error("cannot open the ledger {path}: {cause}")]
    Database {
        /// The database file.
        path: PathBuf,
        /// SQLite's error.
        cause: rusqlite::Error,
    },
    /// There is no space for what SQLite needs to open it.
    #[error(
        "cannot open the ledger {path}: its disk is full ({cause}); free 1 MiB or more on it, and start again"
    )]
    NoSpace {
        /// The database file.
        path: PathBuf,
        /// SQLite's error.
        cause: rusqlite::Error,
    },
    /// A later version of auditgate wrote it.
    #[error(
        "the ledger {path} has schema version {found}, and this auditgate knows {known}; use the newer auditgate"
    )]
    TooNew {
        /// The database file.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// The latest version that this program knows.
        known: usize,
    },
    /// A sink was removed from the configuration although events wait for it.
    #[error(
        "sink `{sink}` is no longer configured, but {pending} events wait for it; configure it again, or give them up with `auditgate forget-sink {sink}`"
    )]
    Orphaned {
        /// The sink's name.
        sink: String,
        /// Number of events that wait for it.
        pending: u64,
    },
    /// A sink takes less than before although events wait for it that it would no longer get.
    #[error(
        "sink `{sink}` takes less than before (`stream`, `sources`), and {pending} events wait for it that it no longer takes; put it back as it was until they are delivered, or give them up with `auditgate forget-sink {sink}`"
    )]
    Narrowed {
        /// The sink's name.
        sink: String,
        /// Number of events that it would not get.
        pending: u64,
    },
    /// There is no ledger, and none may be created.
    #[error("there is no ledger {0}; check `data_dir` in the configuration")]
    Missing(PathBuf),
    /// A sink's name now belongs to another type.
    #[error("sink `{sink}` was of type {was} and is now of type {is}; give the new sink another name")]
    KindChanged {
        /// The sink's name.
        sink: String,
        /// The type that its position belongs to.
        was: String,
        /// The configured type.
        is: &'static str,
    },
}

/// Reason why a ledger ended by itself. The process must end, too.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failed {
    /// Nothing is known about what is on the disk. What was committed is recovered when it is
    /// opened again.
    #[error("the ledger cannot be trusted any more: {0}")]
    Untrusted(String),
    /// A file of the ledger is no longer at its path, or another one is there. What is committed is
    /// in the missing file.
    #[error("{0} was removed or replaced while it was in use")]
    Gone(PathBuf),
}
