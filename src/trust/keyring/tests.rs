//! Tests of a key ring with servers that work and servers that fail.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex as StdMutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::net::Endpoint;
use crate::net::loopback::{Answer, Server};
use crate::secret::Secret;
use crate::trust::jwks::tests::{document_of, public_key};
use crate::trust::jwks::{self, MAX_KEPT_KEYS};

const TIMEOUT: Duration = Duration::from_secs(20);

fn from(endpoint: Endpoint) -> JwksOptions {
    JwksOptions { url: Some(endpoint), ..JwksOptions::default() }
}

/// A ring, the events that its observer received, and the time of its clock.
struct Watched {
    ring: Arc<KeyRing>,
    fetcher: Fetcher,
    seen: Arc<StdMutex<Vec<Refresh>>>,
    now: Arc<AtomicU64>,
}

impl Watched {
    fn new(options: JwksOptions, data_dir: &Path) -> Watched {
        let seen = Arc::new(StdMutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let ring = KeyRing::new("us", options, data_dir, move |event| sink.lock().unwrap().push(event));
        let (ring, mut fetcher) = ring.unwrap();
        let now = Arc::new(AtomicU64::new(1_800_000_000));
        let clock = Arc::clone(&now);
        fetcher.now = Box::new(move || clock.load(Ordering::SeqCst));
        Watched { ring, fetcher, seen, now }
    }

    fn url(endpoint: Endpoint, data_dir: &Path) -> Watched {
        Watched::new(from(endpoint), data_dir)
    }

    fn ids(&self) -> Vec<String> {
        self.ring
            .current()
            .map(|set| set.keys().iter().map(|key| key.id().to_owned()).collect())
            .unwrap_or_default()
    }

    fn last_event(&self) -> Refresh {
        *self.seen.lock().unwrap().last().unwrap()
    }
}

#[tokio::test]
async fn keys_are_fetched_and_cached_in_a_private_file() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::ok(&document_of(&[1, 2]))).await;
    let mut watched = Watched::url(server.endpoint(), dir.path());
    assert!(watched.ring.current().is_none());
    watched.fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert_eq!(watched.ids(), ["k1", "k2"]);
    assert!(
        matches!(watched.last_event(), Refresh::Loaded { keys: 2, retired: 0, changed: false, unix_seconds } if unix_seconds > 0)
    );
    let request = server.last_request();
    assert!(request.contains("accept: application/jwk-set+json, application/json\r\n"), "{request}");
    assert!(!request.contains("authorization"), "{request}");

    let cache = dir.path().join("jwks/us.json");
    assert_eq!(fs::metadata(&cache).unwrap().permissions().mode() & 0o777, 0o600);
    let remembered = jwks::parse(&fs::read(&cache).unwrap(), MAX_KEPT_KEYS).unwrap().keys;
    assert_eq!(remembered, *watched.ring.current().unwrap());
    assert_eq!(fs::read_dir(dir.path().join("jwks")).unwrap().count(), 1);
}

#[tokio::test]
async fn the_token_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::ok(&document_of(&[1]))).await;
    let token = Some(Secret::new(b"kpat_secret".to_vec()).unwrap());
    let options = JwksOptions { token, ..from(server.endpoint()) };
    assert!(!format!("{options:?}").contains("secret"));
    Watched::new(options, dir.path()).fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert!(server.last_request().contains("authorization: Bearer kpat_secret\r\n"));
}

#[tokio::test]
async fn the_cache_is_used_when_the_server_is_down() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::ok(&document_of(&[1]))).await;
    Watched::url(server.endpoint(), dir.path()).fetcher.load_at_start(TIMEOUT).await.unwrap();

    server.answer(Answer::status(503));
    let mut restarted = Watched::url(server.endpoint(), dir.path());
    restarted.fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert_eq!(restarted.ids(), ["k1"]);
    assert_eq!(*restarted.seen.lock().unwrap(), [Refresh::Remembered { keys: 1, retired: 0 }]);

    server.answer(Answer::ok(&document_of(&[1, 3])));
    assert!(restarted.fetcher.refresh(TIMEOUT).await.unwrap());
    assert_eq!(restarted.ids(), ["k1", "k3"]);
}

#[tokio::test]
async fn the_cache_of_another_url_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::ok(&document_of(&[1]))).await;
    Watched::url(server.endpoint(), dir.path()).fetcher.load_at_start(TIMEOUT).await.unwrap();
    let mut other = Watched::url(Server::refusing(), dir.path());
    other.fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert!(other.ring.current().is_none());
}

#[tokio::test]
async fn without_server_and_cache_the_ring_stays_empty_and_recovers() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::status(500)).await;
    let mut watched = Watched::url(server.endpoint(), dir.path());
    watched.fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert!(watched.ring.current().is_none());
    let failure = watched.ring.failure().unwrap();
    assert!(failure.error.contains("status 500") && failure.unix_seconds > 0, "{failure:?}");
    assert_eq!(*watched.seen.lock().unwrap(), [Refresh::Failed]);
    server.answer(Answer::ok(&document_of(&[1])));
    assert!(watched.fetcher.refresh(TIMEOUT).await.unwrap());
    assert_eq!(watched.ring.failure(), None);
    assert_eq!(watched.ids(), ["k1"]);
}

#[tokio::test]
async fn a_corrupt_cache_is_ignored_and_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("jwks/us.json");
    fs::create_dir(dir.path().join("jwks")).unwrap();
    let huge = " ".repeat(DOCUMENT_LIMIT_BYTES + 1);
    for corrupt in ["", "{\"keys\":[", "\0\0\0", &document_of(&[1]), &huge] {
        fs::write(&cache, corrupt).unwrap();
        let server = Server::start(Answer::status(500)).await;
        let mut watched = Watched::url(server.endpoint(), dir.path());
        watched.fetcher.load_at_start(TIMEOUT).await.unwrap();
        assert!(watched.ring.current().is_none());
        server.answer(Answer::ok(&document_of(&[1])));
        watched.fetcher.refresh(TIMEOUT).await.unwrap();
        assert!(jwks::parse(&fs::read(&cache).unwrap(), 1).is_ok());
    }
}

#[tokio::test]
async fn a_cache_that_cannot_be_written_is_not_fatal() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("jwks"), "a file where the folder should be").unwrap();
    let server = Server::start(Answer::ok(&document_of(&[1]))).await;
    let mut watched = Watched::url(server.endpoint(), dir.path());
    watched.fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert_eq!(watched.ids(), ["k1"]);
}

#[tokio::test]
async fn no_bad_answer_costs_a_known_key() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::ok(&document_of(&[1]))).await;
    let mut watched = Watched::url(server.endpoint(), dir.path());
    watched.fetcher.load_at_start(TIMEOUT).await.unwrap();
    let cached = fs::read(dir.path().join("jwks/us.json")).unwrap();
    let bad = [
        (Answer::status(500), "status 500"),
        (Answer::status(401), "a token may be needed"),
        (Answer::status(204), "status 204"),
        (Answer::status(304), "it was not asked that"),
        (Answer::redirect(&server.endpoint().to_string()), "name the final url"),
        (Answer::ok(""), "is not JSON"),
        (Answer::ok("<html>"), "is not JSON"),
        (Answer::ok(r#"{"keys":[]}"#), "no usable Ed25519 key"),
        (Answer::ok(r#"{"keys":[{"kty":"RSA"}]}"#), "not OKP"),
        (Answer::raw("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{\"keys\""), "interrupted"),
        (Answer::raw("nonsense"), "cannot fetch keys"),
        (Answer::Endless, "longer than 1048576 bytes"),
    ];
    let count = bad.len();
    for (answer, said) in bad {
        server.answer(answer);
        let error = watched.fetcher.refresh(TIMEOUT).await.unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
        assert!(error.contains(&server.endpoint().to_string()), "{error}");
    }
    for silent in [Answer::Silence, Answer::Stalled] {
        server.answer(silent);
        let error = watched.fetcher.refresh(Duration::from_millis(30)).await.unwrap_err();
        assert!(error.to_string().contains("did not answer within"), "{error}");
    }
    assert_eq!(watched.ids(), ["k1"]);
    assert_eq!(fs::read(dir.path().join("jwks/us.json")).unwrap(), cached);
    let failures = watched.seen.lock().unwrap().iter().filter(|event| **event == Refresh::Failed).count();
    assert_eq!(failures, count + 2);
}

#[tokio::test]
async fn a_published_private_key_is_neither_used_nor_stored() {
    let dir = tempfile::tempdir().unwrap();
    let leaked = document_of(&[1, 2]).replacen("\"kty\"", "\"d\":\"c2VjcmV0\",\"kty\"", 1);
    let server = Server::start(Answer::ok(&leaked)).await;
    let mut watched = Watched::url(server.endpoint(), dir.path());
    watched.fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert_eq!(watched.ids(), ["k2"]);
    assert!(!fs::read_to_string(dir.path().join("jwks/us.json")).unwrap().contains("c2VjcmV0"));
}

#[tokio::test]
async fn an_unchanged_document_is_no_change() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::ok(&document_of(&[1]))).await;
    let mut watched = Watched::url(server.endpoint(), dir.path());
    assert!(watched.fetcher.refresh(TIMEOUT).await.unwrap());
    assert!(!watched.fetcher.refresh(TIMEOUT).await.unwrap());
    assert_eq!(watched.seen.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn a_file_must_load_at_the_start_and_keeps_its_keys_when_it_becomes_invalid() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("jwks.json");
    let mut watched =
        Watched::new(JwksOptions { file: Some(path.clone()), ..JwksOptions::default() }, dir.path());
    let error = watched.fetcher.load_at_start(TIMEOUT).await.unwrap_err();
    assert!(error.to_string().contains("jwks.json"), "{error}");
    fs::write(&path, "{}").unwrap();
    let error = watched.fetcher.load_at_start(TIMEOUT).await.unwrap_err();
    assert!(matches!(error, KeyRingError::FileDocument { .. }), "{error}");
    assert!(error.to_string().contains("jwks.json"), "{error}");

    fs::write(&path, document_of(&[1])).unwrap();
    watched.fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert_eq!(watched.ids(), ["k1"]);
    for bad in [String::new(), document_of(&[]), " ".repeat(DOCUMENT_LIMIT_BYTES + 1)] {
        fs::write(&path, bad).unwrap();
        assert!(watched.fetcher.refresh(TIMEOUT).await.is_err());
    }
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let error = watched.fetcher.refresh(TIMEOUT).await.unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
    assert_eq!(watched.ids(), ["k1"]);
    fs::remove_dir(&path).unwrap();
    fs::write(&path, document_of(&[2])).unwrap();
    assert!(watched.fetcher.refresh(TIMEOUT).await.unwrap());
    assert_eq!(watched.ids(), ["k2", "k1"], "a key that was taken out of a file is retired");
}

#[tokio::test]
async fn a_rotation_costs_no_key_and_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::ok(&document_of(&[1]))).await;
    let mut watched = Watched::url(server.endpoint(), dir.path());
    watched.fetcher.load_at_start(TIMEOUT).await.unwrap();
    for (listed, trusted, retired) in
        [(&[1, 2][..], &["k1", "k2"][..], 0), (&[2], &["k2", "k1"], 1), (&[3], &["k3", "k2", "k1"], 2)]
    {
        server.answer(Answer::ok(&document_of(listed)));
        watched.now.fetch_add(60, Ordering::SeqCst);
        assert!(watched.fetcher.refresh(TIMEOUT).await.unwrap());
        assert_eq!(watched.ids(), trusted);
        let unix_seconds = watched.now.load(Ordering::SeqCst);
        let loaded = Refresh::Loaded { keys: trusted.len(), retired, changed: true, unix_seconds };
        assert_eq!(watched.last_event(), loaded);
    }
    let mut restarted = Watched::url(server.endpoint(), dir.path());
    server.answer(Answer::status(500));
    restarted.now.store(1_800_000_100, Ordering::SeqCst);
    restarted.fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert_eq!(restarted.ids(), ["k3", "k2", "k1"]);
    let remembered = dir.path().join("jwks/us.json");
    assert_eq!(read_file(&remembered, MAX_KEPT_KEYS).unwrap().keys, *restarted.ring.current().unwrap());

    // The first key left the set a minute before the second one.
    let end = 1_800_000_120 + 8 * 86_400;
    for (now, trusted) in [(end - 1, &["k3", "k2", "k1"][..]), (end, &["k3", "k2"]), (end + 60, &["k3"])] {
        restarted.now.store(now, Ordering::SeqCst);
        restarted.fetcher.expire();
        assert_eq!(restarted.ids(), trusted);
    }
    assert_eq!(restarted.last_event(), Refresh::Expired { keys: 1, retired: 0 });
    assert_eq!(read_file(&remembered, MAX_KEPT_KEYS).unwrap().keys.keys().len(), 3);
}

#[tokio::test]
async fn a_revoked_key_ends_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::ok(&document_of(&[1]))).await;
    let mut watched = Watched::url(server.endpoint(), dir.path());
    watched.fetcher.load_at_start(TIMEOUT).await.unwrap();
    server.answer(Answer::ok(&document_of(&[2, 3])));
    watched.fetcher.refresh(TIMEOUT).await.unwrap();
    let revoked = vec![jwks::thumbprint(&public_key(1)), jwks::thumbprint(&public_key(3))];
    let options = JwksOptions { revoked, ..from(server.endpoint()) };
    let mut restarted = Watched::new(options.clone(), dir.path());
    restarted.fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert_eq!(restarted.ids(), ["k2"], "neither the retired nor the listed one");
    assert!(restarted.fetcher.refresh(TIMEOUT).await.is_ok());
    assert_eq!(restarted.ids(), ["k2"]);
    server.answer(Answer::ok(&document_of(&[3])));
    let mut another = Watched::new(options, &dir.path().join("another"));
    another.fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert!(another.ring.current().is_none());
}

#[tokio::test]
async fn only_pinned_keys_count() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::ok(&document_of(&[1, 2, 3]))).await;
    // A pin is a thumbprint; the `kid` does not count.
    let pin = vec!["k1".to_owned(), jwks::thumbprint(&public_key(2)), jwks::thumbprint(&public_key(3))];
    let mut watched = Watched::new(JwksOptions { pin, ..from(server.endpoint()) }, dir.path());
    watched.fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert_eq!(watched.ids(), ["k2", "k3"]);
    server.answer(Answer::ok(&document_of(&[4])));
    let error = watched.fetcher.refresh(TIMEOUT).await.unwrap_err().to_string();
    assert!(error.contains("is pinned") && error.contains(&jwks::thumbprint(&public_key(4))), "{error}");
    assert_eq!(watched.ids(), ["k2", "k3"]);
    let impostor = jwks::document(&[(Some(jwks::thumbprint(&public_key(2))), public_key(9))]);
    server.answer(Answer::ok(&impostor));
    assert!(watched.fetcher.refresh(TIMEOUT).await.unwrap_err().to_string().contains("is pinned"));
    assert_eq!(watched.ids(), ["k2", "k3"]);
    let keys = Some(jwks::parse(document_of(&[5]).as_bytes(), 1).unwrap().keys);
    let mut fixed = Watched::new(JwksOptions { keys, ..JwksOptions::default() }, &dir.path().join("fixed"));
    fixed.fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert_eq!(fixed.ids(), ["k5"]);
    assert_eq!(fixed.ring.look_again(Instant::now(), false).await, RefreshOutcome::Known);
    assert!(!dir.path().join("fixed").exists());
}

#[tokio::test]
async fn a_document_that_has_not_changed_is_not_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let tagged =
        |seeds: &[u8]| Answer::ok_with("etag: \"v1\"\r\ncache-control: max-age=90\r\n", &document_of(seeds));
    let server = Server::start(tagged(&[1])).await;
    let mut watched = Watched::url(server.endpoint(), dir.path());
    watched.fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert!(!server.last_request().contains("if-none-match"));
    assert_eq!(watched.fetcher.max_age, Some(Duration::from_secs(90)));
    server.answer(Answer::status(304));
    watched.now.fetch_add(60, Ordering::SeqCst);
    assert!(!watched.fetcher.refresh(TIMEOUT).await.unwrap());
    assert!(server.last_request().contains("if-none-match: \"v1\"\r\n"), "{}", server.last_request());
    assert_eq!(watched.fetcher.history.keys()[0].last_seen, 1_800_000_060);
    // Without remembered keys the request has no entity tag.
    let mut another = Watched::url(server.endpoint(), &dir.path().join("another"));
    another.fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert!(another.ring.current().is_none());
    assert!(!server.last_request().contains("if-none-match"));
}

#[tokio::test]
async fn a_new_ring_asks_for_the_whole_document() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::ok_with("etag: \"v1\"\r\n", &document_of(&[1, 2]))).await;
    let pinning = |pins: &[u8]| {
        let pin = pins.iter().map(|seed| jwks::thumbprint(&public_key(*seed))).collect();
        Watched::new(JwksOptions { pin, ..from(server.endpoint()) }, dir.path())
    };
    for (pins, trusted) in
        [(&[1][..], &["k1"][..]), (&[1, 2], &["k1", "k2"]), (&[2], &["k2"]), (&[], &["k1", "k2"])]
    {
        let mut watched = pinning(pins);
        watched.fetcher.load_at_start(TIMEOUT).await.unwrap();
        watched.fetcher.refresh(TIMEOUT).await.unwrap();
        assert_eq!(watched.ids(), trusted);
        // The same document may have keys that the previous ring did not trust.
        let mut restarted = pinning(pins);
        restarted.fetcher.load_at_start(TIMEOUT).await.unwrap();
        restarted.fetcher.refresh(TIMEOUT).await.unwrap();
        assert!(!server.last_request().contains("if-none-match"), "{}", server.last_request());
    }
    // A cache that an earlier release wrote has the entity tag.
    let memory = dir.path().join("jwks/us.json");
    let mut remembered: serde_json::Value = serde_json::from_slice(&fs::read(&memory).unwrap()).unwrap();
    remembered["etag"] = "\"v1\"".into();
    fs::write(&memory, remembered.to_string()).unwrap();
    let mut updated = pinning(&[]);
    updated.fetcher.load_at_start(TIMEOUT).await.unwrap();
    assert_eq!(updated.ids(), ["k1", "k2"]);
    updated.fetcher.refresh(TIMEOUT).await.unwrap();
    assert!(!server.last_request().contains("if-none-match"), "{}", server.last_request());
}

impl Watched {
    /// Loads the keys and keeps them fresh. Returns the ring, and the sender that ends this when it
    /// is dropped.
    async fn run(mut self) -> (Arc<KeyRing>, watch::Sender<bool>) {
        self.fetcher.load_at_start(TIMEOUT).await.unwrap();
        let (stop, shutdown) = watch::channel(false);
        tokio::spawn(self.fetcher.run(shutdown));
        (self.ring, stop)
    }
}

fn ids(ring: &KeyRing) -> Vec<String> {
    ring.current().unwrap().keys().iter().map(|key| key.id().to_owned()).collect()
}

/// Checks that twenty batches that arrive together and need a new key all get an answer.
async fn assert_twenty_batches_learn_of_it(ring: &Arc<KeyRing>) {
    let since = Instant::now();
    let asking = (0..20).map(|_| {
        let ring = Arc::clone(ring);
        tokio::spawn(async move { ring.look_again(since, false).await })
    });
    for asked in asking.collect::<Vec<_>>() {
        assert_eq!(asked.await.unwrap(), RefreshOutcome::Known);
    }
}

#[tokio::test]
async fn batches_that_wait_for_a_new_key_share_one_fetch() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::ok(&document_of(&[1]))).await;
    let (ring, _stop) = Watched::url(server.endpoint(), dir.path()).run().await;
    server.answer(Answer::ok(&document_of(&[1, 2])));
    assert_twenty_batches_learn_of_it(&ring).await;
    assert_eq!(server.requests(), 2);
    assert_eq!(ids(&ring), ["k1", "k2"]);
    // The fetch found a new key, so the next one need not wait.
    server.answer(Answer::status(500));
    let begun = Instant::now();
    assert_eq!(ring.look_again(begun, false).await, RefreshOutcome::Unavailable);
    assert!(begun.elapsed() < DEMAND_INTERVAL);
    assert_eq!(server.requests(), 3);
    assert_eq!(ids(&ring), ["k1", "k2"]);
}

#[tokio::test]
async fn a_batch_is_never_judged_finally_by_an_earlier_answer() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::ok(&document_of(&[1]))).await;
    let (ring, _stop) = Watched::url(server.endpoint(), dir.path()).run().await;
    // An earlier batch with an unknown signature.
    assert_eq!(ring.look_again(Instant::now(), false).await, RefreshOutcome::Known);
    let requests = server.requests();
    server.answer(Answer::ok(&document_of(&[1, 2])));
    assert_twenty_batches_learn_of_it(&ring).await;
    assert_eq!(server.requests(), requests + 1, "one fetch for all waiting batches");
    assert_eq!(ids(&ring), ["k1", "k2"]);
}

#[tokio::test]
async fn a_batch_with_known_signatures_accepts_a_recent_answer() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::ok(&document_of(&[1]))).await;
    let (ring, _stop) = Watched::url(server.endpoint(), dir.path()).run().await;
    let begun = Instant::now();
    // The keys that were loaded at the start count as new.
    for _ in 0..20 {
        assert_eq!(ring.look_again(Instant::now(), true).await, RefreshOutcome::Known);
    }
    assert!(begun.elapsed() < DEMAND_INTERVAL);
    assert_eq!(server.requests(), 2);
    // A batch without known signatures needs an answer of its own.
    let since = Instant::now();
    assert_eq!(ring.look_again(since, false).await, RefreshOutcome::Known);
    assert_eq!(server.requests(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_slow_refresh_delays_a_batch_only_briefly() {
    let dir = tempfile::tempdir().unwrap();
    // Without its fetcher the ring gets no answer.
    let watched = Watched::url(Server::refusing(), dir.path());
    let looking = watched.ring.look_again(Instant::now(), false);
    assert_eq!(tokio::time::timeout(LONGEST_LOOK * 2, looking).await, Ok(RefreshOutcome::Unavailable));
}

#[tokio::test]
async fn a_refresh_can_be_requested_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::ok(&document_of(&[1]))).await;
    let (ring, _stop) = Watched::url(server.endpoint(), dir.path()).run().await;
    server.answer(Answer::ok(&document_of(&[2])));
    ring.refresh_soon();
    server.has_received(2).await;
}

#[tokio::test]
async fn refreshing_survives_failures_and_ends_at_shutdown() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(Answer::status(500)).await;
    let mut watched = Watched::url(server.endpoint(), dir.path());
    watched.fetcher.load_at_start(TIMEOUT).await.unwrap();
    let (stop, shutdown) = watch::channel(false);
    let asked = Arc::new(StdMutex::new(Vec::new()));
    let noted = Arc::clone(&asked);
    let Watched { ring, fetcher, .. } = watched;
    let task = tokio::spawn(fetcher.run_with(shutdown, move |failures, _| {
        noted.lock().unwrap().push(failures);
        Duration::ZERO
    }));
    server.has_received(4).await;
    server.answer(Answer::ok(&document_of(&[1])));
    while ring.current().is_none() {
        tokio::task::yield_now().await;
    }
    // The server stops answering: the pending fetch is cancelled.
    server.answer(Answer::Silence);
    server.has_received(server.requests() + 1).await;
    stop.send(true).unwrap();
    task.await.unwrap();
    assert_eq!(ids(&ring), ["k1"]);
    assert_eq!(asked.lock().unwrap()[..3], [1, 2, 3]);
}

#[tokio::test]
async fn refreshing_ends_when_its_stop_channel_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let watched = Watched::url(Server::refusing(), dir.path());
    let (stop, shutdown) = watch::channel(false);
    let task = tokio::spawn(watched.fetcher.run(shutdown));
    drop(stop);
    task.await.unwrap();
}

#[test]
fn the_pause_between_refreshes_is_jittered_and_backs_off() {
    let (second, hour) = (Duration::from_secs(1), Duration::from_secs(3600));
    assert_eq!(pause(hour, 0, 0.0), hour.mul_f64(0.9));
    assert_eq!(pause(hour, 0, 0.5), hour);
    assert_eq!(pause(hour, 0, 1.0), hour.mul_f64(1.1));
    let after: Vec<_> =
        [1, 2, 3, 6, 7, 8, u32::MAX].map(|failures| pause(hour, failures, 1.0).as_secs()).into();
    assert_eq!(after, [1, 2, 4, 32, 60, 60, 60]);
    assert_eq!(pause(hour, 1, 0.0), second / 2);
    assert_eq!(pause(second * 5, 10, 1.0), second * 5);
    assert!(pause(Duration::ZERO, 0, 0.0) >= second.mul_f64(0.9));
    assert!(pause(Duration::MAX, 0, 1.0) > hour);
}
