//! Checks of ports and of what is reached over the network.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use tokio::task::JoinSet;

use super::Finding;
use crate::config::{AdminAddress, Config, SinkKind};
use crate::deliver::syslog::SyslogSink;
use crate::trust::keyring::KeyRing;

/// Time for one key set.
const KEYS_TIMEOUT: Duration = Duration::from_secs(10);

/// Checks that the ports are free, unless the daemon that runs has them.
pub(super) fn ports(config: &Config, is_running: bool) -> Vec<Finding> {
    let admin = match config.admin.address {
        AdminAddress::Tcp(address) => Some(("admin.address", address)),
        AdminAddress::Unix(_) => None,
    };
    let ports = std::iter::once(("listen.address", config.listen.address)).chain(admin);
    ports.filter_map(|(subject, address)| port(subject, address, is_running)).collect()
}

fn port(subject: &str, address: SocketAddr, is_running: bool) -> Option<Finding> {
    let error = TcpListener::bind(address).err()?;
    let number = address.port();
    match error.kind() {
        io::ErrorKind::AddrInUse if is_running => None,
        io::ErrorKind::AddrInUse => Some(Finding::fatal(
            subject,
            format!(
                "{address} is in use; find by whom with `ss -ltnp 'sport = :{number}'` (by systemd is right where \
                 auditgate.socket is enabled), or choose another port"
            ),
        )),
        io::ErrorKind::PermissionDenied => Some(Finding::fatal(
            subject,
            format!(
                "this user may not listen on {address}; enable auditgate.socket, give the unit \
                 CAP_NET_BIND_SERVICE, or choose a port from 1024 on"
            ),
        )),
        io::ErrorKind::AddrNotAvailable => Some(Finding::fatal(
            subject,
            format!("no interface of this machine has the address {}; correct it", address.ip()),
        )),
        _ => Some(Finding::fatal(subject, format!("cannot listen on {address}: {error}"))),
    }
}

/// Asks for every key set.
pub(super) async fn keys(config: &Config) -> Vec<Finding> {
    let mut asked = JoinSet::new();
    for (name, source) in &config.sources {
        let Some(jwks) = source.jwks.clone() else { continue };
        let subject = format!("source `{name}`");
        let ring = KeyRing::new(name, jwks, &config.data_dir, |_| {}).map_err(|error| error.to_string());
        asked.spawn(async move {
            let probed = match ring {
                Ok((_, fetcher)) => fetcher.probe(KEYS_TIMEOUT).await.map_err(|error| error.to_string()),
                Err(error) => Err(error),
            };
            let mut found = Vec::new();
            match probed {
                Err(error) => found.push(Finding::error(subject, error)),
                Ok(probe) => {
                    let unused = |key: String| {
                        Finding::warning(&subject, format!("the JWKS document's {key}; it is not used"))
                    };
                    found.extend(probe.ignored.into_iter().map(unused));
                    if probe.keys == 0 {
                        found.push(Finding::error(
                            &subject,
                            "its key set has no usable key: nothing can be verified",
                        ));
                    }
                    if let Some(seconds) = probe.clock_off {
                        let direction = if seconds > 0 { "ahead of" } else { "behind" };
                        let seconds = seconds.abs();
                        found.push(Finding::warning(
                            "clock",
                            format!("{seconds} s {direction} that of the key server; set it (timedatectl)"),
                        ));
                    }
                }
            }
            found
        });
    }
    collect(asked).await
}

/// Connects to every syslog server.
pub(super) async fn syslog_servers(config: &Config) -> Vec<Finding> {
    let mut asked = JoinSet::new();
    for (name, sink) in &config.sinks {
        let SinkKind::Syslog(options) = &sink.kind else { continue };
        let (subject, options) = (format!("sink `{name}`"), options.clone());
        asked.spawn_blocking(move || {
            let reached =
                SyslogSink::new(options).map_err(|error| Finding::error(&subject, error.to_string()));
            // Its events wait in the ledger until it can be reached.
            let reached = reached
                .and_then(|sink| sink.reach().map_err(|error| Finding::warning(&subject, error.to_string())));
            reached.err().into_iter().collect()
        });
    }
    collect(asked).await
}

async fn collect(mut asked: JoinSet<Vec<Finding>>) -> Vec<Finding> {
    let mut found = Vec::new();
    while let Some(findings) = asked.join_next().await {
        found.extend(findings.unwrap_or_default());
    }
    found.sort_by(|one, other| one.subject.cmp(&other.subject));
    found
}
