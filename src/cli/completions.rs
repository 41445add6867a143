//! `auditgate completions`: what a shell needs to complete the command line.

use std::io::Write;

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::Cli;
use super::exit::Failure;

/// Prints the completions for a shell.
///
/// The packages install them. Without a package, for bash:
/// auditgate completions bash > /usr/share/bash-completion/completions/auditgate
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The shell that reads them
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

/// Writes the completions to `out`.
///
/// # Errors
/// `out` cannot be written (74).
pub fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "auditgate", &mut script);
    out.write_all(&script)
        .and_then(|()| out.flush())
        .map_err(|error| Failure::io(format!("cannot write the completions to standard output: {error}")))
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn every_shell_gets_every_subcommand() {
        let cli = Cli::command();
        for shell in Shell::value_variants() {
            let mut out = Vec::new();
            run(&Args { shell: *shell }, &mut out).unwrap();
            let script = String::from_utf8(out).unwrap();
            for subcommand in cli.get_subcommands() {
                assert!(script.contains(subcommand.get_name()), "{shell}: no {}", subcommand.get_name());
            }
        }
    }
}
