//! Programs that a test runs: auditgate and others.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs a command, which must succeed.
pub(crate) fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Returns a command of the program under test, with the environment that the systemd unit sets.
pub(crate) fn auditgate() -> Command {
    let unit = include_str!("../../../systemd/auditgate.service");
    let environment = unit.lines().filter_map(|line| line.strip_prefix("Environment=")?.split_once('='));
    let mut command = Command::new(env!("CARGO_BIN_EXE_auditgate"));
    command.env("NO_COLOR", "1").envs(environment);
    command
}

/// Returns the path of a file beside the tests' sources.
pub(crate) fn beside(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/main_job").join(name)
}
