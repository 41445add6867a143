//! The command line: one file for each subcommand.

pub mod check_config;
pub mod config_file;
pub mod demo;
pub mod exit;
pub mod forget_sink;
pub mod keygen;
pub mod send;
pub mod serve;
pub mod status;
pub mod verify;

use clap::{Parser, Subcommand};

use crate::escape::escape;
use exit::{Exit, Failure};

/// Receives signed audit-log batches over HTTPS, verifies every event and delivers it once.
#[derive(Parser, Debug)]
#[command(name = "auditgate", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Demo(demo::Args),
    Serve(serve::Args),
    Status(status::Args),
    CheckConfig(check_config::Args),
    Send(send::Args),
    Verify(verify::Args),
    Keygen(keygen::Args),
    ForgetSink(forget_sink::Args),
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
        Command::Serve(args) => serve::run(args),
        Command::Status(args) => status::run(args, &mut out),
        Command::CheckConfig(args) => check_config::run(args, &mut out),
        Command::Send(args) => send::run(args, &mut out),
        Command::Verify(args) => verify::run(args, &mut out),
        Command::Keygen(args) => keygen::run(args, &mut out),
        Command::ForgetSink(args) => forget_sink::run(args, &mut out),
    };
    match result {
        Ok(()) => Exit::Good,
        Err(Failure { exit, message }) => {
            use std::io::Write as _;
            // A message names files and repeats what a peer sent. When stderr is closed, the exit
            // code is all that is left.
            let lines: Vec<_> = message.split('\n').map(escape).collect();
            let _ = writeln!(std::io::stderr(), "auditgate: {}", lines.join("\n"));
            exit
        }
    }
}
