//! Notifications to systemd (sd_notify(3)), and its watchdog.
//!
//! Outside systemd, when `NOTIFY_SOCKET` is not set, nothing happens. A message that cannot be sent
//! is logged at debug and otherwise ignored: systemd's own timeouts then decide.

use std::pin::pin;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::escape::escape;

/// Reports that the daemon is up, or up to date again after [`reloading`]. `status` is one line for
/// `systemctl status`.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(&single_line(status))]);
}

/// Replaces the line for `systemctl status`.
pub fn status(status: &str) {
    tell(&[NotifyState::Status(&single_line(status))]);
}

/// Reports that the daemon shuts down.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Reports that the daemon reloads. [`ready`] ends it, whether the reload succeeded or not;
/// otherwise systemd fails the reload after its time limit.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        // systemd 253 and later want the time with it for Type=notify-reload; others ignore it.
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!(%error, "cannot read the monotonic clock for systemd"),
    }
}

/// Pings systemd's watchdog while `alive` returns true: calls it four times in the watchdog's
/// interval. Returns at once when the unit has no `WatchdogSec`, and otherwise never.
///
/// `alive` runs on an async thread and must not block it; it may take long, and the ping is sent
/// when it has returned. So the pings stop when it does not return, and when the runtime does not
/// get to call it. After the interval systemd ends the process and starts it again.
pub async fn watchdog(alive: impl AsyncFn() -> bool) {
    match sd_notify::watchdog_enabled() {
        Some(limit) if !limit.is_zero() => {
            ping_every(limit / 4, alive, || tell(&[NotifyState::Watchdog])).await;
        }
        _ => {}
    }
}

async fn ping_every(period: Duration, alive: impl AsyncFn() -> bool, ping: impl Fn()) {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut was_alive = true;
    loop {
        ticks.tick().await;
        let mut answer = pin!(alive());
        let is_alive = match timeout(period, answer.as_mut()).await {
            Ok(is_alive) => is_alive,
            Err(_) => {
                log_unresponsive(was_alive);
                was_alive = false;
                answer.await
            }
        };
        if is_alive {
            ping();
        } else {
            log_unresponsive(was_alive);
        }
        was_alive = is_alive;
    }
}

/// Logs once for each time that it stops.
fn log_unresponsive(was_alive: bool) {
    if was_alive {
        tracing::error!(
            code = "daemon-stalled",
            "the daemon makes no progress; unless it recovers, systemd's watchdog restarts it"
        );
    }
}

/// A line feed would end the assignment and begin another. What a peer sent is escaped as in the
/// log.
fn single_line(status: &str) -> String {
    escape(&status.replace(['\n', '\r'], " ")).to_string()
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "cannot notify systemd");
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::unix::net::UnixDatagram;
    use std::process::Command;

    use super::*;

    /// Environment variables cannot be set safely in a process with threads, so a second process
    /// sends the messages.
    #[test]
    fn systemd_receives_the_notifications() {
        if std::env::var_os("AUDITGATE_TEST_NOTIFIER").is_some() {
            ready("Receiving.\nMAINPID=1");
            status("Waiting.\nREADY=1");
            reloading();
            stopping();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (asked, enough) = (Cell::new(0), tokio::sync::Notify::new());
                let alive = async || {
                    asked.set(asked.get() + 1);
                    if asked.get() == 4 {
                        enough.notify_one();
                    }
                    asked.get() == 1
                };
                tokio::select! {
                    () = watchdog(alive) => {}
                    () = enough.notified() => {}
                }
            });
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "observe::systemd::tests::systemd_receives_the_notifications"])
            .env("AUDITGATE_TEST_NOTIFIER", "1")
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
        assert_eq!(messages.len(), 5, "{messages:?}");
        assert_eq!(messages[0], "READY=1\nSTATUS=Receiving. MAINPID=1\n");
        assert_eq!(messages[1], "STATUS=Waiting. READY=1\n");
        assert!(messages[2].starts_with("RELOADING=1\nMONOTONIC_USEC="), "{messages:?}");
        assert_eq!(messages[3..], ["STOPPING=1\n", "WATCHDOG=1\n"]);
    }

    #[tokio::test]
    async fn without_systemd_nothing_happens() {
        ready("Receiving.");
        reloading();
        stopping();
        watchdog(async || panic!("the watchdog is off")).await;
    }

    #[tokio::test]
    async fn the_watchdog_is_pinged_only_while_the_daemon_is_alive() {
        // Alive for two ticks, not for the next two, then alive again.
        let asked = Cell::new(0);
        let (pinged, mut pings) = tokio::sync::mpsc::unbounded_channel();
        let alive = async || {
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

    #[tokio::test(start_paused = true)]
    async fn a_late_answer_causes_a_ping_and_a_missing_one_none() {
        let start = tokio::time::Instant::now();
        let second = Duration::from_secs(1);
        let asked = Cell::new(0);
        let pings = std::cell::RefCell::new(Vec::new());
        let alive = async || {
            asked.set(asked.get() + 1);
            match asked.get() {
                2 => tokio::time::sleep(3 * second).await,
                4 => std::future::pending().await,
                _ => {}
            }
            true
        };
        let pinging = ping_every(second, alive, || pings.borrow_mut().push(start.elapsed().as_secs()));
        assert!(timeout(60 * second, pinging).await.is_err());
        assert_eq!((asked.get(), &*pings.borrow()), (4, &vec![0, 4, 4]));
    }
}
