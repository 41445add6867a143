//! The configured sources with their keys, at the start and after each reload.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use crate::config::{self, Config};
use crate::ingest::Source;
use crate::observe::metrics::Metrics;
use crate::receive::request::Route;
use crate::trust::keyring::{Fetcher, JwksOptions, KeyRing, Refresh};

/// Time for which the first fetch of keys may delay a start or a reload.
const FIRST_FETCH_TIMEOUT: Duration = Duration::from_secs(3);

/// All sources.
pub(super) struct Sources {
    all: Vec<Live>,
    stopped: watch::Receiver<bool>,
}

/// A source, and the task that refreshes its keys: it ends when no generation of the source is
/// left.
#[derive(Clone)]
struct Live {
    configured: config::Source,
    source: Arc<Source>,
    refresh_task: Option<Arc<RefreshTask>>,
}

struct RefreshTask(AbortHandle);

impl Drop for RefreshTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Sources {
    /// Creates the sources and loads their keys, where they can be loaded.
    ///
    /// # Errors
    /// One line for the operator.
    pub(super) async fn load(
        config: &Config,
        metrics: &Arc<Metrics>,
        stopped: watch::Receiver<bool>,
    ) -> Result<Self, String> {
        Self { all: Vec::new(), stopped }.reload(config, metrics).await
    }

    /// Returns the sources of a new configuration. A source whose `jwks` has not changed keeps its
    /// keys.
    ///
    /// # Errors
    /// One line for the operator; nothing has changed then.
    pub(super) async fn reload(&self, config: &Config, metrics: &Arc<Metrics>) -> Result<Self, String> {
        let mut all = Vec::with_capacity(config.sources.len());
        let mut fresh = Vec::new();
        for (name, configured) in &config.sources {
            metrics.add_source(name);
            let before = self.all.iter().find(|live| *live.source.name == **name);
            let same = before.filter(|live| live.configured.jwks == configured.jwks);
            let (keys, refresh_task) = match (same, &configured.jwks) {
                (Some(live), _) => (live.source.keys.clone(), live.refresh_task.clone()),
                (None, None) => (None, None),
                (None, Some(jwks)) => {
                    let (ring, fetcher) = ring(config, name, jwks, metrics)
                        .map_err(|error| format!("source `{name}`: {error}"))?;
                    fresh.push((all.len(), fetcher));
                    (Some(ring), None)
                }
            };
            let (name, dedup_by) = (name.as_str().into(), configured.dedup.by);
            let source = Arc::new(Source::new(name, configured.signatures, dedup_by, keys));
            all.push(Live { configured: configured.clone(), source, refresh_task });
        }
        // All at once: several key servers that do not answer cause no longer delay than one.
        let mut loading = JoinSet::new();
        for (at, mut fetcher) in fresh {
            loading.spawn(async move { (at, fetcher.load_at_start(FIRST_FETCH_TIMEOUT).await, fetcher) });
        }
        let mut loaded = Vec::new();
        while let Some(joined) = loading.join_next().await {
            let (at, outcome, fetcher) = joined.map_err(|error| error.to_string())?;
            outcome.map_err(|error| format!("source `{}`: {error}", all[at].source.name))?;
            loaded.push((at, fetcher));
        }
        for (at, fetcher) in loaded {
            let task = tokio::spawn(fetcher.run(self.stopped.clone()));
            all[at].refresh_task = Some(Arc::new(RefreshTask(task.abort_handle())));
        }
        Ok(Self { all, stopped: self.stopped.clone() })
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Source>> {
        self.all.iter().map(|live| &live.source)
    }

    /// Makes every source look for new keys now.
    pub(super) fn refresh_keys(&self) {
        self.all().filter_map(|source| source.keys.as_ref()).for_each(|keys| keys.refresh_soon());
    }

    /// Returns the routes by path, with the secrets that authorise a sender.
    pub(super) fn routes(&self) -> HashMap<String, Route> {
        let route = |live: &Live| {
            let secrets = live.configured.authorization.clone();
            let authorises = move |presented: &[u8]| {
                // Every secret is compared, so that the time does not tell which one nearly
                // matched.
                secrets.iter().fold(false, |known, secret| known | secret.matches(presented))
            };
            let source = Arc::clone(&live.source);
            let allow = live.configured.allow.clone();
            let path = live.configured.path.strip_suffix('/').unwrap_or(&live.configured.path).to_owned();
            (path, Route { source, authorises: Box::new(authorises), allow })
        };
        self.all.iter().map(route).collect()
    }
}

fn ring(
    config: &Config,
    source: &str,
    jwks: &JwksOptions,
    metrics: &Arc<Metrics>,
) -> Result<(Arc<KeyRing>, Fetcher), Box<dyn std::error::Error>> {
    let (metrics, name) = (Arc::clone(metrics), source.to_owned());
    let observer = move |refresh| match refresh {
        Refresh::Loaded { keys, retired, changed, unix_seconds } => {
            metrics.jwks_keys(&name, keys as u64, retired as u64);
            metrics.jwks_refreshed(&name, unix_seconds, changed);
        }
        Refresh::Remembered { keys, retired } | Refresh::Expired { keys, retired } => {
            metrics.jwks_keys(&name, keys as u64, retired as u64);
        }
        Refresh::Failed => metrics.jwks_refresh_error(&name),
    };
    KeyRing::new(source, jwks.clone(), &config.data_dir, observer)
}
