//! `auditgate quarantine prune`: removes what is old, and nothing that the daemon writes to.
//!
//! 1. A rotated file goes whole or not at all: when it was rotated before the time, as its name
//!    says, and every line in it is a quarantined one that arrived before it. So nothing else that a
//!    sink may have written is ever removed, verified events least of all.
//! 2. The file at a sink's path stays, because the daemon continues at an exact byte of it; so does
//!    a file that another program has renamed, in which the daemon may finish a line.
//! 3. Rows of a database's table `quarantine` are deleted a few at a time, as the daemon does with
//!    rows that have expired.

use std::convert::Infallible;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::Path;

use time::PrimitiveDateTime;
use time::macros::format_description;

use super::inputs::{Input, InputArgs, Role, shown};
use super::records::{Filter, is_database, read};
use super::{Failed, Inputs, Problems, Window, unwritable};
use crate::cli::exit::Failure;
use crate::cli::time_arg;
use crate::deliver::file::rotated_at;
use crate::deliver::sqlite::prune_quarantine;
use crate::wire::record::time_stamp;

/// Removes quarantined lines that arrived before a time.
///
/// Removes rotated files of which every line is a quarantined one that arrived before the time, and
/// rows of the table `quarantine`. Everything else is kept, and named with the reason: the file that
/// the daemon writes to, files with newer or other lines, files that other programs have rotated.
/// May be used while the daemon runs.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    #[command(flatten)]
    inputs: InputArgs,

    /// Remove what arrived before this time: RFC 3339, a date (its beginning in UTC), or an age such
    /// as 90d
    #[arg(long, value_name = "TIME")]
    before: String,

    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
}

/// What becomes of an input.
enum Outcome {
    /// A file was removed.
    Removed,
    /// That many rows were deleted.
    Deleted(u64),
    Kept(String),
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let before = time_arg::argument("before", &args.before)?;
    let mut problems = Problems::default();
    let inputs = Inputs::find(&args.inputs, &mut problems)?;
    let (removed, deleted) = match args.dry_run {
        true => ("would remove", "would delete"),
        false => ("removed", "deleted"),
    };
    for input in &inputs.0 {
        let path = shown(&input.path);
        let said = match prune(input, before, args.dry_run) {
            Ok(Outcome::Removed) => writeln!(out, "{removed} {path}"),
            Ok(Outcome::Deleted(rows)) => writeln!(out, "{deleted} {rows} rows of {path}"),
            Ok(Outcome::Kept(why)) => writeln!(out, "kept {path}: {why}"),
            Err(problem) => {
                problems.add(problem);
                Ok(())
            }
        };
        said.map_err(|error| unwritable(&error))?;
    }
    if inputs.0.is_empty() && problems.0.is_empty() {
        writeln!(out, "there is no file yet").map_err(|error| unwritable(&error))?;
    }
    problems.end()
}

fn prune(input: &Input, before: i64, dry_run: bool) -> Result<Outcome, String> {
    let kept = |why: &str| Ok(Outcome::Kept(why.to_owned()));
    match input.role {
        Role::Current => kept("the daemon writes to it; its lines can go when it has been rotated"),
        Role::Renamed => kept("another program has rotated it, and the daemon may finish a line in it"),
        Role::Rotated => prune_file(&input.path, before, dry_run),
        Role::Unknown => prune_unknown(&input.path, before, dry_run),
    }
}

fn prune_file(path: &Path, before: i64, dry_run: bool) -> Result<Outcome, String> {
    let kept = |why: String| Ok(Outcome::Kept(why));
    match rotated_time(path) {
        Some(time) if time < before => {}
        Some(time) => return kept(format!("it was rotated at {}", time_stamp(time))),
        None => return kept("its name has no valid time".to_owned()),
    }
    // Stops at the first line that arrived later, or that does not say when.
    let lines = read(path, &Filter::default(), |record| match record.time {
        Some(time) if time < before => Ok(()),
        time => Err(time),
    });
    match lines {
        Ok(0) => {}
        Ok(others) => return kept(format!("{others} of its lines are not quarantine records")),
        Err(Failed::Stopped(Some(time))) => {
            return kept(format!("a line in it arrived at {}", time_stamp(time)));
        }
        Err(Failed::Stopped(None)) => return kept("a record in it has no valid time".to_owned()),
        Err(Failed::Unreadable(problem)) => return Err(problem),
    }
    match remove(path, dry_run) {
        Ok(true) => Ok(Outcome::Removed),
        Ok(false) => kept("a process has locked it and may be writing to it".to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            kept("it was compressed or removed meanwhile".to_owned())
        }
        Err(error) => Err(format!("cannot remove {}: {error}", path.display())),
    }
}

/// Removes a file; false when it is locked, as the file that a sink writes to is.
fn remove(path: &Path, dry_run: bool) -> io::Result<bool> {
    let file = File::open(path)?;
    if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
        return Ok(false);
    }
    if !dry_run {
        fs::remove_file(path)?;
        if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            File::open(directory)?.sync_all()?;
        }
    }
    Ok(true)
}

fn prune_unknown(path: &Path, before: i64, dry_run: bool) -> Result<Outcome, String> {
    let failed = |failed: Failed<Infallible>| match failed {
        Failed::Unreadable(problem) => problem,
        Failed::Stopped(never) => match never {},
    };
    if !is_database(path).map_err(failed)? {
        let why = "it is not named like a rotated file, so the daemon may be writing to it";
        return Ok(Outcome::Kept(why.to_owned()));
    }
    if !dry_run {
        let deleted = prune_quarantine(path, before).map_err(|error| error.to_string())?;
        return Ok(Outcome::Deleted(deleted));
    }
    let filter = Filter { window: Window { since: None, until: Some(before) }, ..Filter::default() };
    let mut rows = 0;
    read(path, &filter, |_| {
        rows += 1;
        Ok(())
    })
    .map_err(failed)?;
    Ok(Outcome::Deleted(rows))
}

/// Returns the time in a rotated file's name, in milliseconds since the Unix epoch.
fn rotated_time(path: &Path) -> Option<i64> {
    let (time, _) = rotated_at(path.file_name()?.to_str()?)?;
    let shape = format_description!("[year][month][day]T[hour][minute][second]Z");
    let time = PrimitiveDateTime::parse(time, shape).ok()?;
    Some(time.assume_utc().unix_timestamp() * 1000)
}
