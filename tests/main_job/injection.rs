//! Log injection: whoever chooses `user_agent`, `request` and `query` chooses no field of his own event and none of
//! another, breaks no line of any sink, and steers nobody's terminal.

use std::collections::BTreeMap;

use rusqlite::Connection;
use serde_json::{Value, json};

use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::programs::auditgate;
use crate::harness::records::{objects, quarantine};
use crate::harness::sign::{Producer, jwks};
use crate::harness::site::{PATH, Site, sink, source};
use crate::harness::syslog::{Framing, SyslogServer, free_port};
use crate::harness::{PATIENCE, body, wait_until};

/// The name of the key: whoever serves the key set chooses it.
const KID: &str = "k\u{1b}]0;owned\u{7}\" ] \\ sig=\u{202e}\u{9b}31m";

/// What forges fields where a reader splits at ` key=`.
const FORGED_PAIRS: &str = "x sig=c2ln trace_id=1 org_id=evil principal_id=evil granted=true success=true status=200 \
     name=Authz.forged severity=10 event_ts=1999-01-01T00:00:00Z rt=1 kong_initiated=true portal_id=evil act=evil";

/// What forges another event where a reader splits lines or messages, each in the escapes that its format has.
const FORGED_EVENT: &str = "\\n2023-05-19T00:03:39Z konghq.com \
     CEF:0|KongInc|Konnect|1.0|konnect|Authz.forged|10| rt=1 granted\\=true\\r\\n<8>1 - forged - - - - forged 9 <8>1 - - - -";

/// What steers a terminal or turns the reading direction around, and what ends a text for some readers.
const CONTROLS: &str = "\u{1b}[2J\u{1b}]0;owned\u{7}\u{9b}31m\u{8}\u{7f}\r\u{202e}gpj.exe\u{2066}\u{2028}\u{2029}\u{85}\0\u{b}\u{c}tail";

/// What means something in the languages that the sinks speak.
const QUOTES: &str = r#"'); DROP TABLE events; -- " ] \" {"trace_id":"1","raw":"forged"} ${jndi:x} %s [auditgate@32473 source=\"x\"]"#;

/// A header that its event keeps, whatever its values say.
const AUTHENTICATION: &str = "2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|AUTHENTICATION_TYPE_PAT|\
     AUTHENTICATION_OUTCOME_FAILURE|4|rt=1684454619000 src=127.0.0.6";

/// An event, and what is true of it.
struct Case {
    line: String,
    trace: String,
    /// The keys that are in doubt.
    ambiguous: Vec<&'static str>,
    /// Free text, which is what it is.
    texts: Vec<(&'static str, String)>,
}

impl Case {
    /// In CEF the free text of `user_agent` is the last before the signature, as in Kong's examples; a `key=` in
    /// it is not escaped, since nobody knows whether Konnect does that.
    fn cef(
        producer: &Producer,
        number: usize,
        hostile: &str,
        ambiguous: &[&'static str],
        text: &str,
    ) -> Self {
        let line = format!(
            "{AUTHENTICATION} request=/r success=false org_id=o principal_id=p trace_id=77{number} user_agent={hostile}"
        );
        let line = producer.sign_cef(&line);
        let ambiguous = ambiguous.to_vec();
        Self { line, trace: format!("77{number}"), ambiguous, texts: vec![("user_agent", text.to_owned())] }
    }

    fn json(producer: &Producer, number: usize, hostile: &str, is_wrapped: bool) -> Self {
        let event = json!({
            "event_ts": "2023-05-19T00:03:39Z", "name": "AUTHENTICATION_OUTCOME_FAILURE", "severity": 4,
            "event_class_id": "AUTHENTICATION_TYPE_PAT", "rt": 1_684_454_619_000_u64, "success": false,
            "org_id": "o", "principal_id": "p", "trace_id": format!("77{number}"),
            "request": hostile, "query": hostile, "user_agent": hostile,
        });
        let signed = producer.sign_json(&event.to_string());
        let texts = ["request", "query", "user_agent"].map(|name| (name, hostile.to_owned())).to_vec();
        let line = if is_wrapped { format!("{{\"event\":{signed}}}") } else { signed };
        Self { line, trace: format!("77{number}"), ambiguous: Vec::new(), texts }
    }
}

/// Every hostile text in every format, with plain events between them.
fn cases(producer: &Producer) -> Vec<Case> {
    let long = format!("{} sig=x", "A\u{202e}".repeat(64_000));
    assert!(long.len() > 250 << 10);
    let mut cases = vec![
        Case::cef(
            producer,
            0,
            FORGED_PAIRS,
            &[
                "act",
                "event_ts",
                "granted",
                "kong_initiated",
                "name",
                "org_id",
                "portal_id",
                "principal_id",
                "rt",
                "severity",
                "sig",
                "status",
                "success",
                "trace_id",
            ],
            "x",
        ),
        Case::cef(producer, 1, "plain/1.0", &[], "plain/1.0"),
        Case::cef(producer, 2, FORGED_EVENT, &["rt"], {
            "\n2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|konnect|Authz.forged|10|"
        }),
        Case::cef(producer, 3, CONTROLS, &[], CONTROLS),
        Case::cef(producer, 4, QUOTES, &["source"], QUOTES.split_once(" source=").unwrap().0),
        Case::cef(producer, 5, &long, &["sig"], long.strip_suffix(" sig=x").unwrap()),
    ];
    for (index, hostile) in
        [FORGED_PAIRS, FORGED_EVENT, CONTROLS, QUOTES, "plain/1.0"].into_iter().enumerate()
    {
        cases.push(Case::json(producer, 10 + index, hostile, false));
        cases.push(Case::json(producer, 20 + index, &format!("{hostile}\n{FORGED_EVENT}"), true));
    }
    cases.push(Case::json(producer, 30, &"B\u{9b}".repeat(29_000), false));
    cases
}

/// Text that everybody may print, but for the ends of its lines.
#[track_caller]
fn harmless(what: &str, bytes: &[u8]) {
    let text = std::str::from_utf8(bytes).unwrap_or_else(|error| panic!("{what}: {error}"));
    let found = text.chars().find(|&character| {
        (character.is_control() && character != '\n')
            || matches!(character,
                '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    });
    assert_eq!(found, None, "{what} holds a control");
}

/// The sinks of every kind, with syslog servers on these ports.
fn every_sink(counted: u16, newline: u16) -> String {
    let syslog = |name: &str, port: u16, framing: &str| {
        format!(
            "[sinks.{name}]\ntype = \"syslog\"\naddress = \"tcp://127.0.0.1:{port}\"\nframing = \"{framing}\"\n\
             structured_data = true\nmax_size = \"1MiB\"\nstream = [\"verified\", \"quarantine\"]\n"
        )
    };
    [
        sink("verified", "raw", "\"verified\""),
        sink("events", "json", "\"verified\""),
        sink("quarantine", "json", "\"quarantine\""),
        "[sinks.search]\ntype = \"sqlite\"\npath = \"search.db\"\nstream = [\"verified\", \"quarantine\"]\n"
            .into(),
        syslog("counted", counted, "octet-counting"),
        syslog("newline", newline, "newline"),
    ]
    .concat()
}

#[test]
fn free_text_forges_nothing_in_any_sink() {
    let (counted_port, newline_port) = (free_port(), free_port());
    let counted = SyslogServer::start(counted_port);
    let newline = SyslogServer::start_with(newline_port, Framing::Newline);
    let site = Site::new().sinks(&every_sink(counted_port, newline_port));
    site.write("jwks.json", jwks(&[(KID, &site.producer.public())]));
    let cases = cases(&site.producer);
    let lines: Vec<&str> = cases.iter().map(|case| case.line.as_str()).collect();
    // And some that nobody signed, or that are no events.
    let stranger = Producer::new(9);
    let rejected: Vec<Vec<u8>> = vec![
        stranger.sign_cef(&format!("{AUTHENTICATION} user_agent={FORGED_PAIRS}")).into_bytes(),
        format!("{AUTHENTICATION} user_agent={CONTROLS}").into_bytes(),
        format!("{FORGED_EVENT}{CONTROLS}{QUOTES}").into_bytes(),
        [CONTROLS.as_bytes(), b"\xff\xfe\x9b31m", QUOTES.as_bytes()].concat(),
        format!("{{\"{CONTROLS}\":1").into_bytes(),
    ];

    let daemon = Daemon::start(&site);
    let accepted = lines.len() as u64;
    assert_eq!(daemon.deliver(&lines), Receipt { accepted, ..Receipt::default() });
    let quarantined = rejected.len() as u64;
    assert_eq!(daemon.deliver(&rejected), Receipt { quarantined, ..Receipt::default() });
    // Each is its own event, and the same when it comes again.
    let again = Receipt { duplicates: accepted + quarantined, ..Receipt::default() };
    let all: Vec<&[u8]> =
        lines.iter().map(|line| line.as_bytes()).chain(rejected.iter().map(Vec::as_slice)).collect();
    assert_eq!(daemon.deliver(&all), again);
    daemon.settle();
    let ours: Vec<(String, String)> = daemon.metrics().into_iter().collect();
    harmless("the metrics", format!("{ours:?}").as_bytes());
    daemon.signal("TERM");
    harmless("the log", body(&daemon.log_at_end()).as_slice());

    // Raw: byte for byte, one line an event.
    assert!(site.read("verified.log") == body(&lines), "verified.log holds the lines as they came");

    in_json(&site.read("events.jsonl"), &cases);
    let records = site.read("quarantine.jsonl");
    harmless("quarantine.jsonl", &records);
    let kept: Vec<Vec<u8>> = quarantine(&records).into_iter().map(|record| record.raw).collect();
    assert_eq!(kept, rejected);
    in_sqlite(&site, &cases, &rejected);
    for (name, server) in [("octet counting", &counted), ("newlines", &newline)] {
        let messages = wait_until(PATIENCE, "the server has every message", || {
            let messages = server.whole_messages();
            let wanted = cases.len() + rejected.len();
            if messages.len() >= wanted { Ok(messages) } else { Err(messages.len().to_string()) }
        });
        in_syslog(name, &messages, &cases, &records);
    }
}

fn in_json(bytes: &[u8], cases: &[Case]) {
    harmless("events.jsonl", bytes);
    let records = objects(bytes);
    assert_eq!(records.len(), cases.len());
    for (record, case) in records.iter().zip(cases) {
        assert_eq!(record["raw"], case.line);
        assert_eq!(record["source"], "us");
        assert_eq!(record["key_id"], KID);
        let ambiguous: Vec<&str> =
            record["ambiguous"].as_array().into_iter().flatten().map(|key| key.as_str().unwrap()).collect();
        assert_eq!(ambiguous, case.ambiguous);
        let event = &record["event"];
        let expected = [
            ("name", json!("AUTHENTICATION_OUTCOME_FAILURE")),
            ("severity", json!(4)),
            ("event_ts", json!("2023-05-19T00:03:39Z")),
            ("event_class_id", json!("AUTHENTICATION_TYPE_PAT")),
            ("rt", json!(1_684_454_619_000_u64)),
            ("success", json!(false)),
            ("org_id", json!("o")),
            ("principal_id", json!("p")),
            ("trace_id", json!(case.trace)),
        ];
        for (name, value) in expected {
            let is_header = ["name", "severity", "event_ts", "event_class_id"].contains(&name);
            // What is in doubt is no field; the header is never in doubt.
            let expected = if !is_header && ambiguous.contains(&name) { Value::Null } else { value };
            assert_eq!(event[name], expected, "{name} of {}", case.trace);
        }
        for (name, text) in &case.texts {
            assert_eq!(event[name], **text, "{name} of {}", case.trace);
        }
        for name in ["granted", "kong_initiated", "portal_id", "status", "act", "action"] {
            assert_eq!(event[name], Value::Null, "{name} of {}", case.trace);
        }
    }
}

fn in_sqlite(site: &Site, cases: &[Case], rejected: &[Vec<u8>]) {
    let database = Connection::open(site.path("search.db")).unwrap();
    let mut find = database
        .prepare(
            "SELECT name, severity, event_ts, trace_id, principal_id, success, granted, status, kong_initiated, \
             portal_id, act, rt, time, user_agent, source, key_id, verified, extra, raw FROM events ORDER BY id",
        )
        .unwrap();
    let names: Vec<String> = find.column_names().into_iter().map(str::to_owned).collect();
    let rows: Vec<BTreeMap<String, rusqlite::types::Value>> = find
        .query_map([], |row| {
            names.iter().enumerate().map(|(at, name)| Ok((name.clone(), row.get(at)?))).collect()
        })
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    assert_eq!(rows.len(), cases.len());
    for (row, case) in rows.iter().zip(cases) {
        let text = |name: &str| match &row[name] {
            rusqlite::types::Value::Null => None,
            rusqlite::types::Value::Text(text) => Some(text.clone()),
            rusqlite::types::Value::Integer(number) => Some(number.to_string()),
            other => panic!("{name}: {other:?}"),
        };
        let unless_in_doubt =
            |name: &str, value: &str| (!case.ambiguous.contains(&name)).then(|| value.to_owned());
        assert_eq!(text("raw").unwrap(), case.line);
        assert_eq!(text("source").unwrap(), "us");
        assert_eq!(text("key_id").unwrap(), KID);
        assert_eq!(text("verified").unwrap(), "1");
        assert_eq!(text("name").unwrap(), "AUTHENTICATION_OUTCOME_FAILURE");
        assert_eq!(text("severity").unwrap(), "4");
        assert_eq!(text("event_ts").unwrap(), "2023-05-19T00:03:39Z");
        assert_eq!(text("trace_id"), unless_in_doubt("trace_id", &case.trace));
        assert_eq!(text("principal_id"), unless_in_doubt("principal_id", "p"));
        assert_eq!(text("success"), unless_in_doubt("success", "0"));
        assert_eq!(text("rt"), unless_in_doubt("rt", "1684454619000"));
        assert_ne!(text("time").unwrap(), "1", "the forged time");
        for name in ["granted", "status", "kong_initiated", "portal_id", "act"] {
            assert_eq!(text(name), None, "{name} of {}", case.trace);
        }
        let user_agent = &case.texts.last().unwrap().1;
        assert!(text("user_agent").unwrap() == *user_agent, "user_agent of {}", case.trace);
        let extra = text("extra");
        harmless("extra", extra.as_deref().unwrap_or_default().as_bytes());
        let extra: Value = extra.map_or(Value::Null, |extra| serde_json::from_str(&extra).unwrap());
        assert_eq!(extra["ambiguous"] == Value::Null, case.ambiguous.is_empty(), "{extra}");
        assert_eq!(extra["event"], Value::Null);
    }
    let mut find = database.prepare("SELECT CAST(raw AS BLOB) FROM quarantine ORDER BY id").unwrap();
    let raws: Vec<Vec<u8>> = find.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(raws, rejected);
}

/// Whole messages (RFC 5424): priority, time, structured data and message.
fn in_syslog(framing: &str, messages: &[String], cases: &[Case], records: &[u8]) {
    let rejected: Vec<&[u8]> =
        records.split(|byte| *byte == b'\n').filter(|record| !record.is_empty()).collect();
    assert_eq!(messages.len(), cases.len() + rejected.len(), "{framing}");
    for (message, case) in messages.iter().zip(cases) {
        let (header, rest) = message.split_once(" [").unwrap();
        // local0 is 16; 4 is `notice`, which is 5. The forged 10 would be `error`.
        assert!(header.starts_with("<133>1 2023-05-19T00:03:39.000Z "), "{framing}: {header}");
        assert!(header.ends_with(" verified"), "{framing}: {header}");
        harmless("a syslog header", header.as_bytes());
        let trace = match case.ambiguous.contains(&"trace_id") {
            true => String::new(),
            false => format!(" trace_id=\"{}\"", case.trace),
        };
        let key = r#"k\\u{1b}\]0;owned\\u{7}\" \] \\ sig=\\u{202e}\\u{9b}31m"#;
        let data = format!("auditgate@32473 source=\"us\" key_id=\"{key}\"{trace}] ");
        let text =
            rest.strip_prefix(&data).unwrap_or_else(|| panic!("{framing}: {data} is not before {rest:.300}"));
        assert!(text == case.line, "{framing}: the message is the line");
    }
    for (message, record) in messages[cases.len()..].iter().zip(rejected) {
        harmless("a syslog message of the quarantine", message.as_bytes());
        assert!(message.starts_with("<132>1 ") && message.contains(" quarantine ["), "{framing}: {message}");
        assert!(message.as_bytes().ends_with(&[b"] ", record].concat()), "{framing}: {message}");
    }
}

#[test]
fn a_forged_trace_suppresses_no_event() {
    let by_trace = source("us", PATH, "dedup = { by = \"trace_id\" }");
    let site = Site::new().sources(&by_trace);
    let daemon = Daemon::start(&site);
    let event = |trace: &str, agent: &str| {
        site.producer.sign_cef(&format!(
            "{AUTHENTICATION} request=/r success=false org_id=o principal_id=p trace_id={trace} user_agent={agent}"
        ))
    };
    // The forger comes first, and claims the trace of the event that he wants to be thrown away.
    let forged = event("1", "x trace_id=2 org_id=o");
    let also_forged = event("3", "x org_id=o trace_id=2 trace_id=2");
    let genuine = event("2", "browser");
    for line in [&forged, &also_forged, &genuine] {
        assert_eq!(daemon.deliver(&[line]), Receipt { accepted: 1, ..Receipt::default() }, "{line}");
    }
    // A second event of the genuine trace is what the operator asked to be one.
    assert_eq!(daemon.deliver(&[event("2", "other")]).duplicates, 1);
    // What is in doubt is told apart by its bytes.
    assert_eq!(daemon.deliver(&[&forged]).duplicates, 1);
    assert_eq!(daemon.deliver(&[event("1", "y trace_id=2 org_id=o")]).accepted, 1);
}

#[test]
fn verify_steers_no_terminal() {
    let site = Site::new();
    site.write("jwks.json", jwks(&[(KID, &site.producer.public())]));
    let mut lines: Vec<String> = cases(&site.producer).into_iter().map(|case| case.line).collect();
    let good = lines.len();
    // A changed one for each, two without a signature, and two that are no events.
    for line in 0..good {
        lines.push(lines[line].replacen("principal_id", "principal_iD", 1));
    }
    lines.push(format!("{AUTHENTICATION} user_agent={CONTROLS}"));
    lines.push(format!("{CONTROLS}{FORGED_EVENT}"));
    lines.push(format!("{{\"{CONTROLS}\":{CONTROLS}"));
    let mut bytes = body(&lines);
    bytes.extend_from_slice(b"\xff\x1b[31m\n");
    // Whoever writes into the directory chooses the names in it.
    let name = "saved\u{1b}[31m\u{202e}.log";
    site.write(name, &bytes);
    let run = |arguments: &[&str]| {
        let mut command = auditgate();
        command.arg("verify").arg("--jwks").arg(site.path("jwks.json")).args(arguments);
        let output = command.output().unwrap();
        harmless(&format!("stdout of {arguments:?}"), &output.stdout);
        harmless(&format!("stderr of {arguments:?}"), &output.stderr);
        output
    };
    let path = site.path(name);
    let path = path.to_str().unwrap();

    let output = run(&[path]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    let sums = format!("good {good}, bad {good}, unsigned 2, malformed 2\n");
    assert!(text.ends_with(&sums), "{sums} is not at the end of {text}");
    // One line for each finding, under its own number.
    assert_eq!(text.lines().count(), good + 4 + 1);
    for (index, line) in text.lines().take(good + 4).enumerate() {
        assert!(line.contains(&format!(".log:{}: ", good + 1 + index)), "{line}");
    }

    let output = run(&["--json", path]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["findings"].as_array().unwrap().len(), good + 4);
    assert_eq!(report["findings"][0]["file"], path);
    assert_eq!(report["keys"][0]["kid"], KID);
    assert_eq!(report["good"], good);

    for number in 1..=lines.len() + 1 {
        let place = format!("{path}:{number}");
        run(&["--explain", &place]);
        let output = run(&["--explain", &place, "--json"]);
        let said: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(said["verdict"] == "good", number <= good, "{said:.300}");
    }
    // And what is said of a file that is not there.
    let missing = site.path("no\u{1b}[31m\u{202e}ne.log");
    assert_ne!(run(&[missing.to_str().unwrap()]).status.code(), Some(0));
    run(&["--explain", &format!("{}:7", missing.display())]);
}
