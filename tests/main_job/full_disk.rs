//! A full disk: under the ledger, a 500 once, then 429 until there is space; under a sink, no batch
//! is refused. Nothing is lost, repeated, torn or taken for a duplicate.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::daemon::{Daemon, Receipt, refused};
use crate::harness::machine;
use crate::harness::programs::{self, auditgate};
use crate::harness::records::objects;
use crate::harness::site::{Site, lines, sink, whole_lines};
use crate::harness::{assert_contains, body, gzip, wait_until};

/// Returns a site with one sink, which is stuck: only batches are written to the ledger, so that a
/// batch meets the full disk.
fn stuck() -> Site {
    let site = Site::new().sinks(&sink("all", "json", "[\"verified\", \"quarantine\"]"));
    std::fs::create_dir(site.path("all.jsonl")).unwrap();
    site
}

/// Posts until the ledger is full, checks the responses, frees space, and posts everything again.
fn fill_and_recover(daemon: &Daemon<'_>, free_space: impl FnOnce()) {
    let site = daemon.site;
    let mut batches = Vec::new();
    let failed = loop {
        let first = batches.len() as u64 * 100;
        let batch = site.producer.events(first..first + 100);
        let answer = daemon.post(None, &body(&batch));
        batches.push(batch);
        if answer.status != 200 {
            break answer;
        }
        assert_eq!(Receipt::of(&answer).accepted, 100);
        assert!(batches.len() < 200, "the ledger does not fill up");
    };
    failed.assert_problem(500);
    let since = Instant::now();
    wait_until("the ledger makes the daemon unready", || {
        // The daemon retries the write every second, and refuses batches in between.
        daemon.post(None, &body(batches.last().unwrap())).assert_retry_after_30_s();
        let answer = daemon.ask("/readyz");
        let said = String::from_utf8(answer.body).unwrap();
        let is_unready = answer.status == 503 && said.contains("ledger");
        if is_unready && since.elapsed() > Duration::from_millis(2500) { Ok(()) } else { Err(said) }
    });

    free_space();
    std::fs::remove_dir(site.path("all.jsonl")).unwrap();
    // The daemon finds out without a post.
    daemon.wait_until_ready();
    let last = batches.last().unwrap();
    assert_eq!(daemon.deliver(last), Receipt { accepted: 100, ..Receipt::default() });
    for batch in &batches {
        assert_eq!(daemon.deliver(batch), Receipt { duplicates: 100, ..Receipt::default() });
    }
    daemon.settle();
    let delivered: Vec<_> =
        objects(&site.read("all.jsonl")).into_iter().map(|record| record["raw"].clone()).collect();
    assert!(delivered == batches.concat(), "every event once, in order");
}

#[test]
fn the_ledger_recovers_from_a_limit_on_the_size_of_its_file() {
    if !machine::are_there(&[("prlimit is not installed", &["prlimit", "--version"])]) {
        return;
    }
    let site = stuck();
    let mut command = Command::new("sh");
    // Without the signal, a write beyond the limit fails with EFBIG.
    command.args(["-c", "trap '' XFSZ; exec \"$0\" serve --config \"$1\""]);
    command.arg(auditgate().get_program()).arg(site.path("config.toml"));
    let daemon = Daemon::start_by(&site, command);
    let process = daemon.process().to_string();
    let limit = |size: &str| {
        programs::run(Command::new("prlimit").args(["--pid", &process]).arg(format!("--fsize={size}:")));
    };
    limit("2000000");
    fill_and_recover(&daemon, || limit("unlimited"));
    daemon.terminate();
}

#[test]
fn the_ledger_recovers_from_a_full_disk() {
    let site = stuck();
    let Some(disk) = SmallDisk::mount(site.path("data")) else {
        return;
    };
    let daemon = Daemon::start(&site);
    fill_and_recover(&daemon, || disk.grow());
    daemon.terminate();
    drop(disk);
}

#[test]
fn a_start_on_a_full_disk_accepts_nothing_until_there_is_space() {
    let site = stuck();
    let Some(disk) = SmallDisk::mount(site.path("data")) else {
        return;
    };
    let first = site.producer.events(0..100);
    let daemon = Daemon::start(&site);
    assert_eq!(daemon.deliver(&first).accepted, 100);
    daemon.terminate();
    let fill = site.path("data/fill");
    let _ = std::fs::write(&fill, vec![0; 4 << 20]);
    assert!(std::fs::metadata(&fill).unwrap().len() < 2 << 20, "the disk is not full");

    // Duplicates are still known, and no batch is accepted until there is space.
    let daemon = Daemon::start(&site);
    let more = site.producer.events(1000..20_000);
    wait_until("the daemon refuses batches", || {
        match daemon.post(Some("gzip"), &gzip(&body(&more))).status {
            429 => Ok(()),
            500 => Err("500".to_owned()),
            status => panic!("{status}"),
        }
    });
    std::fs::remove_file(&fill).unwrap();
    disk.grow();
    wait_until("the daemon accepts batches", || match daemon.post(None, &body(&first)).status {
        200 => Ok(()),
        status => Err(status.to_string()),
    });
    assert_eq!(daemon.deliver(&first), Receipt { duplicates: 100, ..Receipt::default() });
    assert_eq!(daemon.deliver(&more).accepted, more.len() as u64);
    daemon.terminate();

    // Without its spare space the daemon does not start, and says what to do.
    std::fs::remove_file(site.path("data/reserve")).ok();
    let _ = std::fs::write(&fill, vec![0; 65 << 20]);
    assert_contains(&refused(&site, 74), &["its disk is full", "free 1 MiB or more"]);
    drop(disk);
}

#[test]
fn a_full_disk_under_a_sink_refuses_no_batch() {
    const BATCHES: u64 = 60;
    let sinks = [
        sink("small", "raw", "\"verified\"").replace("small.log", "small/verified.log"),
        sink("large", "json", "[\"verified\", \"quarantine\"]"),
    ];
    let site = Site::new().sinks(&sinks.concat());
    let Some(disk) = SmallDisk::mount(site.path("small")) else {
        return;
    };
    let mut daemon = Daemon::start(&site);
    let events = site.producer.events(0..BATCHES * 100);
    for batch in events.chunks(100) {
        assert_eq!(daemon.deliver(batch).accepted, 100, "a stuck sink refuses no batch");
    }
    for restarts in 0..2 {
        if restarts > 0 {
            daemon.kill9();
            daemon = Daemon::start(&site);
        }
        wait_until("the other sink has delivered everything", || {
            match whole_lines(&site.read("large.jsonl")).len() {
                6000 => Ok(()),
                written => Err(written.to_string()),
            }
        });
        daemon.wait_until_unready("sink small");
        // Only whole lines, the first ones.
        let written = lines(&at_rest(&site.path("small/verified.log")));
        assert!(!written.is_empty() && written.len() < events.len() && events.starts_with(&written));
    }

    disk.grow();
    daemon.wait_until_ready();
    daemon.settle();
    daemon.terminate();
    assert!(lines(&site.read("small/verified.log")) == events, "every event once, in order");
    drop(disk);
}

#[test]
fn renaming_or_removing_a_sinks_file_on_a_full_disk_loses_nothing() {
    for is_removed in [true, false] {
        let small = sink("small", "raw", "\"verified\"").replace("small.log", "small/verified.log");
        let site = Site::new().sinks(&[small, sink("quarantine", "json", "\"quarantine\"")].concat());
        let Some(disk) = SmallDisk::mount(site.path("small")) else {
            return;
        };
        let daemon = Daemon::start(&site);
        let events = site.producer.events(0..6000);
        for batch in events.chunks(100) {
            assert_eq!(daemon.deliver(batch).accepted, 100);
        }
        daemon.wait_until_unready("sink small");
        let (path, renamed) = (site.path("small/verified.log"), site.path("small/verified.log.1"));
        std::fs::rename(&path, &renamed).unwrap();
        let mut written = lines(&at_rest(&renamed));
        if is_removed {
            std::fs::remove_file(&renamed).unwrap();
        }
        wait_until("the file is created again", || {
            if path.exists() { Ok(()) } else { Err("it is missing".to_owned()) }
        });
        disk.grow();
        daemon.wait_until_ready();
        daemon.settle();
        daemon.terminate();
        written.extend(lines(&std::fs::read(&path).unwrap()));
        assert!(written == events, "every event once, in order, removed: {is_removed}");
        drop(disk);
    }
}

/// Reads a file on a full disk between two attempts to write it: what does not fit is truncated.
fn at_rest(path: &Path) -> Vec<u8> {
    wait_until("the file holds whole lines", || {
        let bytes = std::fs::read(path).unwrap();
        if bytes.ends_with(b"\n") { Ok(bytes) } else { Err(format!("{} bytes", bytes.len())) }
    })
}

/// A file system of 2 MiB in memory; only the superuser may mount one.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf) -> Option<Self> {
        std::fs::create_dir(&at).unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs"]).arg(&at).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(at));
        }
        machine::skip("only the superuser may mount a tmpfs");
        None
    }

    fn grow(&self) {
        programs::run(Command::new("mount").args(["-o", "remount,size=64m"]).arg(&self.0));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: if the test failed, the daemon still has files open.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
