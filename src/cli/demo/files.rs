//! The files that the demo makes.

use std::fs;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use super::super::exit::Failure;

/// Makes a certificate authority for a directory, and a server certificate from it for loopback;
/// both last a year.
pub(super) fn certificates(dir: &Path) -> Result<(), Failure> {
    let made = || -> Result<(String, String, String), rcgen::Error> {
        let year = time::OffsetDateTime::now_utc() + time::Duration::days(365);
        let mut authority = rcgen::CertificateParams::default();
        authority.distinguished_name.push(rcgen::DnType::CommonName, "auditgate demo CA");
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        authority.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
        authority.not_after = year;
        let authority_key = rcgen::KeyPair::generate()?;
        let authority_certificate = authority.self_signed(&authority_key)?;
        let issuer = rcgen::Issuer::new(authority, authority_key);
        let names = ["localhost".to_owned(), Ipv4Addr::LOCALHOST.to_string()];
        let mut server = rcgen::CertificateParams::new(names)?;
        server.distinguished_name.push(rcgen::DnType::CommonName, "localhost");
        server.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        server.not_after = year;
        let server_key = rcgen::KeyPair::generate()?;
        let server_certificate = server.signed_by(&server_key, &issuer)?;
        let authority = authority_certificate.pem();
        // The server's first, then its issuer's.
        let chain = format!("{}{authority}", server_certificate.pem());
        Ok((authority, chain, server_key.serialize_pem()))
    };
    let (authority, certificate, key) = made().map_err(Failure::bug)?;
    for (name, text) in [("ca.pem", authority), ("cert.pem", certificate)] {
        let path = dir.join(name);
        fs::write(&path, text).map_err(failed("write", &path))?;
    }
    write_private(&dir.join("key.pem"), &key)
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
