//! What `auditgate send` says when it cannot do its work: one sentence with what, where and what to
//! do, and the exit code. The table of docs/send-errors.md.

use std::fs;
use std::net::TcpListener;
use std::process::{Command, Stdio};

use crate::harness::daemon::Daemon;
use crate::harness::machine::ReservedPort;
use crate::harness::programs::{self, auditgate};
use crate::harness::site::{PATH, Site, TOKEN, expire_certificate, raw_and_json_sinks};

/// Text of docs/send-errors.md, which has each sentence.
const PAGE: &str = include_str!("../../docs/send-errors.md");

const EVENT: &str = "{\"name\":\"Ingress\",\"n\":1}\n";

/// A receiver and what a sender to it needs.
struct Case<'s> {
    site: &'s Site,
    url: String,
}

impl Case<'_> {
    fn command(&self) -> Command {
        let mut command = auditgate();
        command.arg("send").env("AUDITGATE_AUTHORIZATION", TOKEN).stdin(Stdio::null());
        command
    }

    /// Runs a command with these arguments, where `URL`, `DIR` and `KEY` stand for the receiver, the
    /// site and the key. It must end with that code and say that; `what` is in the page's table.
    #[track_caller]
    fn fails(&self, what: &str, arguments: &str, code: i32, says: &[&str]) {
        let dir = self.site.path("").display().to_string();
        let key = self.site.path("keys/signing-key.pem").display().to_string();
        let arguments = arguments.replace("URL", &self.url).replace("DIR/", &dir).replace("KEY", &key);
        let output = self.command().args(arguments.split(' ')).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{what}: {output:?}");
        for words in says {
            assert!(said.contains(words), "{what}: {said}");
        }
        for debug in ["Os {", "Error(", "Custom {", "Some("] {
            assert!(!said.contains(debug), "{what}: {said}");
        }
        let row = PAGE.lines().find(|line| line.starts_with(&format!("| {what} |")));
        let row = row.unwrap_or_else(|| panic!("`{what}` is not in docs/send-errors.md"));
        assert!(row.ends_with(&format!("| {code} |")), "{row}");
    }
}

#[test]
fn every_error_is_one_sentence_with_what_to_do() {
    let site = Site::new().sinks(&raw_and_json_sinks());
    programs::run(auditgate().arg("keygen").arg("--dir").arg(site.path("keys")));
    // The receiver trusts another key.
    programs::run(auditgate().arg("keygen").arg("--dir").arg(site.path("other")));
    fs::copy(site.path("other/jwks.json"), site.path("jwks.json")).unwrap();
    site.write("in.log", EVENT);
    site.write("bad.log", format!("not an event\n{EVENT}"));
    site.write("nokey.pem", "-----BEGIN PUBLIC KEY-----\n");
    site.write("encrypted.pem", "-----BEGIN ENCRYPTED PRIVATE KEY-----\n");
    let expired = Site::new();
    expire_certificate(&expired.path(""));
    let expired_daemon = Daemon::start(&expired);
    let other = Site::new();
    fs::copy(other.path("ca.pem"), site.path("other-ca.pem")).unwrap();
    let daemon = Daemon::start(&site);
    let url = format!("https://localhost:{}{PATH}", daemon.address.port());
    let plain = TcpListener::bind("127.0.0.1:0").unwrap();
    let no_tls = format!("https://localhost:{}/x", plain.local_addr().unwrap().port());
    std::thread::spawn(move || {
        for stream in plain.incoming() {
            use std::io::Write as _;
            let _ = stream.unwrap().write_all(b"220 mail.example.com ESMTP\r\n");
        }
    });
    let unused = ReservedPort::new();
    let refusing = format!("https://localhost:{}/x", unused.number());
    let case = Case { site: &site, url };
    let good = "--ca DIR/ca.pem --key KEY DIR/in.log";
    let one = |url: &str, rest: &str| format!("--to {url} {rest}");

    case.fails(
        "no key",
        "--to URL --ca DIR/ca.pem DIR/in.log",
        2,
        &["there is no key to sign with: add --key"],
    );
    case.fails(
        "key file missing",
        "--to URL --ca DIR/ca.pem --key DIR/none.pem DIR/in.log",
        78,
        &["cannot read the signing key", "none.pem"],
    );
    case.fails(
        "not a private key",
        "--to URL --ca DIR/ca.pem --key DIR/nokey.pem DIR/in.log",
        78,
        &["nokey.pem holds a public key", "as `auditgate keygen` writes it"],
    );
    case.fails(
        "encrypted key",
        "--to URL --ca DIR/ca.pem --key DIR/encrypted.pem DIR/in.log",
        78,
        &["encrypted.pem holds an encrypted key", "as `auditgate keygen` writes it"],
    );
    case.fails("not a URL", &one("audit.example.com", good), 2, &["--to: ", "https://"]);
    case.fails("plain http to another host", &one("http://192.0.2.1/x", good), 2, &["use https"]);
    case.fails(
        "input missing",
        "--to URL --ca DIR/ca.pem --key KEY DIR/none.log",
        74,
        &["cannot read", "none.log"],
    );
    case.fails("CA file missing", "--to URL --ca DIR/none.pem --key KEY DIR/in.log", 78, &["none.pem"]);
    case.fails(
        "unknown authority",
        "--to URL --ca DIR/other-ca.pem --key KEY DIR/in.log",
        1,
        &["is not trusted: no trusted authority"],
    );
    case.fails(
        "pinned key differs",
        &one("URL", &format!("--pin sha256//47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU= {good}")),
        1,
        &["is not trusted: its public key sha256//", "is not one of the pinned ones"],
    );
    case.fails(
        "wrong host name",
        &one(&case.url.replace("localhost", "[::ffff:127.0.0.1]"), good),
        1,
        &["is not trusted: it is not valid for "],
    );
    case.fails(
        "expired certificate",
        &one(
            &format!("https://localhost:{}{PATH}", expired_daemon.address.port()),
            &good.replace("DIR/ca.pem", &expired.path("ca.pem").display().to_string()),
        ),
        1,
        &["is not trusted: it has expired"],
    );
    case.fails("wrong path", &one("URL/elsewhere", good), 1, &["answered 404", "check the path of the URL"]);
    case.fails(
        "wrong token",
        &one("URL", &format!("--authorization wrong {good}")),
        1,
        &["answered 401", "check the authorization"],
    );
    case.fails(
        "receiver is down",
        &one(&refusing, &format!("--retries 0 {good}")),
        1,
        &["cannot connect to localhost", "refused"],
    );
    case.fails(
        "name does not resolve",
        &one("https://no-such-host.invalid/x", &format!("--retries 0 {good}")),
        1,
        &["cannot connect to no-such-host.invalid"],
    );
    case.fails(
        "server without TLS",
        &one(&no_tls, &format!("--retries 0 {good}")),
        1,
        &["cannot connect to localhost"],
    );
    case.fails(
        "bad input line",
        "--to URL --ca DIR/ca.pem --key KEY DIR/bad.log",
        1,
        &[
            "bad.log, line 1: cannot be sent: neither a JSON object nor a CEF header",
            "1 input line could not be sent",
        ],
    );
    case.fails(
        "quarantined, with --strict",
        &one("URL", &format!("--strict {good}")),
        1,
        &["1 of 1 line quarantined", "auditgate quarantine list"],
    );
    case.fails("--follow without --spool", &one("URL", &format!("--follow {good}")), 2, &["--spool"]);

    // With a spool.
    case.fails(
        "wrong path, with a spool",
        &one("URL/elsewhere", &format!("--spool DIR/spool {good}")),
        1,
        &["keeps 1 event for the next run", "answered 404", "check the path of the URL"],
    );
    case.fails("spool is no directory", &one("URL", &format!("--spool DIR/in.log {good}")), 78, &["in.log"]);
    let config = format!(
        "data_dir = \"held\"\n[receiver]\nurl = \"{refusing}\"\n[signing]\nkeys = [{{ file = \"keys/signing-key.pem\" }}]\n[admin]\naddress = \
         \"127.0.0.1:0\"\n[inputs.app]\ntype = \"file\"\npath = \"in.log\"\n"
    );
    case.site.write("send.toml", &config);
    let mut service = case.command();
    let mut service =
        service.arg("--config").arg(case.site.path("send.toml")).stderr(Stdio::null()).spawn().unwrap();
    crate::harness::wait_until("the service is there", || {
        if case.site.path("held/ledger.db").exists() { Ok(()) } else { Err(String::new()) }
    });
    case.fails(
        "spool in use",
        &one("URL", &format!("--spool DIR/held {good}")),
        78,
        &["held is in use by another auditgate"],
    );
    service.kill().unwrap();
    service.wait().unwrap();
    case.site.write("send.toml", config.replace("path = \"in.log\"", "pth = \"in.log\""));
    case.fails(
        "mistake in the configuration",
        "--config DIR/send.toml",
        78,
        &["send.toml:10: unknown key `pth` in [inputs.app]; did you mean `path`?"],
    );
    case.site.write("send.toml", config.replace("keys/signing-key.pem", "none.pem"));
    case.fails(
        "key of the service missing",
        "--config DIR/send.toml",
        78,
        &["cannot read the signing key", "none.pem"],
    );
}
