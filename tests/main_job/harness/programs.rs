//! Programs of others that a test works with.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Whether the programs are there; says so when they are not. With `AUDITGATE_TESTS_NO_SKIP=1` a missing one
/// fails the test.
pub(crate) fn are_there(programs: &[&[&str]]) -> bool {
    for command in programs {
        let found = Command::new(command[0]).args(&command[1..]).output();
        if found.is_ok_and(|output| output.status.success()) {
            continue;
        }
        let missing = command.join(" ");
        assert!(!must_not_skip(), "`{missing}` does not run, and AUDITGATE_TESTS_NO_SKIP is set");
        eprintln!("skipped: `{missing}` does not run");
        return false;
    }
    true
}

fn must_not_skip() -> bool {
    std::env::var_os("AUDITGATE_TESTS_NO_SKIP").is_some_and(|value| value == "1")
}

/// Runs a command that must succeed.
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

/// The command line of the program under test.
pub(crate) fn auditgate() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_auditgate"));
    command.env("NO_COLOR", "1");
    command
}

/// A file beside the tests' sources.
pub(crate) fn beside(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/main_job").join(name)
}
