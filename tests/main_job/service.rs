//! Notifications to the service manager (sd_notify(3)): readiness, reloads, the shutdown, and the
//! watchdog.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use crate::harness::daemon::{Daemon, Receipt, serve};
use crate::harness::fault::{self, Fault};
use crate::harness::machine;
use crate::harness::site::Site;
use crate::harness::{TEST_TIMEOUT, body, wait_until};

/// The service manager's side of the notification socket.
struct Manager {
    socket: UnixDatagram,
}

impl Manager {
    fn new(site: &Site) -> Self {
        let socket = UnixDatagram::bind(site.path("notify")).unwrap();
        socket.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
        Self { socket }
    }

    /// Returns the daemon's command line with the environment of a service.
    fn command(site: &Site) -> Command {
        let mut command = serve(site);
        command.env("NOTIFY_SOCKET", site.path("notify")).env_remove("WATCHDOG_PID");
        command
    }

    fn try_receive(&self) -> io::Result<String> {
        let mut buffer = [0; 512];
        let length = self.socket.recv(&mut buffer)?;
        Ok(String::from_utf8(buffer[..length].to_vec()).unwrap())
    }

    /// Receives the next message.
    fn receive(&self) -> String {
        self.try_receive().expect("a message for the service manager")
    }

    /// Discards the messages so far.
    fn discard(&self) {
        self.socket.set_nonblocking(true).unwrap();
        while self.try_receive().is_ok() {}
        self.socket.set_nonblocking(false).unwrap();
    }
}

const READY: &str = "READY=1\nSTATUS=receiving batches\n";

#[test]
fn the_service_manager_is_notified_of_readiness_reloads_and_the_shutdown() {
    let site = Site::new();
    let manager = Manager::new(&site);
    let daemon = Daemon::spawn(&site, Manager::command(&site));
    assert_eq!(manager.receive(), READY);
    for _ in 0..2 {
        // Right after the readiness: the signal handler must be installed by then.
        daemon.signal("HUP");
        let reloading = manager.receive();
        let since = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").map(str::trim_end);
        assert!(since.is_some_and(|number| number.parse::<u64>().is_ok()), "{reloading}");
        assert_eq!(manager.receive(), READY);
    }
    daemon.signal("TERM");
    assert_eq!(manager.receive(), "STOPPING=1\n");
    assert_eq!(daemon.ended().code(), Some(0));
}

#[test]
fn a_writer_that_hangs_stops_the_pings_of_the_watchdog() {
    if !machine::are_there(&[fault::CC]) {
        return;
    }
    const LIMIT: Duration = Duration::from_secs(2);
    const PING: &str = "WATCHDOG=1\n";
    let site = Site::new();
    let manager = Manager::new(&site);
    let arm = site.path("arm");
    let mut command = Manager::command(&site);
    command.env("WATCHDOG_USEC", LIMIT.as_micros().to_string());
    let fault = Fault { call: "sync", path: "*/ledger.db-wal", mode: "hung", error: "EIO" };
    fault.inject(&mut command, &arm);
    let mut daemon = Daemon::spawn(&site, command);
    daemon.listens().unwrap();
    assert_eq!(manager.receive(), READY);
    assert_eq!([manager.receive(), manager.receive()], [PING; 2]);

    std::fs::write(&arm, "").unwrap();
    std::thread::scope(|scope| {
        let (daemon, site) = (&daemon, &site);
        let posting = scope.spawn(|| daemon.post(None, &body(&site.producer.events(0..1))));
        wait_until("the writer hangs", || if arm.exists() { Err("not yet".to_owned()) } else { Ok(()) });
        daemon.wait_for_log("code=\"daemon-stalled\"");
        manager.discard();
        manager.socket.set_read_timeout(Some(LIMIT)).unwrap();
        let silence = manager.try_receive().expect_err("the service manager would have killed it by now");
        assert_eq!(silence.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(daemon.ask("/healthz").status, 200, "the rest of the daemon is alive");

        std::fs::write(&arm, "").unwrap();
        manager.socket.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
        assert_eq!(manager.receive(), PING, "it recovers");
        assert_eq!(Receipt::of(&posting.join().unwrap()).accepted, 1);
    });
    daemon.terminate();
}
