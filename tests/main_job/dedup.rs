//! An event that was accepted once is never delivered again.

use std::collections::BTreeMap;

use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::records::{objects, quarantine};
use crate::harness::sign::{self, Producer};
use crate::harness::site::{PATH, Site, raw_and_json_sinks, sink, source};
use crate::harness::{body, gzip};

const LINE_LIMIT: usize = 4096;

/// Returns lines of every kind, each with the reason of its rejection; `None` is verified.
fn mixed(producer: &Producer) -> Vec<(String, Option<&'static str>)> {
    let good = |line: &str| (producer.sign_cef(line), None);
    let mut lines: Vec<_> = producer.events(0..60).into_iter().map(|line| (line, None)).collect();
    lines.push(good(&sign::cef(1000, "rt=3958q3097698")));
    lines.push(good(&sign::cef(1001, "rt=")));
    lines.push(good(&sign::cef(1002, "rt=-1")));
    lines.push(good(&sign::cef(1003, "rt=9223372036854775807")));
    lines.push(good(&sign::cef(1004, "")));
    // No time: neither `rt` nor a time stamp.
    lines.push(good("CEF:0|KongInc|Konnect|1.0|konnect|Authz.usage|1|trace_id=1005 user_agent=x"));
    lines.push((producer.sign_json(r#"{"name":"Ingress","trace_id":"1006"}"#), None));
    lines.push((sign::cef(2000, "rt=1684454619000"), Some("unsigned")));
    lines.push((sign::json(2001, 1_684_454_619_000), Some("unsigned")));
    lines.push((Producer::new(2).event(2002), Some("bad_signature")));
    lines.push((producer.event(2003).replace("2003", "2004"), Some("bad_signature")));
    lines.push(("no event at all".to_owned(), Some("malformed")));
    lines.push(("{\"torn\":".to_owned(), Some("malformed")));
    let long = sign::cef(2005, &format!("rt=1 request=/{}", "x".repeat(LINE_LIMIT)));
    lines.push((producer.sign_cef(&long), Some("line_too_long")));
    lines
}

#[test]
fn a_repeat_changes_no_byte_of_any_file() {
    let site = Site::new().limits(&format!("line = \"{LINE_LIMIT}B\"")).sinks(&raw_and_json_sinks());
    let mixed = mixed(&site.producer);
    let lines: Vec<&str> = mixed.iter().map(|(line, _)| line.as_str()).collect();
    let good: Vec<&str> =
        mixed.iter().filter(|(_, reason)| reason.is_none()).map(|(line, _)| line.as_str()).collect();
    let files = || ["verified.log", "events.jsonl", "quarantine.jsonl"].map(|name| site.read(name));
    let only_repeats = Receipt { duplicates: lines.len() as u64, ..Receipt::default() };

    let daemon = Daemon::start(&site);
    let first = daemon.deliver(&lines);
    let quarantined = (lines.len() - good.len()) as u64;
    assert_eq!(first, Receipt { accepted: good.len() as u64, quarantined, duplicates: 0 });
    daemon.settle();
    let expected = files();
    assert_eq!(site.verified(), good);
    let rejected: Vec<_> = mixed
        .iter()
        .filter_map(|(line, reason)| Some((reason.as_deref()?.to_owned(), line.clone().into_bytes())))
        .collect();
    let found: Vec<_> =
        quarantine(&expected[2]).into_iter().map(|record| (record.reason, record.raw)).collect();
    assert_eq!(found, rejected);

    let repeat = |daemon: &Daemon<'_>| {
        assert_eq!(daemon.deliver(&lines), only_repeats);
        daemon.settle();
        assert!(files() == expected, "a repeat changed a file");
    };
    (0..4).for_each(|_| repeat(&daemon));
    daemon.terminate();
    let daemon = Daemon::start(&site);
    repeat(&daemon);
    daemon.kill9();
    let daemon = Daemon::start(&site);
    repeat(&daemon);

    // The same lines in other batches, in another order, with other codings.
    for (stride, coding) in [(7, None), (11, Some("gzip")), (13, Some("identity")), (5, Some("x-gzip"))] {
        let shuffled: Vec<&str> = (0..lines.len()).map(|at| lines[at * stride % lines.len()]).collect();
        for part in shuffled.chunks(stride) {
            let plain = body(part);
            let bytes = match coding {
                Some("gzip") => gzip(&plain),
                // One member for each half.
                Some("x-gzip") => [gzip(&plain[..plain.len() / 2]), gzip(&plain[plain.len() / 2..])].concat(),
                _ => plain,
            };
            let receipt = Receipt::of(&daemon.post(coding, &bytes));
            assert_eq!(receipt, Receipt { duplicates: part.len() as u64, ..Receipt::default() });
        }
    }
    daemon.settle();
    daemon.terminate();
    assert!(files() == expected, "a shuffled repeat changed a file");
}

#[test]
fn the_sum_of_every_receipt_is_the_number_of_lines_within_one_batch_too() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let event = site.producer.event(1);
    let receipt = daemon.deliver(&[&event, &event, "not an event", "not an event", &event]);
    assert_eq!(receipt, Receipt { accepted: 1, duplicates: 3, quarantined: 1 });
    daemon.settle();
    assert_eq!(site.verified(), [event]);
}

#[test]
fn events_of_one_request_share_a_trace_and_all_arrive() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let of_one_request = [
        site.producer.sign_cef(&sign::cef(77, "rt=1684454619000")),
        site.producer.sign_cef(&sign::cef(77, "rt=1684454619001")),
        site.producer.sign_json(&sign::json(77, 1_684_454_619_000)),
    ];
    assert_eq!(daemon.deliver(&of_one_request).accepted, 3);
    daemon.settle();
    assert_eq!(site.verified(), of_one_request);
}

#[test]
fn a_damaged_or_unsigned_copy_does_not_suppress_the_genuine_event() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    for number in 0..3 {
        let genuine = site.producer.event(number);
        let (open, signature) = genuine.rsplit_once("sig").unwrap();
        let last = signature.rfind(|character: char| character.is_ascii_alphanumeric()).unwrap();
        let mut damaged = signature.to_owned();
        // All bits of the signature's first digit are part of the signature.
        let at = signature.find(|character: char| character.is_ascii_alphanumeric()).unwrap();
        assert!(at < last);
        damaged.replace_range(at..=at, if &signature[at..=at] == "A" { "B" } else { "A" });
        let damaged = format!("{open}sig{damaged}");
        let unsigned = match number {
            0 => sign::cef(0, "rt=1684454619000"),
            1 => sign::json(1, 1_684_454_619_001),
            _ => format!("{{\"event\":{}}}", sign::json(2, 1_684_454_619_002)),
        };
        for copy in [&damaged, &unsigned] {
            assert_eq!(daemon.deliver(&[copy]), Receipt { quarantined: 1, ..Receipt::default() });
        }
        assert_eq!(daemon.deliver(&[&genuine]), Receipt { accepted: 1, ..Receipt::default() });
        assert_eq!(daemon.deliver(&[&damaged, &genuine]).duplicates, 2);
    }
    daemon.settle();
    assert_eq!(site.verified(), site.producer.events(0..3));
}

#[test]
fn by_trace_id_keeps_one_event_of_a_request() {
    let site = Site::new().sources(&source("us", PATH, "dedup = { by = \"trace_id\", window = \"8d\" }"));
    let daemon = Daemon::start(&site);
    let sign = |line: &str| site.producer.sign_cef(line);
    let first = sign(&sign::cef(1, "rt=1684454619000"));
    let same_trace = sign(&sign::cef(1, "rt=1684454619001"));
    let other_organisation = sign(&sign::cef(1, "rt=1684454619002").replace("b065b594", "other"));
    let without = |rt: u32| sign(&sign::cef(1, &format!("rt={rt}")).replace("trace_id=1 ", ""));
    let empty = |rt: u32| sign(&sign::cef(1, &format!("rt={rt}")).replace("trace_id=1 ", "trace_id= "));
    let ambiguous = |rt: u32| sign(&format!("{} trace_id=1", sign::cef(1, &format!("rt={rt}"))));
    let sent = [
        first,
        same_trace,
        other_organisation,
        without(1),
        without(2),
        without(1),
        empty(1),
        empty(2),
        ambiguous(1),
        ambiguous(2),
        ambiguous(1),
    ];
    assert_eq!(daemon.deliver(&sent), Receipt { accepted: 8, duplicates: 3, quarantined: 0 });
    daemon.settle();
    let kept: Vec<_> = [0, 2, 3, 4, 6, 7, 8, 9].iter().map(|at| sent[*at].clone()).collect();
    assert_eq!(site.verified(), kept);
    daemon.terminate();
    let daemon = Daemon::start(&site);
    assert_eq!(daemon.deliver(&sent).duplicates, 11);
    daemon.settle();
    assert_eq!(site.verified(), kept);
}

#[test]
fn a_source_cannot_suppress_the_events_of_another() {
    let site =
        Site::new().sources(&[source("us", PATH, ""), source("eu", "/konnect/eu", "")].concat()).sinks(
            &[
                sink("verified", "json", "\"verified\""),
                sink("quarantine", "json", "\"quarantine\""),
                sink("of_eu", "raw", "\"verified\"") + "sources = [\"eu\"]\n",
            ]
            .concat(),
        );
    let daemon = Daemon::start(&site);
    let lines = site.producer.events(0..3);
    for path in [PATH, "/konnect/eu"] {
        let answer = daemon.post_to(path, None, &body(&lines));
        assert_eq!(Receipt::of(&answer), Receipt { accepted: 3, ..Receipt::default() });
    }
    daemon.settle();
    assert_eq!(site.read("of_eu.log"), body(&lines));
    let mut counts = BTreeMap::new();
    for record in objects(&site.read("verified.jsonl")) {
        *counts.entry(record["source"].to_string()).or_insert(0) += 1;
    }
    assert_eq!(counts, BTreeMap::from([("\"eu\"".to_owned(), 3), ("\"us\"".to_owned(), 3)]));
}
