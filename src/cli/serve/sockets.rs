//! The sockets that the daemon listens on: those that systemd opened for it (sd_listen_fds(3)), or
//! its own.
//!
//! An inherited socket outlives the daemon: connections that are made while it restarts wait in the
//! socket's queue. It is checked against the configuration, which stays the one place that says who
//! can reach what. We close our copy and nothing else; a Unix socket's file is removed only if we
//! created it.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use listenfd::ListenFd;
use rustix::net::{SocketType, sockopt};
use tokio::net::{TcpListener, TcpSocket, UnixListener};

use crate::cli::exit::Failure;
use crate::config::AdminAddress;
use crate::net::unix_socket::{self, SocketFile};
use crate::observe::admin;

/// Name of the senders' socket, `FileDescriptorName=` in its unit (systemd.socket(5)).
const LISTEN: &str = "listen";
/// Name of the admin endpoint's socket.
const ADMIN: &str = "admin";

/// Mode of the admin endpoint's socket file: the daemon's user and group may connect.
const ADMIN_MODE: u32 = 0o660;

/// Sockets that were passed to this process; none without socket activation.
#[derive(Default)]
pub(in crate::cli) struct Inherited {
    listen: Option<std::net::TcpListener>,
    admin: Option<AdminSocket>,
}

enum AdminSocket {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

/// The admin endpoint's socket, with the socket file if it was created here.
pub(super) struct Admin {
    pub(super) socket: admin::Socket,
    pub(super) file: Option<SocketFile>,
}

impl Inherited {
    /// Takes the sockets, and removes the variables that name them from the environment. Must be
    /// called once, before there is a second thread.
    ///
    /// # Errors
    /// 78 for a socket that cannot be used: it has another name, comes twice, or is not a listening
    /// stream.
    pub(super) fn from_environment() -> Result<Self, Failure> {
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut passed = ListenFd::from_env();
        let mut names = names.split(':');
        let mut inherited = Self::default();
        for index in 0..passed.len() {
            let name = names.next().unwrap_or_default();
            let unusable = |error: io::Error| {
                Failure::config(format!(
                    "the inherited socket `{name}` cannot be used: {error}; pass a stream socket that listens"
                ))
            };
            let is_second = match purpose(name)? {
                LISTEN => {
                    let socket = passed.take_tcp_listener(index).map_err(unusable)?;
                    let socket = socket.map(listening).transpose().map_err(unusable)?;
                    std::mem::replace(&mut inherited.listen, socket).is_some()
                }
                _ => {
                    let unix = passed.take_unix_listener(index).ok().flatten();
                    let socket = match unix {
                        Some(socket) => Some(AdminSocket::Unix(listening(socket).map_err(unusable)?)),
                        None => {
                            let socket = passed.take_tcp_listener(index).map_err(unusable)?;
                            socket.map(listening).transpose().map_err(unusable)?.map(AdminSocket::Tcp)
                        }
                    };
                    std::mem::replace(&mut inherited.admin, socket).is_some()
                }
            };
            if is_second {
                return Err(Failure::config(format!(
                    "two sockets were passed for [{}]; let the socket unit have one ListenStream=, such as \
                     [::]:8443 for IPv4 and IPv6",
                    purpose(name)?
                )));
            }
        }
        Ok(inherited)
    }

    /// Returns the socket for senders: the inherited one, or a new one.
    ///
    /// # Errors
    /// 78 when the inherited one has another address than `listen.address`, 74 when none can be
    /// opened.
    pub(super) async fn listen(&mut self, wanted: SocketAddr) -> Result<TcpListener, Failure> {
        const KEY: &str = "listen.address";
        match self.listen.take() {
            Some(socket) => adopt_tcp(socket, wanted, KEY),
            None => bind_tcp(wanted, KEY),
        }
    }

    /// Returns the socket for the admin endpoint: the inherited one, or a new one. A stale socket
    /// file is replaced.
    ///
    /// # Errors
    /// 78 when the inherited one has another address than `admin.address`, 74 when none can be
    /// opened or another process listens at the path.
    pub(super) async fn admin(&mut self, wanted: &AdminAddress) -> Result<Admin, Failure> {
        const KEY: &str = "admin.address";
        let (socket, file) = match (self.admin.take(), wanted) {
            (None, AdminAddress::Tcp(address)) => (admin::Socket::Tcp(bind_tcp(*address, KEY)?), None),
            (None, AdminAddress::Unix(path)) => {
                let (socket, file) = bind_unix(path)?;
                (admin::Socket::Unix(socket), Some(file))
            }
            (Some(AdminSocket::Tcp(socket)), AdminAddress::Tcp(address)) => {
                (admin::Socket::Tcp(adopt_tcp(socket, *address, KEY)?), None)
            }
            (Some(AdminSocket::Unix(socket)), AdminAddress::Unix(path)) => {
                (admin::Socket::Unix(adopt_unix(socket, path)?), None)
            }
            (Some(AdminSocket::Tcp(socket)), AdminAddress::Unix(_)) => {
                let address = socket.local_addr().map_err(|error| unusable(KEY, &error))?;
                return Err(differs(KEY, wanted, address));
            }
            (Some(AdminSocket::Unix(socket)), AdminAddress::Tcp(_)) => {
                let path = path_of(&socket).map_err(|error| unusable(KEY, &error))?;
                return Err(differs(KEY, wanted, AdminAddress::Unix(path)));
            }
        };
        Ok(Admin { socket, file })
    }
}

/// Returns the table of the configuration that a socket belongs to, by the socket's name. A socket
/// unit that sets no name passes its own.
fn purpose(name: &str) -> Result<&'static str, Failure> {
    match name {
        ADMIN => Ok(ADMIN),
        LISTEN | "" | "unknown" => Ok(LISTEN),
        unit if unit.ends_with(".socket") => Ok(LISTEN),
        other => Err(Failure::config(format!(
            "a socket with the name `{other}` was passed; write FileDescriptorName=listen or \
             FileDescriptorName=admin in its unit"
        ))),
    }
}

/// Checks that listen(2) was called. Otherwise accept(2) would always fail.
fn listening<S: AsFd>(socket: S) -> io::Result<S> {
    if sockopt::socket_acceptconn(&socket)? {
        Ok(socket)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "it does not listen"))
    }
}

fn adopt_tcp(
    socket: std::net::TcpListener,
    wanted: SocketAddr,
    key: &'static str,
) -> Result<TcpListener, Failure> {
    let address = socket.local_addr().map_err(|error| unusable(key, &error))?;
    if !fits(wanted, address) {
        return Err(differs(key, wanted, address));
    }
    socket.set_nonblocking(true).map_err(|error| unusable(key, &error))?;
    let socket = TcpListener::from_std(socket).map_err(|error| unusable(key, &error))?;
    tracing::info!(
        code = "socket-inherited",
        "the socket at {address} was inherited; it stays open when the daemon ends"
    );
    Ok(socket)
}

fn adopt_unix(socket: std::os::unix::net::UnixListener, wanted: &Path) -> Result<UnixListener, Failure> {
    const KEY: &str = "admin.address";
    let path = path_of(&socket).map_err(|error| unusable(KEY, &error))?;
    // Through symbolic links too, such as /var/run.
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if real(&path) != real(wanted) {
        let wanted = AdminAddress::Unix(wanted.to_owned());
        return Err(differs(KEY, wanted, AdminAddress::Unix(path)));
    }
    socket.set_nonblocking(true).map_err(|error| unusable(KEY, &error))?;
    UnixListener::from_std(socket).map_err(|error| unusable(KEY, &error))
}

fn path_of(socket: &std::os::unix::net::UnixListener) -> io::Result<PathBuf> {
    // A socket without a name has no path, which equals none that can be configured.
    Ok(socket.local_addr()?.as_pathname().unwrap_or(Path::new("")).to_owned())
}

/// Returns whether an address is the wanted one. Port 0 is any port; an IPv4-mapped IPv6 address is
/// the IPv4 address.
fn fits(wanted: SocketAddr, is: SocketAddr) -> bool {
    wanted.ip().to_canonical() == is.ip().to_canonical() && (wanted.port() == 0 || wanted.port() == is.port())
}

fn differs(key: &str, wanted: impl std::fmt::Display, is: impl std::fmt::Display) -> Failure {
    Failure::config(format!(
        "the inherited socket is {is}, but {key} is {wanted}; write the same address into the configuration and \
         into ListenStream= of the socket unit"
    ))
}

fn unusable(key: &str, error: &io::Error) -> Failure {
    Failure::io(format!("the inherited socket for {key} cannot be used: {error}"))
}

/// Number of connections that the kernel keeps until they are accepted, as far as
/// net.core.somaxconn lets it: a burst that does not fit makes others wait for a second, until they
/// try again.
const BACKLOG: u32 = 4096;

fn bind_tcp(address: SocketAddr, key: &str) -> Result<TcpListener, Failure> {
    let listen = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // After a restart there are connections to the address that the kernel still remembers.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listen().map_err(|error: io::Error| {
        let hint = match error.kind() {
            io::ErrorKind::AddrInUse => "; another process has the port: stop it or choose another",
            io::ErrorKind::PermissionDenied => {
                "; ports below 1024 need CAP_NET_BIND_SERVICE or a socket unit"
            }
            _ => "",
        };
        Failure::io(format!("cannot listen on {address} ({key}): {error}{hint}"))
    })
}

fn bind_unix(path: &Path) -> Result<(UnixListener, SocketFile), Failure> {
    let failure = |error: io::Error| {
        Failure::io(format!("cannot listen on unix://{} (admin.address): {error}", path.display()))
    };
    let (socket, file) = unix_socket::bind(path, SocketType::STREAM, ADMIN_MODE).map_err(failure)?;
    Ok((UnixListener::from_std(socket.into()).map_err(failure)?, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_purpose_of_a_socket_follows_from_its_name() {
        for name in ["listen", "", "unknown", "auditgate.socket"] {
            assert_eq!(purpose(name).unwrap(), LISTEN);
        }
        assert_eq!(purpose("admin").unwrap(), ADMIN);
        assert!(purpose("metrics").unwrap_err().message.contains("`metrics`"));
    }

    #[test]
    fn an_inherited_socket_must_have_the_configured_address() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        for (wanted, is, expected) in [
            ("127.0.0.1:8443", "127.0.0.1:8443", true),
            ("127.0.0.1:0", "127.0.0.1:8443", true),
            ("127.0.0.1:8443", "[::ffff:127.0.0.1]:8443", true),
            ("127.0.0.1:8443", "127.0.0.1:8444", false),
            ("127.0.0.1:8443", "0.0.0.0:8443", false),
            ("0.0.0.0:8443", "[::]:8443", false),
        ] {
            assert_eq!(fits(address(wanted), address(is)), expected, "{wanted} {is}");
        }
    }
}
