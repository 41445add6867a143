//! `auditgate mock-konnect`: Konnect's audit-log API on loopback.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use super::exit::Failure;
use crate::clock::Clock;
use crate::escape::escape;
use crate::mock::{self, Options};
use crate::net::client_tls;
use crate::send::{Retry, SigningKey};

/// Serves Konnect's audit-log API on loopback, for tests and training.
///
/// Destinations, the webhook with its status, replay jobs and the key set are as Konnect documents
/// them. Sample events are generated, signed, and delivered to the webhook by Konnect's rules; those
/// of the last 7 days can be replayed. Everything is in memory and ends with the process. One line
/// is printed for each batch.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The address to listen on, loopback only; with port 0 the system chooses one
    #[arg(long, value_name = "ADDRESS", value_parser = loopback, default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,

    /// The bearer token that a request needs
    #[arg(long, value_name = "TOKEN", default_value = "kpat_mock")]
    pub token: String,

    /// A Dev Portal with an audit log of its own; can be repeated
    #[arg(long = "portal", value_name = "ID")]
    pub portals: Vec<String>,

    /// The first signing key, as `auditgate keygen` writes it [default: a new one]
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,

    /// A PEM file with the certificate authorities of the webhook's receivers [default: the system's]
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,

    /// How many events are generated a second; with 0 only those that POST /mock/events asks for
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=100_000), default_value_t = 1)]
    pub rate: u32,

    /// How long a batch waits before its first retry; each further time is twice as long
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "1s")]
    pub retry_min: Duration,

    /// How long a batch waits before a retry at most; a receiver's Retry-After may be longer
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "30s")]
    pub retry_max: Duration,

    /// How long one post may take
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "30s")]
    pub timeout: Duration,

    /// Deliver nothing after a lost batch until the webhook is enabled again
    #[arg(long)]
    pub stay_inactive: bool,
}

fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text.parse().map_err(|_| "write an address and a port, such as 127.0.0.1:0")?;
    match address.ip().is_loopback() {
        true => Ok(address),
        false => Err("it is not a loopback address, and this server is for this machine only".to_owned()),
    }
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// The key or the authorities cannot be read (78); the address or standard output cannot be used
/// (74).
pub fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let key = match &args.key {
        Some(path) => SigningKey::read(path).map_err(Failure::config)?,
        None => mock::new_key(),
    };
    if let Some(ca) = &args.ca {
        client_tls(Some(ca)).map_err(Failure::config)?;
    }
    let (messages, lines) = mpsc::unbounded_channel();
    let options = Options {
        token: args.token.clone(),
        portals: args.portals.clone(),
        key,
        ca: args.ca.clone(),
        rate: args.rate,
        retry: Retry { minimum: args.retry_min, maximum: args.retry_max, ..Retry::default() },
        timeout: args.timeout,
        stays_inactive: args.stay_inactive,
        clock: Clock::system(),
        messages,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::io(format!("cannot start threads: {error}")))?;
    runtime.block_on(serve(args, options, lines, out))
}

async fn serve(
    args: &Args,
    options: Options,
    mut lines: mpsc::UnboundedReceiver<String>,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let unusable = |error| Failure::io(format!("cannot listen on {}: {error}", args.listen));
    let socket = TcpListener::bind(args.listen).await.map_err(unusable)?;
    let address = socket.local_addr().map_err(unusable)?;
    let no_signals = |error| Failure::io(format!("signals cannot be received: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signals)?;
    let mut print = |line: &str| {
        let written = writeln!(out, "{}", escape(line)).and_then(|()| out.flush());
        written.map_err(|error| Failure::io(format!("cannot write to standard output: {error}")))
    };
    print(&format!("listening on http://{address}"))?;
    print(&format!("token: {}", args.token))?;
    print(&format!("keys: http://{address}/v2/audit-log-webhook/jwks.json"))?;
    let (stop, stopped) = watch::channel(false);
    let server = tokio::spawn(mock::serve(socket, options, stopped));
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            Some(line) = lines.recv() => print(&line)?,
        }
    }
    let _ = stop.send(true);
    server.await.map_err(Failure::bug)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_addresses_are_listened_on() {
        for address in ["127.0.0.1:0", "127.9.9.9:80", "[::1]:8080"] {
            assert!(loopback(address).is_ok(), "{address}");
        }
        for address in ["0.0.0.0:80", "192.0.2.1:80", "[::]:80", "127.0.0.1", "localhost:80"] {
            assert!(loopback(address).is_err(), "{address}");
        }
    }

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("missing.pem");
        for argument in ["--key", "--ca"] {
            let line = ["auditgate", argument, missing.to_str().unwrap()];
            let args = <TestArgs as clap::Parser>::parse_from(line).args;
            let failure = run(&args, &mut Vec::new()).unwrap_err();
            assert_eq!(failure.exit, super::super::exit::Exit::Config);
            assert!(failure.message.contains("missing.pem"), "{failure}");
        }
    }

    #[derive(clap::Parser)]
    struct TestArgs {
        #[command(flatten)]
        args: Args,
    }
}
