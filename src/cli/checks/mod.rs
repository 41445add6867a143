//! Checks of a configuration against the machine that it is for: what the daemon would meet at its
//! start. Nothing is changed, except that a free port is bound for a moment.

mod files;
mod network;

pub use files::EXPIRY_WARNING_DAYS;

use std::fmt;

use crate::config::Config;

/// One thing that is wrong, or may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it means for the daemon.
    pub severity: Severity,
    /// Setting that it is about, for example ``sink `siem` ``.
    pub subject: String,
    /// One line: what is wrong, and what to do.
    pub problem: String,
}

/// How bad a finding is, the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// It may be right, or get better by itself.
    Warning,
    /// The daemon starts, and cannot do a part of its work.
    Error,
    /// The daemon does not start.
    Fatal,
}

impl Finding {
    fn fatal(subject: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { severity: Severity::Fatal, subject: subject.into(), problem: problem.into() }
    }

    fn error(subject: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { severity: Severity::Error, subject: subject.into(), problem: problem.into() }
    }

    fn warning(subject: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, subject: subject.into(), problem: problem.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.problem)
    }
}

/// Checks what the parts of the daemon do not report at the start: directories, and the space on
/// the disk, as this process's user.
pub fn at_start(config: &Config) -> Vec<Finding> {
    let mut found = files::directories(config);
    found.extend(files::space(config));
    found
}

/// Checks everything: also the ledger, the ports, the key sets and the syslog servers, within about
/// ten seconds.
pub async fn all(config: &Config) -> Vec<Finding> {
    let mut found = files::certificate(config);
    found.extend(at_start(config));
    let (ledger, is_running) = files::ledger(config);
    found.extend(ledger);
    found.extend(network::ports(config, is_running));
    found.extend(network::keys(config).await);
    found.extend(network::syslog_servers(config).await);
    found
}
