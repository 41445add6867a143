//! `auditgate send`: events from files, from standard input or generated, to a receiver.
//!
//! Without a spool, a thread reads, formats and signs ([`input`]); the runtime batches, posts and reports
//! ([`delivery`]), so that a batch is sent when its linger time is over even while standard input is
//! silent.

pub(in crate::cli) mod delivery;
pub(in crate::cli) mod input;
mod load;
mod spool;

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use self::delivery::{Console, Delivery, deliver};
use self::input::{Input, Treatment, longest_input_line};
use super::exit::Failure;
use crate::escape::escape;
use crate::send::SigningKey;
use crate::wire::event::Format;

/// Sends events to a receiver, signed, batched and compressed as Kong Konnect does it.
///
/// Missing fields (rt, event_ts, trace_id) are filled in. A batch that gets no answer, a 429 or a 500
/// is sent again after 1 s, 2 s and so on, or when the receiver says. One line is printed for each batch, and a summary at the end. A refusal that every
/// other batch would meet too (401, 403, 404, 405, a certificate that is not trusted) ends the run.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Files with one event a line, plain or compressed (gzip, zstd; recognised by their first
    /// bytes); `-`, the default, is standard input
    #[arg(value_name = "FILE", conflicts_with = "generate")]
    pub files: Vec<PathBuf>,

    #[command(flatten)]
    pub delivery: Delivery,

    /// The key to sign with: an Ed25519 key in PKCS#8 PEM, as `auditgate keygen` writes it
    #[arg(long, value_name = "FILE", conflicts_with = "unsigned")]
    pub key: Option<PathBuf>,

    /// Send events without a signature
    #[arg(long)]
    pub unsigned: bool,

    /// Generate N sample events instead of reading any
    #[arg(long, value_name = "N")]
    pub generate: Option<u64>,

    /// Generate the same sample events each time, apart from their times
    #[arg(long, value_name = "N", requires = "generate")]
    pub seed: Option<u64>,

    /// How events are spelled: cef, json or cps [default: as they came; cef for sample events]
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,

    /// Run as the service of this configuration file, until SIGTERM
    #[arg(long, short, value_name = "FILE", exclusive = true)]
    pub config: Option<PathBuf>,

    /// Keep what is to be sent in this directory until the receiver has it, through any outage and
    /// `kill -9`; a file is read once, and the next run continues where this one ended
    #[arg(long, value_name = "DIR", conflicts_with = "generate")]
    pub spool: Option<PathBuf>,

    /// Size of the spool; while it is full, no input is read
    #[arg(long, value_name = "SIZE", value_parser = delivery::size, default_value = "4GiB", requires = "spool")]
    pub spool_size: NonZeroUsize,

    /// Follow the files as they grow and are rotated; needs --spool
    #[arg(long, requires = "spool")]
    pub follow: bool,

    /// Lines are signed already, and sent untouched; needs --spool
    #[arg(long, requires = "spool", conflicts_with_all = ["key", "unsigned", "format"])]
    pub relay: bool,

    /// Serve the key set with the public half of the key at http://ADDRESS/jwks.json, for the
    /// receiver; needs --spool
    #[arg(long, value_name = "ADDRESS", requires_all = ["spool", "key"])]
    pub serve_jwks: Option<SocketAddr>,

    /// What the files hold
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = InputFormat::Events)]
    pub input_format: InputFormat,
}

/// Content of the input lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum InputFormat {
    /// Events in CEF, JSON or CPS, each signed anew
    Events,
    /// Lines that are sent as they are
    Raw,
    /// Lines of a quarantine file, whose `raw` is sent as it is
    Quarantine,
}

/// Sends everything, and prints to `out` the result of each batch. Input lines that cannot be sent
/// are reported on standard error, and the others are still sent.
///
/// # Errors
/// A batch that was not delivered or a bad input line (exit code 1), arguments that contradict each
/// other (2), a file that cannot be read (74), an unusable key, certificate authority or
/// authorization (78).
pub fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    if let Some(config) = &args.config {
        return super::serve::sender::run(config);
    }
    if let Some(directory) = &args.spool {
        return spool::run(args, directory, &|name| std::env::var_os(name), out);
    }
    let mut complaints = io::stderr();
    let console = Console::new(out, &mut complaints);
    send(args, &|name| std::env::var_os(name), Box::new(io::stdin()), console)
}

fn send(
    args: &Args,
    environment: &dyn Fn(&str) -> Option<OsString>,
    stdin: Box<dyn Read + Send>,
    console: Console<'_>,
) -> Result<(), Failure> {
    let treatment = treatment(args)?;
    args.delivery.endpoint()?;
    let input = Input::open(args, stdin)?;
    let longest = longest_input_line(args.delivery.batch_bytes.get(), &treatment);
    deliver(&args.delivery, environment, console, args.generate.is_some(), move |feed| {
        input.read(&treatment, longest, feed)
    })
}

fn treatment(args: &Args) -> Result<Treatment, Failure> {
    let treatment = match args.input_format {
        InputFormat::Events => {
            let key = match (&args.key, args.unsigned) {
                (Some(path), _) => Some(Box::new(SigningKey::read(path).map_err(Failure::config)?)),
                (None, true) => None,
                (None, false) => {
                    return Err(Failure::usage("there is no key to sign with: add --key FILE or --unsigned"));
                }
            };
            return Ok(Treatment::Events { format: args.format, key });
        }
        InputFormat::Raw => Treatment::Raw,
        InputFormat::Quarantine => Treatment::Quarantine,
    };
    if args.generate.is_some() || args.key.is_some() || args.unsigned || args.format.is_some() {
        return Err(Failure::usage(
            "raw and quarantine lines are sent as they are: leave out --generate, --key, --unsigned and --format",
        ));
    }
    Ok(treatment)
}

/// Returns a path as it is shown.
pub(super) fn display(path: &Path) -> String {
    escape(&path.to_string_lossy()).into_owned()
}

#[cfg(test)]
mod tests;
