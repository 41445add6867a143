//! One line of a body: recognised, taken apart without a copy, and parsed on demand.

use std::borrow::Cow;

use super::event::class::{ClassFields, EventClass};
use super::event::{Event, Format, Value, schema, truth};
use super::signature::{Reading, Signed};

/// A line that is an event: its parts point into the received bytes.
#[derive(Debug)]
pub struct Line<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) format: Format,
    pub(super) signed: Option<Signed<'a>>,
    /// No two have the same key.
    pub(super) fields: Vec<Field<'a>>,
    /// See [`Event::ambiguous`]; in any order, a key more than once.
    pub(super) ambiguous: Vec<Cow<'a, str>>,
}

/// A key and its value as they are spelled in the line.
#[derive(Debug)]
pub(super) struct Field<'a> {
    pub(super) key: Cow<'a, str>,
    pub(super) value: Cow<'a, str>,
    pub(super) notation: Notation,
}

/// Notation of a value.
#[derive(Clone, Copy, Debug)]
pub(super) enum Notation {
    /// Without escapes.
    Plain,
    /// In a CEF header, with `\|` and `\\`.
    Header,
    /// In a CEF extension, with `\=`, `\\`, `\n` and `\r`.
    Extension,
    /// As a JSON value.
    Json,
}

impl<'a> Line<'a> {
    /// Returns its format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Returns the signature and the bytes over which it must have been made; none when the line
    /// carries no signature.
    pub fn signed(&self) -> Option<&Signed<'a>> {
        self.signed.as_ref()
    }

    /// Returns what identifies the event when no signature was checked: the signed bytes, or the
    /// line itself.
    pub fn content(&self) -> Reading<'a> {
        self.signed.map_or(Reading::whole(self.bytes), |signed| signed.first)
    }

    /// Returns the event's own time in milliseconds since the Unix epoch: `rt`, or `event_ts` where
    /// `rt` is not a number. A function of the line alone.
    pub fn time(&self) -> Option<i64> {
        if let Some(rt) = self.text("rt").and_then(|text| text.parse().ok()) {
            return Some(rt);
        }
        let stamp = self.text("event_ts")?;
        let time =
            time::OffsetDateTime::parse(&stamp, &time::format_description::well_known::Rfc3339).ok()?;
        i64::try_from(time.unix_timestamp_nanos() / 1_000_000).ok()
    }

    /// Returns the organisation and the trace ID; none when the trace ID is missing or empty, or
    /// when one of the two is ambiguous.
    pub fn trace(&self) -> Option<(Cow<'_, str>, Cow<'_, str>)> {
        if self.ambiguous.iter().any(|key| key == "trace_id" || key == "org_id") {
            return None;
        }
        let trace = self.text("trace_id").filter(|trace| !trace.is_empty())?;
        Some((self.text("org_id").unwrap_or_default(), trace))
    }

    /// Returns the event, in the one schema of every format.
    pub fn event(&self) -> Event {
        let fields = self.fields().map(|field| (schema::interned(&field.key), field.value().into_owned()));
        let ambiguous = self.ambiguous().into_iter().map(str::to_owned);
        Event::from_sorted(fields.collect(), ambiguous.collect())
    }

    /// Returns whether an event is exactly this line's; never when a key is ambiguous.
    pub(crate) fn is_of(&self, event: &Event) -> bool {
        let own = self.fields().map(|field| (&*field.key, field.value()));
        let others = event.fields().map(|(name, value)| (name, value.as_ref()));
        self.ambiguous.is_empty() && event.ambiguous().is_empty() && own.eq(others)
    }

    /// Returns the fields in the order of [`Event::fields`].
    pub(super) fn fields(&self) -> impl Iterator<Item = &Field<'a>> {
        in_order(&self.fields, 0).into_iter().map(|(_, at)| &self.fields[at])
    }

    /// Returns the keys of [`Event::ambiguous`].
    pub(super) fn ambiguous(&self) -> Vec<&str> {
        let mut keys: Vec<&str> = self.ambiguous.iter().map(AsRef::as_ref).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// Returns the event's class, in one pass over its fields.
    #[doc(hidden)]
    pub fn class(&self) -> EventClass {
        let mut fields = ClassFields::default();
        for field in &self.fields {
            match field.key.as_ref() {
                "name" => fields.name = field.text(),
                "severity" => fields.severity = field.text(),
                "granted" => fields.granted = field.text(),
                "kong_initiated" => fields.kong_initiated = field.text(),
                _ => {}
            }
        }
        EventClass::of(&fields)
    }

    /// Returns a field as text; none when it is missing or not a scalar.
    pub fn text(&self, name: &str) -> Option<Cow<'_, str>> {
        self.fields.iter().find(|field| field.key == name)?.text()
    }
}

impl<'a> Field<'a> {
    pub(super) fn new(
        key: impl Into<Cow<'a, str>>,
        value: impl Into<Cow<'a, str>>,
        notation: Notation,
    ) -> Self {
        Self { key: key.into(), value: value.into(), notation }
    }

    pub(super) fn into_owned<'b>(self) -> Field<'b> {
        Field::new(self.key.into_owned(), self.value.into_owned(), self.notation)
    }

    /// Returns the value that [`Line::event`] has, without a copy in the common case.
    pub(super) fn value(&self) -> Value<Cow<'_, str>> {
        schema::documented(&self.key, self.read())
    }

    /// Returns the value as it is spelled, whatever is documented.
    fn read(&self) -> Value<Cow<'_, str>> {
        match self.notation {
            Notation::Plain => Value::Text(Cow::Borrowed(&self.value)),
            Notation::Header => Value::Text(unescape_header(&self.value)),
            Notation::Extension => Value::Text(unescape_extension(&self.value)),
            Notation::Json => read_json(&self.value),
        }
    }

    /// Returns a scalar as text.
    fn text(&self) -> Option<Cow<'_, str>> {
        match self.read() {
            Value::Text(text) | Value::Number(text) => Some(text),
            Value::Boolean(value) => Some(Cow::Borrowed(truth(value))),
            Value::Null | Value::Json(_) => None,
        }
    }
}

/// Returns whether a line can only be JSON or CPS.
pub(super) fn begins_like_json(text: &str) -> bool {
    text.trim_start_matches([' ', '\t']).starts_with('{')
}

/// Removes those of `fields[from..]` whose key occurs there more than once, and returns their keys;
/// only a field before `kept_before` stays, when its key does not occur twice before that. Linear
/// in the number of fields except for the sort, since a hostile line can hold tens of thousands.
pub(super) fn take_repeated<'a>(
    fields: &mut Vec<Field<'a>>,
    from: usize,
    kept_before: usize,
) -> Vec<Cow<'a, str>> {
    let order = in_order(fields, from);
    let mut taken = Vec::new();
    let mut repeated = Vec::new();
    for run in order.chunk_by(|left, right| left.0 == right.0 && fields[left.1].key == fields[right.1].key) {
        if let [(_, first), (_, second), ..] = *run {
            repeated.push(fields[first].key.clone());
            let stays = first < kept_before && second >= kept_before;
            taken.extend(run[usize::from(stays)..].iter().map(|(_, at)| *at));
        }
    }
    if !taken.is_empty() {
        taken.sort_unstable();
        let (mut at, mut next) = (0, taken.into_iter().peekable());
        fields.retain(|_| {
            at += 1;
            next.next_if_eq(&(at - 1)).is_none()
        });
    }
    repeated
}

/// Returns the indices of `fields[from..]` in the order of their keys, those of one key in their
/// own order. Each comes with the beginning of its key as a number, which is compared first: that
/// decides nearly always, and costs less than a comparison of texts.
fn in_order(fields: &[Field<'_>], from: usize) -> Vec<(u64, usize)> {
    let beginning = |key: &str| {
        key.as_bytes().first_chunk().map_or_else(
            || {
                (0..8).fold(0, |number, at| {
                    number << 8 | key.as_bytes().get(at).map_or(0, |byte| u64::from(*byte))
                })
            },
            |eight| u64::from_be_bytes(*eight),
        )
    };
    let mut order = Vec::with_capacity(fields.len() - from);
    order.extend(fields.iter().enumerate().skip(from).map(|(at, field)| (beginning(&field.key), at)));
    order.sort_unstable_by(|left, right| {
        left.0.cmp(&right.0).then_with(|| (&fields[left.1].key, left.1).cmp(&(&fields[right.1].key, right.1)))
    });
    order
}

/// Parses a JSON value. A string whose escapes are not characters (a lone surrogate) keeps its
/// spelling.
fn read_json(spelled: &str) -> Value<Cow<'_, str>> {
    match spelled.as_bytes() {
        [b'"', inside @ .., b'"'] => {
            let inside = &spelled[1..=inside.len()];
            let is_escaped = memchr::memchr(b'\\', inside.as_bytes()).is_some();
            let unescaped = is_escaped.then(|| serde_json::from_str(spelled).ok()).flatten();
            Value::Text(unescaped.map_or(Cow::Borrowed(inside), Cow::Owned))
        }
        [b't', ..] => Value::Boolean(true),
        [b'f', ..] => Value::Boolean(false),
        [b'n', ..] => Value::Null,
        [b'{' | b'[', ..] => Value::Json(Cow::Borrowed(spelled)),
        _ => Value::Number(Cow::Borrowed(spelled)),
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
    if memchr::memchr(b'\\', text.as_bytes()).is_none() {
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
