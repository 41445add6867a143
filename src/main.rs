//! The `auditgate` command. Everything else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(auditgate::cli::run() as u8)
}
