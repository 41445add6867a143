//! How a command ends: the exit codes of the contract and the one sentence that goes to stderr.

use std::fmt;

/// Exit codes that scripts rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Everything asked for was done.
    Good = 0,
    /// A negative finding: an invalid line, a batch that could not be delivered.
    Finding = 1,
    /// The command line is not valid.
    Usage = 2,
    /// A bug in auditgate (`EX_SOFTWARE`).
    Bug = 70,
    /// An input or output error (`EX_IOERR`).
    Io = 74,
    /// The configuration is not valid (`EX_CONFIG`).
    Config = 78,
}

/// Reason why a command stopped early: what failed, on what, why, and what to do, in one line.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Exit code of the process.
    pub exit: Exit,
    /// One line for the operator, without a trailing newline; empty when it was reported already.
    pub message: String,
}

impl Failure {
    /// Creates a failure of the operator's configuration, or of a file that it names.
    pub fn config(message: impl fmt::Display) -> Self {
        Self { exit: Exit::Config, message: message.to_string() }
    }

    /// Creates a failure of reading, writing or the network.
    pub fn io(message: impl fmt::Display) -> Self {
        Self { exit: Exit::Io, message: message.to_string() }
    }

    /// Creates a failure of the arguments, which contradict each other.
    pub fn usage(message: impl fmt::Display) -> Self {
        Self { exit: Exit::Usage, message: message.to_string() }
    }

    /// Creates a negative result of a command that did what it was asked for.
    pub fn finding(message: impl fmt::Display) -> Self {
        Self { exit: Exit::Finding, message: message.to_string() }
    }

    /// Creates a failure that the log has.
    pub fn reported(exit: Exit) -> Self {
        Self { exit, message: String::new() }
    }

    /// Creates a failure that only a bug explains.
    pub fn bug(message: impl fmt::Display) -> Self {
        Self { exit: Exit::Bug, message: message.to_string() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
