//! Responses, and the fields of a request's body.

use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};

use hyper::StatusCode;
use serde_json::{Map, Value, json};

use crate::escape::escape_json;

/// A response.
#[derive(Clone, Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) content_type: Option<&'static str>,
    pub(super) allow: Option<&'static str>,
    pub(super) body: String,
}

/// Numbers the errors, as Konnect's support asks for them.
static ERRORS: AtomicU64 = AtomicU64::new(1);

impl Reply {
    pub(super) fn json(status: u16, value: &Value) -> Self {
        Self::text(status, "application/json", escape_json(&value.to_string()).into_owned())
    }

    pub(super) fn text(status: u16, content_type: &'static str, body: String) -> Self {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { status, content_type: Some(content_type), allow: None, body }
    }

    /// A 204.
    pub(super) fn nothing() -> Self {
        Self { status: StatusCode::NO_CONTENT, content_type: None, allow: None, body: String::new() }
    }

    /// An error in the form of RFC 9457.
    pub(super) fn problem(status: u16, detail: &str) -> Self {
        Self::problem_with(status, detail, None)
    }

    /// A 400 that names each invalid field.
    pub(super) fn invalid(fields: Vec<Invalid>) -> Self {
        let fields =
            fields.into_iter().map(|Invalid { field, reason }| json!({"field": field, "reason": reason}));
        Self::problem_with(400, "Invalid Parameters", Some(fields.collect()))
    }

    pub(super) fn invalid_body(reason: &str) -> Self {
        Self::invalid(vec![Invalid::new("body", reason)])
    }

    /// A 405.
    pub(super) fn method(allowed: &'static str) -> Self {
        Self { allow: Some(allowed), ..Self::problem(405, &format!("allowed here: {allowed}")) }
    }

    fn problem_with(status: u16, detail: &str, invalid: Option<Vec<Value>>) -> Self {
        let title = StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
        let instance = format!("kong:trace:{}", ERRORS.fetch_add(1, Ordering::Relaxed));
        let mut problem = json!({
            "status": status,
            "title": title.unwrap_or("Error"),
            "instance": instance,
            "detail": detail,
        });
        if let Some(invalid) = invalid {
            problem["invalid_parameters"] = Value::Array(invalid);
        }
        Self { content_type: Some("application/problem+json"), ..Self::json(status, &problem) }
    }
}

/// A field of a request that cannot be used, and why.
#[derive(Debug)]
pub(super) struct Invalid {
    field: String,
    reason: String,
}

impl Invalid {
    pub(super) fn new(field: &str, reason: impl Display) -> Self {
        Self { field: field.to_owned(), reason: reason.to_string() }
    }
}

/// The members of a request's body, and what is wrong with them.
pub(super) struct Fields {
    members: Map<String, Value>,
    invalid: Vec<Invalid>,
}

impl Fields {
    /// Parses a body; an empty one has no members.
    pub(super) fn parse(body: &[u8]) -> Result<Self, Reply> {
        let members = match body.trim_ascii() {
            b"" => Map::new(),
            body => serde_json::from_slice(body)
                .map_err(|error| Reply::invalid_body(&format!("is not a JSON object: {error}")))?,
        };
        Ok(Self { members, invalid: Vec::new() })
    }

    pub(super) fn refuse(&mut self, field: &str, reason: impl Display) {
        self.invalid.push(Invalid::new(field, reason));
    }

    pub(super) fn text(&mut self, field: &str) -> Option<String> {
        match self.members.remove(field)? {
            Value::String(text) => Some(text),
            _ => self.wrong(field, "must be a string"),
        }
    }

    pub(super) fn boolean(&mut self, field: &str) -> Option<bool> {
        match self.members.remove(field)? {
            Value::Bool(value) => Some(value),
            _ => self.wrong(field, "must be true or false"),
        }
    }

    /// Returns a whole number of at most `most`.
    pub(super) fn number(&mut self, field: &str, most: u64) -> Option<u64> {
        match self.members.remove(field)?.as_u64().filter(|number| *number <= most) {
            Some(number) => Some(number),
            None => self.wrong(field, &format!("must be a whole number from 0 to {most}")),
        }
    }

    /// Returns a member that `parse` understands.
    pub(super) fn parsed<T, E: Display>(
        &mut self,
        field: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let text = self.text(field)?;
        parse(&text).map_err(|error| self.refuse(field, error)).ok()
    }

    /// Refuses a body without the member.
    pub(super) fn require(&mut self, field: &str) {
        if !self.members.contains_key(field) {
            self.refuse(field, "is required");
        }
    }

    /// Returns every problem, members that nothing asked for included.
    pub(super) fn finish(mut self) -> Result<(), Reply> {
        for field in std::mem::take(&mut self.members).keys() {
            self.refuse(field, "is not a field of this request");
        }
        if self.invalid.is_empty() { Ok(()) } else { Err(Reply::invalid(self.invalid)) }
    }

    fn wrong<T>(&mut self, field: &str, reason: &str) -> Option<T> {
        self.refuse(field, reason);
        None
    }
}
