//! Inputs that once exposed a bug (`tests/cases/`), through the whole daemon.

use std::process::Command;

use rusqlite::Connection;
use serde_json::Value;

use crate::harness::client::request;
use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::programs::{auditgate, beside};
use crate::harness::records::{objects, quarantine};
use crate::harness::site::{PATH, Site, TOKEN, raw_sinks, sink, source, sqlite_sink};

fn case(name: &str) -> Vec<u8> {
    std::fs::read(beside("../cases").join(name)).unwrap()
}

/// Reads a case of one line, without its line end.
fn line(name: &str) -> Vec<u8> {
    let mut line = case(name);
    line.pop_if(|last| *last == b'\n');
    line
}

/// Returns a site with three sources: one trusts the key of most cases, one the key of the case
/// that is not UTF-8, and one checks no signatures.
fn site() -> Site {
    let keys = |name: &str| {
        let path = beside("../cases").join(name);
        format!("jwks = {{ file = \"{}\" }}", path.display())
    };
    let sources = source("us", "/us", &keys("signed.jwks.json"))
        + &source("bytes", "/bytes", &keys("non-utf8-signed.jwks.json"))
        + &source("off", "/off", &format!("{}\nsignatures = \"off\"", keys("signed.jwks.json")));
    let sinks = raw_sinks()
        + &sink("events", "json", "[\"verified\", \"unverified\"]")
        + &sqlite_sink("search.db", "[\"verified\", \"unverified\", \"quarantine\"]");
    Site::new().sources(&sources).sinks(&sinks)
}

/// What a daemon delivered after it received cases.
struct Delivered {
    site: Site,
    receipts: Vec<Receipt>,
    records: Vec<Value>,
}

impl Delivered {
    /// Posts each case to a path.
    fn of(bodies: &[(&str, &str)]) -> Self {
        let site = site();
        let daemon = Daemon::start(&site);
        let receipts =
            bodies.iter().map(|(path, name)| Receipt::of(&daemon.post_to(path, None, &case(name)))).collect();
        daemon.settle();
        daemon.terminate();
        let records = objects(&site.read("events.jsonl"));
        Self { site, receipts, records }
    }

    fn database(&self) -> Connection {
        Connection::open(self.site.path("search.db")).unwrap()
    }

    /// Returns how many rows of the database meet a condition.
    fn count(&self, condition: &str) -> u64 {
        let sql = format!("SELECT count(*) FROM events WHERE {condition}");
        self.database().query_row(&sql, [], |row| row.get(0)).unwrap()
    }

    /// Checks that every delivered line verifies with a key set of the cases; returns the output of
    /// `verify`.
    fn assert_verified_with(&self, jwks: &str, more: &[&str]) -> String {
        let output = auditgate()
            .arg("verify")
            .arg("--jwks")
            .arg(beside("../cases").join(jwks))
            .args(more)
            .args(["verified.log", "events.jsonl", "search.db"].map(|name| self.site.path(name)))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        said
    }
}

const ACCEPTED: Receipt = Receipt { accepted: 1, duplicates: 0, quarantined: 0 };

fn ambiguous(record: &Value) -> Vec<&str> {
    record["ambiguous"].as_array().into_iter().flatten().map(|key| key.as_str().unwrap()).collect()
}

#[test]
fn a_failed_login_has_no_principal_whatever_its_user_agent_says() {
    let delivered = Delivered::of(&[
        ("/us", "failed-login-no-principal.cef"),
        ("/us", "failed-login-forged-principal.cef"),
    ]);
    assert_eq!(delivered.receipts, [ACCEPTED; 2]);
    for (record, forged) in delivered.records.iter().zip([&[][..], &["org_id", "principal_id", "user_agent"]])
    {
        assert_eq!(record["verified"], true);
        assert_eq!(record["event"]["success"], false);
        assert_eq!(record["event"]["principal_id"], Value::Null);
        assert_eq!(record["event"]["org_id"], Value::Null);
        assert_eq!(ambiguous(record), forged);
    }
    let agent = "curl/8 principal_id=someone-else org_id=another-org";
    assert_eq!(delivered.records[1]["event"]["user_agent"], agent);
    assert_eq!(delivered.count("success = 0 AND principal_id IS NULL AND org_id IS NULL"), 2);
    assert_eq!(delivered.count(&format!("user_agent = '{agent}'")), 1);
    delivered.assert_verified_with("signed.jwks.json", &[]);
}

#[test]
fn a_denial_cannot_be_hidden_by_its_user_agent() {
    let delivered = Delivered::of(&[("/us", "denied-hidden.cef")]);
    assert_eq!(delivered.receipts, [ACCEPTED]);
    let record = &delivered.records[0];
    assert_eq!(record["event"]["granted"], false);
    assert_eq!(record["event"]["principal_id"], "person-1");
    assert_eq!(record["event"]["rt"], 1_767_225_601_000_u64);
    assert_eq!(record["event"]["user_agent"], "agent granted=x principal_id=y rt=1");
    assert_eq!(ambiguous(record), ["granted", "principal_id", "rt", "user_agent"]);
    // Denials are found by the documented query, at the time of the event.
    let denials = "granted = 0 AND time >= 1767225600000";
    assert_eq!(delivered.count(denials), 1);
    assert_eq!(delivered.count("principal_id = 'person-1'"), 1);
    delivered.assert_verified_with("signed.jwks.json", &[]);
}

#[test]
fn values_and_stamps_are_kept_whole() {
    let delivered = Delivered::of(&[
        ("/off", "truncated-query.cef"),
        ("/off", "hostless-date.cef"),
        ("/off", "comma-key.cef"),
    ]);
    assert_eq!(delivered.receipts, [ACCEPTED; 3]);
    let [query, hostless, comma] = &delivered.records[..] else { panic!("{:?}", delivered.records) };
    assert_eq!(query["event"]["query"], r#"{"q":"delete all where name=x"}"#);
    assert_eq!(query["event"]["name"], "Ingress");
    assert_eq!(ambiguous(query), ["name", "query"]);
    assert_eq!(hostless["event"]["event_ts"], "Jun 21 13:41:36");
    for (key, value) in [("a", "1"), ("ad.Error_,Code", "2"), ("dst", "3")] {
        assert_eq!(comma["event"][key], value, "{comma}");
    }
    assert_eq!(ambiguous(comma), [""; 0]);
}

#[test]
fn a_line_that_is_not_utf_8_is_verified_and_kept() {
    let delivered = Delivered::of(&[("/bytes", "non-utf8-signed.cef")]);
    assert_eq!(delivered.receipts, [ACCEPTED]);
    let raw = line("non-utf8-signed.cef");
    assert_eq!(delivered.site.read("verified.log"), [&raw[..], b"\n"].concat());
    let record = &delivered.records[0];
    assert_eq!((&record["verified"], &record["raw"]), (&Value::Bool(true), &Value::Null));
    assert_eq!(record["event"]["user_agent"], "\u{fffd}");
    let encoded = record["raw_base64"].as_str().unwrap();
    let decoded = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, encoded).unwrap();
    assert_eq!(decoded, raw);
    let hex: String = raw.iter().map(|byte| format!("{byte:02X}")).collect();
    assert_eq!(
        delivered.count(&format!(
            "typeof(raw) = 'blob' AND raw = x'{hex}' AND user_agent = char(0xfffd) AND verified = 1"
        )),
        1
    );
    delivered.assert_verified_with("non-utf8-signed.jwks.json", &[]);
    // `--explain` accepts the raw line and the record.
    for file in ["verified.log:1", "events.jsonl:1"] {
        let output = auditgate()
            .arg("verify")
            .arg("--jwks")
            .arg(beside("../cases").join("non-utf8-signed.jwks.json"))
            .arg("--explain")
            .arg(delivered.site.path(file))
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
}

#[test]
fn a_null_character_hides_nothing_from_a_query() {
    let delivered = Delivered::of(&[("/us", "nul-escaped.jsonl")]);
    assert_eq!(delivered.receipts, [ACCEPTED]);
    assert_eq!(delivered.records[0]["event"]["user_agent"], "x\0hidden");
    assert_eq!(delivered.count("user_agent LIKE '%hidden%' AND query LIKE '%drop table%'"), 1);
    assert_eq!(delivered.count(r"user_agent = 'x\u0000hidden'"), 1);
    let shell = Command::new("sqlite3")
        .arg(delivered.site.path("search.db"))
        .arg("SELECT user_agent FROM events")
        .output();
    if let Ok(shell) = shell {
        assert_eq!(String::from_utf8_lossy(&shell.stdout), "x\\u0000hidden\n");
    }
    delivered.assert_verified_with("signed.jwks.json", &[]);
}

#[test]
fn a_captured_event_is_not_accepted_again_in_another_wrapper() {
    let delivered = Delivered::of(&[("/us", "cps-whole.jsonl")]);
    assert_eq!(delivered.receipts, [ACCEPTED]);
    let daemon = Daemon::start(&delivered.site);
    let event = line("cps-whole.jsonl");
    let twice = line("cps-wrapped-again.jsonl");
    let again = [[b"{\"event\": ", &twice[..], b"}"].concat(), twice, event];
    let receipt = Receipt::of(&daemon.post_to("/us", None, &again.join(&b'\n')));
    assert_eq!(receipt, Receipt { accepted: 0, duplicates: 1, quarantined: 2 });
    daemon.settle();
    daemon.terminate();
    assert_eq!(objects(&delivered.site.read("events.jsonl")).len(), 1);
}

#[test]
fn a_body_without_an_event_is_kept_whole() {
    let site = site();
    let daemon = Daemon::start(&site);
    let bodies = ["pretty-A.json", "pretty-B.json"].map(case);
    for body in &bodies {
        let answer = daemon.post_to("/us", None, body);
        assert_eq!(answer.status, 400, "{answer:?}");
    }
    // Compressed it is the same body, which is in the quarantine already.
    let compressed = crate::harness::gzip(&bodies[0]);
    assert_eq!(daemon.post_to("/us", Some("application/gzip"), &compressed).status, 400);
    daemon.settle();
    daemon.terminate();
    let records = site.read("quarantine.jsonl");
    let kept = quarantine(&records);
    assert!(kept.iter().all(|record| record.reason == "undecodable_body"), "{kept:?}");
    assert_eq!(kept.into_iter().map(|record| record.raw).collect::<Vec<_>>(), bodies);
    let detail = objects(&records)[0]["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("JSON spread over lines"), "{detail}");
}

#[test]
fn a_body_that_was_compressed_twice_is_accepted() {
    let site = site();
    let daemon = Daemon::start(&site);
    let receipt = Receipt::of(&daemon.post_to("/off", Some("gzip"), &case("double-gzip.bin")));
    assert_eq!(receipt, Receipt { accepted: 300, ..Receipt::default() });
    daemon.settle();
    daemon.terminate();
    assert_eq!(objects(&site.read("events.jsonl")).len(), 300);
}

#[test]
fn a_deeply_nested_value_leaves_the_record_readable() {
    let nested =
        |depth: usize| format!("{{\"name\":\"d{depth}\",\"x\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
    let site = site();
    let daemon = Daemon::start(&site);
    let lines = [nested(100), nested(101), nested(5_000)];
    let receipt = Receipt::of(&daemon.post_to("/off", None, lines.join("\n").as_bytes()));
    assert_eq!(receipt, Receipt { accepted: 3, ..Receipt::default() });
    daemon.settle();
    daemon.terminate();
    // serde_json reads at most 128 levels.
    let records = objects(&site.read("events.jsonl"));
    let is_text: Vec<bool> = records.iter().map(|record| record["event"]["x"].is_string()).collect();
    assert_eq!(is_text, [false, true, true]);
    assert_eq!(records[2]["event"]["x"], format!("{}{}", "[".repeat(5_000), "]".repeat(5_000)));
    let database = Connection::open(site.path("search.db")).unwrap();
    let types = "SELECT group_concat(json_type(extra, '$.event.x'), ' ' ORDER BY id) FROM events";
    let types: String = database.query_row(types, [], |row| row.get(0)).unwrap();
    assert_eq!(types, "array text text");
}

#[test]
fn token_files_may_have_a_byte_order_mark_but_no_header_name() {
    let with_token = |name: &str| {
        let site = site();
        let file = format!("authorization = {{ file = \"{}\" }}", beside("../cases").join(name).display());
        for _ in 0..3 {
            site.reconfigure(&format!("authorization = {{ value = \"{TOKEN}\" }}"), &file);
        }
        auditgate().arg("check-config").arg(site.path("config.toml")).output().unwrap()
    };
    let output = with_token("token-bom");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let output = with_token("token-with-header-name");
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("Authorization:"), "{said}");
}

#[test]
fn key_sets_may_have_a_byte_order_mark_or_a_numeric_kid() {
    for name in ["jwks-bom.json", "jwks-numeric-kid.json"] {
        let output = auditgate()
            .arg("verify")
            .arg("--jwks")
            .arg(beside("../cases").join(name))
            .args(["--json", "/dev/null"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{name}: {output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["keys"][0]["thumbprint"], "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
    }
}

#[test]
fn refused_requests_do_not_flood_the_log() {
    const FLOOD: usize = 60;
    let site = Site::new().plain();
    let daemon = Daemon::start(&site);
    let length = [("Content-Length", "0")];
    let other_type = [("Authorization", TOKEN), ("Content-Type", "application/json"), length[0]];
    let no_token = [("Authorization", "Bearer x"), length[0]];
    for _ in 0..FLOOD {
        for (request, status) in [
            (case("two-hosts.http"), 400),
            (request("POST", PATH, &other_type, b""), 415),
            (request("POST", PATH, &no_token, b""), 401),
        ] {
            let mut client = daemon.connect();
            client.send(&request);
            assert_eq!(client.answer().status, status);
        }
    }
    daemon.signal("TERM");
    let log = daemon.log_at_end();
    let about = |words: &str| log.iter().filter(|line| line.contains(words)).count();
    for status in ["status=400", "status=415", "status=401"] {
        // At most one message every ten seconds.
        assert!((1..FLOOD / 4).contains(&about(status)), "{status}: {log:#?}");
    }
    let heads: Vec<_> = log.iter().filter(|line| line.contains("status=400")).collect();
    assert!(heads.iter().all(|line| !line.contains("code=\"batch-refused\"")), "{heads:?}");
}
