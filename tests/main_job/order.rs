//! The order of system calls: commit, sync, answer; write, sync, forget.

use std::collections::HashMap;

use crate::harness::daemon::Daemon;
use crate::harness::programs::{self, auditgate};
use crate::harness::site::{Site, sink};
use crate::harness::{PATIENCE, wait_until};

/// What matters in a trace, in the order in which it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Request,
    LedgerWriteBegins,
    LedgerSynced,
    AnswerBegins,
    SinkWriteBegins,
    SinkSynced,
}

#[test]
fn a_sync_stands_before_every_promise_and_before_every_forgetting() {
    let strace = ["strace", "-f", "-o", "/dev/null", "true"];
    if !programs::are_there(&[&strace]) {
        return;
    }
    // Without TLS, so that requests and answers can be read in the trace. One sink only: the ledger may well
    // note how far one sink has come while another one writes.
    let site = Site::new().plain().sinks(&sink("all", "json", "[\"verified\", \"quarantine\"]"));
    let trace = site.path("trace");
    let mut command = std::process::Command::new("strace");
    // -D: the child is the daemon itself, strace its grandchild.
    command.args(["-D", "-f", "-y", "-s", "64", "-o"]).arg(&trace);
    command.args([
        "-e",
        "trace=fdatasync,fsync,write,writev,pwrite64,pwritev,sendto,sendmsg,recvfrom,read,readv",
    ]);
    command.arg(auditgate().get_program()).arg("serve").arg("--config").arg(site.path("config.toml"));
    let daemon = Daemon::start_by(&site, command);
    const BATCHES: u64 = 6;
    for batch in 0..BATCHES {
        let events = site.producer.events(batch * 10..batch * 10 + 10);
        assert_eq!(daemon.deliver(&events).accepted, 10);
        daemon.settle();
    }
    let process = daemon.process();
    daemon.terminate();
    let text = wait_until(PATIENCE, "the trace is complete", || {
        let text = String::from_utf8_lossy(&std::fs::read(&trace).unwrap()).into_owned();
        let end = format!("{process} +++ exited with 0 +++");
        // strace pads the number.
        let complete = text.lines().any(|line| line.split_whitespace().eq(end.split_whitespace()));
        if complete { Ok(text) } else { Err("no end yet".to_owned()) }
    });

    let steps = steps(&text);
    let count = |step| steps.iter().filter(|known| **known == step).count() as u64;
    assert_eq!(count(Step::Request), BATCHES, "{steps:?}");
    assert_eq!(count(Step::AnswerBegins), BATCHES, "{steps:?}");
    assert!(count(Step::SinkWriteBegins) >= BATCHES, "{steps:?}");

    let mut committed = Commit::Idle;
    let mut unsynced_sink = false;
    let mut answers = 0;
    for step in &steps {
        match step {
            Step::Request => committed = Commit::Idle,
            Step::LedgerWriteBegins => {
                assert!(!unsynced_sink, "the ledger went on between a sink's write and its sync: {steps:?}");
                committed = Commit::Written;
            }
            Step::LedgerSynced if committed == Commit::Written => committed = Commit::Synced,
            Step::LedgerSynced => {}
            Step::AnswerBegins => {
                assert_eq!(committed, Commit::Synced, "a 200 without a synced commit before it: {steps:?}");
                answers += 1;
            }
            Step::SinkWriteBegins => {
                assert_ne!(
                    committed,
                    Commit::Written,
                    "a sink had events before they were durable: {steps:?}"
                );
                unsynced_sink = true;
            }
            Step::SinkSynced => unsynced_sink = false,
        }
    }
    assert_eq!(answers, BATCHES);
    assert!(!unsynced_sink);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Commit {
    Idle,
    Written,
    Synced,
}

/// Reads strace's lines. A call counts where the rule needs it: a write where it begins, a sync where it has
/// succeeded, even when other threads' calls stand in between.
fn steps(trace: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut unfinished: HashMap<&str, &str> = HashMap::new();
    for line in trace.lines() {
        let Some((thread, call)) = line.split_once(char::is_whitespace) else { continue };
        let call = call.trim_start();
        // `<... fdatasync resumed>) = 0` belongs to the thread's `fdatasync(9</path> <unfinished ...>`.
        let (begun, ended) = if call.starts_with("<...") {
            (None, unfinished.remove(thread))
        } else if call.ends_with("<unfinished ...>") {
            unfinished.insert(thread, call);
            (Some(call), None)
        } else {
            (Some(call), Some(call))
        };
        let is_request = call.contains("\"POST ");
        if is_request {
            steps.push(Step::Request);
        }
        if let Some(call) = begun {
            let is_write = ["write(", "writev(", "pwrite64(", "pwritev(", "sendto(", "sendmsg("]
                .iter()
                .any(|name| call.starts_with(name));
            // The admin endpoint's answers are of another type.
            if is_write && call.contains("\"HTTP/1.1 200 OK") && call.contains("application/json") {
                steps.push(Step::AnswerBegins);
            } else if is_write && call.contains("/data/ledger.db-wal>") {
                steps.push(Step::LedgerWriteBegins);
            } else if is_write && call.contains("/all.jsonl>") {
                steps.push(Step::SinkWriteBegins);
            }
        }
        if let Some(begun) =
            ended.filter(|begun| begun.starts_with("fdatasync(") || begun.starts_with("fsync("))
        {
            assert!(call.trim_end().ends_with("= 0"), "a sync failed: {line}");
            if begun.contains("/data/ledger.db-wal>") {
                steps.push(Step::LedgerSynced);
            } else if begun.contains("/all.jsonl>") {
                steps.push(Step::SinkSynced);
            }
        }
    }
    steps
}
