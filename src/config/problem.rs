//! What is wrong with a configuration file: every problem with its line, in the words of the operator.

use crate::escape::escape;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Everything that is wrong with one configuration file; never empty.
///
/// Displayed as one problem a line, `FILE:LINE: message; hint`, in the order of the lines. No value of a
/// secret and no line of the file is ever part of it.
#[derive(Clone, Debug)]
pub struct ConfigError {
    file: PathBuf,
    problems: Vec<Problem>,
}

/// One problem and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The line in the configuration file, from 1; none when the problem is something missing altogether.
    pub line: Option<usize>,
    /// What is wrong: one clause without a full stop.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl ConfigError {
    pub(super) fn new(file: &Path, mut problems: Vec<Problem>) -> Self {
        problems.sort_by_key(|problem| problem.line);
        Self { file: file.to_owned(), problems }
    }

    /// The problems in the order of their lines.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Problem { line, message, hint }) in self.problems.iter().enumerate() {
            let newline = if index == 0 { "" } else { "\n" };
            let file = self.file.to_string_lossy();
            let line = line.map(|line| format!("{line}:")).unwrap_or_default();
            write!(f, "{newline}{}:{line} {}", escape(&file), escape(message))?;
            if let Some(hint) = hint {
                write!(f, "; {}", escape(hint))?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// Collects the problems of one file and turns byte ranges into line numbers.
pub(super) struct Findings<'text> {
    text: &'text str,
    problems: Vec<Problem>,
}

impl<'text> Findings<'text> {
    pub(super) fn new(text: &'text str) -> Self {
        Self { text, problems: Vec::new() }
    }

    pub(super) fn report(&mut self, at: &Range<usize>, message: impl Into<String>, hint: impl Into<String>) {
        let line = Some(self.line(at));
        self.problems.push(Problem { line, message: message.into(), hint: Some(hint.into()) });
    }

    pub(super) fn report_missing(&mut self, message: impl Into<String>, hint: impl Into<String>) {
        self.problems.push(Problem { line: None, message: message.into(), hint: Some(hint.into()) });
    }

    pub(super) fn line(&self, at: &Range<usize>) -> usize {
        line_of(self.text.as_bytes(), at.start)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.problems.is_empty()
    }

    pub(super) fn into_problems(self) -> Vec<Problem> {
        self.problems
    }
}

/// The line, from 1, in which the byte at `offset` stands; an offset past the end is in the last line.
pub(super) fn line_of(text: &[u8], offset: usize) -> usize {
    1 + text[..offset.min(text.len())].iter().filter(|byte| **byte == b'\n').count()
}

/// The hint for a wrong word: the closest of the known ones, or all of them.
pub(super) fn suggest<'a>(wrong: &str, kind: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    // Two edits in five characters: `adress` finds `address`, `bind` does not find `line`.
    const CLOSE: f64 = 0.6;

    let known: Vec<&str> = known.into_iter().collect();
    let lower = wrong.to_lowercase();
    let closest = known
        .iter()
        .map(|word| (strsim::normalized_damerau_levenshtein(&lower, &word.to_lowercase()), word))
        .filter(|(likeness, _)| *likeness >= CLOSE)
        .max_by(|(left, _), (right, _)| left.total_cmp(right));
    match closest {
        Some((_, word)) => format!("did you mean `{word}`?"),
        None => format!("known {kind}: {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_printed_one_a_line_in_the_order_of_the_lines() {
        let mut findings = Findings::new("a\nb\nc\n");
        findings.report(&(4..5), "third", "repair it");
        findings.report(&(0..1), "first", "drop it");
        findings.report_missing("nothing", "add it");
        let error = ConfigError::new(Path::new("/etc/x.toml"), findings.into_problems());
        assert_eq!(
            error.to_string(),
            "/etc/x.toml: nothing; add it\n/etc/x.toml:1: first; drop it\n/etc/x.toml:3: third; repair it"
        );
        assert_eq!(error.problems().len(), 3);
    }

    #[test]
    fn nothing_in_a_file_can_disturb_the_terminal() {
        let mut findings = Findings::new("");
        findings.report_missing("key `\u{1b}[2J\n\u{202e}`", "rename it");
        let error = ConfigError::new(Path::new("f"), findings.into_problems());
        assert_eq!(error.to_string(), "f: key `\\u{1b}[2J\\u{a}\\u{202e}`; rename it");
    }

    #[test]
    fn lines_are_counted_from_one() {
        assert_eq!(line_of(b"", 0), 1);
        assert_eq!(line_of(b"a\nb", 1), 1);
        assert_eq!(line_of(b"a\nb", 2), 2);
        assert_eq!(line_of(b"a\nb", 99), 2);
    }

    #[test]
    fn the_closest_word_is_suggested_and_otherwise_all() {
        assert_eq!(suggest("adress", "keys", ["tls", "address"]), "did you mean `address`?");
        assert_eq!(suggest("Address", "keys", ["tls", "address"]), "did you mean `address`?");
        assert_eq!(suggest("port", "keys", ["tls", "address"]), "known keys: tls, address");
    }
}
