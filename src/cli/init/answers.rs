//! What `auditgate init` has to know, from the options or from answers on a terminal.

use std::io::{self, BufRead, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use rustls::pki_types::ServerName;

use super::Args;
use crate::cli::exit::Failure;
use crate::net::SyslogAddress;

/// A region of Konnect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum Region {
    Us,
    Eu,
    Au,
    Me,
    In,
    Sg,
}

impl Region {
    /// Returns the label in Konnect's host names.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Us => "us",
            Self::Eu => "eu",
            Self::Au => "au",
            Self::Me => "me",
            Self::In => "in",
            Self::Sg => "sg",
        }
    }
}

/// Origin of the listener's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Certificate {
    Own {
        cert: PathBuf,
        key: PathBuf,
    },
    /// One from an authority that is made with it.
    Test,
}

/// Everything that is to be written.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) host: String,
    pub(super) regions: Vec<Region>,
    pub(super) certificate: Certificate,
    pub(super) address: SocketAddr,
    pub(super) sqlite: bool,
    pub(super) syslog: Option<SyslogAddress>,
    pub(super) user: String,
    pub(super) dir: PathBuf,
    pub(super) data_dir: PathBuf,
    pub(super) log_dir: PathBuf,
}

impl Plan {
    /// Completes the options with answers, where somebody can be asked.
    ///
    /// # Errors
    /// 2 for what is missing or wrong, 74 when the terminal cannot be read.
    pub(super) fn complete(args: &Args, mut asked: Option<&mut dyn BufRead>) -> Result<Self, Failure> {
        let mut answer = |option: &str, question: &str, default: &str| match asked.as_deref_mut() {
            Some(terminal) => ask(terminal, question, default),
            None => Err(Failure::usage(format!("{option} is missing; without a terminal nothing is asked"))),
        };
        let host = match &args.host {
            Some(host) => host.clone(),
            None => answer("--host", "Host name that senders use", &host_name())?,
        };
        if ServerName::try_from(host.as_str()).is_err() {
            return Err(Failure::usage(format!(
                "`{host}` is not a host name or an IP address; write it without https:// and without a port"
            )));
        }
        let mut regions = args.region.clone();
        if regions.is_empty() {
            let text =
                answer("--region", "Konnect's regions, separated by commas (us, eu, au, me, in, sg)", "us")?;
            for word in text.split(',').map(str::trim) {
                let unknown = |_| Failure::usage(format!("`{word}` is not one of us, eu, au, me, in and sg"));
                regions.push(Region::from_str(word, true).map_err(unknown)?);
            }
        }
        regions.sort_unstable();
        regions.dedup();
        let certificate = match (&args.cert, &args.key) {
            (Some(cert), Some(key)) => own(cert, key)?,
            _ if args.test_ca => Certificate::Test,
            _ => {
                let question = "The certificate's PEM file (nothing for one from a test authority)";
                match answer("--cert and --key, or --test-ca", question, "")? {
                    cert if cert.is_empty() => Certificate::Test,
                    cert => own(Path::new(&cert), Path::new(&answer("--key", "Its key's PEM file", "")?))?,
                }
            }
        };
        let absolute = |path: &Path| {
            std::path::absolute(path)
                .map_err(|error| Failure::io(format!("cannot find the current directory: {error}")))
        };
        Ok(Self {
            host,
            regions,
            certificate,
            address: args.address,
            sqlite: args.sqlite,
            syslog: args.syslog.clone(),
            user: args.user.clone(),
            dir: absolute(&args.dir)?,
            data_dir: absolute(&args.data_dir)?,
            log_dir: absolute(&args.log_dir)?,
        })
    }

    /// Returns the URL that a source's events are posted to.
    pub(super) fn url(&self, path: &str) -> String {
        let host = match self.host.parse::<IpAddr>() {
            Ok(IpAddr::V6(address)) => format!("[{address}]"),
            _ => self.host.clone(),
        };
        format!("https://{host}:{}{path}", self.address.port())
    }
}

fn own(cert: &Path, key: &Path) -> Result<Certificate, Failure> {
    let found = |path: &Path| {
        path.canonicalize()
            .map_err(|error| Failure::usage(format!("cannot find {}: {error}", path.display())))
    };
    Ok(Certificate::Own { cert: found(cert)?, key: found(key)? })
}

/// Asks on the terminal. An empty answer is the default.
fn ask(terminal: &mut dyn BufRead, question: &str, default: &str) -> Result<String, Failure> {
    let unreadable = |error: io::Error| Failure::io(format!("cannot read the answer: {error}"));
    let shown = if default.is_empty() { String::new() } else { format!(" [{default}]") };
    let mut stderr = io::stderr();
    write!(stderr, "{question}{shown}: ").and_then(|()| stderr.flush()).map_err(unreadable)?;
    let mut answer = String::new();
    terminal.read_line(&mut answer).map_err(unreadable)?;
    let answer = answer.trim();
    Ok(if answer.is_empty() { default } else { answer }.to_owned())
}

/// Returns the name of this machine.
fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
