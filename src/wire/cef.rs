//! A CEF line, both directions: `{timestamp} konghq.com CEF:0|vendor|product|version|class id|name|severity|extension`.
//!
//! Source: ArcSight Common Event Format, version 25, and Kong's audit-log reference with its oddities.
//!
//! A caller of the producer's API controls some values, and a value may hold ` key=value`. [`doubt`] says
//! which keys may have been forged that way; those are reported and never become fields.

use std::borrow::Cow;
use std::ops::Range;

use super::event::{Event, Format, Malformed, Value, schema};
use super::line::{Field, Line, Spelled, mark_repeated};
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
        fields.push(header_field("event_ts", stamp));
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
/// When a header field is missing or the line would not parse back to the same event: a key with a space, a
/// value of another type than text in an unknown field, a known field that stands in doubt.
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

    match Line::parse(out.as_bytes()) {
        Ok(line) if line.event() == *event => Ok(out.into_bytes()),
        Ok(line) => Err(WriteError::Unrepresentable(difference(event, &line.event()))),
        Err(Malformed(detail)) => Err(WriteError::Unrepresentable(detail.into_owned())),
    }
}

/// Undoes `\|` and `\\`.
pub(super) fn unescape_header(text: &str) -> Cow<'_, str> {
    unescape(text, |escaped| match escaped {
        '|' | '\\' => Some(escaped),
        _ => None,
    })
}

/// Undoes `\=`, `\\`, `\n` and `\r`; any other backslash stands for itself.
pub(super) fn unescape_extension(text: &str) -> Cow<'_, str> {
    unescape(text, |escaped| match escaped {
        '=' | '\\' => Some(escaped),
        'n' => Some('\n'),
        'r' => Some('\r'),
        _ => None,
    })
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

fn unescape(text: &str, meaning: impl Fn(char) -> Option<char>) -> Cow<'_, str> {
    if !text.contains('\\') {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        if character != '\\' {
            out.push(character);
            continue;
        }
        match characters.clone().next().and_then(&meaning) {
            Some(meant) => {
                out.push(meant);
                characters.next();
            }
            None => out.push('\\'),
        }
    }
    Cow::Owned(out)
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
mod tests {
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
}
