//! The configuration as written: TOML into plain tables, each text with its place in the file.
//!
//! Only the shape is checked here: syntax, unknown keys, wrong types. Everything else, a missing key too, is
//! for the next step, so that it can be reported together. Each table is read on its own: a mistake in one
//! does not hide those in the others.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::{MapAccessDeserializer, StrDeserializer};
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue, ValueDeserializer};
use zeroize::Zeroizing;

use super::problem::{Findings, Problem, suggest};

/// A text and where it stands.
pub(super) type Text = Spanned<String>;

/// The whole file. Tables are in the order of their names and carry the place of their name.
#[derive(Default)]
pub(super) struct File {
    pub(super) data_dir: Option<Text>,
    pub(super) listen: Option<Spanned<Listen>>,
    pub(super) admin: Admin,
    pub(super) log: Log,
    pub(super) limits: Limits,
    pub(super) sources: Vec<(Text, Source)>,
    pub(super) sinks: Vec<(Text, Sink)>,
}

#[derive(Default, serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct Listen {
    pub(super) address: Option<Text>,
    pub(super) tls: Option<Spanned<Tls>>,
    pub(super) proxy_protocol: Option<Spanned<Vec<Text>>>,
}

pub(super) enum Tls {
    Word(String),
    Files(TlsFiles),
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct TlsFiles {
    pub(super) cert: Option<Text>,
    pub(super) key: Option<Text>,
    pub(super) client_ca: Option<Text>,
    pub(super) client_names: Option<Spanned<Vec<Text>>>,
}

#[derive(Default, serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct Admin {
    pub(super) address: Option<Text>,
    pub(super) token: Option<Spanned<Secret>>,
}

#[derive(Default, serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct Log {
    pub(super) level: Option<Text>,
    pub(super) format: Option<Text>,
}

#[derive(Default, serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct Limits {
    pub(super) body: Option<Spanned<Size>>,
    pub(super) decoded: Option<Spanned<Size>>,
    pub(super) line: Option<Spanned<Size>>,
    pub(super) lines: Option<Spanned<i64>>,
    pub(super) connections: Option<Spanned<i64>>,
    pub(super) connections_per_peer: Option<Spanned<i64>>,
    pub(super) request_timeout: Option<Text>,
    pub(super) idle_timeout: Option<Text>,
    pub(super) in_flight: Option<Spanned<Size>>,
    pub(super) backlog: Option<Spanned<Size>>,
}

/// A size as written, be it a text with a unit or a bare number of bytes.
pub(super) struct Size(pub(super) String);

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct Source {
    pub(super) path: Option<Text>,
    pub(super) authorization: Option<Spanned<OneOrMany<Secret>>>,
    pub(super) allow: Option<Spanned<Vec<Text>>>,
    pub(super) jwks: Option<Spanned<Jwks>>,
    pub(super) signatures: Option<Text>,
    pub(super) dedup: Option<Dedup>,
}

/// Exactly one of the four is to be given.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table such as { file = \"PATH\" }")]
pub(super) struct Secret {
    pub(super) file: Option<Text>,
    pub(super) env: Option<Text>,
    pub(super) credential: Option<Text>,
    pub(super) value: Option<Spanned<Hidden>>,
}

/// A text that is zeroed when it is dropped.
pub(super) struct Hidden(pub(super) Zeroizing<String>);

/// Exactly one of `file`, `url` and `keys` is to be given; `refresh`, `ca` and `token` belong to `url`.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table such as { url = \"https://…\" } or { file = \"PATH\" }")]
pub(super) struct Jwks {
    pub(super) file: Option<Text>,
    pub(super) url: Option<Text>,
    pub(super) refresh: Option<Text>,
    pub(super) ca: Option<Text>,
    pub(super) token: Option<Spanned<Secret>>,
    pub(super) keys: Option<Spanned<Vec<Text>>>,
    pub(super) pin: Option<Spanned<Vec<Text>>>,
    pub(super) revoked: Option<Vec<Text>>,
    pub(super) retired_for: Option<Text>,
}

#[derive(Default, serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table such as { by = \"event\", window = \"8d\" }")]
pub(super) struct Dedup {
    pub(super) by: Option<Text>,
    pub(super) window: Option<Text>,
}

/// What every sink has, and what its `type` adds.
pub(super) struct Sink {
    pub(super) stream: Option<Spanned<OneOrMany<String>>>,
    pub(super) sources: Option<Spanned<Vec<Text>>>,
    pub(super) when_full: Option<Text>,
    pub(super) kind: SinkKind,
}

/// Internally tagged by `type`. Not through serde's `tag`, which forgets where each value stood.
pub(super) enum SinkKind {
    File(Box<FileSink>),
    Sqlite(SqliteSink),
    Syslog(Box<SyslogSink>),
}

/// The names of the sinks' types.
const SINK_TYPES: [&str; 3] = ["file", "sqlite", "syslog"];
/// The keys that every sink has; `type` is taken out before the others are read.
const SINK_KEYS: [&str; 4] = ["type", "stream", "sources", "when_full"];

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct AnySink {
    stream: Option<Spanned<OneOrMany<String>>>,
    sources: Option<Spanned<Vec<Text>>>,
    when_full: Option<Text>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct FileSink {
    pub(super) path: Option<Text>,
    pub(super) format: Option<Text>,
    pub(super) rotate: Option<Rotate>,
    pub(super) fsync: Option<Text>,
    pub(super) fsync_interval: Option<Text>,
    pub(super) mode: Option<Text>,
    pub(super) owner: Option<Text>,
}

#[derive(Default, serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table such as { size = \"256MiB\", keep = 14 }")]
pub(super) struct Rotate {
    pub(super) size: Option<Spanned<Size>>,
    pub(super) every: Option<Text>,
    pub(super) keep: Option<Spanned<i64>>,
    pub(super) compress: Option<Text>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct SqliteSink {
    pub(super) path: Option<Text>,
    pub(super) retain: Option<Text>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct SyslogSink {
    pub(super) address: Option<Text>,
    pub(super) ca: Option<Text>,
    pub(super) cert: Option<Text>,
    pub(super) key: Option<Text>,
    pub(super) framing: Option<Text>,
    pub(super) facility: Option<Text>,
    pub(super) app_name: Option<Text>,
    pub(super) structured_data: Option<bool>,
    pub(super) max_size: Option<Spanned<Size>>,
}

/// One value, or an array of them.
pub(super) struct OneOrMany<T>(pub(super) Vec<T>);

/// Reads the file's text.
///
/// # Errors
/// Every syntax error or, when there is none, every wrong shape: one a table.
pub(super) fn parse(text: &str) -> Result<File, Vec<Problem>> {
    const KEYS: [&str; 7] = ["data_dir", "listen", "admin", "log", "limits", "sources", "sinks"];

    let mut findings = Findings::new(text);
    let (root, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        let at = error.span().unwrap_or(text.len()..text.len());
        let message = format!("not TOML: {}", error.message().replace('\n', ", "));
        findings.report(&at, message, "see https://toml.io for the syntax");
    }
    if !errors.is_empty() {
        let mut problems = findings.into_problems();
        // What follows the first error of a line is mostly its consequence.
        problems.sort_by_key(|problem| problem.line);
        problems.dedup_by_key(|problem| problem.line);
        return Err(problems);
    }

    let mut file = File::default();
    for (key, value) in root.into_inner() {
        let at = key.span();
        match &**key.get_ref() {
            "data_dir" => file.data_dir = decode(&mut findings, "the file's top level", value, &[]),
            "listen" => {
                file.listen =
                    decode(&mut findings, "[listen]", value, &[]).map(|table| Spanned::new(at, table));
            }
            "admin" => file.admin = decode(&mut findings, "[admin]", value, &[]).unwrap_or_default(),
            "log" => file.log = decode(&mut findings, "[log]", value, &[]).unwrap_or_default(),
            "limits" => file.limits = decode(&mut findings, "[limits]", value, &[]).unwrap_or_default(),
            "sources" => {
                for (name, value) in named(&mut findings, "sources", value) {
                    let table = format!("[sources.{}]", name.get_ref());
                    let source = decode(&mut findings, &table, value, &[]);
                    file.sources.extend(source.map(|source| (name, source)));
                }
            }
            "sinks" => {
                for (name, value) in named(&mut findings, "sinks", value) {
                    let sink = sink(&mut findings, &name, value);
                    file.sinks.extend(sink.map(|sink| (name, sink)));
                }
            }
            unknown => {
                let message = format!("unknown key `{unknown}` at the file's top level");
                findings.report(&at, message, suggest(unknown, "keys", KEYS));
            }
        }
    }
    if findings.is_empty() { Ok(file) } else { Err(findings.into_problems()) }
}

/// The tables of `[sources]` or `[sinks]`, each with its name.
fn named<'t>(
    findings: &mut Findings<'_>,
    group: &str,
    value: Spanned<DeValue<'t>>,
) -> Vec<(Text, Spanned<DeValue<'t>>)> {
    let at = value.span();
    let DeValue::Table(table) = value.into_inner() else {
        let hint = format!("give each a name, as in [{group}.NAME]");
        findings.report(&at, format!("`{group}` is not a table"), hint);
        return Vec::new();
    };
    let name = |key: Spanned<DeString<'t>>| Spanned::new(key.span(), key.into_inner().into_owned());
    table.into_iter().map(|(key, value)| (name(key), value)).collect()
}

fn sink(findings: &mut Findings<'_>, name: &Text, value: Spanned<DeValue<'_>>) -> Option<Sink> {
    let table = format!("[sinks.{}]", name.get_ref());
    let at = value.span();
    let DeValue::Table(mut keys) = value.into_inner() else {
        findings.report(&at, format!("{table} is not a table"), "give it a type and what the type needs");
        return None;
    };
    let mut common = DeTable::new();
    for key in SINK_KEYS {
        common.extend(keys.remove_entry(key));
    }
    let known = SINK_TYPES.join(", ");
    let Some(kind) = common.remove("type") else {
        let hint = format!("add one of: {known}");
        findings.report(&name.span(), format!("missing key `type` in {table}"), hint);
        return None;
    };
    let kind_at = kind.span();
    let kind: Option<String> = decode(findings, &table, kind, &[]);
    let rest = Spanned::new(at.clone(), DeValue::Table(keys));
    let kind = match kind?.as_str() {
        "file" => decode(findings, &table, rest, &SINK_KEYS).map(|file| SinkKind::File(Box::new(file))),
        "sqlite" => decode(findings, &table, rest, &SINK_KEYS).map(SinkKind::Sqlite),
        "syslog" => decode(findings, &table, rest, &SINK_KEYS).map(Box::new).map(SinkKind::Syslog),
        unknown => {
            let message = format!("unknown type `{unknown}` in {table}");
            findings.report(&kind_at, message, suggest(unknown, "types", SINK_TYPES));
            None
        }
    };
    let common: Option<AnySink> = decode(findings, &table, Spanned::new(at, DeValue::Table(common)), &[]);
    let (AnySink { stream, sources, when_full }, kind) = (common?, kind?);
    Some(Sink { stream, sources, when_full, kind })
}

/// Reads one value; `more_keys` are known in the same table besides those of `T`.
fn decode<'t, T: Deserialize<'t>>(
    findings: &mut Findings<'_>,
    table: &str,
    value: Spanned<DeValue<'t>>,
    more_keys: &[&str],
) -> Option<T> {
    let at = value.span();
    T::deserialize(ValueDeserializer::from(value))
        .map_err(|error| {
            let (message, hint) = describe(error.message(), table, more_keys);
            findings.report(&error.span().unwrap_or(at), message, hint);
        })
        .ok()
}

/// Turns serde's message into ours. serde has no other way to tell what was wrong, and its own wording
/// quotes the value found, which may be a secret in the wrong place.
fn describe(message: &str, table: &str, more_keys: &[&str]) -> (String, String) {
    if let Some((unknown, known)) =
        message.strip_prefix("unknown field `").and_then(|rest| rest.rsplit_once("`, expected "))
    {
        // "one of `a`, `b`": every second piece is a key.
        let known = more_keys.iter().copied().chain(known.split('`').skip(1).step_by(2));
        return (format!("unknown key `{unknown}` in {table}"), suggest(unknown, "keys", known));
    }
    if let Some((found, expected)) =
        message.strip_prefix("invalid type: ").and_then(|rest| rest.rsplit_once(", expected "))
    {
        let found = match found.split([' ', '`', '"']).next().unwrap_or_default() {
            "map" => "table",
            "sequence" => "array",
            "floating" => "number with a fraction",
            other => other,
        };
        let expected = if expected == "i64" { "an integer" } else { expected };
        return (format!("wrong type in {table}: found {found}"), format!("write {expected}"));
    }
    (format!("wrong value in {table}"), "see config.example.toml for what is possible".to_owned())
}

impl<'de> Deserialize<'de> for Tls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TlsVisitor;
        impl<'de> Visitor<'de> for TlsVisitor {
            type Value = Tls;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("{ cert = \"PATH\", key = \"PATH\" } or \"off\"")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Tls, E> {
                Ok(Tls::Word(word.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Tls, A::Error> {
                TlsFiles::deserialize(MapAccessDeserializer::new(map)).map(Tls::Files)
            }
        }
        deserializer.deserialize_any(TlsVisitor)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"8MiB\" or a number of bytes")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                Ok(Size(text.to_owned()))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
                Ok(Size(bytes.to_string()))
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

impl<'de> Deserialize<'de> for Hidden {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(Zeroizing::new(text)))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrManyVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for OneOrManyVisitor<T> {
            type Value = OneOrMany<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("one value or an array, as in config.example.toml")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<OneOrMany<T>, E> {
                T::deserialize(StrDeserializer::new(text)).map(|one| OneOrMany(vec![one]))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<OneOrMany<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(|one| OneOrMany(vec![one]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<OneOrMany<T>, A::Error> {
                let mut many = Vec::new();
                while let Some(one) = array.next_element()? {
                    many.push(one);
                }
                Ok(OneOrMany(many))
            }
        }
        deserializer.deserialize_any(OneOrManyVisitor(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn problems(text: &str) -> Vec<String> {
        let problems = parse(text).err().expect("all is well");
        let show = |Problem { line, message, hint }: &Problem| {
            format!("{}: {message}; {}", line.unwrap_or(0), hint.as_deref().unwrap_or("no hint"))
        };
        problems.iter().map(show).collect()
    }

    #[test]
    fn an_unknown_key_is_told_with_the_likely_one() {
        assert_eq!(
            problems("a = 1\n[listen]\naddress = \"x\"\nadress = \"x\"\n"),
            [
                "1: unknown key `a` at the file's top level; \
                 known keys: data_dir, listen, admin, log, limits, sources, sinks",
                "4: unknown key `adress` in [listen]; did you mean `address`?"
            ]
        );
        for (text, expected) in [
            ("[limit]", "1: unknown key `limit` at the file's top level; did you mean `limits`?"),
            ("[admin]\ntls = 1", "2: unknown key `tls` in [admin]; known keys: address, token"),
            ("[log]\nlevels = 1", "2: unknown key `levels` in [log]; did you mean `level`?"),
            ("[limits]\nlane = 1", "2: unknown key `lane` in [limits]; did you mean `line`?"),
            ("[listen]\ntls = { crt = 1 }", "2: unknown key `crt` in [listen]; did you mean `cert`?"),
            (
                "[sources.s]\ndedup.windows = 1",
                "2: unknown key `windows` in [sources.s]; did you mean `window`?",
            ),
            ("[sources.s]\njwks.uri = 1", "2: unknown key `uri` in [sources.s]; did you mean `url`?"),
            (
                "[sources.s]\nauthorization = [\n{ fil = 1 }]",
                "3: unknown key `fil` in [sources.s]; did you mean `file`?",
            ),
            ("[sources.s]\njwks.token.fil = 1", "2: unknown key `fil` in [sources.s]; did you mean `file`?"),
            (
                "[sinks.s]\ntype = \"file\"\nzzz = 1",
                "3: unknown key `zzz` in [sinks.s]; known keys: type, stream, sources, when_full, path, \
                 format, rotate, fsync, fsync_interval, mode, owner",
            ),
            (
                "[sinks.s]\ntype = \"file\"\nstreams = 1",
                "3: unknown key `streams` in [sinks.s]; did you mean `stream`?",
            ),
        ] {
            assert_eq!(problems(text), [expected]);
        }
        assert_eq!(
            problems("[log]\n\"x`, expected `y\" = 1"),
            ["2: unknown key `x`, expected `y` in [log]; known keys: level, format"]
        );
    }

    #[test]
    fn a_wrong_type_is_told_without_the_value() {
        for (text, expected) in [
            ("data_dir = 5", "1: wrong type in the file's top level: found integer; write a string"),
            ("listen = \"hush\"", "1: wrong type in [listen]: found string; write a table"),
            (
                "[listen]\ntls = true",
                "2: wrong type in [listen]: found boolean; write { cert = \"PATH\", key",
            ),
            (
                "[limits]\nbody = 1.5",
                "2: wrong type in [limits]: found number with a fraction; write a size such as",
            ),
            ("[limits]\nlines = \"5\"", "2: wrong type in [limits]: found string; write an integer"),
            ("[limits]\nrequest_timeout = 30", "2: wrong type in [limits]: found integer; write a string"),
            ("sources = 5", "1: `sources` is not a table; give each a name, as in [sources.NAME]"),
            ("[[sinks]]\n", "1: `sinks` is not a table; give each a name, as in [sinks.NAME]"),
            ("[sinks]\na = 5", "2: [sinks.a] is not a table"),
            ("[sources]\na = 5", "2: wrong type in [sources.a]: found integer; write a table"),
            (
                "[sources.s]\nauthorization = \"hush\"",
                "2: wrong type in [sources.s]: found string; write a table such as { file",
            ),
            (
                "[sources.s]\nauthorization = 5",
                "2: wrong type in [sources.s]: found integer; write one value or an array",
            ),
            (
                "[sources.s]\nauthorization = [\n\"hush\"]",
                "3: wrong type in [sources.s]: found string; write a table",
            ),
            (
                "[sources.s]\nauthorization.value = [\"hush\"]",
                "2: wrong type in [sources.s]: found array; write a string",
            ),
            (
                "[sources.s]\njwks = \"hush\"",
                "2: wrong type in [sources.s]: found string; write a table such as { url",
            ),
            (
                "[sinks.s]\ntype = \"file\"\nsources = \"a\"",
                "3: wrong type in [sinks.s]: found string; write a",
            ),
            (
                "[sinks.s]\ntype = \"file\"\nstream = [1]",
                "3: wrong type in [sinks.s]: found integer; write a string",
            ),
        ] {
            let found = problems(text);
            assert_eq!(found.len(), 1, "{found:#?}");
            assert!(found[0].starts_with(expected), "{text:?}: {found:#?}");
            assert!(!found[0].contains("hush"), "{found:#?}");
        }
    }

    #[test]
    fn a_sink_has_a_known_type() {
        assert_eq!(
            problems("[sinks.s]\n"),
            ["1: missing key `type` in [sinks.s]; add one of: file, sqlite, syslog"]
        );
        assert_eq!(
            problems("[sinks.s]\ntype = \"fil\""),
            ["2: unknown type `fil` in [sinks.s]; did you mean `file`?"]
        );
        assert_eq!(
            problems("[sinks.s]\npath = \"x\"\ntype = \"kafka\""),
            ["3: unknown type `kafka` in [sinks.s]; known types: file, sqlite, syslog"]
        );
    }

    #[test]
    fn a_syntax_error_is_one_line_without_the_text() {
        let found = problems("data_dir = \"x\"\n[sources.s]\nauthorization = { value = \"hush }\n");
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(found[0].starts_with("3: not TOML: "), "{found:#?}");
        assert!(!found[0].contains("hush") && !found[0].contains('\n'), "{found:#?}");
        let found = problems("a = 1\na = 2\nb = \n[c\n");
        let lines: Vec<&str> = found.iter().map(|text| text.split(':').next().unwrap()).collect();
        assert_eq!(lines, ["2", "3", "4"], "{found:#?}");
    }

    #[test]
    fn names_and_texts_know_their_place() {
        let text = "[sources.b]\npath = \"/b\"\n[sources.a]\npath = \"/a\"\n";
        let file = parse(text).unwrap_or_else(|problems| panic!("{problems:?}"));
        let findings = Findings::new(text);
        let places: Vec<(&str, usize, usize)> = file
            .sources
            .iter()
            .map(|(name, source)| {
                let path = source.path.as_ref().unwrap();
                (name.get_ref().as_str(), findings.line(&name.span()), findings.line(&path.span()))
            })
            .collect();
        assert_eq!(places, [("a", 3, 4), ("b", 1, 2)]);
    }
}
