//! `auditgate verify`: saved lines, checked offline against published keys.

mod configured;
mod report;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use self::report::{Outcome, Output, Report};
use super::config_file::ConfigFile;
use super::exit::{Exit, Failure};
use super::time_arg;
use crate::config::{Config, DEFAULT_FILE, Secrets};
use crate::escape::{escape, escape_json};
use crate::net::{Client, Endpoint};
use crate::trust::jwks::{KeySet, MAX_KEPT_KEYS, Parsed};
use crate::trust::keyring;
use crate::verify::explain::{Explanation, Tried, explain};
use crate::verify::find::{Found, find};
use crate::verify::judge::{Keys, Selection, Window, judge};
use crate::verify::read::{Blocks, Fault};
use crate::verify::run;
use crate::wire::record::time_stamp;

/// Checks saved lines against published keys, offline.
///
/// Reads raw lines, auditgate's own JSON lines, and the database of a SQLite sink (also while the
/// daemon writes it), plain or compressed (gzip, zstd; recognised by their first bytes). Reports
/// the file and the line of each one that is not proved by its signature; of a database, the id of
/// the row. Of JSON lines and rows it also checks that the metadata of the raw line follows from
/// it. Quarantined lines (those with a `reason`) are checked like any others, so most of them are
/// findings, unless `--skip-quarantine` is given.
///
/// Without `--jwks`, or with `--config`, the keys are those that the daemon of a configuration has,
/// retired ones included, and without a FILE everything is checked that its sinks have written.
///
/// Exit code 0: every line was proved. 1: some were not. 74: a file could not be read (the others
/// were checked).
#[derive(clap::Args, Clone, Debug)]
#[command(after_long_help = JSON_HELP)]
pub struct Args {
    /// A JWKS document with the producer's public keys: a file, an https URL, or the daemon's own
    /// cache of keys (DATA_DIR/jwks/SOURCE.json). Can be given several times; events carry no key
    /// ID, so every key is tried
    #[arg(long, value_name = "FILE|URL")]
    pub jwks: Vec<String>,

    #[command(flatten)]
    pub config: Option<ConfigFile>,

    /// PEM file with the authorities to trust for the URL, instead of the system's
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,

    /// Do not check quarantined lines: JSON lines with a `reason`, the table `quarantine` of a
    /// database, and, of a configuration, sinks that take nothing but the quarantine
    #[arg(long, conflicts_with = "explain")]
    pub skip_quarantine: bool,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,

    /// Print nothing but, on stderr, what is wrong: for a cron job
    #[arg(long, short, conflicts_with_all = ["json", "explain"])]
    pub quiet: bool,

    /// Check only events from this time on: RFC 3339, a date (its beginning in UTC), or an age such
    /// as 2d. The time is the event's own (`rt`, or `event_ts` where `rt` is not a number). Lines
    /// without a usable time are always checked; lines that are outside are counted, but nothing
    /// about them is proved, their time included
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,

    /// Check only events before this time
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,

    /// Examine one line only, and say why it fails: FILE:LINE, or the number of a line when there
    /// is one file
    #[arg(long, value_name = "[FILE:]LINE", conflicts_with_all = ["since", "until"])]
    pub explain: Option<String>,

    /// What to check; `-` is standard input. Of a directory, every file in it and below it that
    /// auditgate could have written is checked, in the order of their time; what is skipped is
    /// reported on stderr
    #[arg(value_name = "FILE|DIRECTORY")]
    pub files: Vec<PathBuf>,
}

const JSON_HELP: &str = "\
JSON report: one object with `findings` (a list of `file`, `line`, `verdict`, `reason`), the counts `good`, `bad`, \
`unsigned`, `malformed`, `torn`, `damaged`, `outside`, `first` and `last` (the times of the earliest and the latest \
good event), `skipped` (quarantined lines, with --skip-quarantine), `keys` (a list of `kid`, `thumbprint`, `good`), `files` (for each `file` its `kind` and the same counts, \
times and keys), `left_out` and `unreadable` (lists of `file`, `reason`).

Verdicts: bad (no given key made the signature, or a record contradicts its raw line), unsigned, malformed, torn (a \
failing last line without a line end), damaged (the file cannot be read on from there, or a database may have lost rows).";

/// Time that a key server may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);

/// Checks and reports.
///
/// # Errors
/// 1 when a line is not proved, 2 for a time or a line number that cannot be read, 74 for a file
/// that cannot be read (after the others are done), 78 for keys that cannot be used.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let window = time_arg::window(args.since.as_deref(), args.until.as_deref())?;
    let target = args.explain.as_deref().map(|target| located(target, &args.files)).transpose()?;
    let config = config(args)?;
    if args.files.is_empty() && target.is_none() && config.is_none() {
        return Err(Failure::usage("name files or directories to check, or a configuration with --config"));
    }
    let keys = Keys::new(&keys(args, config.as_ref())?);
    match target {
        Some((path, line)) => explain_line(&path, line, &keys, args.json, out),
        None => check(args, config.as_ref(), &keys, window, out),
    }
}

/// Returns the configuration, where one is named or nothing else has keys.
fn config(args: &Args) -> Result<Option<Config>, Failure> {
    let default = ConfigFile { config: PathBuf::from(DEFAULT_FILE) };
    // Tokens are not needed, and a user who may read the files need not be allowed to read them.
    match (&args.config, args.jwks.is_empty()) {
        (Some(file), _) => file.load(Secrets::SkipMissing).map(Some),
        (None, false) => Ok(None),
        (None, true) => default.load(Secrets::SkipMissing).map(Some).map_err(|Failure { exit, message }| {
            let message = format!("without --jwks the keys come from the configuration, and: {message}");
            Failure { exit, message }
        }),
    }
}

fn check(
    args: &Args,
    config: Option<&Config>,
    keys: &Keys,
    window: Window,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let skip_quarantine = args.skip_quarantine;
    let (found, live) = match config {
        Some(config) if args.files.is_empty() => {
            let found = configured::files(config, skip_quarantine);
            let live = found.files.clone();
            (found, live)
        }
        _ => (find(&args.files), Vec::new()),
    };
    let Found { files, left_out, unreadable } = &found;
    if files.is_empty() && unreadable.is_empty() {
        // A script must not take an empty directory for a proof.
        return Err(Failure::usage(match args.files.is_empty() {
            true => "the sinks of the configuration have written no file to check yet; name files",
            false => "there is no file to check where you looked; name a file or another directory",
        }));
    }
    let read = Arc::default();
    let output = match (args.quiet, args.json) {
        (true, _) => Output::OnlyFailure,
        (false, true) => Output::Json,
        (false, false) => Output::Text,
    };
    let mut report = Report::new(files, &live, keys, output, Arc::clone(&read), out);
    for (path, reason) in left_out {
        report.left_out(path, reason);
    }
    for (path, error) in unreadable {
        report.unreadable(path, error.to_string());
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let selection = Selection { window, skip_quarantine };
    let Outcome { counts, unreadable, details } =
        run::check(files, keys, selection, threads, &read, |index, news| report.news(index, news))
            .and_then(|()| report.end())
            .map_err(unwritable)?;
    let findings = match counts.findings() {
        0 => None,
        1 => Some("1 line does not prove itself".to_owned()),
        findings => Some(format!("{findings} lines do not prove themselves")),
    };
    let (exit, summary) = match (unreadable, findings) {
        (0, None) => return Ok(()),
        (0, Some(findings)) => (Exit::Finding, findings),
        (unreadable, findings) => {
            let unreadable =
                if unreadable == 1 { "1 file".to_owned() } else { format!("{unreadable} files") };
            let findings =
                findings.map_or_else(String::new, |findings| format!("; in the others, {findings}"));
            (Exit::Io, format!("{unreadable} could not be read{findings}"))
        }
    };
    let message = std::iter::once(summary).chain(details).collect::<Vec<_>>().join("\n");
    Err(Failure { exit, message })
}

/// Returns the file and the line of `--explain`.
fn located(target: &str, files: &[PathBuf]) -> Result<(PathBuf, u64), Failure> {
    let wrong = |why: &str| Failure::usage(format!("--explain {target}: {why}"));
    let (path, line) = match (target.rsplit_once(':'), files) {
        (Some((path, line)), _) if !path.is_empty() => (PathBuf::from(path), line),
        (None, [path]) => (path.clone(), target),
        (None, _) => return Err(wrong("name the file too, as FILE:LINE, unless exactly one is given")),
        _ => return Err(wrong("write FILE:LINE or the number of a line")),
    };
    match line.parse() {
        Ok(line) if line > 0 => Ok((path, line)),
        _ => Err(wrong("lines have numbers from 1 on")),
    }
}

fn explain_line(path: &Path, line: u64, keys: &Keys, json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let failed = |fault: Fault| match fault {
        Fault::Finding(finding) => Failure::finding(format!(
            "{}:{}: {}: {}",
            path.display(),
            finding.line,
            finding.verdict.as_str(),
            escape(&finding.reason)
        )),
        Fault::Unreadable(reason) => Failure::io(format!("cannot read {}: {reason}", path.display())),
    };
    let mut blocks = Blocks::open(path, &Arc::default()).map_err(failed)?;
    loop {
        let block = match blocks.block() {
            Ok(Some(block)) => block,
            Ok(None) => {
                return Err(Failure::usage(format!(
                    "{} has no line {line} that is not blank",
                    path.display()
                )));
            }
            Err(fault) if fault.goes_on() && !matches!(&fault, Fault::Finding(at) if at.line == line) => {
                continue;
            }
            Err(fault) => return Err(failed(fault)),
        };
        let mut entries = block.entries();
        let Some(at) = entries.iter().position(|entry| entry.number == line) else { continue };
        let entry = entries.swap_remove(at);
        let others = judge(&entries, keys, Window::default(), &mut rand::rng());
        let explanation = explain(&entry, &others, keys, &mut rand::rng());
        let written = if json {
            serde_json::to_string(&explanation)
                .map_err(io::Error::from)
                .and_then(|text| writeln!(out, "{}", escape_json(&text)))
        } else {
            write_explanation(out, path, line, &explanation)
        };
        written.map_err(unwritable)?;
        return match explanation.verdict {
            "good" => Ok(()),
            _ => Err(Failure::finding("the line does not prove itself")),
        };
    }
}

fn write_explanation(
    out: &mut dyn Write,
    path: &Path,
    line: u64,
    explanation: &Explanation,
) -> io::Result<()> {
    let Explanation { verdict, reason, format, bytes, time, signed_bytes, sig, keys, shown } = explanation;
    let path = path.display().to_string();
    write!(out, "{}:{line}: {verdict}", escape(&path))?;
    if let Some(reason) = reason {
        write!(out, ": {}", escape(reason))?;
    }
    writeln!(out)?;
    write!(out, "line: {bytes} bytes")?;
    if let Some(format) = format {
        write!(out, ", {format}")?;
    }
    if let Some(time) = time {
        write!(out, ", {}", time_stamp(*time))?;
    }
    writeln!(out)?;
    for (index, signed) in signed_bytes.iter().enumerate() {
        let which = if index == 0 { "signed bytes" } else { "or signed bytes" };
        writeln!(out, "{which} ({}): {}", signed.len(), escape(signed))?;
    }
    if let Some(sig) = sig {
        writeln!(out, "sig: {}", escape(sig))?;
    }
    for Tried { kid, thumbprint, fits } in keys {
        let fits = fits.map_or_else(|| "does not fit".to_owned(), |what| format!("fits {what}"));
        writeln!(out, "key {} (thumbprint {thumbprint}): {fits}", escape(kid))?;
    }
    for sentence in shown {
        writeln!(out, "- {}", escape(sentence))?;
    }
    Ok(())
}

/// Returns the keys of all documents, and of a configuration.
fn keys(args: &Args, config: Option<&Config>) -> Result<Vec<KeySet>, Failure> {
    let mut sets = config.map_or(Ok(Vec::new()), configured::keys)?;
    for set in args.jwks.iter().map(|origin| {
        let named = |error: &dyn std::fmt::Display| Failure::config(format!("--jwks {origin}: {error}"));
        let Parsed { keys, refused } = if origin.contains("://") {
            let endpoint = Endpoint::parse(origin).map_err(|error| named(&error))?;
            let client =
                Client::for_endpoint(&endpoint, args.ca.as_deref()).map_err(|error| named(&error))?;
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|error| Failure::io(format!("cannot start: {error}")))?;
            runtime
                .block_on(keyring::fetch(&client, &endpoint, None, FETCH_TIMEOUT))
                .map_err(|error| named(&error))?
        } else {
            keyring::read_file(Path::new(origin), MAX_KEPT_KEYS).map_err(|error| named(&error))?
        };
        for key in refused {
            let _ = writeln!(io::stderr(), "auditgate: --jwks {origin}: {}", escape(&key.to_string()));
        }
        Ok(keys)
    }) {
        sets.push(set?);
    }
    match sets.is_empty() {
        false => Ok(sets),
        true => Err(Failure::config(
            "the configuration's sources have no key yet: their key caches come with the daemon's first start; name keys \
             with --jwks",
        )),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
fn unwritable(error: io::Error) -> Failure {
    Failure::io(format!("cannot write the report: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_a_file_and_a_line() {
        let one = [PathBuf::from("a.log")];
        let two = [PathBuf::from("a.log"), PathBuf::from("b.log")];
        let found = |location, files: &[PathBuf]| located(location, files).ok();
        assert_eq!(found("7", &one), Some(("a.log".into(), 7)));
        assert_eq!(found("b:c.log:7", &one), Some(("b:c.log".into(), 7)));
        assert_eq!(found("b.log:7", &two), Some(("b.log".into(), 7)));
        assert_eq!(found("b.log:7", &[]), Some(("b.log".into(), 7)));
        for (location, files) in
            [("7", &two[..]), ("7", &[]), ("0", &one), (":7", &one), ("a.log:x", &one), ("x", &one)]
        {
            assert!(found(location, files).is_none(), "{location}");
        }
    }
}
