//! One source's keys over time: loaded at start, refreshed, cached on disk.
//!
//! The rule throughout: a failure never costs a known key. Whatever goes wrong with a fetch, a file
//! or the cache on disk, the keys that were last good stay in use, and only a whole, well-formed
//! document with at least one usable key replaces them. A key that such a document lists no more
//! stays trusted for [`JwksOptions::retired_for`].
//!
//! One task, the [`Fetcher`], asks the origin: at intervals, and when a batch has a signature that
//! no known key made ([`KeyRing::look_again`]). Everything else reads what it published last.

mod history;
mod options;
mod origin;
mod saved;
mod store;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tokio::time::{sleep_until, timeout_at};
use tracing::{debug, info, warn};

use self::history::{Change, History};
pub use self::options::JwksOptions;
pub use self::origin::{DOCUMENT_LIMIT_BYTES, KeyRingError, fetch, read_file};
use self::origin::{Loaded, Ready};
pub use self::saved::saved;
use super::jwks::{Key, KeySet, Parsed, RefusedKey};

/// Timeout of a refresh. At start, where the daemon waits for it, the caller sets it.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout of a refresh that batches wait for.
const DEMAND_TIMEOUT: Duration = Duration::from_secs(5);
/// Time in which a burst of batches with unknown signatures gathers before its fetch.
const GATHERING: Duration = Duration::from_millis(200);
/// Minimum time between two fetches for unknown signatures, unless the first brought something new:
/// unknown signatures that keep coming must not flood the key server. A genuine event by a new key
/// waits at most this long.
const DEMAND_INTERVAL: Duration = Duration::from_secs(5);
/// Maximum time that a batch waits: for the interval, for the fetch, and a second for what is not
/// the network. Only a refresh in progress that takes longer can make it wait in vain.
const LONGEST_LOOK: Duration =
    DEMAND_INTERVAL.saturating_add(DEMAND_TIMEOUT).saturating_add(Duration::from_secs(1));
/// Time between two reads of a key file; local and small, so read more often than a URL.
const FILE_REFRESH: Duration = Duration::from_secs(60);
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
const SHORTEST_REFRESH: Duration = Duration::from_secs(1);
const LONGEST_REFRESH: Duration = Duration::from_secs(365 * 24 * 3600);
/// Minimum refresh interval that a key server can ask for. It may ask to be asked more often than
/// configured, but not more often than this.
const SHORTEST_MAX_AGE: Duration = Duration::from_secs(60);
/// Difference between the clocks of this machine and a key server that is tolerated, in seconds.
const MAX_CLOCK_DIFFERENCE: i128 = 60;

/// Event of a key ring, for the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refresh {
    /// The origin gave a good document, changed or not.
    Loaded {
        /// Number of keys in use now, the retired ones included.
        keys: usize,
        /// Number of them that the origin no longer lists.
        retired: usize,
        /// Whether a set that was known before has changed.
        changed: bool,
        /// Time of the load, in seconds since the Unix epoch.
        unix_seconds: u64,
    },
    /// Keys from the cache on disk, at start.
    Remembered {
        /// Number of keys in use now, the retired ones included.
        keys: usize,
        /// Number of them that the origin no longer lists.
        retired: usize,
    },
    /// A retired key expired.
    Expired {
        /// Number of keys in use now, the retired ones included.
        keys: usize,
        /// Number of them that the origin no longer lists.
        retired: usize,
    },
    /// The origin gave no good document; the keys in use, if any, stay.
    Failed,
}

/// Result of a refresh for an unknown signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefreshOutcome {
    /// The origin was asked: judge by [`KeyRing::current`].
    Known,
    /// The origin could not be asked.
    Unavailable,
}

/// The keys of one source. Verification reads [`KeyRing::current`] for every batch.
pub struct KeyRing {
    /// The origin never lists anything else.
    is_fixed: bool,
    published: watch::Sender<Published>,
    /// The arrival of the newest event whose signature fits no key.
    wanted: watch::Sender<Option<Instant>>,
}

/// Results that the fetcher has published.
#[derive(Default)]
struct Published {
    trusted: Option<Arc<KeySet>>,
    last: Option<Fetch>,
    /// The failure of the last attempt.
    failure: Option<RefreshFailure>,
}

/// The failure of an attempt to read the key set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefreshFailure {
    /// Time of the attempt, in seconds since the Unix epoch.
    pub unix_seconds: u64,
    /// One line for the operator.
    pub error: String,
}

#[derive(Clone, Copy)]
struct Fetch {
    began: Instant,
    found: Found,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    News,
    NoNews,
    /// The origin gave no good document.
    Nothing,
}

/// Keeps a [`KeyRing`] fresh.
pub struct Fetcher {
    ring: Arc<KeyRing>,
    source: String,
    origin: Ready,
    options: JwksOptions,
    memory: PathBuf,
    observer: Box<dyn Fn(Refresh) + Send + Sync>,
    now: Box<dyn Fn() -> u64 + Send + Sync>,
    /// Number of failures since the last success.
    failures: u32,
    /// The last logged failure; an outage of hours is one line, not one a minute.
    last_failure: Option<String>,
    /// Ignored keys of the last good document; logged again only when they change.
    refused: Vec<String>,
    history: History,
    /// The version of the last good document. Not cached on disk: the cache has only the keys that
    /// passed the policy of its time, and under another policy the same version may hold more.
    etag: Option<String>,
    max_age: Option<Duration>,
    /// Seconds by which the clock differs from the server's, if that is too much; negative when it
    /// is behind.
    clock_off: Option<i128>,
}

/// Result of [`Fetcher::probe`].
#[derive(Debug)]
pub struct Probe {
    /// Number of usable keys.
    pub keys: usize,
    /// Keys that would not be used, each with the reason.
    pub ignored: Vec<String>,
    /// Seconds by which the clock of this machine is ahead of the server's (or behind, negative),
    /// if that is more than a minute.
    pub clock_off: Option<i128>,
}

impl KeyRing {
    /// Creates a ring without keys for the source called `source`, and its fetcher. The cache is
    /// `data_dir/jwks/SOURCE.json`. `observer` is called after every attempt and must not block.
    /// Reads the certificate authorities, so it blocks on the file system.
    ///
    /// # Errors
    /// When the TLS client cannot be set up, or the token cannot be sent.
    pub fn new(
        source: &str,
        options: JwksOptions,
        data_dir: &Path,
        observer: impl Fn(Refresh) + Send + Sync + 'static,
    ) -> Result<(Arc<KeyRing>, Fetcher), Box<dyn Error>> {
        let origin = Ready::new(&options)?;
        let ring = Arc::new(KeyRing {
            is_fixed: matches!(origin, Ready::Pinned(_)),
            published: watch::Sender::default(),
            wanted: watch::Sender::default(),
        });
        let fetcher = Fetcher {
            ring: Arc::clone(&ring),
            source: source.to_owned(),
            origin,
            options,
            memory: store::path(data_dir, source),
            observer: Box::new(observer),
            now: Box::new(unix_seconds),
            failures: 0,
            last_failure: None,
            refused: Vec::new(),
            history: History::default(),
            etag: None,
            max_age: None,
            clock_off: None,
        };
        Ok((ring, fetcher))
    }

    /// Returns the keys to verify with, or `None` while none were ever loaded: then nothing can be
    /// verified and the sender has to retry.
    pub fn current(&self) -> Option<Arc<KeySet>> {
        self.published.borrow().trusted.clone()
    }

    /// Returns why the last attempt to read the key set failed; none when it succeeded.
    pub fn failure(&self) -> Option<RefreshFailure> {
        self.published.borrow().failure.clone()
    }

    /// Makes the fetcher refresh soon: it asks for what is listed from now on.
    pub fn refresh_soon(&self) {
        self.want(Instant::now());
    }

    fn want(&self, since: Instant) {
        self.wanted.send_if_modified(|wanted| {
            let is_newer = wanted.is_none_or(|wanted| wanted < since);
            if is_newer {
                *wanted = Some(since);
            }
            is_newer
        });
    }

    /// Waits, for a signature that no key in use made, of an event that had arrived at `since`,
    /// until the origin was asked for what it lists by now; a response to a request from before
    /// `since` does not count. Batches that wait share the fetch. A batch of which a key made other
    /// lines (`knows_some`) accepts a fetch of the last five seconds that brought nothing new.
    /// Returns within about ten seconds, also while a refresh hangs.
    pub async fn look_again(&self, since: Instant, knows_some: bool) -> RefreshOutcome {
        if self.is_fixed {
            return RefreshOutcome::Known;
        }
        let end = Instant::now() + LONGEST_LOOK;
        let mut published = self.published.subscribe();
        loop {
            let last = published.borrow_and_update().last;
            match last {
                Some(last) if last.began >= since && last.found == Found::Nothing => {
                    return RefreshOutcome::Unavailable;
                }
                Some(last) if last.began >= since || (knows_some && last.is_recent_without_news()) => {
                    return RefreshOutcome::Known;
                }
                _ => self.want(since),
            }
            if timeout_at(end.into(), published.changed()).await.is_err() {
                return RefreshOutcome::Unavailable;
            }
        }
    }
}

impl Fetch {
    fn is_recent_without_news(&self) -> bool {
        self.found == Found::NoNews && self.began.elapsed() < DEMAND_INTERVAL
    }
}

impl Fetcher {
    /// Loads the keys for the first time: from the cache, and from the origin. A file must give
    /// keys within `timeout`. A URL is waited for only when the cache is empty; if it gives none,
    /// the ring stays empty until [`Fetcher::run`] succeeds.
    ///
    /// # Errors
    /// For a file only: it cannot be read, or none of its keys is usable.
    pub async fn load_at_start(&mut self, timeout: Duration) -> Result<(), KeyRingError> {
        self.remember().await;
        if let Ready::Url { .. } = &self.origin {
            if self.ring.current().is_some() {
                self.ring.refresh_soon();
            } else if let Err(error) = self.refresh(timeout).await {
                self.log_failure(&error);
            }
            return Ok(());
        }
        self.refresh(timeout).await.map(|_| ())
    }

    /// Refreshes until `shutdown` turns true or its sender is dropped: every `refresh` give or take
    /// a tenth, sooner where the server says how long its response is fresh (but at most once a
    /// minute), when a batch needs it, and after a failure after 1 s, doubling up to 60 s but never
    /// slower than `refresh`. Call [`Fetcher::load_at_start`] first.
    pub async fn run(self, shutdown: watch::Receiver<bool>) {
        let refresh = match &self.origin {
            Ready::Pinned(_) => LONGEST_REFRESH,
            Ready::File(_) => FILE_REFRESH,
            Ready::Url { refresh, .. } => *refresh,
        };
        self.run_with(shutdown, |failures, max_age| {
            let refresh = max_age.map_or(refresh, |age| age.max(SHORTEST_MAX_AGE).min(refresh));
            pause(refresh, failures, rand::random())
        })
        .await;
    }

    /// Runs as [`Fetcher::run`], with a function that returns the pause before the next attempt,
    /// given the failures so far and what the server said.
    async fn run_with(
        mut self,
        mut shutdown: watch::Receiver<bool>,
        pause: impl Fn(u32, Option<Duration>) -> Duration,
    ) {
        let ring = Arc::clone(&self.ring);
        let mut wanted = ring.wanted.subscribe();
        // Reading a file of this machine costs nothing.
        let is_free = !matches!(self.origin, Ready::Url { .. });
        let mut last_on_demand: Option<Fetch> = None;
        let mut due = Instant::now() + pause(self.failures, self.max_age);
        loop {
            let began = ring.published.borrow().last.map(|last| last.began);
            // A little later, since time is counted in whole seconds.
            let end = self.history.until_next_end((self.now)(), self.options.retired_for);
            let key_ends = Instant::now() + end.unwrap_or(LONGEST_REFRESH) + Duration::from_secs(1);
            let is_wanted = tokio::select! {
                () = stopped(&mut shutdown) => return,
                () = sleep_until(key_ends.into()) => {
                    self.expire();
                    continue;
                }
                () = sleep_until(due.into()) => false,
                _ = wanted.wait_for(|wanted| wanted.is_some_and(|wanted| began.is_none_or(|began| began < wanted))) => true,
            };
            if is_wanted && !is_free {
                let next = last_on_demand.filter(|last| last.found != Found::News);
                let next = next.map(|last| last.began + DEMAND_INTERVAL);
                let gathered = Instant::now() + GATHERING;
                tokio::select! {
                    () = stopped(&mut shutdown) => return,
                    () = sleep_until(next.unwrap_or(gathered).max(gathered).into()) => {}
                }
            }
            let outcome = tokio::select! {
                () = stopped(&mut shutdown) => return,
                outcome = self.refresh(if is_wanted { DEMAND_TIMEOUT } else { REFRESH_TIMEOUT }) => outcome,
            };
            match outcome {
                Ok(_) if self.last_failure.take().is_some() => {
                    let source = &self.source;
                    info!(
                        code = "keys-fetched-again",
                        source, "source \"{source}\": keys are fetched again after failures"
                    );
                }
                Ok(_) => debug!(source = self.source, "keys are fresh"),
                Err(error) => self.log_failure(&error),
            }
            due = Instant::now() + pause(self.failures, self.max_age);
            if is_wanted {
                last_on_demand = ring.published.borrow().last;
            }
        }
    }

    /// Loads the origin once, within `timeout`, and puts its keys into use; returns whether a known
    /// set changed.
    ///
    /// # Errors
    /// See [`KeyRingError`]; the keys in use are then as before. The error is counted, but logged
    /// by the caller.
    async fn refresh(&mut self, timeout: Duration) -> Result<bool, KeyRingError> {
        let began = Instant::now();
        let refreshed = self.load(timeout).await;
        let found = match &refreshed {
            Ok(true) => Found::News,
            Ok(false) => Found::NoNews,
            Err(_) => {
                self.failures = self.failures.saturating_add(1);
                (self.observer)(Refresh::Failed);
                Found::Nothing
            }
        };
        let failure = refreshed
            .as_ref()
            .err()
            .map(|error| RefreshFailure { unix_seconds: (self.now)(), error: error.to_string() });
        self.ring.published.send_modify(|published| {
            published.last = Some(Fetch { began, found });
            published.failure = failure;
        });
        refreshed
    }

    async fn load(&mut self, timeout: Duration) -> Result<bool, KeyRingError> {
        // Without a key that is listed, "not modified" would say nothing.
        let knows_listed = self.history.keys().iter().any(|known| known.retired_at.is_none());
        let etag = self.etag.as_deref().filter(|_| knows_listed);
        let loaded = self.origin.load(etag, timeout).await?;
        let listed = self.admit(loaded)?;
        self.failures = 0;
        let now = (self.now)();
        let is_first = self.history.keys().is_empty();
        let change = match listed {
            Some(listed) => self.history.observe(&listed, now),
            None => {
                self.history.confirm(now);
                Change::default()
            }
        };
        let (keys, retired) = self.apply();
        let changed = !change.is_none() && !is_first;
        self.log_change(&change, is_first);
        (self.observer)(Refresh::Loaded { keys, retired, changed, unix_seconds: now });
        self.save().await;
        Ok(!change.is_none())
    }

    /// Loads the cache of an earlier process.
    async fn remember(&mut self) {
        if let Ready::Pinned(_) = &self.origin {
            return;
        }
        let (path, origin) = (self.memory.clone(), self.options.origin());
        let reading = tokio::task::spawn_blocking(move || store::read(&path, &origin));
        let read = reading.await.unwrap_or_else(|join| Err(join.to_string()));
        let (source, file) = (self.source.as_str(), self.memory.display());
        match read {
            Ok(None) => {}
            Ok(Some(stored)) => {
                let kept = stored.into_iter().filter(|known| self.options.pins(&known.key)).collect();
                self.history = History::new(kept, |thumbprint| self.options.revokes(thumbprint));
                let (keys, retired) = self.apply();
                if keys > 0 {
                    info!(
                        code = "keys-restored",
                        source,
                        keys,
                        retired,
                        "source \"{source}\": {keys} keys restored from {file}, {retired} of them retired"
                    );
                    (self.observer)(Refresh::Remembered { keys, retired });
                }
            }
            Err(cause) => warn!(
                code = "key-cache-unusable",
                source,
                "source \"{source}\": the key cache {file} is not used: {cause}; keys are fetched from their origin"
            ),
        }
    }

    /// Returns the keys of a document that count; none when it is the known version.
    fn admit(&mut self, loaded: Loaded) -> Result<Option<Vec<Key>>, KeyRingError> {
        self.max_age = loaded.max_age;
        self.check_clock(loaded.date);
        let Some(Parsed { keys, refused }) = loaded.document else { return Ok(None) };
        self.etag = loaded.etag;
        let (pinned, foreign): (Vec<Key>, Vec<Key>) =
            keys.keys().iter().cloned().partition(|key| self.options.pins(key));
        if pinned.is_empty() {
            // The next document may be another one.
            self.etag = None;
            let listed = thumbprints(keys.keys().iter());
            return Err(KeyRingError::NotPinned { from: self.options.origin(), listed });
        }
        let (revoked, listed): (Vec<Key>, Vec<Key>) =
            pinned.into_iter().partition(|key| self.options.revokes(&key.thumbprint()));
        let mut passed_over: Vec<String> = refused.iter().map(RefusedKey::to_string).collect();
        passed_over.extend(foreign.iter().map(|key| format!("key {} is not pinned", key.thumbprint())));
        passed_over.extend(revoked.iter().map(|key| format!("key {} is revoked", key.thumbprint())));
        if self.refused != passed_over {
            let source = &self.source;
            for key in &passed_over {
                warn!(
                    code = "key-ignored",
                    source, "source \"{source}\": the JWKS document's {key}; it is not used"
                );
            }
            self.refused = passed_over;
        }
        Ok(Some(listed))
    }

    /// Compares the clock of this machine with a server's.
    fn check_clock(&mut self, date: Option<u64>) {
        let off = date.map(|date| i128::from((self.now)()) - i128::from(date));
        let off = off.filter(|off| off.abs() > MAX_CLOCK_DIFFERENCE);
        if let (Some(off), None) = (off, self.clock_off) {
            let (source, origin, seconds) = (&self.source, self.options.origin(), off.abs());
            let direction = if off > 0 { "ahead of" } else { "behind" };
            warn!(
                code = "clock-off",
                source,
                "source \"{source}\": the clock of this machine is {seconds} s {direction} that of {origin}; set it \
                 (timedatectl): certificates, delays and retention depend on it"
            );
        }
        self.clock_off = off;
    }

    /// Asks the origin once, without using or caching what it lists. Returns how many of its keys
    /// would be trusted, and why others would not, one line each.
    ///
    /// # Errors
    /// See [`KeyRingError`].
    pub async fn probe(mut self, timeout: Duration) -> Result<Probe, KeyRingError> {
        let loaded = self.origin.load(None, timeout).await?;
        let keys = self.admit(loaded)?.map_or(0, |keys| keys.len());
        Ok(Probe { keys, ignored: self.refused, clock_off: self.clock_off })
    }

    /// Puts the keys that are trusted now into use; returns their number, and how many of them are
    /// retired.
    fn apply(&self) -> (usize, usize) {
        let now = (self.now)();
        let trusted = self.history.trusted(now, self.options.retired_for);
        let keys = trusted.as_ref().map_or(0, |set| set.keys().len());
        // Readers compare the pointer, so it changes only when the keys do.
        if self.ring.current().as_deref() != trusted.as_ref() {
            self.ring.published.send_modify(|published| published.trusted = trusted.map(Arc::new));
        }
        (keys, self.history.retired(now, self.options.retired_for))
    }

    /// Removes expired keys.
    fn expire(&self) {
        let before = self.ring.current();
        let (keys, retired) = self.apply();
        let after = self.ring.current();
        if before != after {
            let gone: Vec<&Key> = before
                .iter()
                .flat_map(|set| set.keys())
                .filter(|key| {
                    !after.iter().any(|set| set.keys().iter().any(|other| other.bytes() == key.bytes()))
                })
                .collect();
            let (source, count) = (&self.source, gone.len());
            warn!(
                code = "keys-expired",
                source,
                keys = thumbprints(gone.into_iter()),
                "source \"{source}\": {count} retired keys are no longer trusted; `auditgate verify` still knows them"
            );
            (self.observer)(Refresh::Expired { keys, retired });
        }
    }

    async fn save(&self) {
        if let Ready::Pinned(_) = &self.origin {
            return;
        }
        let (path, origin) = (self.memory.clone(), self.options.origin());
        let keys = self.history.keys().to_vec();
        let writing = tokio::task::spawn_blocking(move || store::write(&path, &origin, &keys));
        if let Err(cause) = writing.await.unwrap_or_else(|join| Err(std::io::Error::other(join))) {
            let (source, file) = (&self.source, self.memory.display());
            warn!(
                code = "key-cache-unwritable",
                source,
                "source \"{source}\": cannot write the key cache {file}: {cause}; a restart needs the network, and \
                 loses retired keys"
            );
        }
    }

    fn log_change(&self, change: &Change, is_first: bool) {
        let set = self.ring.current();
        let count = set.as_ref().map_or(0, |set| set.keys().len());
        let now = thumbprints(set.iter().flat_map(|set| set.keys()));
        let source = &self.source;
        if is_first {
            info!(code = "keys-loaded", source, keys = now, "source \"{source}\": {count} keys loaded");
        } else if !change.is_none() {
            let (added, retired) = (change.added.join(" "), change.retired.join(" "));
            warn!(
                code = "keys-changed",
                source,
                added,
                retired,
                retired_for = %humantime::format_duration(self.options.retired_for),
                now,
                "source \"{source}\": the set of trusted keys changed: {added_count} added, {retired_count} retired",
                added_count = change.added.len(),
                retired_count = change.retired.len()
            );
        }
    }

    fn log_failure(&mut self, error: &KeyRingError) {
        let said = error.to_string();
        let source = &self.source;
        if self.last_failure.as_ref() == Some(&said) {
            debug!(source, "{said}");
        } else if self.ring.current().is_some() {
            warn!(
                code = "keys-refresh-failed",
                source, "source \"{source}\": {error}; the keys loaded before stay in use, retrying"
            );
        } else {
            warn!(
                code = "keys-unavailable",
                source,
                "source \"{source}\": {error}; no key is known, so batches get 429 until a fetch succeeds"
            );
        }
        self.last_failure = Some(said);
    }
}

async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    // A sender that was dropped cannot stop us any more, which means the same.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// Returns the pause before the next attempt. `random` is from 0 to 1 and spreads the daemons out.
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

fn thumbprints<'k>(keys: impl Iterator<Item = &'k Key>) -> String {
    keys.map(Key::thumbprint).collect::<Vec<_>>().join(" ")
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
