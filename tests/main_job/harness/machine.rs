//! What tests need from the machine they run on: programs, permissions and ports. The library's
//! tests include this file.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use tokio::net::TcpSocket;

/// A requirement of a test: a message for when it is missing, and a command that succeeds when it
/// is present.
pub(crate) type Need = (&'static str, &'static [&'static str]);

pub(crate) const RSYSLOG: Need = ("rsyslog is not installed", &["rsyslogd", "-v"]);

/// Debian has the module in a package of its own. `rsyslogd -N1` does not load it.
pub(crate) const RSYSLOG_TLS: Need = (
    "rsyslog's TLS module lmnsd_gtls.so is not in /usr/lib (Debian: rsyslog-gnutls)",
    &[
        "sh",
        "-c",
        "ls /usr/lib*/rsyslog/lmnsd_gtls.so /usr/lib/*/rsyslog/lmnsd_gtls.so 2>/dev/null | grep -q .",
    ],
);

/// Returns whether the machine meets these requirements of the running test; [`skip`]s the test if
/// it does not.
pub(crate) fn are_there(needs: &[Need]) -> bool {
    needs.iter().all(|(missing, probe)| {
        let ended = command(probe[0]).args(&probe[1..]).output();
        let is_there = ended.is_ok_and(|output| output.status.success());
        if !is_there {
            skip(missing);
        }
        is_there
    })
}

/// Reports on stderr that the running test is skipped, and why.
///
/// # Panics
/// With the same message if the environment has `AUDITGATE_TESTS_NO_SKIP=1`.
pub(crate) fn skip(missing: &str) {
    let thread = std::thread::current();
    // The test runner names each test's thread after the test.
    let said = format!("SKIPPED: {}: {missing}", thread.name().unwrap_or("a test"));
    let must_run = std::env::var_os("AUDITGATE_TESTS_NO_SKIP").is_some_and(|value| value == "1");
    assert!(!must_run, "{said}");
    // The test runner hides the output of `eprintln!` when a test passes.
    let _ = writeln!(std::io::stderr(), "{said}");
}

/// Returns the command of another program, from `PATH` or from Debian's directories for the
/// superuser's programs.
pub(crate) fn command(name: &str) -> Command {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    let found = directories.map(|directory| directory.join(name)).find(|file| file.is_file());
    Command::new(found.unwrap_or_else(|| PathBuf::from(name)))
}

/// A TCP port of 127.0.0.1 on which nothing listens yet. While this exists, the system assigns the
/// port to no other process, and connections are refused until a server with `SO_REUSEADDR`
/// (socket(7)) listens there, as the tests' own, rsyslog and syslog-ng do.
pub(crate) struct ReservedPort(TcpSocket);

impl ReservedPort {
    pub(crate) fn new() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        Self(socket)
    }

    pub(crate) fn number(&self) -> u16 {
        self.0.local_addr().unwrap().port()
    }
}
