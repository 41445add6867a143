//! What systemd is told about the daemon's life (sd_notify(3)), and its watchdog.
//!
//! Outside systemd, when `NOTIFY_SOCKET` is not set, nothing happens. A message that cannot be sent is
//! logged at debug and otherwise ignored: systemd's own timeouts then decide.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};

/// The daemon is up, or up to date again after [`reloading`]. `status` is one sentence for
/// `systemctl status`.
pub fn ready(status: &str) {
    // A line feed would end the assignment and begin another.
    let status = status.replace(['\n', '\r'], " ");
    tell(&[NotifyState::Ready, NotifyState::Status(&status)]);
}

/// The daemon shuts down.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// The daemon reads its configuration again; [`ready`] ends it, whether the new one was good or not.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        // systemd 253 and later want the time with it for Type=notify-reload; others ignore it.
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!(%error, "The monotonic clock could not be read for systemd"),
    }
}

/// Pings systemd's watchdog at half of its interval for as long as `alive` says so. Returns at once when the
/// unit has no `WatchdogSec`, and otherwise never.
///
/// `alive` is asked on an async thread and must not block. While it says no, the ping is left out, and after
/// the interval systemd ends the process and starts it anew.
pub async fn watchdog(alive: impl Fn() -> bool) {
    match sd_notify::watchdog_enabled() {
        Some(limit) if !limit.is_zero() => {
            ping_every(limit / 2, alive, || tell(&[NotifyState::Watchdog])).await;
        }
        _ => {}
    }
}

async fn ping_every(period: Duration, alive: impl Fn() -> bool, ping: impl Fn()) {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut was_alive = true;
    loop {
        ticks.tick().await;
        let is_alive = alive();
        if is_alive {
            ping();
        } else if was_alive {
            tracing::error!(
                "The daemon makes no progress; unless it recovers, systemd's watchdog restarts it"
            );
        }
        was_alive = is_alive;
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "systemd could not be notified");
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::unix::net::UnixDatagram;
    use std::process::Command;

    use super::*;

    /// Environment variables cannot be set safely in a process with threads, so a second process speaks.
    #[test]
    fn systemd_is_told() {
        if std::env::var_os("AUDITGATE_TEST_SPEAKER").is_some() {
            ready("Receiving.\nMAINPID=1");
            reloading();
            stopping();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let alive = Cell::new(1);
                tokio::select! {
                    () = watchdog(|| alive.replace(alive.get() - 1) > 0) => {}
                    () = tokio::time::sleep(Duration::from_millis(20)) => {}
                }
            });
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "observe::systemd::tests::systemd_is_told"])
            .env("AUDITGATE_TEST_SPEAKER", "1")
            .env("NOTIFY_SOCKET", &path)
            .env("WATCHDOG_USEC", "2000")
            .env_remove("WATCHDOG_PID")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");

        let mut buffer = [0; 512];
        let mut messages = Vec::new();
        while let Ok(length) = socket.recv(&mut buffer) {
            messages.push(String::from_utf8(buffer[..length].to_vec()).unwrap());
        }
        assert_eq!(messages.len(), 4, "{messages:?}");
        assert_eq!(messages[0], "READY=1\nSTATUS=Receiving. MAINPID=1\n");
        assert!(messages[1].starts_with("RELOADING=1\nMONOTONIC_USEC="), "{messages:?}");
        assert_eq!(messages[2..], ["STOPPING=1\n", "WATCHDOG=1\n"]);
    }

    #[tokio::test]
    async fn without_systemd_nothing_happens() {
        ready("Receiving.");
        reloading();
        stopping();
        watchdog(|| panic!("nobody asks")).await;
    }

    #[tokio::test]
    async fn the_watchdog_is_pinged_only_while_the_daemon_is_alive() {
        // Alive for two ticks, stuck for two, alive again.
        let asked = Cell::new(0);
        let (pinged, mut pings) = tokio::sync::mpsc::unbounded_channel();
        let alive = || {
            asked.set(asked.get() + 1);
            !(3..=4).contains(&asked.get())
        };
        let three = async {
            let mut at = Vec::new();
            while at.len() < 3 {
                at.push(pings.recv().await.unwrap());
            }
            at
        };
        tokio::select! {
            () = ping_every(Duration::from_millis(1), alive, || pinged.send(asked.get()).unwrap()) => {}
            at = three => assert_eq!(at, [1, 2, 5]),
        }
    }
}
