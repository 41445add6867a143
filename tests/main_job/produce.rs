//! `auditgate keygen`, `send` and `demo` with the daemon.

use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output};

use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::machine::{Need, ReservedPort, are_there};
use crate::harness::programs::{self, auditgate};
use crate::harness::records::{objects, quarantine};
use crate::harness::site::{PATH, Site, TOKEN, raw_and_json_sinks};
use crate::harness::{body, sign, wait_until};

/// Returns a command of `auditgate send` to the daemon.
fn send(daemon: &Daemon<'_>) -> Command {
    let mut command = auditgate();
    command.args(["send", "--to", &format!("https://localhost:{}{PATH}", daemon.address.port()), "--ca"]);
    command.arg(daemon.site.path("ca.pem")).env("AUDITGATE_AUTHORIZATION", TOKEN);
    command
}

/// Returns a site that trusts a key of `keygen`.
fn with_own_key() -> Site {
    let site = Site::new().sinks(&raw_and_json_sinks());
    programs::run(auditgate().arg("keygen").arg("--dir").arg(site.path("keys")));
    std::fs::copy(site.path("keys/jwks.json"), site.path("jwks.json")).unwrap();
    site
}

#[track_caller]
fn assert_exit(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
}

#[test]
fn a_key_pair_is_private_and_never_overwritten() {
    let site = with_own_key();
    let key = site.path("keys/signing-key.pem");
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    let before = std::fs::read(&key).unwrap();
    let again = auditgate().arg("keygen").arg("--dir").arg(site.path("keys")).output().unwrap();
    assert!(!again.status.success());
    assert_eq!(std::fs::read(&key).unwrap(), before);
}

#[test]
fn sent_events_arrive_in_every_format() {
    let site = with_own_key();
    let daemon = Daemon::start(&site);
    let mut all = 0;
    for format in ["cef", "json", "cps"] {
        let output = send(&daemon)
            .args(["--generate", "250", "--batch-events", "100", "--format", format, "--key"])
            .arg(site.path("keys/signing-key.pem"))
            .output()
            .unwrap();
        assert_exit(&output, 0);
        daemon.settle();
        all += 250;
        let records = objects(&site.read("events.jsonl"));
        assert_eq!(records.len(), all);
        for record in &records[all - 250..] {
            assert_eq!(record["format"], format, "{record}");
            assert!(record.get("ambiguous").is_none(), "{record}");
        }
    }
    assert_eq!(site.read("quarantine.jsonl"), b"");
    assert_eq!(site.verified().len(), all);

    // Raw lines are sent as they are: the daemon knows them.
    let output =
        send(&daemon).args(["--input-format", "raw"]).arg(site.path("verified.log")).output().unwrap();
    assert_exit(&output, 0);
    daemon.settle();
    assert_eq!(site.verified().len(), all);
    let metrics = daemon.metrics();
    let duplicates = "auditgate_events_total{outcome=\"duplicate\",source=\"us\"}";
    assert_eq!(metrics[duplicates], all.to_string());
}

#[test]
fn a_quarantine_can_be_sent_again_when_its_key_is_trusted() {
    let site = with_own_key();
    let daemon = Daemon::start(&site);
    // The harness's producer is not trusted yet.
    let lines = site.producer.events(0..20);
    assert_eq!(daemon.deliver(&lines).quarantined, 20);
    let no_text = b"\xff\xfe is no text";
    assert_eq!(daemon.deliver(&[sign::cef(1, "rt=1").as_bytes(), no_text]).quarantined, 2);
    daemon.settle();
    daemon.terminate();

    let kept = site.read("quarantine.jsonl");
    site.write("again.jsonl", &kept);
    site.write("jwks.json", site.producer.jwks());
    let daemon = Daemon::start(&site);
    let output =
        send(&daemon).args(["--input-format", "quarantine"]).arg(site.path("again.jsonl")).output().unwrap();
    assert_exit(&output, 0);
    daemon.settle();
    assert_eq!(site.read("verified.log"), body(&lines));
    // Lines that are still rejected are duplicates.
    assert!(site.read("quarantine.jsonl") == kept);
    assert_eq!(quarantine(&kept).last().unwrap().raw, no_text);
}

#[test]
fn a_body_of_many_rejected_lines_is_one_record_whose_lines_can_be_sent_again() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let (own, other) = (site.producer.events(0..5), sign::Producer::new(7));
    let mut lines = other.events(100..1600);
    lines.splice(700..700, own.clone());
    // Verified lines are accepted; the others are kept with the whole body.
    assert_eq!(daemon.deliver(&lines), Receipt { accepted: 5, duplicates: 0, quarantined: 1500 });
    assert_eq!(daemon.deliver(&lines), Receipt { accepted: 0, duplicates: 1505, quarantined: 0 });
    daemon.settle();
    assert_eq!(site.verified(), own);
    let kept = quarantine(&site.read("quarantine.jsonl"));
    assert_eq!(kept.len(), 1);
    assert_eq!((&*kept[0].reason, &kept[0].raw), ("bad_signature", &body(&lines)));
    daemon.wait_for_count("auditgate_events_total{outcome=\"bad_signature\",source=\"us\"}", 1500);

    site.write("jwks.json", sign::jwks(&[("k1", &site.producer.public()), ("k2", &other.public())]));
    daemon.signal("HUP");
    daemon.wait_for_count("auditgate_jwks_keys{source=\"us\"}", 2);
    let record = site.path("quarantine.jsonl");
    let output = send(&daemon).args(["--input-format", "quarantine"]).arg(record).output().unwrap();
    assert_exit(&output, 0);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("accepted 1500, duplicates 5, quarantined 0"), "{said}");
}

#[test]
fn a_batch_that_cannot_be_delivered_is_a_finding() {
    let site = with_own_key();
    let daemon = Daemon::start(&site);
    let output = send(&daemon)
        .env("AUDITGATE_AUTHORIZATION", "wrong")
        .args(["--generate", "5", "--key"])
        .arg(site.path("keys/signing-key.pem"))
        .output()
        .unwrap();
    assert_exit(&output, 1);
    assert_eq!(site.read("verified.log"), b"");
}

/// Runs a program on a terminal of its own, and prints what it prints; ends with its exit code.
const ON_A_TERMINAL: &str =
    "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))";

#[test]
fn a_sender_says_on_a_terminal_that_it_retries_and_gives_each_reason_once() {
    // Nothing listens on it.
    let port = ReservedPort::new();
    let address = format!("127.0.0.1:{}", port.number());
    let to = format!("http://{address}/");
    let arguments = ["send", "--to", &to, "--unsigned", "--generate", "1", "--retries", "1"];
    let output = auditgate().args(arguments).output().unwrap();
    assert_exit(&output, 1);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!said.contains("retrying"), "{said}");
    assert!(said.contains("1 event in 1 of 1 batch could not be delivered, the first because "), "{said}");

    let need: Need = ("python3 is not installed", &["python3", "-c", "import pty"]);
    if !are_there(&[need]) {
        return;
    }
    let output = Command::new("python3")
        .args(["-c", ON_A_TERMINAL])
        .arg(auditgate().get_program())
        .args(arguments)
        .env("TERM", "xterm")
        .output()
        .unwrap();
    assert_exit(&output, 1);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("; retrying in 1 s (attempt 2 of 2)"), "{said}");
    let (_, end) = said.split_once("batch 1: 1 event, not delivered, 2 attempts: ").unwrap();
    assert_eq!(end.matches(&address).count(), 1, "{said}");
    assert!(end.contains("1 event in 1 of 1 batch could not be delivered, the first is batch 1"), "{said}");
}

#[test]
fn a_refusal_of_every_batch_ends_a_long_run_at_once() {
    let site = with_own_key();
    let daemon = Daemon::start(&site);
    let key = site.path("keys/signing-key.pem");
    let mut command = send(&daemon);
    command.args(["--generate", "1000000", "--key"]).arg(&key).env("AUDITGATE_AUTHORIZATION", "wrong");
    let output = command.output().unwrap();
    assert_exit(&output, 1);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("answered 401") && said.contains("sending has stopped at batch 1"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");

    // A certificate authority that is not the receiver's.
    let other = Site::new();
    let to = format!("https://localhost:{}{PATH}", daemon.address.port());
    let mut command = auditgate();
    command.args(["send", "--to", &to, "--generate", "1000000", "--key"]).arg(&key).arg("--ca");
    let output = command.arg(other.path("ca.pem")).output().unwrap();
    assert_exit(&output, 1);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("certificate") && said.contains("sending has stopped at batch 1"), "{said}");
    assert_eq!(site.read("verified.log"), b"");
}

#[test]
fn quarantined_lines_are_a_warning_and_with_strict_a_failure() {
    let site = with_own_key();
    let daemon = Daemon::start(&site);
    let events = site.producer.events(0..20).join("\n");
    site.write("foreign.log", &events);
    let raw = |more: &[&str]| {
        let mut command = send(&daemon);
        command.args(["--input-format", "raw"]).args(more).arg(site.path("foreign.log")).output().unwrap()
    };
    let output = raw(&[]);
    assert_exit(&output, 0);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("auditgate: warning: 20 of 20 lines quarantined; "), "{said}");
    // Now they are duplicates.
    let output = raw(&["--strict"]);
    assert_exit(&output, 0);
    site.write("foreign.log", site.producer.events(20..21).join("\n"));
    assert_exit(&raw(&["--strict"]), 1);
}

#[test]
fn a_sender_survives_a_restart_of_the_daemon() {
    // The port must stay the same.
    let port = ReservedPort::new();
    let site = with_own_key().edit("127.0.0.1:0", &format!("127.0.0.1:{}", port.number()));
    let daemon = Daemon::start(&site);
    let mut sender = send(&daemon)
        .args(["--generate", "20000", "--batch-events", "50", "--quiet", "--key"])
        .arg(site.path("keys/signing-key.pem"))
        .spawn()
        .unwrap();
    wait_until("an event has arrived", || match site.read("verified.log").len() {
        0 => Err("nothing".to_owned()),
        _ => Ok(()),
    });
    daemon.kill9();
    let daemon = Daemon::start(&site);
    let status = sender.wait().unwrap();
    assert_eq!(status.code(), Some(0));
    daemon.settle();
    let mut lines = site.verified();
    assert_eq!(lines.len(), 20_000);
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), 20_000);
}

#[test]
fn the_demo_shows_the_whole_job_twice() {
    let site = Site::new();
    let commands: Vec<String> = (0..2)
        .map(|_| {
            let output = auditgate()
                .args(["demo", "--events", "200", "--dir"])
                .arg(site.path("demo"))
                .output()
                .unwrap();
            assert_exit(&output, 0);
            let said = String::from_utf8(output.stdout).unwrap();
            for shown in ["bad_signature", "unsigned", "malformed", "once this is undone", "Ingress"] {
                assert!(said.contains(shown), "{said}");
            }
            let longest = said.lines().map(|line| line.chars().count()).max().unwrap();
            assert!(longest <= 100, "{longest} columns: {said}");
            said.split_once("To go on from here").unwrap().1.to_owned()
        })
        .collect();
    assert_eq!(commands[0], commands[1]);
}
