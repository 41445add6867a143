//! Faults of the daemon's system calls. They come from `faults.c`, which is preloaded.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::machine::Need;
use super::programs::{beside, run};

/// What [`Fault::inject`] needs.
pub(crate) const CC: Need = ("cc is not installed", &["cc", "--version"]);

/// A fault, in the terms of `faults.c`.
pub(crate) struct Fault<'a> {
    pub(crate) call: &'a str,
    /// Glob of the file's path; empty for a socket.
    pub(crate) path: &'a str,
    pub(crate) mode: &'a str,
    pub(crate) error: &'a str,
}

impl Fault<'_> {
    /// Injects the fault into the daemon that a command starts. It happens once the file `arm`
    /// exists.
    pub(crate) fn inject(&self, command: &mut Command, arm: &Path) {
        command
            .env("LD_PRELOAD", library())
            .env("FAULT_CALL", self.call)
            .env("FAULT_PATH", self.path)
            .env("FAULT_MODE", self.mode)
            .env("FAULT_ERRNO", self.error)
            .env("FAULT_ARM", arm);
    }
}

/// Compiles `faults.c` once, and returns the library.
fn library() -> PathBuf {
    static COMPILED: OnceLock<tempfile::TempDir> = OnceLock::new();
    let directory = COMPILED.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"]);
        run(compiler.arg(directory.path().join("faults.so")).arg(beside("faults.c")).arg("-ldl"));
        directory
    });
    directory.path().join("faults.so")
}
