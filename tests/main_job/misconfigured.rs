//! What `check-config --deep` says about each common mistake: one line, which names it and says
//! what to do, and the right exit code.

use std::net::TcpListener;
use std::process::Command;

use crate::harness::daemon::{Daemon, refused};
use crate::harness::key_server::{KeyServer, ServerAnswer};
use crate::harness::programs::auditgate;
use crate::harness::site::{PATH, Site, raw_sinks, sink, source, sqlite_sink, syslog_sink};
use crate::harness::wait_until;

/// Exit code and stderr of a deep check.
fn deep(site: &Site, more: &[&str]) -> (Option<i32>, String) {
    let mut command = auditgate();
    command.args(["check-config", "--deep", "--quiet"]).args(more).arg("-c").arg(site.path("config.toml"));
    let output = command.output().unwrap();
    assert!(output.stdout.is_empty(), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    for debug in ["Error {", "Os {", "Some(", "Err(", "Custom {"] {
        assert!(!said.contains(debug), "Rust's debug text: {said}");
    }
    (output.status.code(), said)
}

/// Asserts that the check finds an error, in these words.
fn assert_error(site: &Site, words: &[&str]) {
    let (code, said) = deep(site, &[]);
    assert_eq!(code, Some(78), "{said}");
    words.iter().for_each(|words| assert!(said.contains(words), "{words} is not in {said}"));
}

/// Asserts that the check finds something that may be right, in these words.
fn assert_warning(site: &Site, words: &[&str]) {
    let (code, said) = deep(site, &[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.starts_with("auditgate: warning: "), "{said}");
    words.iter().for_each(|words| assert!(said.contains(words), "{words} is not in {said}"));
}

/// Writes a certificate for the key in `key.pem`, signed by itself.
fn certify(site: &Site, change: impl FnOnce(&mut rcgen::CertificateParams)) {
    let key = rcgen::KeyPair::from_pem(&String::from_utf8(site.read("key.pem")).unwrap()).unwrap();
    let mut parameters = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
    change(&mut parameters);
    site.write("cert.pem", parameters.self_signed(&key).unwrap().pem());
}

/// A site of which nothing is wrong.
fn site() -> Site {
    let site = Site::new();
    certify(&site, |_| {});
    site
}

#[test]
fn what_is_right_is_said_to_be_right() {
    let site = site();
    // No word about the space: a test machine may have little.
    site.reconfigure("[limits]\n", "[limits]\nbacklog = \"1MiB\"\n");
    let (code, said) = deep(&site, &[]);
    assert_eq!((code, said.as_str()), (Some(0), ""));
    // Nor does the check leave anything.
    assert!(!site.path("data").exists() && !site.path("verified.log").exists());

    // The ports and the ledger of the daemon that runs are its own.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    site.reconfigure("address = \"127.0.0.1:0\"", &format!("address = \"{port}\""));
    let daemon = Daemon::start(&site);
    let (code, said) = deep(&site, &[]);
    assert_eq!((code, said.as_str()), (Some(0), ""));
    daemon.terminate();
}

#[test]
fn a_certificate_that_clients_refuse_is_found() {
    let site = site();
    certify(&site, |parameters| parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained));
    assert_warning(&site, &["is that of a certificate authority", "issue one from it without CA:TRUE"]);
    certify(&site, |parameters| parameters.subject_alt_names.clear());
    assert_warning(&site, &["has no subject alternative name"]);
    certify(&site, |parameters| parameters.not_after = rcgen::date_time_ymd(2020, 1, 2));
    assert_error(&site, &["expired on 2020-01-02"]);
    let soon = std::time::SystemTime::now() + std::time::Duration::from_secs(5 * 86_400 + 60);
    certify(&site, |parameters| parameters.not_after = soon.into());
    assert_warning(&site, &["expires in 5 days"]);

    let other = Site::new();
    site.write("cert.pem", other.read("cert.pem"));
    assert_error(&site, &["cannot be used with the key", "the key belongs to another certificate"]);
    other.reconfigure("[limits]\n", "[limits]\nbacklog = \"1MiB\"\n");
    assert_warning(&other, &["append the intermediate certificates"]);
}

#[test]
fn a_port_that_cannot_be_used_is_found() {
    let site = site();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let written = format!("address = \"{address}\"");
    site.reconfigure("address = \"127.0.0.1:0\"", &written);
    assert_error(&site, &["listen.address", "is in use", "ss -ltnp"]);
    site.reconfigure(&written, "address = \"192.0.2.1:0\"");
    assert_error(&site, &["no interface of this machine has the address 192.0.2.1"]);
}

#[test]
fn keys_that_cannot_be_used_are_found() {
    let server = KeyServer::start();
    let jwks = format!("jwks = {{ url = \"{}\" }}", server.url());
    let site = site().sources(&source("us", PATH, &jwks));
    site.reconfigure("[limits]\n", "[limits]\nbacklog = \"1MiB\"\n");
    server.answer(ServerAnswer::status("404 Not Found"));
    assert_error(&site, &["source `us`", "status 404; is the url right?"]);
    server.serve("<html>");
    assert_error(&site, &["source `us`: cannot use the keys from http://"]);
    server.serve(&site.producer.jwks());
    assert_eq!(deep(&site, &[]), (Some(0), String::new()));
    let date = "Date: Thu, 01 Jan 2015 00:00:00 GMT\r\n";
    server.answer(ServerAnswer::with("200 OK", date, &site.producer.jwks()));
    assert_warning(&site, &["clock", "ahead of that of the key server"]);
    // Several problems are said at once.
    certify(&site, |parameters| parameters.not_after = rcgen::date_time_ymd(2020, 1, 2));
    server.answer(ServerAnswer::hang_up());
    assert_error(&site, &["listen.tls: ", "source `us`: cannot fetch keys"]);
}

#[test]
fn a_syslog_server_that_is_down_is_found() {
    let dead = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let site = site().sinks(&(raw_sinks() + &syslog_sink(&format!("tcp://{dead}"), "")));
    assert_warning(&site, &["sink `siem`: cannot reach tcp://", "Connection refused"]);
}

#[test]
fn a_sink_that_is_removed_while_events_wait_for_it_is_found() {
    let dead = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let siem = syslog_sink(&format!("tcp://{dead}"), "");
    let site = Site::new().sinks(&(raw_sinks() + &siem));
    let daemon = Daemon::start(&site);
    daemon.deliver(&site.producer.events(1..4));
    wait_until("the file has the events", || match site.verified().len() {
        3 => Ok(()),
        lines => Err(format!("it has {lines}")),
    });
    site.reconfigure(&siem, "");
    assert_error(
        &site,
        &["sink `siem` is no longer configured, but 3 events wait for it", "forget-sink siem"],
    );
    daemon.terminate();
    assert_error(&site, &["sink `siem` is no longer configured, but 3 events wait for it"]);
}

#[test]
fn a_directory_that_is_missing_is_found_and_not_made() {
    let site = site().sinks(&(raw_sinks() + &sqlite_sink("missing/search.db", "\"verified\"")));
    assert_error(
        &site,
        &["sink `search`: ", "missing does not exist; make it, writable for the daemon's user"],
    );
    assert!(refused(&site, 78).contains("missing does not exist"));

    let site = self::site();
    site.reconfigure("data_dir = \"data\"", "data_dir = \"not-mounted/data\"");
    assert_error(&site, &["data_dir: ", "not-mounted does not exist"]);
    assert!(refused(&site, 78).contains("not-mounted does not exist"));
    assert!(!site.path("not-mounted").exists());
}

#[test]
fn a_file_of_another_program_is_found() {
    let site = site().sinks(&(raw_sinks() + &sqlite_sink("search.db", "\"verified\"")));
    rusqlite::Connection::open(site.path("search.db"))
        .unwrap()
        .execute_batch("CREATE TABLE theirs (a)")
        .unwrap();
    assert_error(&site, &["sink `search`: "]);
    let site = self::site().sinks(&(raw_sinks() + &sink("extra", "raw", "\"verified\"")));
    std::fs::create_dir(site.path("extra.log")).unwrap();
    let (code, said) = deep(&site, &[]);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("extra.log is a directory; name a file"), "{said}");
}

#[test]
fn rights_are_those_of_the_user_that_is_named() {
    let site = site();
    let (code, said) = deep(&site, &["--as-user", "nobody-of-this-name"]);
    assert!(code == Some(2) && said.contains("this machine has no user"), "{said}");
    let is_root = Command::new("id").arg("-u").output().is_ok_and(|id| id.stdout == b"0\n");
    if is_root {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(site.path(""), mode).unwrap();
        for file in ["config.toml", "cert.pem", "jwks.json"] {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
            std::fs::set_permissions(site.path(file), mode).unwrap();
        }
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(site.path("key.pem"), mode).unwrap();
        let (code, said) = deep(&site, &["--as-user", "nobody"]);
        assert_eq!(code, Some(78), "{said}");
        for words in
            ["key.pem: Permission denied", "data_dir: nobody may not write in ", "owner root, mode 0755"]
        {
            assert!(said.contains(words), "{words} is not in {said}");
        }
    } else {
        let (code, said) = deep(&site, &["--as-user", "nobody"]);
        assert!(code == Some(2) && said.contains("only root may check as another user"), "{said}");
    }
}
