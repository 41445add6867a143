//! How an event is stored: what it shares with other events once, in a row of `event_common`, and
//! the rest in a row of `event_rows`. The view `events` puts the two together.
//!
//! Most of a line repeats from event to event: who, from where, with which program, what kind of
//! event. The line itself is stored as a template, in which a control character stands for each
//! value that is new in every event and that `event_rows` has anyway. The view puts the values
//! back, which gives the line to the last byte; a line for which that would not hold is stored
//! whole. Everything but those values is part of what must be equal for two events to share a row,
//! the template and every column alike.
//!
//! No event refers to a common row that is a day older or more, by `received_at`. So the common row
//! can be deleted when the events of that day have expired, without a look at who refers to it.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::LazyLock;

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, params_from_iter};

use super::fields::FIELDS;

/// Time for which a common row is used, in milliseconds.
const USE: i64 = 86_400_000;

/// Maximum number of common rows that are known at a time, some 100 bytes each. Beyond it all are
/// forgotten, and those that are needed again are written again.
const KNOWN: usize = 1 << 15;

/// The fields that are columns of `event_rows`: what differs from event to event, and what an index
/// needs.
const OWN: [&str; 9] =
    ["event_ts", "granted", "principal_id", "query", "request", "rt", "sig", "success", "trace_id"];

/// The fields whose values the template leaves out, each with the character that stands for it
/// there. The view has the same list.
const LEFT_OUT: [(&str, u8); 6] =
    [("event_ts", 1), ("query", 2), ("request", 3), ("rt", 4), ("sig", 5), ("trace_id", 6)];

/// Length from which on a value is left out of the template, in bytes. Shorter ones are few, and
/// could be found by chance in the middle of another value.
const SHORTEST: usize = 6;

/// The columns that do not follow from a field, in the order of [`Values::given`].
pub(super) const GIVEN: [&str; 5] = ["source", "verified", "key_id", "format", "extra"];

/// All columns of an event.
pub(super) struct Values<'a> {
    pub(super) received_at: i64,
    /// In the order of [`GIVEN`].
    pub(super) given: [ToSqlOutput<'a>; GIVEN.len()],
    /// In the order of [`FIELDS`].
    pub(super) fields: [ToSqlOutput<'a>; FIELDS.len()],
    pub(super) raw: ToSqlOutput<'a>,
}

/// The common rows that new events may refer to. Valid only for the connection that wrote them, and
/// no longer after a transaction of it failed.
#[derive(Default)]
pub(super) struct Commons {
    known: HashMap<blake3::Hash, Common>,
    /// Room for what is hashed.
    content: Vec<u8>,
}

#[derive(Clone, Copy)]
struct Common {
    id: i64,
    received_at: i64,
}

impl Commons {
    /// Inserts an event, under a given `id` or the next one; returns the number of inserted events,
    /// which must be one.
    pub(super) fn insert(
        &mut self,
        connection: &Connection,
        id: Option<i64>,
        values: &Values<'_>,
    ) -> rusqlite::Result<usize> {
        let template = template(values);
        let Some(common) = self.find_or_insert(connection, values, template.as_deref())? else {
            return Ok(0);
        };
        let raw = if template.is_some() { &NULL } else { &values.raw };
        let id = id.map_or(NULL, Into::into);
        let first = [id, common.into(), values.received_at.into()];
        let own = LAYOUT.own.iter().map(|at| &values.fields[*at]);
        let mut insert = connection.prepare_cached(&LAYOUT.insert_row)?;
        insert.execute(params_from_iter(first.iter().chain(own).chain([raw])))
    }

    /// Forgets all common rows.
    pub(super) fn forget(&mut self) {
        self.known.clear();
    }

    /// Returns the `id` of the row that the event shares; none when something kept it from being
    /// inserted.
    fn find_or_insert(
        &mut self,
        connection: &Connection,
        values: &Values<'_>,
        template: Option<&str>,
    ) -> rusqlite::Result<Option<i64>> {
        let template = template.map_or(NULL, |text| ToSqlOutput::Borrowed(ValueRef::from(text)));
        let shared = || {
            let fields = LAYOUT.shared.iter().map(|at| &values.fields[*at]);
            values.given.iter().chain(fields).chain([&template])
        };
        self.content.clear();
        shared().for_each(|value| append(&mut self.content, value));
        let hash = blake3::hash(&self.content);
        let received_at = values.received_at;
        if let Some(common) = self.known.get(&hash)
            && (common.received_at..common.received_at.saturating_add(USE)).contains(&received_at)
        {
            return Ok(Some(common.id));
        }
        let mut insert = connection.prepare_cached(&LAYOUT.insert_common)?;
        if insert.execute(params_from_iter([&received_at.into()].into_iter().chain(shared())))? != 1 {
            return Ok(None);
        }
        let id = connection.last_insert_rowid();
        if self.known.len() >= KNOWN {
            self.known.clear();
        }
        self.known.insert(hash, Common { id, received_at });
        Ok(Some(id))
    }
}

/// Deletes some common rows that no event refers to any more, when all events that arrived before
/// `cutoff` are gone; returns their number. The caller must forget those that it knows.
pub(super) fn delete_some(connection: &Connection, cutoff: i64, limit: usize) -> rusqlite::Result<usize> {
    const DELETE: &str = "DELETE FROM event_common WHERE id IN \
         (SELECT id FROM event_common WHERE received_at <= ?1 - ?2 ORDER BY received_at LIMIT ?3) \
         AND NOT EXISTS (SELECT 1 FROM event_rows WHERE received_at < ?1)";
    connection.prepare_cached(DELETE)?.execute(rusqlite::params![cutoff, USE, limit])
}

const NULL: ToSqlOutput<'static> = ToSqlOutput::Borrowed(ValueRef::Null);

/// Where the columns are, by their index in [`FIELDS`], and how they are inserted.
struct Layout {
    own: Vec<usize>,
    shared: Vec<usize>,
    insert_row: String,
    insert_common: String,
}

static LAYOUT: LazyLock<Layout> = LazyLock::new(|| {
    let (own, shared) = (0..FIELDS.len()).partition(|at: &usize| OWN.contains(&FIELDS[*at].0));
    let names = |columns: &Vec<usize>| columns.iter().map(|at| FIELDS[*at].0).collect::<Vec<_>>();
    let row = [vec!["id", "common_id", "received_at"], names(&own), vec!["raw"]].concat();
    let common = [vec!["received_at"], GIVEN.to_vec(), names(&shared), vec!["template"]].concat();
    Layout {
        insert_row: insert("event_rows", &row),
        insert_common: insert("event_common", &common),
        own,
        shared,
    }
});

fn insert(table: &str, columns: &[&str]) -> String {
    let mut parameters = "?1".to_owned();
    for number in 2..=columns.len() {
        // Writing into a string cannot fail.
        let _ = write!(parameters, ", ?{number}");
    }
    format!("INSERT INTO {table} ({}) VALUES ({parameters})", columns.join(", "))
}

/// Returns the line without what the event's own columns have; none when it must be stored whole,
/// since it is not text or has a character that would stand for a value.
fn template(values: &Values<'_>) -> Option<String> {
    let ToSqlOutput::Borrowed(ValueRef::Text(raw)) = values.raw else { return None };
    if raw.iter().any(|byte| (LEFT_OUT[0].1..=LEFT_OUT[LEFT_OUT.len() - 1].1).contains(byte)) {
        return None;
    }
    // Start and end of each value in the line, and its character.
    let mut parts: [(usize, usize, u8); LEFT_OUT.len()] = [(0, 0, 0); LEFT_OUT.len()];
    for (part, (at, mark)) in parts.iter_mut().zip(LEFT_OUT_AT.iter()) {
        let number;
        let value = match borrowed(&values.fields[*at]) {
            ValueRef::Text(text) => text,
            ValueRef::Integer(integer) => {
                number = integer.to_string();
                number.as_bytes()
            }
            _ => continue,
        };
        if value.len() >= SHORTEST
            && let Some(start) = memchr::memmem::find(raw, value)
        {
            *part = (start, start + value.len(), *mark);
        }
    }
    parts.sort_unstable();
    let mut out = Vec::with_capacity(raw.len());
    let mut done = 0;
    for (start, end, mark) in parts {
        // A value that overlaps with another stays in the template.
        if end > 0 && start >= done {
            out.extend_from_slice(&raw[done..start]);
            out.push(mark);
            done = end;
        }
    }
    out.extend_from_slice(&raw[done..]);
    String::from_utf8(out).ok()
}

/// [`LEFT_OUT`] with the index in [`FIELDS`].
static LEFT_OUT_AT: LazyLock<[(usize, u8); LEFT_OUT.len()]> = LazyLock::new(|| {
    LEFT_OUT.map(|(name, mark)| {
        let at = FIELDS.iter().position(|(field, _)| *field == name);
        (at.unwrap_or_default(), mark)
    })
});

fn borrowed<'a>(value: &'a ToSqlOutput<'_>) -> ValueRef<'a> {
    match value {
        ToSqlOutput::Borrowed(value) => *value,
        ToSqlOutput::Owned(value) => value.into(),
        _ => ValueRef::Null,
    }
}

/// Appends a value such that no other sequence of values gives the same bytes.
fn append(content: &mut Vec<u8>, value: &ToSqlOutput<'_>) {
    match borrowed(value) {
        ValueRef::Null => content.push(0),
        ValueRef::Integer(number) => {
            content.push(1);
            content.extend_from_slice(&number.to_le_bytes());
        }
        ValueRef::Real(number) => {
            content.push(2);
            content.extend_from_slice(&number.to_le_bytes());
        }
        ValueRef::Text(bytes) => {
            content.push(3);
            content.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            content.extend_from_slice(bytes);
        }
        ValueRef::Blob(bytes) => {
            content.push(4);
            content.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            content.extend_from_slice(bytes);
        }
    }
}
