use ed25519_dalek::{Signer, SigningKey};
use proptest::prelude::*;

use super::super::event::Value;
use super::super::signature;
use super::*;

fn event(line: &str) -> Event {
    parse(line).unwrap().event()
}

#[test]
fn an_authorization_event_of_the_documentation() {
    let line = "Apr 14 05:39:08 konghq.com CEF:0|KongInc|Konnect|1.0|konnect|Authz.usage|1|rt=1681450748406 src=127.0.0.6 action=retrieve granted=true org_id=b065b594 principal_id=87655c36 actor_id= trace_id=3895213347334635099 user_agent=grpc-node/1.24.11 grpc-c/8.0.0 (linux; chttp2; ganges) sig=N_4q";
    let parsed = parse(line).unwrap();
    assert_eq!(parsed.time(), Some(1_681_450_748_406));
    let event = parsed.event();
    for (name, value) in [
        ("event_ts", "Apr 14 05:39:08"),
        ("cef_version", "0"),
        ("event_vendor", "KongInc"),
        ("event_product", "Konnect"),
        ("event_version", "1.0"),
        ("event_class_id", "konnect"),
        ("name", "Authz.usage"),
        ("severity", "1"),
        ("granted", "true"),
        ("actor_id", ""),
        ("trace_id", "3895213347334635099"),
        ("user_agent", "grpc-node/1.24.11 grpc-c/8.0.0 (linux; chttp2; ganges)"),
        ("sig", "N_4q"),
    ] {
        assert_eq!(event.text(name).as_deref(), Some(value), "{name}");
    }
    assert_eq!(event.field("granted"), Some(&Value::Boolean(true)));
    assert!(event.ambiguous().is_empty());
}

#[test]
fn the_irregular_examples_of_the_documentation_are_parsed() {
    let six = "2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Dev-Portal|1.0|AUTHENTICATION_OUTCOME_SUCCESS|0|rt=3958q3097698 src=::1 request=/a|b success=true org_id=o portal_id=p principal_id=q trace_id=1 user_agent= sig=x";
    let parsed = parse(six).unwrap();
    assert_eq!(parsed.time(), Some(1_684_454_619_000));
    let event = parsed.event();
    assert_eq!(event.field("event_class_id"), None);
    assert_eq!(event.text("name").unwrap(), "AUTHENTICATION_OUTCOME_SUCCESS");
    assert_eq!(event.text("rt").unwrap(), "3958q3097698");
    assert_eq!(event.text("request").unwrap(), "/a|b");
    assert_eq!(event.text("portal_id").unwrap(), "p");
    assert_eq!(event.text("user_agent").unwrap(), "");
    assert!(event.ambiguous().is_empty());
}

#[test]
fn an_access_event_may_contain_json_and_spaces() {
    let line = r#"2025-05-16T20:09:54Z konghq.com CEF:0|KongInc|Konnect|1.0|KongGateway|Ingress|1|rt=1684267794226 src=127.0.0.6 request=/api act=POST status=200 org_id=o principal_id=p user_agent=Mozilla/5.0 (Macintosh; Intel) Chrome/113.0.0.0 trace_id=1146381705542353508 query={"end":"1684270800","start":"1684098000"} sig=x"#;
    let event = event(line);
    assert_eq!(event.text("query").unwrap(), r#"{"end":"1684270800","start":"1684098000"}"#);
    assert_eq!(event.text("user_agent").unwrap(), "Mozilla/5.0 (Macintosh; Intel) Chrome/113.0.0.0");
    assert_eq!(event.field("status"), Some(&Value::Number("200".into())));
    assert!(event.ambiguous().is_empty());
}

const AUTHENTICATION: &str = "2025-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|AUTHENTICATION_TYPE_PAT|AUTHENTICATION_OUTCOME_SUCCESS|0|rt=1 src=127.0.0.1 request=/r success=false org_id=o principal_id=p trace_id=7 user_agent=";

#[test]
fn free_text_forges_no_field() {
    let text = "x sig=y trace_id=1 granted=true name=z severity=10 kong_initiated=true portal_id=q new=1";
    let forged = format!("{AUTHENTICATION}{text} sig=real");
    let parsed = parse(&forged).unwrap();
    assert_eq!(parsed.signed().unwrap().value, b"real");
    assert_eq!(parsed.trace(), None);
    let event = parsed.event();
    assert_eq!(
        event.ambiguous(),
        [
            "granted",
            "kong_initiated",
            "name",
            "new",
            "portal_id",
            "severity",
            "sig",
            "trace_id",
            "user_agent"
        ]
    );
    for name in ["granted", "kong_initiated", "new", "portal_id"] {
        assert_eq!(event.field(name), None, "{name}");
    }
    for (name, value) in [
        ("name", "AUTHENTICATION_OUTCOME_SUCCESS"),
        ("severity", "0"),
        ("user_agent", text),
        ("success", "false"),
        ("trace_id", "7"),
        ("sig", "real"),
    ] {
        assert_eq!(event.text(name).unwrap(), value, "{name}");
    }
}

#[test]
fn free_text_ends_at_a_key_that_the_producer_must_have_written() {
    let read = event(&AUTHENTICATION.replace("success=false", "new=1 success=false newer=2"));
    assert_eq!(read.ambiguous(), ["new", "request"]);
    assert_eq!(read.text("request").unwrap(), "/r new=1");
    assert_eq!(read.field("new"), None);
    assert_eq!(read.text("newer").unwrap(), "2");
    // A key that occurs twice may be the caller's: the text ends at the next one.
    let read = event(&AUTHENTICATION.replace("/r", "/r success=true"));
    assert_eq!(read.ambiguous(), ["request", "success"]);
    assert_eq!(read.text("request").unwrap(), "/r success=true success=false");
    assert_eq!(read.text("org_id").unwrap(), "o");
    // An event of another type has no `success` of its own.
    let access = "CEF:0|v|p|1|c|Ingress|1|rt=1 src=s request=/r success=true act=GET status=200 org_id=o \
                  principal_id=p user_agent=u trace_id=1 query=";
    let read = event(access);
    assert_eq!((read.text("request").unwrap().as_ref(), read.field("success")), ("/r success=true", None));
    assert_eq!(read.field("status"), Some(&Value::Number("200".into())));
    // A refused access need not have a principal.
    let without_principal =
        access.replace("|1|rt", "|6|rt").replace(" org_id=o principal_id=p user_agent=u", "");
    let read = event(&without_principal.replace("query=", "query=x user_agent=u principal_id=evil"));
    assert_eq!(read.field("principal_id"), None);
}

#[test]
fn fields_before_free_text_keep_their_values() {
    let line = "CEF:0|v|p|1|c|Authz.x|6|rt=5 src=s action=delete granted=false org_id=o principal_id=p \
                trace_id=7 user_agent=u";
    let front = ["rt", "src", "action", "granted", "org_id", "principal_id", "trace_id"];
    for name in front {
        let read = event(&format!("{line} {name}=forged {name}=again"));
        assert_eq!(read.text(name), event(line).text(name), "{name}");
        assert_eq!(read.text("user_agent").unwrap(), format!("u {name}=forged {name}=again"));
        let mut ambiguous = [name, "user_agent"];
        ambiguous.sort_unstable();
        assert_eq!(read.ambiguous(), ambiguous);
    }
    // A key that the producer itself wrote twice has no value.
    let read = event(&line.replace("src=s", "src=s src=t extra=1"));
    assert_eq!((read.field("src"), read.ambiguous()), (None, &["src".to_owned()][..]));
    let read = event(&format!("{} extra=2 action=read x=1 x=2", line.replace("rt=5", "rt=5 extra=1")));
    assert_eq!(read.text("extra").unwrap(), "1");
    let several = "CEF:0|v|p|1|c|Ingress|1|rt=1 a=1 request=/r act=GET a=2 b=1 status=2 user_agent=u trace_id=1 \
                   b=2 src=3 query=q";
    let read = event(several);
    assert_eq!(read.ambiguous(), ["a", "b"]);
    assert_eq!((read.text("a").as_deref(), read.field("b")), (Some("1"), None));
}

#[test]
fn an_ambiguous_organisation_or_trace_identifies_nothing() {
    assert!(parse(AUTHENTICATION).unwrap().trace().is_some());
    for forged in ["org_id=x", "trace_id=1"] {
        assert_eq!(parse(&format!("{AUTHENTICATION}x {forged}")).unwrap().trace(), None, "{forged}");
    }
    for line in [r#"{"trace_id":"1","org_id":"a","org_id":"b"}"#, r#"{"trace_id":"1","trace_id":"1"}"#] {
        assert_eq!(Line::parse(line.as_bytes()).unwrap().trace(), None, "{line}");
    }
}

#[test]
fn a_time_stamp_may_come_without_a_host() {
    for (prefix, stamp) in [
        ("Jun 21 13:41:36 ", "Jun 21 13:41:36"),
        ("Jun  1 13:41:36 host ", "Jun  1 13:41:36"),
        ("Jun 21 13:41:36 ::1 ", "Jun 21 13:41:36"),
        ("2026-01-01T00:00:00Z ", "2026-01-01T00:00:00Z"),
        ("2026-01-01T00:00:00Z konghq.com ", "2026-01-01T00:00:00Z"),
    ] {
        let line = format!("{prefix}CEF:0|v|p|1|c|n|5|src=::1");
        assert_eq!(event(&line).text("event_ts").unwrap(), stamp, "{prefix}");
    }
}

#[test]
fn keys_of_other_producers_are_accepted() {
    let event = event("CEF:0|v|p|1|c|n|5|a=1 ad.Error_,Code=2 b[0].c-d=3 dst=4");
    for (name, value) in [("a", "1"), ("ad.Error_,Code", "2"), ("b[0].c-d", "3"), ("dst", "4")] {
        assert_eq!(event.text(name).unwrap(), value);
    }
    assert!(event.ambiguous().is_empty());
}

/// Keys of the documented extensions by type and outcome, in orders that Kong's examples have or
/// could have.
const EXTENSIONS: [(&str, &str, &str); 9] = [
    ("AUTHENTICATION_OUTCOME_SUCCESS", "0", "rt src request success org_id principal_id trace_id user_agent"),
    (
        "AUTHENTICATION_OUTCOME_SUCCESS",
        "0",
        "user_agent trace_id success principal_name src rt request org_id principal_id",
    ),
    ("AUTHENTICATION_OUTCOME_NOT_FOUND", "1", "rt src request success trace_id user_agent"),
    (
        "AUTHENTICATION_OUTCOME_LOCKED",
        "6",
        "rt src principal_name request success org_id trace_id portal_id user_agent",
    ),
    ("Authz.portals", "6", "rt src action granted org_id principal_id actor_id trace_id user_agent"),
    (
        "Authz.portals",
        "1",
        "rt principal_name src action granted user_agent org_id principal_id kong_initiated trace_id",
    ),
    ("Ingress", "1", "rt src request act status org_id principal_id user_agent trace_id query"),
    ("Ingress", "6", "query rt src request act status user_agent trace_id kong_initiated"),
    ("Portal.new", "3", "rt src portal_id request trace_id query user_agent"),
];

/// Generates text without escapes that often looks like pairs of the line.
fn hostile_text() -> impl Strategy<Value = String> {
    let pair = (prop::sample::select(&schema::KNOWN[..]), "[a-z0-9.]{0,3}")
        .prop_map(|(key, text)| format!(" {key}={text}"));
    let piece =
        prop_oneof![3 => pair, 1 => text(), 1 => Just(" sig=x".to_owned()), 1 => Just(" ".to_owned())];
    prop::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat().replace(['\\', '\n', '\r'], ""))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn no_free_text_changes_a_field_before_it_or_creates_one(
        (name, severity, keys) in prop::sample::select(&EXTENSIONS[..]),
        texts in prop::collection::vec(hostile_text(), 4),
    ) {
        // Built by hand, so that nothing is escaped.
        let mut texts = texts.into_iter();
        let pairs: Vec<(&str, String)> = keys
            .split(' ')
            .map(|key| (key, match schema::FREE_TEXT.contains(&key) {
                true => texts.next().unwrap_or_default(),
                false => format!("own-{key}"),
            }))
            .collect();
        let extension: Vec<String> = pairs.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let line = format!(
            "2026-01-01T00:00:00Z konghq.com CEF:0|KongInc|Konnect|1.0|class|{name}|{severity}|{} sig=real",
            extension.join(" ")
        );
        let event = event(&line);
        let first_free = pairs.iter().position(|(key, _)| schema::FREE_TEXT.contains(key)).unwrap();
        for (key, value) in &pairs[..first_free] {
            prop_assert_eq!(event.text(key).unwrap(), value.as_str(), "{}", &line);
        }
        let (free_key, text) = &pairs[first_free];
        prop_assert!(event.text(free_key).unwrap().starts_with(text.as_str()), "{}", &line);
        for (key, value) in event.fields().filter(|(key, _)| !schema::HEADER.contains(key) && *key != "sig") {
            let Some((_, own)) = pairs.iter().find(|(name, _)| *name == key) else {
                return Err(TestCaseError::fail(format!("`{key}` was forged: {line}")));
            };
            // Free text may include what follows it; every other value is the producer's.
            match schema::FREE_TEXT.contains(&key) {
                true => prop_assert!(value.text().starts_with(own.as_str()), "{}: {}", key, &line),
                false => prop_assert_eq!(value.text(), own.as_str(), "{}: {}", key, &line),
            }
        }
        // Nothing is lost: a pair that is no field is in the free text before it, and its key is
        // ambiguous.
        for (key, own) in pairs.iter().filter(|(key, _)| event.field(key).is_none()) {
            let pair = format!(" {key}={own}");
            prop_assert!(event.ambiguous().iter().any(|name| name == key), "{}: {}", key, &line);
            prop_assert!(
                schema::FREE_TEXT.iter().any(|free| event.text(free).is_some_and(|text| text.contains(&pair))),
                "{}: {}", key, &line
            );
        }
        prop_assert_eq!(event.text("name").unwrap(), name);
        prop_assert_eq!(event.text("sig").unwrap(), "real");
    }
}

#[test]
fn escapes_are_undone_once() {
    let event = event(&format!(r"{AUTHENTICATION}a\=b \\n \n\r \q \"));
    assert_eq!(event.text("user_agent").unwrap(), "a=b \\n \n\r \\q \\");
    let header = parse(r"CEF:0|a\|b|c\\|1|d|e|0|rt=1").unwrap().event();
    assert_eq!(header.text("event_vendor").unwrap(), "a|b");
    assert_eq!(header.text("event_product").unwrap(), "c\\");
    assert_eq!(header.field("event_ts"), None);
}

#[test]
fn a_line_without_a_header_is_malformed() {
    for line in ["", "hello", "CEF:0", "CEF:0|a|b|c|d|e|f", "CEF:x|a|b|c|d|e|0|", "xCEF:0|a|b|c|d|e|0|"] {
        assert!(parse(line).is_err(), "{line}");
    }
    assert!(parse("CEF:0|a|b|c|d|e|0|").is_ok());
    assert!(parse("CEF:0|a|b|c sig=x|d|e|0|").unwrap().signed().is_none());
}

#[test]
fn an_event_that_would_not_be_read_back_is_not_written() {
    let mut event = event(AUTHENTICATION);
    event.set("a b", Value::Text("x".into()));
    assert!(matches!(write(&event), Err(WriteError::Unrepresentable(_))));
    event.remove("a b");
    assert!(write(&event).is_ok());
    event.set("unknown", Value::Number("1".into()));
    assert!(matches!(write(&event), Err(WriteError::Unrepresentable(_))));
    event.remove("unknown");
    event.remove("event_vendor");
    assert_eq!(write(&event), Err(WriteError::Missing("event_vendor")));
}

#[test]
fn a_line_break_outside_the_extension_is_not_written() {
    for name in ["event_ts", "event_vendor", "event_product", "event_version", "event_class_id", "name"] {
        for line_break in ["a\nb", "a\rb"] {
            let mut event = event(AUTHENTICATION);
            event.set(name, Value::Text(line_break.into()));
            assert!(matches!(write(&event), Err(WriteError::Unrepresentable(_))), "{name}");
        }
    }
    for line_break in ["a\nb", "a\r"] {
        let mut event = event(AUTHENTICATION);
        event.set("sig", Value::Text(line_break.into()));
        assert!(matches!(write(&event), Err(WriteError::Unrepresentable(_))));
        event.set("sig", Value::Text("x".into()));
        event.set("user_agent", Value::Text(line_break.into()));
        assert!(write(&event).is_ok());
    }
}

/// Generates any text, often text that looks like a part of a line.
pub(in crate::wire) fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => "\\PC{0,6}",
        2 => any::<char>().prop_map(String::from),
        6 => prop::sample::select(vec![
            " ", "  ", "=", "|", "\\", "\n", "\r", "\t", "\"", "'", ",", "{", "}", "[", ":", " key=",
            " sig=", "sig=", ",\"sig\":\"x\"", " trace_id=1", "rt=1 ", "\\n", "\\=", "\\|", "CEF:",
            " CEF:0|a|b|c|d|e|0|", " konghq.com ", "\u{0}", "\u{7f}", "\u{2028}", "\u{202e}", "\u{fffd}",
            "\\u0000", "\\ud800", "true", "007", "18446744073709551616",
        ]).prop_map(str::to_owned),
    ];
    prop::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}

fn number() -> impl Strategy<Value = String> {
    prop_oneof!["-?(0|[1-9][0-9]{0,30})", "-?(0|[1-9][0-9]{0,3})(\\.[0-9]{1,25})?([eE][+-]?[0-9]{1,4})?"]
}

fn value() -> impl Strategy<Value = Value> {
    let json = prop_oneof![
        prop::collection::vec(text(), 0..3).prop_map(|list| serde_json::to_string(&list).unwrap()),
        prop::collection::btree_map(text(), number(), 0..3).prop_map(|members| {
            let members: Vec<String> = members
                .iter()
                .map(|(key, number)| format!("{}:{number}", serde_json::to_string(key).unwrap()))
                .collect();
            format!("{{{}}}", members.join(" ,\t"))
        }),
    ];
    prop_oneof![
        6 => text().prop_map(Value::Text),
        2 => number().prop_map(Value::Number),
        1 => any::<bool>().prop_map(Value::Boolean),
        1 => Just(Value::Null),
        1 => json.prop_map(Value::Json),
    ]
}

/// Generates any event without a signature.
pub(in crate::wire) fn any_event() -> impl Strategy<Value = Event> {
    let known = prop::collection::vec((prop::sample::select(&schema::KNOWN[..]), value()), 0..12);
    let unknown = prop::collection::vec((prop_oneof![text(), Just("event".to_owned())], value()), 0..4);
    (known, unknown).prop_map(|(known, unknown)| {
        let mut event = Event::new();
        for (name, value) in unknown {
            event.set(name, value);
        }
        for (name, value) in known {
            event.set(name, value);
        }
        event.remove("sig");
        event
    })
}

/// Returns whether a time stamp can be written, by the documentation of [`write`].
fn is_writable_stamp(text: &str) -> bool {
    let other_line = text.starts_with("CEF:") || text.trim_start_matches([' ', '\t']).starts_with('{');
    !text.is_empty() && !other_line && !["\n", "\r", " CEF:"].iter().any(|part| text.contains(part))
}

/// Generates an event as Konnect documents it, with any text that the documentation of [`write`]
/// allows.
pub(in crate::wire) fn documented_event() -> impl Strategy<Value = Event> {
    const EVERY: [&str; 6] = ["rt", "src", "org_id", "principal_id", "trace_id", "user_agent"];
    const OPTIONAL: [&str; 5] =
        ["principal_name", "actor_id", "portal_id", "kong_initiated", "unknown_1.x[]"];
    let kind = prop::sample::select(vec![
        ("AUTHENTICATION_OUTCOME_", &["request", "success"][..]),
        ("Authz.", &["action", "granted"]),
        ("Ingress", &["request", "act", "status", "query"]),
    ]);
    let header = || text().prop_map(|text| text.replace(['\n', '\r'], ""));
    let stamp = text().prop_map(|text| match is_writable_stamp(&text) {
        true => text,
        false => "Apr 14 05:39:08".to_owned(),
    });
    let severity = prop_oneof!["[0-9]{1,3}", Just("Very-High".to_owned())];
    let head = (
        "[0-9]{1,3}",
        stamp,
        prop::collection::vec(header(), 4),
        // With a class, the severity can be any text.
        prop_oneof![
            (header().prop_map(Some), prop_oneof![severity.clone(), header()]),
            (Just(None), severity)
        ],
    );
    let values = prop::collection::vec(text(), EVERY.len() + OPTIONAL.len() + 4);
    (kind, head, values, any::<[bool; 6]>()).prop_map(|(kind, head, values, chosen)| {
        let (prefix, of_type) = kind;
        let (version, stamp, header, (class, severity)) = head;
        let mut event = Event::new();
        let mut set = |name: &'static str, text: &str| event.set(name, Value::Text(text.to_owned()));
        set("cef_version", &version);
        set("event_ts", &stamp);
        set("event_vendor", &header[0]);
        set("event_product", &header[1]);
        set("event_version", &header[2]);
        if let Some(class) = &class {
            set("event_class_id", class);
        }
        set("name", &if prefix == "Ingress" { prefix.to_owned() } else { format!("{prefix}{}", header[3]) });
        set("severity", &severity);
        let optional = OPTIONAL.iter().zip(chosen).filter(|(_, chosen)| *chosen).map(|(name, _)| name);
        for (name, text) in EVERY.iter().chain(of_type).chain(optional).zip(&values) {
            set(name, text);
        }
        if chosen[5] {
            set("sig", "x");
        }
        event
    })
}

pub(in crate::wire) fn key() -> SigningKey {
    SigningKey::from_bytes(&[3; 32])
}

/// Returns whether the line's signature verifies over one of its readings.
pub(in crate::wire) fn is_verified(line: &[u8]) -> bool {
    let Ok(line) = Line::parse(line) else { return false };
    let Some(signed) = line.signed() else { return false };
    let Ok(bytes) = signature::decode(signed.value) else { return false };
    let made = ed25519_dalek::Signature::from_bytes(&bytes);
    [Some(signed.first), signed.second]
        .into_iter()
        .flatten()
        .any(|reading| key().verifying_key().verify_strict(&reading.message(), &made).is_ok())
}

/// Signs a line, and checks that the signed message is found again.
pub(in crate::wire) fn signed(format: Format, mut line: Vec<u8>) -> Vec<u8> {
    let message = line.clone();
    signature::insert(format, &mut line, &key().sign(&message).to_bytes());
    let read = Line::parse(&line).unwrap();
    let found = read.signed().unwrap();
    assert!(
        [Some(found.first), found.second].into_iter().flatten().any(|reading| reading.message() == message),
        "{}",
        String::from_utf8_lossy(&line)
    );
    assert!(is_verified(&line));
    line
}

/// Changes one byte to another; none if that is no change or a line terminator.
pub(in crate::wire) fn with_changed_byte(line: &[u8], at: prop::sample::Index, other: u8) -> Option<Vec<u8>> {
    let mut changed = line.to_vec();
    let byte = &mut changed[at.index(line.len())];
    let is_change = *byte != other && !matches!(other, b'\n' | b'\r');
    *byte = other;
    is_change.then_some(changed)
}

/// Generates a byte, often one with a meaning in a line.
pub(in crate::wire) fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![any::<u8>(), prop::sample::select(&b" \t\"\\{}[],:=|sigA"[..])]
}

/// Checks that a change of any single byte of a line changes the signature or the message. That
/// Ed25519 then fails is checked by `a_changed_byte_breaks_the_signature`, which takes longer.
pub(in crate::wire) fn assert_every_byte_counts(line: &[u8]) {
    fn messages(signed: &signature::Signed<'_>) -> Vec<Vec<u8>> {
        let readings = [Some(signed.first), signed.second];
        readings.into_iter().flatten().map(|reading| reading.message().into_owned()).collect()
    }
    assert!(is_verified(line));
    let original = Line::parse(line).unwrap();
    let original = original.signed().unwrap();
    let (made, known) = (signature::decode(original.value).unwrap(), messages(original));
    let mut changed = line.to_vec();
    for at in 0..line.len() {
        for other in (0..=u8::MAX).filter(|other| *other != line[at] && !matches!(other, b'\n' | b'\r')) {
            changed[at] = other;
            let is_ignored = Line::parse(&changed).is_ok_and(|read| {
                let Some(found) = read.signed() else { return false };
                let Ok(bytes) = signature::decode(found.value) else { return false };
                bytes == made && messages(found).iter().any(|message| known.contains(message))
            });
            assert!(!is_ignored, "byte {at} as {other:#x}: {}", String::from_utf8_lossy(&changed));
        }
        changed[at] = line[at];
    }
}

proptest! {
    #[test]
    fn an_event_is_read_back_or_not_written(event in any_event()) {
        if let Ok(line) = write(&event) {
            prop_assert!(!line.contains(&b'\n'));
            prop_assert_eq!(Line::parse(&line).unwrap().event(), event);
        }
    }

    #[test]
    fn a_documented_event_is_always_written(event in documented_event()) {
        let line = write(&event);
        prop_assert!(line.is_ok(), "{:?}", line);
        prop_assert_eq!(Line::parse(&line.unwrap()).unwrap().event(), event);
    }

    #[test]
    fn only_some_time_stamps_are_not_written(mut event in documented_event(), stamp in text()) {
        let is_writable = is_writable_stamp(&stamp);
        event.set("event_ts", Value::Text(stamp));
        prop_assert_eq!(write(&event).is_ok(), is_writable);
    }

    #[test]
    fn a_changed_byte_breaks_the_signature(
        mut event in documented_event(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), byte()), 24),
    ) {
        event.remove("sig");
        let line = signed(Format::Cef, write(&event).unwrap());
        for (at, other) in changes {
            if let Some(changed) = with_changed_byte(&line, at, other) {
                prop_assert!(!is_verified(&changed), "{}", String::from_utf8_lossy(&changed));
            }
        }
    }

    #[test]
    fn a_signed_line_of_any_event_verifies_and_is_read_as_it_was(event in any_event()) {
        for (format, line) in [
            (Format::Cef, write(&event).ok()),
            (Format::Json, Some(super::super::json::write(&event))),
            (Format::Cps, Some(super::super::json::write_wrapped(&event))),
        ] {
            // A sender signs no line that is read as another event.
            let is_written =
                |line: &Vec<u8>| Line::parse(line).is_ok_and(|read| read.format() == format && read.is_of(&event));
            let Some(line) = line.filter(is_written) else { continue };
            let signed = signed(format, line.clone());
            let mut read = Line::parse(&signed).unwrap().event();
            prop_assert!(read.remove("sig").is_some());
            prop_assert_eq!(read, Line::parse(&line).unwrap().event());
        }
    }

    #[test]
    fn no_bytes_make_the_parser_panic(
        noise in prop::collection::vec(any::<u8>(), 0..200),
        words in text(),
        event in any_event(),
        at in any::<prop::sample::Index>(),
        other in byte(),
    ) {
        let mut lines = vec![noise, words.clone().into_bytes()];
        for start in ["CEF:0|a|b|c|d|e|0|", "CEF:0|", "x konghq.com CEF:0|a|b|c|e|0|rt=", "{\"", "{\"event\":{"] {
            lines.push(format!("{start}{words}").into_bytes());
        }
        for line in [super::super::json::write(&event), super::super::json::write_wrapped(&event)]
            .into_iter()
            .chain(write(&event))
        {
            lines.extend(with_changed_byte(&line, at, other));
            lines.push(line[..at.index(line.len())].to_vec());
        }
        for line in &lines {
            if let Ok(line) = Line::parse(line) {
                line.event();
                let _ = (line.time(), line.trace(), line.content().message());
            }
        }
    }
}

#[test]
fn every_byte_of_a_cef_line_counts() {
    for tail in ["a b", "x sig=y z", ""] {
        assert_every_byte_counts(&signed(Format::Cef, format!("{AUTHENTICATION}{tail}").into_bytes()));
    }
    assert_every_byte_counts(&signed(Format::Cef, b"CEF:0|a|b|c|d|e|0|".to_vec()));
}
