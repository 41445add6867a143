//! Operation: failing starts with their reasons, metrics, health, and a normal exit.

use std::collections::BTreeSet;
use std::net::TcpListener;

use crate::harness::client::request;
use crate::harness::daemon::{Daemon, Receipt, refused};
use crate::harness::programs::auditgate;
use crate::harness::site::{PATH, Site, sink, source};
use crate::harness::{assert_contains, body, gzip, wait_until};

#[test]
fn a_quarantine_that_could_rotate_verified_events_away_is_warned_of() {
    for (streams, is_warned) in [("[\"verified\", \"quarantine\"]", true), ("\"verified\"", false)] {
        let keep = "rotate = { size = \"1MiB\", keep = 2 }\n";
        let site = Site::new().sinks(&format!(
            "{}{keep}{}",
            sink("all", "json", streams),
            sink("quarantine", "json", "\"quarantine\"")
        ));
        let output = auditgate().arg("check-config").arg(site.path("config.toml")).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said.contains("warning: sink `all` keeps 2 rotated files"), is_warned, "{said}");
    }
}

#[test]
fn a_mistake_in_the_configuration_is_reported_with_its_line_and_a_hint() {
    let site = Site::new().edit("[listen]\naddress", "[listen]\nadress");
    let file = site.path("config.toml").display().to_string();
    assert_contains(&refused(&site, 78), &[&format!("{file}:4:"), "adress", "did you mean `address`?"]);
    let checked = auditgate().arg("check-config").arg(site.path("config.toml")).output().unwrap();
    assert_eq!(checked.status.code(), Some(78));
    assert_contains(
        &String::from_utf8(checked.stderr).unwrap(),
        &[&format!("{file}:4:"), "did you mean `address`?"],
    );

    let site = Site::new();
    std::fs::remove_file(site.path("config.toml")).unwrap();
    assert_contains(&refused(&site, 78), &["config.toml", "No such file"]);
}

#[test]
fn files_named_in_the_configuration_must_exist() {
    let site = Site::new();
    std::fs::remove_file(site.path("cert.pem")).unwrap();
    assert_contains(&refused(&site, 78), &["cert.pem", "No such file"]);

    let site = Site::new();
    std::fs::remove_file(site.path("jwks.json")).unwrap();
    assert_contains(&refused(&site, 78), &["us", "jwks.json", "No such file"]);

    // The sample key of Kong's documentation, which has 33 bytes.
    let site = Site::new();
    site.write(
        "jwks.json",
        r#"{"keys":[{"alg":"EdDSA","crv":"Ed25519","kid":"k","kty":"OKP","x":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"}]}"#,
    );
    assert_contains(&refused(&site, 78), &["us", "jwks.json", "33"]);

    let site = Site::new().edit("path = \"verified.log\"", "path = \"missing/verified.log\"");
    assert_contains(&refused(&site, 78), &["verified", "missing"]);
}

#[test]
fn a_port_or_a_directory_in_use_is_reported() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap().to_string();
    let site = Site::new().edit("127.0.0.1:0", &address);
    assert_contains(&refused(&site, 74), &[&address, "listen.address"]);

    let site = Site::new();
    let daemon = Daemon::start(&site);
    assert_contains(&refused(&site, 74), &["data", "in use"]);
    assert_eq!(daemon.deliver(&[site.producer.event(0)]).accepted, 1);
    daemon.terminate();
}

/// Documented names and label names.
const FAMILIES: [(&str, &[&str]); 30] = [
    ("auditgate_http_body_duration_seconds_count", &["source"]),
    ("auditgate_http_queue_duration_seconds_count", &["source"]),
    ("auditgate_received_bytes_total", &["source"]),
    ("auditgate_decoded_bytes_total", &["source"]),
    ("auditgate_accepted_events_total", &["kind", "severity", "source"]),
    ("auditgate_ready", &[]),
    ("auditgate_warnings", &[]),
    ("auditgate_http_requests_total", &["code", "source"]),
    ("auditgate_http_request_duration_seconds_count", &["source"]),
    ("auditgate_http_connections", &[]),
    ("auditgate_events_total", &["outcome", "source"]),
    ("auditgate_event_delay_seconds_count", &["source"]),
    ("auditgate_last_event_timestamp_seconds", &["source"]),
    ("auditgate_commit_duration_seconds_count", &[]),
    ("auditgate_ledger_bytes", &[]),
    ("auditgate_sink_events_total", &["sink"]),
    ("auditgate_sink_pending_events", &["sink"]),
    ("auditgate_sink_oldest_pending_seconds", &["sink"]),
    ("auditgate_sink_errors_total", &["sink"]),
    ("auditgate_sink_skipped_events_total", &["sink"]),
    ("auditgate_jwks_keys", &["source"]),
    ("auditgate_jwks_refreshed_timestamp_seconds", &["source"]),
    ("auditgate_jwks_refresh_errors_total", &["source"]),
    ("auditgate_tls_certificate_not_after_timestamp_seconds", &[]),
    ("auditgate_build_info", &["version"]),
    ("process_cpu_seconds_total", &[]),
    ("process_open_fds", &[]),
    ("process_resident_memory_bytes", &[]),
    ("process_start_time_seconds", &[]),
    ("process_threads", &[]),
];

#[test]
fn metrics_are_complete_and_no_sender_can_add_a_series() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let series = || daemon.metrics().into_keys().collect::<BTreeSet<_>>();
    let before = series();
    for (family, labels) in FAMILIES {
        let found = before
            .iter()
            .find(|series| series.split('{').next() == Some(family))
            .unwrap_or_else(|| panic!("{family} is missing"));
        let inside = found.split_once('{').map_or("", |(_, rest)| rest.trim_end_matches('}'));
        let names: Vec<_> = inside.split("\",").filter_map(|pair| Some(pair.split_once('=')?.0)).collect();
        assert_eq!(names, labels, "{found}");
    }

    let mut lines = site.producer.events(0..7);
    lines.push(lines[0].clone());
    lines.push("not an event".to_owned());
    let sent = gzip(&body(&lines));
    let receipt = Receipt::of(&daemon.post(Some("application/gzip"), &sent));
    assert_eq!(receipt, Receipt { accepted: 7, duplicates: 1, quarantined: 1 });
    daemon.post(Some("gzip"), b"no gzip");
    let mut client = daemon.connect();
    // As many as a scanner tries in a day.
    for number in 0..10_000 {
        let path = format!("/storm/{number}");
        client.send(&request("POST", &path, &[("Content-Length", "0")], b""));
        assert_eq!(client.answer().status, 404);
    }
    for number in 0..100 {
        let token = format!("Bearer {number}");
        client.send(&request("POST", PATH, &[("Authorization", &token), ("Content-Length", "0")], b""));
        assert_eq!(client.answer().status, 401);
    }
    daemon.settle();
    assert_eq!(series(), before, "the set of series");

    let metrics = daemon.metrics();
    for (series, value) in [
        ("auditgate_http_requests_total{code=\"200\",source=\"us\"}", "1"),
        ("auditgate_http_requests_total{code=\"400\",source=\"us\"}", "1"),
        ("auditgate_http_requests_total{code=\"401\",source=\"us\"}", "100"),
        ("auditgate_http_requests_total{code=\"404\",source=\"\"}", "10000"),
        ("auditgate_received_bytes_total{source=\"us\"}", &(sent.len() + 7).to_string()),
        ("auditgate_decoded_bytes_total{source=\"us\"}", &body(&lines).len().to_string()),
        ("auditgate_http_body_duration_seconds_count{source=\"us\"}", "2"),
        ("auditgate_http_queue_duration_seconds_count{source=\"us\"}", "1"),
        ("auditgate_accepted_events_total{kind=\"access\",severity=\"1\",source=\"us\"}", "4"),
        ("auditgate_accepted_events_total{kind=\"authorization_granted\",severity=\"1\",source=\"us\"}", "3"),
        ("auditgate_ready", "1"),
        ("auditgate_warnings", "0"),
        ("auditgate_events_total{outcome=\"accepted\",source=\"us\"}", "7"),
        ("auditgate_events_total{outcome=\"duplicate\",source=\"us\"}", "1"),
        ("auditgate_events_total{outcome=\"malformed\",source=\"us\"}", "1"),
        ("auditgate_events_total{outcome=\"undecodable_body\",source=\"us\"}", "1"),
        ("auditgate_events_total{outcome=\"bad_signature\",source=\"us\"}", "0"),
        ("auditgate_event_delay_seconds_count{source=\"us\"}", "8"),
        ("auditgate_sink_events_total{sink=\"verified\"}", "7"),
        ("auditgate_sink_events_total{sink=\"quarantine\"}", "2"),
        ("auditgate_sink_errors_total{sink=\"verified\"}", "0"),
        ("auditgate_jwks_keys{source=\"us\"}", "1"),
    ] {
        assert_eq!(metrics.get(series).map(String::as_str), Some(value), "{series}");
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    for (series, least) in [
        ("auditgate_last_event_timestamp_seconds{source=\"us\"}", now - 600),
        ("auditgate_jwks_refreshed_timestamp_seconds{source=\"us\"}", now - 600),
        ("auditgate_tls_certificate_not_after_timestamp_seconds", now),
        ("auditgate_ledger_bytes", 4096),
    ] {
        let value: f64 = metrics[series].parse().unwrap();
        assert!(value >= least as f64, "{series} {value}");
    }
}

#[test]
fn health_and_readiness() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    assert_eq!(daemon.ask("/healthz").status, 200);
    daemon.wait_until_ready();
    assert_eq!(daemon.ask("/other").status, 404);
    // Readiness does not wait until the sink has created its file.
    wait_until("the sink has created its file", || {
        site.path("verified.log").is_file().then_some(()).ok_or("not yet".to_owned())
    });
    drop(daemon);

    std::fs::remove_file(site.path("verified.log")).unwrap();
    std::fs::create_dir(site.path("verified.log")).unwrap();
    let daemon = Daemon::start(&site);
    let problems = daemon.wait_until_unready("sink verified");
    assert_contains(&problems, &["verified.log"]);
    assert_eq!(daemon.ask("/healthz").status, 200);
}

#[test]
fn sigterm_lets_a_request_finish_and_delivers_committed_events() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let lines = site.producer.events(0..5000);
    assert_eq!(daemon.deliver(&lines[..4990]).accepted, 4990);
    let last = body(&lines[4990..]);
    let mut client = daemon.connect();
    client.begin_post(last.len());
    client.send(&last[..last.len() / 2]);

    daemon.signal("TERM");
    daemon.wait_until_unready("");
    wait_until("new connections are refused", || match daemon.try_connect() {
        Err(_) => Ok(()),
        Ok(_) => Err("still accepted".to_owned()),
    });
    client.send(&last[last.len() / 2..]);
    assert_eq!(Receipt::of(&client.answer()).accepted, 10);
    assert_eq!(client.rest(), b"", "the connection ends");
    assert_eq!(daemon.ended().code(), Some(0));
    assert!(site.verified() == lines, "every committed event is in the file");
}

#[test]
fn idle_connections_do_not_delay_the_exit() {
    let site = Site::new().limits("request_timeout = \"10s\"");
    let daemon = Daemon::start(&site);
    // One with an answered request, one after its TLS handshake, one before it.
    let mut answered = daemon.connect();
    answered.send(&request("GET", PATH, &[], b""));
    assert_eq!(answered.answer().status, 405);
    let mut greeted = daemon.connect();
    greeted.send(b"");
    let silent = daemon.try_connect().unwrap();
    wait_until("all of them are accepted", || match &*daemon.metrics()["auditgate_http_connections"] {
        "3" => Ok(()),
        count => Err(count.to_owned()),
    });
    daemon.signal("TERM");
    assert_eq!(answered.rest(), b"");
    assert_eq!(greeted.rest(), b"");
    let log = daemon.log_at_end();
    assert!(log.iter().any(|line| line.contains("code=\"stopped\"")), "{log:?}");
    assert!(!log.iter().any(|line| line.contains("code=\"requests-unfinished\"")), "{log:?}");
    drop(silent);
}

#[test]
fn a_source_whose_unverified_lines_go_to_no_sink_is_refused() {
    let site = Site::new().sources(&source("us", PATH, "signatures = \"off\""));
    assert_contains(&refused(&site, 78), &["us", "unverified"]);
}
