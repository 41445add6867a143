//! `tail -F` of a file shows every line once, whatever rotates the file.

use std::fs::File;
use std::process::{Child, Command, Stdio};

use crate::harness::daemon::Daemon;
use crate::harness::machine::{self, Need};
use crate::harness::programs;
use crate::harness::site::{Site, lines, sink};
use crate::harness::wait_until;

/// Only GNU tail has this option.
const TAIL: Need = ("GNU tail is not installed", &["tail", "--sleep-interval=0.01", "/dev/null"]);

/// A `tail -F` of `verified.log` that writes to `seen`.
struct Tail<'s> {
    site: &'s Site,
    child: Child,
}

impl<'s> Tail<'s> {
    fn start(site: &'s Site) -> Self {
        let child = Command::new("tail")
            .args(["-n", "+1", "--sleep-interval=0.01", "-F"])
            .arg(site.path("verified.log"))
            .stdout(File::create(site.path("seen")).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { site, child }
    }

    /// Waits until it has seen that many lines: `tail` loses lines of files that are rotated faster
    /// than it polls.
    fn wait_for(&self, count: usize) {
        wait_until("tail has seen the lines", || {
            let seen = self.site.read("seen").iter().filter(|byte| **byte == b'\n').count();
            if seen >= count { Ok(()) } else { Err(format!("{seen} of {count}")) }
        });
    }
}

impl Drop for Tail<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Posts batches, disturbs the file after each, and compares the lines that were posted, seen and
/// stored.
fn follow(more: &str, disturb: impl Fn(&Site, &Daemon<'_>, u64)) -> Site {
    const BATCHES: u64 = 24;
    const EVENTS: u64 = 20;
    let sinks = [
        sink("verified", "raw", "\"verified\""),
        more.to_owned(),
        sink("quarantine", "json", "\"quarantine\""),
    ];
    let site = Site::new().sinks(&sinks.concat());
    let daemon = Daemon::start(&site);
    let mut posted = Vec::new();
    {
        let tail = Tail::start(&site);
        for batch in 0..BATCHES {
            let events = site.producer.events(batch * EVENTS..(batch + 1) * EVENTS);
            assert_eq!(daemon.deliver(&events).accepted, EVENTS);
            posted.extend(events);
            tail.wait_for(posted.len());
            disturb(&site, &daemon, batch);
        }
        daemon.terminate();
        assert!(lines(&site.read("seen")) == posted, "tail has seen exactly the posted lines");
    }
    assert!(site.verified() == posted, "the files hold exactly the posted lines");
    site
}

#[test]
fn the_daemons_rotation_loses_no_line() {
    if !machine::are_there(&[TAIL]) {
        return;
    }
    let site = follow("rotate = { size = \"20KiB\" }\n", |_, _, _| ());
    assert!(site.rotated("verified.log").len() >= 6);
}

#[test]
fn a_renamed_file_is_created_again() {
    if !machine::are_there(&[TAIL]) {
        return;
    }
    let site = follow("", |site, _, batch| {
        std::fs::rename(site.path("verified.log"), site.path(format!("verified.log.{batch:04}"))).unwrap();
    });
    assert_eq!(site.rotated("verified.log").len(), 24);
}

#[test]
fn logrotate_in_rename_mode_needs_no_signal_and_may_send_one() {
    if !machine::are_there(&[TAIL, ("logrotate is not installed", &["logrotate", "--version"])]) {
        return;
    }
    for (mode, signals) in [("nocreate", false), ("create 0640", false), ("nocreate", true), ("create", true)]
    {
        let site = follow("", |site, daemon, batch| {
            let path = site.path("verified.log");
            let rules = format!(
                "{} {{\n  rotate 100\n  {mode}\n  missingok\n  dateext\n  dateformat .{batch:04}\n}}\n",
                path.display()
            );
            site.write("logrotate.conf", rules);
            let mut logrotate = machine::command("logrotate");
            logrotate.args(["--force", "--state"]).arg(site.path("logrotate.state"));
            programs::run(logrotate.arg(site.path("logrotate.conf")));
            if signals {
                daemon.signal("HUP");
            }
        });
        assert_eq!(site.rotated("verified.log").len(), 24, "{mode}, signals: {signals}");
    }
}
