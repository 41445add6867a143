//! `auditgate quarantine`: what was rejected, by reason, and what becomes of it.

mod inputs;
mod list;
mod prune;
mod records;
mod resend;
mod show;

use std::io::{self, Write};

use clap::builder::{PossibleValuesParser, TypedValueParser as _};

use super::exit::Failure;
use super::time_arg;
use crate::escape::escape;
use crate::verify::judge::Window;
use crate::wire::event::Reason;
use inputs::Inputs;
use records::{Failed, Filter};

/// Lists, shows, re-sends and removes quarantined lines.
///
/// Works on the sinks of the configuration that take the stream `quarantine`: files in the format
/// json, with those that were rotated from them, compressed or not, and databases; or on the files
/// that are named.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Clone, Debug)]
enum Command {
    List(list::Args),
    Show(show::Args),
    Resend(Box<resend::Args>),
    Prune(prune::Args),
}

/// Does what the subcommand says.
///
/// # Errors
/// 2 for arguments that cannot be used, 74 for what cannot be read or removed (the others are done),
/// 78 for the configuration; of `resend`, those of `auditgate send`.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    match &args.command {
        Command::List(args) => list::run(args, out),
        Command::Show(args) => show::run(args, out),
        Command::Resend(args) => resend::run(args, out),
        Command::Prune(args) => prune::run(args, out),
    }
}

/// Which of the quarantined lines.
#[derive(clap::Args, Clone, Debug, Default)]
struct FilterArgs {
    /// Only lines that were quarantined for this reason; can be given several times
    #[arg(long, value_name = "REASON", value_parser = reasons())]
    reason: Vec<Reason>,

    /// Only lines of this source; can be given several times
    #[arg(long, value_name = "NAME")]
    source: Vec<String>,

    /// Only lines that arrived from this time on: RFC 3339, a date (its beginning in UTC), or an age
    /// such as 2d
    #[arg(long, value_name = "TIME")]
    since: Option<String>,

    /// Only lines that arrived before this time
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
}

fn reasons() -> impl clap::builder::TypedValueParser<Value = Reason> {
    PossibleValuesParser::new(Reason::ALL.map(Reason::as_str)).try_map(|name| {
        let reason = Reason::ALL.into_iter().find(|reason| reason.as_str() == name);
        reason.ok_or("not a reason")
    })
}

impl FilterArgs {
    fn filter(&self) -> Result<Filter, Failure> {
        let window = time_arg::window(self.since.as_deref(), self.until.as_deref())?;
        Ok(Filter { reasons: self.reason.clone(), sources: self.source.clone(), window })
    }
}

/// Collects what could not be read, so that the rest is still done.
#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    /// Says on standard error what is wrong.
    fn add(&mut self, problem: String) {
        // When standard error is closed, the exit code still tells.
        let _ = writeln!(io::stderr(), "auditgate: {}", escape(&problem));
        self.0.push(problem);
    }

    fn end(&self) -> Result<(), Failure> {
        match self.0.len() {
            0 => Ok(()),
            1 => Err(Failure::io("one file was left out, see above")),
            many => Err(Failure::io(format!("{many} files were left out, see above"))),
        }
    }
}

fn unwritable(error: &io::Error) -> Failure {
    Failure::io(format!("cannot write to standard output: {error}"))
}

#[cfg(test)]
mod tests;
