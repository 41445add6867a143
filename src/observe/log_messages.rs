//! The log messages in the sources, compared with `docs/log-messages.md`.

use std::fs;
use std::path::{Path, PathBuf};

/// A call that logs a message at `info`, `warn` or `error`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Call {
    code: String,
    level: String,
    message: String,
}

/// Returns the Rust sources under `src`, without tests.
fn sources() -> Vec<PathBuf> {
    let mut directories = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    let mut files = Vec::new();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            match name {
                "tests" | "tests.rs" | "log_messages.rs" => {}
                _ if path.is_dir() => directories.push(path),
                _ if name.ends_with(".rs") => files.push(path),
                _ => {}
            }
        }
    }
    files
}

/// Returns the calls in a source file; an error names one that has no code.
fn calls(source: &str) -> Result<Vec<Call>, String> {
    const MACROS: [&str; 4] = ["info!(", "warn!(", "error!(", "log_throttled!("];
    let source = source.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let lines = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    let source = lines.collect::<Vec<_>>().join("\n");
    let mut calls = Vec::new();
    for name in MACROS {
        for (at, _) in source.match_indices(name) {
            if source[..at].ends_with(|before: char| before.is_alphanumeric() || "_$".contains(before)) {
                continue;
            }
            let mut arguments = arguments(&source[at + name.len()..]);
            let mut level = name.trim_end_matches("!(").to_owned();
            if name == "log_throttled!(" {
                level = arguments.remove(0);
                // The subject of the throttle.
                arguments.remove(0);
            }
            let code = arguments[0].strip_prefix("code = ").map(unquoted);
            let code =
                code.ok_or_else(|| format!("a message has no code: {name}{}", arguments.join(", ")))?;
            let message = arguments.iter().find(|argument| argument.starts_with('"'));
            let message = unquoted(message.ok_or_else(|| format!("`{code}` has no message"))?);
            calls.push(Call { code, level, message });
        }
    }
    Ok(calls)
}

/// Returns the arguments of a macro, up to the parenthesis that ends it.
fn arguments(text: &str) -> Vec<String> {
    let (mut depth, mut in_string, mut is_escaped) = (0, false, false);
    let mut arguments = vec![String::new()];
    for character in text.chars() {
        match character {
            _ if is_escaped => is_escaped = false,
            '\\' if in_string => is_escaped = true,
            '"' => in_string = !in_string,
            _ if in_string => {}
            '(' | '[' | '{' => depth += 1,
            ')' if depth == 0 => break,
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                arguments.push(String::new());
                continue;
            }
            _ => {}
        }
        arguments.last_mut().unwrap().push(character);
    }
    arguments.iter().map(|argument| argument.trim().to_owned()).filter(|text| !text.is_empty()).collect()
}

/// Returns the text of a string literal.
fn unquoted(literal: &str) -> String {
    let inner = literal.trim_matches('"').replace("\\\"", "\"");
    let mut lines = inner.split("\\\n");
    let first = lines.next().unwrap_or_default().to_owned();
    lines.fold(first, |text, line| text + line.trim_start())
}

/// Returns the rows of the document's table; each must say what to do.
fn documented() -> Vec<Call> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/log-messages.md");
    let document = fs::read_to_string(path).unwrap();
    let rows = document.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [code, level, message, meaning] = cells[..] else { panic!("not four cells: {row}") };
        assert!(!meaning.is_empty(), "{code} says not what it means");
        let code = code.trim_matches('`').to_owned();
        Call { code, level: level.to_owned(), message: message.to_owned() }
    })
    .collect()
}

#[test]
fn every_message_has_a_code_of_its_own_and_is_documented() {
    let mut found: Vec<Call> = sources()
        .iter()
        .flat_map(|path| {
            let calls = calls(&fs::read_to_string(path).unwrap());
            calls.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        })
        .collect();
    found.sort();
    for pair in found.windows(2) {
        assert!(pair[0].code != pair[1].code, "two messages have one code: {pair:#?}");
    }
    for Call { code, .. } in &found {
        let is_plain = code.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
        assert!(is_plain && !code.is_empty(), "`{code}` is not in kebab case");
    }
    let documented = documented();
    let codes = |calls: &[Call]| calls.iter().map(|call| call.code.clone()).collect::<Vec<_>>();
    let missing: Vec<_> = found.iter().filter(|call| !documented.contains(call)).collect();
    let stale: Vec<_> = documented.iter().filter(|call| !found.contains(call)).collect();
    assert!(
        missing.is_empty() && stale.is_empty(),
        "not documented: {missing:#?}\nnot in the code: {stale:#?}"
    );
    assert_eq!(codes(&documented), codes(&found), "the table is not in alphabetical order");
}

#[test]
fn what_the_check_must_find() {
    let source = r#"
        /// log_throttled!(level, subject, fields, message)
        tracing::warn!(code = "one", sink, %error, "sink \"{sink}\" (a, b) \
            failed");
        log_throttled!(error, "", code = "two", "{words}", words = f("x, y"));
        debug!("without a code"); compile_error!("neither");
    "#;
    let call = |code: &str, level: &str, message: &str| Call {
        code: code.to_owned(),
        level: level.to_owned(),
        message: message.to_owned(),
    };
    let found = [call("one", "warn", "sink \"{sink}\" (a, b) failed"), call("two", "error", "{words}")];
    assert_eq!(calls(source), Ok(found.to_vec()));
    assert!(calls("info!(source, \"text\")").unwrap_err().contains("no code"));
    assert!(calls("log_throttled!(warn, sink, sink, \"text\")").unwrap_err().contains("no code"));
}
