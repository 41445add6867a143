//! The configuration file as an argument: named the same way for every command.

use std::path::PathBuf;

use super::exit::Failure;
use crate::config::{self, Config, Secrets};

/// The argument `--config FILE`, `-c FILE`, or the default path.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct ConfigFile {
    /// The configuration file
    #[arg(long, short, value_name = "FILE", default_value = config::DEFAULT_FILE)]
    pub config: PathBuf,
}

impl ConfigFile {
    /// Loads the configuration, with secrets from this process's environment.
    ///
    /// # Errors
    /// 78, with all of its problems, one a line.
    pub fn load(&self, secrets: Secrets) -> Result<Config, Failure> {
        config::load(&self.config, &|name| std::env::var_os(name), secrets).map_err(Failure::config)
    }
}
