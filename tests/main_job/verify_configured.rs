//! `auditgate verify --config`, as a daily job runs it.

use std::io::Write as _;
use std::process::Output;

use crate::harness::assert_contains;
use crate::harness::daemon::Daemon;
use crate::harness::programs::auditgate;
use crate::harness::sign::Producer;
use crate::harness::site::{Site, sink, sqlite_sink};
use crate::harness::verify::stdout;

fn run(site: &Site, more: &[&str]) -> Output {
    auditgate().args(["verify", "-c"]).arg(site.path("config.toml")).args(more).output().unwrap()
}

/// Runs the daily job, and returns its exit code and what it would mail.
fn daily(site: &Site) -> (Option<i32>, String) {
    let output = run(site, &["--skip-quarantine", "--quiet"]);
    assert_eq!(stdout(&output), "");
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_daily_job_is_silent_until_something_is_wrong() {
    let sinks = sink("verified", "raw", "\"verified\"")
        + "rotate = { size = \"8KiB\", compress = \"zstd\" }\n"
        + &sink("quarantine", "raw", "\"quarantine\"")
        + &sqlite_sink("events.db", "[\"verified\", \"quarantine\"]");
    let site = Site::new().sinks(&sinks);
    let (code, said) = daily(&site);
    assert_eq!(code, Some(2));
    assert!(said.contains("written no file to check yet"), "{said}");

    let daemon = Daemon::start(&site);
    let next = Producer::new(2);
    for batch in 0..5 {
        let numbers = batch * 10..batch * 10 + 10;
        let lines = [site.producer.events(numbers.clone()), next.events(numbers)].concat();
        assert_eq!(daemon.deliver(&lines).quarantined, 10);
    }
    daemon.settle();
    // The key is retired; its events are proved by the daemon's cache.
    site.write("jwks.json", next.jwks());
    daemon.signal("HUP");
    daemon.wait_for_count("auditgate_jwks_retired_keys{source=\"us\"}", 1);
    assert_eq!(daemon.deliver(&next.events(100..110)).accepted, 10);
    daemon.settle();
    assert_eq!(daily(&site), (Some(0), String::new()));
    let output = run(&site, &["--skip-quarantine"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(
        stdout(&output),
        "good 120, bad 0, unsigned 0, malformed 0, quarantined and skipped 50, left out 1\n"
    );
    // With the quarantine, whose lines prove themselves by now.
    let output = run(&site, &[]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(stdout(&output).starts_with("good 170, bad 0, "), "{output:?}");
    daemon.terminate();
    assert_eq!(daily(&site), (Some(0), String::new()));

    // The daemon may be in the middle of a line, but only in the file at the path.
    let mut current = std::fs::File::options().append(true).open(site.path("verified.log")).unwrap();
    current.write_all(b"2023-05-19T00:03:39Z konghq").unwrap();
    assert_eq!(daily(&site), (Some(0), String::new()));
    let output = run(&site, &[site.path("verified.log").to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stdout(&output).contains(": torn: "), "{output:?}");

    let text = String::from_utf8(site.read("verified.log")).unwrap();
    assert!(text.contains("KongInc"), "{text}");
    site.write("verified.log", text.replacen("KongInc", "KongInk", 1));
    let (code, said) = daily(&site);
    assert_eq!(code, Some(1));
    assert_contains(
        &said,
        &["1 line does not prove itself", "verified.log:", ": bad: no given key made this"],
    );
    assert_eq!(said.lines().count(), 3, "{said}");
    // Many findings are one paragraph as well.
    site.write("verified.log", text.replace("KongInc", "KongInk").repeat(20));
    let (code, said) = daily(&site);
    assert_eq!((code, said.lines().count()), (Some(1), 13), "{said}");
    assert_contains(
        &said,
        &["lines do not prove themselves\n", " more; without --quiet, all of them are printed\n"],
    );
}

#[test]
fn a_configuration_names_keys_or_says_why_not() {
    let site = Site::new();
    // Keys alone name nothing to check.
    let output = auditgate().args(["verify", "--jwks"]).arg(site.path("jwks.json")).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let lines = site.producer.events(0..3);
    site.write("saved.log", lines.join("\n") + "\n");
    let saved = site.path("saved.log");
    let output = run(&site, &[saved.to_str().unwrap()]);
    assert_eq!(stdout(&output), "good 3, bad 0, unsigned 0, malformed 0\n");

    std::fs::create_dir_all(site.path("data/jwks")).unwrap();
    site.write("data/jwks/us.json", "{");
    let output = run(&site, &[saved.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert_contains(&said, &["source `us`: cannot use the key cache ", "data/jwks/us.json", "--jwks"]);
    std::fs::remove_file(site.path("data/jwks/us.json")).unwrap();

    let site = site.edit("{ file = \"jwks.json\" }", "{ url = \"https://127.0.0.1:1/\" }");
    let output = run(&site, &[saved.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    let jwks = site.path("jwks.json");
    let output = run(&site, &["--jwks", jwks.to_str().unwrap(), saved.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}
