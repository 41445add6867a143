//! The configuration file as a tree of keys and values with their positions, and the problems found
//! in it.
//!
//! serde stops at the first problem. So the key of each problem is removed from the tree, or a
//! missing one inserted, and the rest is read again, until serde finds no more: one problem hides
//! no other.

use std::borrow::Cow;
use std::fmt::Display;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::Deserialize;
use toml::Spanned;
use toml::de::{DeArray, DeString, DeTable, DeValue, ValueDeserializer};
use zeroize::Zeroize as _;

use super::problem::{Problem, likely, line_of, suggest};

/// A value with its span.
type Node<'t> = Spanned<DeValue<'t>>;

/// Keys that every table of a kind has; its type adds others.
const TYPED: [(&str, &[&str]); 2] =
    [("sinks", &["type", "stream", "sources", "when_full"]), ("inputs", &["type"])];

/// The file, with absolute paths, and the problems that were found in it.
pub(super) struct Document<'t> {
    text: &'t str,
    tree: Tree<'t>,
    locations: Vec<Location>,
    /// Keys that lead to each wrong value.
    wrong: Vec<Vec<String>>,
    problems: Vec<Problem>,
}

/// Position of a key and its value in the text.
#[derive(Clone, Default)]
struct Location {
    /// Keys that lead to the value. Elements of arrays are numbered.
    keys: Vec<String>,
    key: Range<usize>,
    value: Range<usize>,
}

/// A tree whose texts, which may be secrets, are zeroed when it is dropped. Most are borrowed from
/// the file's text.
#[derive(Clone)]
struct Tree<'t>(Node<'t>);

impl Drop for Tree<'_> {
    fn drop(&mut self) {
        walk(&Location::default(), &mut self.0, &mut |_, value| {
            if let DeValue::String(Cow::Owned(text)) = value.get_mut() {
                text.zeroize();
            }
        });
    }
}

impl<'t> Document<'t> {
    /// Reads the file's text. Relative paths start from `base`.
    ///
    /// # Errors
    /// Every syntax error.
    pub(super) fn parse(text: &'t str, base: &Path) -> Result<Self, Vec<Problem>> {
        let (root, errors) = DeTable::parse_recoverable(text);
        let mut problems: Vec<Problem> = errors
            .iter()
            .map(|error| {
                let line = line_of(text.as_bytes(), error.span().map_or(text.len(), |span| span.start));
                let what = error.message().replace('\n', ", ");
                let message = format!("not TOML: {what}; see https://toml.io for the syntax");
                Problem { line: Some(line), message }
            })
            .collect();
        if !problems.is_empty() {
            // What follows the first error of a line is mostly its consequence.
            problems.sort_by_key(|problem| problem.line);
            problems.dedup_by_key(|problem| problem.line);
            return Err(problems);
        }
        let tree = Tree(Spanned::new(root.span(), DeValue::Table(root.into_inner())));
        let mut document = Self { text, tree, locations: Vec::new(), wrong: Vec::new(), problems };
        document.prepare(base);
        Ok(document)
    }

    /// Makes paths absolute and lists of what may be one value, and refuses empty paths and arrays.
    fn prepare(&mut self, base: &Path) {
        let (mut locations, mut found) = (Vec::new(), Vec::new());
        walk(&Location::default(), &mut self.tree.0, &mut |location, value| {
            let keys: Vec<&str> = location.keys.iter().map(String::as_str).collect();
            if let ["sources", _, "authorization"] | ["sinks", _, "stream"] = keys[..]
                && !value.get_ref().is_array()
            {
                let one = std::mem::replace(value.get_mut(), DeValue::Boolean(false));
                *value.get_mut() = DeValue::Array(DeArray::from_iter([Spanned::new(value.span(), one)]));
            }
            let problem = match value.get_mut() {
                DeValue::Array(array) if array.is_empty() && !keys.ends_with(&["revoked"]) => {
                    Err("the array is empty; list at least one, or remove the key")
                }
                DeValue::String(text) if is_path(&keys) => absolute(text, base, &keys),
                _ => Ok(()),
            };
            found.extend(problem.err().map(|problem| (location.clone(), problem)));
            locations.push(location.clone());
        });
        self.locations = locations;
        for (location, problem) in found {
            let problem = format!("{}: {problem}", shown(&location.keys));
            self.report(location.keys, &location.value, problem);
        }
    }

    /// Reads the whole file into a type. Where anything is wrong, that is reported, and the type
    /// holds something else.
    pub(super) fn decode<T: Deserialize<'t>>(&mut self) -> Option<T> {
        let mut tree = self.tree.clone();
        loop {
            let error = match T::deserialize(ValueDeserializer::from(fold_types(tree.0.clone()))) {
                Ok(decoded) => return Some(decoded),
                Err(error) => error,
            };
            let (message, span) = (error.message(), error.span().unwrap_or_default());
            let location =
                self.locations.iter().find(|location| location.key == span || location.value == span);
            let is_written = location.is_some();
            let mut keys = location.map_or_else(Vec::new, |location| location.keys.clone());
            if let Some(key) = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`'))
            {
                let around = keys.clone();
                keys.push(key.to_owned());
                let (hint, placeholder) = required(&keys);
                let hint = hint.replace("NAME", keys.get(1).map_or("", String::as_str));
                let problem = format!("missing key {}; add {key} = {hint}", shown(&keys));
                self.report(keys, &span, problem);
                if let Some(placeholder) = placeholder
                    && let Some(table) = table_at(tree.0.get_mut(), &around)
                {
                    table.insert(nowhere(key.to_owned().into()), nowhere(placeholder));
                    continue;
                }
            } else {
                let (problem, meant) = describe(message, &keys);
                // Misspelt is not missing.
                let meant = meant.map(|key| [&keys[..keys.len() - 1], &[key]].concat());
                self.report(keys, &span, problem);
                self.wrong.extend(meant);
            }
            if !is_written || !remove(tree.0.get_mut(), &span) {
                return None;
            }
        }
    }

    /// Reports a problem of some keys of a table (`.` leads into one below), or of the table where
    /// there is none: at the first of them that is written. Not when one of them has a problem
    /// already.
    pub(super) fn check(&mut self, table: &[&str], keys: &[&str], problem: impl Display) {
        let mut locations: Vec<Vec<&str>> =
            keys.iter().map(|key| [table, &key.split('.').collect::<Vec<_>>()].concat()).collect();
        locations.push(table.to_vec());
        if locations[..keys.len().max(1)].iter().any(|location| self.is_wrong(location)) {
            return;
        }
        let written = |keys: &Vec<&str>| {
            self.locations.iter().find(|location| location.keys == *keys && !keys.is_empty())
        };
        let line = locations.iter().find_map(written).map(|location| self.line(&location.key));
        self.problems.push(Problem { line, message: problem.to_string() });
    }

    /// Returns whether the file has a value for these keys.
    pub(super) fn is_written(&self, keys: &[&str]) -> bool {
        self.locations.iter().any(|location| location.keys == keys)
    }

    /// Lets no check report what depends on these keys.
    pub(super) fn distrust(&mut self, keys: &[&str]) {
        self.wrong.push(keys.iter().map(|key| (*key).to_owned()).collect());
    }

    /// Returns whether the value of these keys, anything inside it or around it has a problem.
    pub(super) fn is_wrong<K>(&self, keys: &[K]) -> bool
    where
        String: PartialEq<K>,
    {
        self.wrong.iter().any(|wrong| wrong.iter().zip(keys).all(|(wrong, key)| wrong == key))
    }

    /// Everything that was found.
    pub(super) fn into_problems(self) -> Vec<Problem> {
        self.problems
    }

    fn report(&mut self, keys: Vec<String>, span: &Range<usize>, message: String) {
        if !self.is_wrong(&keys) {
            let line = (!span.is_empty()).then(|| self.line(span));
            self.problems.push(Problem { line, message });
        }
        self.wrong.push(keys);
    }

    fn line(&self, span: &Range<usize>) -> usize {
        line_of(self.text.as_bytes(), span.start)
    }
}

/// Returns whether these keys lead to the path of a file. In a source, `path` is another.
fn is_path(keys: &[&str]) -> bool {
    let is_output = matches!(keys, ["data_dir"] | ["sinks" | "inputs", _, "path"] | ["signing", "jwks"]);
    is_output || matches!(keys, [.., "cert" | "key" | "ca" | "client_ca" | "file"])
}

fn absolute(text: &mut DeString<'_>, base: &Path, keys: &[&str]) -> Result<(), &'static str> {
    if text.is_empty() || text.contains('\0') {
        return Err("not a path; write the path of a file, absolute or from this file's directory");
    }
    // Drops `.` and doubled slashes; `..` stays, for it may follow a symbolic link.
    let path: PathBuf = base.join(&**text).components().collect();
    let is_file = keys.ends_with(&["path"]) && keys[0] != "inputs";
    if is_file && (text.ends_with('/') || path.file_name().is_none()) {
        return Err("a directory, not a file; add a file name");
    }
    let path = path.to_str().ok_or("this file's directory is not UTF-8; write an absolute path")?;
    *text = path.to_owned().into();
    Ok(())
}

/// Returns a required key's hint, and a placeholder with which the rest of the file can be read.
fn required(keys: &[String]) -> (&'static str, Option<DeValue<'static>>) {
    let text = |text: &'static str| DeValue::String(text.into());
    let (hint, placeholder) = match &keys.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["data_dir"] => ("\"/var/lib/auditgate\" above the first table", text("/")),
        ["listen"] => {
            let placeholder = table([("address", text("127.0.0.1:0")), ("tls", text("off"))]);
            ("{ address = …, tls = … } above the first table, or [listen]", placeholder)
        }
        ["listen", "address"] => ("\"0.0.0.0:8443\"", text("127.0.0.1:0")),
        ["listen", "tls"] => ("{ cert = \"cert.pem\", key = \"key.pem\" }", text("off")),
        ["listen", "tls", _] => ("\"PATH\"", text("/")),
        ["sources", _, "path"] => ("\"/konnect/NAME\"", text("/")),
        ["sources", _, "authorization"] => ("{ file = \"tokens/NAME\" }", DeValue::Array(DeArray::new())),
        // A sink without a type is left out.
        ["sinks", _, "type"] => return ("\"file\", \"sqlite\" or \"syslog\"", None),
        ["sinks", _, "path"] => ("\"/var/log/auditgate/NAME.log\"", text("/")),
        ["sinks", _, "format"] => ("\"raw\" or \"json\"", text("raw")),
        ["sinks", _, "address"] => ("\"tls://siem.example.com:6514\"", text("unix:///dev/log")),
        ["receiver"] => {
            ("{ url = … } above the first table, or [receiver]", table([("url", text("https://localhost/"))]))
        }
        ["receiver", "url"] => ("\"https://audit.example.com:8443/PATH\"", text("https://localhost/")),
        ["signing", "keys"] => ("[{ file = \"signing-key.pem\" }]", DeValue::Array(DeArray::new())),
        // So is an input.
        ["inputs", _, "type"] => return ("\"file\", \"unix-datagram\" or \"unix-stream\"", None),
        ["inputs", _, "path"] => ("\"/var/log/NAME/audit.log\"", text("/")),
        _ => return ("…", None),
    };
    (hint, Some(placeholder))
}

fn table<const N: usize>(entries: [(&'static str, DeValue<'static>); N]) -> DeValue<'static> {
    DeValue::Table(entries.map(|(key, value)| (nowhere(key.into()), nowhere(value))).into_iter().collect())
}

/// Gives a placeholder a span that nothing in the file has.
fn nowhere<T>(value: T) -> Spanned<T> {
    Spanned::new(usize::MAX..usize::MAX, value)
}

/// Makes what a sink's `type` adds the content of that key, as serde has enums: `type = { file = {
/// path = "…" } }`; so for an input. serde's own `tag` would forget where each value stands.
fn fold_types(mut root: Node<'_>) -> Node<'_> {
    for (tables, common_keys) in TYPED {
        let tables = table_at(root.get_mut(), &[tables.to_owned()]);
        for (_, table) in tables.into_iter().flat_map(DeTable::iter_mut) {
            let span = table.span();
            let DeValue::Table(keys) = table.get_mut() else { continue };
            let mut common = DeTable::new();
            for key in common_keys {
                common.extend(keys.remove_entry(*key));
            }
            let options = Spanned::new(span, DeValue::Table(std::mem::replace(keys, common)));
            if let Some(kind) = keys.get_mut("type") {
                *kind.get_mut() = match kind.get_ref() {
                    DeValue::String(name) => DeValue::Table(
                        [(Spanned::new(kind.span(), name.clone()), options)].into_iter().collect(),
                    ),
                    // Only a text will do, not even what it is made into here.
                    _ => DeValue::Boolean(false),
                };
            }
        }
    }
    root
}

/// Shows `visit` each value and where it stands, before what is in it.
fn walk<'t>(location: &Location, value: &mut Node<'t>, visit: &mut dyn FnMut(&Location, &mut Node<'t>)) {
    visit(location, value);
    let mut below = |name: String, key: Range<usize>, value: &mut Node<'t>| {
        let keys = [&location.keys[..], &[name]].concat();
        walk(&Location { keys, key, value: value.span() }, value, visit);
    };
    match value.get_mut() {
        DeValue::Table(table) => {
            table.iter_mut().for_each(|(key, value)| below(key.to_string(), key.span(), value));
        }
        DeValue::Array(array) => {
            array
                .iter_mut()
                .enumerate()
                .for_each(|(index, value)| below(index.to_string(), value.span(), value));
        }
        _ => {}
    }
}

fn table_at<'a, 't>(root: &'a mut DeValue<'t>, keys: &[String]) -> Option<&'a mut DeTable<'t>> {
    let at = keys.iter().try_fold(root, |value, key| match value {
        DeValue::Table(table) => table.get_mut(key.as_str()).map(Spanned::get_mut),
        _ => None,
    });
    if let Some(DeValue::Table(table)) = at { Some(table) } else { None }
}

/// Removes what has this span; false when there is nothing.
fn remove(value: &mut DeValue<'_>, span: &Range<usize>) -> bool {
    match value {
        DeValue::Table(table) => {
            let keys = table.len();
            let rest = std::mem::take(table).into_iter();
            *table = rest.filter(|(key, value)| key.span() != *span && value.span() != *span).collect();
            table.len() < keys || table.iter_mut().any(|(_, value)| remove(value.get_mut(), span))
        }
        DeValue::Array(array) => {
            let elements = array.len();
            let rest = std::mem::replace(array, DeArray::new()).into_iter();
            *array = rest.filter(|value| value.span() != *span).collect();
            array.len() < elements || array.iter_mut().any(|value| remove(value.get_mut(), span))
        }
        _ => false,
    }
}

/// Keys for people: `address` in [listen].
fn shown(keys: &[String]) -> String {
    let is_named = keys.first().is_some_and(|key| matches!(&**key, "sources" | "sinks" | "inputs"));
    let depth = if is_named { 2 } else { 1 };
    let (table, rest) = keys.split_at(depth.min(keys.len()));
    // Not the elements of arrays.
    let rest: Vec<&str> =
        rest.iter().map(String::as_str).filter(|key| key.parse::<usize>().is_err()).collect();
    match (table, &rest[..]) {
        ([key], []) => format!("`{key}` at the file's top level"),
        (table, []) => format!("[{}]", table.join(".")),
        (table, rest) => format!("`{}` in [{}]", rest.join("."), table.join(".")),
    }
}

/// Returns the words in "one of `a`, `b`".
fn words(known: &str) -> Vec<&str> {
    known.split('`').skip(1).step_by(2).collect()
}

/// Turns serde's message into ours, and tells what an unknown key is likely to mean. serde has no
/// other way to tell what was wrong, and its own wording quotes the value found, which may be a
/// secret in the wrong location.
fn describe(message: &str, keys: &[String]) -> (String, Option<String>) {
    let location = shown(keys);
    let split = |kind: &str| message.strip_prefix(kind)?.rsplit_once("`, expected ");
    if let Some((unknown, known)) = split("unknown field `") {
        let common = TYPED.iter().find(|(tables, _)| keys.len() == 3 && keys[0] == *tables);
        let known = [common.map_or(&[][..], |(_, keys)| keys), &words(known)].concat();
        let problem = format!("unknown key {location}; {}", suggest(unknown, "keys", &known));
        return (problem, likely(unknown, &known).map(str::to_owned));
    }
    if let Some((unknown, known)) = split("unknown variant `") {
        let hint = suggest(unknown, "words", &words(known));
        return (format!("unknown word `{unknown}` for {location}; {hint}"), None);
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
        let expected = match expected {
            "i64" => "an integer".to_owned(),
            "a sequence" => "an array".to_owned(),
            "a map" => format!("a table for each, as in [{}.NAME]", keys.join(".")),
            other => other.to_owned(),
        };
        return (format!("wrong type of {location}: found {found}; write {expected}"), None);
    }
    let problem = match message {
        "wanted string or table" => format!("wrong type of {location}; write a string"),
        // Ours have a hint.
        ours if ours.contains("; ") && !ours.starts_with("invalid ") => format!("{location}: {ours}"),
        _ => format!("wrong value of {location}; see config.example.toml for what is possible"),
    };
    (problem, None)
}
