//! `/status`, the page at `/`, and `auditgate status`.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::process::{Output, Stdio};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::harness::client::{Answer, Client, request};
use crate::harness::daemon::{Daemon, serve};
use crate::harness::programs::auditgate;
use crate::harness::site::{Site, TOKEN, raw_sinks, sink, source, syslog_sink};
use crate::harness::{assert_contains, wait_until};

fn status(arguments: &[&str]) -> Output {
    auditgate().arg("status").args(arguments).output().unwrap()
}

/// The command for a daemon, with further arguments.
fn status_of(daemon: &Daemon<'_>, more: &[&str]) -> Output {
    let admin = format!("http://{}", daemon.admin);
    status(&[&["--admin", &admin], more].concat())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn report_of(daemon: &Daemon<'_>) -> Value {
    let answer = daemon.ask("/status");
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")));
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    serde_json::from_slice(&answer.body).unwrap()
}

/// Returns the element of a list that has this name.
fn named<'v>(list: &'v Value, name: &str) -> &'v Value {
    let found = list.as_array().unwrap().iter().find(|element| element["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {list}"))
}

fn unreachable_siem() -> String {
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    syslog_sink(&format!("tcp://127.0.0.1:{port}"), "")
}

fn ask(daemon: &Daemon<'_>, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
    let mut client = Client::connect(daemon.admin, None).unwrap();
    client.send(&request(method, path, headers, b""));
    client.answer()
}

#[test]
fn the_report_has_the_values_of_the_metrics() {
    let sources = source("us", "/konnect/us", "") + &source("eu", "/konnect/eu", "");
    let site = Site::new().sources(&sources).sinks(&(raw_sinks() + &unreachable_siem()));
    let daemon = Daemon::start(&site);
    let event = site.producer.event(0);
    let tampered = site.producer.event(3).replace("action=retrieve", "action=delete");
    daemon.deliver(&[event.clone(), event, site.producer.event(2), tampered, "no event".to_owned()]);
    wait_until("the file has everything and the server has failed", || {
        let metrics = daemon.metrics();
        let at = |series: &str| metrics[series].clone();
        let state = (
            at("auditgate_sink_events_total{sink=\"verified\"}"),
            at("auditgate_sink_events_total{sink=\"quarantine\"}"),
            at("auditgate_sink_errors_total{sink=\"siem\"}") == "0",
        );
        // What was delivered is recorded a little later.
        let is_recorded = ["verified", "quarantine"]
            .iter()
            .all(|sink| at(&format!("auditgate_sink_pending_events{{sink=\"{sink}\"}}")) == "0");
        if is_recorded && state == ("2".to_owned(), "2".to_owned(), false) {
            Ok(())
        } else {
            Err(format!("{state:?}"))
        }
    });
    let (report, metrics) = (report_of(&daemon), daemon.metrics());
    let metric = |series: String| metrics[&series].parse::<f64>().unwrap();
    let mut compared = 0;
    for source in report["sources"].as_array().unwrap() {
        let name = source["name"].as_str().unwrap();
        for (outcome, lines) in source["lines"].as_object().unwrap() {
            let series = format!("auditgate_events_total{{outcome=\"{outcome}\",source=\"{name}\"}}");
            assert_eq!(lines.as_f64(), Some(metric(series)), "{name} {outcome}");
            compared += 1;
        }
        for (value, family) in [
            (&source["last_event_at"], "last_event_timestamp_seconds"),
            (&source["keys"]["count"], "jwks_keys"),
            (&source["keys"]["retired"], "jwks_retired_keys"),
            (&source["keys"]["refreshed_at"], "jwks_refreshed_timestamp_seconds"),
            (&source["keys"]["refresh_errors"], "jwks_refresh_errors_total"),
        ] {
            let series = metric(format!("auditgate_{family}{{source=\"{name}\"}}"));
            assert_eq!(value.as_f64().unwrap_or_default(), series, "{name} {family}");
        }
    }
    assert_eq!(compared, 2 * 7, "every outcome of both sources");
    for sink in report["sinks"].as_array().unwrap() {
        let name = sink["name"].as_str().unwrap();
        for (field, family) in
            [("pending", "pending_events"), ("delivered", "events_total"), ("errors", "errors_total")]
        {
            let series = metric(format!("auditgate_sink_{family}{{sink=\"{name}\"}}"));
            // The server may have been tried once more between the two answers.
            let difference = series - sink[field].as_f64().unwrap();
            assert!(difference == 0.0 || (field == "errors" && difference == 1.0), "{name} {field}");
        }
    }
    assert_eq!(report["ledger"]["bytes"].as_f64(), Some(metric("auditgate_ledger_bytes".to_owned())));

    let us = named(&report["sources"], "us");
    assert_eq!((&us["path"], &us["signatures"]), (&"/konnect/us".into(), &"require".into()));
    assert_eq!(us["lines"]["accepted"], 2);
    let delay = |what: &str| metric(format!("auditgate_event_delay_seconds_{what}{{source=\"us\"}}"));
    assert_eq!(us["mean_delay_seconds"].as_f64(), Some(delay("sum") / delay("count")));
    wait_until("the rates have some time to count over", || {
        let us = named(&report_of(&daemon)["sources"], "us").clone();
        if us["minute_rate"].as_f64() > Some(0.0) { Ok(()) } else { Err(us.to_string()) }
    });
    assert!(named(&report["sources"], "eu")["last_event_at"].is_null());
    let mut reasons: Vec<_> = report["quarantine"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| {
            (
                line["source"].as_str(),
                line["reason"].as_str(),
                line["total"].as_u64(),
                line["last_hour"].as_u64(),
            )
        })
        .collect();
    reasons.sort_unstable();
    let us = Some("us");
    let expected = [(us, Some("bad_signature"), Some(1), Some(1)), (us, Some("malformed"), Some(1), Some(1))];
    assert_eq!(reasons, expected);

    let siem = named(&report["sinks"], "siem");
    assert_contains(siem["last_error"]["error"].as_str().unwrap(), &["refused"]);
    assert_contains(siem["last_error"]["advice"].as_str().unwrap(), &["start the server"]);
    assert!(siem["failing_since"].is_i64() && siem["stuck_since"].is_null(), "{siem}");
    assert_eq!(report["ready"], false);
    assert_eq!(report["problems"][0]["condition"], "sink siem");
    assert_eq!(report["listener"], format!("https://{}", daemon.address));
    assert!(report["certificate"]["not_after"].is_i64(), "{report}");
    assert!(!report.to_string().contains(TOKEN), "no secret");
    daemon.terminate();
}

#[test]
fn a_reload_shows_in_the_report() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    daemon.wait_until_ready();
    let configuration = report_of(&daemon)["configuration"].clone();
    assert_eq!(configuration["file"], site.path("config.toml").display().to_string());
    assert!(configuration["loaded_at"].is_i64() && configuration["reload_at"].is_null(), "{configuration}");

    site.reconfigure("[limits]", "[limitz]");
    daemon.signal("HUP");
    let refused = wait_until("the reload has failed", || {
        let report = report_of(&daemon);
        if report["configuration"]["reload_error"].is_string() { Ok(report) } else { Err(report.to_string()) }
    });
    assert_contains(refused["configuration"]["reload_error"].as_str().unwrap(), &["limitz"]);
    assert_eq!(
        (&refused["ready"], &refused["warnings"][0]["condition"]),
        (&true.into(), &"configuration".into())
    );
    let output = status_of(&daemon, &[]);
    assert_eq!(output.status.code(), Some(0), "a warning leaves it ready: {output:?}");
    assert_contains(&text(&output.stdout), &["warning: configuration: ", "last reload FAILED "]);

    site.reconfigure("[limitz]", "[limits]");
    site.reconfigure("path = \"/konnect/us\"", "path = \"/konnect/other\"");
    daemon.signal("HUP");
    wait_until("the reload has succeeded", || {
        let report = report_of(&daemon);
        let is_done = report["configuration"]["reload_error"].is_null();
        if is_done && report["sources"][0]["path"] == "/konnect/other" {
            Ok(())
        } else {
            Err(report.to_string())
        }
    });
    daemon.terminate();
}

#[test]
fn the_command_prints_80_columns_and_json_and_ends_by_the_state() {
    let name = "a-source-with-a-name-of-sixty-four-characters-which-is-the-most-";
    let site = Site::new().sources(&source(name, "/konnect/us", ""));
    let daemon = Daemon::start(&site);
    daemon.wait_until_ready();
    daemon.deliver(&[site.producer.event(0)]);
    daemon.settle();

    let output = status_of(&daemon, &[]);
    assert_eq!((output.status.code(), &*text(&output.stderr)), (Some(0), ""));
    let shown = text(&output.stdout);
    assert_contains(
        &shown,
        &[" is ready; running for ", name, "SOURCE ", "SINK ", "certificate ", "ledger "],
    );
    for line in shown.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }

    let output = status_of(&daemon, &["--json"]);
    assert_eq!(output.status.code(), Some(0));
    let printed = text(&output.stdout);
    assert_eq!(printed.lines().count(), 1);
    let printed: Value = serde_json::from_str(&printed).unwrap();
    let asked = report_of(&daemon);
    for member in ["version", "started_at", "ready", "problems", "configuration", "listener", "certificate"] {
        assert_eq!(printed[member], asked[member], "{member}");
    }
    assert_eq!(printed["sources"][0]["lines"], asked["sources"][0]["lines"]);

    // Two reports follow each other, without escapes where there is no terminal.
    let mut watching = auditgate()
        .args(["status", "--watch", "--admin", &format!("http://{}", daemon.admin)])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let reports: Vec<String> = BufReader::new(watching.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap)
        .filter(|line| line.contains(" is ready; "))
        .take(2)
        .collect();
    watching.kill().unwrap();
    watching.wait().unwrap();
    assert_eq!(reports.len(), 2);
    assert!(reports.iter().all(|line| line.starts_with("auditgate ")), "{reports:?}");

    let admin = format!("http://{}", daemon.admin);
    daemon.terminate();
    let output = status(&["--admin", &admin]);
    assert_eq!(output.status.code(), Some(74));
    assert_contains(&text(&output.stderr), &[&admin, "refused", "systemctl status auditgate"]);
}

#[test]
fn a_daemon_that_is_not_ready_is_a_finding() {
    let site = Site::new().sinks(&(sink("quarantine", "json", "\"quarantine\"") + &unreachable_siem()));
    let daemon = Daemon::start(&site);
    daemon.deliver(&[site.producer.event(0)]);
    daemon.wait_until_unready("sink siem");
    let output = status_of(&daemon, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert_contains(&text(&output.stderr), &["auditgate: the daemon is not ready: sink siem: "]);
    assert_contains(
        &text(&output.stdout),
        &["is NOT READY", "\nproblem: sink siem: ", "\n  FAILING for ", "\n    what to do: start the server"],
    );
    assert_eq!(status_of(&daemon, &["--json"]).status.code(), Some(1));
    daemon.terminate();
}

#[test]
fn address_and_token_come_from_the_configuration_or_from_the_command_line() {
    let admin = "[admin]\naddress = \"unix://PATH\"\ntoken = { file = \"admin-token\" }";
    let site = Site::new().edit("[admin]\naddress = \"127.0.0.1:0\"", admin);
    let socket = site.path("admin.sock").display().to_string();
    let site = site.edit("unix://PATH", &format!("unix://{socket}"));
    site.write("admin-token", "let-me-see\n");
    site.write("other-token", "let-me-in\n");
    let daemon = Daemon::spawn(&site, serve(&site));
    daemon.wait_for_log("code=\"listening\"");
    let at = |name: &str| site.path(name).display().to_string();
    let (config, token, other) = (at("config.toml"), at("admin-token"), at("other-token"));
    let url = format!("unix://{socket}");

    let output = wait_until("the daemon is ready", || {
        let output = status(&["--config", &config]);
        if output.status.code() == Some(0) { Ok(output) } else { Err(format!("{output:?}")) }
    });
    assert!(!text(&output.stdout).contains("let-me"), "{output:?}");
    assert_eq!(status(&["--admin", &url, "--token-file", &token]).status.code(), Some(0));
    for (arguments, code, said) in [
        (vec!["--admin", &url], 74, "401: it needs the admin token; name its file with --token-file"),
        (vec!["--admin", &url, "--token-file", &other], 74, "401: the token is not the daemon's"),
        (vec!["-c", &config, "--token-file", &other], 74, "401: the token is not the daemon's"),
        (vec!["--admin", &url, "--token-file", "/nonexistent"], 74, "/nonexistent"),
        (vec!["--admin", "unix:///nonexistent.sock"], 74, "systemctl status auditgate"),
        (vec!["--admin", "localhost:9464"], 2, "write http://HOST:PORT or unix:///PATH"),
        (vec!["--admin", &url, "-c", &config], 2, "cannot be used with"),
        (vec!["--config", "/nonexistent.toml"], 78, "/nonexistent.toml"),
    ] {
        let output = status(&arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        assert_contains(&text(&output.stderr), &[said]);
    }
    // Of another user, who cannot read the token.
    std::fs::remove_file(site.path("admin-token")).unwrap();
    let output = status(&["-c", &config]);
    assert_eq!(output.status.code(), Some(74));
    assert_contains(&text(&output.stderr), &["cannot read the admin token", "--token-file"]);
    daemon.terminate();

    let site = Site::new();
    let output = status(&["-c", &site.path("config.toml").display().to_string()]);
    assert_eq!(output.status.code(), Some(2), "port 0: {output:?}");
}

#[test]
fn the_report_needs_the_token_and_the_page_does_not() {
    let admin = "[admin]\naddress = \"127.0.0.1:0\"\ntoken = { value = \"let-me-see\" }";
    let site = Site::new().edit("[admin]\naddress = \"127.0.0.1:0\"", admin);
    let daemon = Daemon::start(&site);
    assert_eq!(ask(&daemon, "GET", "/status", &[]).status, 401);
    assert_eq!(ask(&daemon, "GET", "/status", &[("Authorization", "Bearer let-me-se")]).status, 401);
    let shown = ask(&daemon, "GET", "/status", &[("Authorization", "Bearer let-me-see")]);
    assert_eq!(shown.status, 200);
    assert!(!text(&shown.body).contains("let-me-see"), "no secret");
    assert_eq!(ask(&daemon, "GET", "/", &[]).status, 200);
    daemon.terminate();
}

#[test]
fn the_page_runs_its_own_script_and_nothing_else() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let answer = daemon.ask("/");
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    assert_eq!(answer.header("referrer-policy"), Some("no-referrer"));
    let page = text(&answer.body);
    let hash = |element: &str| {
        let (begin, end) = (format!("<{element}>"), format!("</{element}>"));
        assert_eq!((page.matches(&*begin).count(), page.matches(&*end).count()), (1, 1), "one {element}");
        let content = page.split_once(&*begin).unwrap().1.split_once(&*end).unwrap().0;
        STANDARD.encode(digest(&SHA256, content.as_bytes()))
    };
    let expected = format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; connect-src 'self'; frame-ancestors \
         'none'; base-uri 'none'; form-action 'none'",
        hash("script"),
        hash("style")
    );
    assert_eq!(answer.header("content-security-policy"), Some(&*expected));
    // What the policy would refuse, or what would put text of the daemon into markup.
    for refused in
        [" style=", " onclick=", "src=", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"]
    {
        assert!(!page.contains(refused), "{refused}");
    }
    assert_eq!(ask(&daemon, "POST", "/", &[]).status, 405);

    // A page of another site whose name leads here.
    for path in ["/", "/status"] {
        let mut client = Client::connect(daemon.admin, None).unwrap();
        client.send(format!("GET {path} HTTP/1.1\r\nHost: evil.example\r\n\r\n").as_bytes());
        assert_eq!(client.answer().status, 421, "{path}");
    }
    daemon.terminate();
}
