//! Readiness of the daemon, the reasons why it is not ready, and what needs attention although it
//! is.

use std::collections::BTreeMap;
use std::fmt;

use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};

/// [`Health::summary`] of a daemon that has no problem.
pub const RECEIVING: &str = "receiving batches";

/// The daemon's readiness: its phase and the named conditions that its parts report.
///
/// Shared behind an `Arc`. It only stores: the part that reports a problem also logs it.
#[derive(Debug, Default)]
pub struct Health {
    state: Mutex<State>,
}

/// One reason why the daemon is not ready, or one thing that needs attention.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Problem {
    /// Name of the condition that is not met, for example `ledger`.
    pub condition: String,
    /// One line for the operator.
    pub problem: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.condition, self.problem)
    }
}

#[derive(Debug, Default)]
struct State {
    phase: Phase,
    problems: BTreeMap<String, String>,
    warnings: BTreeMap<String, String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Starting,
    Running,
    Draining,
}

impl Health {
    /// Creates the state of a daemon that starts: not ready until [`Health::started`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Reports a condition: met, or not met and why in one line. A later report replaces an earlier
    /// one of the same name. The names come from the code and the configuration, never from the
    /// network.
    pub fn set(&self, condition: &str, state: Result<(), String>) {
        replace(&mut self.lock().problems, condition, state);
    }

    /// Reports a condition that does not keep the daemon from taking deliveries: refusing them would
    /// lose events, but an operator has to act. Otherwise as [`Health::set`].
    pub fn warn(&self, condition: &str, state: Result<(), String>) {
        replace(&mut self.lock().warnings, condition, state);
    }

    /// Removes a reported problem, if there is one.
    pub fn clear(&self, condition: &str) {
        self.set(condition, Ok(()));
    }

    /// Ends the start. After [`Health::draining`] it changes nothing.
    pub fn started(&self) {
        let mut this = self.lock();
        if this.phase == Phase::Starting {
            this.phase = Phase::Running;
        }
    }

    /// Begins the shutdown: from now on the daemon is not ready.
    pub fn draining(&self) {
        self.lock().phase = Phase::Draining;
    }

    /// Returns whether the daemon is ready for deliveries.
    ///
    /// # Errors
    /// Every problem, the daemon's phase first and then by the condition's name.
    pub fn ready(&self) -> Result<(), Vec<Problem>> {
        let this = self.lock();
        let phase = match this.phase {
            Phase::Starting => Some(("startup", "The daemon is starting.")),
            Phase::Running => None,
            Phase::Draining => Some(("shutdown", "The daemon is shutting down.")),
        };
        let phase = phase
            .map(|(condition, problem)| Problem { condition: condition.into(), problem: problem.into() });
        let problems: Vec<_> = phase.into_iter().chain(list(&this.problems)).collect();
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    /// Returns what needs attention although it does not keep the daemon from being ready, by the
    /// condition's name.
    pub fn warnings(&self) -> Vec<Problem> {
        list(&self.lock().warnings).collect()
    }

    /// Returns whether [`Health::started`] is still to come.
    pub fn is_starting(&self) -> bool {
        self.lock().phase == Phase::Starting
    }

    /// Returns the state in one line, for `systemctl status`.
    pub fn summary(&self) -> String {
        let (state, problems) = match self.ready() {
            Ok(()) => (RECEIVING, self.warnings()),
            Err(problems) => ("not ready", problems),
        };
        let problems = problems.iter().map(Problem::to_string);
        std::iter::once(state.to_owned()).chain(problems).collect::<Vec<_>>().join("; ")
    }

    /// Locks the state. A panic elsewhere leaves it consistent: each change is a single step.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

fn replace(conditions: &mut BTreeMap<String, String>, condition: &str, state: Result<(), String>) {
    match state {
        Ok(()) => conditions.remove(condition),
        Err(problem) => conditions.insert(condition.to_owned(), problem),
    };
}

fn list(conditions: &BTreeMap<String, String>) -> impl Iterator<Item = Problem> {
    let problem = |(condition, problem): (&String, &String)| Problem {
        condition: condition.clone(),
        problem: problem.clone(),
    };
    conditions.iter().map(problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conditions(health: &Health) -> Vec<String> {
        health.ready().err().unwrap_or_default().into_iter().map(|problem| problem.condition).collect()
    }

    #[test]
    fn the_daemon_is_ready_only_between_start_and_shutdown() {
        let health = Health::new();
        assert_eq!(conditions(&health), ["startup"]);
        health.started();
        assert_eq!(health.ready(), Ok(()));
        health.draining();
        assert_eq!(conditions(&health), ["shutdown"]);
        health.started();
        assert_eq!(conditions(&health), ["shutdown"]);
    }

    #[test]
    fn a_shutdown_during_the_start_is_not_undone() {
        let health = Health::new();
        health.draining();
        health.started();
        assert_eq!(conditions(&health), ["shutdown"]);
    }

    #[test]
    fn problems_are_listed_until_they_are_cleared() {
        let health = Health::new();
        health.started();
        health.set("sink siem", Err("The server does not answer.".into()));
        health.set("ledger", Err("disk is full".into()));
        health.set("ledger", Err("The disk is full.".into()));
        assert_eq!(conditions(&health), ["ledger", "sink siem"]);
        assert_eq!(health.ready().unwrap_err()[0].problem, "The disk is full.");
        health.set("ledger", Ok(()));
        assert_eq!(conditions(&health), ["sink siem"]);
        health.clear("sink siem");
        health.clear("sink siem");
        assert_eq!(health.ready(), Ok(()));
    }
    #[test]
    fn warnings_leave_the_daemon_ready_and_stand_in_the_summary() {
        let health = Health::new();
        health.started();
        assert_eq!(health.summary(), "receiving batches");
        health.warn("configuration", Err("not reloaded".into()));
        assert_eq!(health.ready(), Ok(()));
        assert_eq!(health.summary(), "receiving batches; configuration: not reloaded");
        health.set("sink siem", Err("connection refused".into()));
        assert_eq!(health.summary(), "not ready; sink siem: connection refused");
        health.clear("sink siem");
        health.warn("configuration", Ok(()));
        assert_eq!((health.warnings(), health.summary()), (vec![], "receiving batches".to_owned()));
    }
}
