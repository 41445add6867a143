//! A CEF line, both directions: `{timestamp} konghq.com CEF:0|vendor|product|version|class
//! id|name|severity|extension`.
//!
//! Source: ArcSight Common Event Format, version 25, and Kong's audit-log reference with its
//! oddities.
//!
//! A caller of the producer's API controls some values, and a value may hold ` key=value`.
//! [`extension`] decides which keys the producer wrote.

mod extension;

use std::borrow::Cow;

use super::event::{Event, Format, Malformed, schema};
use super::line::{Field, Line, Notation, begins_like_json};
use super::signature::cut_cef;

/// Parses a CEF line.
pub(super) fn parse(text: &str) -> Result<Line<'_>, Malformed> {
    let header_start = find_header(text).ok_or(Malformed::from("neither a JSON object nor a CEF header"))?;
    let header = Header::parse(&text[header_start..])?;
    let signed = cut_cef(text);
    let extension_start = header_start + header.extension;
    // A ` sig=` inside the header would not be an extension key.
    let signed = signed.filter(|signed| signed.first.before.len() >= extension_start.saturating_sub(1));
    let end = signed.map_or(text.len(), |signed| signed.first.before.len());

    let mut fields = Vec::with_capacity(24);
    if let Some(stamp) = time_stamp(&text[..header_start]) {
        // The time stamp comes before the header, where nothing is escaped.
        fields.push(Field::new("event_ts", stamp, Notation::Plain));
    }
    let of_header = [
        ("cef_version", Some(header.cef_version)),
        ("event_vendor", Some(header.vendor)),
        ("event_product", Some(header.product)),
        ("event_version", Some(header.version)),
        ("event_class_id", header.class),
        ("name", Some(header.name)),
        ("severity", Some(header.severity)),
    ];
    fields.extend(
        of_header.into_iter().filter_map(|(key, value)| Some(Field::new(key, value?, Notation::Header))),
    );
    let pairs = text.get(extension_start..end).unwrap_or("");
    let ambiguous = extension::read(pairs, schema::always_present(header.name, header.severity), &mut fields);
    if let Some(signed) = &signed {
        fields.push(Field::new("sig", &text[text.len() - signed.value.len()..], Notation::Plain));
    }
    Ok(Line { bytes: text.as_bytes(), format: Format::Cef, signed, fields, ambiguous })
}

/// Reason why an event has no CEF form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// A required header field is missing.
    #[error("the event has no `{0}`, which a CEF header needs")]
    Missing(&'static str),
    /// The event would not be parsed back as it is.
    #[error("the event cannot be written as CEF: {0}")]
    Unrepresentable(String),
}

/// Writes an event as a CEF line: the free text last, and each piece of it ended by a key that
/// every event has.
///
/// # Errors
/// When a header field other than `event_class_id` is missing, or the line would not parse back to
/// the same event:
/// - ambiguous keys; a key that is empty or holds more than ASCII letters, digits and `_.,-[]`;
/// - an unknown field whose value is not text, or a known one whose value is not of its documented
///   type (nor text that can be parsed as that type);
/// - free text that nothing would end: `request` without `src`, `principal_name` without
///   `trace_id`, `query` without `user_agent`, each with a further field;
/// - a line break in the header or in `sig`; a ` sig=` in `sig`;
/// - an `event_ts` that is empty, begins with `CEF:` or (behind white space) with `{`, or holds `
///   CEF:`;
/// - a `cef_version` that is not a number; without `event_class_id`, a `severity` that is neither
///   digits nor one of CEF's words; a `name` that looks like a severity before a `severity` that
///   begins with `key=`.
///
/// An event with all the documented fields of its type is therefore always written, whatever text
/// its values are, if its header satisfies the last three points.
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

    // A key that every event has ends the free text before it.
    const LAST: [&str; 6] = ["request", "src", "principal_name", "trace_id", "query", "user_agent"];
    const FIRST: [&str; 8] =
        ["rt", "act", "status", "action", "granted", "success", "org_id", "principal_id"];
    let is_placed = |name: &str| {
        name == "sig" || [&FIRST[..], &LAST, &schema::HEADER].iter().any(|names| names.contains(&name))
    };
    let named =
        |names: &'static [&'static str]| names.iter().filter_map(|name| Some((*name, event.field(name)?)));
    let others = event.fields().filter(|(name, _)| !is_placed(name));
    for (index, (name, value)) in named(&FIRST).chain(others).chain(named(&LAST)).enumerate() {
        if index > 0 {
            out.push(' ');
        }
        out.push_str(name);
        out.push('=');
        escape_extension(&mut out, &value.text());
    }
    if let Some(signature) = event.text("sig") {
        out.push_str(" sig=");
        out.push_str(&signature);
    }

    // In the extension they are escaped; elsewhere CEF has no spelling for them.
    if out.contains(['\n', '\r']) {
        return Err(WriteError::Unrepresentable("a line break outside the extension".to_owned()));
    }
    // A line that begins with `{` would be parsed as JSON.
    if begins_like_json(&out) {
        return Err(WriteError::Unrepresentable("`event_ts` begins like JSON".to_owned()));
    }
    match parse(&out) {
        Ok(line) if line.is_of(event) => Ok(out.into_bytes()),
        Ok(line) => Err(WriteError::Unrepresentable(difference(event, &line.event()))),
        Err(Malformed(detail)) => Err(WriteError::Unrepresentable(detail.into_owned())),
    }
}

/// Returns where `CEF:` begins: at the line's start or behind a space.
fn find_header(text: &str) -> Option<usize> {
    if text.starts_with("CEF:") {
        return Some(0);
    }
    memchr::memchr_iter(b':', text.as_bytes())
        .find(|at| text.as_bytes()[..*at].ends_with(b" CEF"))
        .map(|at| at - "CEF".len())
}

/// Returns the time stamp before the host name: an RFC 3339 one or syslog's `Apr 14 05:39:08`, kept
/// as it is spelled. A line may lack the host, and then ends in the time of day.
fn time_stamp(prefix: &str) -> Option<&str> {
    let prefix = prefix.strip_suffix(' ')?;
    let stamp = match prefix.rsplit_once(' ') {
        Some((stamp, host)) if !is_time_of_day(host) => stamp,
        _ => prefix,
    };
    (!stamp.is_empty()).then_some(stamp)
}

/// Returns whether a text is like `05:39:08`, which is neither a host name nor an IPv6 address.
fn is_time_of_day(text: &str) -> bool {
    text.len() == 8
        && text.bytes().enumerate().all(|(at, byte)| match at {
            2 | 5 => byte == b':',
            _ => byte.is_ascii_digit(),
        })
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
    /// Start of the extension, counted from `CEF:`.
    extension: usize,
}

impl<'a> Header<'a> {
    fn parse(text: &'a str) -> Result<Self, Malformed> {
        let mut rest = "CEF:".len();
        let cef_version = piece(text, &mut rest, "version")?;
        if cef_version.is_empty() || !cef_version.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err("the CEF version is not a number".into());
        }
        let vendor = piece(text, &mut rest, "vendor")?;
        let product = piece(text, &mut rest, "product")?;
        let version = piece(text, &mut rest, "device version")?;
        let fifth = piece(text, &mut rest, "name")?;
        let sixth = piece(text, &mut rest, "severity")?;
        let six_fields = rest;
        // With seven fields the sixth is the name and a severity follows. Behind the sixth of only
        // six comes `key=`, and a later bar belongs to a value.
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

/// Returns the header field that begins at `rest`, and moves `rest` behind its bar.
fn piece<'a>(text: &'a str, rest: &mut usize, name: &'static str) -> Result<&'a str, Malformed> {
    let start = *rest;
    let length = unescaped_bar(&text[start..])
        .ok_or_else(|| Malformed(Cow::Owned(format!("the CEF header ends before its {name}"))))?;
    *rest = start + length + 1;
    Ok(&text[start..start + length])
}

/// Returns whether a text is an integer or one of CEF's words.
fn is_severity(text: &str) -> bool {
    matches!(text, "Unknown" | "Low" | "Medium" | "High" | "Very-High")
        || (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()))
}

fn begins_with_key(text: &str) -> bool {
    extension::begins_with_key(text)
}

/// Returns the first `|` that no backslash escapes.
fn unescaped_bar(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    memchr::memchr_iter(b'|', bytes).find(|at| {
        let backslashes = bytes[..*at].iter().rev().take_while(|byte| **byte == b'\\').count();
        backslashes % 2 == 0
    })
}

fn escape_header(out: &mut String, text: &str) {
    escape(out, text, |byte| match byte {
        b'|' => Some("\\|"),
        b'\\' => Some("\\\\"),
        _ => None,
    });
}

fn escape_extension(out: &mut String, text: &str) {
    escape(out, text, |byte| match byte {
        b'=' => Some("\\="),
        b'\\' => Some("\\\\"),
        b'\n' => Some("\\n"),
        b'\r' => Some("\\r"),
        _ => None,
    });
}

/// Appends a text in which some ASCII characters have another spelling.
fn escape(out: &mut String, mut text: &str, spelling: impl Fn(u8) -> Option<&'static str>) {
    while let Some((at, spelled)) =
        text.bytes().enumerate().find_map(|(at, byte)| Some((at, spelling(byte)?)))
    {
        out.push_str(&text[..at]);
        out.push_str(spelled);
        text = &text[at + 1..];
    }
    out.push_str(text);
}

/// Returns the first field that would be parsed back differently.
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
pub(super) mod tests;
