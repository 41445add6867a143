//! The daemon as a child process.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::super::exit::Failure;
use super::files::failed;

/// How long the daemon may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A running daemon: this same program.
pub(super) struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts it and waits until it listens. Its log goes to `daemon.log`.
    pub(super) fn start(dir: &Path) -> Result<Self, Failure> {
        let program = std::env::current_exe()
            .map_err(|error| Failure::io(format!("cannot find this program: {error}")))?;
        let log_path = dir.join("daemon.log");
        let mut log = fs::File::create(&log_path).map_err(failed("write", &log_path))?;
        let mut child = Command::new(program)
            .args(["serve", "--config"])
            .arg(dir.join("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| Failure::io(format!("cannot start the daemon: {error}")))?;
        let (told, listening) = mpsc::channel();
        if let Some(stderr) = child.stderr.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    let _ = writeln!(log, "{line}");
                    let _ = told.send(line);
                }
            });
        }
        let daemon = Self { child };
        let mut last = String::new();
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            match listening.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains("listening on ") => return Ok(daemon),
                Ok(line) => last = line,
                // It has ended, or it hangs and is killed when it is dropped.
                Err(_) => {
                    return Err(Failure::io(format!("the daemon did not start; its last message: {last}")));
                }
            }
        }
    }

    /// Ends it as systemd would.
    pub(super) fn stop(mut self) -> Result<(), Failure> {
        let stopped = |what: &dyn std::fmt::Display| Failure::io(format!("the daemon did not stop: {what}"));
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| stopped(&"it has no process number"))?;
        kill_process(pid, Signal::TERM).map_err(|error| stopped(&error))?;
        let status = self.child.wait().map_err(|error| stopped(&error))?;
        if status.success() { Ok(()) } else { Err(stopped(&status)) }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
