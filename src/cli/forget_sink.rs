//! `auditgate forget-sink`: gives up the events that wait for a sink which is gone or takes less
//! than before.

use std::io::Write;

use super::config_file::ConfigFile;
use super::exit::Failure;
use crate::config::Secrets;
use crate::ledger::{Forgetting, Ledger, OpenError};

/// Gives up the events that wait for a sink, so that the daemon can start without them.
///
/// The daemon must not run. A sink that is removed from the configuration (or renamed) while events
/// wait for it keeps the daemon from starting, because those events would be lost. So does a sink
/// whose `stream` or `sources` no longer include events that wait for it; of its events, only those
/// are given up.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The name the sink has, or had, in the configuration
    #[arg(value_name = "NAME")]
    pub sink: String,

    /// Give up everything that waits for the sink although it is configured
    #[arg(long)]
    pub force: bool,

    #[command(flatten)]
    pub config: ConfigFile,
}

/// Gives up the events and prints how many they were.
///
/// # Errors
/// 1 when the ledger knows no such sink, or it is configured and does not keep the daemon from
/// starting; 74 when the ledger cannot be opened, 78 for the configuration.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let config = args.config.load(Secrets::SkipMissing)?;
    let (name, data_dir) = (&args.sink, config.data_dir.display());
    let configured = config.sinks.get(name).map(|sink| sink.subscription(name));
    let forgetting = Ledger::forget_sink(&config.data_dir, name, configured.as_ref(), args.force);
    let forgetting = forgetting.map_err(|error| match error {
        OpenError::InUse(_) => Failure::io(format!(
            "a daemon works with {data_dir}; stop it first (systemctl stop auditgate), and start it afterwards"
        )),
        OpenError::TooNew { .. } => Failure::config(error),
        _ => Failure::io(error),
    })?;
    let said = match forgetting {
        Forgetting::Unknown => {
            return Err(Failure::finding(format!("the ledger in {data_dir} knows no sink `{name}`")));
        }
        Forgetting::Refused { pending } => {
            return Err(Failure::finding(format!(
                "sink `{name}` is configured: {pending} events that wait for it go to it when the daemon runs; \
                 remove it from {} first, or give them up nevertheless with --force",
                args.config.config.display()
            )));
        }
        Forgetting::NoLongerWanted { given_up } => {
            format!(
                "gave up {given_up} events that sink {name} no longer takes; what else waits for it stays"
            )
        }
        Forgetting::All { given_up } => {
            format!("forgot sink {name} and {given_up} events that waited for it")
        }
    };
    writeln!(out, "{said}").map_err(|error| Failure::io(format!("cannot write to standard output: {error}")))
}
