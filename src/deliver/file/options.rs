//! Options of a file sink in the configuration.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

use super::Rotation;
use crate::quantity::{octal, parsed, time};

/// Options of a file sink: its path, and the form of what is written.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct FileOptions {
    /// The file, or a symbolic link to it, which is followed; its directory must exist. No other
    /// sink writes to it.
    pub path: PathBuf,
    /// Format of the lines.
    pub format: Rendering,
    /// Rotation of the file. Default: [`Rotation::of_quarantine`] where the sink takes nothing but
    /// the stream `quarantine`, which any holder of a token can fill; otherwise never.
    #[serde(default)]
    pub rotate: Option<Rotation>,
    /// Policy for syncing. Default [`Syncing::Batch`].
    #[serde(default)]
    pub fsync: Syncing,
    /// Time from a write to its sync with [`Syncing::Interval`]: 1 ms to 3650 d. Default 1 s.
    #[serde(default, with = "time")]
    pub fsync_interval: Option<Duration>,
    /// Permission bits of files that we create, whatever the umask is. Default 0640.
    #[serde(default = "mode", with = "octal")]
    pub mode: u32,
    /// Owner of files that we create, as `USER:GROUP`, `USER` or `:GROUP`, by name or number;
    /// default the daemon's user and group.
    #[serde(default, deserialize_with = "owner")]
    pub owner: Option<String>,
}

/// Format of the lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Rendering {
    /// Each line as it was received; for one stream only.
    Raw,
    /// One JSON record a line.
    Json,
}

/// Policy for syncing writes to the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Syncing {
    /// Syncs with each flush.
    #[default]
    Batch,
    /// Syncs at most `fsync_interval` after the write. The position advances only after the sync.
    Interval,
}

impl FileOptions {
    /// Returns the defaults for a file.
    pub fn new(path: PathBuf, format: Rendering) -> Self {
        let (rotate, fsync_interval, owner) = (None, None, None);
        Self { path, format, rotate, fsync: Syncing::default(), fsync_interval, mode: mode(), owner }
    }

    /// Fills in the defaults that depend on other options. `is_quarantine`: the sink takes no other
    /// stream, so that no verified event can be among what the default rotation removes.
    pub fn fill_in(&mut self, is_quarantine: bool) {
        self.rotate.get_or_insert_with(|| match is_quarantine {
            true => Rotation::of_quarantine(),
            false => Rotation::default(),
        });
        if self.fsync == Syncing::Interval {
            self.fsync_interval = Some(self.interval());
        }
    }

    pub(super) fn interval(&self) -> Duration {
        self.fsync_interval.unwrap_or(Duration::from_secs(1))
    }

    /// Reports options that exclude each other to `problem`, with the reason.
    pub fn check(&self, problem: &mut dyn FnMut(&[&str], String)) {
        if self.fsync_interval.is_some() && self.fsync != Syncing::Interval {
            let text =
                "`fsync_interval` without fsync = \"interval\"; write fsync = \"interval\", or remove it";
            problem(&["fsync_interval", "fsync"], text.to_owned());
        }
    }
}

fn mode() -> u32 {
    0o640
}

fn owner<'de, D: Deserializer<'de>>(written: D) -> Result<Option<String>, D::Error> {
    parsed(written, |text| match text.matches(':').count() {
        0 | 1 if !matches!(text, "" | ":") => Ok(Some(text.to_owned())),
        _ => Err(format!("`{text}` is not an owner; write \"user:group\", \"user\" or \":group\"")),
    })
}
