//! `auditgate man`: the manual pages, made from the definitions of the commands and from the example
//! configuration.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory as _};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use super::Cli;
use super::exit::Failure;

const SOURCE: &str = concat!("auditgate ", env!("CARGO_PKG_VERSION"));
const MANUAL: &str = "auditgate manual";
/// An empty argument in roff: without the quotes the next one would take its place. Pages have no
/// date, so that the same sources make the same pages.
const NO_DATE: &str = "\"\"";
/// Explains every key; a test compares it with what the program reads.
const EXAMPLE: &str = include_str!("../../config.example.toml");

/// Writes the manual pages.
///
/// One for auditgate, one for each subcommand, and auditgate.toml(5) for the configuration. The
/// packages install them. Files that exist are replaced.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The directory to write to; created when it is missing
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
}

/// Writes the pages and prints to `out` how many there are.
///
/// # Errors
/// The directory, a page, or `out` cannot be written (74).
pub fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let dir = args.dir.display();
    let number = write_pages(&args.dir)
        .map_err(|error| Failure::io(format!("cannot write the manual pages to {dir}: {error}")))?;
    writeln!(out, "wrote {number} manual pages to {dir}; read one with `man -l {dir}/auditgate.1`")
        .map_err(|error| Failure::io(format!("cannot write to standard output: {error}")))
}

fn write_pages(dir: &Path) -> io::Result<usize> {
    fs::create_dir_all(dir)?;
    // The details of this build are for `--version`: a page is the same wherever it is made.
    let mut cli = Cli::command().long_version(None).disable_help_subcommand(true);
    cli.build();
    let number = write_command(&cli, dir)?;
    fs::write(dir.join("auditgate.toml.5"), configuration_page())?;
    Ok(number + 1)
}

/// Writes the page of a command and those of its subcommands; returns their number.
fn write_command(command: &Command, dir: &Path) -> io::Result<usize> {
    Man::new(command.clone()).date(NO_DATE).source(SOURCE).manual(MANUAL).generate_to(dir)?;
    let mut number = 1;
    for subcommand in command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()) {
        number += write_command(subcommand, dir)?;
    }
    Ok(number)
}

fn configuration_page() -> String {
    let mut page = Roff::new();
    page.control("TH", ["auditgate.toml", "5", NO_DATE, SOURCE, MANUAL])
        .control("SH", ["NAME"])
        .text([roman("auditgate.toml - configuration of auditgate")])
        .control("SH", ["DESCRIPTION"])
        .text([roman(
            "The file /etc/auditgate/config.toml, unless a command is given another one. It is written in TOML. Keys \
             that are not known are refused; auditgate check-config says what is wrong, or prints the configuration \
             with every default filled in. The example below has every key.",
        )])
        .control("SH", ["EXAMPLE"])
        .control("nf", []);
    for line in EXAMPLE.lines() {
        page.text([roman(line)]);
    }
    page.control("fi", [])
        .control("SH", ["SEE ALSO"])
        .text([roman("auditgate-check-config(1), auditgate-serve(1)")]);
    page.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_subcommand_has_a_page_with_its_arguments() {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path().join("man1");
        let mut out = Vec::new();
        run(&Args { dir: dir.clone() }, &mut out).unwrap();

        for subcommand in Cli::command().get_subcommands() {
            let file = dir.join(format!("auditgate-{}.1", subcommand.get_name()));
            let page = fs::read_to_string(&file).unwrap();
            assert!(page.contains(&format!(" 1 \"\" \"{SOURCE}\" \"{MANUAL}\"")), "{}", file.display());
            for long in subcommand.get_arguments().filter_map(clap::Arg::get_long) {
                // In roff a hyphen that is to be copied is escaped.
                let option = format!("\\-\\-{}", long.replace('-', "\\-"));
                assert!(page.contains(&option), "{}: no {option}", file.display());
            }
        }
        let pages = fs::read_dir(&dir).unwrap().count();
        assert!(String::from_utf8(out).unwrap().starts_with(&format!("wrote {pages} manual pages")));
    }

    #[test]
    fn the_page_of_the_configuration_has_every_line_of_the_example() {
        let page = configuration_page();
        let text: Vec<_> = page
            .lines()
            .map(|line| {
                line.trim_start_matches("\\&")
                    .replace("\\-", "-")
                    .replace("\\*(Aq", "'")
                    .replace("\\\\", "\\")
            })
            .collect();
        for line in EXAMPLE.lines() {
            assert!(text.iter().any(|shown| shown == line), "{line}");
        }
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let failure = run(&Args { dir: file.join("man") }, &mut Vec::new()).unwrap_err();
        assert_eq!(failure.exit, super::super::exit::Exit::Io);
        assert!(failure.message.contains("file/man"), "{failure}");
    }
}
