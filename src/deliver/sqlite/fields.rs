//! The event's fields that have a column of their own.

use rusqlite::types::{ToSqlOutput, ValueRef};

use crate::wire::event::Value;

/// Type of a field's column.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    /// A number without a fraction, from -2^63 to 2^63 - 1.
    Integer,
    /// 0 or 1.
    Boolean,
    Text,
}

impl Kind {
    /// Returns the value for the column; none when it does not fit.
    pub(super) fn hold(self, value: &Value) -> Option<ToSqlOutput<'_>> {
        match (self, value) {
            (_, Value::Null) => Some(ToSqlOutput::Borrowed(ValueRef::Null)),
            (Self::Integer, Value::Number(digits)) => digits.parse::<i64>().ok().map(Into::into),
            (Self::Boolean, Value::Boolean(value)) => Some((*value).into()),
            (Self::Text, Value::Text(value)) => Some(text(value)),
            _ => None,
        }
    }
}

/// The event's fields that have a column of that name, sorted.
pub(super) const FIELDS: [(&str, Kind); 26] = [
    ("act", Kind::Text),
    ("action", Kind::Text),
    ("actor_id", Kind::Text),
    ("cef_version", Kind::Text),
    ("event_class_id", Kind::Text),
    ("event_product", Kind::Text),
    ("event_ts", Kind::Text),
    ("event_vendor", Kind::Text),
    ("event_version", Kind::Text),
    ("granted", Kind::Boolean),
    ("kong_initiated", Kind::Boolean),
    ("name", Kind::Text),
    ("org_id", Kind::Text),
    ("portal_id", Kind::Text),
    ("principal_id", Kind::Text),
    ("principal_name", Kind::Text),
    ("query", Kind::Text),
    ("request", Kind::Text),
    ("rt", Kind::Integer),
    ("severity", Kind::Integer),
    ("sig", Kind::Text),
    ("src", Kind::Text),
    ("status", Kind::Integer),
    ("success", Kind::Boolean),
    ("trace_id", Kind::Text),
    ("user_agent", Kind::Text),
];

/// Returns text for a column. A NUL character would hide what follows from `LIKE`, from most
/// functions and from the shell, so its six characters in JSON stand for it.
pub(super) fn text(text: &str) -> ToSqlOutput<'_> {
    if text.contains('\0') {
        return text.replace('\0', "\\u0000").into();
    }
    ToSqlOutput::Borrowed(ValueRef::Text(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::wire::event::schema;

    #[test]
    fn columns_are_sorted_and_the_fields_of_the_schema() {
        assert!(FIELDS.is_sorted_by_key(|(name, _)| name));
        for (name, kind) in FIELDS {
            assert!(matches!(schema::interned(name), Cow::Borrowed(_)), "{name}");
            let documented = schema::documented(name, Value::Number("1".to_owned()));
            assert_eq!(matches!(kind, Kind::Text), documented == Value::Text("1".to_owned()), "{name}");
            let documented = schema::documented(name, Value::Text("true".to_owned()));
            assert_eq!(matches!(kind, Kind::Boolean), documented == Value::Boolean(true), "{name}");
        }
    }
}
