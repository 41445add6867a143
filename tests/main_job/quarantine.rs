//! `auditgate quarantine` beside a running daemon.

use std::process::Output;

use rusqlite::Connection;
use serde_json::Value;

use crate::harness::daemon::Daemon;
use crate::harness::programs::{self, auditgate};
use crate::harness::records::quarantine;
use crate::harness::sign::{self, Producer};
use crate::harness::site::{PATH, Site, TOKEN, sink, sqlite_sink};
use crate::harness::verify::{assert_all_good, stdout, verify};

/// Runs a subcommand with the configuration of a site.
fn run(site: &Site, arguments: &[&str]) -> Output {
    let mut command = auditgate();
    command.arg("quarantine").args(arguments).arg("-c").arg(site.path("config.toml")).output().unwrap()
}

#[track_caller]
fn good(site: &Site, arguments: &[&str]) -> String {
    let output = run(site, arguments);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    stdout(&output)
}

/// Returns the counts by reason that a sink's quarantine has.
fn listed(site: &Site, sink: &str) -> Vec<(String, u64)> {
    let list: Value = serde_json::from_str(&good(site, &["list", "--json", "--sink", sink])).unwrap();
    let row = |row: &Value| (row["reason"].as_str().unwrap().to_owned(), row["records"].as_u64().unwrap());
    list["quarantined"].as_array().unwrap().iter().map(row).collect()
}

#[test]
fn a_file_and_a_database_are_listed_shown_and_pruned_while_the_daemon_writes() {
    let sinks = sink("quarantine", "json", "\"quarantine\"")
        + "rotate = { size = \"4KiB\" }\n"
        + &sqlite_sink("events.db", "[\"verified\", \"quarantine\"]");
    let site = Site::new().sinks(&sinks);
    let daemon = Daemon::start(&site);
    let other = Producer::new(7);
    for batch in 0..5 {
        let numbers = batch * 10..batch * 10 + 10;
        let mut lines = [site.producer.events(numbers.clone()), other.events(numbers)].concat();
        lines.push(sign::cef(batch, &format!("rt={batch}")));
        assert_eq!(daemon.deliver(&lines).quarantined, 11);
    }
    daemon.settle();
    let wanted = [("bad_signature".to_owned(), 50), ("unsigned".to_owned(), 5)];
    assert_eq!(listed(&site, "quarantine"), wanted);
    assert_eq!(listed(&site, "search"), wanted);
    let shown = [
        good(&site, &["show", "--json", "--sink", "quarantine", "-n", "7"]),
        good(&site, &["show", "--json", "--sink", "search", "-n", "7"]),
    ];
    assert_eq!(shown[0], shown[1]);
    assert_eq!(quarantine(shown[0].as_bytes()).len(), 7);
    assert!(site.with_rotated("quarantine.jsonl").ends_with(shown[0].as_bytes()));

    let rotated = site.rotated("quarantine.jsonl");
    assert!(rotated.len() > 2, "{rotated:?}");
    // Nothing is that old.
    let kept = good(&site, &["prune", "--before", "1h"]);
    assert!(kept.contains("deleted 0 rows") && !kept.contains("removed"), "{kept}");
    let current = site.read("quarantine.jsonl");
    let pruned = good(&site, &["prune", "--before", "0s"]);
    assert!(pruned.contains("deleted 55 rows of "), "{pruned}");
    assert_eq!(pruned.matches("removed ").count(), rotated.len(), "{pruned}");
    assert!(pruned.contains("quarantine.jsonl: the daemon writes to it"), "{pruned}");
    assert_eq!(site.rotated("quarantine.jsonl"), [""; 0]);
    assert!(site.read("quarantine.jsonl") == current);
    assert_eq!(listed(&site, "search"), []);

    // The daemon goes on as if nothing had happened, also after a restart.
    assert_eq!(daemon.deliver(&other.events(100..103)).quarantined, 3);
    daemon.settle();
    daemon.kill9();
    let daemon = Daemon::start(&site);
    assert_eq!(daemon.deliver(&site.producer.events(103..106)).accepted, 3);
    assert_eq!(daemon.deliver(&other.events(106..109)).quarantined, 3);
    daemon.settle();
    assert_eq!(listed(&site, "search"), [("bad_signature".to_owned(), 6)]);
    let left = quarantine(&site.with_rotated("quarantine.jsonl"));
    assert_eq!(left.len(), quarantine(&current).len() + 6);
    assert_all_good(&verify(&site, &["events.db"]), 53);
    daemon.terminate();
    let count = |table: &str| -> i64 {
        let database = Connection::open(site.path("events.db")).unwrap();
        database.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap()
    };
    assert_eq!((count("events"), count("quarantine")), (53, 6));
    // Without the daemon too.
    good(&site, &["prune", "--before", "0s", "--sink", "search"]);
    assert_eq!((count("events"), count("quarantine")), (53, 0));
}

#[test]
fn lines_are_sent_again_when_their_key_is_trusted() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let other = Producer::new(7);
    let lines = other.events(0..20);
    assert_eq!(daemon.deliver(&lines).quarantined, 20);
    assert_eq!(daemon.deliver(&[sign::cef(1, "rt=1")]).quarantined, 1);
    daemon.settle();
    site.write("jwks.json", sign::jwks(&[("k1", &site.producer.public()), ("k2", &other.public())]));
    daemon.signal("HUP");
    daemon.wait_for_count("auditgate_jwks_keys{source=\"us\"}", 2);

    let resend = |more: &[&str]| {
        let mut command = auditgate();
        command.args(["quarantine", "resend", "--config"]).arg(site.path("config.toml"));
        command.args(["--to", &format!("https://localhost:{}{PATH}", daemon.address.port()), "--ca"]);
        command.arg(site.path("ca.pem")).env("AUDITGATE_AUTHORIZATION", TOKEN).args(more);
        stdout(&programs::run(&mut command))
    };
    let said = resend(&["--reason", "bad_signature", "--strict"]);
    assert!(said.ends_with("20 events in 1 batch: accepted 20, duplicates 0, quarantined 0\n"), "{said}");
    daemon.settle();
    assert_eq!(site.verified(), lines);
    // Once more does no harm, and what is still rejected is a duplicate.
    let said = resend(&[]);
    assert!(said.ends_with("21 events in 1 batch: accepted 0, duplicates 21, quarantined 0\n"), "{said}");
    daemon.settle();
    assert_eq!(site.verified(), lines);
    assert_eq!(quarantine(&site.read("quarantine.jsonl")).len(), 21);
}
