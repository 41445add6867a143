//! The steps that can fail, and how they fail.

use Process::{Ends, GoesOn};
use Trigger::{
    AfterAReader, AfterThe200, Delivering, LastSink, Posting, PostingMegabytes, Reconnecting, Shrinking,
    Starting, StartingAfterKill, Terminating,
};

/// A step that can fail.
pub(super) struct Step {
    pub(super) name: &'static str,
    /// The system call, by its name in `faults.c`.
    pub(super) call: &'static str,
    /// Glob of the file's path; empty for a socket.
    pub(super) path: &'static str,
    /// Glob of the path of a file that must be created first.
    pub(super) after: &'static str,
    pub(super) faults: &'static [Fault],
    pub(super) trigger: Trigger,
    pub(super) process: Process,
}

/// How a step fails: mode and error, by their names in `faults.c`.
pub(super) type Fault = (&'static str, &'static str);

/// What makes the daemon take the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trigger {
    /// Batches, one right after the other.
    Posting,
    /// Batches of a megabyte: 16 MiB of log cause a checkpoint.
    PostingMegabytes,
    /// The first whole checkpoint after a reader of the database allowed only a part of one, which
    /// SQLite does not sync.
    AfterAReader,
    /// The checkpoint that frees the space of a delivered backlog.
    Shrinking,
    /// Batches, each delivered before the next one is posted.
    Delivering,
    /// The delivery of a batch after its 200.
    AfterThe200,
    /// The delivery to the last sink, once the ledger has recorded the other sinks' positions.
    LastSink,
    /// The first batch after the syslog server closed its connections.
    Reconnecting,
    /// SIGTERM.
    Terminating,
    /// A start after a normal exit.
    Starting,
    /// A start after a kill with nothing undelivered.
    StartingAfterKill,
}

/// What the process does when the step fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Process {
    GoesOn,
    /// It exits with code 74, and is restarted.
    Ends,
}
const WRITE: &[Fault] = &[("failed", "EIO"), ("failed", "ENOSPC"), ("half", "ENOSPC"), ("persisted", "EIO")];
const FAILED: &[Fault] = &[("failed", "EIO")];
const TWICE: &[Fault] = &[("failed", "EIO"), ("persisted", "EIO")];
const CONNECT: &[Fault] = &[("failed", "ECONNREFUSED"), ("persisted", "ETIMEDOUT")];
const SEND: &[Fault] = &[("failed", "ECONNRESET"), ("half", "EPIPE"), ("persisted", "ECONNRESET")];

pub(super) const LEDGER: &[Step] = &[
    step("write a batch to the log", "write", "*/ledger.db-wal", WRITE, Posting, GoesOn),
    step("sync the log", "sync", "*/ledger.db-wal", TWICE, Posting, Ends),
    step("write a checkpoint", "write", "*/ledger.db", TWICE, PostingMegabytes, GoesOn),
    step("sync a checkpoint", "sync", "*/ledger.db", TWICE, PostingMegabytes, Ends),
    step("sync a checkpoint after a part of one", "sync", "*/ledger.db", FAILED, AfterAReader, Ends),
    step("sync the checkpoint after a backlog", "sync", "*/ledger.db", TWICE, Shrinking, Ends),
    step("write a sink's position", "write", "*/ledger.db-wal", WRITE, AfterThe200, GoesOn),
    step("sync a sink's position", "sync", "*/ledger.db-wal", TWICE, AfterThe200, Ends),
    step("write a deletion", "write", "*/ledger.db-wal", WRITE, LastSink, GoesOn),
    step("sync a deletion", "sync", "*/ledger.db-wal", TWICE, LastSink, Ends),
    step("write the last checkpoint", "write", "*/ledger.db", WRITE, Terminating, GoesOn),
    step("sync the last checkpoint", "sync", "*/ledger.db", TWICE, Terminating, GoesOn),
    step("remove the log", "unlink", "*/ledger.db-wal", TWICE, Terminating, GoesOn),
    step("create the log", "create", "*/ledger.db-wal", TWICE, Starting, Ends),
    step("sync the existing log", "sync", "*/ledger.db-wal", TWICE, StartingAfterKill, Ends),
];

pub(super) const ANSWER: &[Step] = &[step("send the 200", "send", "", SEND, Posting, GoesOn)];

pub(super) const FILE: &[Step] = &[
    step("write lines", "write", "*/verified.log", WRITE, Delivering, GoesOn),
    step("sync lines", "sync", "*/verified.log", TWICE, Delivering, GoesOn),
    step("rename the full file", "rename", "*/verified.log", TWICE, Delivering, GoesOn),
    step("sync the new name", "directory-sync-after-rename", "*/verified.log", TWICE, Delivering, GoesOn),
    step("create the next file", "create", "*/verified.log", TWICE, Delivering, GoesOn),
    step("set the next file's mode", "chmod", "*/verified.log", TWICE, Delivering, GoesOn),
    step(
        "sync the next file's name",
        "directory-sync-after-create",
        "*/verified.log",
        TWICE,
        Delivering,
        GoesOn,
    ),
    Step {
        after: "*/verified.log",
        ..step("write the mark of the next file", "write", "*/ledger.db-wal", WRITE, Delivering, GoesOn)
    },
    Step {
        after: "*/verified.log",
        ..step("sync the mark of the next file", "sync", "*/ledger.db-wal", TWICE, Delivering, Ends)
    },
];

pub(super) const COMPRESSION: &[Step] = &[
    step("create the compressed file", "create", "*.zst.unfinished", TWICE, Delivering, GoesOn),
    step("set its mode", "chmod", "*.zst.unfinished", TWICE, Delivering, GoesOn),
    step("write it", "write", "*.zst.unfinished", WRITE, Delivering, GoesOn),
    step("sync it", "sync", "*.zst.unfinished", TWICE, Delivering, GoesOn),
    step("rename it", "rename", "*.zst.unfinished", TWICE, Delivering, GoesOn),
    step("sync its name", "directory-sync-after-rename", "*.zst.unfinished", TWICE, Delivering, GoesOn),
    step("remove the plain file", "unlink", "*/verified.log.*Z-????", TWICE, Delivering, GoesOn),
];

pub(super) const SQLITE: &[Step] = &[
    step("write rows to the log", "write", "*/events.db-wal", WRITE, Delivering, GoesOn),
    step("sync the log", "sync", "*/events.db-wal", TWICE, Delivering, GoesOn),
    step("write a checkpoint", "write", "*/events.db", TWICE, PostingMegabytes, GoesOn),
    step("sync a checkpoint", "sync", "*/events.db", TWICE, PostingMegabytes, GoesOn),
    step("sync a checkpoint after a part of one", "sync", "*/events.db", FAILED, AfterAReader, GoesOn),
    step("write the last checkpoint", "write", "*/events.db", WRITE, Terminating, GoesOn),
    step("sync the existing log", "sync", "*/events.db-wal", TWICE, StartingAfterKill, GoesOn),
    step("sync the last checkpoint", "sync", "*/events.db", TWICE, Terminating, GoesOn),
    step("remove the log", "unlink", "*/events.db-wal", TWICE, Terminating, GoesOn),
    step("create the log", "create", "*/events.db-wal", TWICE, Starting, GoesOn),
    step("sync the new log", "sync", "*/events.db-wal", TWICE, Starting, GoesOn),
];

pub(super) const SYSLOG: &[Step] = &[
    step("connect", "connect", "", CONNECT, Reconnecting, GoesOn),
    step("send messages", "send", "", SEND, Delivering, GoesOn),
];

const fn step(
    name: &'static str,
    call: &'static str,
    path: &'static str,
    faults: &'static [Fault],
    trigger: Trigger,
    process: Process,
) -> Step {
    Step { name, call, path, after: "", faults, trigger, process }
}
