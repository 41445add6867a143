//! `auditgate verify`: saved lines, checked offline against published keys.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::exit::Failure;
use crate::ingest;
use crate::net::{Client, Endpoint};
use crate::printable::printable;
use crate::trust::jwks::{KeySet, MAX_KEPT_KEYS, Parsed};
use crate::trust::keyring;
use crate::trust::verify::{Claim, verify};
use crate::wire::batch;
use crate::wire::line::Line;
use crate::wire::record::{self, Saved};

/// Checks saved lines against published keys, offline.
///
/// Reads raw lines and auditgate's own JSON lines, plain or compressed (.gz, .zst). Names the file and the line
/// of each one that does not prove itself, and exits with 1 if there is one.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// A JWKS document with the producer's public keys: a file or an https URL. Can be given several times
    #[arg(long, value_name = "FILE|URL", required = true)]
    pub jwks: Vec<String>,

    /// PEM file with the authorities to trust for the URL, instead of the system's
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,

    /// What to check; `-` is standard input
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
}

/// A line longer than this is no event; the daemon's own limit is smaller by far.
const LONGEST_LINE: usize = 64 << 20;

/// Lines that are verified together.
const TOGETHER: usize = 1024;

/// How long a key server may take.
const FETCH: Duration = Duration::from_secs(30);

/// Checks and reports.
///
/// # Errors
/// 1 when a line does not prove itself, 74 for a file that cannot be read, 78 for keys that cannot be used.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let keys = keys(args)?;
    let mut report = Report::default();
    for path in &args.files {
        let mut checker = Checker::new(&keys, path, args.json, out);
        checker.check(open(path)?)?;
        report.add(checker.counts, checker.bad_lines);
    }
    let written = if args.json {
        serde_json::to_string(&report).map_err(io::Error::from).and_then(|text| writeln!(out, "{text}"))
    } else {
        let Counts { good, bad, unsigned, malformed } = report.counts;
        writeln!(out, "good {good}, bad {bad}, unsigned {unsigned}, malformed {malformed}")
    };
    written.map_err(|error| Failure::io(format!("cannot write the report: {error}")))?;
    match report.counts.failures() {
        0 => Ok(()),
        1 => Err(Failure::finding("1 line does not prove itself")),
        failures => Err(Failure::finding(format!("{failures} lines do not prove themselves"))),
    }
}

/// What was found, over all files.
#[derive(Debug, Default, Serialize)]
struct Report {
    #[serde(flatten)]
    counts: Counts,
    failures: Vec<BadLine>,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Counts {
    good: u64,
    bad: u64,
    unsigned: u64,
    malformed: u64,
}

#[derive(Debug, Serialize)]
struct BadLine {
    file: String,
    line: u64,
    finding: &'static str,
    detail: String,
}

impl Report {
    fn add(&mut self, counts: Counts, bad_lines: Vec<BadLine>) {
        self.counts.good += counts.good;
        self.counts.bad += counts.bad;
        self.counts.unsigned += counts.unsigned;
        self.counts.malformed += counts.malformed;
        self.failures.extend(bad_lines);
    }
}

impl Counts {
    fn failures(self) -> u64 {
        self.bad + self.unsigned + self.malformed
    }
}

/// The keys of all documents together.
fn keys(args: &Args) -> Result<Vec<KeySet>, Failure> {
    args.jwks
        .iter()
        .map(|origin| {
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
                    .block_on(keyring::fetch(&client, &endpoint, None, FETCH))
                    .map_err(|error| named(&error))?
            } else {
                keyring::read_file(Path::new(origin), MAX_KEPT_KEYS).map_err(|error| named(&error))?
            };
            for key in refused {
                let _ = writeln!(io::stderr(), "auditgate: --jwks {origin}: {}", printable(&key.to_string()));
            }
            Ok(keys)
        })
        .collect()
}

/// The lines of a file, inflated where its first bytes say so.
fn open(path: &Path) -> Result<Box<dyn BufRead>, Failure> {
    let failed = |error: io::Error| Failure::io(format!("cannot read {}: {error}", path.display()));
    let source: Box<dyn Read> = if path == Path::new("-") {
        Box::new(io::stdin())
    } else {
        let file = File::open(path).map_err(failed)?;
        if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
            return Err(Failure::io(format!("cannot read {}: it is a directory", path.display())));
        }
        Box::new(file)
    };
    let mut plain = BufReader::with_capacity(256 * 1024, source);
    let start = plain.fill_buf().map_err(failed)?;
    if start.starts_with(&[0x1f, 0x8b]) {
        Ok(Box::new(BufReader::with_capacity(256 * 1024, batch::inflate(plain))))
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let inflated = zstd::Decoder::with_buffer(plain).map_err(failed)?;
        Ok(Box::new(BufReader::with_capacity(256 * 1024, inflated)))
    } else {
        Ok(Box::new(plain))
    }
}

/// Checks one file.
struct Checker<'a> {
    /// Each key's bytes, and its ID.
    keys: Vec<([u8; 32], &'a str)>,
    path: &'a Path,
    counts: Counts,
    bad_lines: Vec<BadLine>,
    /// Findings are printed as they come, unless they are collected for JSON.
    out: Option<&'a mut dyn Write>,
}

/// What is wrong with a line.
struct Finding {
    name: &'static str,
    detail: String,
}

impl<'a> Checker<'a> {
    fn new(keys: &'a [KeySet], path: &'a Path, json: bool, out: &'a mut dyn Write) -> Self {
        let keys = keys.iter().flat_map(KeySet::keys).map(|key| (*key.bytes(), key.id())).collect();
        let out = (!json).then_some(out);
        Self { keys, path, counts: Counts::default(), bad_lines: Vec::new(), out }
    }

    fn check(&mut self, mut reader: Box<dyn BufRead>) -> Result<(), Failure> {
        let mut lines: Vec<(u64, Vec<u8>)> = Vec::with_capacity(TOGETHER);
        let mut bytes = 0;
        let mut number = 0;
        loop {
            let mut line = Vec::new();
            let read = (&mut reader)
                .take(LONGEST_LINE as u64)
                .read_until(b'\n', &mut line)
                .map_err(|error| Failure::io(format!("cannot read {}: {error}", self.path.display())))?;
            if read > 0 {
                number += 1;
                bytes += read;
                while line.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
                    line.pop();
                }
                if !line.is_empty() {
                    lines.push((number, line));
                }
            }
            if read == 0 || lines.len() >= TOGETHER || bytes >= 1 << 20 {
                self.judge(&lines)?;
                lines.clear();
                bytes = 0;
            }
            if read == 0 {
                return Ok(());
            }
        }
    }

    fn judge(&mut self, lines: &[(u64, Vec<u8>)]) -> Result<(), Failure> {
        let saved: Vec<Option<Saved<'_>>> = lines.iter().map(|(_, line)| record::read(line)).collect();
        let mut claims = Vec::with_capacity(lines.len());
        let opened: Vec<Result<Line<'_>, Finding>> = lines
            .iter()
            .zip(&saved)
            .map(|((_, line), saved)| open_line(saved.as_ref().map_or(line, |saved| &saved.raw), &mut claims))
            .collect();
        let keys: Vec<[u8; 32]> = self.keys.iter().map(|(bytes, _)| *bytes).collect();
        let mut fits = verify(&claims, &keys, &mut rand::rng()).into_iter();
        for (((number, _), saved), opened) in lines.iter().zip(&saved).zip(opened) {
            let result = opened.and_then(|line| match fits.next().flatten() {
                None => Err(bad("no given key made this signature")),
                Some(fit) => self.record_holds(saved.as_ref(), &line, fit.key),
            });
            match result {
                Ok(()) => self.counts.good += 1,
                Err(finding) => self.report(*number, finding)?,
            }
        }
        Ok(())
    }

    /// Whether the rest of a record still says what its raw line says. `received_at` and `source` are
    /// auditgate's own words, which no signature covers.
    fn record_holds(&self, saved: Option<&Saved<'_>>, line: &Line<'_>, key: usize) -> Result<(), Finding> {
        let Some(saved) = saved else { return Ok(()) };
        if saved.claims.as_ref().is_some_and(|claims| !claims.hold_for(line)) {
            return Err(bad("the record says something else than its raw line"));
        }
        // The same key can be listed under several IDs.
        let is_its_id = |id: &str| {
            self.keys
                .iter()
                .any(|(bytes, known)| *known == id && self.keys.get(key).is_some_and(|(fit, _)| fit == bytes))
        };
        if saved.claims.is_some() && !saved.key_id.as_deref().is_some_and(is_its_id) {
            return Err(bad("the record names another key than the one that made the signature"));
        }
        Ok(())
    }

    fn report(&mut self, line: u64, finding: Finding) -> Result<(), Failure> {
        match finding.name {
            "unsigned" => self.counts.unsigned += 1,
            "malformed" => self.counts.malformed += 1,
            _ => self.counts.bad += 1,
        }
        let file = self.path.display().to_string();
        match &mut self.out {
            Some(out) => {
                writeln!(out, "{}:{line}: {}: {}", printable(&file), finding.name, printable(&finding.detail))
                    .map_err(|error| Failure::io(format!("cannot write the report: {error}")))
            }
            None => {
                self.bad_lines.push(BadLine { file, line, finding: finding.name, detail: finding.detail });
                Ok(())
            }
        }
    }
}

fn open_line<'a>(bytes: &'a [u8], claims: &mut Vec<Claim<'a>>) -> Result<Line<'a>, Finding> {
    let line = Line::parse(bytes)
        .map_err(|malformed| Finding { name: "malformed", detail: malformed.0.into_owned() })?;
    let Some(signed) = line.signed() else {
        return Err(Finding { name: "unsigned", detail: "the line has no signature".to_owned() });
    };
    claims.push(ingest::claim(signed).map_err(|error| bad(&error.to_string()))?);
    Ok(line)
}

fn bad(detail: &str) -> Finding {
    Finding { name: "bad", detail: detail.to_owned() }
}
