//! `auditgate init`: a configuration, its secrets and its directories, from answers or options.

mod answers;
mod files;

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write};
use std::net::SocketAddr;
use std::path::PathBuf;

use self::answers::{Certificate, Plan, Region};
use self::files::Written;
use super::exit::Failure;
use crate::net::SyslogAddress;

/// Writes a configuration, its secrets and its directories. Never overwrites.
///
/// Asks for what is not given, if it is run on a terminal. Prints the values for Konnect and the
/// commands to go on with. Besides a source for each region it writes the source `check` with a key
/// of its own, by which you can send events to yourself at any time.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Host name that senders use, without a port
    #[arg(long, value_name = "NAME")]
    host: Option<String>,

    /// Konnect's regions, such as us,eu
    #[arg(long, value_name = "REGION", value_delimiter = ',')]
    region: Vec<Region>,

    /// The certificate's PEM file, followed by its intermediates
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,

    /// The certificate's key, a PEM file that the daemon's user can read
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,

    /// Make a certificate from an authority of its own, which Konnect does not trust
    #[arg(long, conflicts_with = "cert")]
    test_ca: bool,

    /// IP address and port to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8443")]
    address: SocketAddr,

    /// Add a database of events
    #[arg(long)]
    sqlite: bool,

    /// Add a syslog server, such as tls://siem.example.com:6514
    #[arg(long, value_name = "ADDRESS", value_parser = |text: &str| SyslogAddress::parse(text))]
    syslog: Option<SyslogAddress>,

    /// The daemon's user, which must exist; ignored unless root runs this
    #[arg(long, value_name = "USER", default_value = "auditgate")]
    user: String,

    /// Directory of the configuration and its secrets
    #[arg(long, value_name = "DIR", default_value = "/etc/auditgate")]
    dir: PathBuf,

    /// Directory of the ledger
    #[arg(long, value_name = "DIR", default_value = "/var/lib/auditgate")]
    data_dir: PathBuf,

    /// Directory of the output
    #[arg(long, value_name = "DIR", default_value = "/var/log/auditgate")]
    log_dir: PathBuf,
}

/// Writes everything and says how to go on.
///
/// # Errors
/// 2 for a missing or wrong answer, 74 when something exists already or cannot be written; nothing
/// is left then.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let is_interactive = io::stdin().is_terminal() && io::stderr().is_terminal();
    let mut terminal = io::stdin().lock();
    let plan = Plan::complete(args, is_interactive.then_some(&mut terminal))?;
    let written = files::write(&plan)?;
    out.write_all(report(&plan, &written).as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Failure::io(format!("everything is written, but standard output is not: {error}")))
}

/// Returns what was written, the values for Konnect, and the commands to go on with.
fn report(plan: &Plan, written: &Written) -> String {
    let mut text = "Written:\n".to_owned();
    // Writing into a string cannot fail.
    for path in &written.paths {
        let _ = writeln!(text, "  {}", path.display());
    }
    let is_test = plan.certificate == Certificate::Test;
    let verification = match is_test {
        true => "on while you try it out: no public client trusts the test CA",
        false => "off",
    };
    for (region, token) in plan.regions.iter().zip(&written.tokens) {
        let region = region.as_str();
        let url = plan.url(&format!("/konnect/{region}"));
        let _ = write!(
            text,
            "\nAt Konnect (Organization, Audit Logs Setup), region {region}:\n  \
             endpoint               {url}\n  \
             authorization header   {}\n  \
             log format             cef (json and cps are recognised, too)\n  \
             skip SSL verification  {verification}\n",
            **token
        );
    }
    let dir = plan.dir.display();
    let _ = write!(
        text,
        "\nNext:\n  \
         auditgate check-config --deep --quiet --as-user {} --config {dir}/config.toml\n  \
         systemctl enable --now auditgate\n  \
         auditgate send --to {} --authorization-file {dir}/tokens/check --key {dir}/check/signing-key.pem{} \
         --generate 10\n\
         The last one sends ten events the whole way; they are then in {}/check.log.\n",
        plan.user,
        plan.url("/check"),
        if is_test { format!(" --ca {dir}/tls/ca.pem") } else { String::new() },
        plan.log_dir.display()
    );
    text
}

#[cfg(test)]
mod tests;
