//! The configuration as text: what serde writes, laid out as in `config.example.toml`.

use std::error::Error;
use std::path::Path;

use serde::Serialize;
use toml::de::{DeTable, DeValue};

use super::Config;
use super::sender::SenderConfig;
use crate::escape::is_hazardous;

impl Config {
    /// Returns the configuration as TOML, with secrets masked.
    ///
    /// # Errors
    /// A bug of ours.
    pub fn to_toml(&self) -> Result<String, Box<dyn Error>> {
        to_toml(&self.file, self)
    }
}

impl SenderConfig {
    /// Returns the configuration as TOML, with secrets masked.
    ///
    /// # Errors
    /// A bug of ours.
    pub fn to_toml(&self) -> Result<String, Box<dyn Error>> {
        to_toml(&self.file, self)
    }
}

/// Writes a section for each table, and what is below it on one line. Safe on a terminal, for which
/// every text has to be a basic string: serde's own layout has others too.
fn to_toml(file: &Path, config: &impl Serialize) -> Result<String, Box<dyn Error>> {
    let written = toml::to_string(config)?;
    let tree = DeTable::parse(&written)?.into_inner();
    let mut out = format!("# The effective configuration of {}\n", quoted(&file.to_string_lossy()));
    for (key, value) in in_order(&tree) {
        match value {
            DeValue::Table(named) if matches!(key, "sources" | "sinks" | "inputs") => {
                for (name, value) in in_order(named) {
                    out += &format!("\n[{key}.{}]\n{}", quoted(name), lines(value));
                }
            }
            DeValue::Table(_) => out += &format!("\n[{key}]\n{}", lines(value)),
            _ => out += &format!("{key} = {}\n", inline(value)),
        }
    }
    Ok(out)
}

fn lines(table: &DeValue<'_>) -> String {
    let keys = table.as_table().into_iter().flat_map(in_order);
    keys.map(|(key, value)| match value {
        // The reverse of `document::fold_types`.
        DeValue::Table(kind) if key == "type" => in_order(kind)
            .iter()
            .map(|(kind, keys)| format!("type = {}\n{}", quoted(kind), lines(keys)))
            .collect(),
        _ => format!("{key} = {}\n", inline(value)),
    })
    .collect()
}

fn inline(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => quoted(text),
        DeValue::Array(array) => {
            let items: Vec<String> = array.iter().map(|item| inline(item.get_ref())).collect();
            format!("[{}]", items.join(", "))
        }
        DeValue::Table(_) => format!("{{ {} }}", lines(value).trim_end().replace('\n', ", ")),
        DeValue::Boolean(value) => value.to_string(),
        DeValue::Integer(value) => value.to_string(),
        DeValue::Float(value) => value.to_string(),
        DeValue::Datetime(value) => value.to_string(),
    }
}

/// Returns the entries in the order of serde, but `type` first; the tree sorts them by name.
fn in_order<'a>(table: &'a DeTable<'_>) -> Vec<(&'a str, &'a DeValue<'a>)> {
    let mut keys: Vec<_> = table.iter().collect();
    keys.sort_by_key(|(key, _)| (key.get_ref() != "type", key.span().start));
    keys.into_iter().map(|(key, value)| (&**key.get_ref(), value.get_ref())).collect()
}

/// A TOML basic string that is safe on a terminal.
fn quoted(value: &str) -> String {
    let mut text = String::from('"');
    for character in value.chars() {
        match character {
            '"' | '\\' => text.extend(['\\', character]),
            // Every character that disrupts is below U+10000, where four digits do.
            _ if is_hazardous(character) => text.push_str(&format!("\\u{:04X}", u32::from(character))),
            _ => text.push(character),
        }
    }
    text + "\""
}
