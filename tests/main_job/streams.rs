//! Streams: which lines go to which sink, and that unverified lines are never presented as
//! verified.

use rusqlite::Connection;
use serde_json::Value;

use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::machine::ReservedPort;
use crate::harness::records::objects;
use crate::harness::sign::cef;
use crate::harness::site::{PATH, Site, sink, source, sqlite_sink, syslog_sink};
use crate::harness::syslog::SyslogServer;
use crate::harness::{body, wait_until};

#[test]
fn json_says_which_lines_are_verified() {
    let sources = [
        source("us", PATH, "signatures = \"accept-unsigned\""),
        source("off", "/off", "signatures = \"off\""),
    ];
    let sinks = [
        sink("verified", "json", "\"verified\""),
        sink("unverified", "json", "\"unverified\""),
        sink("all", "json", "[\"verified\", \"unverified\", \"quarantine\"]"),
    ];
    let site = Site::new().sources(&sources.concat()).sinks(&sinks.concat());
    let daemon = Daemon::start(&site);
    let signed = site.producer.event(0);
    let unsigned = cef(1, "rt=1684454619000");
    assert_eq!(daemon.deliver(&[&signed, &unsigned]).accepted, 2);
    // This source does not check signatures, valid or not.
    assert_eq!(Receipt::of(&daemon.post_to("/off", None, &body(&[&signed, &unsigned]))).accepted, 2);
    daemon.settle();
    daemon.terminate();
    let found = |name: &str| -> Vec<(String, bool, bool, String)> {
        objects(&site.read(name))
            .into_iter()
            .map(|line| {
                let text = |key: &str| line[key].as_str().unwrap().to_owned();
                (text("source"), line["verified"].as_bool().unwrap(), line["key_id"].is_string(), text("raw"))
            })
            .collect()
    };
    let verified = ("us".to_owned(), true, true, signed.clone());
    let unverified = [
        ("us".to_owned(), false, false, unsigned.clone()),
        ("off".to_owned(), false, false, signed),
        ("off".to_owned(), false, false, unsigned),
    ];
    assert_eq!(found("verified.jsonl"), std::slice::from_ref(&verified));
    assert_eq!(found("unverified.jsonl"), unverified);
    assert_eq!(found("all.jsonl"), [&[verified], &unverified[..]].concat());
}

#[test]
fn the_quarantine_goes_into_a_database_and_to_a_syslog_server() {
    let port = ReservedPort::new();
    let server = SyslogServer::start(&port);
    let sinks = [
        sink("quarantine", "json", "\"quarantine\""),
        sqlite_sink("search.db", "[\"verified\", \"quarantine\"]"),
        syslog_sink(&format!("tcp://127.0.0.1:{}", port.number()), "stream = \"quarantine\"\n"),
    ];
    let site = Site::new().sinks(&sinks.concat());
    let daemon = Daemon::start(&site);
    let signed = site.producer.event(0);
    let lines = [signed.clone(), cef(1, "rt=1684454619000"), "not an event".to_owned()];
    let receipt = Receipt { accepted: 1, duplicates: 0, quarantined: 2 };
    assert_eq!(daemon.deliver(&lines), receipt);
    assert_eq!(daemon.post(Some("gzip"), b"\xffno gzip").status, 400);
    daemon.settle();
    daemon.terminate();

    let in_file = objects(&site.read("quarantine.jsonl"));
    let reasons: Vec<&str> = in_file.iter().map(|line| line["reason"].as_str().unwrap()).collect();
    assert_eq!(reasons, ["unsigned", "malformed", "undecodable_body"]);
    let sent = wait_until("the server has the quarantine", || {
        let messages = server.messages();
        if messages.len() == 3 { Ok(messages) } else { Err(format!("{messages:?}")) }
    });
    let sent: Vec<Value> = sent.iter().map(|message| serde_json::from_str(message).unwrap()).collect();
    assert_eq!(sent, in_file);

    let database = Connection::open(site.path("search.db")).unwrap();
    let texts = |sql: &str| -> Vec<Vec<u8>> {
        let mut find = database.prepare(sql).unwrap();
        let rows = find.query_map([], |row| row.get(0)).unwrap();
        rows.collect::<Result<_, _>>().unwrap()
    };
    let bytes = |text: &str| text.as_bytes().to_vec();
    assert_eq!(texts("SELECT CAST(raw AS BLOB) FROM events"), [bytes(&signed)]);
    let reasons: Vec<Vec<u8>> = reasons.iter().map(|reason| bytes(reason)).collect();
    assert_eq!(texts("SELECT CAST(reason AS BLOB) FROM quarantine ORDER BY id"), reasons);
    let raws = [bytes(&lines[1]), bytes(&lines[2]), b"\xffno gzip".to_vec()];
    assert_eq!(texts("SELECT CAST(raw AS BLOB) FROM quarantine ORDER BY id"), raws);
}
