//! How a command ends: the exit codes of the contract and the one sentence that goes to stderr.

use std::fmt;

/// The exit codes that scripts rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Everything asked for was done.
    Good = 0,
    /// A negative finding: an invalid line, a batch that could not be delivered.
    Finding = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// A bug of ours (`EX_SOFTWARE`).
    Bug = 70,
    /// An input or output error (`EX_IOERR`).
    Io = 74,
    /// The configuration is at fault (`EX_CONFIG`).
    Config = 78,
}

/// Why a command stopped early: what, where, and what to do, in one sentence.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The process's exit code.
    pub exit: Exit,
    /// One sentence for the operator, without a trailing newline.
    pub message: String,
}

impl Failure {
    /// The operator's configuration (or a file that it names) is at fault.
    pub fn config(message: impl fmt::Display) -> Self {
        Self { exit: Exit::Config, message: message.to_string() }
    }

    /// Reading, writing or the network failed.
    pub fn io(message: impl fmt::Display) -> Self {
        Self { exit: Exit::Io, message: message.to_string() }
    }

    /// The arguments make no sense together.
    pub fn usage(message: impl fmt::Display) -> Self {
        Self { exit: Exit::Usage, message: message.to_string() }
    }

    /// What was asked for was done, and the answer is no.
    pub fn finding(message: impl fmt::Display) -> Self {
        Self { exit: Exit::Finding, message: message.to_string() }
    }

    /// Something that cannot happen did.
    pub fn bug(message: impl fmt::Display) -> Self {
        Self { exit: Exit::Bug, message: message.to_string() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
