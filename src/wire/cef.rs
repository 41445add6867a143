//! A CEF line, both directions: `{timestamp} konghq.com CEF:0|vendor|product|version|class id|name|severity|extension`.
//!
//! Source: ArcSight Common Event Format, version 25, and Kong's audit-log reference with its oddities.
//!
//! A caller of the producer's API controls some values, and a value may hold ` key=value`. [`doubt`] says
//! which keys may have been forged that way; those are reported and never become fields.

use std::borrow::Cow;
use std::ops::Range;

use super::event::{Event, Format, Malformed, Value, schema};
use super::line::{Field, Line, Spelled, begins_like_json, mark_repeated};
use super::signature::cut_cef;

/// Takes a CEF line apart.
pub(super) fn parse(text: &str) -> Result<Line<'_>, Malformed> {
    let header_start = find_header(text).ok_or(Malformed::from("neither a JSON object nor a CEF header"))?;
    let header = Header::parse(&text[header_start..])?;
    let signed = cut_cef(text);
    let extension_start = header_start + header.extension;
    // A ` sig=` inside the header would be no extension key.
    let signed = signed.filter(|signed| signed.first.before.len() >= extension_start.saturating_sub(1));
    let end = signed.map_or(text.len(), |signed| signed.first.before.len());

    let mut fields = Vec::with_capacity(24);
    let header_field = |key: &'static str, value| Field {
        key: Cow::Borrowed(key),
        value: Spelled::Header(value),
        ambiguous: false,
    };
    if let Some(stamp) = time_stamp(&text[..header_start]) {
        // The time stamp stands before the header, where nothing is escaped.
        let value = Spelled::Plain(stamp);
        fields.push(Field { key: Cow::Borrowed("event_ts"), value, ambiguous: false });
    }
    fields.push(header_field("cef_version", header.cef_version));
    fields.push(header_field("event_vendor", header.vendor));
    fields.push(header_field("event_product", header.product));
    fields.push(header_field("event_version", header.version));
    if let Some(class) = header.class {
        fields.push(header_field("event_class_id", class));
    }
    fields.push(header_field("name", header.name));
    fields.push(header_field("severity", header.severity));

    let extension = text.get(extension_start..end).unwrap_or("");
    let first = fields.len();
    for token in Tokens::of(extension) {
        fields.push(Field {
            key: Cow::Borrowed(&extension[token.key]),
            value: Spelled::Extension(&extension[token.value]),
            ambiguous: false,
        });
    }
    doubt(&mut fields[first..], header.name, header.product);
    Ok(Line { bytes: text.as_bytes(), format: Format::Cef, signed, fields })
}

/// Why an event has no CEF form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// A header field is needed and not there.
    #[error("the event has no `{0}`, which a CEF header needs")]
    Missing(&'static str),
    /// The event would not be read back as it is.
    #[error("the event cannot be written as CEF: {0}")]
    Unrepresentable(String),
}

/// Writes an event as a CEF line in the order of Kong's examples.
///
/// # Errors
/// When a header field other than `event_class_id` is missing, or the line would not parse back to the same
/// event:
/// - ambiguous keys; a key that is empty or holds more than ASCII letters, digits and `_.-[]`;
/// - an unknown field whose value is no text, or a known one whose value is not of its documented type (nor
///   text that cannot be read as that type);
/// - a field that would stand in doubt: one behind free text in an event that lacks its type's own fields;
/// - a line break in the header or in `sig`; a ` sig=` in `sig`;
/// - an `event_ts` that is empty, begins with `CEF:` or (behind white space) with `{`, or holds ` CEF:`;
/// - a `cef_version` that is no number; without `event_class_id`, a `severity` that is neither digits nor one
///   of CEF's words; a `name` that looks like a severity before a `severity` that begins with `key=`.
///
/// An event with all the documented fields of its type is therefore always written, whatever text its values
/// are, as long as its header keeps to the last three points.
pub fn write(event: &Event) -> Result<Vec<u8>, WriteError> {
    let text = |name: &'static str| event.text(name).ok_or(WriteError::Missing(name));
    let mut out = String::with_capacity(512);
    out.push_str(&text("event_ts")?);
    out.push_str(" konghq.com CEF:");
    for name in ["cef_version", "event_vendor", "event_product", "event_version"] {
        escape_header(&mut out, &text(name)?);
        out.push('|');
    }
    if let Some(class) = event.text("event_class_id") {
        escape_header(&mut out, &class);
        out.push('|');
    }
    for name in ["name", "severity"] {
        escape_header(&mut out, &text(name)?);
        out.push('|');
    }

    let mut first = true;
    let mut put = |name: &str, value: &Value| {
        if !first {
            out.push(' ');
        }
        first = false;
        out.push_str(name);
        out.push('=');
        escape_extension(&mut out, &value.text());
    };
    // What is optional or unknown stands before the free text that could have forged it.
    let later = ["principal_name", "principal_id", "user_agent", "trace_id", "query"];
    let early = ["rt", "src", "request", "act", "action", "granted", "status", "success", "org_id"];
    for name in early {
        if let Some(value) = event.field(name) {
            put(name, value);
        }
    }
    for (name, value) in event.fields() {
        let placed =
            name == "sig" || early.contains(&name) || later.contains(&name) || schema::HEADER.contains(&name);
        if !placed {
            put(name, value);
        }
    }
    for name in later {
        if let Some(value) = event.field(name) {
            put(name, value);
        }
    }
    if let Some(signature) = event.text("sig") {
        out.push_str(" sig=");
        out.push_str(&signature);
    }

    // In the extension they are escaped; elsewhere CEF has no spelling for them.
    if out.contains(['\n', '\r']) {
        return Err(WriteError::Unrepresentable("a line break outside the extension".to_owned()));
    }
    // A line that begins with `{` would be read as JSON.
    if begins_like_json(&out) {
        return Err(WriteError::Unrepresentable("`event_ts` begins like JSON".to_owned()));
    }
    match parse(&out) {
        Ok(line) if line.event() == *event => Ok(out.into_bytes()),
        Ok(line) => Err(WriteError::Unrepresentable(difference(event, &line.event()))),
        Err(Malformed(detail)) => Err(WriteError::Unrepresentable(detail.into_owned())),
    }
}

/// Where `CEF:` begins: at the line's start or behind a space.
fn find_header(text: &str) -> Option<usize> {
    if text.starts_with("CEF:") {
        return Some(0);
    }
    memchr::memmem::find(text.as_bytes(), b" CEF:").map(|at| at + 1)
}

/// The time stamp before the host name: an RFC 3339 one or syslog's `Apr 14 05:39:08`, kept as it is spelled.
fn time_stamp(prefix: &str) -> Option<&str> {
    let prefix = prefix.strip_suffix(' ')?;
    let stamp = prefix.rsplit_once(' ').map_or(prefix, |(stamp, _host)| stamp);
    (!stamp.is_empty()).then_some(stamp)
}

struct Header<'a> {
    cef_version: &'a str,
    vendor: &'a str,
    product: &'a str,
    version: &'a str,
    /// Missing in a Dev Portal example of Kong's documentation.
    class: Option<&'a str>,
    name: &'a str,
    severity: &'a str,
    /// Where the extension begins, counted from `CEF:`.
    extension: usize,
}

impl<'a> Header<'a> {
    fn parse(text: &'a str) -> Result<Self, Malformed> {
        let mut rest = "CEF:".len();
        let cef_version = piece(text, &mut rest, "version")?;
        if cef_version.is_empty() || !cef_version.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err("the CEF version is no number".into());
        }
        let vendor = piece(text, &mut rest, "vendor")?;
        let product = piece(text, &mut rest, "product")?;
        let version = piece(text, &mut rest, "device version")?;
        let fifth = piece(text, &mut rest, "name")?;
        let sixth = piece(text, &mut rest, "severity")?;
        let six_fields = rest;
        // With seven fields the sixth is the name and a severity follows. Behind the sixth of only six
        // stands `key=`, and a bar further on belongs to a value.
        match piece(text, &mut rest, "severity") {
            Ok(seventh) if !(is_severity(sixth) && begins_with_key(seventh)) => Ok(Self {
                cef_version,
                vendor,
                product,
                version,
                class: Some(fifth),
                name: sixth,
                severity: seventh,
                extension: rest,
            }),
            _ if is_severity(sixth) => Ok(Self {
                cef_version,
                vendor,
                product,
                version,
                class: None,
                name: fifth,
                severity: sixth,
                extension: six_fields,
            }),
            Ok(_) => Err("the CEF header has no severity".into()),
            Err(malformed) => Err(malformed),
        }
    }
}

/// The header field that begins at `rest`, which moves behind its bar.
fn piece<'a>(text: &'a str, rest: &mut usize, name: &'static str) -> Result<&'a str, Malformed> {
    let start = *rest;
    let length = unescaped_bar(&text[start..])
        .ok_or_else(|| Malformed(Cow::Owned(format!("the CEF header ends before its {name}"))))?;
    *rest = start + length + 1;
    Ok(&text[start..start + length])
}

/// An integer or one of CEF's words.
fn is_severity(text: &str) -> bool {
    matches!(text, "Unknown" | "Low" | "Medium" | "High" | "Very-High")
        || (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()))
}

fn begins_with_key(text: &str) -> bool {
    Tokens::of(text).next().is_some_and(|token| token.key.start == 0)
}

/// The first `|` that no backslash escapes.
fn unescaped_bar(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    memchr::memchr_iter(b'|', bytes).find(|at| {
        let backslashes = bytes[..*at].iter().rev().take_while(|byte| **byte == b'\\').count();
        backslashes % 2 == 0
    })
}

/// The `key=value` pairs of an extension. A key stands at the start or behind a space and consists of
/// letters, digits and `_ . - [ ]`; its value runs to the space before the next key.
struct Tokens<'a> {
    text: &'a str,
    /// The key that has been found and whose value's end is not known yet.
    pending: Option<(Range<usize>, usize)>,
    from: usize,
}

struct Token {
    key: Range<usize>,
    value: Range<usize>,
}

impl<'a> Tokens<'a> {
    fn of(text: &'a str) -> Self {
        let mut tokens = Self { text, pending: None, from: 0 };
        tokens.pending = tokens.next_key();
        tokens
    }

    /// The next key at or behind `from`, with where its value begins.
    fn next_key(&mut self) -> Option<(Range<usize>, usize)> {
        let bytes = self.text.as_bytes();
        while let Some(found) = memchr::memchr(b'=', &bytes[self.from..]) {
            let equals = self.from + found;
            let start = bytes[self.from..equals]
                .iter()
                .rposition(|byte| !is_key_byte(*byte))
                .map_or(self.from, |at| self.from + at + 1);
            let behind_space = start == 0 || bytes[start - 1] == b' ';
            self.from = equals + 1;
            if start < equals && behind_space {
                return Some((start..equals, equals + 1));
            }
        }
        None
    }
}

impl Iterator for Tokens<'_> {
    type Item = Token;

    fn next(&mut self) -> Option<Token> {
        let (key, value) = self.pending.take()?;
        self.pending = self.next_key();
        let end = self.pending.as_ref().map_or(self.text.len(), |(next, _)| next.start - 1);
        Some(Token { key, value: value..end.max(value) })
    }
}

fn is_key_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-' | b'[' | b']')
}

/// Marks the keys that a value may have forged.
///
/// A key is ambiguous when it occurs twice, when it names a header field, or when it stands behind free text
/// and nothing proves that the free text had ended. The proof is a key that every event of this type has and
/// that occurs just once: it must be the producer's own.
fn doubt(fields: &mut [Field<'_>], name: &str, product: &str) {
    mark_repeated(fields);
    let of_type = schema::Type::of(name);
    let mut in_doubt = false;
    for field in fields {
        let key = field.key.as_ref();
        let is_free_text = schema::FREE_TEXT.contains(&key);
        if schema::HEADER.contains(&key) || key == "sig" {
            field.ambiguous = true;
        } else if !field.ambiguous && of_type.requires(key, product) {
            in_doubt = false;
        } else if in_doubt {
            field.ambiguous = true;
        }
        in_doubt |= is_free_text;
    }
}

fn escape_header(out: &mut String, text: &str) {
    for character in text.chars() {
        if matches!(character, '|' | '\\') {
            out.push('\\');
        }
        out.push(character);
    }
}

fn escape_extension(out: &mut String, text: &str) {
    for character in text.chars() {
        match character {
            '=' => out.push_str("\\="),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            _ => out.push(character),
        }
    }
}

/// The first field that would be read back otherwise.
fn difference(wanted: &Event, read: &Event) -> String {
    wanted
        .fields()
        .find(|(name, value)| read.field(name) != Some(*value))
        .map(|(name, _)| name)
        .or_else(|| read.fields().map(|(name, _)| name).find(|name| wanted.field(name).is_none()))
        .map_or_else(
            || "its ambiguous keys would be lost".to_owned(),
            |name| format!("`{name}` would not be read back as it is"),
        )
}

#[cfg(test)]
pub(super) mod tests {
    use ed25519_dalek::{Signer, SigningKey};
    use proptest::prelude::*;

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
    fn the_oddities_of_the_documentation_parse() {
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
    fn an_access_event_holds_json_and_spaces() {
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
        let forged = format!(
            "{AUTHENTICATION}x sig=y trace_id=1 granted=true name=z severity=10 kong_initiated=true portal_id=q new=1 sig=real"
        );
        let parsed = parse(&forged).unwrap();
        assert_eq!(parsed.signed().unwrap().value, "real");
        assert_eq!(parsed.trace(), None);
        let event = parsed.event();
        assert_eq!(
            event.ambiguous(),
            ["granted", "kong_initiated", "name", "new", "portal_id", "severity", "sig", "trace_id"]
        );
        for name in ["granted", "kong_initiated", "new", "portal_id", "trace_id"] {
            assert_eq!(event.field(name), None, "{name}");
        }
        assert_eq!(event.text("name").unwrap(), "AUTHENTICATION_OUTCOME_SUCCESS");
        assert_eq!(event.text("severity").unwrap(), "0");
        assert_eq!(event.text("user_agent").unwrap(), "x");
        assert_eq!(event.text("success").unwrap(), "false");
        assert_eq!(event.text("sig").unwrap(), "real");
    }

    #[test]
    fn a_key_that_must_be_genuine_ends_the_doubt() {
        let line = AUTHENTICATION.replace("success=false", "new=1 success=false newer=2");
        let event = event(&line);
        assert_eq!(event.ambiguous(), ["new"]);
        assert_eq!(event.text("newer").unwrap(), "2");
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
    fn what_has_no_header_is_malformed() {
        for line in ["", "hello", "CEF:0", "CEF:0|a|b|c|d|e|f", "CEF:x|a|b|c|d|e|0|", "xCEF:0|a|b|c|d|e|0|"] {
            assert!(parse(line).is_err(), "{line}");
        }
        assert!(parse("CEF:0|a|b|c|d|e|0|").is_ok());
        assert!(parse("CEF:0|a|b|c sig=x|d|e|0|").unwrap().signed().is_none());
    }

    #[test]
    fn what_cannot_be_read_back_is_not_written() {
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

    /// Any text, and often what looks like a part of a line.
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

    const KNOWN: [&str; 25] = [
        "act",
        "action",
        "actor_id",
        "cef_version",
        "event_class_id",
        "event_product",
        "event_ts",
        "event_vendor",
        "event_version",
        "granted",
        "kong_initiated",
        "name",
        "org_id",
        "portal_id",
        "principal_id",
        "principal_name",
        "query",
        "request",
        "rt",
        "severity",
        "src",
        "status",
        "success",
        "trace_id",
        "user_agent",
    ];

    /// Any event without a signature.
    pub(in crate::wire) fn any_event() -> impl Strategy<Value = Event> {
        let known = prop::collection::vec((prop::sample::select(&KNOWN[..]), value()), 0..12);
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

    /// What the documentation of [`write`] says about `event_ts`.
    fn is_writable_stamp(text: &str) -> bool {
        let other_line = text.starts_with("CEF:") || text.trim_start_matches([' ', '\t']).starts_with('{');
        !text.is_empty() && !other_line && !["\n", "\r", " CEF:"].iter().any(|part| text.contains(part))
    }

    /// An event as Konnect documents it, with any text in it that the documentation of [`write`] allows.
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
            set(
                "name",
                &if prefix == "Ingress" { prefix.to_owned() } else { format!("{prefix}{}", header[3]) },
            );
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

    /// The signature that the line carries over one of its readings.
    pub(in crate::wire) fn is_proven(line: &[u8]) -> bool {
        let Ok(line) = Line::parse(line) else { return false };
        let Some(signed) = line.signed() else { return false };
        let Ok(bytes) = signature::decode(signed.value) else { return false };
        let made = ed25519_dalek::Signature::from_bytes(&bytes);
        [Some(signed.first), signed.second]
            .into_iter()
            .flatten()
            .any(|reading| key().verifying_key().verify_strict(&reading.message(), &made).is_ok())
    }

    /// Signs a line and checks that it can be found out over what.
    pub(in crate::wire) fn signed(format: Format, mut line: Vec<u8>) -> Vec<u8> {
        let message = line.clone();
        signature::insert(format, &mut line, &key().sign(&message).to_bytes());
        let read = Line::parse(&line).unwrap();
        let found = read.signed().unwrap();
        assert!(
            [Some(found.first), found.second]
                .into_iter()
                .flatten()
                .any(|reading| reading.message() == message),
            "{}",
            String::from_utf8_lossy(&line)
        );
        assert!(is_proven(&line));
        line
    }

    /// Changes one byte to another, neither of a line terminator.
    pub(in crate::wire) fn with_changed_byte(
        line: &[u8],
        at: prop::sample::Index,
        other: u8,
    ) -> Option<Vec<u8>> {
        let mut changed = line.to_vec();
        let byte = &mut changed[at.index(line.len())];
        let is_change = *byte != other && !matches!(other, b'\n' | b'\r');
        *byte = other;
        is_change.then_some(changed)
    }

    /// A byte, more often one that means something in a line.
    pub(in crate::wire) fn byte() -> impl Strategy<Value = u8> {
        prop_oneof![any::<u8>(), prop::sample::select(&b" \t\"\\{}[],:=|sigA"[..])]
    }

    /// No single byte of a line can become another one without either the signature or the message being
    /// another. That Ed25519 then fails is checked by `a_changed_byte_breaks_the_proof`, for it takes longer.
    pub(in crate::wire) fn assert_no_byte_is_loose(line: &[u8]) {
        fn messages(signed: &signature::Signed<'_>) -> Vec<Vec<u8>> {
            let readings = [Some(signed.first), signed.second];
            readings.into_iter().flatten().map(|reading| reading.message().into_owned()).collect()
        }
        assert!(is_proven(line));
        let original = Line::parse(line).unwrap();
        let original = original.signed().unwrap();
        let (made, known) = (signature::decode(original.value).unwrap(), messages(original));
        let mut changed = line.to_vec();
        for at in 0..line.len() {
            for other in (0..=u8::MAX).filter(|other| *other != line[at] && !matches!(other, b'\n' | b'\r')) {
                changed[at] = other;
                let is_loose = Line::parse(&changed).is_ok_and(|read| {
                    let Some(found) = read.signed() else { return false };
                    let Ok(bytes) = signature::decode(found.value) else { return false };
                    bytes == made && messages(found).iter().any(|message| known.contains(message))
                });
                assert!(!is_loose, "byte {at} as {other:#x}: {}", String::from_utf8_lossy(&changed));
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
        fn a_changed_byte_breaks_the_proof(
            mut event in documented_event(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), byte()), 24),
        ) {
            event.remove("sig");
            let line = signed(Format::Cef, write(&event).unwrap());
            for (at, other) in changes {
                if let Some(changed) = with_changed_byte(&line, at, other) {
                    prop_assert!(!is_proven(&changed), "{}", String::from_utf8_lossy(&changed));
                }
            }
        }

        #[test]
        fn a_signed_line_of_any_event_is_proven(event in any_event()) {
            if let Ok(line) = write(&event) {
                signed(Format::Cef, line);
            }
            signed(Format::Json, super::super::json::write(&event));
            signed(Format::Cps, super::super::json::write_wrapped(&event));
        }

        #[test]
        fn nothing_makes_the_parser_panic(
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
    fn no_byte_of_a_cef_line_is_loose() {
        for tail in ["a b", "x sig=y z", ""] {
            assert_no_byte_is_loose(&signed(Format::Cef, format!("{AUTHENTICATION}{tail}").into_bytes()));
        }
        assert_no_byte_is_loose(&signed(Format::Cef, b"CEF:0|a|b|c|d|e|0|".to_vec()));
    }
}
