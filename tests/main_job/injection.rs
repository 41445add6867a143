//! Log injection: a caller that chooses `user_agent`, `request` and `query` can forge no other
//! field and no other event, can break no line of any sink, and can send no control character to a
//! reader's terminal.

use std::collections::BTreeMap;

use rusqlite::Connection;
use rusqlite::types::Value as Held;
use serde_json::{Value, json};

use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::machine::ReservedPort;
use crate::harness::programs::auditgate;
use crate::harness::records::{objects, quarantine};
use crate::harness::sign::{Producer, jwks};
use crate::harness::site::{PATH, Site, raw_and_json_sinks, source, sqlite_sink};
use crate::harness::syslog::{Framing, SyslogServer};
use crate::harness::{body, wait_until};

/// Name of the key, which the key server chooses.
const KID: &str = "k\u{1b}]0;owned\u{7}\" ] \\ sig=\u{202e}\u{9b}31m";

/// Text that forges fields for a reader that splits at ` key=`.
const FORGED_PAIRS: &str = "x sig=c2ln trace_id=1 org_id=evil principal_id=evil granted=true success=true status=200 \
     name=Authz.forged severity=10 event_ts=1999-01-01T00:00:00Z rt=1 kong_initiated=true portal_id=evil act=evil";

/// Text that forges another event for a reader that splits lines or messages, in the escapes of
/// each format.
const FORGED_EVENT: &str = "\\n2023-05-19T00:03:39Z konghq.com \
     CEF:0|KongInc|Konnect|1.0|konnect|Authz.forged|10| rt=1 granted\\=true\\r\\n<8>1 - forged - - - - forged 9 <8>1 - - - -";

/// Characters that control a terminal, change the text direction, or end a text for some readers.
const CONTROLS: &str = "\u{1b}[2J\u{1b}]0;owned\u{7}\u{9b}31m\u{8}\u{7f}\r\u{202e}gpj.exe\u{2066}\u{2028}\u{2029}\u{85}\0\u{b}\u{c}tail";

/// Text with a meaning in SQL, JSON, syslog and others.
const QUOTES: &str = r#"'); DROP TABLE events; -- " ] \" {"trace_id":"1","raw":"forged"} ${jndi:x} %s [auditgate@32473 source=\"x\"]"#;

/// Headers; no value can change their fields.
const AUTHENTICATION: &str = "2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|AUTHENTICATION_TYPE_PAT|\
     AUTHENTICATION_OUTCOME_FAILURE|4|rt=1684454619000 src=127.0.0.6";
const ACCESS: &str = "2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|KongGateway|Ingress|4|\
     rt=1684454619000 src=127.0.0.6";

/// Fields worth forging.
const WANTED: [&str; 16] = [
    "act",
    "event_class_id",
    "event_ts",
    "granted",
    "kong_initiated",
    "name",
    "org_id",
    "portal_id",
    "principal_id",
    "query",
    "request",
    "rt",
    "severity",
    "status",
    "success",
    "trace_id",
];

/// A line, and what must be read in it.
struct Case {
    line: String,
    /// The event's true fields.
    truth: BTreeMap<&'static str, Value>,
    /// The keys that are ambiguous, sorted.
    ambiguous: Vec<&'static str>,
}

/// Text that a caller chooses.
struct Hostile {
    text: String,
    /// The text without the escapes of CEF.
    meant: String,
    /// Words in it that look like keys.
    keys: Vec<&'static str>,
}

impl Hostile {
    fn new(text: &str, keys: &[&'static str]) -> Self {
        let meant = text.replace("\\n", "\n").replace("\\r", "\r").replace("\\=", "=");
        Self { text: text.to_owned(), meant, keys: keys.to_vec() }
    }

    /// Returns whether it contains every key at which other free text could end.
    fn has_every_end(&self) -> bool {
        self.keys.contains(&"success")
    }

    /// Returns the keys that it makes ambiguous as the value of these keys.
    fn ambiguous(&self, values: &[&'static str]) -> Vec<&'static str> {
        let mut keys = self.keys.clone();
        if !keys.is_empty() {
            keys.extend(values);
        }
        keys.sort_unstable();
        keys
    }
}

impl Case {
    fn of(line: String, fields: &Value, ambiguous: Vec<&'static str>) -> Self {
        let event = json!({
            "event_ts": "2023-05-19T00:03:39Z", "severity": 4, "rt": 1_684_454_619_000_u64,
        });
        let mut truth = BTreeMap::new();
        for name in WANTED.into_iter().chain(["user_agent"]) {
            let value =
                [fields, &event].into_iter().map(|values| &values[name]).find(|value| !value.is_null());
            truth.extend(value.map(|value| (name, value.clone())));
        }
        Self { line, truth, ambiguous }
    }

    /// An authentication event in CEF, `user_agent` last. A `key=` in a value is not escaped, as it
    /// is not documented whether Konnect does that.
    fn authentication(producer: &Producer, number: usize, hostile: &Hostile) -> Self {
        let between = format!("success=false org_id=o principal_id=p trace_id=77{number}");
        let line = format!("{AUTHENTICATION} request=/r {between} user_agent={}", hostile.text);
        let mut fields = json!({
            "name": "AUTHENTICATION_OUTCOME_FAILURE", "event_class_id": "AUTHENTICATION_TYPE_PAT",
            "user_agent": hostile.meant, "request": "/r",
        });
        let mut ambiguous = vec!["user_agent"];
        if hostile.has_every_end() {
            fields["request"] = format!("/r {between}").into();
            ambiguous.push("request");
        } else {
            for (name, value) in [
                ("success", json!(false)),
                ("org_id", json!("o")),
                ("principal_id", json!("p")),
                ("trace_id", format!("77{number}").into()),
            ] {
                fields[name] = value;
            }
        }
        Self::of(producer.sign_cef(&line), &fields, hostile.ambiguous(&ambiguous))
    }

    /// An access event in CEF with the hostile text in all three of its values.
    fn access(producer: &Producer, number: usize, hostile: &Hostile) -> Self {
        let (text, meant) = (&hostile.text, &hostile.meant);
        let line = format!(
            "{ACCESS} request={text} act=POST status=200 org_id=o principal_id=p user_agent={text} \
             trace_id=77{number} query={text}"
        );
        let mut fields = json!({
            "name": "Ingress", "event_class_id": "KongGateway", "request": meant, "user_agent": meant, "query": meant,
        });
        if hostile.has_every_end() {
            fields["request"] = format!("{meant} act=POST status=200 org_id=o principal_id=p").into();
            fields["user_agent"] = format!("{meant} trace_id=77{number}").into();
        } else {
            for (name, value) in [
                ("act", json!("POST")),
                ("status", json!(200)),
                ("org_id", json!("o")),
                ("principal_id", json!("p")),
                ("trace_id", format!("77{number}").into()),
            ] {
                fields[name] = value;
            }
        }
        Self::of(producer.sign_cef(&line), &fields, hostile.ambiguous(&["query", "request", "user_agent"]))
    }

    /// An event in JSON or CPS with the hostile text in all three of its values.
    fn json(producer: &Producer, number: usize, hostile: &str, is_wrapped: bool) -> Self {
        let fields = json!({
            "event_ts": "2023-05-19T00:03:39Z", "name": "AUTHENTICATION_OUTCOME_FAILURE", "severity": 4,
            "event_class_id": "AUTHENTICATION_TYPE_PAT", "rt": 1_684_454_619_000_u64, "success": false,
            "org_id": "o", "principal_id": "p", "trace_id": format!("77{number}"),
            "request": hostile, "query": hostile, "user_agent": hostile,
        });
        let signed = producer.sign_json(&fields.to_string());
        let line = if is_wrapped { format!("{{\"event\":{signed}}}") } else { signed };
        Self::of(line, &fields, Vec::new())
    }
}

/// Returns every hostile text in every format, with plain events in between.
fn cases(producer: &Producer) -> Vec<Case> {
    let long = format!("{} sig=x", "A\u{202e}".repeat(64_000));
    assert!(long.len() > 250 << 10);
    let every = [
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
    ];
    let mut cases = Vec::new();
    for (number, hostile) in [
        Hostile::new(FORGED_PAIRS, &every),
        Hostile::new("plain/1.0", &[]),
        Hostile::new(FORGED_EVENT, &["rt"]),
        Hostile::new(CONTROLS, &[]),
        Hostile::new(QUOTES, &["source"]),
    ]
    .iter()
    .enumerate()
    {
        cases.push(Case::authentication(producer, number, hostile));
        cases.push(Case::access(producer, 10 + number, hostile));
        cases.push(Case::json(producer, 20 + number, &hostile.text, false));
        cases.push(Case::json(producer, 30 + number, &format!("{}\n{FORGED_EVENT}", hostile.text), true));
    }
    cases.push(Case::authentication(producer, 40, &Hostile::new(&long, &["sig"])));
    cases.push(Case::json(producer, 41, &"B\u{9b}".repeat(29_000), false));
    cases
}

/// Checks that a text has no control or formatting character but line feeds.
#[track_caller]
fn assert_harmless(what: &str, bytes: &[u8]) {
    let text = std::str::from_utf8(bytes).unwrap_or_else(|error| panic!("{what}: {error}"));
    let found = text.chars().find(|&character| {
        (character.is_control() && character != '\n')
            || matches!(character,
                '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    });
    assert_eq!(found, None, "{what} holds a control");
}

/// Returns sinks of every kind, with syslog servers on these ports.
fn every_sink(counted: u16, newline: u16) -> String {
    let syslog = |name: &str, port: u16, framing: &str| {
        format!(
            "[sinks.{name}]\ntype = \"syslog\"\naddress = \"tcp://127.0.0.1:{port}\"\nframing = \"{framing}\"\n\
             structured_data = true\nmax_size = \"1MiB\"\nstream = [\"verified\", \"quarantine\"]\n"
        )
    };
    [
        raw_and_json_sinks(),
        sqlite_sink("search.db", "[\"verified\", \"quarantine\"]"),
        syslog("counted", counted, "octet-counting"),
        syslog("newline", newline, "newline"),
    ]
    .concat()
}

#[test]
fn free_text_forges_nothing_in_any_sink() {
    let (counted_port, newline_port) = (ReservedPort::new(), ReservedPort::new());
    let counted = SyslogServer::start(&counted_port);
    let newline = SyslogServer::start_with(&newline_port, Framing::Newline);
    let site = Site::new().sinks(&every_sink(counted_port.number(), newline_port.number()));
    site.write("jwks.json", jwks(&[(KID, &site.producer.public())]));
    let cases = cases(&site.producer);
    let lines: Vec<&str> = cases.iter().map(|case| case.line.as_str()).collect();
    // Lines without a valid signature, and lines that are not events.
    let unknown = Producer::new(9);
    let rejected: Vec<Vec<u8>> = vec![
        unknown.sign_cef(&format!("{AUTHENTICATION} user_agent={FORGED_PAIRS}")).into_bytes(),
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
    // Each is an event of its own, and a duplicate when it is posted again.
    let again = Receipt { duplicates: accepted + quarantined, ..Receipt::default() };
    let all: Vec<&[u8]> =
        lines.iter().map(|line| line.as_bytes()).chain(rejected.iter().map(Vec::as_slice)).collect();
    assert_eq!(daemon.deliver(&all), again);
    daemon.settle();
    let ours: Vec<(String, String)> = daemon.metrics().into_iter().collect();
    assert_harmless("the metrics", format!("{ours:?}").as_bytes());
    daemon.signal("TERM");
    assert_harmless("the log", body(&daemon.log_at_end()).as_slice());

    // Raw: byte for byte, one line per event.
    assert!(site.read("verified.log") == body(&lines), "verified.log holds the lines as they came");

    assert_json(&site.read("events.jsonl"), &cases);
    let records = site.read("quarantine.jsonl");
    assert_harmless("quarantine.jsonl", &records);
    let kept: Vec<Vec<u8>> = quarantine(&records).into_iter().map(|record| record.raw).collect();
    assert_eq!(kept, rejected);
    assert_rows(&site, &cases, &rejected);
    for (name, server) in [("octet counting", &counted), ("newlines", &newline)] {
        let messages = wait_until("the server has every message", || {
            let messages = server.whole_messages();
            let wanted = cases.len() + rejected.len();
            if messages.len() >= wanted { Ok(messages) } else { Err(messages.len().to_string()) }
        });
        assert_messages(name, &messages, &cases, &records);
    }
}

/// Checks the JSON lines.
fn assert_json(bytes: &[u8], cases: &[Case]) {
    assert_harmless("events.jsonl", bytes);
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
        for name in WANTED {
            assert_eq!(
                &event[name],
                case.truth.get(name).unwrap_or(&Value::Null),
                "{name} of {:.300}",
                case.line
            );
        }
        assert_eq!(event["user_agent"], case.truth["user_agent"]);
    }
}

/// Checks the rows of the database.
fn assert_rows(site: &Site, cases: &[Case], rejected: &[Vec<u8>]) {
    let database = Connection::open(site.path("search.db")).unwrap();
    let columns = format!(
        "user_agent, source, key_id, verified, extra, CAST(raw AS TEXT) AS raw, time, {}",
        WANTED.join(", ")
    );
    let mut find = database.prepare(&format!("SELECT {columns} FROM events ORDER BY id")).unwrap();
    let names: Vec<&str> = columns.split(", ").map(|column| column.rsplit(' ').next().unwrap()).collect();
    let rows: Vec<BTreeMap<&str, Value>> = find
        .query_map([], |row| {
            names.iter().enumerate().map(|(at, name)| Ok((*name, column(row, at)?))).collect()
        })
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    assert_eq!(rows.len(), cases.len());
    for (row, case) in rows.iter().zip(cases) {
        assert_eq!(row["raw"], case.line);
        assert_eq!(
            (&row["source"], &row["key_id"], &row["verified"]),
            (&json!("us"), &json!(KID), &json!(1))
        );
        for name in WANTED.into_iter().chain(["user_agent"]) {
            let expected = match case.truth.get(name) {
                Some(Value::Bool(value)) => json!(u8::from(*value)),
                // A NUL character would hide the text behind it.
                Some(Value::String(text)) => text.replace('\0', "\\u0000").into(),
                Some(value) => value.clone(),
                None => Value::Null,
            };
            assert_eq!(row[name], expected, "{name} of {:.300}", case.line);
        }
        assert_ne!(row["time"], 1, "the forged time");
        let extra = row["extra"].as_str().unwrap_or("null");
        assert_harmless("extra", extra.as_bytes());
        let extra: Value = serde_json::from_str(extra).unwrap();
        let ambiguous = if case.ambiguous.is_empty() { Value::Null } else { json!(case.ambiguous) };
        assert_eq!(extra["ambiguous"], ambiguous);
    }
    let mut find = database.prepare("SELECT CAST(raw AS BLOB) FROM quarantine ORDER BY id").unwrap();
    let raws: Vec<Vec<u8>> = find.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(raws, rejected);
}

fn column(row: &rusqlite::Row<'_>, at: usize) -> rusqlite::Result<Value> {
    Ok(match row.get(at)? {
        Held::Null => Value::Null,
        Held::Integer(number) => json!(number),
        Held::Text(text) => json!(text),
        other => panic!("{other:?}"),
    })
}

/// Checks whole messages (RFC 5424): priority, time, structured data and message.
fn assert_messages(framing: &str, messages: &[String], cases: &[Case], records: &[u8]) {
    let rejected: Vec<&[u8]> =
        records.split(|byte| *byte == b'\n').filter(|record| !record.is_empty()).collect();
    assert_eq!(messages.len(), cases.len() + rejected.len(), "{framing}");
    for (message, case) in messages.iter().zip(cases) {
        let (header, rest) = message.split_once(" [").unwrap();
        // local0 (16) and notice (5), from severity 4. The forged 10 would be error (3).
        assert!(header.starts_with("<133>1 2023-05-19T00:03:39.000Z "), "{framing}: {header}");
        assert!(header.ends_with(" verified"), "{framing}: {header}");
        assert_harmless("a syslog header", header.as_bytes());
        let is_clear = !["org_id", "trace_id"].iter().any(|key| case.ambiguous.contains(key));
        let trace = case.truth.get("trace_id").and_then(Value::as_str).filter(|_| is_clear);
        let trace = trace.map_or_else(String::new, |trace| format!(" trace_id=\"{trace}\""));
        let key = r#"k\\u{1b}\]0;owned\\u{7}\" \] \\ sig=\\u{202e}\\u{9b}31m"#;
        let data = format!("auditgate@32473 source=\"us\" key_id=\"{key}\"{trace}] ");
        let text =
            rest.strip_prefix(&data).unwrap_or_else(|| panic!("{framing}: {data} is not before {rest:.300}"));
        assert!(text == case.line, "{framing}: the message is the line");
    }
    for (message, record) in messages[cases.len()..].iter().zip(rejected) {
        assert_harmless("a syslog message of the quarantine", message.as_bytes());
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
    // The forged events come first, and claim the trace of the genuine event.
    let forged = event("1", "x trace_id=2 org_id=o");
    let also_forged = event("3", "x org_id=o trace_id=2 trace_id=2");
    let genuine = event("2", "browser");
    for line in [&forged, &also_forged, &genuine] {
        assert_eq!(daemon.deliver(&[line]), Receipt { accepted: 1, ..Receipt::default() }, "{line}");
    }
    // A second event of the genuine trace is a duplicate, as configured.
    assert_eq!(daemon.deliver(&[event("2", "other")]).duplicates, 1);
    // Events with an ambiguous trace are compared by their bytes.
    assert_eq!(daemon.deliver(&[&forged]).duplicates, 1);
    assert_eq!(daemon.deliver(&[event("1", "y trace_id=2 org_id=o")]).accepted, 1);
}

#[test]
fn verify_prints_no_control_characters() {
    let site = Site::new();
    site.write("jwks.json", jwks(&[(KID, &site.producer.public())]));
    let mut lines: Vec<String> = cases(&site.producer).into_iter().map(|case| case.line).collect();
    let good = lines.len();
    // A changed copy of each, two lines without a signature, and two that are not events.
    for line in 0..good {
        lines.push(lines[line].replacen("principal_id", "principal_iD", 1));
    }
    lines.push(format!("{AUTHENTICATION} user_agent={CONTROLS}"));
    lines.push(format!("{CONTROLS}{FORGED_EVENT}"));
    lines.push(format!("{{\"{CONTROLS}\":{CONTROLS}"));
    let mut bytes = body(&lines);
    bytes.extend_from_slice(b"\xff\x1b[31m\n");
    // A file name may contain anything.
    let name = "saved\u{1b}[31m\u{202e}.log";
    site.write(name, &bytes);
    let run = |arguments: &[&str]| {
        let mut command = auditgate();
        command.arg("verify").arg("--jwks").arg(site.path("jwks.json")).args(arguments);
        let output = command.output().unwrap();
        assert_harmless(&format!("stdout of {arguments:?}"), &output.stdout);
        assert_harmless(&format!("stderr of {arguments:?}"), &output.stderr);
        output
    };
    let path = site.path(name);
    let path = path.to_str().unwrap();

    let output = run(&[path]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    let sums = format!("good {good}, bad {good}, unsigned 2, malformed 2\n");
    assert!(text.ends_with(&sums), "{sums} is not at the end of {text}");
    // One line for each finding, with its line number.
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

    // Explaining a bad line takes long, so only some are explained.
    let bad = (good + 1..=2 * good).step_by(5);
    for number in (1..=good).chain(bad).chain(2 * good + 1..=lines.len() + 1) {
        let place = format!("{path}:{number}");
        run(&["--explain", &place]);
        let output = run(&["--explain", &place, "--json"]);
        let said: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(said["verdict"] == "good", number <= good, "{said:.300}");
    }
    // A missing file.
    let missing = site.path("no\u{1b}[31m\u{202e}ne.log");
    assert_ne!(run(&[missing.to_str().unwrap()]).status.code(), Some(0));
    run(&["--explain", &format!("{}:7", missing.display())]);
}
