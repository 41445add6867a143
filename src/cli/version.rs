//! What was built: for bug reports, and to find out whether a vulnerability concerns this program.

use std::sync::LazyLock;

/// Version of the crate.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Git commit that was built, or `unknown` where the build did not set `AUDITGATE_COMMIT`.
pub const COMMIT: &str = match option_env!("AUDITGATE_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

/// Versions of all dependencies. Cargo makes it match the build before it compiles.
const LOCK_FILE: &str = include_str!("../../Cargo.lock");

/// Returns what `--version` prints behind the name of the program; `-V` prints only [`VERSION`].
pub(super) fn long() -> &'static str {
    static LONG: LazyLock<String> = LazyLock::new(|| {
        let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
        let libc = if cfg!(target_env = "musl") { "musl" } else { "gnu" };
        format!(
            "{VERSION}\ncommit: {COMMIT}\nbuild: {profile}, {arch}-{os}-{libc}\nfeatures: daemon, send\n\
             SQLite: {sqlite}\nTLS: rustls {rustls}, aws-lc-rs {aws_lc}",
            arch = std::env::consts::ARCH,
            os = std::env::consts::OS,
            sqlite = rusqlite::version(),
            rustls = locked("rustls"),
            aws_lc = locked("aws-lc-rs"),
        )
    });
    &LONG
}

/// Returns the version of a dependency of which there is only one.
fn locked(name: &str) -> &'static str {
    let entry = format!("name = \"{name}\"\nversion = \"");
    let version = LOCK_FILE.split_once(&entry).and_then(|(_, rest)| rest.split('"').next());
    version.unwrap_or("unknown")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    fn printed(option: &str) -> String {
        super::super::Cli::try_parse_from(["auditgate", option]).unwrap_err().to_string()
    }

    #[test]
    fn the_short_version_is_one_line() {
        assert_eq!(printed("-V"), format!("auditgate {VERSION}\n"));
    }

    #[test]
    fn the_long_version_says_what_was_built() {
        let text = printed("--version");
        assert!(text.starts_with(&format!("auditgate {VERSION}\ncommit: {COMMIT}\n")), "{text}");
        assert!(text.contains(&format!("\nSQLite: {}\n", rusqlite::version())), "{text}");
        assert!(text.contains("\nTLS: rustls 0."), "{text}");
        assert!(!text.contains("aws-lc-rs unknown"), "{text}");
    }
}
