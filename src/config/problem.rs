//! Problems of a configuration file, each with its line and a hint.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::escape::escape;

/// Everything that is wrong with one configuration file; never empty.
///
/// Displayed as one problem a line, `FILE:LINE: message; hint`, in the order of the lines. No value
/// of a secret and no line of the file is ever part of it.
#[derive(Clone, Debug)]
pub struct ConfigError {
    file: PathBuf,
    problems: Vec<Problem>,
}

/// One problem and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The line in the configuration file, from 1; none when the problem is something missing
    /// altogether.
    pub line: Option<usize>,
    /// Problem and, after `; `, hint.
    pub message: String,
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
        for (index, Problem { line, message }) in self.problems.iter().enumerate() {
            let newline = if index == 0 { "" } else { "\n" };
            let file = self.file.to_string_lossy();
            let line = line.map(|line| format!("{line}:")).unwrap_or_default();
            write!(f, "{newline}{}:{line} {}", escape(&file), escape(message))?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// The line, from 1, in which the byte at `offset` stands; an offset past the end is in the last
/// line.
pub(super) fn line_of(text: &[u8], offset: usize) -> usize {
    1 + text[..offset.min(text.len())].iter().filter(|byte| **byte == b'\n').count()
}

/// The hint for a wrong word: the closest of the known ones, or all of them.
pub(super) fn suggest(wrong: &str, kind: &str, known: &[&str]) -> String {
    match likely(wrong, known) {
        Some(word) => format!("did you mean `{word}`?"),
        None => format!("known {kind}: {}", known.join(", ")),
    }
}

/// The known word that a wrong one is likely to mean.
pub(super) fn likely<'a>(wrong: &str, known: &[&'a str]) -> Option<&'a str> {
    // Two edits in five characters: `adress` finds `address`, `bind` does not find `line`.
    const CLOSE: f64 = 0.6;

    let lower = wrong.to_lowercase();
    known
        .iter()
        .map(|word| (strsim::normalized_damerau_levenshtein(&lower, &word.to_lowercase()), word))
        .filter(|(likeness, _)| *likeness >= CLOSE)
        .max_by(|(left, _), (right, _)| left.total_cmp(right))
        .map(|(_, word)| *word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_printed_one_a_line_in_the_order_of_the_lines() {
        let problems =
            [(Some(3), "third; repair it"), (Some(1), "first; drop it"), (None, "nothing; add it")];
        let problems = problems.map(|(line, message)| Problem { line, message: message.to_owned() });
        let error = ConfigError::new(Path::new("/etc/x.toml"), problems.into());
        assert_eq!(
            error.to_string(),
            "/etc/x.toml: nothing; add it\n/etc/x.toml:1: first; drop it\n/etc/x.toml:3: third; repair it"
        );
        assert_eq!(error.problems().len(), 3);
    }

    #[test]
    fn nothing_in_a_file_can_disturb_the_terminal() {
        let message = "key `\u{1b}[2J\n\u{202e}`; rename it".to_owned();
        let error = ConfigError::new(Path::new("f"), vec![Problem { line: None, message }]);
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
        let suggest = |wrong| suggest(wrong, "keys", &["tls", "address"]);
        assert_eq!(suggest("adress"), "did you mean `address`?");
        assert_eq!(suggest("Address"), "did you mean `address`?");
        assert_eq!(suggest("port"), "known keys: tls, address");
    }
}
