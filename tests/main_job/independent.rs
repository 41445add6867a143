//! Events that an independent implementation signed, sent by an independent client; and what
//! `auditgate send` posts, verified and parsed by another one.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::machine::{self, Need};
use crate::harness::records::quarantine;
use crate::harness::site::{PATH, Site, TOKEN};
use crate::harness::{assert_contains, body, programs, sign};

const PYTHON: Need = (
    "python3 is not installed, or without its module cryptography",
    &["python3", "-c", "import cryptography"],
);

/// Returns a site whose keys and signed lines are made by Python.
fn signed_by_python() -> Site {
    let site = Site::new();
    programs::run(Command::new("python3").arg(programs::beside("sign.py")).arg(site.path("")));
    site
}

/// Splits a file into lines of bytes.
fn byte_lines(bytes: &[u8]) -> Vec<&[u8]> {
    bytes.strip_suffix(b"\n").unwrap_or(bytes).split(|byte| *byte == b'\n').collect()
}

#[test]
fn what_python_signs_and_curl_posts_arrives_byte_for_byte() {
    if !machine::are_there(&[PYTHON, ("curl is not installed", &["curl", "--version"])]) {
        return;
    }
    let site = signed_by_python();
    let daemon = Daemon::start(&site);
    let posted = programs::run(
        Command::new("curl")
            .args(["--silent", "--show-error", "--fail-with-body", "--noproxy", "*", "--cacert"])
            .arg(site.path("ca.pem"))
            .args(["--header", &format!("Authorization: {TOKEN}"), "--header", "Content-Type: text/plain"])
            .args(["--header", "Content-Encoding: application/gzip", "--data-binary"])
            .arg(format!("@{}", site.path("sent.gz").display()))
            .arg(format!("https://localhost:{}{PATH}", daemon.address.port())),
    );
    let sent = site.read("sent.log");
    let count = byte_lines(&sent).len();
    assert_eq!(
        String::from_utf8(posted.stdout).unwrap(),
        format!(r#"{{"accepted":{count},"duplicates":0,"quarantined":0}}"#),
        "{:?}",
        quarantine(&site.read("quarantine.jsonl"))
    );
    daemon.settle();
    assert!(site.read("verified.log") == sent, "verified.log is what was sent");
    assert_eq!(site.read("quarantine.jsonl"), b"");
}

#[test]
fn no_byte_of_a_signed_line_can_change() {
    if !machine::are_there(&[PYTHON]) {
        return;
    }
    let site = signed_by_python();
    let daemon = Daemon::start(&site);
    let kinds = site.read("kinds.log");
    let mut damaged = BTreeSet::new();
    for line in byte_lines(&kinds) {
        for (at, byte) in line.iter().enumerate() {
            let nearby = [byte ^ 0x01, byte ^ 0x20, byte ^ 0x80, byte.wrapping_add(1)];
            for other in *b" \t\0\x80\"'\\,:{}=|09Aa-_" {
                damaged.insert(with_byte(line, at, other));
            }
            damaged.extend(nearby.map(|other| with_byte(line, at, other)));
        }
    }
    damaged.retain(|line| !line.contains(&b'\n') && !line.contains(&b'\r'));
    for line in byte_lines(&kinds) {
        damaged.remove(line);
    }

    let all: Vec<_> = damaged.iter().collect();
    // A body with more rejected lines is kept as one record.
    for batch in all.chunks(1000) {
        let receipt = daemon.deliver(batch);
        let quarantined = batch.len() as u64;
        assert_eq!(receipt, Receipt { quarantined, ..Receipt::default() });
    }
    daemon.settle();
    assert_eq!(site.read("verified.log"), b"");
    let mut reasons = BTreeMap::new();
    let mut kept = BTreeSet::new();
    for record in quarantine(&site.read("quarantine.jsonl")) {
        assert!(["bad_signature", "malformed", "unsigned"].contains(&record.reason.as_str()), "{record:?}");
        *reasons.entry(record.reason).or_insert(0) += 1;
        kept.insert(record.raw);
    }
    assert!(kept == damaged, "the quarantine holds exactly the damaged lines");
    eprintln!("{} damaged lines: {reasons:?}", damaged.len());

    // The lines themselves are good.
    let receipt = daemon.deliver(&byte_lines(&kinds));
    assert_eq!(receipt, Receipt { accepted: byte_lines(&kinds).len() as u64, ..Receipt::default() });
    daemon.settle();
    assert!(site.read("verified.log") == kinds);
}

fn with_byte(line: &[u8], at: usize, byte: u8) -> Vec<u8> {
    let mut line = line.to_vec();
    line[at] = byte;
    line
}

#[test]
fn what_the_sender_posts_is_verified_and_parsed_by_python() {
    if !machine::are_there(&[PYTHON]) {
        return;
    }
    let site = Site::new();
    programs::run(programs::auditgate().arg("keygen").arg("--dir").arg(site.path("keys")));
    let checked = programs::run(
        Command::new("python3")
            .arg(programs::beside("verify.py"))
            .arg(programs::auditgate().get_program())
            .arg(site.path("keys")),
    );
    let said = String::from_utf8(checked.stdout).unwrap();
    assert_contains(&said, &["cef: 350 events and 300 samples", "json: ", "cps: "]);
}

#[test]
fn what_openssl_signs_verifies() {
    const OPENSSL: Need = (
        "openssl is not installed, or older than 3 and without `-rawin`, which Ed25519 needs",
        &["sh", "-c", "openssl pkeyutl -help 2>&1 | grep -q rawin"],
    );
    if !machine::are_there(&[OPENSSL]) {
        return;
    }
    let site = Site::new();
    let key = site.path("openssl.pem");
    let openssl = |arguments: &[&str]| {
        let mut command = Command::new("openssl");
        command.args(arguments);
        command
    };
    programs::run(openssl(&["genpkey", "-algorithm", "ed25519", "-out"]).arg(&key));
    let public = programs::run(openssl(&["pkey", "-pubout", "-outform", "DER", "-in"]).arg(&key)).stdout;
    let public = public.last_chunk().expect("a public key");
    site.write("jwks.json", sign::jwks(&[("other", &[9; 32]), ("openssl", public)]));
    let sign = |message: &str| {
        site.write("message", message);
        let mut command = openssl(&["pkeyutl", "-sign", "-rawin", "-inkey"]);
        let signed = programs::run(command.arg(&key).arg("-in").arg(site.path("message"))).stdout;
        URL_SAFE_NO_PAD.encode(signed)
    };
    let cef = sign::cef(1, "rt=1684454619000");
    let json = sign::json(2, 1_684_454_619_000);
    let inner = sign::json(3, 1_684_454_619_000);
    let with = |object: &str, signature: &str| {
        format!("{},\"sig\":\"{signature}\"}}", object.strip_suffix('}').unwrap())
    };
    let sent = [
        format!("{cef} sig={}", sign(&cef)),
        with(&json, &sign(&json)),
        format!("{{\"event\":{}}}", with(&inner, &sign(&inner))),
    ];
    let daemon = Daemon::start(&site);
    assert_eq!(daemon.deliver(&sent), Receipt { accepted: 3, ..Receipt::default() });
    daemon.settle();
    assert_eq!(site.read("verified.log"), body(&sent));
}
