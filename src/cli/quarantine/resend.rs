//! `auditgate quarantine resend`: the lines once more, on the way of `auditgate send`.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use super::inputs::{InputArgs, shown};
use super::records::{Filter, read};
use super::{Failed, FilterArgs, Inputs, Problems, unwritable};
use crate::cli::exit::Failure;
use crate::cli::send::delivery::{Console, Delivery, Feed, Hangup, Origin, deliver};
use crate::cli::send::input::quarantined;
use crate::cli::time_arg;
use crate::escape::escape;

/// Sends quarantined lines again, byte for byte, after the cause is fixed.
///
/// The receiver verifies them like any others. What it accepts is delivered; what it still rejects
/// is a duplicate for a day, and is quarantined once more after that. Nothing is removed here: what
/// was sent stays in the quarantine until it is rotated away or pruned. Lines of several sources
/// must be sent one source at a time, each to its own URL.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    #[command(flatten)]
    inputs: InputArgs,

    #[command(flatten)]
    filter: FilterArgs,

    #[command(flatten)]
    delivery: Delivery,
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let mut complaints = io::stderr();
    let console = Console::new(out, &mut complaints);
    resend(args, &|name| std::env::var_os(name), console)
}

fn resend(
    args: &Args,
    environment: &dyn Fn(&str) -> Option<OsString>,
    console: Console<'_>,
) -> Result<(), Failure> {
    let mut problems = Problems::default();
    args.delivery.endpoint()?;
    let inputs = Inputs::find(&args.inputs, &mut problems)?.of_one_sink()?;
    let mut filter = args.filter.filter()?;
    // What is quarantined once more while this runs is not sent once more.
    let now = time_arg::now();
    filter.window.until = Some(filter.window.until.map_or(now, |until| until.min(now)));
    let mut sources: BTreeSet<String> = BTreeSet::new();
    for input in &inputs.0 {
        let read = read(&input.path, &filter, |record| {
            if !sources.contains(record.source) {
                sources.insert(record.source.to_owned());
            }
            Ok::<_, Infallible>(())
        });
        match read {
            Ok(_) => {}
            Err(Failed::Unreadable(problem)) => return Err(Failure::io(problem)),
            Err(Failed::Stopped(never)) => match never {},
        }
    }
    let names: Vec<_> = sources.iter().map(|source| escape(source)).collect();
    match names.len() {
        0 => {
            let said = writeln!(console.out, "no quarantined line to send");
            said.map_err(|error| unwritable(&error))?;
        }
        1 => {
            let paths: Vec<PathBuf> = inputs.0.into_iter().map(|input| input.path).collect();
            deliver(&args.delivery, environment, console, false, move |feed| {
                feed_all(&paths, &filter, feed)
            })?;
        }
        _ => {
            return Err(Failure::usage(format!(
                "these are lines of several sources, each with a URL of its own; choose one with --source: {}",
                names.join(", ")
            )));
        }
    }
    problems.end()
}

fn feed_all(paths: &[PathBuf], filter: &Filter, feed: &Feed) -> Result<(), Hangup> {
    for path in paths {
        let file: Arc<str> = Arc::from(shown(path));
        let read = read(path, filter, |record| {
            let origin = Origin { file: Arc::clone(&file), line: record.number };
            feed.give(&origin, quarantined(record.raw, record.reason))
        });
        match read {
            Ok(_) => {}
            Err(Failed::Unreadable(problem)) => return feed.unreadable(problem),
            Err(Failed::Stopped(hangup)) => return Err(hangup),
        }
    }
    Ok(())
}
