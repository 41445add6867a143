//! At each named step of the commit and of the delivery a fault is injected into the real daemon,
//! failed and failed but persisted: the daemon recovers by itself or exits with 74, or it is killed
//! at that moment, and nothing is lost, duplicated or torn.
//!
//! The faults come from `faults.c`, which is preloaded; what it can do is described there. With
//! `AUDITGATE_TESTS_FAULTS=TEXT` only the cases run whose name contains the text.

mod case_run;
mod steps;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use self::case_run::Case;
use self::steps::{ANSWER, COMPRESSION, FILE, LEDGER, SQLITE, SYSLOG, Step};
use crate::harness::fault;
use crate::harness::machine;

/// Further lines of the file sink. A batch has about 20 KiB.
const SMALL_FILES: &str = "rotate = { size = \"30KiB\" }\n";
const SMALL_FILES_SYNCED_LATER: &str =
    "rotate = { size = \"30KiB\" }\nfsync = \"interval\"\nfsync_interval = \"20ms\"\n";
const SMALL_COMPRESSED_FILES: &str = "rotate = { size = \"30KiB\", compress = \"zstd\" }\n";
const LARGE_FILES: &str = "rotate = { size = \"1MiB\" }\n";

#[test]
fn the_ledger_survives_each_fault() {
    inject_each("ledger", LEDGER, LARGE_FILES);
}

#[test]
fn the_answer_survives_each_fault() {
    inject_each("answer", ANSWER, LARGE_FILES);
}

#[test]
fn a_file_that_is_synced_at_once_survives_each_fault() {
    inject_each("file", FILE, SMALL_FILES);
}

#[test]
fn a_file_that_is_synced_later_survives_each_fault() {
    inject_each("file, synced later", FILE, SMALL_FILES_SYNCED_LATER);
}

#[test]
fn compression_survives_each_fault() {
    inject_each("compression", COMPRESSION, SMALL_COMPRESSED_FILES);
}

#[test]
fn the_database_survives_each_fault() {
    inject_each("database", SQLITE, LARGE_FILES);
}

#[test]
fn syslog_survives_each_fault() {
    inject_each("syslog", SYSLOG, LARGE_FILES);
}

/// Runs each fault of each step, once with a daemon that goes on and once with one that is killed
/// at the fault.
fn inject_each(group: &str, steps: &[Step], file: &str) {
    /// Number of cases at a time; they wait for the daemon most of the time.
    const CONCURRENCY: usize = 6;
    if !machine::are_there(&[fault::CC]) {
        return;
    }
    let chosen = std::env::var("AUDITGATE_TESTS_FAULTS").unwrap_or_default();
    let cases: Vec<(String, Case<'_>)> = steps
        .iter()
        .flat_map(|step| step.faults.iter().map(move |fault| (step, *fault)))
        .flat_map(|(step, fault)| [false, true].map(|is_killed| Case { step, fault, is_killed, file }))
        .map(|case| (format!("{group}: {case}"), case))
        .filter(|(name, _)| name.contains(&chosen))
        .collect();
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..CONCURRENCY {
            scope.spawn(|| {
                while let Some((name, case)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let since = Instant::now();
                    let outcome = catch_unwind(AssertUnwindSafe(|| case.run())).map_err(|panic| {
                        let text = panic.downcast_ref::<String>().cloned();
                        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                            .unwrap_or_else(|| "a panic without a message".to_owned())
                    });
                    results.lock().unwrap().push((name, outcome, since.elapsed()));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap();
    results.sort_by_key(|(name, ..)| cases.iter().position(|(known, _)| known == *name));
    let mut table = String::new();
    for (name, outcome, took) in &results {
        let said = match outcome {
            Ok(outcome) => outcome.as_str(),
            Err(failure) => &format!("FAILED: {failure}"),
        };
        table += &format!("{name:<75} {:>5.1} s  {said}\n", took.as_secs_f64());
    }
    eprint!("{table}");
    let failures: Vec<_> = table.lines().filter(|line| line.contains("FAILED: ")).collect();
    assert!(failures.is_empty(), "{} of {} faults:\n{}", failures.len(), results.len(), failures.join("\n"));
}
