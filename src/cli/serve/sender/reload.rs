//! What of a sender's configuration can change while it runs.

use std::sync::Arc;

use parking_lot::RwLock;
use time::OffsetDateTime;

use super::keys::SigningKeys;
use super::{load, take_up_keys, target};
use crate::cli::exit::Failure;
use crate::config::sender::SenderConfig;
use crate::observe::logging;
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
}

impl Changeable<'_> {
    /// Takes up the configuration file as a whole or not at all, and logs which.
    pub(super) fn reload(&mut self, spool: &Spool) {
        match self.take_up(spool) {
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
        let fixed = fixed(&self.config, &new);
        if !fixed.is_empty() {
            let fixed = fixed.join(", ");
            return Err(Failure::config(format!("{fixed} cannot change while the sender runs; restart it")));
        }
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

/// Returns the names of what differs and cannot change while the sender runs.
fn fixed(before: &SenderConfig, new: &SenderConfig) -> Vec<&'static str> {
    let serve_jwks = |config: &SenderConfig| config.signing.as_ref().and_then(|signing| signing.serve_jwks);
    [
        ("data_dir", before.data_dir != new.data_dir),
        ("spool_size", before.spool_size != new.spool_size),
        ("format", before.format != new.format),
        ("signatures", before.signatures != new.signatures),
        ("receiver.url", before.receiver.url != new.receiver.url),
        ("signing.serve_jwks", serve_jwks(before) != serve_jwks(new)),
        ("[inputs]", before.inputs != new.inputs),
        ("admin.address", before.admin.address != new.admin.address),
        ("log.format", before.log.format != new.log.format),
    ]
    .into_iter()
    .filter_map(|(name, differs)| differs.then_some(name))
    .collect()
}
