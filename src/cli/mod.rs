//! The command line: one file for each subcommand.

pub mod check_config;
pub mod checks;
pub mod completions;
pub mod config_file;
pub mod demo;
pub mod exit;
pub mod forget_sink;
pub mod init;
pub mod keygen;
pub mod man;
pub mod mock_konnect;
pub mod quarantine;
pub mod send;
pub mod serve;
pub mod status;
pub mod test_ca;
mod time_arg;
pub mod verify;
pub mod version;

use clap::{Parser, Subcommand};
use tracing::Level;

use crate::escape::escape;
use crate::observe::logging;
use exit::{Exit, Failure};

/// Receives signed audit-log batches over HTTPS, verifies every event and delivers it once.
#[derive(Parser, Debug)]
#[command(name = "auditgate", version, long_version = version::long(), about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Demo(demo::Args),
    Init(init::Args),
    Serve(serve::Args),
    Status(status::Args),
    CheckConfig(check_config::Args),
    Send(send::Args),
    Verify(verify::Args),
    Keygen(keygen::Args),
    Quarantine(quarantine::Args),
    ForgetSink(forget_sink::Args),
    MockKonnect(mock_konnect::Args),
    Completions(completions::Args),
    Man(man::Args),
}

/// Runs the command line of this process and returns its exit code.
pub fn run() -> Exit {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are not errors; clap knows which stream each goes to.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage } else { Exit::Good };
        }
    };
    let mut out = std::io::stdout().lock();
    let result = match &cli.command {
        Command::Demo(args) => demo::run(args, &mut out),
        Command::Init(args) => init::run(args, &mut out),
        Command::Serve(args) => serve::run(args),
        Command::Status(args) => status::run(args, &mut out),
        Command::CheckConfig(args) => check_config::run(args, &mut out),
        Command::Send(args) => send::run(args, &mut out),
        Command::Verify(args) => verify::run(args, &mut out),
        Command::Keygen(args) => keygen::run(args, &mut out),
        Command::Quarantine(args) => quarantine::run(args, &mut out),
        Command::ForgetSink(args) => forget_sink::run(args, &mut out),
        Command::MockKonnect(args) => mock_konnect::run(args, &mut out),
        Command::Completions(args) => completions::run(args, &mut out),
        Command::Man(args) => man::run(args, &mut out),
    };
    match result {
        Ok(()) => Exit::Good,
        Err(Failure { exit, message }) => {
            use std::io::Write as _;
            // A message names files and repeats what a peer sent. When stderr is closed, the exit
            // code is all that is left.
            if !message.is_empty() {
                let lines: Vec<_> = message.split('\n').map(escape).collect();
                let prefix = logging::prefix(Level::ERROR);
                let _ =
                    writeln!(std::io::stderr(), "{prefix}auditgate: {}", lines.join(&format!("\n{prefix}")));
            }
            exit
        }
    }
}
