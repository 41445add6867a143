//! SIGHUP, and replaced certificates: everything new is checked first, and applied as a whole or
//! not at all. A change of what cannot change while the daemon runs is refused by name.

use std::sync::Arc;

use parking_lot::RwLock;
use tokio::sync::watch;

use super::sources::Sources;
use super::status::DaemonStatus;
use super::{InForce, backlog, limits, memory_budget, rules, windows};
use crate::cli::checks::EXPIRY_WARNING_DAYS;
use crate::clock::Clock;
use crate::config::{self, Config, Secrets, Tls};
use crate::ingest::Ingest;
use crate::ledger::Ledger;
use crate::observe::health::Health;
use crate::observe::logging;
use crate::observe::metrics::Metrics;
use crate::receive::connection_limit::ConnectionLimit;
use crate::receive::request::Service;
use crate::receive::tls::Certificates;
use crate::secret::Secret;

/// Everything that a reload changes.
pub(super) struct Reload {
    /// Configuration in force.
    pub(super) config: Config,
    pub(super) sources: Sources,
    pub(super) service: Arc<Service>,
    pub(super) connection_limit: ConnectionLimit,
    pub(super) ingest: Ingest,
    pub(super) certificates: Option<Arc<Certificates>>,
    pub(super) ledger: Ledger,
    pub(super) metrics: Arc<Metrics>,
    pub(super) log: logging::Handle,
    /// Token of the admin endpoint.
    pub(super) admin_token: Arc<RwLock<Option<Secret>>>,
    pub(super) health: Arc<Health>,
    pub(super) status: Arc<DaemonStatus>,
    pub(super) in_force: watch::Sender<Arc<InForce>>,
    /// Time of the last warning about the end of the certificate, in seconds since the Unix
    /// epoch.
    pub(super) warned_at: Option<i64>,
}

/// Time before the end of a certificate from which on it is warned about, in seconds.
const EXPIRY_WARNING: i64 = EXPIRY_WARNING_DAYS * DAY;

const DAY: i64 = 86_400;

impl Reload {
    /// Reads the configuration and every file that it names again. Looks for new keys in any case.
    pub(super) async fn all(&mut self) {
        let result = self.take_up().await;
        record(&result, &self.health, &self.status, &self.metrics);
        match result {
            Ok(()) => {
                let file = self.config.file.display();
                tracing::info!(code = "config-reloaded", %file, "configuration reloaded from {file}");
            }
            Err(error) => tracing::error!(
                code = "config-reload-failed",
                "configuration not reloaded, the former one stays in force: {error}"
            ),
        }
        self.sources.refresh_keys();
    }

    async fn take_up(&mut self) -> Result<(), String> {
        let file = self.config.file.clone();
        let load = move || config::load(&file, &|name| std::env::var_os(name), Secrets::Require);
        // On a thread of its own: a file may be on a disk that does not answer.
        let loaded = tokio::task::spawn_blocking(load).await.map_err(|error| error.to_string())?;
        let new = loaded.map_err(|error| error.to_string())?;
        check_fixed(&self.config, &new)?;
        // Everything that can fail comes first.
        let sources = self.sources.reload(&new, &self.metrics).await?;
        if let (Some(certificates), Tls::Files(files)) = (&self.certificates, &new.listen.tls) {
            certificates.replace(files.clone(), now()).map_err(|error| error.to_string())?;
        }
        self.health.warn("certificate files", Ok(()));
        self.log.set_level(&new.log.level).map_err(|error| error.to_string())?;
        self.ledger.adjust(windows(&new), backlog(limits(&new)));
        self.connection_limit.resize(new.limits.connections, new.limits.connections_per_peer);
        // Batches in progress keep what they hold of the former budget.
        let memory = match new.limits.in_flight == self.config.limits.in_flight {
            true => self.service.in_force().memory.clone(),
            false => memory_budget(&new),
        };
        self.service.replace(rules(&new, &sources, &self.ingest, memory));
        *self.admin_token.write() = new.admin.token.clone();
        let _ = self.in_force.send_replace(Arc::new(InForce::of(&new, &sources)));
        (self.config, self.sources) = (new, sources);
        self.check_expiry();
        Ok(())
    }

    /// Loads certificates that were replaced; called every few seconds. A bad one is reported once.
    pub(super) fn check_certificates(&mut self) {
        let Some(certificates) = &self.certificates else { return };
        match certificates.follow(now()) {
            Ok(false) => {}
            Ok(true) => {
                self.health.warn("certificate files", Ok(()));
                tracing::info!(
                    code = "certificate-reloaded",
                    "certificate files changed; new connections get the new certificate"
                );
            }
            Err(error) => {
                self.health.warn(
                    "certificate files",
                    Err(format!("the former certificate stays in force: {error}")),
                );
                self.metrics.config_reload_error();
                tracing::error!(
                    code = "certificate-reload-failed",
                    "certificate files changed, the former certificate stays in force: {error}"
                );
            }
        }
        self.check_expiry();
    }

    fn check_expiry(&mut self) {
        let Some(end) = self.certificates.as_ref().and_then(|certificates| certificates.not_after()) else {
            return;
        };
        self.metrics.certificate_not_after(u64::try_from(end).unwrap_or(0));
        let now = now();
        if end - now < EXPIRY_WARNING && self.warned_at.is_none_or(|warned_at| now - warned_at >= DAY) {
            self.warned_at = Some(now);
            let days = (end - now).div_euclid(86_400);
            let validity = match days {
                ..0 => format!("expired {} days ago", -days),
                _ => format!("expires in {days} days"),
            };
            tracing::warn!(
                code = "certificate-expiring",
                days,
                "certificate {validity}; renew it: Konnect does not retry what fails because of a certificate"
            );
        }
    }
}

/// Refuses what cannot change while the daemon runs.
fn check_fixed(before: &Config, new: &Config) -> Result<(), String> {
    let is_off = |config: &Config| config.listen.tls == Tls::Off;
    unchanged(
        "daemon",
        &[
            ("data_dir", before.data_dir != new.data_dir),
            ("listen.address", before.listen.address != new.listen.address),
            ("listen.tls from or to \"off\"", is_off(before) != is_off(new)),
            ("admin.address", before.admin.address != new.admin.address),
            ("log.format", before.log.format != new.log.format),
            ("[sinks]", before.sinks != new.sinks),
        ],
    )
}

/// Refuses options of which one differs, with the names of those that do.
pub(super) fn unchanged(process: &str, options: &[(&str, bool)]) -> Result<(), String> {
    let names: Vec<&str> = options.iter().filter_map(|(name, differs)| differs.then_some(*name)).collect();
    if names.is_empty() {
        return Ok(());
    }
    Err(format!("{} cannot change while the {process} runs; restart it", names.join(", ")))
}

/// Shows the result of a reload in the warnings, the status report and the metrics.
pub(super) fn record(result: &Result<(), String>, health: &Health, status: &DaemonStatus, metrics: &Metrics) {
    let refused = |error: &String| format!("not reloaded, the former one stays in force: {error}");
    health.warn("configuration", result.as_ref().map(drop).map_err(refused));
    status.reloaded(result.as_ref().copied());
    if result.is_err() {
        metrics.config_reload_error();
    }
}

/// Returns the time in seconds since the Unix epoch.
pub(super) fn now() -> i64 {
    (Clock::system().wall)() / 1000
}
