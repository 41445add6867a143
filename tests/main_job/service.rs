//! What a service manager is told (sd_notify(3)): readiness, reloads, the end, and that the daemon is alive only for
//! as long as it is.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use crate::faults::{CC, preloaded};
use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::machine;
use crate::harness::programs::auditgate;
use crate::harness::site::Site;
use crate::harness::{PATIENCE, body, wait_until};

/// The service manager's end.
struct Manager {
    socket: UnixDatagram,
}

impl Manager {
    fn new(site: &Site) -> Self {
        let socket = UnixDatagram::bind(site.path("notify")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket }
    }

    /// The daemon's command line, managed.
    fn command(site: &Site) -> Command {
        let mut command = auditgate();
        command.arg("serve").arg("--config").arg(site.path("config.toml"));
        command.env("NOTIFY_SOCKET", site.path("notify")).env_remove("WATCHDOG_PID");
        command
    }

    fn try_hear(&self) -> io::Result<String> {
        let mut buffer = [0; 512];
        let length = self.socket.recv(&mut buffer)?;
        Ok(String::from_utf8(buffer[..length].to_vec()).unwrap())
    }

    /// The next message.
    fn hear(&self) -> String {
        self.try_hear().expect("a message for the service manager")
    }

    /// Takes what has been said so far.
    fn forget(&self) {
        self.socket.set_nonblocking(true).unwrap();
        while self.try_hear().is_ok() {}
        self.socket.set_nonblocking(false).unwrap();
    }
}

const READY: &str = "READY=1\nSTATUS=receiving batches\n";

#[test]
fn a_service_manager_hears_of_readiness_reloads_and_the_end() {
    let site = Site::new();
    let manager = Manager::new(&site);
    let daemon = Daemon::spawn(&site, Manager::command(&site));
    assert_eq!(manager.hear(), READY);
    for _ in 0..2 {
        // At once after it said that it is ready: no signal may find the handler missing.
        daemon.signal("HUP");
        let reloading = manager.hear();
        let since = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").map(str::trim_end);
        assert!(since.is_some_and(|number| number.parse::<u64>().is_ok()), "{reloading}");
        assert_eq!(manager.hear(), READY);
    }
    daemon.signal("TERM");
    assert_eq!(manager.hear(), "STOPPING=1\n");
    assert_eq!(daemon.ended().code(), Some(0));
}

#[test]
fn a_writer_that_hangs_stops_the_pings_of_the_watchdog() {
    if !machine::are_there(&[CC]) {
        return;
    }
    const LIMIT: Duration = Duration::from_secs(2);
    const PING: &str = "WATCHDOG=1\n";
    let site = Site::new();
    let manager = Manager::new(&site);
    let arm = site.path("arm");
    let mut command = Manager::command(&site);
    command
        .env("WATCHDOG_USEC", LIMIT.as_micros().to_string())
        .env("LD_PRELOAD", preloaded())
        .env("FAULT_CALL", "sync")
        .env("FAULT_PATH", "*/ledger.db-wal")
        .env("FAULT_MODE", "hung")
        .env("FAULT_ERRNO", "EIO")
        .env("FAULT_ARM", &arm);
    let mut daemon = Daemon::spawn(&site, command);
    daemon.listens().unwrap();
    assert_eq!(manager.hear(), READY);
    assert_eq!([manager.hear(), manager.hear()], [PING; 2]);

    std::fs::write(&arm, "").unwrap();
    std::thread::scope(|scope| {
        let (daemon, site) = (&daemon, &site);
        let posting = scope.spawn(|| daemon.post(None, &body(&site.producer.events(0..1))));
        wait_until(PATIENCE, "the writer hangs", || {
            if arm.exists() { Err("not yet".to_owned()) } else { Ok(()) }
        });
        daemon.says("the daemon makes no progress");
        manager.forget();
        manager.socket.set_read_timeout(Some(LIMIT)).unwrap();
        let silence = manager.try_hear().expect_err("the service manager would have killed it by now");
        assert_eq!(silence.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(daemon.ask("/healthz").status, 200, "the rest of the daemon is alive");

        std::fs::write(&arm, "").unwrap();
        manager.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(manager.hear(), PING, "it recovers");
        assert_eq!(Receipt::of(&posting.join().unwrap()).accepted, 1);
    });
    daemon.terminate();
}
