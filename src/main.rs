//! The `auditgate` command. Everything is in the library; this is only its way in.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(auditgate::cli::run() as u8)
}
