//! One line of a body: recognised, taken apart without a copy, and read on demand.

use std::borrow::Cow;

use serde_json::value::RawValue;

use super::event::{Event, Format, Value, schema};
use super::signature::{Reading, Signed};

/// A line that is an event: its parts still point into the received bytes.
#[derive(Debug)]
pub struct Line<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) format: Format,
    pub(super) signed: Option<Signed<'a>>,
    pub(super) fields: Vec<Field<'a>>,
}

/// A key and its value as they are spelled in the line.
#[derive(Debug)]
pub(super) struct Field<'a> {
    pub(super) key: Cow<'a, str>,
    pub(super) value: Spelled<'a>,
    /// It is not known whether the producer wrote this field or a value forged it.
    pub(super) ambiguous: bool,
}

/// How a value is spelled.
#[derive(Debug)]
pub(super) enum Spelled<'a> {
    /// Without escapes.
    Plain(&'a str),
    /// In a CEF header, with `\|` and `\\`.
    Header(&'a str),
    /// In a CEF extension, with `\=`, `\\`, `\n` and `\r`.
    Extension(&'a str),
    /// As a JSON value.
    Json(&'a RawValue),
}

impl<'a> Line<'a> {
    /// The format it came in.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The signature and what it must have been made over; none when the line carries no signature.
    pub fn signed(&self) -> Option<&Signed<'a>> {
        self.signed.as_ref()
    }

    /// What identifies the event when no signature was checked: the signed bytes, or the line itself.
    pub fn content(&self) -> Reading<'a> {
        self.signed.map_or(Reading::whole(self.bytes), |signed| signed.first)
    }

    /// The event's own time in milliseconds since the Unix epoch: `rt`, or `event_ts` where `rt` is no
    /// number. A function of the line alone.
    pub fn time(&self) -> Option<i64> {
        if let Some(rt) = self.text("rt").and_then(|text| text.parse().ok()) {
            return Some(rt);
        }
        let stamp = self.text("event_ts")?;
        let time =
            time::OffsetDateTime::parse(&stamp, &time::format_description::well_known::Rfc3339).ok()?;
        i64::try_from(time.unix_timestamp_nanos() / 1_000_000).ok()
    }

    /// The organisation and the trace ID; none when the trace ID is missing, empty or ambiguous.
    pub fn trace(&self) -> Option<(Cow<'_, str>, Cow<'_, str>)> {
        let trace = self.text("trace_id").filter(|trace| !trace.is_empty())?;
        Some((self.text("org_id").unwrap_or_default(), trace))
    }

    /// What the line says, in the one schema of every format.
    pub fn event(&self) -> Event {
        let mut fields = Vec::with_capacity(self.fields.len() + 1);
        let mut ambiguous = Vec::new();
        for field in &self.fields {
            if field.ambiguous {
                ambiguous.push(field.key.clone().into_owned());
            } else {
                fields.push((schema::interned(&field.key), field.value.read()));
            }
        }
        if self.format == Format::Cef
            && let Some(signed) = &self.signed
        {
            fields.push((Cow::Borrowed("sig"), Value::Text(signed.value.to_owned())));
        }
        Event::from_parts(fields, ambiguous)
    }

    /// An unambiguous field as text; none when it is missing, ambiguous or no scalar.
    pub fn text(&self, name: &str) -> Option<Cow<'a, str>> {
        let field = self.fields.iter().find(|field| field.key == name && !field.ambiguous)?;
        field.value.text()
    }
}

impl<'a> Spelled<'a> {
    fn read(&self) -> Value {
        match self {
            Self::Plain(text) => Value::Text((*text).to_owned()),
            Self::Header(text) => Value::Text(unescape_header(text).into_owned()),
            Self::Extension(text) => Value::Text(unescape_extension(text).into_owned()),
            Self::Json(raw) => read_json(raw),
        }
    }

    /// A scalar as text: without a copy in the common case.
    fn text(&self) -> Option<Cow<'a, str>> {
        match self {
            Self::Plain(text) => Some(Cow::Borrowed(text)),
            Self::Header(text) => Some(unescape_header(text)),
            Self::Extension(text) => Some(unescape_extension(text)),
            Self::Json(raw) => {
                let spelled = raw.get();
                match spelled.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
                    Some(plain) if !plain.contains('\\') => Some(Cow::Borrowed(plain)),
                    None if !spelled.starts_with(['{', '[', 'n']) => Some(Cow::Borrowed(spelled)),
                    None => None,
                    Some(_) => Some(Cow::Owned(read_json(raw).text().into_owned())),
                }
            }
        }
    }
}

/// Whether a line can only be JSON or CPS.
pub(super) fn begins_like_json(text: &str) -> bool {
    text.trim_start_matches([' ', '\t']).starts_with('{')
}

/// Marks every key that occurs more than once. Linear in the number of fields but for the sort, since a
/// hostile line can hold tens of thousands.
pub(super) fn mark_repeated(fields: &mut [Field<'_>]) {
    let mut order: Vec<usize> = (0..fields.len()).collect();
    order.sort_unstable_by(|left, right| fields[*left].key.cmp(&fields[*right].key));
    for pair in order.windows(2) {
        if fields[pair[0]].key == fields[pair[1]].key {
            fields[pair[0]].ambiguous = true;
            fields[pair[1]].ambiguous = true;
        }
    }
}

/// Reads a JSON value. A string whose escapes name no character (a lone surrogate) keeps its spelling.
fn read_json(raw: &RawValue) -> Value {
    let spelled = raw.get();
    match spelled.as_bytes() {
        [b'"', ..] => match serde_json::from_str(spelled) {
            Ok(text) => Value::Text(text),
            Err(_) => Value::Text(spelled[1..spelled.len() - 1].to_owned()),
        },
        [b't', ..] => Value::Boolean(true),
        [b'f', ..] => Value::Boolean(false),
        [b'n', ..] => Value::Null,
        [b'{' | b'[', ..] => Value::Json(spelled.to_owned()),
        _ => Value::Number(spelled.to_owned()),
    }
}

/// Undoes `\|` and `\\`.
fn unescape_header(text: &str) -> Cow<'_, str> {
    unescape(text, |escaped| match escaped {
        '|' | '\\' => Some(escaped),
        _ => None,
    })
}

/// Undoes `\=`, `\\`, `\n` and `\r`; any other backslash stands for itself.
fn unescape_extension(text: &str) -> Cow<'_, str> {
    unescape(text, |escaped| match escaped {
        '=' | '\\' => Some(escaped),
        'n' => Some('\n'),
        'r' => Some('\r'),
        _ => None,
    })
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
