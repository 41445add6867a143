//! Socket files: made with a mode, replaced when they are stale, and removed at the end.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Number of connections that wait to be accepted.
const QUEUE: i32 = 128;

/// A socket's file, which is removed when this is dropped.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            let path = self.0.display();
            tracing::warn!(
                code = "socket-not-removed",
                %path,
                "cannot remove the socket file {path}: {error}; the next start replaces it"
            );
        }
    }
}

/// Creates a socket file and its non-blocking socket, which listens if it is of the type `STREAM`. A
/// file without a listening process, as after `kill -9`, is replaced; anything else that is there is
/// left alone.
///
/// # Errors
/// When it cannot be created; the text says what to do.
pub fn bind(path: &Path, kind: SocketType, mode: u32) -> io::Result<(OwnedFd, SocketFile)> {
    let failure = |what: String| io::Error::other(what);
    let socket = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            let what = "a file that is not a socket exists there; remove it or choose another path";
            return Err(failure(what.to_owned()));
        }
        Ok(_) => match rustix::net::connect(socket()?, &SocketAddrUnix::new(path)?) {
            Err(rustix::io::Errno::CONNREFUSED) => {
                std::fs::remove_file(path)
                    .map_err(|error| failure(format!("the old socket stays: {error}")))?;
            }
            // A queue that is full (EAGAIN) has a listening process, too.
            Ok(()) => {
                let what = "another process listens there; stop it or choose another path";
                return Err(failure(what.to_owned()));
            }
            Err(error) => return Err(failure(format!("another process may listen there: {error}"))),
        },
    }
    let make = || {
        let socket = socket()?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        let file = SocketFile(path.to_owned());
        // No client can connect to a stream socket before listen(2), so the umask never applies.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        if kind == SocketType::STREAM {
            rustix::net::listen(&socket, QUEUE)?;
        }
        Ok((socket, file))
    };
    make().map_err(|error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => {
            failure("its directory is missing; make it, or let the unit have RuntimeDirectory=".to_owned())
        }
        _ => error,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    const MODE: u32 = 0o660;

    #[test]
    fn a_stale_socket_file_is_replaced_and_any_other_file_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("admin.sock");
        for kind in [SocketType::STREAM, SocketType::DGRAM] {
            let message = || bind(&path, kind, MODE).err().unwrap().to_string();
            std::fs::write(&path, "mine").unwrap();
            assert!(message().contains("is not a socket"));
            assert_eq!(std::fs::read(&path).unwrap(), b"mine");
            std::fs::remove_file(&path).unwrap();

            // Closed without removing its file, as by a killed process.
            let connect = |path: &Path| match kind {
                SocketType::STREAM => UnixStream::connect(path).map(drop),
                _ => UnixDatagram::unbound().and_then(|socket| socket.connect(path)),
            };
            match kind {
                SocketType::STREAM => drop(UnixListener::bind(&path).unwrap()),
                _ => drop(UnixDatagram::bind(&path).unwrap()),
            }
            let (socket, file) = bind(&path, kind, MODE).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, MODE);
            connect(&path).unwrap();
            assert!(message().contains("another process listens there"));
            connect(&path).unwrap();
            drop(socket);
            drop(file);
            assert!(!path.exists());
        }
        let nowhere = directory.path().join("missing/admin.sock");
        let error = bind(&nowhere, SocketType::STREAM, MODE).err().unwrap();
        assert!(error.to_string().contains("its directory is missing"));
    }
}
