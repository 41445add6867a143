//! The files of an input: the ones that are written, and what they were renamed to.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Device and inode of a file: a hint only, since the number of a removed file is given again.
pub(super) type FileId = (u64, u64);

/// A file that was found. All that is known of it is of the open file, whatever its name leads to
/// meanwhile.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) file: Arc<File>,
    pub(super) path: PathBuf,
    pub(super) id: FileId,
    pub(super) length: u64,
    /// Time of the last change, in nanoseconds since the Unix epoch.
    pub(super) modified: i64,
    /// It is what was configured, and not something that it was renamed to.
    pub(super) is_active: bool,
}

/// The files of an input.
#[derive(Default)]
pub(super) struct Files {
    pub(super) found: Vec<Found>,
    /// Files that are there and cannot be opened, and why.
    pub(super) unreadable: Vec<(PathBuf, io::Error)>,
}

impl Files {
    /// Returns an error that names a file that cannot be opened, if there is one.
    pub(super) fn error(&self) -> io::Result<()> {
        self.unreadable.first().map_or(Ok(()), |(path, error)| {
            Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())))
        })
    }
}

impl Found {
    /// Opens a file; none when it is not a regular one.
    fn open(path: PathBuf, is_active: bool) -> io::Result<Option<Self>> {
        // A pipe would not open until someone writes to it.
        if !std::fs::metadata(&path)?.is_file() {
            return Ok(None);
        }
        let file = File::open(&path)?;
        let metadata = file.metadata()?;
        let modified = metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec());
        let (id, length) = ((metadata.dev(), metadata.ino()), metadata.len());
        Ok(Some(Self { file: Arc::new(file), path, id, length, modified, is_active }))
    }

    /// Returns what must change when the content does.
    pub(super) fn version(&self) -> (u64, i64) {
        (self.length, self.modified)
    }
}

/// Finds the regular files of a path, which is a file, a directory, or a pattern with `*` and `?`
/// in its last part: rotated ones first, each group in the order of the last change.
///
/// # Errors
/// When the directory cannot be read.
pub(super) fn find(path: &Path) -> io::Result<Files> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let is_pattern = name.contains(['*', '?']);
    let is_directory = !is_pattern && path.is_dir();
    let directory = if is_directory { path } else { path.parent().unwrap_or(Path::new("/")) };
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        // As a file that does not exist yet.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Files::default()),
        Err(error) => return Err(error),
    };
    let Files { mut found, mut unreadable } = Files::default();
    for entry in entries {
        let entry = entry?;
        let Ok(entry_name) = entry.file_name().into_string() else { continue };
        let is_active = if is_directory {
            !entry_name.starts_with('.') && !is_compressed(&entry_name)
        } else if is_pattern {
            matches(name, &entry_name) && !is_compressed(&entry_name)
        } else {
            entry_name == name
        };
        let is_rotated = if is_directory || is_pattern {
            // Only what a file that was being read has become.
            is_compressed(&entry_name)
        } else {
            is_rotated(name, &entry_name)
        };
        if !is_active && !is_rotated {
            continue;
        }
        // Through symbolic links, as the writer does.
        match Found::open(entry.path(), is_active) {
            Ok(opened) => found.extend(opened),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => unreadable.push((entry.path(), error)),
        }
    }
    found.sort_by(|one, other| {
        let rank = |found: &Found| (found.is_active, found.modified);
        // `app.log.2` is older than `app.log.1`.
        rank(one).cmp(&rank(other)).then_with(|| other.path.cmp(&one.path))
    });
    Ok(Files { found, unreadable })
}

fn is_compressed(name: &str) -> bool {
    name.ends_with(".gz") || name.ends_with(".zst")
}

/// Returns whether a name is one that a file gets when it is rotated: `app.log.1`,
/// `app.log-20261127.gz`, `app-2026-11-27T10.log`, but not `app-other.log`.
fn is_rotated(name: &str, other: &str) -> bool {
    let other = other.strip_suffix(".gz").or(other.strip_suffix(".zst")).unwrap_or(other);
    let is_mark = |mark: &str| {
        mark.starts_with(['.', '-', '_'])
            && mark.contains(|c: char| c.is_ascii_digit())
            && mark.chars().all(|c| c.is_ascii_digit() || "TZ:._+-".contains(c))
    };
    if let Some(mark) = other.strip_prefix(name) {
        return is_mark(mark);
    }
    let Some((stem, extension)) = name.rsplit_once('.') else { return false };
    let inner = other.strip_prefix(stem).and_then(|rest| rest.strip_suffix(extension)?.strip_suffix('.'));
    inner.is_some_and(is_mark)
}

/// Returns whether a name fits a pattern: `*` is any text, `?` any character.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let mut reached = vec![false; name.len() + 1];
    reached[0] = true;
    for wanted in &pattern {
        let before = reached.clone();
        for at in 0..=name.len() {
            reached[at] = match wanted {
                '*' => before[at] || (at > 0 && reached[at - 1]),
                _ => at > 0 && before[at - 1] && (*wanted == '?' || *wanted == name[at - 1]),
            };
        }
    }
    // As a shell does it.
    reached[name.len()] && (pattern.first() == Some(&'.') || name.first() != Some(&'.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotated_names_are_told_from_others() {
        for name in ["app.log.1", "app.log.12.gz", "app.log-20261127", "app-20261127.log.zst", "app.1.log"] {
            assert!(is_rotated("app.log", name), "{name}");
        }
        for name in
            ["app.log", "app-other.log", "app.log.bak", "app.logs", "app.log.", "other.log.1", "app2.log"]
        {
            assert!(!is_rotated("app.log", name), "{name}");
        }
    }

    #[test]
    fn patterns_fit_as_in_a_shell() {
        for (pattern, name) in [("*.log", "a.log"), ("a*b?.log", "axxb1.log"), ("*", "x"), (".*", ".x")] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [("*.log", "a.log.1"), ("*", ".hidden"), ("a?", "a"), ("", "a")] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }
}
