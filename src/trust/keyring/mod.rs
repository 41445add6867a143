//! One source's keys over time: loaded at start, kept fresh, remembered on disk.
//!
//! The rule throughout: a failure never costs a known key. Whatever goes wrong with a fetch, a file or the memory
//! on disk, the keys that were last good stay in use, and only a whole, well-formed document with at least one
//! usable key replaces them. A key that such a document lists no more stays trusted for [`Terms::retired_for`].
//!
//! A signature that fits no known key makes the ring ask its origin ([`KeyRing::look_again`]) before anything is
//! held against the event.

mod demand;
mod history;
mod origin;
mod store;

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{Mutex, Notify, watch};
use tracing::{debug, info, warn};

use self::demand::{Demand, GATHERING, LONGEST_GAP, Outcome, Turn};
use self::history::{Change, History};
pub use self::origin::{DOCUMENT_LIMIT_BYTES, KeyRingError, Origin, fetch, read_file};
use self::origin::{Loaded, Ready};
use super::jwks::{Key, KeySet, Parsed, RefusedKey};
use crate::log_throttle::log_seldom;
use crate::net::TlsError;

/// How long a refresh may take. At start, where the daemon waits for it, the caller says.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(30);
/// The same for one that a batch waits for.
const DEMAND_TIMEOUT: Duration = Duration::from_secs(5);
/// And so much of that it has at least, however long the batch had to wait for its turn.
const SHORTEST_DEMAND_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a batch waits for its turn and for the fetches of others, with a second for what is not the network. Only
/// a refresh that takes longer than any of these can make it wait in vain.
const LONGEST_LOOK: Duration =
    LONGEST_GAP.saturating_add(DEMAND_TIMEOUT).saturating_add(Duration::from_secs(1));
/// How often a key file is read again; local and small, so more often than a URL.
const FILE_REFRESH: Duration = Duration::from_secs(60);
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
const SHORTEST_REFRESH: Duration = Duration::from_secs(1);
const LONGEST_REFRESH: Duration = Duration::from_secs(365 * 24 * 3600);
/// A key server may ask to be asked more often than it is configured, but not more often than that.
const SHORTEST_MAX_AGE: Duration = Duration::from_secs(60);

/// Which of an origin's keys are trusted, and for how long.
#[derive(Clone, Debug)]
pub struct Terms {
    /// How long a key is trusted after it was found to be no longer listed.
    pub retired_for: Duration,
    /// Thumbprints of keys that are not trusted any more, whoever lists them.
    pub revoked: Vec<String>,
    /// Thumbprints (RFC 7638) of the only keys to trust; all when there is none.
    pub pinned: Vec<String>,
}

impl Default for Terms {
    fn default() -> Self {
        Self { retired_for: Duration::from_secs(8 * 86_400), revoked: Vec::new(), pinned: Vec::new() }
    }
}

impl Terms {
    fn revokes(&self, thumbprint: &str) -> bool {
        self.revoked.iter().any(|revoked| revoked == thumbprint)
    }

    fn pins(&self, key: &Key) -> bool {
        // Never by its ID, which whoever writes the document chooses.
        self.pinned.is_empty() || self.pinned.contains(&key.thumbprint())
    }
}

/// What happened to the keys, for whoever counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refresh {
    /// The origin gave a good document, changed or not.
    Loaded {
        /// How many keys are in use now, the retired ones included.
        keys: usize,
        /// How many of them the origin lists no longer.
        retired: usize,
        /// Whether a set that was known before has changed.
        changed: bool,
        /// When, in seconds since the Unix epoch.
        unix_seconds: u64,
    },
    /// At start the memory on disk gave keys.
    Remembered {
        /// How many keys are in use now, the retired ones included.
        keys: usize,
        /// How many of them the origin lists no longer.
        retired: usize,
    },
    /// The time of a retired key is over.
    Expired {
        /// How many keys are in use now, the retired ones included.
        keys: usize,
        /// How many of them the origin lists no longer.
        retired: usize,
    },
    /// The origin gave no good document; the keys in use, if any, stay.
    Failed,
}

/// What became of the question for a key that is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// What the ring has now is what there is: judge by [`KeyRing::current`].
    Known,
    /// The origin could not be asked.
    Unavailable,
}

/// The keys of one source. Verification reads [`KeyRing::current`] for every batch; one task runs
/// [`KeyRing::keep_fresh`].
pub struct KeyRing {
    source: String,
    origin: Ready,
    terms: Terms,
    memory: PathBuf,
    observer: Box<dyn Fn(Refresh) + Send + Sync>,
    now: Box<dyn Fn() -> u64 + Send + Sync>,
    trusted: RwLock<Option<Arc<KeySet>>>,
    /// Held for the whole of a refresh, so that an older document never replaces a newer one.
    progress: Mutex<Progress>,
    /// Somebody wants a refresh now.
    wanted: Notify,
}

#[derive(Default)]
struct Progress {
    /// In a row, up to now.
    failures: u32,
    /// What the last good document had besides its keys; said again only when it changes.
    refused: Vec<String>,
    history: History,
    /// The version of the last good document. Not remembered on disk: the memory has only the keys that passed the
    /// terms of its time, and under other terms the same version may hold more.
    etag: Option<String>,
    max_age: Option<Duration>,
    demand: Demand,
}

impl KeyRing {
    /// A ring without keys for the source called `source`. Its memory is `data_dir/jwks/SOURCE.json`.
    /// `observer` is called after every attempt, on the task that made it, and must not block. Reads
    /// the certificate authorities, so it blocks on the file system.
    ///
    /// # Errors
    /// When the TLS client cannot be set up.
    pub fn new(
        source: &str,
        origin: Origin,
        terms: Terms,
        data_dir: &Path,
        observer: impl Fn(Refresh) + Send + Sync + 'static,
    ) -> Result<KeyRing, TlsError> {
        Ok(KeyRing {
            source: source.to_owned(),
            origin: Ready::new(origin)?,
            terms,
            memory: store::path(data_dir, source),
            observer: Box::new(observer),
            now: Box::new(unix_seconds),
            trusted: RwLock::default(),
            progress: Mutex::default(),
            wanted: Notify::new(),
        })
    }

    /// The keys to verify with, or `None` as long as none were ever loaded: then nothing can be
    /// verified and the sender has to be told to come back.
    pub fn current(&self) -> Option<Arc<KeySet>> {
        self.trusted.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Loads the keys for the first time: what is remembered, and what the origin lists. A file must
    /// give keys within `timeout`. A URL is waited for only where nothing is remembered; if it gives
    /// none, the ring stays empty until [`KeyRing::keep_fresh`] succeeds.
    ///
    /// # Errors
    /// For a file only: it cannot be read, or none of its keys is usable.
    pub async fn load_at_start(&self, timeout: Duration) -> Result<(), KeyRingError> {
        self.remember().await;
        if let Ready::Url { .. } = &self.origin {
            if self.current().is_some() {
                self.refresh_soon();
            } else if let Err(error) = self.refresh_once(timeout).await {
                self.warn_of_no_keys(&error.to_string());
            }
            return Ok(());
        }
        self.refresh_once(timeout).await.map(|_| ())
    }

    /// Loads the origin once, within `timeout`, and puts its keys to use; says whether a set that was
    /// known changed. Refreshes run one at a time, and the future may be dropped at any point.
    ///
    /// # Errors
    /// See [`KeyRingError`]; the keys in use are then as before. The error is counted, but logged
    /// by the caller.
    pub async fn refresh_once(&self, timeout: Duration) -> Result<bool, KeyRingError> {
        let mut progress = self.progress.lock().await;
        self.refresh(&mut progress, timeout).await
    }

    /// Lets [`KeyRing::keep_fresh`] refresh now.
    pub fn refresh_soon(&self) {
        self.wanted.notify_one();
    }

    /// For a signature that fits no key in use, of an event that had arrived at `since`: asks the origin
    /// for what it lists by now; an answer to a question from before `since` does not count. Whoever waits
    /// shares the fetch, and there is at most one every five seconds while they bring nothing new. Returns
    /// within about ten seconds, also while a refresh hangs.
    pub async fn look_again(&self, since: Instant) -> Outlook {
        let gathering = match &self.origin {
            Ready::Pinned(_) => return Outlook::Known,
            Ready::File(_) => Duration::ZERO,
            Ready::Url { .. } => GATHERING,
        };
        let end = Instant::now() + LONGEST_LOOK;
        tokio::time::sleep(gathering).await;
        loop {
            let Ok(mut progress) = tokio::time::timeout_at(end.into(), self.progress.lock()).await else {
                // Whoever holds it says why; here it would be a line for every batch.
                debug!(
                    source = self.source,
                    "a signature fits no known key, and a refresh under way takes too long to ask for a new one"
                );
                return Outlook::Unavailable;
            };
            match progress.demand.turn(since, Instant::now()) {
                Turn::Confirmed => return Outlook::Known,
                Turn::Unavailable => return Outlook::Unavailable,
                // A file of this machine costs nothing.
                Turn::Wait(wait) if !gathering.is_zero() => {
                    drop(progress);
                    tokio::time::sleep(wait).await;
                }
                Turn::Wait(_) | Turn::Ask => {
                    let start = Instant::now();
                    // Whole seconds, since messages say them.
                    let left = Duration::from_secs(end.saturating_duration_since(start).as_secs());
                    let timeout = left.clamp(SHORTEST_DEMAND_TIMEOUT, DEMAND_TIMEOUT);
                    let outcome = match self.refresh(&mut progress, timeout).await {
                        Ok(true) => Outcome::News,
                        Ok(false) => Outcome::NoNews,
                        Err(error) => {
                            log_seldom!(
                                warn,
                                &self.source,
                                source = self.source,
                                "a signature fits no known key, and whether there is a new one is not known: {error}"
                            );
                            Outcome::Failed
                        }
                    };
                    progress.demand.asked(start, outcome);
                }
            }
        }
    }

    /// Refreshes until `shutdown` turns true or its sender is gone: every `refresh` give or take a tenth, sooner
    /// where the server says how long its answer is fresh (but at most once a minute), and after a failure after
    /// 1 s, doubling up to 60 s but never slower than `refresh`. Call [`KeyRing::load_at_start`] first.
    pub async fn keep_fresh(self: Arc<Self>, shutdown: watch::Receiver<bool>) {
        let refresh = match &self.origin {
            Ready::Pinned(_) => LONGEST_REFRESH,
            Ready::File(_) => FILE_REFRESH,
            Ready::Url { refresh, .. } => *refresh,
        };
        self.keep_pace(shutdown, |failures, max_age| {
            let refresh = max_age.map_or(refresh, |age| age.max(SHORTEST_MAX_AGE).min(refresh));
            pause(refresh, failures, rand::random())
        })
        .await;
    }

    /// [`KeyRing::keep_fresh`] with the pause before the next attempt, given the failures so far and what the
    /// server said, as an argument.
    async fn keep_pace(
        &self,
        mut shutdown: watch::Receiver<bool>,
        pause: impl Fn(u32, Option<Duration>) -> Duration,
    ) {
        let mut last_failure: Option<String> = None;
        let mut due = None;
        loop {
            let (pause, end) = {
                let progress = self.progress.lock().await;
                let end = progress.history.until_next_end((self.now)(), self.terms.retired_for);
                (pause(progress.failures, progress.max_age), end)
            };
            let due_at = *due.get_or_insert_with(|| Instant::now() + pause);
            let refresh_due = tokio::time::sleep_until(due_at.into());
            // A little later, since time is counted in whole seconds.
            let key_ends = tokio::time::sleep(end.unwrap_or(LONGEST_REFRESH) + Duration::from_secs(1));
            tokio::select! {
                () = stopped(&mut shutdown) => return,
                () = key_ends => {
                    self.expire().await;
                    continue;
                }
                () = refresh_due => {}
                () = self.wanted.notified() => {}
            }
            due = None;
            let outcome = tokio::select! {
                () = stopped(&mut shutdown) => return,
                outcome = self.refresh_once(REFRESH_TIMEOUT) => outcome,
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

    /// Takes up what an earlier process knew.
    async fn remember(&self) {
        if let Ready::Pinned(_) = &self.origin {
            return;
        }
        let (path, origin) = (self.memory.clone(), self.origin.name());
        let reading = tokio::task::spawn_blocking(move || store::read(&path, &origin));
        let read = reading.await.unwrap_or_else(|join| Err(join.to_string()));
        let shown = self.memory.display();
        match read {
            Ok(None) => {}
            Ok(Some(stored)) => {
                let mut progress = self.progress.lock().await;
                let kept = stored.into_iter().filter(|known| self.terms.pins(&known.key)).collect();
                progress.history = History::new(kept, |thumbprint| self.terms.revokes(thumbprint));
                let (keys, retired) = self.apply(&progress.history);
                if keys > 0 {
                    info!(source = self.source, keys, retired, "keys remembered from {shown}");
                    (self.observer)(Refresh::Remembered { keys, retired });
                }
            }
            Err(cause) => warn!(source = self.source, "the remembered keys in {shown} are not used: {cause}"),
        }
    }

    async fn refresh(&self, progress: &mut Progress, timeout: Duration) -> Result<bool, KeyRingError> {
        // Without a key that is listed, "not modified" would say nothing.
        let knows_listed = progress.history.keys().iter().any(|known| known.retired_at.is_none());
        let etag = progress.etag.as_deref().filter(|_| knows_listed);
        let loaded = self.origin.load(etag, timeout).await;
        let listed = loaded.and_then(|loaded| self.admit(loaded, progress)).inspect_err(|_| {
            progress.failures = progress.failures.saturating_add(1);
            (self.observer)(Refresh::Failed);
        })?;
        progress.failures = 0;
        let now = (self.now)();
        let is_first = progress.history.keys().is_empty();
        let change = match listed {
            Some(listed) => progress.history.observe(&listed, now),
            None => {
                progress.history.confirm(now);
                Change::default()
            }
        };
        let (keys, retired) = self.apply(&progress.history);
        let changed = !change.is_none() && !is_first;
        self.log_change(&change, is_first);
        (self.observer)(Refresh::Loaded { keys, retired, changed, unix_seconds: now });
        self.write_down(progress).await;
        Ok(!change.is_none())
    }

    /// Which keys of a document count; none when it is the one that we know.
    fn admit(&self, loaded: Loaded, progress: &mut Progress) -> Result<Option<Vec<Key>>, KeyRingError> {
        let Parsed { keys, refused } = match loaded {
            Loaded::NotModified { max_age } => {
                progress.max_age = max_age;
                return Ok(None);
            }
            Loaded::Document { parsed, etag, max_age } => {
                (progress.etag, progress.max_age) = (etag, max_age);
                parsed
            }
        };
        let (pinned, foreign): (Vec<Key>, Vec<Key>) =
            keys.keys().iter().cloned().partition(|key| self.terms.pins(key));
        if pinned.is_empty() {
            // It may be another one next time.
            progress.etag = None;
            let listed = thumbprints(keys.keys().iter());
            return Err(KeyRingError::NotPinned { from: self.origin.name(), listed });
        }
        let (revoked, listed): (Vec<Key>, Vec<Key>) =
            pinned.into_iter().partition(|key| self.terms.revokes(&key.thumbprint()));
        let mut passed_over: Vec<String> = refused.iter().map(RefusedKey::to_string).collect();
        passed_over.extend(foreign.iter().map(|key| format!("key {} is not pinned", key.thumbprint())));
        passed_over.extend(revoked.iter().map(|key| format!("key {} is revoked", key.thumbprint())));
        if progress.refused != passed_over {
            for key in &passed_over {
                warn!(source = self.source, "the JWKS document's {key}; it is not used");
            }
            progress.refused = passed_over;
        }
        Ok(Some(listed))
    }

    /// Puts to use what is trusted now; returns how many keys that are, and how many of them are retired.
    fn apply(&self, history: &History) -> (usize, usize) {
        let now = (self.now)();
        let trusted = history.trusted(now, self.terms.retired_for);
        let keys = trusted.as_ref().map_or(0, |set| set.keys().len());
        let mut current = self.trusted.write().unwrap_or_else(PoisonError::into_inner);
        // Who compares by the pointer need not compare the keys.
        if current.as_deref() != trusted.as_ref() {
            *current = trusted.map(Arc::new);
        }
        (keys, history.retired(now, self.terms.retired_for))
    }

    /// Lets go of retired keys whose time is over.
    async fn expire(&self) {
        let progress = self.progress.lock().await;
        let before = self.current();
        let (keys, retired) = self.apply(&progress.history);
        let after = self.current();
        if before != after {
            let gone = before.iter().flat_map(|set| set.keys()).filter(|key| {
                !after.iter().any(|set| set.keys().iter().any(|other| other.bytes() == key.bytes()))
            });
            warn!(
                source = self.source,
                keys = thumbprints(gone),
                "retired keys are not trusted any more; `auditgate verify` still knows them"
            );
            (self.observer)(Refresh::Expired { keys, retired });
        }
    }

    async fn write_down(&self, progress: &Progress) {
        if let Ready::Pinned(_) = &self.origin {
            return;
        }
        let (path, origin) = (self.memory.clone(), self.origin.name());
        let keys = progress.history.keys().to_vec();
        let writing = tokio::task::spawn_blocking(move || store::write(&path, &origin, &keys));
        if let Err(cause) = writing.await.unwrap_or_else(|join| Err(std::io::Error::other(join))) {
            warn!(
                source = self.source,
                "cannot write the keys down in {}: {cause}; a restart depends on the network, and forgets \
                 retired keys",
                self.memory.display()
            );
        }
    }

    fn log_change(&self, change: &Change, is_first: bool) {
        let now = self.current();
        let now = thumbprints(now.iter().flat_map(|set| set.keys()));
        if is_first {
            info!(source = self.source, keys = now, "keys loaded");
        } else if !change.is_none() {
            warn!(
                source = self.source,
                added = change.added.join(" "),
                retired = change.retired.join(" "),
                retired_for = %humantime::format_duration(self.terms.retired_for),
                now,
                "the set of trusted keys changed"
            );
        }
    }

    fn warn_of_no_keys(&self, why: &str) {
        warn!(
            source = self.source,
            "nothing is accepted until a fetch succeeds, because no key is known: {why}"
        );
    }
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

fn thumbprints<'k>(keys: impl Iterator<Item = &'k Key>) -> String {
    keys.map(Key::thumbprint).collect::<Vec<_>>().join(" ")
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
