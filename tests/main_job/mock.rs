//! `auditgate mock-konnect` with the daemon.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

use crate::harness::client::{Answer, Client, request};
use crate::harness::daemon::Daemon;
use crate::harness::machine::ReservedPort;
use crate::harness::programs::auditgate;
use crate::harness::site::{PATH, Site, TOKEN, source};
use crate::harness::wait_until;

/// A running stand-in. It is killed when this is dropped.
struct Mock {
    child: Child,
    address: SocketAddr,
    /// Open, so that it can print.
    _printed: BufReader<ChildStdout>,
}

impl Mock {
    fn start(more: &[&str]) -> Self {
        let mut child =
            auditgate().arg("mock-konnect").args(more).stdout(Stdio::piped()).spawn().expect("the mock");
        let mut printed = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        printed.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").map(str::parse);
        let address = address.unwrap_or_else(|| panic!("{line}")).unwrap();
        Self { child, address, _printed: printed }
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let length = body.len().to_string();
        let headers = [("Authorization", "Bearer kpat_mock"), ("Content-Length", &length)];
        let mut client = Client::connect(self.address, None).unwrap();
        client.send(&request(method, path, &headers, body.as_bytes()));
        client.answer()
    }

    /// Sends a request that is answered with that status, and returns the body.
    #[track_caller]
    fn call(&self, method: &str, path: &str, body: &Value, status: u16) -> Value {
        let answer = self.ask(method, path, body);
        assert_eq!(answer.status, status, "{answer:?}");
        serde_json::from_slice(&answer.body).unwrap_or_default()
    }

    fn get(&self, path: &str) -> Value {
        self.call("GET", path, &Value::Null, 200)
    }

    /// Creates a destination and binds the webhook to it.
    fn connect(&self, endpoint: &str) {
        let destination =
            json!({"name": "siem", "endpoint": endpoint, "authorization": TOKEN, "log_format": "cef"});
        let created = self.call("POST", "/v3/audit-log-destinations", &destination, 201);
        let binding = json!({"audit_log_destination_id": created["id"], "enabled": true});
        assert_eq!(self.call("PATCH", "/v3/audit-log-webhook", &binding, 200), binding);
    }

    fn generate(&self, count: u64) {
        self.call("POST", "/mock/events", &json!({"count": count}), 200);
    }

    /// Waits until the webhook has settled everything, and returns the numbers.
    fn settled(&self) -> Value {
        wait_until("the webhook has settled everything", || {
            let counts = self.get("/mock/state")["organization"].clone();
            if counts["waiting"] == 0 { Ok(counts) } else { Err(counts.to_string()) }
        })
    }

    /// Waits until the webhook has this status, and returns it whole.
    fn webhook_is(&self, status: &str) -> Value {
        wait_until(&format!("the webhook is {status}"), || {
            let found = self.get("/v3/audit-log-webhook/status");
            if found["webhook_status"] == status { Ok(found) } else { Err(found.to_string()) }
        })
    }

    fn keys(&self) -> String {
        format!("http://{}/v2/audit-log-webhook/jwks.json", self.address)
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns a site whose daemon keeps its port over a restart and trusts the keys of the mock.
fn site(port: &ReservedPort, mock: &Mock) -> Site {
    let keys = format!("jwks = {{ url = \"{}\", refresh = \"1h\" }}", mock.keys());
    let site = Site::new().plain().sources(&source("us", PATH, &keys));
    site.edit("127.0.0.1:0", &format!("127.0.0.1:{}", port.number()))
}

/// Returns the lines without their signatures, sorted.
fn unsigned(site: &Site) -> Vec<String> {
    let lines = site.verified().into_iter();
    let mut lines: Vec<_> = lines.map(|line| line.rsplit_once(" sig=").unwrap().0.to_owned()).collect();
    lines.sort_unstable();
    lines
}

#[test]
fn what_an_outage_lost_comes_with_a_replay_job_and_every_event_once() {
    let mock = Mock::start(&["--rate", "0", "--retry-min", "5ms", "--retry-max", "20ms"]);
    let port = ReservedPort::new();
    let site = site(&port, &mock);
    let daemon = Daemon::start(&site);
    mock.connect(&format!("http://127.0.0.1:{}{PATH}", port.number()));
    mock.generate(500);
    assert_eq!(mock.settled()["delivered"], 500);
    let status = mock.webhook_is("active");
    assert_eq!((&status["webhook_enabled"], &status["last_response_code"]), (&json!(true), &json!(200)));

    // Away for longer than the retries.
    daemon.kill9();
    mock.generate(300);
    let counts = mock.settled();
    assert_eq!((&counts["lost"], &counts["retried"]), (&json!(300), &json!(4)));
    let status = mock.webhook_is("inactive");
    assert!(status["webhook_enabled"] == true && status["last_response_code"].is_null(), "{status}");
    assert!(status["last_response_message"].as_str().unwrap().contains("cannot connect"), "{status}");

    // Back, with the keys as they were: it has to fetch the new one when its first event comes.
    let daemon = Daemon::start(&site);
    daemon.wait_until_ready();
    let before = mock.get("/mock/state")["signing_key"].clone();
    assert_ne!(mock.call("POST", "/mock/rotate-key", &Value::Null, 200)["signing_key"], before);
    let (start, end) = ("2000-01-01T00:00:00Z", "2999-01-01T00:00:00Z");
    mock.call("PUT", "/v3/audit-log-replay-job", &json!({"start_at": start, "end_at": end}), 400);
    let start = mock.get("/v3/audit-log-destinations")["data"][0]["created_at"].clone();
    let window = json!({"start_at": start, "end_at": end});
    assert_eq!(mock.call("PUT", "/v3/audit-log-replay-job", &window, 202)["status"], "accepted");
    wait_until("the replay job is completed", || match mock.get("/v3/audit-log-replay-job") {
        job if job["status"] == "completed" => Ok(()),
        job => Err(job.to_string()),
    });
    mock.webhook_is("active");
    mock.generate(200);
    let counts = mock.settled();
    let numbers = ["generated", "delivered", "lost", "replayed", "kept"].map(|name| counts[name].as_u64());
    assert_eq!(numbers, [1000, 700, 300, 800, 1000].map(Some), "{counts}");

    daemon.settle();
    let lines = unsigned(&site);
    assert_eq!(lines.len(), 1000);
    assert!(lines.windows(2).all(|pair| pair[0] != pair[1]), "an event came twice");
    assert_eq!(site.read("quarantine.jsonl"), b"");
    daemon.terminate();
}

#[test]
fn events_flow_by_themselves_over_tls_and_end_with_sigterm() {
    let site = Site::new();
    let ca = site.path("ca.pem");
    let mut mock = Mock::start(&["--rate", "500", "--ca", ca.to_str().unwrap(), "--portal", "p1"]);
    let keys = format!("jwks = {{ url = \"{}\" }}", mock.keys());
    let site = site.sources(&source("us", PATH, &keys));
    let daemon = Daemon::start(&site);
    let port = daemon.address.port();
    mock.connect(&format!("https://localhost:{port}{PATH}"));
    // The portal's log has a webhook of its own, to the same destination.
    let id = mock.get("/v3/audit-log-webhook")["audit_log_destination_id"].clone();
    let binding = json!({"audit_log_destination_id": id, "enabled": true});
    mock.call("PATCH", "/v3/portals/p1/audit-log-webhook", &binding, 200);
    wait_until("events of both logs are written", || {
        let lines = site.read("verified.log");
        let text = String::from_utf8_lossy(&lines).into_owned();
        let is_there = text.contains("|KongInc|Konnect|") && text.contains("|KongInc|Dev-Portal|");
        if is_there && text.contains("portal_id=p1") { Ok(()) } else { Err(text) }
    });
    assert_eq!(site.read("quarantine.jsonl"), b"");
    let kill = format!("kill -TERM {}", mock.child.id());
    assert!(Command::new("sh").arg("-c").arg(kill).status().unwrap().success());
    assert_eq!(mock.child.wait().unwrap().code(), Some(0));
}
