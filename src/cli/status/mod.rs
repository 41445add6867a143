//! `auditgate status`: what the daemon is doing, from its admin endpoint.

mod render;

use std::io::{self, IsTerminal as _, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use tokio::runtime::Runtime;

use super::config_file::ConfigFile;
use super::exit::Failure;
use crate::config::{AdminAddress, Secrets};
use crate::escape::escape_json;
use crate::net::PlainAddress;
use crate::observe::health::Problem;
use crate::observe::status::StatusReport;
use crate::secret::Secret;

/// Shows what the daemon is doing: whether it is ready and why not, its sources and sinks.
///
/// The address and the token of the admin endpoint come from the configuration, or from --admin and
/// --token-file. Exit code 0 when the daemon is ready, 1 when it is not, 74 when it cannot be
/// reached.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The admin endpoint, http://HOST:PORT or unix:///PATH, instead of the configuration's
    #[arg(long, value_name = "URL", value_parser = PlainAddress::parse, conflicts_with = "config")]
    pub admin: Option<PlainAddress>,

    /// A file with the token of the admin endpoint, instead of the configuration's
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    #[command(flatten)]
    pub config: ConfigFile,

    /// Show it again every 2 s, until Ctrl-C
    #[arg(long, short)]
    pub watch: bool,

    /// Print the report as JSON, on one line
    #[arg(long)]
    pub json: bool,
}

/// Time between two reports of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// Timeout of a request.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum size of a report, in bytes: enough for thousands of sources and their charts.
const REPORT_LIMIT: usize = 64 << 20;

/// Prints the report to `out`, with `--watch` until it cannot be written.
///
/// # Errors
/// 1 when the daemon is not ready; 74 when it cannot be reached or `out` cannot be written; 78 for
/// the configuration.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let endpoint = Endpoint::of(args)?;
    if args.watch {
        return watch(&endpoint, args.json, out);
    }
    let answer = endpoint.ask()?;
    print(out, &answer.text(args.json))?;
    verdict(&answer.report)
}

/// Prints reports until `out` cannot be written: a daemon that cannot be reached may be about
/// to start again.
fn watch(endpoint: &Endpoint, is_json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let is_screen = !is_json && io::stdout().is_terminal();
    let mut is_first = true;
    loop {
        let text = match endpoint.ask() {
            Ok(answer) => answer.text(is_json),
            Err(failure) if is_json => return Err(failure),
            Err(failure) => render::lines(&failure.message),
        };
        let frame = match is_screen {
            true => render::screen(&text, screen_rows(), is_first),
            false if is_first || is_json => text,
            false => format!("\n{text}"),
        };
        print(out, &frame)?;
        is_first = false;
        std::thread::sleep(WATCH_INTERVAL);
    }
}

/// Returns the number of lines of the terminal.
fn screen_rows() -> usize {
    rustix::termios::tcgetwinsize(io::stdout()).ok().map_or(0, |size| size.ws_row.into())
}

fn print(out: &mut dyn Write, text: &str) -> Result<(), Failure> {
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Failure::io(format!("cannot write to standard output: {error}")))
}

fn verdict(report: &StatusReport) -> Result<(), Failure> {
    if report.ready {
        return Ok(());
    }
    let problems: Vec<_> = report.problems.iter().map(Problem::to_string).collect();
    Err(Failure::finding(format!("the daemon is not ready: {}", problems.join("; "))))
}

/// A report, as it was received and parsed.
struct Answer {
    json: String,
    report: StatusReport,
}

impl Answer {
    /// Returns the text to print.
    fn text(&self, is_json: bool) -> String {
        if is_json {
            format!("{}\n", escape_json(self.json.trim_end()))
        } else {
            render::report(&self.report)
        }
    }
}

/// The admin endpoint of a daemon.
struct Endpoint {
    address: PlainAddress,
    token: Option<Secret>,
    runtime: Runtime,
}

impl Endpoint {
    fn of(args: &Args) -> Result<Self, Failure> {
        let token = args.token_file.as_deref().map(Secret::from_file).transpose().map_err(Failure::io)?;
        let (address, configured) = match &args.admin {
            Some(address) => (address.clone(), None),
            None => configured(args, token.is_none())?,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Failure::io(format!("cannot start the network: {error}")))?;
        Ok(Self { address, token: token.or(configured), runtime })
    }

    fn ask(&self) -> Result<Answer, Failure> {
        let Self { address, token, runtime } = self;
        let token = token.as_ref().map(Secret::expose);
        let fetched =
            runtime.block_on(address.get("/status", token, REPORT_LIMIT, TIMEOUT)).map_err(|error| {
                Failure::io(format!("{error}; is the daemon running? systemctl status auditgate"))
            })?;
        let hint = match fetched.status {
            200 => {
                let json = String::from_utf8_lossy(&fetched.body).into_owned();
                let report = serde_json::from_str(&json).map_err(|error| {
                    Failure::io(format!(
                        "the answer of {address} is not a report of this version: {error}; use the auditgate of the \
                         daemon's version, or correct the address"
                    ))
                })?;
                return Ok(Answer { json, report });
            }
            401 if token.is_some() => "the token is not the daemon's; name the right one with --token-file",
            401 => "it needs the admin token; name its file with --token-file",
            421 => "without a token it answers to an IP address or localhost only; use one of these",
            404 => "it has no /status; restart the daemon after its upgrade, or correct the address",
            _ => "is that the admin endpoint of auditgate?",
        };
        Err(Failure::io(format!("{address} answered with status {}: {hint}", fetched.status)))
    }
}

/// Returns the address and the token of the configuration.
fn configured(args: &Args, needs_token: bool) -> Result<(PlainAddress, Option<Secret>), Failure> {
    // The secrets of the sources are not needed, and may not be readable for this user.
    let admin = args.config.load(Secrets::SkipMissing)?.admin;
    let file = args.config.config.display();
    if needs_token && admin.token.as_ref().is_some_and(|token| token.expose().is_empty()) {
        return Err(Failure::io(format!(
            "cannot read the admin token that {file} names; run this as a user that can, such as root, or name a \
             copy with --token-file"
        )));
    }
    let address = match admin.address {
        AdminAddress::Unix(path) => PlainAddress::Unix(path),
        AdminAddress::Tcp(address) if address.port() == 0 => {
            return Err(Failure::usage(format!(
                "{file} lets the system choose the port of admin.address; give the one in the daemon's log \
                 (admin-listening) with --admin"
            )));
        }
        AdminAddress::Tcp(address) => {
            PlainAddress::parse(&format!("http://{}", reachable(address))).map_err(Failure::bug)?
        }
    };
    Ok((address, admin.token))
}

/// Returns an address at which this machine reaches a listener: loopback for one on all addresses.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        });
    }
    address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_all_addresses_is_reached_over_loopback() {
        for (listens, reached) in [
            ("0.0.0.0:9464", "127.0.0.1:9464"),
            ("[::]:9464", "[::1]:9464"),
            ("192.0.2.1:9464", "192.0.2.1:9464"),
        ] {
            assert_eq!(reachable(listens.parse().unwrap()).to_string(), reached);
        }
    }

    #[test]
    fn what_is_not_ready_is_a_finding_with_its_reasons() {
        let problem = Problem { condition: "ledger".into(), problem: "the disk is full".into() };
        let report = StatusReport { problems: vec![problem], ..StatusReport::default() };
        let failure = verdict(&report).unwrap_err();
        assert_eq!(failure.exit, crate::cli::exit::Exit::Finding);
        assert_eq!(failure.message, "the daemon is not ready: ledger: the disk is full");
        assert!(verdict(&StatusReport { ready: true, ..StatusReport::default() }).is_ok());
    }
}
