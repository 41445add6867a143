//! Changes of everything that can change while the daemon runs, under load: no request fails, and
//! an invalid configuration changes nothing.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::OFlags;
use rustls::ClientConfig;

use crate::harness::client::Client;
use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::sign::Producer;
use crate::harness::site::{PATH, Site, TOKEN, certificates, client_with_certificate, source};
use crate::harness::{SetOnDrop, body, wait_until};

/// Requests a reload, and waits for the line of the log about it.
fn reload(daemon: &Daemon<'_>, words: &str) -> String {
    let skipped = daemon.log().len();
    daemon.signal("HUP");
    daemon.wait_for_log_behind(skipped, words)
}

const RELOADED: &str = "code=\"config-reloaded\"";
const REFUSED: &str = "code=\"config-reload-failed\"";

fn errors(daemon: &Daemon<'_>) -> String {
    daemon.metrics()["auditgate_config_reload_errors_total"].clone()
}

fn post(daemon: &Daemon<'_>, path: &str, token: &str, event: &str) -> u16 {
    let mut client = daemon.connect();
    client.try_post_as(path, token, None, event.as_bytes()).unwrap().status
}

#[test]
fn tokens_sources_and_limits_change_without_a_restart() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let mut number = 0;
    let mut event = || {
        number += 1;
        site.producer.event(number)
    };
    assert_eq!(post(&daemon, PATH, TOKEN, &event()), 200);

    // A new token; in between both are valid.
    let written = format!("authorization = {{ value = \"{TOKEN}\" }}");
    let both = format!("authorization = [{{ value = \"{TOKEN}\" }}, {{ value = \"Bearer new\" }}]");
    site.reconfigure(&written, &both);
    reload(&daemon, RELOADED);
    assert_eq!([TOKEN, "Bearer new"].map(|token| post(&daemon, PATH, token, &event())), [200; 2]);
    site.reconfigure(&both, "authorization = { value = \"Bearer new\" }");
    reload(&daemon, RELOADED);
    assert_eq!([TOKEN, "Bearer new"].map(|token| post(&daemon, PATH, token, &event())), [401, 200]);

    // A new source with its own key, a limit, and the log level.
    let theirs = Producer::new(2);
    site.write("theirs.json", theirs.jwks());
    let eu = source("eu", "/konnect/eu", "jwks = { file = \"theirs.json\" }");
    site.reconfigure("[limits]\n", &format!("[log]\nlevel = \"debug\"\n[limits]\nbody = \"1KiB\"\n{eu}"));
    assert_eq!(post(&daemon, "/konnect/eu", TOKEN, &theirs.event(1)), 404);
    reload(&daemon, RELOADED);
    assert_eq!(post(&daemon, "/konnect/eu", TOKEN, &theirs.event(1)), 200);
    assert_eq!(post(&daemon, PATH, "Bearer new", &"x".repeat(1025)), 413);
    assert!(daemon.log().iter().any(|line| line.contains("DEBUG")));
    let series = "auditgate_events_total{source=\"eu\",outcome=\"accepted\"}";
    let find = |name: &str| {
        daemon.metrics().into_iter().find(|(series, _)| {
            ["source=\"eu\"", "outcome=\"accepted\""].iter().all(|label| series.contains(label))
                && series.starts_with(name)
        })
    };
    assert_eq!(find("auditgate_events_total").expect(series).1, "1");

    // Without the source, its path is unknown again.
    site.reconfigure(&eu, "");
    reload(&daemon, RELOADED);
    assert_eq!(post(&daemon, "/konnect/eu", TOKEN, &theirs.event(2)), 404);
    assert_eq!(errors(&daemon), "0");
    daemon.settle();
    daemon.terminate();
    assert_eq!(site.verified().len(), 5);
}

#[test]
fn memory_and_connections_change_without_a_restart() {
    let site = Site::new().limits("body = \"1MiB\"\ndecoded = \"1MiB\"\nlines = 2000\nin_flight = \"16MiB\"");
    let daemon = Daemon::start(&site);
    site.reconfigure("in_flight = \"16MiB\"", "in_flight = \"3100KiB\"");
    reload(&daemon, RELOADED);
    // A body is received but for its end.
    let large = body(&site.producer.events(0..2000));
    let mut slow = daemon.connect();
    slow.begin_post(large.len());
    slow.send(&large[..large.len() - 10]);
    daemon.wait_for_count("auditgate_in_flight_bytes", large.len() as u64 - (64 << 10) + 1);
    let mut next = 5000;
    let mut other = || {
        next += 2000;
        daemon.post(None, &body(&site.producer.events(next..next + 2000))).status
    };
    assert_eq!(other(), 429);
    site.reconfigure("in_flight = \"3100KiB\"", "in_flight = \"16MiB\"");
    reload(&daemon, RELOADED);
    assert_eq!(other(), 200);
    slow.send(&large[large.len() - 10..]);
    assert_eq!(Receipt::of(&slow.answer()).accepted, 2000);

    // Unauthenticated connections: two of one address may be open, then one.
    let closed = "auditgate_http_connections_closed_total{reason=\"per_peer_limit\"}";
    let mut flood = [daemon.connect_from([127, 0, 0, 2]), daemon.connect_from([127, 0, 0, 2])];
    daemon.wait_for_count("auditgate_http_connections", 3);
    site.reconfigure("[limits]\n", "[limits]\nconnections_per_peer = 1\n");
    reload(&daemon, RELOADED);
    let mut third = daemon.connect_from([127, 0, 0, 2]);
    daemon.wait_for_count(closed, 2);
    assert!(flood.iter_mut().all(|client| !client.is_open()) && third.is_open());

    // All connections: the busy one stays open, and unauthenticated ones are evicted.
    site.reconfigure("[limits]\n", "[limits]\nconnections = 2\n");
    reload(&daemon, RELOADED);
    let mut fourth = daemon.connect_from([127, 0, 0, 3]);
    daemon.wait_for_count("auditgate_http_connections_closed_total{reason=\"evicted\"}", 1);
    assert!(!third.is_open() && fourth.is_open());
    drop((slow, fourth));
    daemon.terminate();
}

#[test]
fn a_bad_configuration_is_refused_and_changes_nothing() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let good = String::from_utf8(site.read("config.toml")).unwrap();
    let bad = [
        ("[limits]", "[limits]\nbody = \"much\"", "`much`"),
        ("[limits]", "[limit]", "unknown key `limit`"),
        ("value = \"Splunk", "file = \"nowhere\" }# \"Splunk", "nowhere"),
        ("file = \"jwks.json\"", "file = \"none.json\"", "none.json"),
        ("data_dir = \"data\"", "data_dir = \"elsewhere\"", "data_dir cannot change while the daemon runs"),
        ("[sinks.verified]", "[sinks.proved]", "[sinks] cannot change while the daemon runs"),
        ("cert = \"cert.pem\"", "cert = \"key.pem\"", "cannot read the certificate"),
    ];
    for (number, (from, to, why)) in bad.iter().enumerate() {
        // A valid change next to the invalid one must not take effect either.
        let text = good.replace(PATH, "/elsewhere");
        assert!(text.contains(from), "{from}");
        site.write("config.toml", text.replacen(from, to, 1));
        let line = reload(&daemon, REFUSED);
        assert!(line.contains(why), "{line}");
        assert_eq!(errors(&daemon), (number + 1).to_string());
        assert_eq!(daemon.deliver(&[site.producer.event(number as u64)]).accepted, 1);
    }
    site.write("config.toml", good);
    reload(&daemon, RELOADED);
    daemon.terminate();
}

#[test]
fn certificates_are_replaced_under_load() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let (stop, posted) = (AtomicBool::new(false), AtomicU64::new(0));
    let old = Arc::clone(&site.client);
    let handshake = |trust: &Arc<ClientConfig>| {
        let mut client = Client::connect(daemon.address, Some(Arc::clone(trust))).unwrap();
        client.try_post(PATH, None, b"").map(|answer| answer.status)
    };
    std::thread::scope(|scope| {
        let _end = SetOnDrop(&stop);
        for _ in 0..2 {
            // One connection throughout: it keeps the old certificate.
            let mut client = daemon.connect();
            client.send(b"");
            let (stop, posted, site) = (&stop, &posted, &site);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let number = posted.fetch_add(1, Ordering::Relaxed);
                    let answer = client.post(None, site.producer.event(number).as_bytes());
                    assert_eq!(Receipt::of(&answer).accepted, 1);
                }
            });
        }
        let new = certificates(site.path("").as_path());
        reload(&daemon, RELOADED);
        assert_eq!(handshake(&new).unwrap(), 200);
        assert!(handshake(&old).is_err(), "the old certificate is still served");

        // A broken key is refused with its file's name, and the previous certificate stays in use.
        site.write("key.pem", "not a key");
        let line = reload(&daemon, REFUSED);
        assert!(line.contains("key.pem"), "{line}");
        assert_eq!(handshake(&new).unwrap(), 200);

        // A valid pair is found without a signal.
        let newest = certificates(site.path("").as_path());
        daemon.wait_for_log("code=\"certificate-reloaded\"");
        assert_eq!(handshake(&newest).unwrap(), 200);
    });
    daemon.settle();
    daemon.terminate();
    assert_eq!(site.verified().len() as u64, posted.into_inner(), "no request failed");
}

#[test]
fn a_certificate_that_has_expired_or_stands_alone_is_reported() {
    const ALONE: &str = "code=\"certificate-weak\"";
    let site = Site::new();
    let daemon = Daemon::start(&site);
    daemon.wait_for_log(ALONE);
    daemon.terminate();

    // A self-signed certificate that has expired.
    let key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
    parameters.not_after = rcgen::date_time_ymd(2024, 2, 3);
    site.write("cert.pem", parameters.self_signed(&key).unwrap().pem());
    site.write("key.pem", key.serialize_pem());
    let daemon = Daemon::start(&site);
    daemon.wait_until_unready("the certificate has expired");
    assert!(!daemon.log().iter().any(|line| line.contains(ALONE)));
    // A valid certificate makes the daemon ready again.
    certificates(site.path("").as_path());
    daemon.wait_until_ready();
    daemon.terminate();
}

#[test]
fn only_clients_with_a_certificate_and_a_known_name_are_accepted() {
    let site = Site::new();
    let names = |names: &str| format!("key = \"key.pem\", client_ca = \"ca.pem\"{names}");
    site.reconfigure("key = \"key.pem\"", &names(""));
    let daemon = Daemon::start(&site);
    let status = |trust: &Arc<ClientConfig>| {
        let mut client = Client::connect(daemon.address, Some(Arc::clone(trust))).unwrap();
        client.try_post(PATH, None, b"").map(|answer| answer.status).ok()
    };
    let client = |name| client_with_certificate(&site, &site.path(""), name);
    let (konnect, other) = (client("konnect.test"), client("other.test"));
    assert_eq!([&site.client, &konnect, &other].map(status), [None, Some(200), Some(200)]);
    site.reconfigure(&names(""), &names(", client_names = [\"konnect.test\"]"));
    reload(&daemon, RELOADED);
    assert_eq!([&site.client, &konnect, &other].map(status), [None, Some(200), None]);

    // Another authority: only its clients are accepted.
    let elsewhere = Site::new();
    site.write("clients.pem", elsewhere.read("ca.pem"));
    site.reconfigure("client_ca = \"ca.pem\"", "client_ca = \"clients.pem\"");
    reload(&daemon, RELOADED);
    assert_eq!(status(&konnect), None);
    assert_eq!(status(&client_with_certificate(&site, &elsewhere.path(""), "konnect.test")), Some(200));
    daemon.terminate();
}

/// Makes a named pipe, which blocks every reader.
fn make_pipe(site: &Site, name: &str) {
    let _ = std::fs::remove_file(site.path(name));
    let made = std::process::Command::new("mkfifo").arg(site.path(name)).status().unwrap();
    assert!(made.success());
}

/// Waits until the daemon reads a pipe. The daemon blocks until the returned file is dropped.
fn wait_for_reader(site: &Site, name: &str) -> File {
    wait_until("the daemon reads the pipe", || {
        // Fails while no process has it open for reading (fifo(7)).
        let flags = OFlags::NONBLOCK.bits().try_into().unwrap();
        let opened = File::options().write(true).custom_flags(flags).open(site.path(name));
        opened.map_err(|error| error.to_string())
    })
}

#[test]
fn a_reload_that_waits_for_a_file_does_not_prevent_the_exit() {
    for name in ["token", "key.pem"] {
        let site = Site::new();
        let daemon = Daemon::start(&site);
        make_pipe(&site, name);
        if name == "token" {
            site.reconfigure(
                &format!("authorization = {{ value = \"{TOKEN}\" }}"),
                "authorization = { file = \"token\" }",
            );
        }
        daemon.signal("HUP");
        // The second signal must not overtake the first, so the first one must be handled by now.
        let writer = wait_for_reader(&site, name);
        assert_eq!(daemon.deliver(&site.producer.events(0..1)).accepted, 1);
        daemon.terminate();
        drop(writer);
        assert_eq!(site.verified(), site.producer.events(0..1));
    }
}
