//! `auditgate quarantine show`: the lines themselves, escaped.

use std::collections::VecDeque;
use std::io::Write;

use super::inputs::InputArgs;
use super::records::{Record, read};
use super::{Failed, FilterArgs, Inputs, Problems, Reason, unwritable};
use crate::cli::exit::Failure;
use crate::escape::escape;
use crate::wire::record::{Quarantined, write_quarantined};

/// Prints quarantined lines, the newest last.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    #[command(flatten)]
    inputs: InputArgs,

    #[command(flatten)]
    filter: FilterArgs,

    /// How many of the newest lines
    #[arg(long, short = 'n', value_name = "N", default_value = "20")]
    lines: usize,

    /// All lines, in the order of the files
    #[arg(long, conflicts_with = "lines")]
    all: bool,

    /// Print whole records as a quarantine file has them, as `auditgate send --input-format
    /// quarantine` reads them
    #[arg(long)]
    json: bool,
}

/// Maximum number of characters of a line that are shown, except in JSON.
const MAX_SHOWN_CHARS: usize = 1000;

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let mut problems = Problems::default();
    let inputs = Inputs::find(&args.inputs, &mut problems)?.of_one_sink()?;
    let filter = args.filter.filter()?;
    let mut newest: VecDeque<Vec<u8>> = VecDeque::new();
    for input in &inputs.0 {
        let read = read(&input.path, &filter, |record| {
            let text = if args.json { json(record) } else { human(record) };
            if args.all {
                return out.write_all(&text);
            }
            newest.push_back(text);
            if newest.len() > args.lines {
                newest.pop_front();
            }
            Ok(())
        });
        match read {
            Ok(_) => {}
            Err(Failed::Unreadable(problem)) => problems.add(problem),
            Err(Failed::Stopped(error)) => return Err(unwritable(&error)),
        }
    }
    let written = newest.iter().try_for_each(|text| out.write_all(text));
    written.and_then(|()| out.flush()).map_err(|error| unwritable(&error))?;
    problems.end()
}

fn json(record: &Record<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(record.raw.len() + 256);
    let reason = Reason::ALL.into_iter().find(|reason| reason.as_str() == record.reason);
    let quarantined = Quarantined {
        received_at: record.time.unwrap_or_default(),
        source: record.source,
        // Only a row that another program wrote has another one.
        reason: reason.unwrap_or(Reason::Malformed),
        detail: record.detail,
        raw: record.raw,
    };
    write_quarantined(&mut out, &quarantined);
    out
}

fn human(record: &Record<'_>) -> Vec<u8> {
    let raw = String::from_utf8_lossy(record.raw);
    let (shown, more) = match raw.char_indices().nth(MAX_SHOWN_CHARS) {
        Some((at, _)) => (&raw[..at], format!(" … ({} bytes; all of them with --json)", record.raw.len())),
        None => (&*raw, String::new()),
    };
    let texts = [&*record.received_at, record.source, record.reason, record.detail, shown];
    let [received_at, source, reason, detail, shown] = texts.map(escape);
    format!("{received_at} {source} {reason}: {detail}\n    {shown}{more}\n").into_bytes()
}
