//! One line and its row: which field has which column, and what goes to `extra`.

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, params};

use super::common::{Commons, Values};
use super::fields::{FIELDS, text};

use crate::deliver::sink::Item;
use crate::ledger::Position;
use crate::wire::event::{Event, Format, Reason, Verdict};
use crate::wire::line::Line;
use crate::wire::record;

/// A line to be inserted.
pub(super) struct Row {
    /// The position behind it.
    pub(super) behind: Position,
    received_at: i64,
    source: Box<str>,
    verdict: Verdict,
    key_id: Option<Box<str>>,
    raw: Box<[u8]>,
}

impl Row {
    pub(super) fn new(item: &Item<'_>) -> Self {
        Self {
            behind: item.behind,
            received_at: item.received_at,
            source: item.source.into(),
            verdict: item.verdict.clone(),
            key_id: item.key_id.map(Into::into),
            raw: item.raw.into(),
        }
    }

    /// Returns its memory, in bytes.
    pub(super) fn size(&self) -> usize {
        size_of::<Self>() + self.source.len() + self.key_id.as_ref().map_or(0, |id| id.len()) + self.raw.len()
    }

    /// Inserts it into its table; returns the number of changed rows, which must be one.
    pub(super) fn insert(&self, connection: &Connection, commons: &mut Commons) -> rusqlite::Result<usize> {
        let is_verified = match &self.verdict {
            Verdict::Rejected { reason, detail } => return self.quarantine(connection, *reason, detail),
            Verdict::Verified { .. } => true,
            Verdict::Unverified => false,
        };
        match Line::parse(&self.raw) {
            Ok(line) => {
                commons.insert(connection, None, &self.values(&line.event(), line.format(), is_verified))
            }
            // Only what parsed is accepted; if this version parses less than the one that accepted
            // the line, it is kept all the same.
            Err(error) => self.quarantine(connection, Reason::Malformed, &error.0),
        }
    }

    fn values<'a>(&'a self, event: &'a Event, format: Format, is_verified: bool) -> Values<'a> {
        let (fields, extra) = columns(event);
        let null = || ToSqlOutput::Borrowed(ValueRef::Null);
        Values {
            received_at: self.received_at,
            given: [
                text(&self.source),
                is_verified.into(),
                self.key_id.as_deref().map_or_else(null, text),
                text(format.as_str()),
                extra.map_or_else(null, Into::into),
            ],
            fields,
            raw: raw(&self.raw),
        }
    }

    fn quarantine(&self, connection: &Connection, reason: Reason, detail: &str) -> rusqlite::Result<usize> {
        let mut insert = connection.prepare_cached(
            "INSERT INTO quarantine (received_at, source, reason, detail, raw) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?;
        insert.execute(params![self.received_at, self.source, reason.as_str(), text(detail), raw(&self.raw)])
    }
}

/// Returns the values of an event's columns, in the order of [`FIELDS`], and the rest: see
/// [`extra`].
pub(super) fn columns(event: &Event) -> ([ToSqlOutput<'_>; FIELDS.len()], Option<String>) {
    let mut columns = FIELDS.map(|_| ToSqlOutput::Borrowed(ValueRef::Null));
    let mut rest = Event::new();
    for (name, value) in event.fields() {
        let column = FIELDS.binary_search_by(|(known, _)| known.cmp(&name)).ok();
        match column.and_then(|at| Some((at, FIELDS[at].1.hold(value)?))) {
            Some((at, held)) => columns[at] = held,
            None => rest.set(name.to_owned(), value.clone()),
        }
    }
    (columns, extra(event.ambiguous(), &rest))
}

/// Returns a line exactly as it was received: text, or a blob where no text of SQLite can hold it
/// to its end.
pub(super) fn raw(line: &[u8]) -> ToSqlOutput<'_> {
    ToSqlOutput::Borrowed(match std::str::from_utf8(line) {
        Ok(text) if !text.contains('\0') => ValueRef::Text(line),
        _ => ValueRef::Blob(line),
    })
}

/// Returns as JSON what has no column; none when there is nothing. The two members are separate, so
/// that a field called `ambiguous` cannot be mistaken for the list of keys.
fn extra(ambiguous: &[String], rest: &Event) -> Option<String> {
    let mut out = Vec::new();
    if !ambiguous.is_empty() {
        out.extend_from_slice(b",\"ambiguous\":");
        record::write_keys(&mut out, ambiguous);
    }
    if rest.fields().next().is_some() {
        out.extend_from_slice(b",\"event\":");
        record::write_event(&mut out, rest);
    }
    *out.first_mut()? = b'{';
    out.push(b'}');
    String::from_utf8(out).ok().map(without_nul)
}

/// Replaces NUL characters in the strings of JSON, which SQLite's functions would return: see
/// [`text`].
fn without_nul(json: String) -> String {
    const NUL: &str = "\\u0000";
    if !json.contains(NUL) {
        return json;
    }
    let mut out = String::with_capacity(json.len() + 16);
    let mut rest = json.as_str();
    while let Some(at) = rest.find('\\') {
        // A backslash and what it escapes go together.
        let (before, escape) = rest.split_at(at);
        out.push_str(before);
        if escape.starts_with(NUL) {
            out.push('\\');
        }
        let end = escape.char_indices().nth(2).map_or(escape.len(), |(end, _)| end);
        out.push_str(&escape[..end]);
        rest = &escape[end..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::event::Value;

    #[test]
    fn an_unknown_field_cannot_pretend_to_be_the_list_of_ambiguous_keys() {
        assert_eq!(extra(&[], &Event::new()), None);
        let mut rest = Event::new();
        rest.set("ambiguous", Value::Text("x\u{1b}".into()));
        assert_eq!(extra(&[], &rest).unwrap(), r#"{"event":{"ambiguous":"x\u001b"}}"#);
        assert_eq!(
            extra(&["a\u{202e}".into(), "b".into()], &rest).unwrap(),
            r#"{"ambiguous":["a\u202e","b"],"event":{"ambiguous":"x\u001b"}}"#
        );
    }
}
