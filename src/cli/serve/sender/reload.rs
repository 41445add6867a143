//! What of a sender's configuration can change while it runs.

use std::sync::Arc;

use parking_lot::RwLock;
use time::OffsetDateTime;

use super::keys::SigningKeys;
use super::{load, take_up_keys, target};
use crate::cli::exit::Failure;
use crate::cli::serve::reload::{record, unchanged};
use crate::cli::serve::status::DaemonStatus;
use crate::config::sender::SenderConfig;
use crate::observe::health::Health;
use crate::observe::logging;
use crate::observe::metrics::Metrics;
use crate::secret::Secret;
use crate::spool::{CurrentKey, Spool};

/// The configuration in force, and where its parts are used.
pub(super) struct Changeable<'l> {
    pub(super) config: SenderConfig,
    pub(super) keys: Option<SigningKeys>,
    pub(super) key: CurrentKey,
    pub(super) key_set: Arc<RwLock<String>>,
    pub(super) admin_token: Arc<RwLock<Option<Secret>>>,
    pub(super) log: &'l logging::Handle,
    pub(super) health: Arc<Health>,
    pub(super) status: Arc<DaemonStatus>,
    pub(super) metrics: Arc<Metrics>,
}

impl Changeable<'_> {
    /// Takes up the configuration file as a whole or not at all, and logs which.
    pub(super) fn reload(&mut self, spool: &Spool) {
        let result = self.take_up(spool).map_err(|error| error.to_string());
        record(&result, &self.health, &self.status, &self.metrics);
        match result {
            Ok(()) => {
                let file = self.config.file.display();
                tracing::info!(code = "sender-reloaded", %file, "configuration reloaded from {file}");
            }
            Err(error) => tracing::error!(
                code = "sender-reload-failed",
                "configuration not reloaded, the former one stays in force: {error}"
            ),
        }
    }

    fn take_up(&mut self, spool: &Spool) -> Result<(), Failure> {
        let new = load(&self.config.file)?;
        check_fixed(&self.config, &new).map_err(Failure::config)?;
        // Everything that can fail comes first.
        let target = target(&new.receiver)?;
        self.keys = take_up_keys(&new, &self.key, &self.key_set)?;
        self.log.set_level(&new.log.level).map_err(Failure::config)?;
        spool.retarget(target);
        *self.admin_token.write() = new.admin.token.clone();
        self.config = new;
        Ok(())
    }

    /// Lets a key sign whose time has come.
    pub(super) fn begin_due_key(&self) {
        if let Some(keys) = &self.keys {
            keys.take_up(&self.key, OffsetDateTime::now_utc());
        }
    }
}

/// Refuses what cannot change while the sender runs.
fn check_fixed(before: &SenderConfig, new: &SenderConfig) -> Result<(), String> {
    let serve_jwks = |config: &SenderConfig| config.signing.as_ref().and_then(|signing| signing.serve_jwks);
    unchanged(
        "sender",
        &[
            ("data_dir", before.data_dir != new.data_dir),
            ("spool_size", before.spool_size != new.spool_size),
            ("format", before.format != new.format),
            ("signatures", before.signatures != new.signatures),
            ("receiver.url", before.receiver.url != new.receiver.url),
            ("signing.serve_jwks", serve_jwks(before) != serve_jwks(new)),
            ("[inputs]", before.inputs != new.inputs),
            ("admin.address", before.admin.address != new.admin.address),
            ("log.format", before.log.format != new.log.format),
        ],
    )
}
