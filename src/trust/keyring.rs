//! One source's keys over time: loaded at start, kept fresh, remembered on disk.
//!
//! The rule throughout: a failure never costs a known key. Whatever goes wrong with a fetch, a file
//! or the cache, the keys that were last good stay in use, and only a whole, well-formed document
//! with at least one usable key replaces them.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use tokio::sync::{Mutex, watch};
use tracing::{debug, info, warn};

use super::jwks::{self, JwksError, Key, KeySet, Parsed, RefusedKey};
use crate::net::{Client, ClientError, Endpoint, HeaderName, HeaderValue, TlsError, header};

/// A longer document, fetched or from a file, is refused.
pub const DOCUMENT_LIMIT_BYTES: usize = 1 << 20;

/// How long a refresh may take. At start, where the daemon waits for it, the caller says.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a key file is read again; local and small, so more often than a URL.
const FILE_REFRESH: Duration = Duration::from_secs(60);
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
const SHORTEST_REFRESH: Duration = Duration::from_secs(1);
const LONGEST_REFRESH: Duration = Duration::from_secs(365 * 24 * 3600);
const ACCEPT: HeaderValue = HeaderValue::from_static("application/jwk-set+json, application/json");

/// Where a source's keys come from.
#[derive(Clone, Debug)]
pub enum Origin {
    /// A JWKS document on this machine, read again every minute.
    File(PathBuf),
    /// A JWKS document at a URL.
    Url {
        /// Where.
        endpoint: Endpoint,
        /// How often to fetch it again; from one second to a year, otherwise the nearer of these.
        refresh: Duration,
        /// A PEM file with the only authorities to trust; without it, the system's.
        ca: Option<PathBuf>,
        /// The `Authorization` header's value: see [`crate::net::bearer`].
        token: Option<HeaderValue>,
    },
}

/// What happened to the keys, for whoever counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refresh {
    /// The origin gave a good document, changed or not.
    Loaded {
        /// How many keys are in use now.
        keys: usize,
        /// When, in seconds since the Unix epoch.
        unix_seconds: u64,
    },
    /// At start the origin gave nothing, and the cache on disk stepped in.
    Cached {
        /// How many keys are in use now.
        keys: usize,
    },
    /// The origin gave no good document; the keys in use, if any, stay.
    Failed,
}

/// Why an origin gives no keys. Names the file or URL.
#[derive(Debug, thiserror::Error)]
pub enum KeyRingError {
    /// The TLS client cannot be set up; the operator's to mend.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The file cannot be read, is no regular file, or is longer than [`DOCUMENT_LIMIT_BYTES`].
    #[error("cannot read the key file {path}: {cause}")]
    File {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        cause: io::Error,
    },
    /// The file has no usable key.
    #[error("cannot use the key file {path}: {cause}")]
    FileDocument {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: JwksError,
    },
    /// No whole answer came.
    #[error("cannot fetch keys from {url}: {cause}")]
    Fetch {
        /// The URL.
        url: String,
        /// What went wrong.
        cause: ClientError,
    },
    /// The answer's status is not 200.
    #[error("cannot fetch keys from {url}: the answer is status {status}{}", advice(*.status))]
    Status {
        /// The URL.
        url: String,
        /// The status.
        status: u16,
    },
    /// The answer has no usable key.
    #[error("cannot use the keys from {url}: {cause}")]
    Document {
        /// The URL.
        url: String,
        /// What is wrong with it.
        cause: JwksError,
    },
}

/// The keys of one source. Verification reads [`KeyRing::current`] for every batch; one task runs
/// [`KeyRing::keep_fresh`].
pub struct KeyRing {
    source: String,
    origin: ReadyOrigin,
    observer: Box<dyn Fn(Refresh) + Send + Sync>,
    keys: RwLock<Option<Arc<KeySet>>>,
    /// Held for the whole of a refresh, so that an older document never replaces a newer one.
    progress: Mutex<Progress>,
}

enum ReadyOrigin {
    File(PathBuf),
    Url {
        endpoint: Endpoint,
        refresh: Duration,
        client: Box<Client>,
        token: Option<HeaderValue>,
        cache: PathBuf,
    },
}

#[derive(Default)]
struct Progress {
    /// In a row, up to now.
    failures: u32,
    /// What the last good document had besides its keys; said again only when it changes.
    refused: Vec<RefusedKey>,
}

impl KeyRing {
    /// A ring without keys for the source called `source`. The cache of a URL's keys is
    /// `data_dir/jwks/SOURCE.json`. `observer` is called after every attempt, on the task that made
    /// it, and must not block. Reads the certificate authorities, so it blocks on the file system.
    ///
    /// # Errors
    /// [`KeyRingError::Tls`].
    pub fn new(
        source: &str,
        origin: Origin,
        data_dir: &Path,
        observer: impl Fn(Refresh) + Send + Sync + 'static,
    ) -> Result<KeyRing, KeyRingError> {
        let origin = match origin {
            Origin::File(path) => ReadyOrigin::File(path),
            Origin::Url { endpoint, refresh, ca, token } => {
                let client = Box::new(Client::for_endpoint(&endpoint, ca.as_deref())?);
                ReadyOrigin::Url { endpoint, refresh, client, token, cache: cache_path(data_dir, source) }
            }
        };
        Ok(KeyRing {
            source: source.to_owned(),
            origin,
            observer: Box::new(observer),
            keys: RwLock::default(),
            progress: Mutex::default(),
        })
    }

    /// The keys to verify with, or `None` as long as none were ever loaded: then nothing can be
    /// verified and the sender has to be told to come back.
    pub fn current(&self) -> Option<Arc<KeySet>> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Loads the keys for the first time, within `timeout`. A file must give keys. A URL is tried
    /// once; if it gives none, the cache's are used, and if there is no cache either, the ring stays
    /// empty until [`KeyRing::keep_fresh`] succeeds.
    ///
    /// # Errors
    /// For a file only: [`KeyRingError::File`] or [`KeyRingError::FileDocument`].
    pub async fn load_at_start(&self, timeout: Duration) -> Result<(), KeyRingError> {
        let Err(error) = self.refresh_once(timeout).await else { return Ok(()) };
        let ReadyOrigin::Url { endpoint, cache, .. } = &self.origin else { return Err(error) };
        warn!(source = self.source, "{error}");
        if self.current().is_some() {
            return Ok(());
        }
        match read_cache(cache.clone(), endpoint).await {
            Ok(Some(keys)) => {
                warn!(
                    source = self.source,
                    keys = keys.keys().len(),
                    "using the keys cached in {} until a fetch succeeds",
                    cache.display()
                );
                (self.observer)(Refresh::Cached { keys: keys.keys().len() });
                self.replace(keys);
            }
            Ok(None) => self.warn_of_no_keys("there is no cache yet"),
            Err(cause) => self.warn_of_no_keys(&format!("the cache {} is ignored: {cause}", cache.display())),
        }
        Ok(())
    }

    /// Loads the origin once, within `timeout`, and puts its keys to use; says whether they differ
    /// from those before. Refreshes run one at a time, and the future may be dropped at any point.
    ///
    /// # Errors
    /// See [`KeyRingError`]; the keys in use are then as before. The error is counted, but logged
    /// by the caller.
    pub async fn refresh_once(&self, timeout: Duration) -> Result<bool, KeyRingError> {
        let mut progress = self.progress.lock().await;
        let loaded = match &self.origin {
            ReadyOrigin::File(path) => read_file_within(path, timeout).await,
            ReadyOrigin::Url { endpoint, client, token, .. } => {
                fetch(client, endpoint, token.as_ref(), timeout).await
            }
        };
        let Parsed { keys, refused } = loaded.inspect_err(|_| {
            progress.failures = progress.failures.saturating_add(1);
            (self.observer)(Refresh::Failed);
        })?;
        progress.failures = 0;
        if progress.refused != refused {
            for key in &refused {
                warn!(source = self.source, "the JWKS document's {key}; it is not used");
            }
            progress.refused = refused;
        }
        let before = self.replace(keys.clone());
        (self.observer)(Refresh::Loaded { keys: keys.keys().len(), unix_seconds: unix_seconds() });
        self.log_change(before.as_deref(), &keys);
        let changed = before.as_deref() != Some(&keys);
        if let ReadyOrigin::Url { endpoint, cache, .. } = &self.origin
            && let Err(cause) = write_cache(cache.clone(), endpoint, &keys).await
        {
            warn!(
                source = self.source,
                "cannot write the key cache {}: {cause}; a restart depends on the network",
                cache.display()
            );
        }
        Ok(changed)
    }

    /// Refreshes until `shutdown` turns true or its sender is gone: every `refresh` give or take a
    /// tenth, and after a failure after 1 s, doubling up to 60 s but never slower than `refresh`.
    /// Call [`KeyRing::load_at_start`] first.
    pub async fn keep_fresh(self: Arc<Self>, shutdown: watch::Receiver<bool>) {
        let refresh = match &self.origin {
            ReadyOrigin::File(_) => FILE_REFRESH,
            ReadyOrigin::Url { refresh, .. } => *refresh,
        };
        self.keep_pace(shutdown, |failures| pause(refresh, failures, rand::random())).await;
    }

    /// [`KeyRing::keep_fresh`] with the pause before the next attempt, given the failures so far,
    /// as an argument.
    async fn keep_pace(&self, mut shutdown: watch::Receiver<bool>, pause: impl Fn(u32) -> Duration) {
        let mut last_failure: Option<String> = None;
        loop {
            let failures = self.progress.lock().await.failures;
            let attempt = async {
                tokio::time::sleep(pause(failures)).await;
                self.refresh_once(REFRESH_TIMEOUT).await
            };
            let outcome = tokio::select! {
                () = stopped(&mut shutdown) => return,
                outcome = attempt => outcome,
            };
            match outcome {
                Ok(_) if last_failure.take().is_some() => info!(source = self.source, "keys are fresh again"),
                Ok(_) => debug!(source = self.source, "keys are fresh"),
                // An outage of hours is one line, not one a minute; the counter has them all.
                Err(error) if last_failure.as_ref() == Some(&error.to_string()) => {
                    debug!(source = self.source, "{error}");
                }
                Err(error) => {
                    match self.current() {
                        Some(_) => warn!(source = self.source, "{error}; the keys loaded before stay in use"),
                        None => self.warn_of_no_keys(&error.to_string()),
                    }
                    last_failure = Some(error.to_string());
                }
            }
        }
    }

    /// Returns the keys that were in use.
    fn replace(&self, keys: KeySet) -> Option<Arc<KeySet>> {
        self.keys.write().unwrap_or_else(PoisonError::into_inner).replace(Arc::new(keys))
    }

    fn log_change(&self, before: Option<&KeySet>, now: &KeySet) {
        match before {
            Some(before) if before == now => {}
            Some(before) => warn!(
                source = self.source,
                added = missing_from(before, now),
                removed = missing_from(now, before),
                now = thumbprints(now.keys().iter()),
                "the set of trusted keys changed"
            ),
            None => info!(source = self.source, keys = thumbprints(now.keys().iter()), "keys loaded"),
        }
    }

    fn warn_of_no_keys(&self, why: &str) {
        warn!(
            source = self.source,
            "nothing is accepted until a fetch succeeds, because no key is known: {why}"
        );
    }
}

/// Reads a JWKS document from a regular file of at most [`DOCUMENT_LIMIT_BYTES`]. Blocks.
///
/// # Errors
/// [`KeyRingError::File`] or [`KeyRingError::FileDocument`].
pub fn read_file(path: &Path) -> Result<Parsed, KeyRingError> {
    let document = read_bounded(path).map_err(|cause| KeyRingError::File { path: path.to_owned(), cause })?;
    jwks::parse(&document).map_err(|cause| KeyRingError::FileDocument { path: path.to_owned(), cause })
}

/// Fetches a JWKS document of at most [`DOCUMENT_LIMIT_BYTES`] within `timeout`. Any status but 200
/// is an error; redirects are not followed, because the URL is what the operator trusts.
///
/// # Errors
/// [`KeyRingError::Fetch`], [`KeyRingError::Status`] or [`KeyRingError::Document`].
pub async fn fetch(
    client: &Client,
    endpoint: &Endpoint,
    token: Option<&HeaderValue>,
    timeout: Duration,
) -> Result<Parsed, KeyRingError> {
    let mut headers: Vec<(HeaderName, HeaderValue)> = vec![(header::ACCEPT, ACCEPT)];
    headers.extend(token.map(|token| (header::AUTHORIZATION, token.clone())));
    let fetched = client
        .get(endpoint, &headers, DOCUMENT_LIMIT_BYTES, timeout)
        .await
        .map_err(|cause| KeyRingError::Fetch { url: endpoint.to_string(), cause })?;
    if fetched.status != 200 {
        return Err(KeyRingError::Status { url: endpoint.to_string(), status: fetched.status });
    }
    jwks::parse(&fetched.body).map_err(|cause| KeyRingError::Document { url: endpoint.to_string(), cause })
}

/// Waiting has an end even where the file system does not answer.
async fn read_file_within(path: &Path, timeout: Duration) -> Result<Parsed, KeyRingError> {
    let owned = path.to_owned();
    let reading = tokio::task::spawn_blocking(move || read_file(&owned));
    let failed = |cause| KeyRingError::File { path: path.to_owned(), cause };
    match tokio::time::timeout(timeout, reading).await {
        Ok(Ok(result)) => result,
        Ok(Err(join)) => Err(failed(io::Error::other(join))),
        Err(_) => Err(failed(io::ErrorKind::TimedOut.into())),
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    // Opening a named pipe would wait for its writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut document = Vec::new();
    fs::File::open(path)?.take(DOCUMENT_LIMIT_BYTES as u64 + 1).read_to_end(&mut document)?;
    if document.len() > DOCUMENT_LIMIT_BYTES {
        return Err(io::Error::other(format!("it is longer than {DOCUMENT_LIMIT_BYTES} bytes")));
    }
    Ok(document)
}

/// The member that our cache has besides `keys`. Keys of a URL that the operator has since replaced
/// by another must not come back through the cache.
#[derive(Deserialize)]
struct CachedFrom {
    url: String,
}

/// A source's name is any text, a file's name is not: bytes that are not plain are written as `%XX`.
fn cache_path(data_dir: &Path, source: &str) -> PathBuf {
    let mut name = String::new();
    for byte in source.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => name.push(byte.into()),
            _ => name.push_str(&format!("%{byte:02X}")),
        }
    }
    data_dir.join("jwks").join(format!("{name}.json"))
}

/// `None` where there is no cache; an error where there is one that cannot be used.
async fn read_cache(path: PathBuf, endpoint: &Endpoint) -> Result<Option<KeySet>, String> {
    let url = endpoint.to_string();
    let reading = move || {
        let document = match read_bounded(&path) {
            Ok(document) => document,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let parsed = jwks::parse(&document).map_err(|error| error.to_string())?;
        match serde_json::from_slice::<CachedFrom>(&document) {
            Ok(from) if from.url == url => Ok(Some(parsed.keys)),
            _ => Err("it was not fetched from the url that is configured now".to_owned()),
        }
    };
    tokio::task::spawn_blocking(reading).await.map_err(|join| join.to_string())?
}

/// Writes the keys anew rather than the document as it came: what else is in there, a private key
/// by mistake, stays off the disk.
async fn write_cache(path: PathBuf, endpoint: &Endpoint, keys: &KeySet) -> io::Result<()> {
    let named: Vec<_> = keys.keys().iter().map(|key| (Some(key.id().to_owned()), *key.bytes())).collect();
    let mut document: serde_json::Value = serde_json::from_str(&jwks::document(&named))?;
    document["url"] = endpoint.to_string().into();
    let text = format!("{document:#}\n");
    tokio::task::spawn_blocking(move || replace_file(&path, text.as_bytes()))
        .await
        .map_err(io::Error::other)?
}

/// Replaces the file as a whole or not at all, power loss included. Leaves it alone when it has that
/// content already.
fn replace_file(path: &Path, content: &[u8]) -> io::Result<()> {
    if read_bounded(path).is_ok_and(|present| present == content) {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    // One left by a crash may have any mode.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    fs::File::open(folder)?.sync_all()
}

async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    // A sender that is gone cannot say stop any more, which means the same.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// How long to wait before the next attempt. `random` is from 0 to 1 and spreads the daemons out.
fn pause(refresh: Duration, failures: u32, random: f64) -> Duration {
    let refresh = refresh.clamp(SHORTEST_REFRESH, LONGEST_REFRESH);
    match failures.checked_sub(1) {
        None => refresh.mul_f64(0.9 + 0.2 * random),
        Some(doublings) => {
            let longest = FIRST_BACKOFF.saturating_mul(2_u32.saturating_pow(doublings)).min(LONGEST_BACKOFF);
            longest.min(refresh).mul_f64(0.5 + 0.5 * random)
        }
    }
}

fn missing_from(set: &KeySet, other: &KeySet) -> String {
    thumbprints(other.keys().iter().filter(|key| !set.keys().iter().any(|k| k.bytes() == key.bytes())))
}

fn thumbprints<'k>(keys: impl Iterator<Item = &'k Key>) -> String {
    keys.map(Key::thumbprint).collect::<Vec<_>>().join(" ")
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn advice(status: u16) -> &'static str {
    match status {
        300..=399 => "; redirects are not followed, so name the final url",
        401 | 403 => "; a token may be needed, or is not the right one",
        404 => "; is the url right?",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Mutex as StdMutex;

    use ed25519_dalek::SigningKey;

    use super::*;
    use crate::net::bearer;
    use crate::net::loopback::{Answer, Server};

    const TIMEOUT: Duration = Duration::from_secs(20);

    fn public(seed: u8) -> [u8; 32] {
        SigningKey::from_bytes(&[seed; 32]).verifying_key().to_bytes()
    }

    fn document(seeds: &[u8]) -> String {
        let keys: Vec<_> = seeds.iter().map(|seed| (Some(format!("k{seed}")), public(*seed))).collect();
        jwks::document(&keys)
    }

    /// A ring and everything its observer was told.
    struct Watched {
        ring: Arc<KeyRing>,
        seen: Arc<StdMutex<Vec<Refresh>>>,
    }

    impl Watched {
        fn new(origin: Origin, data_dir: &Path) -> Watched {
            let seen = Arc::new(StdMutex::new(Vec::new()));
            let sink = Arc::clone(&seen);
            let ring =
                KeyRing::new("us", origin, data_dir, move |event| sink.lock().unwrap().push(event)).unwrap();
            Watched { ring: Arc::new(ring), seen }
        }

        fn url(endpoint: Endpoint, data_dir: &Path) -> Watched {
            let refresh = Duration::from_secs(3600);
            Watched::new(Origin::Url { endpoint, refresh, ca: None, token: None }, data_dir)
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
    async fn keys_are_fetched_and_cached_for_our_eyes_only() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(Answer::ok(&document(&[1, 2]))).await;
        let watched = Watched::url(server.endpoint(), dir.path());
        assert!(watched.ring.current().is_none());
        watched.ring.load_at_start(TIMEOUT).await.unwrap();
        assert_eq!(watched.ids(), ["k1", "k2"]);
        assert!(
            matches!(watched.last_event(), Refresh::Loaded { keys: 2, unix_seconds } if unix_seconds > 0)
        );
        let request = server.last_request();
        assert!(request.contains("accept: application/jwk-set+json, application/json\r\n"), "{request}");
        assert!(!request.contains("authorization"), "{request}");

        let cache = dir.path().join("jwks/us.json");
        assert_eq!(fs::metadata(&cache).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(jwks::parse(&fs::read(&cache).unwrap()).unwrap().keys, *watched.ring.current().unwrap());
        assert_eq!(fs::read_dir(dir.path().join("jwks")).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn the_token_is_sent() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(Answer::ok(&document(&[1]))).await;
        let origin = Origin::Url {
            endpoint: server.endpoint(),
            refresh: TIMEOUT,
            ca: None,
            token: Some(bearer(b"kpat_secret").unwrap()),
        };
        assert!(!format!("{origin:?}").contains("secret"));
        Watched::new(origin, dir.path()).ring.load_at_start(TIMEOUT).await.unwrap();
        assert!(server.last_request().contains("authorization: Bearer kpat_secret\r\n"));
    }

    #[tokio::test]
    async fn the_cache_steps_in_when_the_server_is_down() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(Answer::ok(&document(&[1]))).await;
        Watched::url(server.endpoint(), dir.path()).ring.load_at_start(TIMEOUT).await.unwrap();

        server.answer(Answer::status(503));
        let restarted = Watched::url(server.endpoint(), dir.path());
        restarted.ring.load_at_start(TIMEOUT).await.unwrap();
        assert_eq!(restarted.ids(), ["k1"]);
        assert_eq!(*restarted.seen.lock().unwrap(), [Refresh::Failed, Refresh::Cached { keys: 1 }]);

        server.answer(Answer::ok(&document(&[1, 3])));
        assert!(restarted.ring.refresh_once(TIMEOUT).await.unwrap());
        assert_eq!(restarted.ids(), ["k1", "k3"]);
    }

    #[tokio::test]
    async fn another_urls_cache_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(Answer::ok(&document(&[1]))).await;
        Watched::url(server.endpoint(), dir.path()).ring.load_at_start(TIMEOUT).await.unwrap();
        let moved = Watched::url(Server::nobody_listens().await, dir.path());
        moved.ring.load_at_start(TIMEOUT).await.unwrap();
        assert!(moved.ring.current().is_none());
    }

    #[tokio::test]
    async fn without_server_and_cache_the_ring_stays_empty_and_recovers() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(Answer::status(500)).await;
        let watched = Watched::url(server.endpoint(), dir.path());
        watched.ring.load_at_start(TIMEOUT).await.unwrap();
        assert!(watched.ring.current().is_none());
        assert_eq!(*watched.seen.lock().unwrap(), [Refresh::Failed]);
        server.answer(Answer::ok(&document(&[1])));
        assert!(watched.ring.refresh_once(TIMEOUT).await.unwrap());
        assert_eq!(watched.ids(), ["k1"]);
    }

    #[tokio::test]
    async fn a_corrupt_cache_is_ignored_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("jwks/us.json");
        fs::create_dir(dir.path().join("jwks")).unwrap();
        let huge = " ".repeat(DOCUMENT_LIMIT_BYTES + 1);
        for corrupt in ["", "{\"keys\":[", "\0\0\0", &document(&[1]), &huge] {
            fs::write(&cache, corrupt).unwrap();
            let server = Server::start(Answer::status(500)).await;
            let watched = Watched::url(server.endpoint(), dir.path());
            watched.ring.load_at_start(TIMEOUT).await.unwrap();
            assert!(watched.ring.current().is_none());
            server.answer(Answer::ok(&document(&[1])));
            watched.ring.refresh_once(TIMEOUT).await.unwrap();
            assert!(jwks::parse(&fs::read(&cache).unwrap()).is_ok());
        }
    }

    #[tokio::test]
    async fn a_cache_that_cannot_be_written_is_not_fatal() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("jwks"), "a file where the folder should be").unwrap();
        let server = Server::start(Answer::ok(&document(&[1]))).await;
        let watched = Watched::url(server.endpoint(), dir.path());
        watched.ring.load_at_start(TIMEOUT).await.unwrap();
        assert_eq!(watched.ids(), ["k1"]);
    }

    #[tokio::test]
    async fn no_bad_answer_costs_a_known_key() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(Answer::ok(&document(&[1]))).await;
        let watched = Watched::url(server.endpoint(), dir.path());
        watched.ring.load_at_start(TIMEOUT).await.unwrap();
        let cached = fs::read(dir.path().join("jwks/us.json")).unwrap();
        let bad = [
            (Answer::status(500), "status 500"),
            (Answer::status(401), "a token may be needed"),
            (Answer::status(204), "status 204"),
            (Answer::redirect(&server.endpoint().to_string()), "name the final url"),
            (Answer::ok(""), "is not JSON"),
            (Answer::ok("<html>"), "is not JSON"),
            (Answer::ok(r#"{"keys":[]}"#), "no usable Ed25519 key"),
            (Answer::ok(r#"{"keys":[{"kty":"RSA"}]}"#), "not OKP"),
            (Answer::raw("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{\"keys\""), "cut off"),
            (Answer::raw("nonsense"), "cannot fetch keys"),
            (Answer::Endless, "longer than 1048576 bytes"),
        ];
        let count = bad.len();
        for (answer, said) in bad {
            server.answer(answer);
            let error = watched.ring.refresh_once(TIMEOUT).await.unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
            assert!(error.contains(&server.endpoint().to_string()), "{error}");
        }
        for silent in [Answer::Silence, Answer::Stalled] {
            server.answer(silent);
            let error = watched.ring.refresh_once(Duration::from_millis(30)).await.unwrap_err();
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
        let leaked = document(&[1, 2]).replacen("\"kty\"", "\"d\":\"c2VjcmV0\",\"kty\"", 1);
        let server = Server::start(Answer::ok(&leaked)).await;
        let watched = Watched::url(server.endpoint(), dir.path());
        watched.ring.load_at_start(TIMEOUT).await.unwrap();
        assert_eq!(watched.ids(), ["k2"]);
        assert!(!fs::read_to_string(dir.path().join("jwks/us.json")).unwrap().contains("c2VjcmV0"));
    }

    #[tokio::test]
    async fn an_unchanged_document_is_no_change() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(Answer::ok(&document(&[1]))).await;
        let watched = Watched::url(server.endpoint(), dir.path());
        assert!(watched.ring.refresh_once(TIMEOUT).await.unwrap());
        assert!(!watched.ring.refresh_once(TIMEOUT).await.unwrap());
        assert_eq!(watched.seen.lock().unwrap().len(), 2);
    }

    #[tokio::test]
    async fn a_file_must_load_at_start_and_keeps_its_keys_when_it_goes_bad() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("jwks.json");
        let watched = Watched::new(Origin::File(path.clone()), dir.path());
        let error = watched.ring.load_at_start(TIMEOUT).await.unwrap_err();
        assert!(error.to_string().contains("jwks.json"), "{error}");
        fs::write(&path, "{}").unwrap();
        let error = watched.ring.load_at_start(TIMEOUT).await.unwrap_err();
        assert!(matches!(error, KeyRingError::FileDocument { .. }), "{error}");
        assert!(error.to_string().contains("jwks.json"), "{error}");

        fs::write(&path, document(&[1])).unwrap();
        watched.ring.load_at_start(TIMEOUT).await.unwrap();
        assert_eq!(watched.ids(), ["k1"]);
        for bad in [String::new(), document(&[]), " ".repeat(DOCUMENT_LIMIT_BYTES + 1)] {
            fs::write(&path, bad).unwrap();
            assert!(watched.ring.refresh_once(TIMEOUT).await.is_err());
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let error = watched.ring.refresh_once(TIMEOUT).await.unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
        assert_eq!(watched.ids(), ["k1"]);
        fs::remove_dir(&path).unwrap();
        fs::write(&path, document(&[2])).unwrap();
        assert!(watched.ring.refresh_once(TIMEOUT).await.unwrap());
        assert_eq!(watched.ids(), ["k2"]);
        assert!(!dir.path().join("jwks").exists());
    }

    #[tokio::test]
    async fn keeping_fresh_survives_failures_and_ends_at_shutdown() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(Answer::status(500)).await;
        let watched = Watched::url(server.endpoint(), dir.path());
        watched.ring.load_at_start(TIMEOUT).await.unwrap();
        let (stop, shutdown) = watch::channel(false);
        let ring = Arc::clone(&watched.ring);
        let asked = Arc::new(StdMutex::new(Vec::new()));
        let noted = Arc::clone(&asked);
        let task = tokio::spawn(async move {
            ring.keep_pace(shutdown, |failures| {
                noted.lock().unwrap().push(failures);
                Duration::ZERO
            })
            .await;
        });
        server.has_received(4).await;
        server.answer(Answer::ok(&document(&[1])));
        while watched.ring.current().is_none() {
            tokio::task::yield_now().await;
        }
        // The server answers no more: the fetch under way is given up.
        server.answer(Answer::Silence);
        server.has_received(server.requests() + 1).await;
        stop.send(true).unwrap();
        task.await.unwrap();
        assert_eq!(watched.ids(), ["k1"]);
        assert_eq!(asked.lock().unwrap()[..3], [1, 2, 3]);
    }

    #[tokio::test]
    async fn keeping_fresh_ends_when_nobody_can_stop_it_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let watched = Watched::url(Server::nobody_listens().await, dir.path());
        let (stop, shutdown) = watch::channel(false);
        let task = tokio::spawn(Arc::clone(&watched.ring).keep_fresh(shutdown));
        drop(stop);
        task.await.unwrap();
    }

    #[test]
    fn pauses() {
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

    #[test]
    fn a_sources_name_cannot_leave_the_folder() {
        let path = |source| cache_path(Path::new("/d"), source);
        assert_eq!(path("konnect-us"), Path::new("/d/jwks/konnect-us.json"));
        assert_eq!(path("../a b"), Path::new("/d/jwks/..%2Fa%20b.json"));
        assert_ne!(path("a%2F"), path("a/"));
    }
}
