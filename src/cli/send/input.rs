//! Input of `auditgate send`: lines of files or of standard input, or sample events, each made into
//! what is sent.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::PathBuf;
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::super::exit::Failure;
use super::super::time_arg::now;
use super::delivery::{Feed, Hangup, Origin};
use super::{Args, display};
use crate::compression::unpacked;
use crate::send::{SigningKey, line, prepare, sample};
use crate::wire::batch::{Coding, Packing};
use crate::wire::event::{Format, Reason};
use crate::wire::record;

/// Way in which an input line becomes a line to send.
pub(super) enum Treatment {
    Events { format: Option<Format>, key: Option<Box<SigningKey>> },
    Raw,
    Quarantine,
}

/// Returns the maximum length of an input line, in bytes. A record spells some bytes in six, and
/// has some members around them. A record of a whole body may be as long as the default of
/// `limits.decoded`.
pub(super) fn longest_input_line(batch_bytes: usize, treatment: &Treatment) -> usize {
    const BODY: usize = 64 << 20;
    let raw = if matches!(treatment, Treatment::Quarantine) { batch_bytes.max(BODY) } else { batch_bytes };
    raw.saturating_mul(6).saturating_add(64 * 1024)
}

/// Origin of the lines. Everything is open already, so that a missing file stops the run before its
/// first post.
pub(super) enum Input {
    Files(Vec<(String, Box<dyn Read + Send>)>),
    Samples { count: u64, seed: Option<u64> },
}

impl Input {
    /// Opens what the arguments name.
    ///
    /// # Errors
    /// 2 when standard input is named twice, 74 for a file that cannot be opened.
    pub(super) fn open(args: &Args, stdin: Box<dyn Read + Send>) -> Result<Self, Failure> {
        if let Some(count) = args.generate {
            return Ok(Self::Samples { count, seed: args.seed });
        }
        let mut stdin = Some(stdin);
        let dash = [PathBuf::from("-")];
        let paths = if args.files.is_empty() { &dash[..] } else { &args.files[..] };
        let mut files: Vec<(String, Box<dyn Read + Send>)> = Vec::new();
        for path in paths {
            if path.as_os_str() == "-" {
                let stdin =
                    stdin.take().ok_or_else(|| Failure::usage("standard input (-) is named twice"))?;
                files.push(("standard input".to_owned(), stdin));
            } else {
                let unreadable = |problem: &dyn std::fmt::Display| {
                    Failure::io(format!("cannot read {}: {problem}", display(path)))
                };
                let file = File::open(path).map_err(|error| unreadable(&error))?;
                if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
                    return Err(unreadable(&"it is a directory"));
                }
                files.push((display(path), Box::new(file)));
            }
        }
        Ok(Self::Files(files))
    }

    /// Reads everything, and hands over what becomes of it.
    ///
    /// # Errors
    /// When the run has ended.
    pub(super) fn read(self, treatment: &Treatment, longest: usize, feed: &Feed) -> Result<(), Hangup> {
        match self {
            Self::Samples { count, seed } => generate(count, seed, treatment, feed),
            Self::Files(files) => files
                .into_iter()
                .try_for_each(|(name, file)| read_file(&name, file, treatment, longest, feed)),
        }
    }
}

fn generate(count: u64, seed: Option<u64>, treatment: &Treatment, feed: &Feed) -> Result<(), Hangup> {
    let rng = seed.map_or_else(rand::make_rng, StdRng::seed_from_u64);
    let mut samples = sample::Samples::new(rng, now);
    let (format, key) = match treatment {
        Treatment::Events { format, key } => (format.unwrap_or(Format::Cef), key.as_deref()),
        Treatment::Raw | Treatment::Quarantine => return Ok(()),
    };
    let file = Arc::from("sample events");
    for number in 1..=count {
        let Some(event) = samples.next() else { break };
        let origin = Origin { file: Arc::clone(&file), line: number };
        let line = line(format, &event, key);
        feed.give(&origin, line.map(|line| vec![line]).map_err(|error| error.to_string()))?;
    }
    Ok(())
}

fn read_file(
    name: &str,
    file: Box<dyn Read + Send>,
    treatment: &Treatment,
    longest: usize,
    feed: &Feed,
) -> Result<(), Hangup> {
    // Here and not when it is opened: a pipe may stay empty for a long time.
    let unpacked = match unpacked(BufReader::with_capacity(64 * 1024, file)) {
        Ok((_, unpacked)) => unpacked,
        Err(error) => {
            let problem = format!("cannot read {name}: {error}");
            return feed.unreadable(problem);
        }
    };
    let mut lines =
        Lines { reader: BufReader::with_capacity(64 * 1024, unpacked), longest, buffer: Vec::new() };
    let name: Arc<str> = Arc::from(name);
    for number in 1.. {
        let origin = Origin { file: Arc::clone(&name), line: number };
        if lines.reader.buffer().is_empty() {
            // The next line may be a long time in coming.
            feed.flush()?;
        }
        let treated = match lines.next() {
            Ok(None) => break,
            Ok(Some(Ok(text))) if crate::wire::batch::lines(text).next().is_none() => continue,
            Ok(Some(Ok(text))) => treatment.apply(text),
            Ok(Some(Err(TooLong))) => Err(format!("it is longer than {longest} bytes")),
            Err(error) => {
                let problem = format!("cannot read {name} beyond line {}: {error}", number - 1);
                return feed.unreadable(problem);
            }
        };
        feed.give(&origin, treated)?;
    }
    Ok(())
}

impl Treatment {
    /// Returns the lines to send for an input line, or what is wrong with it.
    fn apply(&self, text: &[u8]) -> Result<Vec<Vec<u8>>, String> {
        match self {
            Self::Raw => Ok(vec![text.to_vec()]),
            Self::Quarantine => match record::read(text) {
                Some(record::Saved { raw, kind: record::Kind::Quarantined(about) }) => {
                    quarantined(&raw, &about.reason)
                }
                _ => Err("it is not a quarantine record; for other lines use --input-format raw".to_owned()),
            },
            Self::Events { format, key } => {
                let (format, event) = prepare(text, *format, now())?;
                let line = line(format, &event, key.as_deref());
                line.map(|line| vec![line]).map_err(|error| error.to_string())
            }
        }
    }
}

/// Reader of lines of bounded length, without `\n` or `\r\n`.
struct Lines {
    reader: BufReader<Box<dyn Read + Send>>,
    longest: usize,
    buffer: Vec<u8>,
}

/// A line is longer than allowed; it has been skipped.
struct TooLong;

impl Lines {
    /// Returns the next line, or none at the end.
    fn next(&mut self) -> io::Result<Option<Result<&[u8], TooLong>>> {
        self.buffer.clear();
        let limit = u64::try_from(self.longest).unwrap_or(u64::MAX).saturating_add(2);
        if self.reader.by_ref().take(limit).read_until(b'\n', &mut self.buffer)? == 0 {
            return Ok(None);
        }
        let whole = self.buffer.ends_with(b"\n");
        let text = self.buffer.strip_suffix(b"\n").unwrap_or(&self.buffer);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        if text.len() <= self.longest {
            return Ok(Some(Ok(text)));
        }
        if !whole {
            self.reader.skip_until(b'\n')?;
        }
        Ok(Some(Err(TooLong)))
    }
}

/// Returns the lines to send for a quarantined line, or why it cannot be sent. A body of which many
/// lines were rejected is one record.
pub(in crate::cli) fn quarantined(raw: &[u8], reason: &str) -> Result<Vec<Vec<u8>>, String> {
    if reason == Reason::UndecodableBody.as_str() && raw.contains(&b'\n') {
        return Err("it is a body without an event, whose lines say nothing alone".to_owned());
    }
    Ok(Packing::Lines(Coding::Identity).lines(raw).map(<[u8]>::to_vec).collect())
}
