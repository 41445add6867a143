//! `auditgate forget-sink`: gives up what waits for a sink that is gone.

use std::io::Write;
use std::path::PathBuf;

use super::exit::Failure;
use crate::config::{self, Secrets};
use crate::ledger::{Ledger, OpenError};

/// Gives up the events that wait for a sink, so that the daemon can start without it.
///
/// The daemon must not run. Without this, a sink that is removed from the configuration (or renamed) while events
/// wait for it keeps the daemon from starting, for those events would be lost.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The name the sink had in the configuration
    #[arg(value_name = "NAME")]
    pub sink: String,

    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = config::DEFAULT_FILE)]
    pub config: PathBuf,
}

/// Forgets, and says how much that was.
///
/// # Errors
/// 1 when the ledger knows no such sink, 74 when it cannot be opened, 78 for the configuration.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let config = config::load(&args.config, &|name| std::env::var_os(name), Secrets::SkipMissing)
        .map_err(Failure::config)?;
    let forgotten = Ledger::forget_sink(&config.data_dir, &args.sink).map_err(|error| match error {
        OpenError::TooNew { .. } => Failure::config(error),
        _ => Failure::io(error),
    })?;
    let Some(events) = forgotten else {
        return Err(Failure::finding(format!(
            "the ledger in {} knows no sink `{}`",
            config.data_dir.display(),
            args.sink
        )));
    };
    writeln!(out, "forgot sink {} and up to {events} events that waited for it", args.sink)
        .map_err(|error| Failure::io(format!("cannot write to standard output: {error}")))
}
