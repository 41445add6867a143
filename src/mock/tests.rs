use serde_json::{Value, json};

use super::log::RETENTION;
use super::*;
use crate::clock::tests::Times;
use crate::net::loopback::{Answer, Server};

const NOW: i64 = 1_767_323_045_678;

struct Api {
    mock: Arc<Mock>,
    times: Times,
    said: mpsc::UnboundedReceiver<String>,
}

impl Api {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Options)) -> Self {
        let times = Times::new(NOW);
        let (messages, said) = mpsc::unbounded_channel();
        let mut options = Options {
            token: "kpat_mock".to_owned(),
            portals: vec!["p1".to_owned()],
            key: SigningKey::from_seed(&[1; 32]),
            ca: None,
            rate: 0,
            retry: Retry { minimum: Duration::ZERO, maximum: Duration::ZERO, ..Retry::default() },
            timeout: Duration::from_secs(30),
            stays_inactive: false,
            clock: times.clock(),
            messages,
        };
        change(&mut options);
        Self { mock: Arc::new(Mock::new(options)), times, said }
    }

    fn reply(&self, request: &str, token: Option<&[u8]>, body: &str) -> Reply {
        let (method, target) = request.split_once(' ').unwrap();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let method = &method.parse().unwrap();
        self.mock.answer(&Call { method, path, query, token, body: body.as_bytes() })
    }

    /// Sends a request whose response has that status, and returns the body.
    #[track_caller]
    fn call(&self, request: &str, body: &Value, status: u16) -> Value {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let reply = self.reply(request, Some(b"kpat_mock"), &body);
        assert_eq!(reply.status, status, "{request}: {reply:?}");
        if status == 204 {
            assert_eq!((reply.content_type, &*reply.body), (None, ""));
            return Value::Null;
        }
        let value: Value = serde_json::from_str(&reply.body).unwrap();
        let is_problem = reply.content_type == Some("application/problem+json");
        assert_eq!(is_problem, status >= 400, "{request}: {reply:?}");
        if is_problem {
            assert_eq!(value["status"], status);
            for text in ["title", "instance", "detail"] {
                assert!(value[text].as_str().is_some_and(|text| !text.is_empty()), "{value}");
            }
            assert_eq!(value["invalid_parameters"].is_array(), status == 400, "{value}");
        }
        value
    }

    #[track_caller]
    fn get(&self, path: &str) -> Value {
        self.call(&format!("GET {path}"), &Value::Null, 200)
    }

    /// Sends a request that is refused for these fields.
    #[track_caller]
    fn refused(&self, request: &str, body: &Value, fields: &[&str]) {
        let problem = self.call(request, body, 400);
        let found: Vec<_> = problem["invalid_parameters"].as_array().unwrap().iter().collect();
        assert!(found.iter().all(|one| one["reason"].as_str().is_some_and(|reason| !reason.is_empty())));
        let mut names: Vec<_> = found.iter().map(|one| one["field"].as_str().unwrap()).collect();
        names.sort_unstable();
        assert_eq!(names, fields, "{request} {body}");
    }

    fn create(&self, name: &str, endpoint: &str) -> String {
        let body = json!({"name": name, "endpoint": endpoint, "log_format": "json"});
        let created = self.call("POST /v3/audit-log-destinations", &body, 201);
        created["id"].as_str().unwrap().to_owned()
    }

    /// Creates a destination and binds the organisation's webhook to it.
    fn connect(&self, endpoint: &str) {
        let id = self.create("siem", endpoint);
        let binding = json!({"audit_log_destination_id": id, "enabled": true});
        self.call("PATCH /v3/audit-log-webhook", &binding, 200);
    }

    fn generate(&self, count: u64) {
        self.call("POST /mock/events", &json!({"count": count}), 200);
    }

    fn status(&self) -> Value {
        self.get("/v3/audit-log-webhook/status")
    }

    fn counts(&self) -> Value {
        self.get("/mock/state")["organization"].clone()
    }

    /// Waits for the line about a batch that was settled.
    async fn settled(&mut self) -> String {
        loop {
            let line = self.said.recv().await.unwrap();
            if line.contains(" events to ") {
                // It is printed before it is counted.
                let waiting = |api: &Self| api.mock.state.lock().logs[0].waiting() > 0;
                while waiting(self) {
                    tokio::task::yield_now().await;
                }
                return line;
            }
        }
    }
}

const ENDPOINT: &str = "http://127.0.0.1:1/konnect/us";

#[test]
fn every_request_but_one_for_the_keys_needs_the_token() {
    let api = Api::new();
    for path in ["/v3/audit-log-destinations", "/v3/audit-log-webhook", "/mock/state", "/nothing"] {
        for token in [None, Some(&b"kpat_other"[..]), Some(b"")] {
            let reply = api.reply(&format!("GET {path}"), token, "");
            assert_eq!(reply.status, 401);
            assert_eq!(reply.content_type, Some("application/problem+json"));
        }
    }
    let reply = api.reply("GET /v2/audit-log-webhook/jwks.json", None, "");
    let keys = jwks::parse(reply.body.as_bytes(), 10).unwrap();
    assert_eq!(keys.keys.keys()[0].bytes(), &SigningKey::from_seed(&[1; 32]).public_key());
}

#[test]
fn unknown_paths_and_methods_are_refused() {
    let api = Api::new();
    for path in ["/", "/v3", "/v3/audit-log", "/v1/audit-log-webhook", "/mock/x", "/v3/portals/p1"] {
        api.call(&format!("GET {path}"), &Value::Null, 404);
    }
    api.call("GET /v3/audit-logs", &Value::Null, 501);
    for (request, allowed) in [
        ("PUT /v3/audit-log-destinations", "GET, POST"),
        ("GET /v3/audit-log-destinations/x", "PATCH"),
        ("GET /v2/audit-log-destinations/x", "DELETE"),
        ("POST /v3/audit-log-webhook", "GET, PATCH, DELETE"),
        ("POST /v3/audit-log-replay-job", "GET, PUT"),
        ("PATCH /v2/audit-log-webhook", "GET"),
        ("PUT /v3/audit-log-webhook/status", "GET"),
        ("GET /mock/events", "POST"),
        ("POST /mock/state", "GET"),
    ] {
        assert_eq!(api.reply(request, Some(b"kpat_mock"), "").allow, Some(allowed));
        api.call(request, &Value::Null, 405);
    }
}

#[test]
fn destinations_are_created_changed_and_deleted() {
    let api = Api::new();
    let body = json!({
        "name": "siem", "endpoint": ENDPOINT, "authorization": "Splunk s3cret", "log_format": "cef",
        "skip_ssl_verification": false,
    });
    let created = api.call("POST /v3/audit-log-destinations", &body, 201);
    let id = created["id"].as_str().unwrap();
    let mut expected = json!({
        "id": id, "name": "siem", "endpoint": ENDPOINT, "log_format": "cef", "skip_ssl_verification": false,
        "created_at": "2026-01-02T03:04:05.678Z", "updated_at": "2026-01-02T03:04:05.678Z",
    });
    assert_eq!(created, expected);

    let path = format!("/v3/audit-log-destinations/{id}");
    api.times.advance(1000);
    let changed = api.call(&format!("PATCH {path}"), &json!({"name": "new", "log_format": "cps"}), 200);
    expected["name"] = json!("new");
    expected["log_format"] = json!("cps");
    expected["updated_at"] = json!("2026-01-02T03:04:06.678Z");
    assert_eq!(changed, expected);
    api.call("PATCH /v3/audit-log-destinations/other", &json!({}), 404);
    assert_eq!(api.get("/v3/audit-log-destinations")["data"], json!([expected]));

    let bind = |path: &str, binding: Value| api.call(&format!("PATCH {path}"), &binding, 200);
    let delete = format!("DELETE /v2/audit-log-destinations/{id}");
    for path in ["/v3/audit-log-webhook", "/v3/portals/p1/audit-log-webhook"] {
        bind(path, json!({"audit_log_destination_id": id, "enabled": true}));
        assert_eq!(api.call(&delete, &Value::Null, 409)["detail"], "destination is in use");
        // A disabled webhook still has its destination.
        assert_eq!(bind(path, json!({}))["audit_log_destination_id"], *id);
        api.call(&delete, &Value::Null, 409);
        api.call(&format!("DELETE {path}"), &Value::Null, 204);
    }
    api.call(&delete, &Value::Null, 204);
    api.call(&delete, &Value::Null, 404);
}

#[test]
fn every_invalid_field_of_a_destination_is_named() {
    let api = Api::new();
    let post = "POST /v3/audit-log-destinations";
    api.refused(post, &json!({}), &["endpoint", "log_format", "name"]);
    let wrong = json!({
        "name": " ", "endpoint": "http://example.com/", "authorization": "a\nb", "log_format": "xml",
        "skip_ssl_verification": true, "colour": 1,
    });
    let fields = ["authorization", "colour", "endpoint", "log_format", "name", "skip_ssl_verification"];
    api.refused(post, &wrong, &fields);
    api.refused(post, &json!({"name": 1, "endpoint": ENDPOINT, "log_format": null}), &["log_format", "name"]);
    assert_eq!(api.reply(post, Some(b"kpat_mock"), "{").status, 400);
    assert_eq!(api.reply(post, Some(b"kpat_mock"), "[]").status, 400);
    let id = api.create("siem", ENDPOINT);
    api.refused(&format!("PATCH /v3/audit-log-destinations/{id}"), &json!({"endpoint": "x"}), &["endpoint"]);
}

#[test]
fn destinations_are_listed_by_name_and_in_pages() {
    let api = Api::new();
    let ids: Vec<_> = (0..5).map(|number| api.create(["a b", "c"][number % 2], ENDPOINT)).collect();
    let list = |query: &str| {
        let page = api.get(&format!("/v3/audit-log-destinations?{query}"));
        let found: Vec<_> = page["data"].as_array().unwrap().iter().map(|one| one["id"].clone()).collect();
        (found, page["meta"]["page"]["next"].as_str().map(str::to_owned))
    };
    let by_name = [&ids[0], &ids[2], &ids[4]].map(|id| json!(id)).to_vec();
    assert_eq!(list("filter%5Bname%5D%5Beq%5D=a%20b"), (by_name.clone(), None));
    let (mut found, mut next) = list("filter[name][eq]=a%20b&page[size]=2");
    assert_eq!(found.len(), 2);
    while let Some(path) = next {
        let more = list(path.split_once('?').unwrap().1);
        found.extend(more.0);
        next = more.1;
    }
    assert_eq!(found, by_name);
    for (query, field) in [
        ("page[size]=0", "page[size]"),
        ("page[size]=101", "page[size]"),
        ("page[after]=x", "page[after]"),
        ("sort=name", "sort"),
    ] {
        api.refused(&format!("GET /v3/audit-log-destinations?{query}"), &Value::Null, &[field]);
    }
}

#[test]
fn a_webhook_is_bound_and_unbound() {
    let api = Api::new();
    for path in ["/v3/audit-log-webhook", "/v3/portals/p1/audit-log-webhook"] {
        let (patch, delete) = (format!("PATCH {path}"), format!("DELETE {path}"));
        let unconfigured = json!({"webhook_enabled": false, "webhook_status": "unconfigured"});
        assert_eq!(api.get(path), json!({"enabled": false}));
        assert_eq!(api.get(&format!("{path}/status")), unconfigured);
        api.refused(&patch, &json!({"enabled": true}), &["enabled"]);
        api.refused(&patch, &json!({"audit_log_destination_id": "x"}), &["audit_log_destination_id"]);
        api.refused(&patch, &json!({"enabled": "yes", "on": 1}), &["enabled", "on"]);

        let id = api.create("siem", ENDPOINT);
        // Konnect's default.
        let bound = api.call(&patch, &json!({"audit_log_destination_id": id}), 200);
        assert_eq!(bound, json!({"audit_log_destination_id": id, "enabled": false}));
        let disabled = json!({"webhook_enabled": false, "webhook_status": "inactive"});
        assert_eq!(api.get(&format!("{path}/status")), disabled);
        let bound = api.call(&patch, &json!({"enabled": true}), 200);
        assert_eq!(bound, json!({"audit_log_destination_id": id, "enabled": true}));
        assert_eq!(api.get(path), bound);
        assert_eq!(api.get(&format!("{path}/status"))["webhook_status"], "active");
        if path.contains("portals") {
            api.call(&delete, &Value::Null, 409);
            api.call(&patch, &json!({"enabled": false}), 200);
        }
        api.call(&delete, &Value::Null, 204);
        assert_eq!(api.get(&format!("{path}/status")), unconfigured);
    }
    for request in ["GET", "PATCH", "DELETE"] {
        api.call(&format!("{request} /v3/portals/other/audit-log-webhook"), &Value::Null, 404);
    }
    api.call("GET /v3/portals/other/audit-log-webhook/status", &Value::Null, 404);
    api.call("PUT /v3/portals/other/audit-log-replay-job", &Value::Null, 404);
}

#[test]
fn the_older_form_of_the_webhook_shows_what_is_unconfigured() {
    let api = Api::new();
    let webhook = api.get("/v2/audit-log-webhook");
    assert_eq!((&webhook["endpoint"], &webhook["enabled"]), (&json!("unconfigured"), &json!(false)));
    api.connect(ENDPOINT);
    let webhook = api.get("/v2/audit-log-webhook");
    assert_eq!((&webhook["endpoint"], &webhook["log_format"]), (&json!(ENDPOINT), &json!("json")));
    assert_eq!(webhook["enabled"], true);
}

#[test]
fn a_replay_job_has_a_window_within_7_days_and_there_is_one_at_a_time() {
    let api = Api::new();
    for path in ["/v3/audit-log-replay-job", "/v3/portals/p1/audit-log-replay-job"] {
        let put = format!("PUT {path}");
        let initial = api.get(path);
        assert_eq!(
            (&initial["status"], &initial["start_at"]),
            (&json!("unconfigured"), &json!("0001-01-01T00:00:00Z"))
        );
        api.refused(&put, &json!({}), &["end_at", "start_at"]);
        let times = |start: &str, end: &str| json!({"start_at": start, "end_at": end});
        api.refused(&put, &times("yesterday", "2026-01-02"), &["end_at", "start_at"]);
        api.refused(&put, &times("2025-12-26T03:00:00Z", "2026-01-02T00:00:00Z"), &["start_at"]);
        api.refused(&put, &times("2026-01-02T00:00:00Z", "2026-01-02T00:00:00Z"), &["end_at"]);
        let window = times("2025-12-26T04:00:00+00:00", "2026-01-02T00:00:00Z");
        let job = json!({
            "start_at": "2025-12-26T04:00:00Z", "end_at": "2026-01-02T00:00:00Z", "status": "accepted",
            "updated_at": "2026-01-02T03:04:05.678Z",
        });
        assert_eq!(api.call(&put, &window, 202), job);
        assert_eq!(api.get(path), job);
        api.call(&put, &window, 409);
    }
}

#[test]
fn keys_are_published_before_they_are_used_or_at_once() {
    let api = Api::new();
    let rotate = |body: Value, status| api.call("POST /mock/rotate-key", &body, status);
    let listed = || {
        let reply = api.reply("GET /v2/audit-log-webhook/jwks.json", None, "");
        let keys = jwks::parse(reply.body.as_bytes(), 10).unwrap().keys;
        keys.keys().iter().map(|key| key.id().to_owned()).collect::<Vec<_>>()
    };
    let first = listed();
    rotate(json!({"step": "use"}), 409);
    let state = rotate(json!({"step": "publish"}), 200);
    assert_eq!(state["signing_key"], first[0]);
    let both = listed();
    assert_eq!((json!(both), both.len(), &both[0]), (state["published_keys"].clone(), 2, &first[0]));
    let state = rotate(json!({"step": "use"}), 200);
    assert_eq!((listed(), &state["signing_key"]), (vec![both[1].clone()], &json!(both[1])));
    rotate(Value::Null, 200);
    assert!(listed().len() == 1 && listed()[0] != both[1]);
    rotate(json!({"step": "x"}), 400);
}

#[test]
fn events_are_kept_for_7_days() {
    let api = Api::new();
    api.generate(10);
    api.times.advance(RETENTION + 1);
    api.generate(3);
    // The events of a request have the time of its first one.
    assert!((1..=5).contains(&api.counts()["kept"].as_u64().unwrap()), "{}", api.counts());
    assert_eq!(api.counts()["generated"], 13);
    api.refused("POST /mock/events", &json!({"count": 100_001, "portal": "x"}), &["count", "portal"]);
}

#[tokio::test]
async fn a_refused_batch_is_lost_and_one_that_fails_is_repeated_four_times() {
    let mut api = Api::new();
    let server = Server::start(Answer::status(400)).await;
    let _tasks = delivery::start(&api.mock);
    // Before the webhook is bound: for a replay only.
    api.generate(5);
    api.connect(&server.endpoint().to_string());
    api.generate(2);
    assert!(api.settled().await.contains("lost"));
    assert_eq!(server.requests(), 1, "a 400 is not repeated");
    let status = api.status();
    assert_eq!((&status["webhook_status"], &status["last_response_code"]), (&json!("inactive"), &json!(400)));
    assert_eq!(status["last_attempt_at"], "2026-01-02T03:04:05.678Z");
    assert_eq!(status["webhook_enabled"], true);

    server.answer(Answer::status(500));
    api.generate(3);
    api.settled().await;
    assert_eq!(server.requests(), 6);
    assert_eq!(api.status()["last_response_code"], 500);

    // It tries the next batch, and is active again.
    server.answer(Answer::ok(""));
    api.generate(4);
    api.settled().await;
    let request = server.last_request();
    assert!(request.contains("content-encoding: application/gzip"), "{request}");
    let status = api.status();
    assert_eq!(
        (&status["webhook_status"], &status["last_response_message"]),
        (&json!("active"), &json!("OK"))
    );
    let counts = api.counts();
    let numbers = ["generated", "delivered", "lost", "retried"].map(|name| counts[name].as_u64().unwrap());
    assert_eq!(numbers, [14, 4, 5, 4]);
}

#[tokio::test]
async fn a_webhook_can_stay_inactive_until_it_is_enabled() {
    let mut api = Api::with(|options| options.stays_inactive = true);
    let server = Server::start(Answer::status(401)).await;
    let _tasks = delivery::start(&api.mock);
    api.connect(&server.endpoint().to_string());
    api.generate(1);
    api.settled().await;
    server.answer(Answer::ok(""));
    api.generate(7);
    assert_eq!(api.counts()["waiting"], 0);
    assert_eq!(api.status()["webhook_status"], "inactive");
    api.call("PATCH /v3/audit-log-webhook", &json!({"enabled": true}), 200);
    assert_eq!(api.status()["webhook_status"], "active");
    api.generate(1);
    api.settled().await;
    assert_eq!((api.counts()["delivered"].clone(), server.requests()), (json!(1), 2));

    api.call("POST /mock/webhook", &json!({"status": "inactive"}), 200);
    assert_eq!(api.status()["webhook_status"], "inactive");
    api.refused("POST /mock/webhook", &json!({"status": "active"}), &["status"]);
}

#[tokio::test]
async fn a_replay_job_sends_its_window_or_fails() {
    let mut api = Api::new();
    let server = Server::start(Answer::ok("")).await;
    let _tasks = delivery::start(&api.mock);
    api.generate(900);
    api.times.advance(10_000);
    api.generate(300);
    let replay = async |api: &mut Api| {
        let window = json!({"start_at": "2026-01-02T03:04:00Z", "end_at": "2026-01-02T03:04:10Z"});
        api.call("PUT /v3/audit-log-replay-job", &window, 202);
        loop {
            let job = api.get("/v3/audit-log-replay-job");
            match job["status"].as_str().unwrap() {
                "accepted" | "running" => tokio::task::yield_now().await,
                status => break status.to_owned(),
            }
        }
    };
    assert_eq!(replay(&mut api).await, "failed", "there is no webhook");
    api.connect(&server.endpoint().to_string());
    assert_eq!(replay(&mut api).await, "completed");
    // Up to two events after the clock was advanced belong to a request before it.
    let counts = api.counts();
    assert!((900..=902).contains(&counts["replayed"].as_u64().unwrap()), "{counts}");
    assert_eq!((counts["delivered"].clone(), server.requests()), (json!(0), 5));
    server.answer(Answer::status(404));
    assert_eq!(replay(&mut api).await, "failed");
    assert_eq!(server.requests(), 6, "it ends with the first batch that is lost");
}

#[tokio::test]
async fn answers_are_late_or_wrong_when_that_was_asked_for() {
    let api = Api::new();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", socket.local_addr().unwrap());
    let mock = Arc::clone(&api.mock);
    let answer: admin::Answer = Arc::new(move |_, request| {
        let mock = Arc::clone(&mock);
        Box::pin(async move { Ok(mock.respond(request).await) })
    });
    let (_end, ends) = watch::channel(false);
    tokio::spawn(admin::serve_answers(admin::Socket::Tcp(socket), answer, ends));
    let keys: Endpoint = format!("{url}/v2/audit-log-webhook/jwks.json").parse().unwrap();
    let client = Client::for_endpoint(&keys, None).unwrap();
    let timeout = Duration::from_secs(30);
    let fetch = async || client.get(&keys, &[], 10_000, timeout).await.unwrap();

    api.call("POST /mock/answers", &json!({"status": 503, "times": 2}), 200);
    for _ in 0..2 {
        assert_eq!(fetch().await.status, 503);
    }
    let good = fetch().await;
    assert_eq!(good.status, 200);
    assert_eq!(good.headers["content-type"], "application/json");
    api.call("POST /mock/answers", &json!({"body": "<html>"}), 200);
    let wrong = fetch().await;
    assert_eq!((wrong.status, &wrong.body[..]), (200, &b"<html>"[..]));
    api.call("POST /mock/answers", &json!({"delay_ms": 50}), 200);
    let begun = std::time::Instant::now();
    assert_eq!(fetch().await.body, good.body);
    assert!(begun.elapsed() >= Duration::from_millis(50));
    api.refused("POST /mock/answers", &json!({"status": 100, "delay_ms": 50_001}), &["delay_ms", "status"]);
    // What is not under `/mock/` and longer than a request may be.
    let destinations: Endpoint = format!("{url}/v3/audit-log-destinations").parse().unwrap();
    let long = vec![b' '; MAX_BODY_BYTES + 1];
    assert_eq!(client.post(&destinations, &[], long.into(), 10_000, timeout).await.unwrap().status, 400);
}
