//! The files that the demo makes.

use std::fs;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use super::super::exit::Failure;
use super::super::test_ca;

/// Makes a certificate authority for a directory, and a server certificate from it for loopback;
/// both last a year.
pub(super) fn certificates(dir: &Path) -> Result<(), Failure> {
    let made = test_ca::make(&["localhost", "127.0.0.1"]).map_err(Failure::bug)?;
    for (name, text) in [("ca.pem", made.authority), ("cert.pem", made.chain)] {
        let path = dir.join(name);
        fs::write(&path, text).map_err(failed("write", &path))?;
    }
    write_private(&dir.join("key.pem"), &made.key)
}

pub(super) fn configuration(port: u16, admin: u16) -> String {
    format!(
        r#"# Written by `auditgate demo`.
data_dir = "data"

[listen]
address = "127.0.0.1:{port}"
tls = {{ cert = "cert.pem", key = "key.pem" }}

[admin]
address = "127.0.0.1:{admin}"

[sources.demo]
path = "/konnect/demo"
authorization = {{ file = "token" }}
jwks = {{ file = "jwks.json" }}

[sinks.verified]
type = "file"
path = "verified.log"
format = "raw"

[sinks.search]
type = "sqlite"
stream = ["verified", "quarantine"]
path = "events.db"

[sinks.rejects]
type = "file"
stream = "quarantine"
path = "quarantine.jsonl"
format = "json"
"#
    )
}

/// Returns a port of loopback that is free at this moment.
pub(super) fn free_port() -> Result<u16, Failure> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|socket| socket.local_addr())
        .map(|address| address.port())
        .map_err(|error| Failure::io(format!("cannot find a free port: {error}")))
}

pub(super) fn write_private(path: &Path, text: &str) -> Result<(), Failure> {
    let mut options = fs::File::options();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path).and_then(|mut file| file.write_all(text.as_bytes())).map_err(failed("write", path))
}

pub(super) fn failed<'a>(what: &'a str, path: &'a Path) -> impl Fn(io::Error) -> Failure + 'a {
    move |error| Failure::io(format!("cannot {what} {}: {error}", path.display()))
}
