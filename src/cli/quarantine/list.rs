//! `auditgate quarantine list`: counts by source and reason.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::{self, Write};
use std::rc::Rc;

use serde::Serialize;

use super::inputs::InputArgs;
use super::records::read;
use super::{Failed, FilterArgs, Inputs, Problems, unwritable};
use crate::cli::exit::Failure;
use crate::escape::{escape, escape_json};
use crate::wire::record::time_stamp;

/// Counts quarantined lines by source and reason.
///
/// A body of which many lines were rejected, or that is not a batch of events, is one record.
#[derive(clap::Args, Clone, Debug)]
#[command(after_long_help = JSON_HELP)]
pub(super) struct Args {
    #[command(flatten)]
    inputs: InputArgs,

    #[command(flatten)]
    filter: FilterArgs,

    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

const JSON_HELP: &str = "\
JSON: one object with `quarantined` (a list of `sink`, `source`, `reason`, `records`, `first`, `last`: the times of the \
first and the last arrival), `records` (their sum) and `unreadable` (a list of what could not be read).";

#[derive(Serialize)]
struct Listing<'a> {
    quarantined: Vec<Row<'a>>,
    records: u64,
    unreadable: &'a [String],
}

#[derive(Serialize)]
struct Row<'a> {
    sink: Option<&'a str>,
    source: &'a str,
    reason: &'a str,
    records: u64,
    first: Option<String>,
    last: Option<String>,
}

#[derive(Default)]
struct Count {
    records: u64,
    times: Option<(i64, i64)>,
}

/// The sink, as far as it is known, the source, the reason.
type Group = (Option<Rc<str>>, String, String);

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let mut problems = Problems::default();
    let inputs = Inputs::find(&args.inputs, &mut problems)?;
    let filter = args.filter.filter()?;
    let mut groups: BTreeMap<Group, Count> = BTreeMap::new();
    for input in &inputs.0 {
        let read = read(&input.path, &filter, |record| {
            let group = (input.sink.clone(), record.source.to_owned(), record.reason.to_owned());
            let count = groups.entry(group).or_default();
            count.records += 1;
            if let Some(time) = record.time {
                let (first, last) = count.times.unwrap_or((time, time));
                count.times = Some((first.min(time), last.max(time)));
            }
            Ok::<_, Infallible>(())
        });
        match read {
            Ok(_) => {}
            Err(Failed::Unreadable(problem)) => problems.add(problem),
            Err(Failed::Stopped(never)) => match never {},
        }
    }
    let rows: Vec<Row<'_>> = groups
        .iter()
        .map(|((sink, source, reason), count)| Row {
            sink: sink.as_deref(),
            source,
            reason,
            records: count.records,
            first: count.times.map(|(first, _)| time_stamp(first)),
            last: count.times.map(|(_, last)| time_stamp(last)),
        })
        .collect();
    let records = rows.iter().map(|row| row.records).sum();
    let written = if args.json {
        let listing = Listing { quarantined: rows, records, unreadable: &problems.0 };
        serde_json::to_string(&listing)
            .map_err(io::Error::from)
            .and_then(|text| writeln!(out, "{}", escape_json(&text)))
    } else {
        write_table(out, &rows, inputs.are_of_several_sinks())
    };
    written.map_err(|error| unwritable(&error))?;
    problems.end()
}

fn write_table(out: &mut dyn Write, rows: &[Row<'_>], with_sinks: bool) -> io::Result<()> {
    if rows.is_empty() {
        return writeln!(out, "no quarantined line");
    }
    let mut table = vec![["SINK", "SOURCE", "REASON", "RECORDS", "FIRST", "LAST"].map(str::to_owned)];
    for row in rows {
        let time = |time: &Option<String>| time.clone().unwrap_or_else(|| "-".to_owned());
        table.push([
            escape(row.sink.unwrap_or("-")).into_owned(),
            escape(row.source).into_owned(),
            escape(row.reason).into_owned(),
            row.records.to_string(),
            time(&row.first),
            time(&row.last),
        ]);
    }
    let width = |column: usize| table.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; 6] = std::array::from_fn(width);
    for row in &table {
        let cells = row.iter().zip(widths).enumerate().skip(usize::from(!with_sinks));
        let cells = cells.map(|(column, (cell, width))| match column {
            3 => format!("{cell:>width$}"),
            _ => format!("{cell:width$}"),
        });
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}
