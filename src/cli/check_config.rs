//! `auditgate check-config`: what is wrong with a configuration, or what it comes to.

use std::io::{self, Write as _};
use std::path::PathBuf;

use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::checks::{self, Severity};
use super::config_file::ConfigFile;
use super::exit::Failure;
use crate::config::sender::SenderConfig;
use crate::config::{Config, Secrets};
use crate::escape::escape;

/// Says what is wrong with a configuration, of the daemon or of a sender, or prints the effective
/// one.
///
/// Every problem comes with its line and a hint, and the exit code is then 78. Otherwise the
/// configuration is printed as TOML with all defaults filled in, all paths absolute and secrets
/// masked. Certificates, keys and key sets are loaded with --deep only.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Args {
    /// The same as --config FILE
    #[arg(value_name = "FILE", conflicts_with = "config")]
    pub file: Option<PathBuf>,

    #[command(flatten)]
    pub config: ConfigFile,

    /// Check on a machine that does not hold the secrets: one that cannot be read is left unread
    #[arg(long)]
    pub skip_secrets: bool,

    /// Check also what the daemon would meet: certificate, directories, space, ledger, ports, key
    /// sets and syslog servers
    #[arg(long)]
    pub deep: bool,

    /// Check with the rights of this user, the daemon's; only root may
    #[arg(long, value_name = "USER")]
    pub as_user: Option<String>,

    /// Print problems only
    #[arg(long, short)]
    pub quiet: bool,
}

/// Checks the file and prints the effective configuration to `out`.
///
/// # Errors
/// The configuration's problems, one a line (exit code 78), or `out` that cannot be written (74).
pub fn run(args: &Args, out: &mut dyn io::Write) -> Result<(), Failure> {
    // Before there are other threads, which would keep their rights.
    args.as_user.as_deref().map_or(Ok(()), become_user)?;
    let secrets = if args.skip_secrets { Secrets::SkipMissing } else { Secrets::Require };
    let named = args.file.clone().map_or_else(|| args.config.clone(), |config| ConfigFile { config });
    if SenderConfig::is_in(&named.config) {
        if args.deep {
            return Err(Failure::usage(
                "--deep is for the daemon's configuration: leave it out for a sender's",
            ));
        }
        let environment = |name: &str| std::env::var_os(name);
        let config = SenderConfig::load(&named.config, &environment, secrets).map_err(Failure::config)?;
        return if args.quiet { Ok(()) } else { print(&config.to_toml().map_err(Failure::bug)?, out) };
    }
    let config = named.load(secrets)?;
    for warning in config.warnings() {
        // What cannot be said does not make the configuration wrong.
        let _ = writeln!(io::stderr(), "auditgate: warning: {}", escape(&warning));
    }
    if args.deep {
        deep(&config)?;
    }
    if args.quiet {
        return Ok(());
    }
    print(&config.to_toml().map_err(Failure::bug)?, out)
}

fn print(text: &str, out: &mut dyn io::Write) -> Result<(), Failure> {
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Failure::io(format!("cannot write the configuration to standard output: {error}")))
}

/// Prints the warnings.
///
/// # Errors
/// The errors, one a line.
fn deep(config: &Config) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::io(format!("cannot start threads: {error}")))?;
    let found = runtime.block_on(checks::all(config));
    // A name server or a disk that does not answer may hold a thread.
    runtime.shutdown_background();
    let (errors, warnings): (Vec<_>, Vec<_>) =
        found.into_iter().partition(|finding| finding.severity > Severity::Warning);
    for warning in warnings {
        let _ = writeln!(io::stderr(), "auditgate: warning: {}", escape(&warning.to_string()));
    }
    let errors: Vec<_> = errors.iter().map(ToString::to_string).collect();
    if errors.is_empty() { Ok(()) } else { Err(Failure::config(errors.join("\n"))) }
}

/// Gives this thread, and those that it starts, the rights of another user.
fn become_user(name: &str) -> Result<(), Failure> {
    let unknown = || Failure::usage(format!("--as-user: this machine has no user `{name}`"));
    let user = uzers::get_user_by_name(name).ok_or_else(unknown)?;
    let groups = uzers::get_user_groups(name, user.primary_group_id()).ok_or_else(unknown)?;
    let groups: Vec<_> = groups.iter().map(|group| Gid::from_raw(group.gid())).collect();
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.primary_group_id()));
    set_thread_groups(&groups)
        .and_then(|()| set_thread_res_gid(gid, gid, gid))
        .and_then(|()| set_thread_res_uid(uid, uid, uid))
        .map_err(|error| {
            let error = io::Error::from(error);
            Failure::usage(format!("--as-user {name}: {error}; only root may check as another user"))
        })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;
    use crate::cli::exit::Exit;

    const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/config.example.toml");

    fn check(file: &Path, skip_secrets: bool) -> Result<String, Failure> {
        let mut out = Vec::new();
        run(
            &Args { config: ConfigFile { config: file.to_owned() }, skip_secrets, ..Args::default() },
            &mut out,
        )?;
        Ok(String::from_utf8(out).unwrap())
    }

    /// Without the first line, which names the file.
    fn body(text: &str) -> &str {
        text.split_once('\n').unwrap().1
    }

    /// The keys of all tables, `sources.konnect-us.jwks.url` and so on.
    fn keys(table: &toml::Table, prefix: &str, found: &mut BTreeSet<String>) {
        for (key, value) in table {
            let key = format!("{prefix}{key}");
            if let Some(table) = value.as_table() {
                keys(table, &format!("{key}."), found);
            }
            found.insert(key);
        }
    }

    #[test]
    fn the_example_passes_without_its_secrets_and_shows_the_defaults() {
        let text = check(Path::new(EXAMPLE), true).unwrap();
        let effective: toml::Table = text.parse().unwrap();
        let example: toml::Table = std::fs::read_to_string(EXAMPLE).unwrap().parse().unwrap();
        assert_eq!(effective["limits"], example["limits"]);
        assert_eq!(effective["admin"], example["admin"]);
        assert_eq!(effective["log"], example["log"]);
        assert_eq!(effective["sources"]["konnect-us"]["dedup"], example["sources"]["konnect-us"]["dedup"]);
        assert_eq!(effective["sources"]["konnect-us"]["jwks"], example["sources"]["konnect-us"]["jwks"]);

        let (mut shown, mut written) = (BTreeSet::new(), BTreeSet::new());
        keys(&effective, "", &mut shown);
        keys(&example, "", &mut written);
        // The second sink leaves at their defaults what the first one explains.
        let added: Vec<_> =
            shown.difference(&written).filter(|key| !key.starts_with("sinks.rejects.")).collect();
        assert!(added.is_empty(), "{added:?}");
    }

    #[test]
    fn what_the_example_shows_commented_out_is_right_too() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.toml");
        let text = std::fs::read_to_string(EXAMPLE).unwrap();
        // Prose has a space behind its `#`.
        let all: String = text
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(rest) if rest.starts_with(|first: char| first == '[' || first.is_ascii_lowercase()) => {
                    rest
                }
                _ => line,
            })
            .map(|line| format!("{line}\n"))
            .collect();
        std::fs::write(&file, &all).unwrap();
        let effective: toml::Table = check(&file, true).unwrap().parse().unwrap();
        let written: toml::Table = all.parse().unwrap();
        for (name, sink) in written["sinks"].as_table().unwrap() {
            for (key, value) in sink.as_table().unwrap().iter().filter(|(key, _)| *key != "stream") {
                assert_eq!(effective["sinks"][name].get(key), Some(value), "{name}.{key}");
            }
        }
        assert!(written["sinks"].get("siem").is_some());
    }

    #[test]
    fn the_examples_limits_are_the_defaults() {
        let directory = tempfile::tempdir().unwrap();
        let text = std::fs::read_to_string(EXAMPLE).unwrap();
        let short: String = text
            .lines()
            .filter(|line| {
                let limit = [
                    "body",
                    "decoded",
                    "lin",
                    "connections",
                    "connections_per_peer",
                    "request_timeout",
                    "in_flight",
                    "backlog",
                ];
                let others = ["level", "signatures", "dedup"];
                !limit.iter().chain(&others).any(|key| line.starts_with(key))
            })
            .map(|line| format!("{line}\n"))
            .collect();
        let file = directory.path().join("config.toml");
        std::fs::write(&file, short).unwrap();
        assert_eq!(body(&check(&file, true).unwrap()), body(&check(Path::new(EXAMPLE), true).unwrap()));
    }

    #[test]
    fn what_is_printed_loads_and_prints_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.toml");
        let text = r#"
            data_dir = "da\"ta\\\u202e"
            listen = { address = "[::1]:0", tls = "off" }
            admin = { address = "unix:///run/au\"dit/admin.sock", token = { value = "hush-6" } }
            log = { format = "json" }
            limits = { lines = 5, line = 1025, request_timeout = "90s", body = "1.5MiB" }
            [sources.us]
            path = "/us"
            authorization = [{ value = "hush-1" }, { value = "hush-2" }]
            jwks = { url = "https://x.test/", refresh = "90m", ca = "ca", token = { value = "hush-3" } }
            dedup = { by = "trace_id", window = "1500ms" }
            [sources."a.b"]
            path = "/ab"
            authorization = { value = "hush-4" }
            jwks = { file = "keys.json" }
            signatures = "accept-unsigned"
            [sources.off]
            path = "/off"
            authorization = { value = "hush-5" }
            signatures = "off"
            [sinks.good]
            type = "file"
            path = "good.log"
            format = "raw"
            sources = ["us", "a.b"]
            [sinks.rest]
            type = "file"
            path = "rest.jsonl"
            format = "json"
            stream = ["unverified", "quarantine"]
            [sinks.all]
            type = "sqlite"
            path = "all.db"
            retain = "36h"
            when_full = "skip"
            stream = ["verified", "unverified", "quarantine"]
            [sinks.us]
            type = "sqlite"
            path = "us.db"
            sources = ["us"]
            [sinks.siem]
            type = "syslog"
            address = "tls://siem.test"
            ca = "ca.pem"
            cert = "c.pem"
            key = "k.pem"
            structured_data = true
            [sinks.local]
            type = "syslog"
            address = "unix:///dev/log"
            [sinks.old]
            type = "syslog"
            address = "udp://[::1]"
        "#;
        std::fs::write(&file, text).unwrap();
        let first = check(&file, false).unwrap();
        assert!(!first.contains("hush"), "{first}");
        assert!(!first.contains('\u{202e}'), "{first}");
        assert!(first.contains("authorization = [{ value = \"***\" }, { value = \"***\" }]"), "{first}");
        assert!(
            first.contains("window = \"1500ms\"") && first.contains("request_timeout = \"90s\""),
            "{first}"
        );
        assert!(first.contains("line = \"1025B\"") && first.contains("body = \"1536KiB\""), "{first}");

        std::fs::write(&file, &first).unwrap();
        assert_eq!(check(&file, false).unwrap(), first);
    }

    #[test]
    fn problems_end_with_the_configurations_exit_code() {
        let failure = check(Path::new(EXAMPLE), false).unwrap_err();
        assert_eq!(failure.exit, Exit::Config);
        assert!(failure.message.contains("/etc/auditgate/tokens/us"), "{failure}");
        assert_eq!(failure.message.lines().count(), 1, "{failure}");
    }

    #[test]
    fn a_closed_output_is_an_error_of_output() {
        let mut full: &mut [u8] = &mut [];
        let args = Args { file: Some(PathBuf::from(EXAMPLE)), skip_secrets: true, ..Args::default() };
        assert_eq!(run(&args, &mut full).unwrap_err().exit, Exit::Io);
    }
}
