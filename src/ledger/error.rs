//! What goes wrong with a ledger.

use std::path::PathBuf;

/// Why a commit gave no receipt. Nothing of the batch was kept, unless it says otherwise.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CommitError {
    /// The transaction was rolled back: no space, an I/O error. Worth another try.
    #[error("the ledger could not write: {0}")]
    Storage(String),
    /// The ledger is closed: the process ends. It is not known whether the batch was kept; recovery decides.
    #[error("the ledger is closed")]
    Closed,
}

/// Why the ledger cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another daemon has it.
    #[error("{0} is in use by another auditgate; each daemon needs a data_dir of its own")]
    InUse(PathBuf),
    /// The directory or a file in it cannot be used.
    #[error("cannot use {path}: {cause}")]
    Io {
        /// Which one.
        path: PathBuf,
        /// The system's words.
        cause: std::io::Error,
    },
    /// SQLite refuses it.
    #[error("cannot open the ledger {path}: {cause}")]
    Database {
        /// The database file.
        path: PathBuf,
        /// SQLite's words.
        cause: rusqlite::Error,
    },
    /// There is no space for what SQLite needs to open it.
    #[error(
        "cannot open the ledger {path}: its disk is full ({cause}); make some room there, 1 MiB or more, and start again"
    )]
    NoSpace {
        /// The database file.
        path: PathBuf,
        /// SQLite's words.
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
        /// Ours.
        known: usize,
    },
    /// A sink is gone from the configuration although events wait for it.
    #[error(
        "sink `{sink}` is no longer configured, but {pending} events wait for it; configure it again, or give them up with `auditgate forget-sink {sink}`"
    )]
    Orphaned {
        /// The sink's name.
        sink: String,
        /// Events that it has not had.
        pending: u64,
    },
    /// A sink takes less than before although what it took waits for it.
    #[error(
        "sink `{sink}` takes less than before (`stream`, `sources`), and {pending} events wait for it that it no longer takes; put it back as it was until they are delivered, or give them up with `auditgate forget-sink {sink}`"
    )]
    Narrowed {
        /// The sink's name.
        sink: String,
        /// Events that it has not had and would not get.
        pending: u64,
    },
    /// There is no ledger, and none is to be made.
    #[error("there is no ledger {0}; look at `data_dir` in the configuration")]
    Missing(PathBuf),
    /// A sink's name now belongs to another type.
    #[error("sink `{sink}` was of type {was} and is now of type {is}; give the new sink another name")]
    KindChanged {
        /// The sink's name.
        sink: String,
        /// The type its position belongs to.
        was: String,
        /// The configured type.
        is: &'static str,
    },
}

/// Why a ledger ended by itself. The process must end, too.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failed {
    /// Nothing is known about what is on the disk. What was committed is recovered when it is opened again.
    #[error("the ledger cannot be trusted any more: {0}")]
    Untrusted(String),
    /// A file of it is gone from its path, or another one is there. What is committed is where that went.
    #[error("{0} was removed or replaced while it was in use")]
    Gone(PathBuf),
}
