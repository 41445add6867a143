//! What the tests of this module's parts share: a file with which nothing is wrong, and what becomes of it.

use std::path::PathBuf;

use super::super::file::parse;
use super::super::{Config, Problem, Secrets};
use super::resolve;

/// One source and two sinks with which nothing is wrong, on known lines.
pub(super) const GOOD: &str = r#"data_dir = "data"
[listen]
address = "127.0.0.1:8443"
tls = "off"
[sources.us]
path = "/us"
authorization = { value = "Bearer abc" }
jwks = { url = "https://us.example.com/jwks.json" }
[sinks.good]
type = "file"
path = "good.log"
format = "raw"
[sinks.bad]
type = "file"
path = "bad.jsonl"
format = "json"
stream = "quarantine"
"#;

pub(super) fn resolve_text(text: &str, secrets: Secrets) -> Result<Config, Vec<Problem>> {
    let environment = |name: &str| match name {
        "TOKEN" => Some("Bearer env".into()),
        "TOKEN_ONLY" => Some("env".into()),
        _ => None,
    };
    parse(text).and_then(|written| {
        resolve(written, text, PathBuf::from("/nonexistent/base/config.toml"), &environment, secrets)
    })
}

pub(super) fn config(text: &str) -> Config {
    resolve_text(text, Secrets::Require).unwrap_or_else(|problems| panic!("{problems:#?}"))
}

/// The problems as `LINE: message; hint`, line 0 for those without one.
pub(super) fn problems(text: &str) -> Vec<String> {
    let mut problems = resolve_text(text, Secrets::Require).expect_err("all is well");
    problems.sort_by_key(|problem| problem.line);
    let show = |Problem { line, message, hint }: &Problem| {
        format!("{}: {message}; {}", line.unwrap_or(0), hint.as_deref().unwrap_or("no hint"))
    };
    problems.iter().map(show).collect()
}

/// GOOD with a replacement has exactly one problem, which begins with `expected`.
#[track_caller]
pub(super) fn refused(from: &str, to: &str, expected: &str) {
    assert!(GOOD.contains(from), "{from}");
    let found = problems(&GOOD.replacen(from, to, 1));
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].starts_with(expected), "{found:#?}");
}

#[track_caller]
pub(super) fn accepted(from: &str, to: &str) -> Config {
    assert!(GOOD.contains(from), "{from}");
    config(&GOOD.replacen(from, to, 1))
}
