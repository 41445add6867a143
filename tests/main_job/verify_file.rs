//! `auditgate verify`: what was delivered can be proved again, offline, by whoever has the keys.

use std::io::Write as _;
use std::path::Path;
use std::process::{Output, Stdio};

use crate::harness::daemon::Daemon;
use crate::harness::programs::auditgate;
use crate::harness::site::{Site, sink};
use crate::harness::{body, gzip, sign};

/// What `verify` says about some files, with the site's keys.
fn verify(site: &Site, files: &[&str]) -> Output {
    let mut command = auditgate();
    command.arg("verify").arg("--jwks").arg(site.path("jwks.json"));
    command.args(files.iter().map(|file| site.path(file))).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn all_good(output: &Output, count: usize) {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(stdout(output), format!("good {count}, bad 0, unsigned 0, malformed 0\n"));
}

fn names(output: &Output, site: &Site, file: &str, line: usize) {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let place = format!("{}:{line}:", site.path(file).display());
    let said = stdout(output) + &String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(&place), "{place} is not in: {said}");
}

/// A daemon's own files with 300 events.
fn delivered() -> Site {
    let site = Site::new().sinks(
        &[
            sink("verified", "raw", "\"verified\""),
            sink("events", "json", "\"verified\""),
            sink("quarantine", "json", "\"quarantine\""),
        ]
        .concat(),
    );
    let daemon = Daemon::start(&site);
    let mut lines = site.producer.events(0..300);
    lines.push(sign::cef(300, "rt=1684454619000"));
    assert_eq!(daemon.deliver(&lines).accepted, 300);
    daemon.settle();
    daemon.terminate();
    site
}

#[test]
fn what_was_delivered_verifies_in_every_wrapping() {
    let site = delivered();
    for name in ["verified.log", "events.jsonl"] {
        let bytes = site.read(name);
        site.write(&format!("{name}.gz"), gzip(&bytes));
        site.write(&format!("{name}.zst"), zstd::stream::encode_all(&bytes[..], 3).unwrap());
        for extension in ["", ".gz", ".zst"] {
            all_good(&verify(&site, &[&format!("{name}{extension}")]), 300);
        }
    }
    all_good(&verify(&site, &["verified.log", "events.jsonl.gz", "verified.log.zst"]), 900);

    let mut child = auditgate()
        .arg("verify")
        .arg("--jwks")
        .arg(site.path("jwks.json"))
        .arg("-")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&site.read("verified.log")).unwrap();
    all_good(&child.wait_with_output().unwrap(), 300);
}

#[test]
fn one_changed_byte_is_named_by_file_and_line() {
    let site = delivered();
    let raw = site.read("verified.log");
    // Three formats in turn: one line of each.
    for line in [100, 101, 102] {
        let mut lines: Vec<Vec<u8>> = raw.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
        lines.pop();
        let at = lines[line - 1].windows(8).position(|window| window == b"trace_id").unwrap();
        lines[line - 1][at] = b'T';
        let changed = body(&lines);
        site.write("changed.log", &changed);
        site.write("changed.log.gz", gzip(&changed));
        for file in ["changed.log", "changed.log.gz"] {
            let output = verify(&site, &["verified.log", file]);
            names(&output, &site, file, line);
            assert!(stdout(&output).ends_with("good 599, bad 1, unsigned 0, malformed 0\n"), "{output:?}");
        }
    }

    // In a record, the line itself and what is said about it.
    let json = String::from_utf8(site.read("events.jsonl")).unwrap();
    for (from, to) in [("granted=true", "granted=TRUE"), ("\"granted\":true", "\"granted\":false")] {
        let (line, changed) = json
            .lines()
            .enumerate()
            .find_map(|(at, line)| line.contains(from).then(|| (at + 1, line.replacen(from, to, 1))))
            .unwrap();
        let all: Vec<&str> =
            json.lines().enumerate().map(|(at, old)| if at + 1 == line { &changed } else { old }).collect();
        site.write("changed.jsonl", body(&all));
        names(&verify(&site, &["changed.jsonl"]), &site, "changed.jsonl", line);
    }
}

#[test]
fn what_cannot_be_proved_is_counted() {
    let site = delivered();
    let unsigned = sign::cef(1, "rt=1");
    let foreign = sign::Producer::new(2).event(1);
    site.write("mixed.log", body(&[&site.producer.event(1), &unsigned, &foreign, "rubbish"]));
    let output = verify(&site, &["mixed.log"]);
    names(&output, &site, "mixed.log", 2);
    names(&output, &site, "mixed.log", 3);
    names(&output, &site, "mixed.log", 4);
    assert!(stdout(&output).ends_with("good 1, bad 1, unsigned 1, malformed 1\n"), "{output:?}");

    // The quarantine is full of what cannot be proved.
    assert_eq!(verify(&site, &["quarantine.jsonl"]).status.code(), Some(1));
    assert_eq!(verify(&site, &["not-there.log"]).status.code(), Some(74));
    let no_keys =
        auditgate().args(["verify", "--jwks"]).arg(Path::new("/not/there")).arg("-").output().unwrap();
    assert_eq!(no_keys.status.code(), Some(78), "{no_keys:?}");
}
