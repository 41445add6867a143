//! The whole path of a connection's bytes: HTTP/1.1, authorisation, body, verification, ledger,
//! answer.

#![no_main]

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use auditgate::clock::Clock;
use auditgate::ingest::{DedupKey, Ingest, Ingested, Limits, Policy, Source};
use auditgate::ledger::{Backlog, CommitReceipt, Ledger, LedgerOptions, Window};
use auditgate::memory_budget::MemoryBudget;
use auditgate::receive::connection_limit::ConnectionLimit;
use auditgate::receive::request::{BodyDeadline, IN_WORK, Observer, Route, Rules, Service};
use auditgate::receive::response::Refusal;
use auditgate::receive::response_stream::{ResponseDue, ResponseStream};
use auditgate::trust::keyring::{JwksOptions, KeyRing};
use auditgate::wire::batch::Caps;
use auditgate_fuzz::{directory, key_set, oracle};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use libfuzzer_sys::{Corpus, fuzz_target};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

/// Longer than any input may take.
const MINUTE: Duration = Duration::from_secs(60);

/// The daemon, but for its sockets.
struct Stage {
    runtime: Runtime,
    service: Arc<Service>,
    connections: ConnectionLimit,
}

static STAGE: LazyLock<Stage> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let day = Duration::from_secs(86_400);
    let clock = Clock { wall: Arc::new(|| 1_767_323_045_678), steady: Arc::new(|| Duration::ZERO) };
    let backlog = Backlog { bytes: 4 << 30, quarantine_bytes: 1 << 30 };
    let window = Window { events: 8 * day, rejects: day };
    let windows: BTreeMap<String, Window> =
        ["us", "trace", "open", "off", "closed"].map(|name| (name.to_owned(), window)).into();
    let directory = directory();
    let options =
        LedgerOptions { data_dir: directory.clone(), subscriptions: Vec::new(), backlog, windows, clock };
    let (ledger, _running) = Ledger::open(options).expect("a ledger");
    let caps = Caps { decoded: 1 << 20, lines: 100 };
    let limits = Limits { caps, line: 2048, backlog: backlog.bytes };
    let options = JwksOptions { keys: Some(key_set()), ..JwksOptions::default() };
    let ring = KeyRing::new("us", options, &directory, |_| ());
    let (ring, mut fetcher) = ring.expect("a ring");
    runtime.block_on(fetcher.load_at_start(MINUTE)).expect("keys");
    let routes = [
        ("us", "/us", Policy::Require, DedupKey::Event, ""),
        ("trace", "/trace", Policy::Require, DedupKey::TraceId, ""),
        ("open", "/open", Policy::AcceptUnsigned, DedupKey::Event, ""),
        ("off", "/off", Policy::Off, DedupKey::Event, ""),
        ("closed", "/closed", Policy::Off, DedupKey::Event, "10.0.0.0/8"),
    ];
    let routes: HashMap<String, Route> = routes
        .into_iter()
        .map(|(name, path, policy, dedup_by, allow)| {
            let source = Arc::new(Source::new(name.into(), policy, dedup_by, Some(Arc::clone(&ring))));
            let authorises = Box::new(|presented: &[u8]| presented == b"Bearer abc");
            let allow = allow.parse().into_iter().collect();
            (path.to_owned(), Route { source, authorises, allow })
        })
        .collect();
    let service = Arc::new(Service {
        rules: Arc::new(Rules {
            routes,
            ingest: Ingest::new(ledger, limits),
            memory: MemoryBudget::new(64 << 20, MINUTE),
            body_limit: 16 << 10,
            body_deadline: BodyDeadline { grace: MINUTE, min_rate: 1, total: MINUTE },
            deadline: MINUTE,
            idle_timeout: MINUTE,
            proxies: Vec::new(),
        })
        .into(),
        now: Arc::new(|| 1_767_323_045_678),
        observer: Box::new(NoObserver),
        in_work: Arc::new(Semaphore::new(IN_WORK)),
    });
    Stage { runtime, service, connections: ConnectionLimit::new(512, 32) }
});

struct NoObserver;

impl Observer for NoObserver {
    fn answered(&self, source: Option<&str>, status: u16, _elapsed: Duration) {
        assert!(status < 500, "status {status} for {source:?}");
    }
    fn arrived(&self, _source: &str, _bytes: u64, _elapsed: Duration) {}
    fn committed(&self, _source: &str, batch: &Ingested, _received_at: i64) {
        assert!(batch.receipt.accepted() <= 100);
    }
    fn undecodable(&self, _source: &str, _receipt: &CommitReceipt) {}
}

fuzz_target!(|input: &[u8]| -> Corpus {
    // The bytes come in pieces of one size; 0 is all at once.
    let Some((&piece, bytes)) = input.split_first() else { return Corpus::Reject };
    let piece = if piece == 0 { bytes.len().max(1) } else { usize::from(piece) };
    let stage = &*STAGE;
    let answers = stage.runtime.block_on(converse(stage, bytes, piece));
    check(bytes, &answers);
    Corpus::Keep
});

async fn converse(stage: &Stage, bytes: &[u8], piece: usize) -> Vec<u8> {
    let (mut peer, ours) = tokio::io::duplex(64 << 10);
    let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let (permit, _evicted) = stage.connections.admit(localhost, false).await;
    let permit = Arc::new(permit);
    let response_due = ResponseDue::default();
    let service = service_fn(|request| {
        let (service, permit, response_due) =
            (Arc::clone(&stage.service), Arc::clone(&permit), response_due.clone());
        Box::pin(async move {
            permit.idle(false);
            let response = service.answer(request, &permit).await;
            response_due.answer();
            response
        })
    });
    let (refuse, taken) = (|status| stage.service.refuse(&Refusal::Head(status)), || permit.idle(true));
    let ours = ResponseStream::new(ours, MINUTE, response_due.clone(), refuse, taken);
    // As the listener does, without timeouts: the peer sends everything at once and then closes its
    // half.
    let connection = http1::Builder::new()
        .max_headers(64)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(ours), service);
    let talk = async {
        for part in bytes.chunks(piece) {
            // An early answer may end the connection.
            if peer.write_all(part).await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
        let _ = peer.shutdown().await;
        let mut answers = Vec::new();
        let _ = peer.read_to_end(&mut answers).await;
        answers
    };
    let (answers, _) = tokio::join!(talk, async { drop(connection.await) });
    answers
}

/// Checks that every answer is a documented one, and that nothing is accepted without
/// authorisation.
fn check(request: &[u8], answers: &[u8]) {
    let text = String::from_utf8_lossy(answers);
    // `HTTP/1.1` occurs in the bodies of answers too.
    let answers: Vec<(&str, &str)> = text
        .split("HTTP/1.")
        .filter_map(|answer| Some((answer.get(2..5)?, answer)))
        .filter(|(status, _)| status.bytes().all(|byte| byte.is_ascii_digit()))
        .collect();
    for &(status, answer) in &answers {
        assert!(
            ["100", "200", "400", "401", "403", "404", "405", "413", "414", "415", "431"].contains(&status),
            "{answer}"
        );
        if status == "200" {
            let asked = String::from_utf8_lossy(request).to_ascii_lowercase();
            assert!(asked.contains("authorization:") && asked.contains("bearer abc"), "{answer}");
            let body = answer.split("\r\n\r\n").nth(1).expect("a receipt");
            let receipt: serde_json::Value = serde_json::from_str(body).expect("JSON");
            let count = |name: &str| receipt[name].as_u64().expect("a number");
            let (accepted, duplicates) = (count("accepted"), count("duplicates"));
            // One request for the source that asks for signatures: nothing is accepted that is not
            // verified.
            if answers.len() == 1
                && request.starts_with(b"POST /us ")
                && let Some(body) = plain_body(request)
            {
                let verified =
                    body.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
                let verified = verified.filter(|line| oracle::is_verified(line)).count() as u64;
                assert!(
                    accepted <= verified && verified <= accepted + duplicates,
                    "{verified} verified: {answer}"
                );
            }
        }
    }
}

/// The body of a request that is simple enough to find it.
fn plain_body(request: &[u8]) -> Option<&[u8]> {
    let end = request.windows(4).position(|part| part == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&request[..end]).ok()?.to_ascii_lowercase();
    let body = &request[end + 4..];
    let is_plain = !head.contains("encoding") && !body.starts_with(b"\x1f\x8b") && !head.contains('\t');
    let length: usize =
        head.lines().filter_map(|line| line.strip_prefix("content-length: ")).next()?.parse().ok()?;
    (is_plain && head.matches("content-length").count() == 1).then(|| body.get(..length)).flatten()
}
