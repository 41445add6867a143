//! The content of one audit event, in one schema for every format, and the nouns for the verdict on
//! a line.

#[doc(hidden)]
pub mod class;

use std::borrow::Cow;
use std::fmt;

/// Format of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// `{timestamp} konghq.com CEF:0|…|key=value …`
    Cef,
    /// One JSON object.
    Json,
    /// The JSON object wrapped once: `{"event":{…}}`.
    Cps,
}

impl Format {
    /// Every format, for command lines and tests.
    pub const ALL: [Self; 3] = [Self::Cef, Self::Json, Self::Cps];

    /// Returns the name that Konnect's webhook configuration uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cef => "cef",
            Self::Json => "json",
            Self::Cps => "cps",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|format| format.as_str() == text);
        known.ok_or_else(|| UnknownFormat(text.to_owned()))
    }
}

/// A text that is not the name of a [`Format`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a format; use cef, json or cps")]
pub struct UnknownFormat(String);

/// Reason why a line (or a whole body) is in quarantine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[doc(hidden)]
pub enum Reason {
    /// It is not an event: no CEF header, no JSON object, two signatures.
    Malformed,
    /// It carries a signature that no trusted key made.
    BadSignature,
    /// It carries no signature although its source requires one.
    Unsigned,
    /// It is longer than the `line` limit.
    LineTooLong,
    /// The body was whole, but it could not be decoded into lines.
    UndecodableBody,
}

impl Reason {
    /// Every reason, in the order of their stored codes.
    pub const ALL: [Self; 5] =
        [Self::Malformed, Self::BadSignature, Self::Unsigned, Self::LineTooLong, Self::UndecodableBody];

    /// Returns the name in quarantine records, metrics and receipts.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::BadSignature => "bad_signature",
            Self::Unsigned => "unsigned",
            Self::LineTooLong => "line_too_long",
            Self::UndecodableBody => "undecodable_body",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Verdict on one line, before it is known whether it is new.
#[derive(Clone, Debug, PartialEq, Eq)]
#[doc(hidden)]
pub enum Verdict {
    /// A trusted key made its signature.
    Verified {
        /// The index of that key in the key set that judged the batch.
        key: usize,
    },
    /// The source's policy accepts it without a proof.
    Unverified,
    /// It goes to quarantine.
    Rejected {
        /// Name of the reason, from a closed list.
        reason: Reason,
        /// Description of the error, for people. Never longer than a few hundred bytes.
        detail: Cow<'static, str>,
    },
}

impl Verdict {
    /// Returns the stream that the line belongs to.
    pub fn stream(&self) -> Stream {
        match self {
            Self::Verified { .. } => Stream::Verified,
            Self::Unverified => Stream::Unverified,
            Self::Rejected { .. } => Stream::Quarantine,
        }
    }
}

/// Output that a line belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[doc(hidden)]
pub enum Stream {
    /// Lines whose signature a trusted key made.
    Verified,
    /// Lines that a source's policy accepted without a proof.
    Unverified,
    /// Lines that were rejected, with their reason.
    Quarantine,
}

impl Stream {
    /// Every stream.
    pub const ALL: [Self; 3] = [Self::Verified, Self::Unverified, Self::Quarantine];

    /// Returns the name in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Verified => "verified",
            Self::Unverified => "unverified",
            Self::Quarantine => "quarantine",
        }
    }
}

/// Reason why a line is not an event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
#[doc(hidden)]
pub struct Malformed(pub Cow<'static, str>);

impl From<&'static str> for Malformed {
    fn from(text: &'static str) -> Self {
        Self(Cow::Borrowed(text))
    }
}

/// Value of a field. Numbers keep every digit as it was written. `T` holds the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value<T = String> {
    /// A string.
    Text(T),
    /// A number in JSON's notation (RFC 8259, section 6), never converted.
    Number(T),
    /// `true` or `false`.
    Boolean(bool),
    /// JSON's `null`.
    Null,
    /// An array or object of an unknown field, as the received bytes.
    Json(T),
}

impl Value {
    /// Returns the same value without a copy.
    pub(super) fn as_ref(&self) -> Value<Cow<'_, str>> {
        match self {
            Self::Text(text) => Value::Text(Cow::Borrowed(text)),
            Self::Number(text) => Value::Number(Cow::Borrowed(text)),
            Self::Boolean(value) => Value::Boolean(*value),
            Self::Null => Value::Null,
            Self::Json(text) => Value::Json(Cow::Borrowed(text)),
        }
    }

    /// Returns the value as text, the way a CEF line or a log message shows it.
    pub fn text(&self) -> Cow<'_, str> {
        match self {
            Self::Text(text) | Self::Number(text) | Self::Json(text) => Cow::Borrowed(text),
            Self::Boolean(value) => Cow::Borrowed(truth(*value)),
            Self::Null => Cow::Borrowed(""),
        }
    }
}

impl Value<Cow<'_, str>> {
    pub(super) fn into_owned(self) -> Value {
        match self {
            Self::Text(text) => Value::Text(text.into_owned()),
            Self::Number(text) => Value::Number(text.into_owned()),
            Self::Boolean(value) => Value::Boolean(value),
            Self::Null => Value::Null,
            Self::Json(text) => Value::Json(text.into_owned()),
        }
    }
}

/// Returns a boolean's spelling.
pub(super) fn truth(value: bool) -> &'static str {
    if value { "true" } else { "false" }
}

/// An event's fields under Konnect's flat names, sorted by name, each at most once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    fields: Vec<(Cow<'static, str>, Value)>,
    ambiguous: Vec<String>,
}

impl Event {
    /// Creates an event without a field.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the field of that name.
    pub fn field(&self, name: &str) -> Option<&Value> {
        // An event has some 20 fields, most of which differ in length: quicker than a binary search.
        self.fields.iter().find(|(known, _)| known == name).map(|(_, value)| value)
    }

    /// Returns the field's value as text, when it is there.
    pub fn text(&self, name: &str) -> Option<Cow<'_, str>> {
        self.field(name).map(Value::text)
    }

    /// Sets a field, converting the value to the field's documented type where it can be parsed as
    /// such.
    pub fn set(&mut self, name: impl Into<Cow<'static, str>>, value: Value) {
        let name = name.into();
        let value = schema::documented(&name, value);
        match self.fields.binary_search_by(|(known, _)| known.cmp(&name)) {
            Ok(at) => self.fields[at].1 = value,
            Err(at) => self.fields.insert(at, (name, value)),
        }
    }

    /// Removes a field.
    pub fn remove(&mut self, name: &str) -> Option<Value> {
        let at = self.fields.binary_search_by(|(known, _)| known.as_ref().cmp(name)).ok()?;
        Some(self.fields.remove(at).1)
    }

    /// Returns the fields in the order of their names.
    pub fn fields(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.fields.iter().map(|(name, value)| (name.as_ref(), value))
    }

    /// Returns the ambiguous keys, sorted: those that occur twice, that have the name of a header
    /// field, or that are inside a free-text value, and that value's own key (`docs/fields.md`).
    /// What a caller may have written is never a field under its key; a key that the producer
    /// certainly wrote is one all the same.
    pub fn ambiguous(&self) -> &[String] {
        &self.ambiguous
    }

    /// Creates an event of fields with their documented types and of ambiguous keys, both sorted, each
    /// name once.
    pub(super) fn from_sorted(fields: Vec<(Cow<'static, str>, Value)>, ambiguous: Vec<String>) -> Self {
        Self { fields, ambiguous }
    }
}

/// Konnect's documented fields. Source: Kong's audit-log reference, "Log formats".
#[doc(hidden)]
pub mod schema {
    use super::{Cow, Value, truth};

    /// The CEF header's fields under their flat names, in header order.
    pub const HEADER: [&str; 8] = [
        "event_ts",
        "cef_version",
        "event_vendor",
        "event_product",
        "event_version",
        "event_class_id",
        "name",
        "severity",
    ];

    /// Values that a caller of Konnect's API controls: they can hold anything, ` key=value`
    /// included.
    pub const FREE_TEXT: [&str; 4] = ["principal_name", "query", "request", "user_agent"];

    /// The fields that Konnect documents, sorted.
    pub(in crate::wire) const KNOWN: [&str; 26] = [
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
        "sig",
        "src",
        "status",
        "success",
        "trace_id",
        "user_agent",
    ];

    /// Returns the name for `Cow::Borrowed`, so that known fields cost no allocation.
    pub fn interned(name: &str) -> Cow<'static, str> {
        KNOWN
            .iter()
            .find(|known| **known == name)
            .map_or_else(|| Cow::Owned(name.to_owned()), |known| Cow::Borrowed(*known))
    }

    /// Konnect's three types of events, recognised by their `name`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Type {
        /// `AUTHENTICATION_OUTCOME_*`
        Authentication,
        /// `Authz.*`
        Authorization,
        /// `Ingress`
        Access,
        /// Something that Konnect does not document yet.
        Other,
    }

    impl Type {
        /// Returns the type of the event with that `name`.
        pub fn of(name: &str) -> Self {
            if name.starts_with("AUTHENTICATION_OUTCOME_") {
                Self::Authentication
            } else if name.starts_with("Authz.") {
                Self::Authorization
            } else if name == "Ingress" {
                Self::Access
            } else {
                Self::Other
            }
        }
    }

    /// Returns the extension keys that every event with that `name` and `severity` has, as Konnect
    /// documents its types and outcomes: at most [`MOST_PRESENT`]. A failed login can lack `org_id`
    /// and `principal_id`; a refused access (401, 403) may have no principal; for a type that is
    /// not documented, only the keys that every documented event has.
    pub fn always_present(name: &str, severity: &str) -> &'static [&'static str] {
        match Type::of(name) {
            Type::Authentication if name == "AUTHENTICATION_OUTCOME_SUCCESS" => {
                &["rt", "src", "trace_id", "user_agent", "request", "success", "org_id", "principal_id"]
            }
            Type::Authentication => &["rt", "src", "trace_id", "user_agent", "request", "success"],
            Type::Authorization => {
                &["rt", "src", "trace_id", "user_agent", "action", "granted", "org_id", "principal_id"]
            }
            Type::Access if severity == "6" => {
                &["rt", "src", "trace_id", "user_agent", "request", "act", "status", "query"]
            }
            Type::Access => &[
                "rt",
                "src",
                "trace_id",
                "user_agent",
                "request",
                "act",
                "status",
                "query",
                "org_id",
                "principal_id",
            ],
            Type::Other => &["rt", "src", "trace_id", "user_agent"],
        }
    }

    /// Length of the longest list of [`always_present`].
    pub const MOST_PRESENT: usize = 10;

    /// Converts a value to its field's documented type: `rt`, `status` and `severity` are integers,
    /// `success`, `granted` and `kong_initiated` booleans, the other known fields text. A value
    /// that cannot be parsed that way stays as it is; unknown fields are never touched.
    pub fn documented<'a, T: AsRef<str> + From<&'a str>>(name: &str, value: Value<T>) -> Value<T> {
        match value {
            Value::Text(text) => match name {
                "rt" | "status" | "severity" if is_integer(text.as_ref()) => Value::Number(text),
                "success" | "granted" | "kong_initiated" if text.as_ref() == "true" => Value::Boolean(true),
                "success" | "granted" | "kong_initiated" if text.as_ref() == "false" => Value::Boolean(false),
                _ => Value::Text(text),
            },
            Value::Number(text) if is_text(name) => Value::Text(text),
            Value::Boolean(value) if is_text(name) => Value::Text(truth(value).into()),
            other => other,
        }
    }

    /// Returns whether a field is documented as text.
    fn is_text(name: &str) -> bool {
        matches!(
            name,
            "act"
                | "action"
                | "actor_id"
                | "cef_version"
                | "event_class_id"
                | "event_product"
                | "event_ts"
                | "event_vendor"
                | "event_version"
                | "name"
                | "org_id"
                | "portal_id"
                | "principal_id"
                | "principal_name"
                | "query"
                | "request"
                | "sig"
                | "src"
                | "trace_id"
                | "user_agent"
        )
    }

    /// Returns whether a text is an integer in JSON's notation, so that writing it as a number
    /// changes no byte.
    fn is_integer(text: &str) -> bool {
        let digits = text.strip_prefix('-').unwrap_or(text).as_bytes();
        match digits {
            [] => false,
            [b'0'] => true,
            [b'0', ..] => false,
            _ => digits.iter().all(u8::is_ascii_digit),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_documented_type_is_kept_to_the_last_digit() {
        let mut event = Event::new();
        event.set("trace_id", Value::Number("18446744073709551616".into()));
        event.set("rt", Value::Text("1684196881193".into()));
        event.set("success", Value::Text("true".into()));
        event.set("new_field", Value::Number("1e3".into()));
        assert_eq!(event.field("trace_id"), Some(&Value::Text("18446744073709551616".into())));
        assert_eq!(event.field("rt"), Some(&Value::Number("1684196881193".into())));
        assert_eq!(event.field("success"), Some(&Value::Boolean(true)));
        assert_eq!(event.field("new_field"), Some(&Value::Number("1e3".into())));
    }

    #[test]
    fn a_value_of_another_type_stays_text() {
        for odd in ["3958q3097698", "007", "-", "", "1.5"] {
            let mut event = Event::new();
            event.set("rt", Value::Text(odd.into()));
            assert_eq!(event.field("rt"), Some(&Value::Text(odd.into())));
        }
    }
}
